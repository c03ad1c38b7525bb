"""INTAKE=queued over real processes: what is answered 202, who can read it, and what becomes of it."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import aio_pika
import httpx2
import pytest
import redis

from auditing import assert_sound, gateway_with_ledger, rows, wait_until, working
from servers import DurableRedisServer, PostgresServer, RabbitServer, RedisServer, in_thread
from serving import Program, Serving
from storing import Place

PEN = {"name": "Pen", "quantity": 1}
BURGER = {"item_id": "item_001", "item_name": "Burger", "quantity": 2, "price": 12.99}
STREAM = "orders:commands"

_numbers = count(1)


def new_id() -> str:
    return f"Q-{next(_numbers)}"


def order(order_id: str | None = None, *items: dict[str, Any]) -> dict[str, Any]:
    """Return a body: one pen for nothing unless told otherwise."""
    body: dict[str, Any] = {"customer_name": "Ann", "items": list(items) or [PEN]}
    return body if order_id is None else {"order_id": order_id, **body}


class Doors:
    """Two serving processes with INTAKE=queued on one broker, one Redis and one database; nobody works."""

    def __init__(
        self, folder: Path, stack: ExitStack, redis_url: str, rabbit: RabbitServer | None, **settings: str
    ) -> None:
        self.folder = folder
        self.rabbit = rabbit
        self.settings = {
            "INTAKE": "queued",
            "REDIS_URL": redis_url,
            "PAYMENT_GATEWAY": gateway_with_ledger(folder),
            **settings,
        }
        if rabbit is None:
            self.settings.setdefault("BROKER_URL", redis_url)
        else:
            self.settings |= {"BROKER_URL": rabbit.url, "RABBITMQ_QUEUE_NAME": rabbit.new_queue()}
        self.redis = stack.enter_context(closing(redis.Redis.from_url(redis_url, decode_responses=True)))
        self.streams = (
            stack.enter_context(closing(redis.Redis.from_url(self.settings["BROKER_URL"])))
            if rabbit is None
            else self.redis
        )
        with ThreadPoolExecutor(2) as starting:
            found = [starting.submit(self._open, stack) for _ in range(2)]
        self.one, self.two = (each.result() for each in found)
        self.clients = (self.one.client, self.two.client)

    def _open(self, stack: ExitStack) -> Serving:
        return stack.enter_context(Serving(self.folder, "--no-workers", **self.settings))

    @contextmanager
    def worker(self, **settings: str) -> Iterator[Program]:
        with working(self.folder, **{**self.settings, **settings}) as program:
            yield program

    def place(self, body: dict[str, Any], path: str = "/orders", **headers: str) -> httpx2.Response:
        answer = self.one.client.post(path, json=body, headers=headers)
        assert answer.status_code == 202, answer.text
        return answer

    def placed(self, *items: dict[str, Any]) -> str:
        """Place an order and return its id."""
        return str(self.place(order(new_id(), *items)).json()["order_id"])

    def temporary(self, order_id: str) -> dict[str, Any]:
        """Return what redis-cli would show at temp_order:{id}."""
        found = self.redis.get(f"temp_order:{order_id}")
        return json.loads(found) if found else {}

    def both(self, path: str) -> list[httpx2.Response]:
        return [client.get(path) for client in self.clients]

    def states(self, order_id: str) -> set[str]:
        """Return what both processes say of an order: its status, or the code of the refusal."""
        found = set()
        for answer in self.both(f"/orders/{order_id}"):
            found.add(answer.json()["status"] if answer.status_code == 200 else str(answer.status_code))
        return found

    def until(self, order_id: str, status: str) -> None:
        """Return once the order is settled and has this status (or refusal) at both processes."""
        wait_until(
            lambda: self.temporary(order_id).get("state") != "pending" and self.states(order_id) == {status}
        )

    def queue_depth(self) -> int:
        """Return how many messages wait, or are worked on."""
        detail = self.one.client.get("/health").json()["dependencies"]["queue"]["detail"]
        return int(re.search(r"(\d+) messages of queued commands wait", detail)[1])  # type: ignore[index]

    def drain(self) -> None:
        """Let a worker apply and finish everything that was queued up to now."""
        self.placed()  # the last one: when it is settled, so is what came before
        with self.worker():
            wait_until(lambda: not self.pending() and self.queue_depth() == 0)
            wait_until(lambda: rows(self.folder, "SELECT count(*) FROM jobs WHERE dead_at IS NULL") == [(0,)])

    @contextmanager
    def busy_worker(self) -> Iterator[None]:
        """Run a worker that applies commands, and has its hands full with one order of its own.

        So no order is touched before all of its changes are stored: a worker that reaches it first makes a change
        illegal, and it is then refused, as it should be.
        """
        bystander = self.placed()
        slow = {"FULFILMENT_MOCK_LATENCY_MIN": "10000", "FULFILMENT_MOCK_LATENCY_MAX": "10000"}
        with self.worker(
            WORKER_COUNT="1", WORKER_CONCURRENCY="1", LEASE_SECONDS="60", DRAIN_SECONDS="0.1", **slow
        ) as worker:
            self.until(bystander, "processing")
            yield
            worker.stop()  # it gives the order back; whoever comes next finishes it

    def apply(self) -> None:
        """Have everything that was queued up to now stored, and nothing worked off."""
        waiting = self.messages()
        with self.busy_worker():
            self.publish(*waiting)
            wait_until(lambda: not self.pending() and self.queue_depth() == 0)

    def pending(self) -> list[str]:
        """Return what redis-cli would list as accepted and not stored."""
        return [key for key in self.redis.scan_iter("temp_order:*") if '"pending"' in self.redis.get(key)[:20]]  # type: ignore[index]

    def messages(self) -> list[bytes]:
        """Take every waiting message out of the queue."""
        if self.rabbit is None:
            found = self.streams.xrange(STREAM)
            for entry_id, _ in found:
                self.streams.xdel(STREAM, entry_id)
            return [fields.get(b"body") or fields.get("body", "").encode() for _, fields in found]
        return list(self._in_rabbit(self._take_all))

    def taken(self) -> bool:
        """Return whether a worker has as many messages in its hands as it takes."""
        if self.rabbit is None:
            return bool(self.streams.xpending(STREAM, "workers")["pending"])

        async def ready(channel: aio_pika.abc.AbstractChannel) -> int:
            queue = await channel.declare_queue(self.settings["RABBITMQ_QUEUE_NAME"], passive=True)
            return queue.declaration_result.message_count or 0

        return self._in_rabbit(ready) == 0

    def publish(self, *bodies: bytes) -> None:
        """Put messages into the queue as anybody could."""
        if self.rabbit is None:
            for body in bodies:
                self.streams.xadd(STREAM, {"body": body})
            return

        async def work(channel: aio_pika.abc.AbstractChannel) -> None:
            for body in bodies:
                message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
                await channel.default_exchange.publish(message, self.settings["RABBITMQ_QUEUE_NAME"])

        self._in_rabbit(work)

    def lose_the_queue(self) -> None:
        """Remove the queue or the stream with all that waits in it."""
        if self.rabbit is None:
            self.streams.delete(STREAM)
        else:
            self.rabbit.query("", f"DELETE {self.settings['RABBITMQ_QUEUE_NAME']}")

    def _in_rabbit(self, work: Callable[[aio_pika.abc.AbstractChannel], Any]) -> Any:
        assert self.rabbit is not None
        url = self.rabbit.url

        async def connected() -> Any:
            async with await aio_pika.connect(url) as connection:
                return await work(await connection.channel())

        return in_thread(connected)

    async def _take_all(self, channel: aio_pika.abc.AbstractChannel) -> list[bytes]:
        queue = await channel.get_queue(self.settings["RABBITMQ_QUEUE_NAME"])
        found = []
        while (message := await queue.get(fail=False)) is not None:
            await message.ack()
            found.append(message.body)
        return found


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def rabbit_or_none(request: pytest.FixtureRequest) -> RabbitServer | None:
    """The broker: RabbitMQ, or None for Redis Streams."""
    if request.param == "redis":
        return None
    server: RabbitServer = request.getfixturevalue("rabbitmq")
    return server


@pytest.fixture(scope="module")
def doors(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, rabbit_or_none: RabbitServer | None
) -> Iterator[Doors]:
    """Two serving processes on SQLite that the tests of this module share; each test has its own orders."""
    with ExitStack() as stack:
        yield Doors(tmp_path_factory.mktemp("doors"), stack, redis_server.new_database(), rabbit_or_none)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the write lock of the SQLite database: nobody can store anything meanwhile."""
    with closing(sqlite3.connect(folder / "orders.db", isolation_level=None, timeout=10)) as raw:
        raw.execute("BEGIN IMMEDIATE")
        yield
        raw.execute("ROLLBACK")


