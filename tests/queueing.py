"""Two serving processes with INTAKE=queued, and what a client, a broker and a Redis can do to them."""

from __future__ import annotations

import json
import re
import sqlite3
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

from auditing import gateway_with_ledger, rows, wait_until, working
from servers import RabbitServer, RedisServer, in_thread
from serving import Program, Serving

PEN = {"name": "Pen", "quantity": 1}
BURGER = {"item_id": "item_001", "item_name": "Burger", "quantity": 2, "price": 12.99}
STREAM = "orders:commands"

#: A worker with these has its hands full with one order.
BUSY = {
    "WORKER_COUNT": "1",
    "WORKER_CONCURRENCY": "1",
    "LEASE_SECONDS": "60",
    "DRAIN_SECONDS": "0.1",
    "FULFILMENT_MOCK_LATENCY_MIN": "10000",
    "FULFILMENT_MOCK_LATENCY_MAX": "10000",
}

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
            self.settings["BROKER_URL"] = rabbit.url
            self.settings.setdefault("RABBITMQ_QUEUE_NAME", rabbit.new_queue())
        self.redis = stack.enter_context(closing(redis.Redis.from_url(redis_url, decode_responses=True)))
        self.streams = (
            stack.enter_context(closing(redis.Redis.from_url(self.settings["BROKER_URL"])))
            if rabbit is None
            else self.redis
        )
        self._stack = stack
        self.reopen()

    def reopen(self) -> None:
        """Open two doors; those before must have ended."""
        with ThreadPoolExecutor(2) as starting:
            found = [starting.submit(self._open) for _ in range(2)]
        self.one, self.two = (each.result() for each in found)
        self.clients = (self.one.client, self.two.client)

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """Open two doors, and close them at the end."""
        self.reopen()
        yield
        for door in (self.one, self.two):
            door.stop()

    def _open(self) -> Serving:
        return self._stack.enter_context(Serving(self.folder, "--no-workers", **self.settings))

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
            lambda: (
                self.temporary(order_id).get("state") != "pending"
                and not self.redis.exists(f"temp_changes:{order_id}")
                and self.states(order_id) == {status}
            )
        )

    def queue_depth(self) -> int:
        """Return how many messages wait, or are worked on."""
        detail = self.one.client.get("/health").json()["dependencies"]["queue"]["detail"]
        return int(re.search(r"(\d+) messages of queued commands wait", detail)[1])  # type: ignore[index]

    def drain(self) -> None:
        """Let a worker apply and finish everything that was queued up to now."""
        self.placed()  # the last one: when it is settled, so is what came before
        with self.worker() as worker:
            self.until_settled()
            wait_until(lambda: rows(self.folder, "SELECT count(*) FROM jobs WHERE dead_at IS NULL") == [(0,)])
            worker.stop()  # what it has settled is acknowledged, too: the broker keeps none of it

    @contextmanager
    def busy_worker(self) -> Iterator[None]:
        """Run a worker that applies commands, and has its hands full with one order of its own.

        So no order is touched before all of its changes are stored: a worker that reaches it first makes a change
        illegal, and it is then refused, as it should be.
        """
        bystander = self.placed()
        with self.worker(**BUSY) as worker:
            self.until(bystander, "processing")
            yield
            worker.stop()  # it gives the order back; whoever comes next finishes it

    @contextmanager
    def busy_worker_without_broker(self) -> Iterator[None]:
        """The same while the broker is away, and orders are stored before they are answered."""
        with self.worker(**BUSY) as worker:
            answer = self.one.client.post("/orders", json=order())
            assert answer.status_code == 201, answer.text
            self.until(answer.json()["order_id"], "processing")
            yield
            worker.stop()

    def apply(self) -> None:
        """Have everything that was queued up to now stored, and nothing worked off."""
        waiting = self.messages()
        with self.busy_worker():
            self.publish(*waiting)
            self.until_settled()

    def pending(self) -> list[str]:
        """Return what redis-cli would list as accepted and not settled."""
        return list(self.redis.zrange("orders:accepted", 0, -1))  # type: ignore[arg-type]

    def until_settled(self) -> None:
        """Return once nothing that was accepted waits any more."""
        wait_until(lambda: not self.pending() and self.queue_depth() == 0)

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

    def let_a_minute_pass(self) -> None:
        """As if the minute were over after which Redis gives a dead worker's messages to others."""
        for entry in self.streams.xpending_range(STREAM, "workers", "-", "+", 100):
            mine = entry["message_id"]
            self.streams.xclaim(STREAM, "workers", entry["consumer"], 0, [mine], idle=86_400_000)

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


@pytest.fixture(scope="module", params=["redis", "rabbitmq"], name="doors")
def shared_doors(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer
) -> Iterator[Doors]:
    """Two serving processes on SQLite, with each broker in turn, that the tests of a module share.

    Each test has its own orders.
    """
    rabbit = request.getfixturevalue("rabbitmq") if request.param == "rabbitmq" else None
    with ExitStack() as stack:
        yield Doors(tmp_path_factory.mktemp("doors"), stack, redis_server.new_database(), rabbit)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the write lock of the SQLite database: nobody can store anything meanwhile."""
    with closing(sqlite3.connect(folder / "orders.db", isolation_level=None, timeout=10)) as raw:
        raw.execute("BEGIN IMMEDIATE")
        yield
        raw.execute("ROLLBACK")
