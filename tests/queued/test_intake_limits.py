"""What queued intake holds while the broker and Redis take their time, and what it remembers afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from expediter.backends.brokers import Topic
from expediter.backends.cache import NoCache
from expediter.backends.databases import open_database
from expediter.errors import Overloaded
from expediter.orders.order import Line
from expediter.queued.intake import REMEMBERED_BYTES_MAX, WAITING_BYTES_MAX, QueuedIntake
from expediter.queued.temporary import Accepted
from expediter.store.queries import NothingAccepted, Queries
from expediter.store.submissions import Answer, Queued
from storing import open_committer, place

MEBIBYTE = 1024 * 1024


class Redis:
    """Stands in for what is kept in Redis: it takes what it is given once it may, and forgets it when told."""

    incarnation = 0

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.put_back = asyncio.Event()
        self.last: Sequence[Accepted] = ()
        self.since = b"first"
        self.looks = 0

    async def put(self, accepted: Sequence[Accepted]) -> list[None]:
        await self.open.wait()
        self.last = accepted
        if self.since == b"second":
            self.put_back.set()
        return [None] * len(accepted)

    async def tell_incarnation(self, number: int) -> None:
        pass

    async def waiting(self, tokens: Sequence[str]) -> tuple[list[bool], bytes]:
        """All are there at the first look; then it has forgotten everything."""
        self.looks += 1
        self.since = b"first" if self.looks == 1 else b"second"
        return [self.looks == 1] * len(tokens), self.since


class Broker:
    """Takes every message."""

    async def publish(self, topic: Topic, body: bytes) -> None:
        pass


@asynccontextmanager
async def open_intake(folder: Path) -> AsyncIterator[tuple[QueuedIntake, Redis]]:
    redis: Any = Redis()
    broker: Any = Broker()
    async with open_committer(folder) as committer:
        database = open_database(f"sqlite:///{folder}/orders.db")
        queries = Queries(database, NoCache(), NothingAccepted())
        intake = QueuedIntake(database, committer, queries, broker, redis)
        try:
            yield intake, redis
        finally:
            await intake.stop()
            await database.close()


def word(document: bytes | None, changes: int) -> Answer:
    return Answer(202, {}, "accepted")


async def test_large_orders_that_wait_for_the_broker_are_refused_by_their_bytes(folder: Path) -> None:
    """Beyond its bytes queued intake refuses at once; what it took before is accepted, and then more is."""
    fitting = WAITING_BYTES_MAX // MEBIBYTE
    async with open_intake(folder) as (intake, redis):
        waiting = [
            asyncio.create_task(intake.submit(place(f"A{number}", fresh=True), word, MEBIBYTE))
            for number in range(fitting)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="bytes"):
            await asyncio.wait_for(intake.submit(place("late", fresh=True), word, MEBIBYTE), 20)
        redis.open.set()
        assert all(isinstance(outcome, Queued) for outcome in await asyncio.gather(*waiting))
        assert isinstance(await intake.submit(place("later", fresh=True), word, MEBIBYTE), Queued)


async def test_what_is_remembered_has_a_limit_in_bytes(folder: Path) -> None:
    """After Redis has forgotten everything, the newest of what was accepted is put back, as far as it fits."""
    lines = tuple(Line(number, None, "x" * 500, 1, 1) for number in range(1, 2_001))
    async with open_intake(folder) as (intake, redis):
        redis.open.set()
        accepted = 50  # a mebibyte each, and two more in the document that Redis is given
        for number in range(accepted):
            order = place(f"A{number}", fresh=True, lines=lines, total_minor=2_000)
            assert isinstance(await intake.submit(order, word, MEBIBYTE), Queued)
        intake.start()
        await asyncio.wait_for(redis.put_back.wait(), 30)
        put_back = [each.command.order_id for each in redis.last]
        assert put_back == [f"A{number}" for number in range(accepted - len(put_back), accepted)]
        size = sum(len(each.packed) + len(each.order or b"") for each in redis.last)
        assert REMEMBERED_BYTES_MAX / 2 < size <= REMEMBERED_BYTES_MAX
