"""What one asks of a service that `up` started: `restart`, `status` and `logs`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import psutil
from test_processes_up import COMMAND_SECONDS_MAX, ORDER, Up, all_ended, children, run

from auditing import order_ids, wait_until
from serving import PATIENCE_SECONDS, Serving, environment

SETTINGS = {"API_WORKERS": "2", "WORKER_COUNT": "2"}
NAMES = ["api-1", "api-2", "worker-1", "worker-2"]


def state(at: Up, *options: str) -> dict[str, Any]:
    """Return what `status --json` says."""
    ended = run(at.folder, "status", "--json", *options, **at.settings)
    assert ended.returncode == 0, (ended.stdout, ended.stderr)
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def numbers(at: Up) -> dict[str, int]:
    return {name: at.pid_of(name) for name in NAMES}


def another_in_place_of(at: Up, pid: int) -> bool:
    """Tell whether there is one of each process again, and none with this number."""
    there = {process.pid for process in children(at.pid)}
    return len(there) == len(NAMES) and pid not in there


def restarted(at: Up) -> subprocess.CompletedProcess[str]:
    ended = run(at.folder, "restart", **at.settings)
    at.started += children(at.pid)
    return ended


def test_a_restart_renews_every_process_and_fails_no_request(folder: Path) -> None:
    """While every process is renewed each order that is placed is taken, and is there afterwards."""
    with Up(folder, **SETTINGS) as service:
        before = numbers(service)
        taken: list[str] = []
        failed: list[object] = []
        done = threading.Event()

        def place() -> None:
            while not done.is_set():
                try:
                    # A connection each time: nobody's old one hides that a new one is refused.
                    answer = httpx2.post(f"{service.url}/orders", json=ORDER, timeout=PATIENCE_SECONDS)
                except httpx2.HTTPError as error:
                    failed.append(error)
                else:
                    taken.append(answer.json()["order_id"]) if answer.status_code == 201 else failed.append(answer)

        def wait() -> None:
            # Somebody always waits for an answer when a process is told to stop.
            while not done.is_set():
                try:
                    path = f"/orders/{taken[0]}?wait=2&min_version=99"
                    answer = httpx2.get(f"{service.url}{path}", timeout=PATIENCE_SECONDS)
                except httpx2.HTTPError as error:
                    failed.append(error)
                else:
                    failed.extend([] if answer.status_code == 412 else [answer])  # it has no such version

        clients = [threading.Thread(target=place) for _ in range(2)]
        for client in clients:
            client.start()
        wait_until(lambda: len(taken) > 10)
        readers = [threading.Thread(target=wait) for _ in range(6)]
        for reader in readers:
            reader.start()
        ended = restarted(service)
        sofar = len(taken)
        wait_until(lambda: len(taken) > sofar + 10)
        done.set()
        for client in [*clients, *readers]:
            client.join()

        assert (ended.returncode, ended.stdout) == (0, f"Renewed {', '.join(NAMES)}\n"), ended.stderr
        assert failed == []
        assert set(taken) == order_ids(folder)
        after = numbers(service)
        assert not set(before.values()) & set(after.values())
        assert {process.pid for process in children(service.pid)} == set(after.values())
        found = state(service)
        assert {each["name"]: each["pid"] for each in found["processes"]} == after
        assert found["restart"] == {"number": 1, "done": NAMES, "under_way": False, "failed": None}
        assert [each["deaths"] for each in found["processes"]] == [0, 0, 0, 0]
        assert service.down().returncode == 0
        assert all_ended(service.started)


def test_new_processes_read_the_settings_anew(folder: Path) -> None:
    """What `.env` says by the time of the restart counts; a setting that is wrong leaves the old ones at work."""
    (folder / ".env").write_text("LOG_FORMAT=text\n")
    with Up(folder, **SETTINGS, LOG_FORMAT="") as service:
        before = numbers(service)
        (folder / ".env").write_text("LEASE_TIME=x\nPAYMENT_RETRY_ATTEMPTS=none\n")
        ended = restarted(service)
        assert ended.returncode != 0
        assert numbers(service) == before
        assert httpx2.post(f"{service.url}/orders", json=ORDER).status_code == 201

        (folder / ".env").write_text("LOG_FORMAT=json\n")
        assert restarted(service).returncode == 0
        last = (folder / "run" / "worker-1.log").read_text().splitlines()[-1]
        assert "works off" in json.loads(last)["event"]


def test_a_restart_that_meets_a_wrong_setting_says_so(folder: Path) -> None:
    """The supervisor itself goes on if a new process cannot start; `restart` ends with the reason."""
    broken = folder / "broken.db"
    broken.write_text("this is no database, and long enough to be looked at" * 20)
    (folder / ".env").write_text("")
    settings = SETTINGS | {"DATABASE_URL": ""}
    with Up(folder, **settings) as service:
        before = numbers(service)
        (folder / "expediter.db").rename(folder / "aside.db")
        broken.rename(folder / "expediter.db")
        ended = restarted(service)
        assert ended.returncode == 1
        assert "api-1 could not be renewed" in ended.stderr
        assert "What is not renewed goes on as it was" in ended.stderr
        (folder / "expediter.db").rename(broken)
        (folder / "aside.db").rename(folder / "expediter.db")
        assert numbers(service) == before
        said = run(folder, "status", **settings).stdout
        assert "the last restart was broken off: api-1 could not be renewed" in said
        assert restarted(service).returncode == 0
        service.settings = settings | {"DATABASE_URL": f"sqlite:///{folder}/expediter.db"}


def test_a_process_that_dies_during_a_restart_leaves_one_of_each(folder: Path) -> None:
    """Whatever is killed while processes are renewed: in the end there is one of each, and nothing else."""
    with Up(folder, **SETTINGS) as service:
        restart = threading.Thread(target=lambda: restarted(service))
        restart.start()
        seen: set[int] = set()
        while restart.is_alive():
            for process in children(service.pid):
                if process.pid not in seen and len(seen) < 3:
                    seen.add(process.pid)
                    service.started.append(process)
                    process.kill()
        restart.join()
        wait_until(lambda: len(children(service.pid)) == len(NAMES))
        wait_until(lambda: {each.pid for each in children(service.pid)} == set(numbers(service).values()))
        assert httpx2.post(f"{service.url}/orders", json=ORDER).status_code == 201


def test_a_stop_in_the_middle_of_a_restart_ends_every_process(folder: Path) -> None:
    """`down` during a restart leaves nothing behind, and `restart` says what happened."""
    with Up(folder, **SETTINGS) as service:
        before = set(numbers(service).values())
        ended: list[subprocess.CompletedProcess[str]] = []
        restart = threading.Thread(target=lambda: ended.append(run(folder, "restart", **SETTINGS)))
        restart.start()
        wait_until(lambda: {process.pid for process in children(service.pid)} != before)
        service.started += children(service.pid)
        assert service.down().returncode == 0
        restart.join()
        assert all_ended(service.started)
        (said,) = ended
        assert said.returncode == 1
        assert "Expediter has ended meanwhile" in said.stderr or "told to stop" in said.stderr
    assert sorted(path.name for path in (folder / "run").iterdir() if path.suffix != ".log") == []


def test_serve_with_several_processes_is_renewed_by_a_signal(folder: Path) -> None:
    """USR2 to the supervisor of `serve --processes 2` does the same."""
    with Serving(folder, "--processes", "2") as service:
        before = {process.pid for process in children(service.process.pid)}
        service.process.send_signal(signal.SIGUSR2)
        service.wait_for("every process is renewed")
        after = {process.pid for process in children(service.process.pid)}
        assert len(after) == 2
        assert not before & after
        assert service.client.get("/health").status_code == 200


def test_nothing_is_up(folder: Path) -> None:
    """`status`, `restart` and `logs` say that nothing is up, with exit status 1, and make no database."""
    for command, word in (
        ("status", "Nothing is up"),
        ("restart", "Nothing is up"),
        ("logs", "There are no logs"),
    ):
        ended = run(folder, command)
        assert ended.returncode == 1
        assert ended.stdout == ""
        assert word in ended.stderr
    assert list(folder.iterdir()) == []


def test_status_tells_what_runs_and_what_waits(folder: Path) -> None:
    """`status` has every process and its age, how often it died, the database, the gateway and the jobs."""
    with Up(folder, **SETTINGS) as service:
        killed = psutil.Process(service.pid_of("worker-1"))
        killed.kill()
        wait_until(lambda: another_in_place_of(service, killed.pid))
        service.started += children(service.pid)
        httpx2.post(f"{service.url}/orders", json=ORDER | {"order_id": "A1"})
        httpx2.get(f"{service.url}/orders/A1?wait=20&min_version=5", timeout=PATIENCE_SECONDS)
        ended = run(folder, "status", **SETTINGS)
        assert ended.returncode == 0
        first, *lines = ended.stdout.splitlines()
        assert re.fullmatch(rf"Expediter \S+ is up at {service.url} since .* UTC \(.* s\)", first), first
        pids = {line.split()[0]: line for line in lines if " pid " in line}
        assert list(pids) == ["supervisor", *NAMES]
        assert "has died once" in pids["worker-1"]
        assert "died" not in pids["api-1"]
        words = {line.split("  ")[0]: line for line in lines if " pid " not in line}
        assert set(words) == {"ok     "} or set(words) == {"ok"}
        text = "\n".join(lines)
        for part in (
            "takes orders",
            "SQLite",
            "circuit breaker closed",
            "0 ready, 0 scheduled, 0 leased, 0 parked",
        ):
            assert part in text
        found = state(service)
        assert found["verdict"] == "ok"
        assert {part["verdict"] for part in found["parts"]} == {"ok"}
        empty = {"ready": 0, "scheduled": 0, "leased": 0, "parked": 0, "handed_over": 0}
        assert found["queue"] == empty | {"oldest_age_seconds": None}
        assert state(service, "--url", service.url)["parts"][0]["what"] == "database"


def test_status_fails_where_the_service_does(folder: Path) -> None:
    """A service whose processes do not answer is `failed`, and exit status 1."""
    with Up(folder, API_WORKERS="1", WORKER_COUNT="1") as service:
        serving = psutil.Process(service.pid_of("api-1"))
        serving.suspend()
        ended = run(folder, "status", API_WORKERS="1", WORKER_COUNT="1")
        serving.resume()
        assert ended.returncode == 1
        assert re.search(r"^failed +service +is not ready", ended.stdout, re.M), ended.stdout


def test_logs_are_shown_and_followed(folder: Path) -> None:
    """`logs` has the ends of all logs by time; `-f` goes on, over a log that is emptied, until Ctrl-C."""
    with Up(folder, **SETTINGS) as service:
        lines = run(folder, "logs", **SETTINGS).stdout.splitlines()
        assert {line.split()[0] for line in lines} == {"supervisor", "worker-1", "worker-2"}
        (last,) = run(folder, "logs", "-n", "1", "worker-2", **SETTINGS).stdout.splitlines()
        assert last.startswith("worker-2")
        unknown = run(folder, "logs", "worker-9", **SETTINGS)
        assert unknown.returncode == 1
        assert "There is no log of worker-9" in unknown.stderr
        following = subprocess.Popen(
            [sys.executable, "-m", "expediter", "logs", "-f", "-n", "0"],
            cwd=folder,
            env=environment(folder, **SETTINGS),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert following.stdout is not None
            log = folder / "run" / "supervisor.log"
            killed = psutil.Process(service.pid_of("worker-1"))
            # It may not look yet: what it must see is written until it has.
            seen = threading.Event()

            def die() -> None:
                while not seen.wait(0.1):
                    with log.open("a") as file:
                        file.write("for the reader\n")

            writer = threading.Thread(target=die)
            writer.start()
            assert following.stdout.readline() == "supervisor | for the reader\n"
            seen.set()
            writer.join()
            log.write_text("")
            killed.kill()
            line = following.stdout.readline()
            while "a process ended and is started again" not in line:
                assert line
                line = following.stdout.readline()
            following.send_signal(signal.SIGINT)
            _, said = following.communicate(timeout=COMMAND_SECONDS_MAX)
            assert following.returncode == 0, said
            assert said == ""
        finally:
            following.kill()
            following.wait()
        wait_until(lambda: another_in_place_of(service, killed.pid))
        service.started += children(service.pid)