def test_an_accepted_order_is_read_everywhere_before_anybody_works(doors: Doors) -> None:
    """POST answers 202 with id, Location and ETag, and both processes show the order while no worker runs."""
    for path in ("/orders", "/api/v1/orders"):
        placed = doors.place(order(None, BURGER), path)
        order_id = placed.json()["order_id"]
        assert placed.headers["location"] == f"{path}/{order_id}"
        assert placed.headers["etag"] == '"1"'
        for answer in doors.both(f"{path}/{order_id}"):
            assert (answer.status_code, answer.headers["etag"]) == (200, '"1"'), answer.text
            document = answer.json()
            assert (document["status"], document["total_amount"]) == ("pending", 25.98)
            assert document == {key: placed.json()[key] for key in document}
        assert doors.temporary(order_id)["state"] == "pending"
        assert doors.temporary(order_id)["order"]["items"][0]["name"] == "Burger"
        assert rows(doors.folder, "SELECT count(*) FROM orders WHERE order_id = ?", order_id) == [(0,)]


def test_a_stored_order_is_the_accepted_one(doors: Doors) -> None:
    """A worker stores the order as it was accepted, temp_order ends a second later, and reads go on."""
    placed = doors.place(order(None, BURGER)).json()
    order_id = placed["order_id"]
    with doors.worker(TEMP_ORDER_CACHE_TTL="1"):
        wait_until(lambda: doors.states(order_id) == {"completed"})
        assert int(doors.redis.pttl(f"temp_order:{order_id}")) <= 1000  # type: ignore[arg-type]
        wait_until(lambda: not doors.temporary(order_id))
    for answer in doors.both(f"/orders/{order_id}"):
        document = answer.json()
        assert document["created_at"] == placed["created_at"]
        for name in ("items", "total_minor", "customer_name", "metadata", "currency"):
            assert document[name] == placed[name]
    events = doors.two.client.get(f"/orders/{order_id}/events").json()["events"]
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    assert events[0]["at"] == placed["created_at"]


