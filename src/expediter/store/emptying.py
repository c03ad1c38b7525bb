"""Removing every order, some at a time, beside a running service: what is removed is also what is counted less.

Each step is a transaction like any other: it locks the orders that it removes, in the order of their ids, and
takes from the counters what they had added. So it may be broken off and begun again; orders placed meanwhile stay.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import bindparam, delete, select, update

from expediter.backends.databases import Connection
from expediter.errors import OrderUnreadable
from expediter.store import schema
from expediter.store.audit import kept_answers
from expediter.store.idempotency import REMOVE_KEYS, keep_answers, kept_answer
from expediter.store.maintenance import retire_caches
from expediter.store.rows import count_job, count_order, read_job, read_order
from expediter.store.statements import JOBS, LOCK_ORDERS, among
from expediter.store.submissions import Answer, IdempotencyKey, Replayed

#: Orders that one transaction removes, at most.
ORDERS_PER_STEP = 500

_OLD = (
    select(schema.orders.c.order_id)
    .where(schema.orders.c.created_at <= bindparam("before"))
    .order_by(schema.orders.c.created_at)
    .limit(ORDERS_PER_STEP)
)
_CALLED_FOR = (
    select(schema.payment_attempts.c.order_id).where(among(schema.payment_attempts.c.order_id)).distinct()
)
_BELONGINGS = tuple(
    delete(table).where(among(table.c.order_id))
    for table in (
        schema.payment_attempts,
        schema.refunds,
        schema.order_lines,
        schema.events,
        schema.webhook_deliveries,
    )
)
# What deleted orders have left behind.
_STRAYS = tuple(
    delete(table).where(
        at <= bindparam("before"),
        ~select(schema.orders.c.order_id).where(schema.orders.c.order_id == table.c.order_id).exists(),
    )
    for table, at in (
        (schema.events, schema.events.c.at),
        (schema.payment_attempts, schema.payment_attempts.c.started_at),
        (schema.refunds, schema.refunds.c.requested_at),
    )
)
_CLOSE_BREAKER = update(schema.circuit_breakers).values(
    failures=0, open_until=None, probe_holder=None, probe_until=None, version=schema.circuit_breakers.c.version + 1
)


async def remove_some(connection: Connection, *, before: int, slot: int) -> int:
    """Remove up to ORDERS_PER_STEP orders that were placed until `before`; return how many (0: none is left).

    The ids of those that were sent to the gateway stay taken: it remembers them.
    """
    ids = [row[0] for row in await connection.fetch(_OLD, before=before)]
    rows = await connection.fetch(LOCK_ORDERS, ids=ids) if ids else []
    if not rows:
        return 0
    ids = [row[0] for row in rows]
    jobs = await connection.fetch(JOBS, ids=ids)
    total: dict[str, int] = {}
    for row in rows:
        try:
            count_order(total, read_order(row), -1)
        except OrderUnreadable:
            total[f"status:{row[1]}"] = total.get(f"status:{row[1]}", 0) - 1
    for row in jobs:
        count_job(total, read_job(row), -1)
    called_for = [row[0] for row in await connection.fetch(_CALLED_FOR, ids=ids)]
    for statement in _BELONGINGS:
        await connection.run(statement, ids=ids)
    if jobs:
        await connection.remove(schema.jobs, [row[0] for row in jobs])
    await connection.remove(schema.orders, ids)
    if called_for:
        now = await connection.now()
        await connection.insert(schema.deleted_orders, [(order_id, now) for order_id in called_for])
    counters = [(name, slot, value) for name, value in sorted(total.items()) if value]
    await connection.add(schema.counters, counters)
    await retire_caches(connection)
    return len(ids)


async def remove_answers(connection: Connection, *, after: str) -> str | None:
    """Remove answers that name an order which is no more, among the keys beyond `after`; return where to go on."""
    stray, last = await kept_answers(connection, after, gone_too=True)
    if stray:
        await connection.run(REMOVE_KEYS, ids=list(stray))
    return last


async def finish(
    connection: Connection,
    *,
    before: int,
    removed: int,
    key: IdempotencyKey | None,
    word: Callable[[int], Answer] | None,
) -> Replayed | None:
    """Remove what is left of deleted orders, close the breaker, and keep under `key` what `word` says.

    Returns the answer of another call with this key that was faster. Raises IdempotencyMismatch.
    """
    now = await connection.now()
    if key is not None and (known := await replayed(connection, key=key)):
        return known
    for statement in _STRAYS:
        await connection.run(statement, before=before)
    await connection.run(_CLOSE_BREAKER)
    if key is not None and word is not None:
        await keep_answers(connection, [(key, word(removed))], now)
    await retire_caches(connection)
    return None


async def replayed(connection: Connection, *, key: IdempotencyKey) -> Replayed | None:
    """Return the answer that was kept under this key; None: there is none. Raises IdempotencyMismatch."""
    return await kept_answer(connection, key, await connection.now())
