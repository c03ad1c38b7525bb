"""Many connections, more than may be, and slow ones: who is served, who is told to come again, what it costs."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from auditing import wait_until
from expediter.web.server.state import ADDRESS_SHARE
from serving import PATIENCE_SECONDS, Program, Serving
from wire import ANSWER_SECONDS_MAX, Answer, connect, exchange, read_answer, request

BENCH = Path(__file__).resolve().parents[2] / "bench" / "connections.py"
#: Files that a limited service may open, and the connections that it then serves: 192 are kept for other things.
FILES, SERVED = 300, 108
#: The same from this one address.
ALL_FROM_ONE = {"CONNECTIONS_PER_ADDRESS": str(10 * SERVED)}
PEN = b'{"user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}'
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
PLACE = b"POST /orders HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(
    PEN
)
#: An order by a client that closes its connection afterwards.
PLACE_ONE = request("POST", "/orders", PEN, content_type="application/json")


def ask(connection: socket.socket, raw: bytes) -> Answer:
    """Send a request on a connection that stays open, and return its answer."""
    connection.sendall(raw)
    received = b""
    while b"\r\n\r\n" not in received:
        received += more(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    parts = [body]
    left = int(headers["content-length"]) - len(body)
    while left:
        parts.append(more(connection))
        left -= len(parts[-1])
    return Answer(int(first.split()[1]), headers, b"".join(parts))


def more(connection: socket.socket) -> bytes:
    part = connection.recv(65_536)
    assert part, "closed in the middle of an answer"
    return part


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int, what: str) -> float:
    """Return VmRSS or VmHWM of a process."""
    found = re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


@contextmanager
def idling(pid: int, share: float = 0.3) -> Iterator[None]:
    """Assert that a process uses less than this share of a processor for what is done inside; a loop uses all."""
    started, before = time.monotonic(), cpu_seconds(pid)
    yield
    used, passed = cpu_seconds(pid) - before, time.monotonic() - started
    assert used < share * passed, f"{used:.2f} s of processor time in {passed:.2f} s"


@pytest.fixture
def few_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is started may open FILES files, and cannot raise that."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nulimit -n "${{FILES:-{FILES}}}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.fixture
def crowd() -> Iterator[ExitStack]:
    """Closes the connections that are given to it."""
    with ExitStack() as stack:
        yield stack


def opened(crowd: ExitStack, url: str, count: int, address: str = "127.0.0.1") -> list[socket.socket]:
    return [crowd.enter_context(connect(url, address)) for _ in range(count)]


def test_two_thousand_connections_place_two_orders_each(folder: Path) -> None:
    """All open at once, each places an order and, while all stay open, a second one: no error, none lost."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4096:
        pytest.skip("this machine lets a process open fewer than 4096 files")
    with Serving(folder) as service:
        command = [sys.executable, str(BENCH), service.url, "--connections", "2000", "--pid"]
        ended = subprocess.run(
            [*command, str(service.process.pid)], capture_output=True, text=True, timeout=120, check=True
        )
        held = json.loads(ended.stdout)
        assert (held["errors"], held["lost"]) == (0, 0), held
        assert (held["open_at_once"], held["acknowledged"]) == (2000, 4000)
        assert held["peak_rss_mb"] < 300


def test_a_client_that_may_open_too_few_files_says_so(few_files: None) -> None:
    """The measuring client says what to do instead of counting its own errors as the service's."""
    command = [sys.executable, str(BENCH), "http://127.0.0.1:9", "--connections", "2000"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"2000 connections need 2064 open files, and {FILES} are allowed: raise")


@pytest.mark.usefixtures("few_files")
@pytest.mark.parametrize("arguments", [(), ("--workers", "2")], ids=["one process", "two processes"])
def test_a_low_file_limit_is_explained_at_the_start(folder: Path, arguments: tuple[str, ...]) -> None:
    """One line says how many connections there may be, and what to do; with more files there is none."""
    with Serving(folder, "--no-workers", *arguments) as service:
        service.wait_for("/docs")
        (line,) = [line for line in service.log if line.startswith("  files")]
    assert f"{FILES} may be open at once, so a process serves {SERVED} connections" in line
    assert "ulimit -n 16576" in line
    assert "LimitNOFILE=16576" in line