def test_changes_are_seen_elsewhere_before_they_are_stored(doors: Doors) -> None:
    """PATCH, cancel, retry and DELETE are 202, seen at the other process at once, and applied later."""
    moved, cancelled, retried, deleted = (doors.placed() for _ in range(4))
    one, two = doors.clients
    for version, status in ((2, "processing"), (3, "completed")):
        answer = one.patch(f"/orders/{moved}/status", json={"status": status})
        assert (answer.status_code, answer.headers["etag"]) == (202, f'"{version}"')
        read = two.get(f"/orders/{moved}")
        assert (read.json()["status"], read.headers["etag"]) == (status, f'"{version}"')
        one, two = two, one
    assert one.post(f"/orders/{cancelled}/cancel").status_code == 202
    assert doors.states(cancelled) == {"cancelled"}
    for status in ("processing", "failed"):
        assert one.patch(f"/api/v1/orders/{retried}/status", json={"status": status}).status_code == 202
    assert two.post(f"/api/v1/orders/{retried}/retry").status_code == 202
    assert doors.states(retried) == {"processing"}
    gone = one.delete(f"/orders/{deleted}")
    assert (gone.status_code, gone.json()["order_id"]) == (202, deleted)
    assert doors.states(deleted) == {"404"}
    assert [answer.status_code for answer in doors.both(f"/orders/{deleted}/events")] == [404, 404]
    orders = (moved, cancelled, retried, deleted)
    doors.apply()
    for order_id, status in zip(orders, ("completed", "cancelled", "processing", "404"), strict=True):
        assert doors.states(order_id) == {status}
    doors.drain()
    for order_id, status in zip(orders, ("completed", "cancelled", "completed", "404"), strict=True):
        assert doors.states(order_id) == {status}
    refused = "SELECT order_id, data FROM events WHERE type = 'command.refused' AND order_id IN (?, ?, ?, ?)"
    assert rows(doors.folder, refused, *orders) == []


def test_what_cannot_be_is_refused_before_it_is_queued(doors: Doors) -> None:
    """An illegal move is 409 with the legal ones, a stale If-Match 412, an unknown order 404, and quickly."""
    order_id = doors.placed()
    client = doors.two.client
    before = doors.temporary(order_id)
    illegal = client.patch(f"/orders/{order_id}/status", json={"status": "completed"})
    assert (illegal.status_code, illegal.json()["legal"]) == (409, ["processing", "cancelled"])
    stale = client.patch(f"/orders/{order_id}/status", json={"status": "cancelled"}, headers={"If-Match": '"7"'})
    assert (stale.status_code, stale.headers["etag"]) == (412, '"1"')
    assert client.post(f"/orders/{order_id}/retry").status_code == 409
    assert client.post("/orders", json=order(order_id)).status_code == 409
    assert doors.temporary(order_id) == before
    good = client.post(f"/orders/{order_id}/cancel", headers={"If-Match": '"1"'})
    assert good.status_code == 202
    doors.drain()
    started = time.monotonic()
    assert client.get("/orders/NOBODY").status_code == 404
    assert client.patch("/orders/NOBODY/status", json={"status": "cancelled"}).status_code == 404
    assert client.delete("/orders/NOBODY").status_code == 404
    assert client.post("/orders/NOBODY/cancel").status_code == 404
    assert time.monotonic() - started < 5


def test_a_key_never_carries_a_refused_command_past_the_queue(doors: Doors) -> None:
    """What is refused because of commands that still wait is refused with an Idempotency-Key, too."""
    order_id = doors.placed()
    other = order(order_id, {"name": "Ink", "quantity": 9})
    for client in doors.clients:
        answer = client.post("/orders", json=other, headers={"Idempotency-Key": f"other-{order_id}"})
        assert answer.status_code == 409, answer.text
    assert rows(doors.folder, "SELECT count(*) FROM orders WHERE order_id = ?", order_id) == [(0,)]
    doors.drain()
    stored = doors.placed()
    doors.drain()  # it is stored, and at rest
    for status in ("payment_processing", "cancelled"):
        answer = doors.one.client.patch(
            f"/orders/{stored}/status", json={"status": status}, headers={"Idempotency-Key": f"{status}-{stored}"}
        )
        assert answer.status_code == 409
    document = doors.two.client.get(f"/orders/{order_id}").json()
    assert (document["items"][0]["name"], document["last_error"]) == ("Pen", None)


