"""The feed of events over HTTP: every change once, in the order of commits, whoever writes, however one reads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from auditing import wait_until
from serving import ADMIN_PASSWORD, PATIENCE_SECONDS, Program, Serving, environment
from storing import Place, rows

ORDER = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 2, "price": "1.20"}]}
#: Writing processes in the meeting, and orders that each takes; EXPEDITER_FEED=4,5000 makes it a longer one.
DOORS, ORDERS_EACH = map(int, os.environ.get("EXPEDITER_FEED", "2,120").split(","))
HUNDRED_DAYS = 100 * 86_400 * 1_000_000


class Reader:
    """Reads the feed page by page until it has been told that nothing more comes."""

    def __init__(self, urls: list[str]) -> None:
        self.clients = [httpx2.Client(base_url=url, timeout=PATIENCE_SECONDS) for url in urls]
        self.events: list[dict[str, Any]] = []
        self.after: dict[str, str] = {}
        self.turns = 0
        self.done = threading.Event()

    def run(self) -> None:
        while True:
            last = self.done.is_set()
            # Another process each time: nothing but the cursor says where the reader is.
            client = self.clients[self.turns % len(self.clients)]
            self.turns += 1
            query = {"limit": "70", "wait": "0" if last else "1", **self.after}
            page = client.get("/api/v1/events", params=query).json()
            self.events += page["events"]
            self.after = {"after": page["next_cursor"]}
            if last and not page["has_more"]:
                for client in self.clients:
                    client.close()
                return


@contextmanager
def streaming(url: str, last: str = "", **query: str) -> Iterator[Iterator[dict[str, str]]]:
    """The events of a stream as they come, each a dict of its fields."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
    with httpx2.stream(
        "GET", f"{url}/api/v1/events", params=query, headers=headers, timeout=PATIENCE_SECONDS
    ) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"] == "text/event-stream"

        def events() -> Iterator[dict[str, str]]:
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if line == "" and "data" in fields:
                    yield fields
                    fields = {}
                elif name in ("id", "event", "data"):
                    fields[name] = value

        yield events()


def stored(at: Place) -> list[tuple[int, str, int]]:
    return [tuple(row) for row in rows(at, "SELECT position, order_id, number FROM events ORDER BY position")]


