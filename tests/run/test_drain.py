"""SIGTERM: what is under way is answered, the rest is given back, and the exit status is 0."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from auditing import (
    assert_sound,
    charges,
    gateway_with_ledger,
    held,
    jobs_left,
    order_ids,
    rows,
    wait_until,
    working,
)
from serving import Program, Serving

#: Seconds beyond the drain time that a loaded machine may need to end the process.
SLACK_SECONDS = 3.0
#: Seconds in which released orders must go on after a restart: far below a lease, which lasts 30.
AT_ONCE_SECONDS = 10.0


def order_body(number: int) -> bytes:
    return json.dumps({"customer_id": number, "items": [{"item_id": 1, "quantity": 1, "price": "2.50"}]}).encode()


def sockets_address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def half_a_request(url: str, body: bytes) -> socket.socket:
    """Send the head of a POST and, once the service asks for the body, half of it; return the open connection."""
    connection = socket.create_connection(sockets_address(url), timeout=30)
    head = f"POST /orders HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection.sendall(f"{head}\r\nExpect: 100-continue\r\n\r\n".encode())
    assert connection.recv(1024).startswith(b"HTTP/1.1 100 ")
    connection.sendall(body[: len(body) // 2])
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def refuses_connections(url: str) -> bool:
    try:
        socket.create_connection(sockets_address(url), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


@contextmanager
def stopped_within(service: Serving, seconds: float) -> Iterator[None]:
    """Send SIGTERM, run the block, and assert that the process ends by itself with status 0 within `seconds`."""
    started = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    yield
    status = service.process.wait(60)
    took = time.monotonic() - started
    service.stop()  # it has ended: this closes what belongs to it
    assert status == 0, service.log
    assert took < seconds + SLACK_SECONDS, f"the stop took {took:.1f} s"


def place(service: Serving, count: int, **fields: object) -> list[str]:
    ids = []
    for number in range(count):
        response = service.client.post("/orders", json=json.loads(order_body(number)) | fields)
        assert response.status_code == 201
        ids.append(response.json()["order_id"])
    return ids


def test_requests_in_flight_are_answered(folder: Path) -> None:
    """Requests whose bodies were on their way when SIGTERM came are answered 201, and their orders are kept."""
    with Serving(folder, DRAIN_SECONDS="10") as service:
        bodies = [order_body(number) for number in range(16)]
        connections = [half_a_request(service.url, body) for body in bodies]
        with stopped_within(service, 10):
            wait_until(lambda: refuses_connections(service.url))
            for connection, body in zip(connections, bodies, strict=True):
                connection.sendall(body[len(body) // 2 :])
            answers = []
            for connection in connections:
                with connection:
                    answers.append(read_to_end(connection))
    assert [answer.partition(b"\r\n")[0] for answer in answers] == [b"HTTP/1.1 201 Created"] * 16
    answered = {json.loads(answer.partition(b"\r\n\r\n")[2])["order_id"] for answer in answers}
    assert answered == order_ids(folder)


def test_a_stop_under_load_loses_no_order(folder: Path) -> None:
    """Stopped amid 32 busy connections, every order answered 2xx is kept, goes on at once, and is charged once."""
    settings = {"PAYMENT_GATEWAY": gateway_with_ledger(folder), "DRAIN_SECONDS": "5"}
    slow = {"PAYMENT_MOCK_LATENCY_MAX": "300", "FULFILMENT_MOCK_LATENCY_MAX": "300"}
    answered: set[str] = set()
    with Serving(folder, **settings, **slow) as service:

        async def keep_placing(http: httpx2.AsyncClient, number: int) -> None:
            while True:
                try:
                    response = await http.post("/orders", json=json.loads(order_body(number)))
                except httpx2.TransportError:
                    return  # the listener is closed, or the idle connection was
                assert response.status_code == 201, response.text
                answered.add(response.json()["order_id"])
                if len(answered) == 400:
                    service.process.send_signal(signal.SIGTERM)

        async def load() -> None:
            async with httpx2.AsyncClient(base_url=service.url, timeout=30) as http:
                await asyncio.gather(*(keep_placing(http, number) for number in range(32)))

        asyncio.run(load())
        service.process.wait(5 + SLACK_SECONDS)
        assert service.stop() == 0
    assert len(answered) >= 400
    assert answered <= order_ids(folder)
    assert held(folder) == 0
    assert_sound(folder)

    with Serving(folder, **settings) as service:
        wait_until(lambda: jobs_left(folder) == 0, AT_ONCE_SECONDS)
        assert service.client.get("/orders/metrics").json()["completed"]["count"] == len(order_ids(folder))
    assert len(charges(folder)) == len(order_ids(folder))
    assert_sound(folder)


def test_a_body_that_never_ends_does_not_hold_the_stop(folder: Path) -> None:
    """A client that stops in the middle of its body delays the stop by the drain time at most."""
    with Serving(folder, DRAIN_SECONDS="2") as service:
        connections = [half_a_request(service.url, order_body(number)) for number in range(4)]
        with stopped_within(service, 2):
            pass
        for connection in connections:
            with connection:
                assert b"Internal Server Error" not in read_to_end(connection)
    assert order_ids(folder) == set()
    assert "Traceback" not in "\n".join(service.log)


def test_an_idle_connection_does_not_hold_the_stop(folder: Path) -> None:
    """A kept-alive connection without a request is closed at once."""
    with Serving(folder, DRAIN_SECONDS="10") as service:
        service.client.get("/healthz")
        with stopped_within(service, 1):
            pass


def test_a_held_read_does_not_hold_the_stop(folder: Path) -> None:
    """A reader that waits for a change is answered with the order as it is, within the drain time."""
    with Serving(folder, "--no-workers", DRAIN_SECONDS="2") as service:
        (order_id,) = place(service, 1)
        with socket.create_connection(sockets_address(service.url), timeout=30) as connection:
            connection.sendall(f"GET /orders/{order_id}?wait=30 HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            # A connection that came later is answered, so the reader is waiting by now.
            httpx2.get(f"{service.url}/healthz")
            with stopped_within(service, 2):
                answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert order_id.encode() in answer


@pytest.mark.parametrize("slow", ["PAYMENT", "FULFILMENT"])
def test_work_longer_than_the_drain_is_given_back(folder: Path, slow: str) -> None:
    """A charge or a fulfilment that outlasts DRAIN_SECONDS is given back, and done at once after a restart."""
    settings = {"PAYMENT_GATEWAY": gateway_with_ledger(folder), "DRAIN_SECONDS": "1"}
    latency = {f"{slow}_MOCK_LATENCY_{end}": "10000" for end in ("MIN", "MAX")}
    with Serving(folder, **settings, **latency) as service:
        ids = place(service, 20)
        wait_until(lambda: held(folder) == 20)
        if slow == "FULFILMENT":
            wait_until(lambda: len(charges(folder)) == 20)
        with stopped_within(service, 1):
            pass
    assert held(folder) == 0
    assert jobs_left(folder) == 20
    if slow == "PAYMENT":
        # Nobody knows what became of those calls, and the service says so.
        assert rows(folder, "SELECT DISTINCT payment_status FROM orders") == [("unknown",)]
    assert_sound(folder)

    with Serving(folder, **settings) as service:
        wait_until(lambda: jobs_left(folder) == 0, AT_ONCE_SECONDS)
        for order_id in ids:
            assert service.client.get(f"/orders/{order_id}").json()["status"] == "completed"
    assert len(charges(folder)) == 20
    assert_sound(folder)


def test_slow_clients_and_slow_work_share_one_drain_time(folder: Path) -> None:
    """A body that never ends and a long fulfilment together hold the stop for one drain time, not for two."""
    settings = {f"FULFILMENT_MOCK_LATENCY_{end}": "10000" for end in ("MIN", "MAX")}
    with Serving(folder, DRAIN_SECONDS="4", **settings) as service:
        place(service, 2)
        wait_until(
            lambda: rows(folder, "SELECT count(*) FROM jobs WHERE kind = 'fulfil' AND holder NOT NULL") == [(2,)]
        )
        with half_a_request(service.url, order_body(3)), stopped_within(service, 4):
            pass
    assert held(folder) == 0


def test_a_worker_process_stops_as_well(folder: Path) -> None:
    """SIGTERM ends `work` with status 0 within the drain time, and what it held is given back."""
    settings = {
        "DRAIN_SECONDS": "1",
        "FULFILMENT_MOCK_LATENCY_MIN": "10000",
        "FULFILMENT_MOCK_LATENCY_MAX": "10000",
    }
    with Serving(folder, "--no-workers") as service:
        place(service, 5)
        with working(folder, **settings) as worker:
            wait_until(lambda: held(folder) == 5)
            started = time.monotonic()
            assert worker.stop() == 0
            assert time.monotonic() - started < 1 + SLACK_SECONDS
    assert held(folder) == 0
    assert jobs_left(folder) == 5


def complaints(*programs: Program) -> list[str]:
    """Return every log line of a level, or of a traceback; the opening lines have none."""
    words = ("warning", "error", "Traceback", "locked")
    return [line for program in programs for line in program.log if any(word in line for word in words)]


def version_now(database: sqlite3.Connection, order_id: str) -> int:
    return int(database.execute("SELECT version FROM orders WHERE order_id = ?", (order_id,)).fetchone()[0])


def test_another_process_works_and_no_read_is_stale(folder: Path) -> None:
    """Orders placed at one process come to rest through another, and a read never shows less than the database."""
    settings = {"PAYMENT_GATEWAY": gateway_with_ledger(folder)}
    # Slow enough that a busy machine still sees orders between their steps.
    slow = {
        "LEASE_SECONDS": "10",
        **{
            f"{part}_MOCK_LATENCY_{end}": milliseconds
            for part in ("PAYMENT", "FULFILMENT")
            for end, milliseconds in (("MIN", "500"), ("MAX", "1500"))
        },
    }
    seen: set[tuple[str, int]] = set()
    with Serving(folder, "--no-workers", **settings) as service:
        ids = place(service, 200)
        with (
            working(folder, **settings, **slow) as worker,
            closing(sqlite3.connect(f"file:{folder}/orders.db?mode=ro", uri=True)) as database,
        ):

            def read_all() -> bool:
                resting = jobs_left(folder) == 0
                for order_id in ids:
                    stored = version_now(database, order_id)
                    shown = service.client.get(f"/orders/{order_id}").json()["version"]
                    assert shown >= stored, f"{order_id} is at {stored}, but {shown} was answered"
                    seen.add((order_id, shown))
                return resting

            wait_until(read_all)
            assert worker.stop() == 0
        assert len(seen) > 2 * len(ids), "nothing changed while it was read"
        statuses = {service.client.get(f"/orders/{order_id}").json()["status"] for order_id in ids}
        assert statuses == {"completed"}
        health = service.client.get("/health").json()
        assert int(health["dependencies"]["cache"]["detail"].split()[1]) > 0, "no read came from the cache"
        assert service.stop() == 0
    assert complaints(service, worker) == []
    assert len(charges(folder)) == 200
    assert_sound(folder)


def test_a_reader_waits_across_processes(folder: Path) -> None:
    """`?wait=` and `min_version` at the serving process see what a worker process does."""
    with Serving(folder, "--no-workers") as service, working(folder):
        (order_id,) = place(service, 1)
        version = 1

        def at_the_end() -> bool:
            nonlocal version
            order = service.client.get(f"/orders/{order_id}", params={"wait": "5", "min_version": version}).json()
            assert order["version"] >= version
            version = order["version"]
            return bool(order["status"] == "completed")

        wait_until(at_the_end)


def test_two_worker_processes_share_the_work(folder: Path) -> None:
    """Two worker processes and one that serves write to one file without an error, and no order is done twice."""
    settings = {"PAYMENT_GATEWAY": gateway_with_ledger(folder)}
    # Slow enough that one process alone has no place free for all of it.
    slow = {"FULFILMENT_MOCK_LATENCY_MIN": "300", "FULFILMENT_MOCK_LATENCY_MAX": "500"}
    with (
        Serving(folder, "--no-workers", **settings) as service,
        working(folder, **settings, **slow) as one,
        working(folder, **settings, **slow) as other,
    ):
        response = service.client.post("/orders/populate", json={"total_entries": 1_000})
        assert response.json()["success_count"] == 1_000
        holders: set[str] = set()

        def done() -> bool:
            held_by = rows(folder, "SELECT DISTINCT holder FROM jobs WHERE holder IS NOT NULL")
            holders.update(holder for (holder,) in held_by)
            return jobs_left(folder) == 0

        wait_until(done, 60)
        assert len(holders) == 2
        assert [one.stop(), other.stop(), service.stop()] == [0, 0, 0]
    assert complaints(service, one, other) == []
    assert_sound(folder)