def test_a_file_limit_that_suffices_is_not_mentioned(idle_service: Serving) -> None:
    """Where 16,384 connections can be served, nothing is said."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 16_576:
        pytest.skip("this machine lets a process open fewer than 16576 files")
    assert not [line for line in idle_service.log if line.startswith("  files")]


def test_a_soft_limit_is_raised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the hard limit counts: a shell's usual soft one is raised at the start."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nulimit -S -n 256\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with Serving(folder, "--no-workers") as service:
        limits = Path(f"/proc/{service.process.pid}/limits").read_text()
    found = re.search(r"Max open files\s+(\S+)\s+(\S+)", limits)
    assert found is not None
    assert found[1] == found[2]


@pytest.mark.usefixtures("few_files")
def test_without_files_it_does_not_start(folder: Path) -> None:
    """A limit that leaves next to no connection ends the start with exit 2 and a sentence."""
    program = Program(folder, "serve", FILES="200")
    assert program.process.wait(PATIENCE_SECONDS) == 2
    program.stop()
    assert "200 files may be open at once, and it takes 224: raise the hard limit" in program.log[-1]


@pytest.mark.usefixtures("few_files")
def test_at_the_limit_new_clients_are_told_to_come_again(folder: Path, crowd: ExitStack) -> None:
    """With all connections taken a new client gets 503 and `Retry-After`; old ones go on; room is used again."""
    access = folder / "access.log"
    with Serving(folder, "--no-workers", ACCESS_LOG_FILE=str(access), **ALL_FROM_ONE) as service:
        service.client.close()
        old = opened(crowd, service.url, SERVED)
        assert {ask(each, GET).status for each in old} == {200}

        refused = exchange(service.url, PLACE_ONE)
        assert (refused.status, refused.json()["status"]) == (503, 503)
        assert refused.headers["content-type"] == "application/problem+json"
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
        # Whoever asks whether the process lives is not to restart it for being busy.
        assert exchange(service.url, request("GET", "/healthz")).status == 200
        # A burst of as many again: each is told, some after they have waited to be taken up.
        newcomers = opened(crowd, service.url, 200)
        for each in newcomers:
            each.sendall(PLACE_ONE)
        answers = [b"".join(iter(lambda each=each: each.recv(65_536), b"")) for each in newcomers]  # type: ignore[misc]
        assert {answer[:12] for answer in answers} == {b"HTTP/1.1 503"}

        assert {ask(each, PLACE + PEN).status for each in old} == {201}
        for each in old[:10]:
            each.close()
        wait_until(lambda: exchange(service.url, PLACE_ONE).status == 201)
        wait_until(lambda: '"POST /orders HTTP/1.1" 503' in access.read_text())


@pytest.mark.usefixtures("few_files")
def test_silent_newcomers_beyond_the_limit_cost_nothing(folder: Path, crowd: ExitStack) -> None:
    """Those that ask for nothing are closed after a second, in turn; old clients are served, nothing is busy."""
    with Serving(folder, "--no-workers", **ALL_FROM_ONE) as service:
        service.client.close()
        old = opened(crowd, service.url, SERVED)
        assert {ask(each, GET).status for each in old} == {200}
        newcomers = opened(crowd, service.url, 120)
        with idling(service.process.pid):
            assert {each.recv(1) for each in newcomers} == {b""}
        assert {ask(each, GET).status for each in old} == {200}


@pytest.mark.usefixtures("few_files")
def test_one_address_cannot_take_all_connections(folder: Path, crowd: ExitStack) -> None:
    """Beyond its share an address gets 429 and `Retry-After`, or is cut off, and others are served meanwhile."""
    share = int(SERVED * ADDRESS_SHARE)
    with Serving(folder, "--no-workers") as service:
        service.client.close()
        old = opened(crowd, service.url, share, "127.0.0.2")
        assert {ask(each, GET).status for each in old} == {200}
        # More than all connections: silent, so that each lives for as long as it may.
        for _ in range(2 * SERVED):
            with suppress(ConnectionResetError):
                crowd.enter_context(connect(service.url, "127.0.0.2"))
        assert exchange(service.url, PLACE_ONE).status == 201  # from 127.0.0.1
        wait_until(lambda: (found := told(service.url, "127.0.0.2")) is not None and found.status == 429)
        refused = told(service.url, "127.0.0.2")
        assert refused is not None
        assert (refused.json()["status"], refused.headers["retry-after"]) == (429, "1")
        assert {ask(each, GET).status for each in old} == {200}
        old[0].close()
        wait_until(lambda: (found := told(service.url, "127.0.0.2")) is not None and found.status == 200)


@pytest.mark.usefixtures("few_files")
def test_a_trusted_proxy_may_take_all_connections(folder: Path, crowd: ExitStack) -> None:
    """Its connections are those of many clients: only the limit of all counts."""
    with Serving(folder, "--no-workers", TRUSTED_PROXIES="127.0.0.2") as service:
        service.client.close()
        old = opened(crowd, service.url, SERVED, "127.0.0.2")
        assert {ask(each, GET).status for each in old} == {200}
        assert exchange(service.url, PLACE_ONE).status == 503


def told(url: str, address: str) -> Answer | None:
    """Return what a client at this address is answered; None: it was cut off."""
    with suppress(OSError), connect(url, address) as connection:
        connection.sendall(request("GET", "/orders"))
        return read_answer(connection)
    return None


def test_running_out_of_files_is_no_busy_loop(folder: Path, crowd: ExitStack) -> None:
    """When no file can be opened new clients wait, old ones place orders, and when old ones go the others come."""
    with Serving(folder, "--no-workers") as service:
        pid = service.process.pid
        service.client.close()
        # Enough of them: what SQLite opens meanwhile, once for each of its threads, takes some of what they free.
        old = opened(crowd, service.url, 40)
        assert {ask(each, GET).status for each in old} == {200}
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        # No file has a number as high as the limit: not one more fits below it.
        lowest = next(number for number in range(len(numbers) + 1) if number not in numbers)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, hard))

        waiting = opened(crowd, service.url, 20)
        for each in waiting:
            each.sendall(PLACE_ONE)
        service.wait_for("new connections wait")
        with idling(pid):
            assert select.select(waiting, [], [], 2.5) == ([], [], [])
        assert {ask(each, PLACE + PEN).status for each in old} == {201}

        for each in old:
            each.close()
        answers = [b"".join(iter(lambda each=each: each.recv(65_536), b"")) for each in waiting]  # type: ignore[misc]
        assert {answer[:12] for answer in answers} == {b"HTTP/1.1 201"}
        assert service.stop() == 0


def test_slow_clients_hold_up_nobody(idle_service: Serving, crowd: ExitStack) -> None:
    """Beside many that idle, or send half of their headers or body, others are served; then these too."""
    opened(crowd, idle_service.url, 100)
    halves = opened(crowd, idle_service.url, 200)
    for number, each in enumerate(halves):
        each.sendall((PLACE + PEN)[: len(PLACE) // 2 if number % 2 else len(PLACE) + 10])
    before = idle_service.client.get("/orders").json()["total"]
    quick = opened(crowd, idle_service.url, 20)
    assert {ask(each, PLACE + PEN).status for each in quick} == {201}
    assert idle_service.client.get("/orders").json()["total"] == before + 20
    for number, each in enumerate(halves):
        rest = (PLACE + PEN)[len(PLACE) // 2 if number % 2 else len(PLACE) + 10 :]
        assert ask(each, rest).status == 201


@pytest.fixture(scope="module")
def service_of_long_pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service whose first page is of some megabytes."""
    items = [{"name": "x" * 450, "quantity": 1}] * 2000
    with Serving(tmp_path_factory.mktemp("long"), "--no-workers") as service:
        for _ in range(5):
            assert service.client.post("/orders", json={"user_id": 1, "items": items}).status_code == 201
        yield service


