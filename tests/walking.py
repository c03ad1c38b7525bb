"""A walk by many: real processes on one database, seeded clients at all doors, and processes that stall and die.

`Walk` starts the processes, lets clients place, read, cancel, retry, move and delete orders at once, and checks
what they see meanwhile: no reader goes back in version, everything accepted is there, every key has one order. In
the end it lets every order come to rest, and holds the database and the gateway's ledger against the laws.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import Random
from typing import Any

from redis import Redis

from auditing import assert_verified, gateway_with_ledger
from serving import PATIENCE_SECONDS, Died, Program, Serving
from storing import Place

#: What clients do, and how often of a hundred times.
ACTIONS = {"place": 40, "place with a key": 12, "cancel": 18, "read": 14, "retry": 5, "move": 6, "delete": 5}
#: Where processes stall, and where they die, of each time that they pass: enough for dozens of meetings a second.
STALLS = (
    "loaded:pause:0.05:15 decided:pause:0.05:15 announced:pause:0.05:15 committed:pause:0.03:20 "
    "kept:pause:0.05:15 sent:pause:0.02:20 applied:pause:0.05:15"
)
DEATHS = "committed:kill:0.002 claimed:kill:0.004 called:kill:0.001 handed_in:kill:0.001 applied:kill:0.004"
DOOR_DEATHS = "announced:kill:0.0005 committed:kill:0.0005 told:kill:0.0005 kept:kill:0.001 sent:kill:0.001"
#: Now and then a process stands still past its leases.
PAUSES = "claimed:pause:0.004:2500"
LEASE_SECONDS = "2"
#: What happens to the shared cache now and then, and what undoes it after a moment.
UPSETS = (
    ("FLUSHDB", ""),
    ("CLIENT PAUSE 400 WRITE", ""),
    ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
)
UPSET_SECONDS = (0.2, 1.5)
MOVES = ("confirmed", "processing", "completed", "cancelled", "failed")
TOKENS = (None, None, None, "tok_declined", "tok_unknown")


class Order:
    """What the clients know of one order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.version = 0
        self.deleted = False
        self.asked_to_delete = False


class Clearing:
    """One `expediter clear` amid a walk: what was accepted before it is gone, what is accepted after it stays."""

    def __init__(self) -> None:
        self.before: set[str] = set()
        self.began = self.ended = float("inf")
        self.failed = False