def test_a_reader_beside_many_writers_sees_each_event_once(folder: Path, at: Place) -> None:
    """Serving and working processes write at once; pages and a stream have each event, in the order of commits."""
    settings = {"DATABASE_URL": at.address}
    with ExitStack() as stack:
        doors = [stack.enter_context(Serving(folder, "--no-workers", **settings)) for _ in range(DOORS)]
        workers = [Program(folder, "work", **settings) for _ in range(2)]
        for worker in workers:
            stack.callback(worker.kill)
        reader = Reader([door.url for door in doors])
        reading = threading.Thread(target=reader.run)
        reading.start()
        streamed: list[dict[str, Any]] = []

        def stream() -> None:
            last = ""
            while len(streamed) < ORDERS_EACH * DOORS * 5:
                # It is cut off after so many, and goes on behind the last one.
                with streaming(doors[len(streamed) % DOORS].url, last) as events:
                    for _, event in zip(range(ORDERS_EACH), events, strict=False):
                        last = event["id"]
                        streamed.append(json.loads(event["data"]))

        following = threading.Thread(target=stream)
        following.start()

        def write(door: Serving, name: str) -> None:
            for number in range(ORDERS_EACH):
                answer = door.client.post("/orders", json=ORDER | {"order_id": f"{name}{number}"})
                assert answer.status_code == 201, answer.text

        writers = [
            threading.Thread(target=write, args=(door, name))
            for door, name in zip(doors, "ABCDEFGH", strict=False)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        wait_until(lambda: rows(at, "SELECT count(*) FROM jobs") == [(0,)])
        reader.done.set()
        reading.join()
        following.join()
        there = stored(at)
        assert len(there) == ORDERS_EACH * DOORS * 5
        for seen in (reader.events, streamed):
            assert [(each["position"], each["order_id"], each["number"]) for each in seen] == there
        assert reader.turns > 10


def test_pages_have_what_is_asked_for(service: Serving) -> None:
    """Limits, types by name and by their beginning, and where to go on."""
    client = service.client
    begin = client.get("/api/v1/events?after=now").json()
    assert (begin["events"], begin["has_more"]) == ([], False)
    after = begin["next_cursor"]
    placed = client.post("/orders", json=ORDER).json()["order_id"]
    service.until_rest(placed)
    whole = client.get("/api/v1/events", params={"after": after}).json()
    history = client.get(f"/api/v1/orders/{placed}/events").json()["events"]
    assert [
        {name: value for name, value in event.items() if name not in ("position", "order_id")}
        for event in whole["events"]
        if event["order_id"] == placed
    ] == history
    assert "payment_token" not in json.dumps(whole)

    first = client.get("/api/v1/events", params={"after": after, "limit": "2"}).json()
    assert [event["number"] for event in first["events"]] == [1, 2]
    assert first["has_more"] is True
    rest = client.get("/api/v1/events", params={"after": first["next_cursor"]}).json()
    assert first["events"] + rest["events"] == whole["events"]
    chosen = client.get("/api/v1/events", params={"after": after, "types": "payment.*, order.completed"}).json()
    assert [event["type"] for event in chosen["events"]] == [
        "payment.started",
        "payment.succeeded",
        "order.completed",
    ]
    assert chosen["next_cursor"] == whole["next_cursor"]


def test_a_reader_waits_for_the_next_event(service: Serving) -> None:
    """`wait` holds the answer until something happens; what happens after it is not needed is not waited for."""
    after = service.client.get("/api/v1/events?after=now").json()["next_cursor"]
    found: list[dict[str, Any]] = []

    def read() -> None:
        query = {"after": after, "wait": "30", "types": "order.placed"}
        found.append(httpx2.get(f"{service.url}/api/v1/events", params=query, timeout=PATIENCE_SECONDS).json())

    reading = threading.Thread(target=read)
    reading.start()
    placed = service.client.post("/orders", json=ORDER).json()["order_id"]
    reading.join()
    assert [event["order_id"] for event in found[0]["events"]] == [placed]


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("after=x", "must be a next_cursor"),
        ("after=!!", "must be a next_cursor"),
        ("types=order.done", "'order.done' is no type of event; there are: order.placed"),
        ("types=", "is no type of event"),
        ("types=order*", "is no type of event"),
        ("limit=0", "from 1 to 1000"),
        ("limit=1001", "from 1 to 1000"),
        ("wait=31", "from 0 to 30"),
        ("cursor=MC4x", "is not a parameter here"),
    ],
)
def test_what_is_wrong_is_named(service: Serving, query: str, word: str) -> None:
    """A wrong parameter is refused, in both forms."""
    for accept in ("*/*", "text/event-stream"):
        answer = service.client.get(f"/api/v1/events?{query}", headers={"Accept": accept})
        assert answer.status_code == 422
        assert word in answer.json()["error"]


def test_a_cursor_of_the_future_or_of_before_is_gone(folder: Path) -> None:
    """After `clear` a cursor is 410, and so is one of a database that was younger; both say where to begin."""
    with Serving(folder, ADMIN_PASSWORD=ADMIN_PASSWORD) as service:
        client = service.client
        for _ in range(3):
            service.until_rest(client.post("/orders", json=ORDER).json()["order_id"])
        before = client.get("/api/v1/events?after=now").json()["next_cursor"]
        client.post("/admin/reset", headers={"X-Admin-Password": ADMIN_PASSWORD})
        for headers in ({}, {"Accept": "text/event-stream"}):
            answer = client.get("/api/v1/events", params={"after": before}, headers=headers)
            assert answer.status_code == 410
            assert "cleared or the database was restored" in answer.json()["error"]
        placed = client.post("/orders", json=ORDER).json()["order_id"]
        again = client.get(
            "/api/v1/events", params={"after": answer.json()["begin"], "types": "order.placed"}
        ).json()
        assert [event["order_id"] for event in again["events"]] == [placed]


