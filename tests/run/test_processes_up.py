"""Several processes as one service: `serve --workers`, `up` and `down`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest
from test_drain import half_a_request, order_body, read_to_end, refuses_connections, sockets_address

from auditing import assert_sound, charges, gateway_with_ledger, jobs_left, order_ids, wait_until
from serving import PATIENCE_SECONDS, Program, Serving, environment
from verifying import assert_verified

#: Seconds that one command may take; `up` gives up by itself after 30.
COMMAND_SECONDS_MAX = 50.0
#: Seconds in which a process whose end was reported is gone from the table, too.
AT_ONCE_SECONDS = 2.0

ORDER = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 2, "price": "1.20"}]}


def run(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expediter", *arguments],
        cwd=folder,
        env=environment(folder, **settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS_MAX,
        check=False,
    )


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children()


def alive(process: psutil.Process) -> bool:
    """Tell whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def all_ended(processes: list[psutil.Process]) -> bool:
    return not any(alive(process) for process in processes)


def get(url: str, path: str) -> int:
    """Return the status of a request by a connection of its own."""
    return httpx2.get(f"{url}{path}", timeout=PATIENCE_SECONDS).status_code


@contextmanager
def paused(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


class Up:
    """A service in the background, started by `up` in `folder`; `pid` is its supervisor's."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.settings = settings
        self.ended = run(folder, "up", **settings)
        assert self.ended.returncode == 0, self.ended.stderr
        self.url = self.ended.stdout.split()[-1]
        self.pid = self.pid_of("expediter")
        self.supervisor = psutil.Process(self.pid)
        self.started = [self.supervisor, *children(self.pid)]

    def __enter__(self) -> Up:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End what is left of it, by the numbers of what was started, and hold its database against the laws."""
        left = [process for process in self.started if alive(process)]
        if alive(self.supervisor):
            left += [process for process in self.supervisor.children() if process not in left]
        for process in left:  # the supervisor first, so that it starts nothing again
            if alive(process):
                process.kill()
        wait_until(lambda: all_ended(left))
        if kind is None:
            used = environment(self.folder, **self.settings)
            ledger = Path(used.get("PAYMENT_GATEWAY", "").removeprefix("simulated://").partition("?")[0])
            assert_verified(used["DATABASE_URL"], ledger if ledger.is_file() else None)

    def pid_of(self, name: str) -> int:
        return int((self.folder / "run" / f"{name}.pid").read_text())

    def down(self) -> subprocess.CompletedProcess[str]:
        return run(self.folder, "down", **self.settings)

    def supervisors_log(self) -> str:
        return (self.folder / "run" / "supervisor.log").read_text()


def test_two_processes_answer_on_one_port(folder: Path) -> None:
    """With `--workers 2` each of two processes answers when the other one does not."""
    with Serving(folder, "--workers", "2") as service:
        one, other = children(service.process.pid)
        for still in (one, other):
            with paused(still):
                assert [get(service.url, "/healthz") for _ in range(20)] == [200] * 20
        assert service.stop() == 0
        assert all_ended([one, other])


def test_many_processes_are_announced_once(folder: Path) -> None:
    """API_WORKERS=3 opens with one announcement, of one address and of all workers."""
    with Serving(folder, API_WORKERS="3", WORKER_COUNT="2", WORKER_CONCURRENCY="7") as service:
        service.wait_for(r"open http://\S+/docs")
        text = "\n".join(service.log)
        assert text.count("listens on") == 1
        assert "orders   SQLite" in text
        assert "in each of 3 processes, 14 at once" in text
        assert len(children(service.process.pid)) == 3


def test_orders_taken_by_several_processes_come_to_rest(folder: Path) -> None:
    """Orders placed at two processes that also work are all stored, charged once, and at rest in the end."""
    with Serving(folder, "--workers", "2", PAYMENT_GATEWAY=gateway_with_ledger(folder)) as service:
        for number in range(40):
            answer = httpx2.post(f"{service.url}/orders", json=ORDER | {"order_id": f"A-{number}"}, timeout=30)
            assert answer.status_code == 201
        wait_until(lambda: jobs_left(folder) == 0)
        assert service.stop() == 0
    assert len(charges(folder)) == 40
    assert_sound(folder)


def test_one_serving_process_has_no_supervisor(folder: Path) -> None:
    """`serve` with one process is that process alone."""
    with Serving(folder, "--workers", "1") as service:
        assert children(service.process.pid) == []
        assert service.stop() == 0


def test_a_killed_process_comes_back(folder: Path) -> None:
    """A serving process that is killed is started again, with the signal in the log, and requests go on."""
    with Serving(folder, "--workers", "2") as service:
        before = children(service.process.pid)
        before[0].kill()
        assert [get(service.url, "/healthz") for _ in range(10)] == [200] * 10
        service.wait_for(r"is started again.*SIGKILL")

        def again() -> list[psutil.Process]:
            return [process for process in children(service.process.pid) if process not in before]

        wait_until(lambda: len(again()) == 1)
        with paused(before[1]):
            assert get(service.url, "/healthz") == 200, "the new one answers alone"
        assert service.stop() == 0


def test_a_rolling_restart_fails_no_request(folder: Path) -> None:
    """While each process is stopped in turn and comes back, every request by a fresh connection is answered."""
    over = threading.Event()

    def keep_asking(address: tuple[str, int]) -> list[bytes]:
        answers = []
        while not over.is_set():
            with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
                answers.append(read_to_end(connection).partition(b"\r\n")[0])
        return answers

    with Serving(folder, "--workers", "2", DRAIN_SECONDS="5") as service, ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(keep_asking, sockets_address(service.url)) for _ in range(8)]
        try:
            for process in children(service.process.pid):
                process.terminate()
                service.wait_for("with exit status 0.*is started again|is started again.*with exit status 0")
                wait_until(lambda gone=process: both_ready(service) and gone not in children(service.process.pid))
        finally:
            over.set()
        answers = [answer for each in asking for answer in each.result()]
        assert len(answers) > 100
        assert set(answers) == {b"HTTP/1.1 200 OK"}
        assert service.stop() == 0
    assert "timeout graceful shutdown exceeded" not in "\n".join(service.log)