def test_commands_on_one_order_are_applied_in_their_order(doors: Doors) -> None:
    """Create, two moves and a deletion in quick succession all take effect, with two workers at it."""
    moves: list[tuple[str, str]] = []
    road = {"FULFILMENT_MOCK_LATENCY_MIN": "8000", "FULFILMENT_MOCK_LATENCY_MAX": "8000"}

    def shop(number: int) -> None:
        order_id = new_id()
        with httpx2.Client(base_url=(doors.one, doors.two)[number % 2].url, timeout=30) as client:
            other = (doors.two, doors.one)[number % 2].client
            answers = [client.post("/orders", json=order(order_id)).status_code]
            answers.append(other.post(f"/orders/{order_id}/cancel").status_code)
            if number % 3:
                answers.append(client.delete(f"/orders/{order_id}").status_code)
                moves.append((order_id, "404"))
            else:
                moves.append((order_id, "cancelled"))
            assert set(answers) == {202}, answers

    with ThreadPoolExecutor(6) as shoppers, doors.worker(**road), doors.worker(**road):
        for done in [shoppers.submit(shop, number) for number in range(120)]:
            done.result()
        wait_until(lambda: not doors.pending())
        for order_id, status in moves:
            doors.until(order_id, status)
    refused = "SELECT order_id, data FROM events WHERE type = 'command.refused'"
    known = {order_id for order_id, _ in moves}
    assert [row for row in rows(doors.folder, refused) if row[0] in known] == []


def test_a_key_has_one_answer_wherever_and_whenever_it_is_asked(doors: Doors) -> None:
    """The same key and body bring the same 202, marked, at both processes, before and after it is stored."""
    body, key = order(None, BURGER), {"Idempotency-Key": f"key-{new_id()}"}
    first = doors.place(body, **key)
    order_id = first.json()["order_id"]

    def assert_replayed() -> None:
        for client in doors.clients:
            again = client.post("/orders", json=body, headers=key)
            assert (again.status_code, again.headers.get("idempotency-replayed")) == (202, "true"), again.text
            assert again.json() == first.json()
            assert again.headers["location"] == first.headers["location"]
            other = client.post("/orders", json=order(None, BURGER, PEN | {"price": 1}), headers=key)
            assert other.status_code == 422

    assert_replayed()
    doors.drain()
    assert_replayed()
    doors.redis.flushdb()
    assert_replayed()
    doors.redis.delete("temp_orders:since")
    customers = rows(doors.folder, "SELECT count(*) FROM orders WHERE order_id = ?", order_id)
    assert customers == [(1,)]


def test_a_key_of_queued_intake_is_known_to_direct_intake(doors: Doors) -> None:
    """After INTAKE is set back to direct, a key that came before still brings its 202 and no second order."""
    body, key = order(None, BURGER), {"Idempotency-Key": f"key-{new_id()}"}
    first = doors.place(body, **key)
    change = {"Idempotency-Key": f"key-{new_id()}"}
    path = f"/orders/{first.json()['order_id']}/cancel"
    cancelled = doors.two.client.post(path, headers=change)
    doors.apply()
    doors.drain()
    with Serving(doors.folder, "--no-workers", **{**doors.settings, "INTAKE": "direct"}) as direct:
        again = direct.client.post("/orders", json=body, headers=key)
        assert (again.status_code, again.json()) == (202, first.json())
        again = direct.client.post(path, headers=change)
        assert (again.status_code, again.json()) == (cancelled.status_code, cancelled.json())