class Walk:
    """One walk with one seed."""

    def __init__(
        self,
        folder: Path,
        at: Place,
        seed: int,
        *,
        stages: str = "payment,fulfilment",
        queued: dict[str, str] | None = None,
        cache: str = "",
        clears: bool = False,
    ) -> None:
        """`queued` has the settings of queued intake; with `clears` everything is removed once on the way.

        At `cache` is a Redis for the cache alone, which is flushed, slow or full now and then.
        """
        self.folder, self.at, self.seed = folder, at, seed
        self.queued = queued
        self.cache = cache
        self.clearing = Clearing() if clears else None
        self.wrong: list[str] = []
        self.answers: Counter[int] = Counter()
        self.deaths = 0
        self._orders: defaultdict[str, Order] = defaultdict(Order)
        self._names: list[str] = []
        self._by_key: dict[str, str] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._random = Random(seed)
        self._settings = {
            "DATABASE_URL": at.address,
            "PAYMENT_GATEWAY": gateway_with_ledger(folder),
            "PAYMENT_MOCK_SUCCESS_RATE": "0.9",
            "PAYMENT_MOCK_LATENCY_MIN": "5",
            "PAYMENT_MOCK_LATENCY_MAX": "40",
            "FULFILMENT_MOCK_LATENCY_MIN": "1",
            "FULFILMENT_MOCK_LATENCY_MAX": "20",
            "LEASE_SECONDS": LEASE_SECONDS,
            "DRAIN_SECONDS": "5",
            "WORKER_COUNT": "2",
            "STAGES": stages,
            "CIRCUIT_BREAKER_RECOVERY_SECONDS": "1",
            **({"REDIS_URL": cache} if cache else {}),
            **({"INTAKE": "queued"} if queued else {}),
            **(queued or {}),
        }
        self._doors: list[Serving] = []
        self._workers: list[Program] = []

    def _moments(self, *what: str) -> dict[str, str]:
        return {"EXPEDITER_TEST_POINTS": " ".join([f"seed={self._random.randrange(1 << 30)}", STALLS, *what])}

    def _open_door(self, port: str = "0") -> Serving:
        return Serving(self.folder, PORT=port, **self._settings, **self._moments(DOOR_DEATHS))

    def _hire(self) -> Program:
        return Program(self.folder, "work", **self._settings, **self._moments(DEATHS, PAUSES))

    def run(self, *, seconds: float, clients: int = 8) -> None:
        """Walk for so long, come to rest, and check."""
        try:
            self._doors += [self._open_door(), self._open_door()]
            self._workers += [self._hire(), self._hire()]
            until = time.monotonic() + seconds
            with ThreadPoolExecutor(clients + 3) as pool:
                walking = [pool.submit(self._client, number, until) for number in range(clients)]
                watching = [pool.submit(self._watch)]
                if self.cache:
                    watching.append(pool.submit(self._upset_the_cache))
                if self.clearing is not None:
                    walking.append(pool.submit(self._clear, self.clearing, seconds / 2))
                for walked in walking:
                    walked.result()
                self._stop.set()
                for watched in watching:
                    watched.result()
            self._come_to_rest()
        finally:
            self._stop.set()
            for program in (*self._doors, *self._workers):
                program.kill()
        self._check()

    def _watch(self) -> None:
        """Start again what has died."""
        while not self._stop.wait(0.05):
            for index, worker in enumerate(self._workers):
                if worker.process.poll() is not None:
                    worker.kill()
                    self.deaths += 1
                    self._workers[index] = self._hire()
            for index, door in enumerate(self._doors):
                if door.process.poll() is not None:
                    door.kill()
                    self.deaths += 1
                    with suppress(Died):  # at a named moment, again: the next look finds the same dead door
                        self._doors[index] = self._open_door(port=door.url.rpartition(":")[2])

    def _upset_the_cache(self) -> None:
        random = Random(f"{self.seed} cache")
        with closing(Redis.from_url(self.cache, socket_timeout=PATIENCE_SECONDS)) as client:
            while not self._stop.wait(random.uniform(*UPSET_SECONDS)):
                upset, undone = random.choice(UPSETS)
                client.execute_command(*upset.split())
                if undone:
                    self._stop.wait(random.uniform(*UPSET_SECONDS) / 2)
                    client.execute_command(*undone.split())

    def _clear(self, clearing: Clearing, after: float) -> None:
        """Remove everything, from a process of its own."""
        self._stop.wait(after)
        with self._lock:
            clearing.before = set(self._names)
            for order_id in self._names:
                self._orders[order_id].asked_to_delete = True
        clearing.began = time.monotonic()
        program = Program(self.folder, "clear", "--yes", **self._settings)
        clearing.failed = program.process.wait(PATIENCE_SECONDS) != 0
        program.kill()
        clearing.ended = time.monotonic()

    def _may_be_cleared(self, started: float) -> bool:
        """Return whether what was asked for since then may be removed by the clearing."""
        return self.clearing is not None and self.clearing.began < float("inf") and started < self.clearing.ended

    def _client(self, number: int, until: float) -> None:
        random = Random(f"{self.seed} {number}")
        here = Here(self._doors)
        try:
            while time.monotonic() < until and not self.wrong:
                (action,) = random.choices(list(ACTIONS), list(ACTIONS.values()))
                if not self._names or action.startswith("place"):
                    self._place(here, random, number, with_key=action == "place with a key")
                else:
                    with self._lock:
                        order_id = random.choice(self._names[-60:])
                    getattr(self, f"_{action}")(here, random, order_id)
        finally:
            here.close()

    def _place(self, here: Here, random: Random, number: int, *, with_key: bool) -> None:
        body: dict[str, Any] = {
            "customer_id": f"customer_{number}",
            "items": [{"item_id": "i", "quantity": random.randint(1, 3), "price": 1.5}],
        }
        if random.random() < 0.7:
            body["order_id"] = f"W{self.seed}-{number}-{random.randrange(1 << 40):x}"
        if token := random.choice(TOKENS):
            body["payment_token"] = token
        key = f"{self.seed}-{number}-{random.randrange(1 << 40):x}" if with_key else ""
        started = time.monotonic()
        first = self._ask(here, random, "POST", "/orders", body, key)
        if first.status in (201, 202):
            self._seen(first.document["order_id"], first.document["version"], 0, "POST")
            with self._lock:
                self._names.append(first.document["order_id"])
                if self._may_be_cleared(started):
                    self._orders[first.document["order_id"]].asked_to_delete = True
        if key:
            again = self._ask(here, random, "POST", "/orders", body, key)
            ids = {each.document["order_id"] for each in (first, again) if each.status in (201, 202)}
            if len(ids) > 1 and not self._may_be_cleared(started):
                self._note(f"the key {key} made {ids}")
            odd = again.status not in (0, 201, 202, 503) and not self._may_be_cleared(started)
            if first.status in (201, 202) and odd:
                self._note(f"the key {key} was answered {first.status}, then {again}")

    def _read(self, here: Here, random: Random, order_id: str) -> None:
        floor = self._orders[order_id].version
        gone = self._orders[order_id].deleted
        asked = self._orders[order_id].asked_to_delete
        answer = self._ask(here, random, "GET", f"/orders/{order_id}")
        if answer.status == 200:
            self._seen(order_id, answer.document["version"], floor, "GET")
            if gone:
                self._note(f"{order_id} was deleted, and is read again: {answer}")
        elif answer.status == 404:
            self._orders[order_id].deleted = True
            if not (asked or self._orders[order_id].asked_to_delete):
                self._note(f"{order_id} was accepted, and is not there: {answer}")

    def _cancel(self, here: Here, random: Random, order_id: str) -> None:
        self._change(here, random, order_id, "POST", "/cancel")

    def _retry(self, here: Here, random: Random, order_id: str) -> None:
        self._change(here, random, order_id, "POST", "/retry")

    def _move(self, here: Here, random: Random, order_id: str) -> None:
        self._change(here, random, order_id, "PATCH", "/status", {"status": random.choice(MOVES)})

    def _change(
        self, here: Here, random: Random, order_id: str, method: str, rest: str, body: dict[str, Any] | None = None
    ) -> None:
        floor = self._orders[order_id].version
        answer = self._ask(here, random, method, f"/orders/{order_id}{rest}", body)
        if answer.status in (200, 202) and "version" in answer.document:
            self._seen(order_id, answer.document["version"], floor, f"{method} {rest}")

    def _delete(self, here: Here, random: Random, order_id: str) -> None:
        self._orders[order_id].asked_to_delete = True
        answer = self._ask(here, random, "DELETE", f"/orders/{order_id}")
        if answer.status == 204:
            self._orders[order_id].deleted = True

    def _ask(
        self, here: Here, random: Random, method: str, path: str, body: dict[str, Any] | None = None, key: str = ""
    ) -> Answer:
        answer = here.ask(random.randrange(len(self._doors)), method, path, body, key)
        with self._lock:
            self.answers[answer.status] += 1
        if answer.status == 500:
            self._note(f"{method} {path}: {answer}")
        return answer

    def _seen(self, order_id: str, version: int, floor: int, what: str) -> None:
        order = self._orders[order_id]
        with order.lock:
            order.version = max(order.version, version)
        if version < floor:
            self._note(f"{what} {order_id} answered version {version} after {floor}")

    def _note(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)

    def _come_to_rest(self) -> None:
        """Replace the workers by healthy ones, and wait until nothing is left to do but what is parked."""
        for program in (*self._doors, *self._workers):
            program.kill()
        self._doors = [Serving(self.folder, PORT="0", **self._settings)]
        self._workers = []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._waiting() or int(self.at.rows("SELECT count(*) FROM jobs WHERE dead_at IS NULL")[0][0]):
            assert time.monotonic() < deadline, f"orders do not come to rest: {self._left()}"
            time.sleep(0.05)

    def _waiting(self) -> int:
        """Return how many accepted commands are not settled."""
        if self.queued is None:
            return 0
        with closing(Redis.from_url(self.queued["REDIS_URL"], socket_timeout=PATIENCE_SECONDS)) as client:
            return int(client.zcard("orders:accepted"))  # type: ignore[arg-type]

    def _left(self) -> object:
        if self._waiting():
            return f"{self._waiting()} accepted commands"
        return self.at.rows("SELECT order_id, kind, claims, failures, holder FROM jobs WHERE dead_at IS NULL")[:10]

    def _check(self) -> None:
        bugs = [line for program in (*self._doors, *self._workers) for line in program.log if "[error" in line]
        assert not self.wrong, f"seed {self.seed}: " + "\n".join([*self.wrong[:10], *bugs[:10]])
        assert_verified(self.at.address, self.folder / "ledger.jsonl")
        there = {row[0] for row in self.at.rows("SELECT order_id FROM orders")}
        gone = {row[0] for row in self.at.rows("SELECT order_id FROM deleted_orders")}
        missing = [
            order_id
            for order_id in self._names
            if order_id not in there | gone
            and not (self.clearing is not None and self._orders[order_id].asked_to_delete)
        ]
        assert missing == [], f"seed {self.seed}: accepted and not there"
        if self.clearing is not None and not self.clearing.failed:
            assert not self.clearing.before & there, f"seed {self.seed}: cleared, and there again"
        unasked = [each for each in self._names if each in gone and not self._orders[each].asked_to_delete]
        assert unasked == [], f"seed {self.seed}: deleted by nobody"
        assert self.answers[202 if self.queued else 201] > 0


class Answer:
    """An answer; `status` 0: there was none."""

    def __init__(self, status: int, document: dict[str, Any]) -> None:
        self.status, self.document = status, document

    def __repr__(self) -> str:
        return f"{self.status} {self.document}"


class Here:
    """One client's connections, one to each door."""

    def __init__(self, doors: list[Serving]) -> None:
        self._doors = doors
        self._connections: dict[str, HTTPConnection] = {}

    def ask(self, door: int, method: str, path: str, body: dict[str, Any] | None, key: str) -> Answer:
        address = self._doors[door].url.removeprefix("http://")
        connection = self._connections.setdefault(address, HTTPConnection(address, timeout=PATIENCE_SECONDS))
        headers = {"Idempotency-Key": key} if key else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
            return Answer(response.status, json.loads(text) if text else {})
        except (OSError, HTTPException):
            connection.close()
            return Answer(0, {})

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()


@contextmanager
def printed(walk: Walk) -> Iterator[None]:
    """Say how a walk that found something is walked again."""
    try:
        yield
    except BaseException:
        print(f"walk again with: make walk ARGS='--seed {walk.seed}' (what the clients and points do is the same)")
        raise
