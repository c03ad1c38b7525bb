"""The jobs, counted: exact at every turn, and without reading those that wait."""

from __future__ import annotations

import asyncio

from expediter.backends.databases import Connection, open_database
from expediter.orders.commands import CancelOrder, DeleteOrder, RecordPayment, RetryOrder
from expediter.orders.order import PaymentOutcome
from expediter.store.jobs import Backlog, backlog
from expediter.store.lookups import counters
from expediter.store.migrations import upgrade
from expediter.store.submissions import Claimed, Request
from storing import (
    LEASE,
    Place,
    applied,
    ask,
    claim,
    claimed,
    open_committer,
    place,
    rows,
    undo_money_and_webhooks,
)


async def counted(at: Place) -> Backlog:
    async def work(connection: Connection) -> Backlog:
        return await backlog(connection, await counters(connection))

    database = open_database(at.address)
    try:
        return await database.read(work)
    finally:
        await database.close()


async def states(at: Place) -> tuple[int, int, int, int]:
    found = await counted(at)
    return found.ready, found.scheduled, found.leased, found.dead


def failed(job: Claimed) -> Request:
    outcome = PaymentOutcome.UNAVAILABLE
    return Request(
        RecordPayment(order_id=job.order.order_id, fence=job.job.fence, outcome=outcome, retry_in=LEASE)
    )


async def test_a_job_is_counted_in_the_state_that_it_is_in(at: Place) -> None:
    """Jobs are counted as ready, leased, scheduled or dead, whichever way they came there, and leave with rest."""
    async with open_committer(at) as committer:
        await ask(committer, *(place(f"A{number}") for number in range(6)))
        assert await states(at) == (6, 0, 0, 0)
        first, second = (await claimed(committer, claim(limit=2))).claimed
        assert await states(at) == (4, 0, 2, 0)
        await applied(committer, failed(first))
        assert await states(at) == (4, 1, 1, 0)
        await applied(committer, Request(CancelOrder(order_id="A5")))
        assert await states(at) == (3, 1, 1, 0)
        await applied(committer, Request(DeleteOrder(order_id="A5")))
        assert await states(at) == (3, 1, 1, 0)
        # A lease that ran out makes its job ready again; claimed too often it is parked.
        for _ in range(5):
            assert len((await claimed(committer, claim(limit=9, lease=0))).claimed) == 3
            assert await states(at) == (3, 1, 1, 0)
        await claimed(committer)
        assert await states(at) == (0, 1, 1, 3)
        await applied(committer, Request(RetryOrder(order_id="A2")))
        assert await states(at) == (1, 1, 1, 2)
        assert second.job.holder == "worker"


async def test_the_oldest_is_the_one_that_came_due_first(at: Place) -> None:
    """The age of the queue is that of the job that has been due longest; of none while nothing is due."""
    async with open_committer(at) as committer:
        assert (await counted(at)).oldest_due_at is None
        await ask(committer, place("old"))
        (due_at,) = rows(at, "SELECT due_at FROM jobs")[0]
        await ask(committer, place("new"))
        found = await counted(at)
        assert found.oldest_due_at == due_at <= found.now
        await claimed(committer)
        assert (await counted(at)).oldest_due_at is None


async def test_an_unreadable_order_is_counted_among_the_dead(at: Place) -> None:
    """An order that a claim parks because its row makes no sense is counted as dead."""
    async with open_committer(at) as committer:
        await ask(committer, place("A"), place("B"))
        at.change("UPDATE orders SET status = 'bogus' WHERE order_id = 'A'")
        await claimed(committer)
        assert await states(at) == (0, 0, 1, 1)


async def test_the_jobs_of_an_older_database_are_counted(at: Place) -> None:
    """A database from before the counters has its jobs counted when it is upgraded, once."""
    async with open_committer(at) as committer:
        await ask(committer, *(place(f"A{number}") for number in range(3)))
        for _ in range(6):
            await claimed(committer, claim(lease=0))
        await applied(committer, Request(RetryOrder(order_id="A1")))
    assert await states(at) == (1, 0, 0, 2)
    at.change("DELETE FROM counters WHERE name LIKE 'jobs%'")
    undo_money_and_webhooks(at)
    at.change("DROP TABLE incarnation")
    at.change("DROP TABLE cache_standing")
    at.change("DROP TABLE installation")
    at.change("ALTER TABLE feed DROP COLUMN archived")
    at.change("UPDATE alembic_version SET version_num = '0001'")
    assert await asyncio.to_thread(upgrade, at.address)
    assert await states(at) == (1, 0, 0, 2)
    assert not await asyncio.to_thread(upgrade, at.address)