def reader(crowd: ExitStack, url: str) -> socket.socket:
    """Return a connection that asked for a long page and has room for next to nothing of it."""
    host, port = url.removeprefix("http://").split(":")
    connection = crowd.enter_context(socket.socket())
    connection.settimeout(ANSWER_SECONDS_MAX)
    # On loopback the kernel would take in megabytes for whoever does not read.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    connection.sendall(b"GET /orders?limit=5 HTTP/1.1\r\nHost: a\r\n\r\n")
    connection.recv(1, socket.MSG_PEEK)
    return connection


def is_cut_off(connection: socket.socket) -> bool:
    """Tell whether the service has ended a connection whose client does not read."""
    poll = select.poll()
    poll.register(connection, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def test_answers_that_nobody_reads_cost_bounded_memory(service_of_long_pages: Serving, crowd: ExitStack) -> None:
    """Of clients that do not read, those longest behind are cut off at 64 MiB; others get their whole answer."""
    service = service_of_long_pages
    pid = service.process.pid
    page_mb = len(service.client.get("/orders?limit=5").content) / 1024**2
    before = memory_mb(pid, "VmHWM")
    readers = [reader(crowd, service.url) for _ in range(int(150 / page_mb))]
    assert service.client.get("/healthz").status_code == 200
    wait_until(lambda: is_cut_off(readers[0]))
    assert not is_cut_off(readers[-1])
    assert memory_mb(pid, "VmHWM") - before < 64 + 40
    assert len(ask(readers[-1], b"").body) / 1024**2 == pytest.approx(page_mb)


def test_clients_that_neither_end_nor_read_are_cut_off(service_of_long_pages: Serving, crowd: ExitStack) -> None:
    """Headers that come byte by byte are 408 after 10 s; whoever takes none of its answer for 10 s is cut off."""
    service = service_of_long_pages
    stalled = reader(crowd, service.url)
    (dripping,) = opened(crowd, service.url, 1)
    dripping.sendall(GET[:-4] + b"\r\nX-Slow: ")
    deadline = time.monotonic() + PATIENCE_SECONDS
    with idling(service.process.pid):
        while not select.select([dripping], [], [], 0.5)[0]:
            assert time.monotonic() < deadline
            dripping.sendall(b"x")
        assert dripping.recv(65_536).startswith(b"HTTP/1.1 408 ")
        wait_until(lambda: is_cut_off(stalled))
    assert service.client.get("/healthz").status_code == 200