def test_what_the_archive_has_is_gone_and_where_reading_is_possible_is_said(folder: Path, at: Place) -> None:
    """A cursor before what was archived is 410; the one behind it reads on without a gap."""
    with Serving(folder, DATABASE_URL=at.address) as service:
        client = service.client
        old = client.post("/orders", json=ORDER).json()["order_id"]
        service.until_rest(old)
        middle = client.get("/api/v1/events?limit=2").json()["next_cursor"]
        end = client.get("/api/v1/events?after=now").json()["next_cursor"]
        at.change(f"UPDATE orders SET updated_at = updated_at - {HUNDRED_DAYS}")
        at.change(f"UPDATE events SET at = at - {HUNDRED_DAYS}")
        new = client.post("/orders", json=ORDER).json()["order_id"]
        service.until_rest(new)
        subprocess.run(
            [sys.executable, "-m", "expediter", "archive", str(folder / "archive"), "--older-than", "50"],
            cwd=folder,
            env=environment(folder, DATABASE_URL=at.address),
            check=True,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
        )
        for query in ({}, {"after": middle}):
            answer = client.get("/api/v1/events", params=query)
            assert answer.status_code == 410
            assert "moved to the archive" in answer.json()["error"]
        begin = answer.json()["begin"]
        assert begin == end
        page = client.get("/api/v1/events", params={"after": begin}).json()
        assert [(event["order_id"], event["number"]) for event in page["events"]] == [
            (new, n) for n in range(1, 6)
        ]


def test_a_stream_ends_when_the_service_stops(folder: Path) -> None:
    """SIGTERM ends streams and readers who wait at once, and the program with status 0."""
    with Serving(folder) as service:
        with streaming(service.url, after="now") as events:
            service.client.post("/orders", json=ORDER)
            assert next(events)["event"] == "order.placed"
            began = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            for _ in events:
                pass  # until its end
        assert service.process.wait(PATIENCE_SECONDS) == 0
        assert time.monotonic() - began < 8  # the drain time is 10


def test_a_head_of_the_stream_is_answered(service: Serving) -> None:
    """HEAD has the headers of a stream, and does not stay."""
    answer = service.client.head("/api/v1/events", headers={"Accept": "text/event-stream"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream"


def connections(service: Serving) -> int:
    """Return how many clients are connected to a service, the other way round seen."""
    there = psutil.Process(service.process.pid).net_connections(kind="tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED for each in there)


def test_a_reader_that_does_not_read_is_cut_off_and_goes_on(folder: Path) -> None:
    """A stream whose client stands still holds up nobody, is ended, and goes on behind what was read of it."""
    with Serving(folder, "--no-workers") as service:
        address = httpx2.URL(service.url)
        big = ORDER | {"metadata": {f"k{number}": "x" * 1000 for number in range(40)}}
        with socket.socket() as client:
            # Its window is small, so that the service notices soon.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(PATIENCE_SECONDS)
            client.connect((address.host, address.port))
            client.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
            for _ in range(150):
                assert service.client.post("/orders", json=big).status_code == 201
            received = b""
            # Nothing is read until the other end has given up.
            wait_until(lambda: connections(service) == 1)  # the one that asks
            try:
                while data := client.recv(65536):
                    received += data
            except ConnectionResetError:
                pass
        seen = received.count(b"event: order.placed")
        assert seen < 150
        last = received.rsplit(b"id: ", 2)[-2].split(b"\n")[0].decode() if seen > 1 else ""
        with streaming(service.url, last) as events:
            begin = json.loads(next(events)["data"])["position"]
        assert begin <= seen + 1


def test_events_are_followed_at_a_terminal(folder: Path) -> None:
    """`expediter events` prints what is there; with --follow and --from it goes on until Ctrl-C."""
    with Serving(folder) as service:
        service.until_rest(service.client.post("/orders", json=ORDER | {"order_id": "A1"}).json()["order_id"])

        def run(*words: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [sys.executable, "-m", "expediter", "events", *words],
                cwd=folder,
                env=environment(folder),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        printed, said = run().communicate(timeout=PATIENCE_SECONDS)
        assert [line.split()[4] for line in printed.splitlines()] == [
            "order.placed",
            "payment.started",
            "payment.succeeded",
            "fulfilment.started",
            "order.completed",
        ]
        cursor = said.split("--from ")[1].strip()
        following = run("--follow", "--from", cursor, "--types", "order.*", "--json", "--url", service.url)
        assert following.stdout is not None
        service.client.post("/orders", json=ORDER | {"order_id": "A2"})
        seen = [json.loads(following.stdout.readline()) for _ in range(2)]
        assert [(event["order_id"], event["type"]) for event in seen] == [
            ("A2", "order.placed"),
            ("A2", "order.completed"),
        ]
        following.send_signal(signal.SIGINT)
        _, said = following.communicate(timeout=PATIENCE_SECONDS)
        assert following.returncode == 0
        assert said.startswith("Go on with --from ")
