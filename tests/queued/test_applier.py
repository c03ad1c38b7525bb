"""The applier on a real broker: what fails in a way that nobody foresaw, for a moment or for good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from expediter.backends.brokers import Broker, Topic
from expediter.backends.brokers.redis import RedisBroker
from expediter.backends.databases.sqlite import SqliteDatabase
from expediter.orders.commands import PlaceOrder
from expediter.queued.applier import Applier
from expediter.queued.message import QueuedCommand, pack
from expediter.queued.temporary import TemporaryOrders
from servers import RedisServer
from serving import PATIENCE_SECONDS
from storing import open_committer, place, rows


class Broken(SqliteDatabase):
    """A database whose writes raise what nobody foresaw: the first ones, and any with this order."""

    writes = 0
    poison = ""

    async def write(self, work: Any, **begun: Any) -> Any:
        if self.writes:
            self.writes -= 1
            raise RuntimeError("a bug")
        asked = work.args[0] if getattr(work, "args", ()) else ()
        if any(each.command.order_id == self.poison for each in asked):
            raise RuntimeError("a poisonous order")
        return await super().write(work, **begun)


@asynccontextmanager
async def applying(folder: Path, server: RedisServer, database: Broken) -> AsyncIterator[Broker]:
    """An applier that stores into the file orders.db what is published to a broker of its own."""
    url = server.new_database()
    broker = RedisBroker(url, claim_idle_seconds=60.0)
    temporary = TemporaryOrders(url, keep_seconds=60)
    async with open_committer(folder, database=database) as committer:
        applier = Applier(broker, temporary, committer)
        applier.start()
        try:
            yield broker
        finally:
            await applier.stop(5.0)
            await temporary.close()
            await broker.close()


def message(*order_ids: str) -> bytes:
    commands = [place(order_id, fresh=True).command for order_id in order_ids]
    return pack(
        [QueuedCommand(token=each.order_id, command=each) for each in commands if isinstance(each, PlaceOrder)]
    )


async def until_stored(folder: Path, *order_ids: str) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while {row[0] for row in rows(folder, "SELECT order_id FROM orders")} != set(order_ids):
            await asyncio.sleep(0.02)


async def test_an_error_of_the_moment_puts_nothing_aside(folder: Path, redis_server: RedisServer) -> None:
    """An accepted order whose first tries fail in an unforeseen way is stored all the same."""
    database = Broken(folder / "orders.db")
    database.writes = 3
    async with applying(folder, redis_server, database) as broker:
        for order_id in ("A1", "A2"):
            await broker.publish(Topic.COMMANDS, message(order_id))
        await until_stored(folder, "A1", "A2")
        assert (await broker.depth(Topic.COMMANDS)).dead == 0


async def test_a_command_that_always_fails_is_put_aside_alone(folder: Path, redis_server: RedisServer) -> None:
    """A command that fails again and again ends among the dead; those in its message, and others, are stored."""
    database = Broken(folder / "orders.db")
    database.poison = "BAD"
    async with applying(folder, redis_server, database) as broker:
        await broker.publish(Topic.COMMANDS, message("A1", "BAD", "A2"))
        await until_stored(folder, "A1", "A2")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await broker.depth(Topic.COMMANDS)).dead != 1:
                await asyncio.sleep(0.05)
        await broker.publish(Topic.COMMANDS, message("A3"))
        await until_stored(folder, "A1", "A2", "A3")
