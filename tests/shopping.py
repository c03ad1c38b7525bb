"""Shoppers for tests: real invoices placed at one of two processes and read at once at the other."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from auditing import charges, gateway_with_ledger, wait_until, working
from serving import Program, Serving
from storing import Place, position, rows

_EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "online_retail.py"
_spec = importlib.util.spec_from_file_location("online_retail", _EXAMPLE)
assert _spec is not None and _spec.loader is not None
online_retail = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(online_retail)

#: Shoppers at once.
SHOPPERS = 16
#: Seconds for which a shopper repeats what was answered 503.
PATIENCE_SECONDS = 180.0
#: Seconds in which everything must be at rest once all is well again.
REST_SECONDS = 90.0


class Answer(NamedTuple):
    status: int
    document: dict[str, Any]


class Shoppers:
    """Places invoices at one of two services and reads each at the other, noting whatever must not be."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._doors = [urlsplit(address).netloc for address in addresses]
        self._local = threading.local()
        self._open: list[HTTPConnection] = []
        self._pool = ThreadPoolExecutor(SHOPPERS)
        self._lock = threading.Lock()
        self.accepted: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []

    def place(self, invoices: Sequence[dict[str, Any]]) -> list[Future[None]]:
        """Begin to place these invoices; each is sent again, with its key, while the answer is 503."""
        return [self._pool.submit(self._place, number, each) for number, each in enumerate(invoices)]

    def _place(self, number: int, invoice: dict[str, Any]) -> None:
        here, there = self._doors[number % 2], self._doors[1 - number % 2]
        order_id = invoice["order_id"]
        placed = self._until_answered(here, "POST", "/orders", invoice, order_id)
        if placed.status == 422:
            return
        if placed.status not in (201, 202):
            self._note(f"POST {order_id}: {placed}")
            return
        with self._lock:
            self.accepted.append(order_id)
        version = placed.document["version"]
        for door in (there, here):
            read = self._until_answered(door, "GET", f"/orders/{order_id}")
            if read.status != 200 or read.document["version"] < version:
                self._note(f"GET {order_id}, of version {version} before: {read}")
            else:
                version = read.document["version"]

    def _until_answered(
        self, door: str, method: str, path: str, body: dict[str, Any] | None = None, key: str = ""
    ) -> Answer:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            answer = self._ask(door, method, path, body, key)
            with self._lock:
                self.statuses[answer.status] += 1
            in_flight = answer.status == 409 and "under way" in answer.document["error"]
            if (answer.status != 503 and not in_flight) or time.monotonic() > deadline:
                return answer
            time.sleep(0.1)

    def _ask(self, door: str, method: str, path: str, body: dict[str, Any] | None, key: str) -> Answer:
        connections: dict[str, HTTPConnection] = self._local.__dict__.setdefault("connections", {})
        if door not in connections:
            connections[door] = HTTPConnection(door, timeout=30)
            self._open.append(connections[door])
        connection = connections[door]
        headers = {"Idempotency-Key": key} if key else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return Answer(response.status, json.loads(response.read()))

    def _note(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for connection in self._open:
            connection.close()


class Shop:
    """Two serving and two working processes on one set of servers, and shoppers at both doors."""

    def __init__(self, folder: Path, at: Place, stack: ExitStack, settings: dict[str, str]) -> None:
        self.folder = folder
        self.at = at
        self.settings = {
            "DATABASE_URL": at.address,
            "PAYMENT_GATEWAY": gateway_with_ledger(folder),
            "DRAIN_SECONDS": "5",
            **settings,
        }
        self._stack = stack
        with ThreadPoolExecutor(4) as starting:
            doors = [starting.submit(self._open_door) for _ in range(2)]
            workers = [starting.submit(self.hire) for _ in range(2)]
        self.doors = [door.result() for door in doors]
        self.workers = [worker.result() for worker in workers]
        self.shoppers = Shoppers([door.url for door in self.doors])
        stack.callback(self.shoppers.close)
        self.invoices = online_retail.read_orders(online_retail.DATA)

    def _open_door(self) -> Serving:
        return self._stack.enter_context(Serving(self.folder, "--no-workers", **self.settings))

    def hire(self) -> Program:
        """Start a further working process."""
        return self._stack.enter_context(working(self.folder, **self.settings))

    def _bugs(self) -> list[str]:
        """Return what the serving processes logged as errors."""
        return [line for door in self.doors for line in door.log if "[error" in line or line[:1] in " |T│╭"][:200]

    def assert_all_went_well(self, valid: int) -> None:
        """Assert that everything accepted is at rest, was charged once, and that the counters equal the rows."""
        assert not self.shoppers.wrong, "\n".join([*self.shoppers.wrong[:10], *self._bugs()])
        assert len(set(self.shoppers.accepted)) == len(self.shoppers.accepted) == valid
        at = self.at
        wait_until(lambda: rows(at, "SELECT count(*) FROM orders") == [(valid,)], REST_SECONDS)
        wait_until(lambda: rows(at, "SELECT count(*) FROM jobs") == [(0,)], REST_SECONDS)
        stored = rows(at, "SELECT status, payment_status, count(*) FROM orders GROUP BY status, payment_status")
        assert {status for status, _, _ in stored} == {"completed"}, stored
        paid = sum(count for _, payment, count in stored if payment == "paid")
        made = charges(self.folder)
        assert len(made) == len({key for key, _ in made}) == paid
        total = rows(at, "SELECT sum(total_minor) FROM orders WHERE payment_status = 'paid'")
        assert int(total[0][0]) == sum(amount for _, amount in made)
        counters = rows(at, "SELECT sum(value) FROM counters WHERE name = 'status:completed'")
        assert int(counters[0][0]) == valid
        everything = rows(at, "SELECT sum(value) FROM counters WHERE name LIKE 'status:%'")
        assert int(everything[0][0]) == valid
        gaps = "SELECT order_id FROM events GROUP BY order_id HAVING count(*) <> max(number) OR min(number) <> 1"
        assert rows(at, gaps) == []
        ((count, newest),) = rows(at, "SELECT count(*), max(position) FROM events")
        # Where numbers come from a sequence, a transaction that was given up has left a gap.
        assert count <= newest <= position(at)
        assert count == newest == position(at) or at.address.startswith("postgresql")
        sample = self.shoppers.accepted[:: max(1, valid // 50)]
        for door in self.doors:
            for order_id in sample:
                order = door.client.get(f"/orders/{order_id}").json()
                assert order["status"] == "completed", (order, door.log)


@contextmanager
def open_shop(folder: Path, at: Place, settings: dict[str, str]) -> Iterator[Shop]:
    with ExitStack() as stack:
        yield Shop(folder, at, stack, settings)