def both_ready(service: Serving) -> bool:
    """Tell whether two processes have taken up connections, which they do once they are ready."""
    family = children(service.process.pid)
    return len(family) == 2 and all(process.net_connections() != [] for process in family)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_every_process(folder: Path, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C answer what is under way at each process, end all of them, and exit 0."""
    with Serving(folder, "--workers", "2") as service:
        family = children(service.process.pid)
        connections = [half_a_request(service.url, order_body(number)) for number in range(12)]
        service.process.send_signal(number)
        wait_until(lambda: refuses_connections(service.url))
        for sent, connection in enumerate(connections):
            body = order_body(sent)
            connection.sendall(body[len(body) // 2 :])
            with connection:
                assert read_to_end(connection).startswith(b"HTTP/1.1 201 ")
        assert service.process.wait(PATIENCE_SECONDS) == 0
        service.stop()
    assert all_ended(family)
    assert len(order_ids(folder)) == 12
    assert "Traceback" not in "\n".join(service.log)


def test_processes_end_without_their_supervisor(folder: Path) -> None:
    """When the supervisor is killed its processes notice, drain and end."""
    with Serving(folder, "--workers", "2") as service:
        family = children(service.process.pid)
        connection = half_a_request(service.url, order_body(1))
        service.process.kill()
        wait_until(lambda: refuses_connections(service.url))
        connection.sendall(order_body(1)[len(order_body(1)) // 2 :])
        with connection:
            assert read_to_end(connection).startswith(b"HTTP/1.1 201 ")
        wait_until(lambda: all_ended(family))
        service.kill()  # it is gone: this closes what belongs to it
    assert len(order_ids(folder)) == 1


def test_a_process_that_does_not_stop_is_killed(folder: Path) -> None:
    """A process that does not react to SIGTERM is killed after the drain time, and the exit status tells."""
    with Serving(folder, "--workers", "2", DRAIN_SECONDS="0") as service:
        one, other = children(service.process.pid)
        one.suspend()
        assert service.stop() == 1
        assert all_ended([one, other])
    assert "is killed" in "\n".join(service.log)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"PAYMENT_GATEWAY": "barter"}, "PAYMENT_GATEWAY"),
        ({"ACCESS_LOG_FORMAT": "%(zz)s"}, "%(zz)s"),
        ({"HOST": "0.0.0.0"}, "--insecure"),
        ({"API_WORKERS": "65"}, "API_WORKERS"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_wrong_setting_ends_everything(folder: Path, command: str, settings: dict[str, str], word: str) -> None:
    """A setting that cannot be used ends every process, with exit 2 and one message that names it."""
    ended = run(folder, command, **{"API_WORKERS": "2", "WORKER_COUNT": "2"} | settings)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.count(word) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(folder.glob("run/*.pid")) == []


@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_port_in_use_is_said_at_once(folder: Path, command: str) -> None:
    """A port that something else listens on ends the start with exit 1 and its number."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run(folder, command, API_WORKERS="2", PORT=port)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert f"127.0.0.1:{port} cannot be used" in ended.stderr


def test_up_and_down(folder: Path) -> None:
    """`up` prints the address, `down` what it stopped; in between orders are taken and brought to rest."""
    with Up(folder, API_WORKERS="2", WORKER_COUNT="2", PAYMENT_GATEWAY=gateway_with_ledger(folder)) as service:
        assert service.ended.stdout == f"Expediter is up at {service.url}\n"
        assert "orders   SQLite" in service.ended.stderr
        assert "2 processes, 25 at once in each" in service.ended.stderr
        assert get(service.url, "/readyz") == 200
        names = ["api-1", "api-2", "worker-1", "worker-2"]
        assert {service.pid_of(name) for name in names} == {child.pid for child in children(service.pid)}
        assert os.getsid(service.pid) == service.pid, "it outlives the terminal"
        for number in range(30):
            answer = httpx2.post(f"{service.url}/orders", json=ORDER | {"order_id": f"A-{number}"}, timeout=30)
            assert answer.status_code == 201
        wait_until(lambda: jobs_left(folder) == 0)

        pids = {name: service.pid_of(name) for name in names}
        ended = service.down()
        assert ended.returncode == 0, ended.stderr
        said = ", ".join(f"{name} (pid {pid})" for name, pid in pids.items())
        assert ended.stdout == f"Stopped {said}, supervisor (pid {service.pid})\n"
        wait_until(lambda: all_ended(service.started), AT_ONCE_SECONDS)
        assert refuses_connections(service.url)
        files = {path.name for path in (folder / "run").iterdir()}
        assert files == {f"{name}.log" for name in [*names, "supervisor"]}
        assert "works off SQLite" in (folder / "run" / "worker-2.log").read_text()
    assert len(charges(folder)) == 30
    assert_sound(folder)


def test_down_can_be_said_twice(folder: Path) -> None:
    """`down` with nothing up says so and exits 0, before, after, and without a folder."""
    assert run(folder, "down").stdout == "Nothing is up (run/expediter.pid)\n"
    assert list(folder.iterdir()) == []
    with Up(folder, WORKER_COUNT="1") as service:
        assert service.down().returncode == 0
        ended = service.down()
        assert (ended.returncode, ended.stdout) == (0, "Nothing is up (run/expediter.pid)\n")


def test_a_second_up_is_refused(folder: Path) -> None:
    """A second `up` in the same folder names the first one's number and leaves it alone."""
    with Up(folder, WORKER_COUNT="1") as service:
        for arguments in (("up",), ("up", "--foreground")):
            ended = run(folder, *arguments)
            assert (ended.returncode, ended.stdout) == (1, "")
            assert f"up already (pid {service.pid}" in ended.stderr
        assert get(service.url, "/readyz") == 200
        assert len(children(service.pid)) == 2
        assert service.down().returncode == 0


def test_two_services_have_two_folders(folder: Path) -> None:
    """With a RUN_DIR of its own a second service runs beside the first, and `down` stops the one it is told."""
    with ExitStack() as stack:
        first = stack.enter_context(Up(folder, WORKER_COUNT="1"))
        other = folder / "other"
        other.mkdir()
        second = stack.enter_context(Up(other, WORKER_COUNT="1", DATABASE_URL=f"sqlite:///{folder}/orders.db"))
        assert first.down().returncode == 0
        wait_until(lambda: all_ended(first.started))
        assert get(second.url, "/readyz") == 200
        assert second.down().returncode == 0


def test_a_number_left_behind_is_not_believed(folder: Path) -> None:
    """A pid file with the number of a stranger's process: `down` leaves that alone, `up` takes the file over."""
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:
            (folder / "run").mkdir()
            for name in ("expediter", "worker-1"):
                (folder / "run" / f"{name}.pid").write_text(f"{stranger.pid}\n")
            assert run(folder, "down").stdout == "Nothing is up (run/expediter.pid)\n"
            assert list((folder / "run").iterdir()) == []
            assert stranger.poll() is None

            (folder / "run" / "expediter.pid").write_text(f"{stranger.pid}\n")
            with Up(folder, WORKER_COUNT="1") as service:
                assert service.pid != stranger.pid
                assert service.down().returncode == 0
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_up_again_after_a_killed_supervisor(folder: Path) -> None:
    """A supervisor that is killed takes its processes with it, and the next `up` takes over what it left."""
    with ExitStack() as stack:
        first = stack.enter_context(Up(folder, WORKER_COUNT="1"))
        first.supervisor.kill()
        wait_until(lambda: all_ended(first.started))
        assert (folder / "run" / "expediter.pid").exists()
        second = stack.enter_context(Up(folder, WORKER_COUNT="1"))
        assert get(second.url, "/readyz") == 200
        assert second.down().returncode == 0
        wait_until(lambda: all_ended(second.started))


def test_what_keeps_dying_is_started_ever_more_slowly(folder: Path) -> None:
    """A worker that is killed again and again comes back after 0.1, 0.2, 0.4 seconds, and its pid file follows."""
    with Up(folder, WORKER_COUNT="1", LOG_FORMAT="json") as service:
        for _ in range(3):
            pid = service.pid_of("worker-1")
            os.kill(pid, signal.SIGKILL)

            def back(gone: int = pid) -> bool:
                path = folder / "run" / "worker-1.pid"
                text = path.read_text().strip() if path.exists() else ""
                return text not in ("", str(gone))

            wait_until(back)
        lines = [json.loads(line) for line in service.supervisors_log().splitlines() if line.startswith("{")]
        deaths = [line for line in lines if line.get("process") == "worker-1"]
        assert [line["pause_seconds"] for line in deaths] == [0.1, 0.2, 0.4]
        assert {line["ended"] for line in deaths} == {"by signal SIGKILL"}
        assert get(service.url, "/readyz") == 200
        assert service.down().returncode == 0


def test_up_that_fails_says_why_and_leaves_nothing(folder: Path) -> None:
    """If the service cannot come up, `up` exits 1 with the end of the log, and no process is left."""
    ended = run(folder, "up", DATABASE_URL="postgresql://nobody@127.0.0.1:1/orders")
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    assert "run/supervisor.log:" in ended.stderr
    assert "127.0.0.1" in ended.stderr
    assert list(folder.glob("run/*.pid")) == []
    left = [process for process in psutil.process_iter() if alive(process) and works_in(process, folder)]
    assert left == []


def works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd() == str(folder)
    except psutil.Error:
        return False


def test_a_run_dir_that_cannot_be_used_is_named(folder: Path) -> None:
    """A RUN_DIR that is a file ends `up` with exit 2 and its name; nothing is up there."""
    (folder / "taken").write_text("")
    assert run(folder, "down", RUN_DIR="taken").stdout == "Nothing is up (taken/expediter.pid)\n"
    ended = run(folder, "up", RUN_DIR="taken")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "RUN_DIR=taken" in ended.stderr


def test_up_in_the_foreground(folder: Path) -> None:
    """`up --foreground` stays until SIGTERM, or until `down`, with exit 0 and no pid file left."""
    for by_down in (False, True):
        program = Program(folder, "up", "--foreground", WORKER_COUNT="1")
        try:
            url = program.wait_for(r"listens on (http://\S+)")[1]
            family = children(program.process.pid)
            wait_until(lambda url=url: get(url, "/readyz") == 200)  # type: ignore[misc]
            if by_down:
                assert run(folder, "down").stdout.endswith(f"supervisor (pid {program.process.pid})\n")
                assert program.process.wait(PATIENCE_SECONDS) == 0
            assert program.stop() == 0
            assert all_ended(family)
            assert list((folder / "run").glob("*.pid")) == []
        finally:
            if program.process.poll() is None:
                program.kill()