def test_fifty_duplicates_at_once_make_one_order(doors: Doors) -> None:
    """Fifty concurrent requests with one key at two processes make one order and have one answer."""
    body, key = order(None, BURGER) | {"customer_name": "Duplicate"}, {"Idempotency-Key": f"key-{new_id()}"}

    def send(number: int) -> httpx2.Response:
        while True:
            answer = doors.clients[number % 2].post("/orders", json=body, headers=key)
            if answer.status_code != 409:
                return answer
            assert "under way" in answer.json()["error"]

    with ThreadPoolExecutor(16) as senders:
        answers = list(senders.map(send, range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["order_id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    doors.drain()
    stored = "SELECT count(*) FROM orders WHERE customer_name = 'Duplicate'"
    assert rows(doors.folder, stored) == [(1,)]


def test_a_message_that_comes_again_changes_nothing(doors: Doors) -> None:
    """Messages that are in the queue twice, and once more at the end, make one order and one charge."""
    doors.drain()
    fresh = doors.place(order(None, BURGER)).json()["order_id"]
    named = doors.placed(BURGER)
    cancelled = doors.placed(BURGER)
    assert doors.two.client.post(f"/orders/{cancelled}/cancel").status_code == 202
    bodies = doors.messages()
    assert bodies
    doors.publish(*bodies, *bodies)
    doors.apply()
    doors.drain()
    doors.until(fresh, "completed")
    before = [doors.both(f"/orders/{each}/events")[0].json() for each in (fresh, named, cancelled)]
    doors.publish(*bodies, *reversed(bodies))
    doors.drain()
    for each, status in ((fresh, "completed"), (named, "completed"), (cancelled, "cancelled")):
        assert doors.states(each) == {status}
    assert [doors.both(f"/orders/{each}/events")[0].json() for each in (fresh, named, cancelled)] == before
    assert_sound(doors.folder)
    attempts = "SELECT order_id, count(*) FROM payment_attempts WHERE order_id IN (?, ?, ?) GROUP BY order_id"
    assert sorted(rows(doors.folder, attempts, fresh, named, cancelled)) == sorted([(fresh, 1), (named, 1)])
    assert doors.redis.exists(f"temp_order:{fresh}")


def test_a_worker_killed_amid_application_loses_nothing(doors: Doors) -> None:
    """Commands in the hands of a worker that is killed are applied by the next one, once and in their order."""
    with locked(doors.folder):
        with doors.worker() as doomed:
            ids = [doors.placed() for _ in range(5)]
            wait_until(doors.taken)
            doomed.kill()
        for order_id in ids[:2]:
            assert doors.two.client.post(f"/orders/{order_id}/cancel").status_code == 202
        if doors.rabbit is None:
            # As if the minute were over after which Redis gives a dead consumer's messages to others.
            for entry in doors.streams.xpending_range(STREAM, "workers", "-", "+", 100):
                mine = entry["message_id"]
                doors.streams.xclaim(STREAM, "workers", entry["consumer"], 0, [mine], idle=86_400_000)
    # Slowly, so that every order can still be cancelled when its cancellation is applied.
    slow = {"FULFILMENT_MOCK_LATENCY_MIN": "3000", "FULFILMENT_MOCK_LATENCY_MAX": "3000"}
    with doors.worker(LEASE_SECONDS="10", DRAIN_SECONDS="0.1", **slow) as slow_worker:
        for order_id in ids[:2]:
            doors.until(order_id, "cancelled")
        slow_worker.stop()
    doors.drain()
    for order_id in ids[2:]:
        doors.until(order_id, "completed")
    for order_id in ids[:2]:
        types = [event["type"] for event in doors.one.client.get(f"/orders/{order_id}/events").json()["events"]]
        assert types[-1] == "order.cancelled"
        assert "command.refused" not in types
    assert_sound(doors.folder)


def test_a_change_waits_for_the_order_that_a_dead_worker_holds(doors: Doors) -> None:
    """A change whose order is in the hands of a killed worker is applied after it."""
    if doors.rabbit is not None:
        return  # it gives back at once what a dead worker held
    with locked(doors.folder):
        with doors.worker() as doomed:
            order_id = doors.placed()
            wait_until(doors.taken)
            doomed.kill()
        assert doors.two.client.post(f"/orders/{order_id}/cancel").status_code == 202
    with doors.busy_worker():
        seen = set()
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            seen |= doors.states(order_id)
        assert seen == {"cancelled"}
        for entry in doors.streams.xpending_range(STREAM, "workers", "-", "+", 100):
            mine = entry["message_id"]
            doors.streams.xclaim(STREAM, "workers", entry["consumer"], 0, [mine], idle=86_400_000)
        doors.until(order_id, "cancelled")
    types = [event["type"] for event in doors.one.client.get(f"/orders/{order_id}/events").json()["events"]]
    assert types == ["order.placed", "order.cancelled"]


def test_a_refusal_after_acceptance_is_shown(doors: Doors) -> None:
    """An order that was accepted under a taken id is noted as a command.refused of the one that has it."""
    doors.drain()
    order_id = doors.placed()
    (create,) = doors.messages()
    doors.redis.delete(f"temp_order:{order_id}")
    doors.publish(create)
    other = order(order_id, {"name": "Ink", "quantity": 9})
    # Another client takes the same id while nobody can know of the first.
    answer = doors.two.client.post("/orders", json=other)
    assert answer.status_code == 202, answer.text
    doors.drain()
    document = doors.one.client.get(f"/orders/{order_id}").json()
    assert document["items"][0]["name"] == "Pen"
    events = doors.two.client.get(f"/orders/{order_id}/events").json()["events"]
    (refused,) = [event for event in events if event["type"] == "command.refused"]
    assert "already exists" in json.dumps(refused["data"])


def test_a_change_of_what_has_moved_on_is_refused_visibly(doors: Doors) -> None:
    """A cancellation that comes too late is refused visibly, and no reader sees time go back."""
    doors.drain()
    order_id = doors.placed()
    (create,) = doors.messages()
    assert doors.one.client.post(f"/orders/{order_id}/cancel").status_code == 202
    (cancel,) = doors.messages()
    doors.publish(create)
    versions: list[int] = []
    with doors.worker():
        wait_until(
            lambda: (
                rows(doors.folder, "SELECT status FROM orders WHERE order_id = ?", order_id) == [("completed",)]
            )
        )
        versions += [answer.json()["version"] for answer in doors.both(f"/orders/{order_id}")]
        doors.publish(cancel)
        doors.until(order_id, "completed")
    versions += [answer.json()["version"] for answer in doors.both(f"/orders/{order_id}")]
    assert versions == sorted(versions)
    document = doors.two.client.get(f"/orders/{order_id}").json()
    assert "refused" in document["last_error"] and "cancelled" in document["last_error"]
    types = [event["type"] for event in doors.one.client.get(f"/orders/{order_id}/events").json()["events"]]
    assert types[-1] == "command.refused"


def test_what_is_no_command_is_put_aside(doors: Doors) -> None:
    """Garbage in the queue lands among the dead, /health says so, and orders behind it are stored."""
    doors.drain()
    order_id = doors.placed()
    (create,) = doors.messages()
    garbage = [b"", b"garbage", b"\xff\xfe", b"{}", b'[{"token":"x"}]', b"[null]", b'[{"token":1}]']
    doors.publish(*garbage, create, b"[]")
    doors.drain()
    doors.until(order_id, "completed")
    for client in doors.clients:
        health = client.get("/health").json()
        queue = health["dependencies"]["queue"]
        assert (health["status"], queue["status"]) == ("degraded", "degraded")
        assert f"{len(garbage)} are put aside" in queue["detail"]
    if doors.rabbit is None:
        dead = doors.streams.xrange("orders:commands:dead")
        assert all(fields.get(b"reason") or fields.get("reason") for _, fields in dead)
        doors.streams.delete("orders:commands:dead")
    else:
        doors.rabbit.query("", f"DELETE {doors.settings['RABBITMQ_QUEUE_NAME']}.dead")


def test_bad_input_is_refused_as_ever(doors: Doors) -> None:
    """422, 400, 415 and 413 are what they are with direct intake, and nothing is queued."""
    depth = doors.queue_depth()
    with Serving(doors.folder, "--no-workers", **{**doors.settings, "INTAKE": "direct"}) as direct:
        json_type = {"Content-Type": "application/json"}
        bad: list[tuple[bytes, dict[str, str]]] = [
            (b"{", json_type),
            (b"{}", json_type),
            (b'{"customer_name": "Ann", "items": []}', json_type),
            (b'{"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 1}], "colour": 1}', json_type),
            (b'{"customer_name": "Ann", "items": [{"name": "Pen", "quantity": -1}]}', json_type),
            (b'{"order_id": "metrics", "user_id": 1, "item_ids": [1]}', json_type),
            (b"x" * (1024 * 1024 + 1), json_type),
            (json.dumps(order()).encode(), {"Content-Type": "text/plain"}),
            (json.dumps(order()).encode(), json_type | {"Idempotency-Key": "a" * 256}),
        ]
        for body, headers in bad:
            answers = [
                client.post("/orders", content=body, headers=headers)
                for client in (doors.one.client, direct.client)
            ]
            facts = [
                (answer.status_code, {k: v for k, v in answer.json().items() if k != "request_id"})
                for answer in answers
            ]
            assert facts[0] == facts[1]
            assert facts[0][0] in (400, 413, 415, 422)
    assert doors.queue_depth() == depth


def test_back_to_direct_while_commands_wait(doors: Doors) -> None:
    """Workers with INTAKE=direct still apply what waits in the queue."""
    order_id = doors.placed(BURGER)
    with doors.worker(INTAKE="direct"):
        doors.until(order_id, "completed")


def test_who_asks_for_more_than_was_accepted_is_told_to_wait(doors: Doors) -> None:
    """events and explain of an order that nobody has stored are 503 with Retry-After, wait ends with its time."""
    order_id = doors.placed()
    with ThreadPoolExecutor(3) as askers:
        asked = [
            askers.submit(doors.two.client.get, f"/orders/{order_id}{path}", timeout=30)
            for path in ("/events", "/explain", "?wait=0.5")
        ]
        events, explain, waited = (each.result() for each in asked)
    for answer in (events, explain):
        assert (answer.status_code, answer.headers.get("retry-after")) == (503, "1"), answer.text
    assert (waited.status_code, waited.json()["status"]) == (200, "pending")
    with ThreadPoolExecutor(3) as askers, doors.worker():
        with locked(doors.folder):
            order_id = doors.placed()
            asked = [
                askers.submit(doors.two.client.get, f"/orders/{order_id}{path}", timeout=30)
                for path in ("/events", "/explain", "?wait=20")
            ]
        events, explain, waited = (each.result() for each in asked)
    assert [answer.status_code for answer in (events, explain, waited)] == [200, 200, 200]
    assert waited.json()["version"] > 1


def test_redis_flushed_before_the_order_is_stored(doors: Doors) -> None:
    """An accepted order is never a 404 while Redis has forgotten it, is shown again, and is stored in the end."""
    order_id = doors.placed(BURGER)
    moved = doors.placed()
    assert doors.one.client.post(f"/orders/{moved}/cancel").status_code == 202
    assert doors.states(order_id) == {"pending"}
    doors.redis.flushdb()
    if doors.rabbit is not None:
        doors.lose_the_queue()
    seen: set[str] = set()
    seen_moved: set[str] = set()

    def shown_again() -> bool:
        seen.update(doors.states(order_id))
        seen_moved.update(doors.states(moved))
        return bool(doors.temporary(order_id)) and bool(doors.temporary(moved))

    wait_until(shown_again)
    assert doors.states(moved) == {"cancelled"}
    assert seen <= {"503", "pending"}
    assert seen_moved <= {"503", "cancelled"}
    doors.apply()
    doors.drain()
    doors.until(order_id, "completed")
    doors.until(moved, "cancelled")


def test_a_key_that_redis_forgot_makes_one_order(doors: Doors) -> None:
    """If Redis forgets a key before its order is stored, a second request with it is refused visibly."""
    body, key = order(None, BURGER), {"Idempotency-Key": f"key-{new_id()}"}
    first = doors.place(body, **key).json()["order_id"]
    doors.redis.delete(f"temp_order:{first}", f"idempotency:{key['Idempotency-Key']}")
    second = doors.two.client.post("/orders", json=body, headers=key)
    assert second.status_code == 202
    second_id = second.json()["order_id"]
    doors.drain()
    doors.until(first, "completed")
    assert doors.states(second_id) == {"409"}
    assert first in doors.two.client.get(f"/orders/{second_id}").json()["error"]
    again = doors.one.client.post("/orders", json=body, headers=key)
    assert (again.status_code, again.json()["order_id"]) == (202, first)


def test_the_id_of_a_deleted_order_is_refused_at_once(doors: Doors) -> None:
    """An id is used once, also when nothing in Redis remembers its order any more."""
    order_id = doors.placed()
    assert doors.one.client.delete(f"/orders/{order_id}").status_code == 202
    doors.apply()
    doors.redis.delete(f"temp_order:{order_id}")
    for client in doors.clients:
        answer = client.post("/orders", json=order(order_id))
        assert (answer.status_code, "deleted" in answer.json()["error"]) == (409, True), answer.text


def test_a_batch_takes_no_id_that_waits_in_the_queue(doors: Doors) -> None:
    """A row of a batch whose id was accepted before is refused, and the others are stored."""
    waiting, free = doors.placed(), new_id()
    other = [order(waiting, {"name": "Ink", "quantity": 9}), order(free), order()]
    answer = doors.two.client.post("/orders/batch", json=other)
    assert [row["status"] for row in answer.json()["results"]] == [409, 202, 202], answer.text
    doors.drain()
    assert doors.one.client.get(f"/orders/{waiting}").json()["items"][0]["name"] == "Pen"
    doors.until(free, "completed")


def test_a_lost_queue_is_filled_again(doors: Doors) -> None:
    """Commands whose queue or stream was deleted are given to the broker again, and applied in their order."""
    order_id, moved = doors.placed(BURGER), doors.placed()
    assert doors.one.client.post(f"/orders/{moved}/cancel").status_code == 202
    doors.lose_the_queue()
    slow = {"FULFILMENT_MOCK_LATENCY_MIN": "10000", "FULFILMENT_MOCK_LATENCY_MAX": "10000"}
    with doors.worker(DRAIN_SECONDS="0.1", **slow):
        doors.until(order_id, "processing")
        doors.until(moved, "cancelled")
    assert doors.both(f"/orders/{moved}/events")[0].json()["events"][-1]["type"] == "order.cancelled"


@pytest.fixture(scope="module")
def mortal_postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL that tests may kill, if they start it again."""
    server = PostgresServer(tmp_path_factory.mktemp("mortal_postgresql"))
    yield server
    server.stop()


def health(client: httpx2.Client, part: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/health").json()["dependencies"][part]
    return found


def test_intake_goes_on_while_the_database_is_away(
    folder: Path, mortal_postgresql: PostgresServer, mortal_rabbitmq: RabbitServer, redis_server: RedisServer
) -> None:
    """With PostgreSQL killed orders are accepted and read, changes too; with the broker gone as well it is 503."""
    at = Place(mortal_postgresql.new_database(), mortal_postgresql)
    with ExitStack() as stack:
        doors = Doors(folder, stack, redis_server.new_database(), mortal_rabbitmq, DATABASE_URL=at.address)
        one, two = doors.clients
        known = doors.placed()
        slow = {"FULFILMENT_MOCK_LATENCY_MIN": "1500", "FULFILMENT_MOCK_LATENCY_MAX": "1500"}
        with doors.worker(**slow):
            doors.until(known, "completed")
            mortal_postgresql.kill()
            ids = [doors.placed(), *(doors.placed(BURGER) for _ in range(9))]
            assert all(doors.states(order_id) == {"pending"} for order_id in ids)
            assert two.post(f"/orders/{ids[0]}/cancel").status_code == 202
            assert doors.states(ids[0]) == {"cancelled"}
            # Nobody can judge these now.
            assert one.post("/orders/NOBODY/cancel").status_code == 202
            assert one.post(f"/orders/{known}/cancel").status_code == 202
            assert two.post("/orders", json=order("TAKEN")).status_code == 202
            assert health(one, "database")["status"] == "down"
            mortal_postgresql.restart()
            doors.until(ids[0], "cancelled")
            for order_id in ids[1:]:
                doors.until(order_id, "completed")
            doors.until("TAKEN", "completed")
            wait_until(lambda: doors.states("NOBODY") == {"409"})
            assert "Order not found" in two.get("/orders/NOBODY").json()["error"]
            wait_until(lambda: "refused" in str(two.get(f"/orders/{known}").json()["last_error"]))
        # The id that belonged to no order is free.
        assert one.post("/orders", json=order("NOBODY")).status_code == 202
        mortal_postgresql.kill()
        mortal_rabbitmq.kill()
        neither = one.post("/orders", json=order())
        assert neither.status_code == 503
        mortal_postgresql.restart()
        wait_until(lambda: health(one, "database")["status"] == "ok")
        directly = one.post("/orders", json=order())
        assert directly.status_code == 201, directly.text
        for client in doors.clients:
            assert client.get(f"/orders/{directly.json()['order_id']}").status_code == 200
        assert "RabbitMQ" in health(one, "queue")["detail"]
        mortal_rabbitmq.restart()
        wait_until(lambda: health(one, "queue")["status"] == "ok")
        assert one.post("/orders", json=order()).status_code == 202


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_a_broker_that_goes_away_takes_no_accepted_order_along(
    folder: Path,
    kind: str,
    mortal_redis: DurableRedisServer,
    mortal_rabbitmq: RabbitServer,
    redis_server: RedisServer,
) -> None:
    """What waited in a broker that is killed is stored directly; a change of it meanwhile is 503, never a 404."""
    rabbit = mortal_rabbitmq if kind == "rabbitmq" else None
    broker = mortal_rabbitmq if rabbit else mortal_redis
    with ExitStack() as stack:
        settings = {} if rabbit else {"BROKER_URL": mortal_redis.new_database()}
        doors = Doors(folder, stack, redis_server.new_database(), rabbit, **settings)
        one, two = doors.clients
        order_id, other = doors.placed(), doors.placed()
        broker.kill()
        assert two.get(f"/orders/{order_id}").status_code == 200
        statuses = set()

        def cancelled() -> bool:
            statuses.add(two.post(f"/orders/{order_id}/cancel").status_code)
            statuses.update(answer.status_code for answer in doors.both(f"/orders/{order_id}"))
            return 202 in statuses

        wait_until(cancelled)
        assert statuses <= {200, 202, 503}, statuses
        assert doors.states(order_id) == {"cancelled"}
        assert one.post("/orders", json=order()).status_code == 201
        wait_until(lambda: other in {row[0] for row in rows(folder, "SELECT order_id FROM orders")})
        wait_until(lambda: one.get(f"/orders/{other}/events").status_code == 200)
        assert one.delete(f"/orders/{other}").status_code == 204
        assert doors.states(other) <= {"404", "503"}
        broker.restart()
        wait_until(lambda: health(one, "queue")["status"] == "ok" and health(two, "queue")["status"] == "ok")
        doors.apply()
        doors.drain()
        assert (doors.states(order_id), doors.states(other)) == ({"cancelled"}, {"404"})
        assert_sound_history(folder, order_id)


def assert_sound_history(folder: Path, order_id: str) -> None:
    types = rows(folder, "SELECT type FROM events WHERE order_id = ? ORDER BY number", order_id)
    assert types == [("order.placed",), ("order.cancelled",)]


def test_without_redis_orders_are_stored_directly(
    folder: Path, mortal_redis: DurableRedisServer, rabbitmq: RabbitServer
) -> None:
    """With Redis killed POST is 201, /health says why, and it is 202 again by itself once Redis is back."""
    with ExitStack() as stack:
        doors = Doors(folder, stack, mortal_redis.new_database(), rabbitmq)
        one, two = doors.clients
        waiting = doors.placed()
        mortal_redis.kill()
        answer = one.post("/orders", json=order())
        assert answer.status_code == 201, answer.text
        assert two.get(f"/orders/{answer.json()['order_id']}").status_code == 200
        assert {found.status_code for found in doors.both(f"/orders/{waiting}")} == {503}
        assert two.post(f"/orders/{waiting}/cancel").status_code == 503
        assert "stored directly" in health(one, "queue")["detail"]
        mortal_redis.restart()
        wait_until(lambda: health(one, "queue")["status"] == "ok")
        assert one.post("/orders", json=order()).status_code == 202
        assert doors.states(waiting) == {"pending"}
