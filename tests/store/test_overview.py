"""What one read says of the whole system, on every database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from expediter.backends.databases import Database, open_database
from expediter.orders.order import JobKind
from expediter.store.overview import read_overview
from expediter.store.rows import JOBS
from expediter.store.webhooks import Standing, Webhooks
from storing import Place, ask, claim, open_committer, place


@asynccontextmanager
async def _opened(at: Place) -> AsyncIterator[Database]:
    database = open_database(at.address)
    try:
        yield database
    finally:
        await database.close()


async def test_the_overview_counts_jobs_and_how_far_webhooks_are_behind(at: Place) -> None:
    """An endpoint that begins with the first event is behind by all of them, and by their age."""
    async with open_committer(at) as committer, _opened(at) as database:
        webhooks = Webhooks(database)
        assert (await database.read(read_overview)).lags == []
        made = await webhooks.create("https://shop.example/hooks", ["*"], "", "beginning")
        assert isinstance(made, Standing)
        for number in range(3):
            await ask(committer, place(f"ORD-{number}"))
        found = await database.read(read_overview)
        assert found.counters[JOBS] == found.backlog.ready == 3
        assert set(found.backlog.first_due) == {JobKind.CHARGE}
        (lag,) = found.lags
        assert (lag.endpoint_id, lag.active, lag.failing_seconds) == (made.endpoint.endpoint_id, True, 0)
        assert lag.events == 3

        await ask(committer, claim(limit=2))
        await webhooks.change(lag.endpoint_id, {"status": "paused"})
        found = await database.read(read_overview)
        assert (found.backlog.ready, found.backlog.leased) == (1, 2)
        (later,) = found.lags
        assert (later.active, later.events) == (False, 5)
        assert later.seconds > lag.seconds >= 0
        assert found.breaker.state == "closed"
        pool = database.pool()
        assert 0 == pool.used < pool.open <= pool.most
