"""Upkeep of the store: removing what has expired, and everything."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import bindparam, delete, func, select, update

from expediter import schema
from expediter.dialects import Connection
from expediter.keys import REMOVE_KEYS, keep_answers, load_answers, replay_answer
from expediter.requests import Answer, IdempotencyKey, Replayed

#: Expired idempotency keys that one transaction removes, at most: it must not hold up orders.
EXPIRED_KEYS_PER_BATCH = 500
_EXPIRED_KEYS = (
    select(schema.idempotency_keys.c.idempotency_key)
    .where(schema.idempotency_keys.c.expires_at <= bindparam("now"))
    .limit(EXPIRED_KEYS_PER_BATCH)
)
_ADVANCE_FEED = update(schema.feed).values(position=schema.feed.c.position + 1)


async def remove_expired_keys(connection: Connection) -> int:
    """Remove up to EXPIRED_KEYS_PER_BATCH idempotency keys whose time is over; return how many."""
    rows = await connection.fetch(_EXPIRED_KEYS, now=await connection.now())
    if rows:
        await connection.run(REMOVE_KEYS, ids=[row[0] for row in rows])
    return len(rows)


_EVERYTHING = (
    schema.jobs,
    schema.payment_attempts,
    schema.order_lines,
    schema.orders,
    schema.events,
    schema.idempotency_keys,
    schema.counters,
    schema.deleted_orders,
)
_CLOSE_BREAKER = update(schema.circuit_breakers).values(
    failures=0, open_until=None, probe_holder=None, probe_until=None, version=schema.circuit_breakers.c.version + 1
)
_COUNT_ORDERS = select(func.count()).select_from(schema.orders)
_EMPTY = tuple(delete(table) for table in _EVERYTHING)


async def clear(
    connection: Connection, *, key: IdempotencyKey | None, word: Callable[[int], Answer] | None
) -> int | Replayed:
    """Remove every order and everything that belongs to one; return how many orders there were.

    With a key that is known already nothing is removed; otherwise what `word` says is kept under it. The feed's
    position goes on, so that readers of the feed and caches notice. Raises IdempotencyMismatch.
    """
    now = await connection.now()
    if key is not None:
        known = await load_answers(connection, [key.key], now)
        if key.key in known:
            return replay_answer(key, known[key.key])
    orders = int((await connection.fetch(_COUNT_ORDERS))[0][0])
    for statement in (*_EMPTY, _CLOSE_BREAKER):
        await connection.run(statement)
    if key is not None and word is not None:
        await keep_answers(connection, [(key, word(orders))], now)
    await retire_caches(connection)
    return orders


async def retire_caches(connection: Connection) -> int:
    """Move the feed's position on without an event: whoever compares it drops what it has cached."""
    return await connection.run(_ADVANCE_FEED)
