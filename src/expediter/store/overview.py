"""How the whole system stands: what one bounded read says of orders, jobs, the breaker and the webhooks."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from sqlalchemy import bindparam, func, select

from expediter.backends.databases import Connection
from expediter.orders.order import MICROSECONDS
from expediter.orders.resilience import Breaker
from expediter.store import lookups, schema
from expediter.store.deliveries import WAITING
from expediter.store.jobs import Backlog, backlog
from expediter.store.statements import POSITION
from expediter.store.webhooks import ACTIVE, ENDPOINTS_MAX

_table = schema.webhook_endpoints.c
_kept = schema.webhook_deliveries.c
#: Of each endpoint, how far it has come, and what it has waited for longest: each is one look into an index.
_ENDPOINTS = (
    select(
        _table.endpoint_id,
        _table.status,
        _table.position,
        _table.failing_since,
        select(func.min(_kept.position))
        .where(_kept.endpoint_id == _table.endpoint_id, _kept.status == WAITING)
        .scalar_subquery(),
    )
    .order_by(_table.created_at, _table.endpoint_id)
    .limit(ENDPOINTS_MAX)
)
#: When the first event came to be at a position or after it.
_AT = (
    select(schema.events.c.at)
    .where(schema.events.c.position >= bindparam("position"))
    .order_by(schema.events.c.position)
    .limit(1)
)


class Lag(msgspec.Struct, frozen=True):
    """How far a webhook endpoint is behind: events, and the age of the oldest of them (seconds).

    `failing_seconds` is for how long its receiver has taken nothing.
    """

    endpoint_id: str
    active: bool
    events: int
    seconds: float
    failing_seconds: float


class Overview(msgspec.Struct, frozen=True):
    """The counters, the jobs, the breaker, and each webhook endpoint (ENDPOINTS_MAX at most)."""

    counters: Mapping[str, int]
    backlog: Backlog
    breaker: Breaker
    lags: list[Lag]


async def read_overview(connection: Connection) -> Overview:
    """Read it: counters and looks into indexes, so it takes as long for a million orders as for ten."""
    counters = await lookups.counters(connection)
    jobs = await backlog(connection, counters)
    breaker = await lookups.breaker(connection)
    lags = []
    endpoints = await connection.fetch(_ENDPOINTS)
    newest = await connection.newest(POSITION) if endpoints else 0
    for endpoint_id, status, position, failing_since, first_waiting in endpoints:
        done = position if first_waiting is None else min(position, first_waiting - 1)
        behind = max(0, newest - done)
        rows = await connection.fetch(_AT, position=done + 1) if behind else []
        lags.append(
            Lag(
                endpoint_id,
                active=status == ACTIVE,
                events=behind,
                seconds=_seconds(rows[0][0] if rows else None, jobs.now),
                failing_seconds=_seconds(failing_since, jobs.now),
            )
        )
    return Overview(counters, jobs, breaker, lags)


def _seconds(since: int | None, now: int) -> float:
    return 0.0 if since is None else max(0, now - since) / MICROSECONDS
