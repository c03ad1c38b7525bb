"""Waiting for orders to change: what it costs, and that no change of any process is missed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from expediter.backends.cache import NoCache
from expediter.backends.databases import Database, open_database
from expediter.errors import DatabaseUnavailable, OrderNotFound
from expediter.orders.commands import CancelOrder, DeleteOrder
from expediter.store.committer import Committer
from expediter.store.queries import NothingAccepted, Queries
from expediter.store.submissions import Request
from storing import Place, applied, open_committer, place

#: Seconds for which readers wait in vain, and within which they must hear of a change.
LONG = 60.0
SOON = 20.0


class Counted:
    """A database whose reads are counted, and fail while it is `away`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.reads = 0
        self.away = False
        self._read = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    async def read(self, work: Any, **more: Any) -> Any:
        self.reads += 1
        if self.away:
            raise DatabaseUnavailable("it is away")
        try:
            return await self._database.read(work, **more)
        finally:
            self._read.set()

    async def after(self, reads: int) -> None:
        """Return once there have been so many reads more."""
        wanted = self.reads + reads
        while self.reads < wanted:
            self._read.clear()
            await asyncio.wait_for(self._read.wait(), SOON)


@asynccontextmanager
async def two_processes(at: Place) -> AsyncIterator[tuple[Queries, Counted, Committer]]:
    """Readers on connections of their own, and a committer that does not tell them of its changes."""
    async with open_committer(at) as other:
        database = Counted(open_database(at.address))
        try:
            yield Queries(database, NoCache(), NothingAccepted()), database, other  # type: ignore[arg-type]
        finally:
            await database.close()


async def test_many_who_wait_cost_no_more_than_one(at: Place) -> None:
    """While a hundred readers wait, the database is asked a few times a second, as for a single one."""
    async with two_processes(at) as (queries, database, other):
        ids = [f"A{number}" for number in range(100)]
        await asyncio.gather(*(other.submit(place(order_id)) for order_id in [*ids, "clock"]))
        waiting = [asyncio.create_task(queries.wait(order_id, beyond=1, seconds=LONG)) for order_id in ids]
        await database.after(101)  # one look, and each finds that its order has not ended
        before = database.reads
        await queries.wait("clock", beyond=1, seconds=2.0)
        assert database.reads - before < 30  # it was 1,600: four looks a second, two reads each
        queries.stop_waiting()
        assert {entry.version for entry in await asyncio.gather(*waiting)} == {1}


async def test_a_change_of_another_process_is_heard_of(at: Place) -> None:
    """Who waits is told of what another process has committed, and those who wait for other orders wait on."""
    async with two_processes(at) as (queries, database, other):
        for order_id in ("A1", "A2", "A3"):
            await applied(other, place(order_id))
        changed, gone, unchanged = (
            asyncio.create_task(queries.wait(order_id, beyond=1, seconds=LONG)) for order_id in ("A1", "A2", "A3")
        )
        await database.after(4)
        await applied(other, Request(CancelOrder(order_id="A1")))
        await applied(other, Request(DeleteOrder(order_id="A2")))
        assert (await asyncio.wait_for(changed, SOON)).version == 2
        with pytest.raises(OrderNotFound):
            await asyncio.wait_for(gone, SOON)
        assert not unchanged.done()
        queries.stop_waiting()
        await unchanged


async def test_a_change_that_has_no_event_is_heard_of(at: Place) -> None:
    """When another process clears everything, who waits for an order learns that it is gone."""
    async with two_processes(at) as (queries, database, other):
        await applied(other, place("A1"))
        gone = asyncio.create_task(queries.wait("A1", beyond=1, seconds=LONG))
        await database.after(2)
        await other.clear()
        with pytest.raises(OrderNotFound):
            await asyncio.wait_for(gone, SOON)


async def test_who_waits_is_told_that_the_database_is_away(at: Place) -> None:
    """A database that cannot be read is said to whoever waits, at once; afterwards one can wait again."""
    async with two_processes(at) as (queries, database, other):
        await applied(other, place("A1"))
        waiting = asyncio.create_task(queries.wait("A1", beyond=1, seconds=LONG))
        await database.after(2)
        database.away = True
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(waiting, SOON)
        with pytest.raises(DatabaseUnavailable):
            await queries.wait("A1", beyond=1, seconds=LONG)
        database.away = False
        again = asyncio.create_task(queries.wait("A1", beyond=1, seconds=LONG))
        await database.after(2)
        await applied(other, Request(CancelOrder(order_id="A1")))
        assert (await asyncio.wait_for(again, SOON)).version == 2
