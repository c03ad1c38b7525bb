"""Two transactions of two processes that meet on one order, at the moment that matters, on real servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from expediter.backends.databases import Collision, Connection, open_database
from expediter.errors import StaleLease
from expediter.orders.commands import CancelOrder, FulfilmentOutcome, RecordFulfilment, RecordPayment
from expediter.orders.order import JobKind, PaymentOutcome, PaymentStatus, Stages, Status
from expediter.store import schema
from expediter.store.submissions import Applied, Request
from servers import Server
from serving import PATIENCE_SECONDS
from storing import Place, applied, claimed, open_committer, place, rows

#: How each server says that a transaction waits for another one's lock.
WAITING = {
    "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
    # Not innodb_trx: that is a copy which is made anew only if nobody has looked for a tenth of a second.
    "mariadb": "SELECT variable_value FROM information_schema.global_status "
    "WHERE variable_name = 'INNODB_ROW_LOCK_CURRENT_WAITS'",
}


@pytest.fixture(params=sorted(WAITING))
def meeting(request: pytest.FixtureRequest) -> tuple[Place, str]:
    """An empty database on a server, and how to see there that somebody waits."""
    server: Server = request.getfixturevalue(request.param)
    return Place(server.new_database(), server), WAITING[request.param]


class Paused:
    """A database whose next transaction stops before its commit, with all its locks, until it may go on."""

    def __init__(self, address: str) -> None:
        self._inner = open_database(address)
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        self.armed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def write(self, work: Any, *, begun: Callable[[], None] | None = None) -> Any:
        if not self.armed:
            return await self._inner.write(work, begun=begun)
        self.armed = False

        async def stopped(connection: Connection) -> Any:
            result = await work(connection)
            self.reached.set()
            await self.go_on.wait()
            return result

        return await self._inner.write(stopped, begun=begun)


async def paid_while_cancelled(at: Place, waiting: str, stages: Stages) -> Applied:
    """Cancel an order while the transaction that records its payment is about to commit."""
    database: Any = Paused(at.address)
    async with open_committer(at, database=database) as worker, open_committer(at, slot=8) as person:
        await applied(worker, place("A1", stages=stages))
        (claim,) = (await claimed(worker)).claimed
        database.armed = True
        paid = RecordPayment(
            order_id="A1", fence=claim.job.fence, outcome=PaymentOutcome.SUCCEEDED, lease=10_000_000
        )
        paying = asyncio.ensure_future(worker.submit(Request(paid)))
        await database.reached.wait()
        cancelling = asyncio.ensure_future(applied(person, Request(CancelOrder(order_id="A1"))))
        await somebody_waits(at, waiting)
        database.go_on.set()
        assert isinstance(await paying, Applied)
        return await cancelling


async def somebody_waits(at: Place, waiting: str) -> None:
    """Return once a transaction waits for another's lock."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while int(at.rows(waiting)[0][0]) == 0:
            await asyncio.sleep(0)


@pytest.mark.parametrize("stages", [Stages.PAYMENT, Stages.PAYMENT_FULFILMENT])
async def test_an_order_that_is_paid_while_it_is_cancelled_has_its_refund(
    meeting: tuple[Place, str], stages: Stages
) -> None:
    """Whoever waited for the payment's transaction sees the order and the job as that has left them."""
    at, waiting = meeting
    cancelled = await paid_while_cancelled(at, waiting, stages)

    assert cancelled.order.status is Status.CANCELLED
    assert cancelled.order.payment_status is PaymentStatus.REFUND_PENDING
    assert rows(at, "SELECT order_id, kind FROM jobs") == [("A1", JobKind.REFUND.value)]
    counted = dict(rows(at, "SELECT name, sum(value) FROM counters GROUP BY name"))
    assert {name: int(value) for name, value in counted.items() if value} == {"jobs": 1, "status:cancelled": 1}


async def test_an_outcome_that_waited_for_a_cancellation_is_dropped(meeting: tuple[Place, str]) -> None:
    """A worker whose report waits sees that its job is gone: the job is read anew, as the order is."""
    at, waiting = meeting
    database: Any = Paused(at.address)
    async with open_committer(at, database=database) as person, open_committer(at, slot=8) as worker:
        await applied(worker, place("A1", stages=Stages.FULFILMENT))
        (claim,) = (await claimed(worker)).claimed
        database.armed = True
        cancelling = asyncio.ensure_future(applied(person, Request(CancelOrder(order_id="A1"))))
        await database.reached.wait()
        done = RecordFulfilment(order_id="A1", fence=claim.job.fence, outcome=FulfilmentOutcome.DONE)
        reporting = asyncio.ensure_future(worker.submit(Request(done)))
        await somebody_waits(at, waiting)
        database.go_on.set()
        assert (await cancelling).order.status is Status.CANCELLED
        assert isinstance(await reporting, StaleLease)


async def test_a_change_that_finds_no_row_is_a_collision(at: Place) -> None:
    """A row that was read and is gone when it is written makes the transaction begin anew; nothing is stored."""
    async with open_committer(at) as committer:
        await applied(committer, place("A1"))
        before = rows(at, "SELECT * FROM orders")
        database = open_database(at.address)
        tries = 0

        async def work(connection: Connection) -> None:
            nonlocal tries
            tries += 1
            await connection.fetch(schema.orders.select())
            await connection.update(schema.orders, ("last_error",), ("order_id",), [("changed", "A1")])
            if tries == 1:
                await connection.remove(schema.jobs, ["nobody"])
            await connection.append(schema.feed.c.position, schema.events, [])

        try:
            if at.server is None:
                with pytest.raises(Collision):  # one writer at a time: there it can only be a bug
                    await database.write(work)
                assert rows(at, "SELECT * FROM orders") == before
            else:
                await database.write(work)
                assert tries == 2
                assert rows(at, "SELECT last_error FROM orders") == [("changed",)]
        finally:
            await database.close()
