"""Upkeep of the store: removing what has expired, and what goes into the archive."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from sqlalchemy import bindparam, delete, func, select, update

from expediter.backends.databases import Connection
from expediter.store import schema
from expediter.store.deliveries import still_needed
from expediter.store.feed import note_archived
from expediter.store.idempotency import REMOVE_KEYS
from expediter.store.statements import DELETED_ORDERS, POSITION, among

#: Expired idempotency keys that one transaction removes, at most: it must not hold up orders.
EXPIRED_KEYS_PER_BATCH = 500
_EXPIRED_KEYS = (
    select(schema.idempotency_keys.c.idempotency_key)
    .where(schema.idempotency_keys.c.expires_at <= bindparam("now"))
    .limit(EXPIRED_KEYS_PER_BATCH)
)
#: A change of no row, of each table that an order needs: somebody may have locked one of them.
_WRITE_NOTHING = (
    update(schema.orders).where(schema.orders.c.order_id == "").values(last_error=schema.orders.c.last_error),
    update(schema.jobs).where(schema.jobs.c.order_id == "").values(due_at=schema.jobs.c.due_at),
    update(schema.events).where(schema.events.c.position == -1).values(at=schema.events.c.at),
    update(schema.counters).where(schema.counters.c.name == "").values(value=schema.counters.c.value),
    update(schema.feed).where(schema.feed.c.feed_id == -1).values(archived=schema.feed.c.archived),
)
_THE_SAME = update(schema.feed).values(archived=schema.feed.c.archived)


async def write_nothing(connection: Connection) -> None:
    """Do what only a database can that takes orders."""
    for statement in _WRITE_NOTHING:
        await connection.run(statement)


async def write_the_same(connection: Connection) -> None:
    """Do the same, and write a row as it is."""
    await write_nothing(connection)
    await connection.run(_THE_SAME)


async def remove_expired_keys(connection: Connection) -> int:
    """Remove up to EXPIRED_KEYS_PER_BATCH idempotency keys whose time is over; return how many."""
    rows = await connection.fetch(_EXPIRED_KEYS, now=await connection.now())
    if rows:
        await connection.run(REMOVE_KEYS, ids=[row[0] for row in rows])
    return len(rows)


#: Events that one step of archiving looks at, at most; it moves the whole history of the orders they are about.
OLD_EVENTS_PER_BATCH = 500
_OLDEST_EVENTS = (
    select(schema.events.c.position, schema.events.c.order_id, schema.events.c.at)
    .where(schema.events.c.position > bindparam("after"))
    .order_by(schema.events.c.position)
    .limit(OLD_EVENTS_PER_BATCH)
)
_AT_REST = (
    select(schema.orders.c.order_id, schema.orders.c.version)
    .select_from(schema.orders.outerjoin(schema.jobs, schema.jobs.c.order_id == schema.orders.c.order_id))
    .where(
        among(schema.orders.c.order_id),
        schema.orders.c.updated_at < bindparam("before"),
        schema.jobs.c.order_id.is_(None),
    )
)
_LONG_DELETED = DELETED_ORDERS.where(schema.deleted_orders.c.deleted_at < bindparam("before"))
_HISTORIES = select(schema.events).where(among(schema.events.c.order_id))
_LOCK_ORDERS = (
    select(schema.orders.c.order_id, schema.orders.c.version)
    .where(among(schema.orders.c.order_id))
    .with_for_update()
)
_NEWEST_OF = select(func.max(schema.events.c.position)).where(among(schema.events.c.order_id))
_REMOVE_HISTORIES = delete(schema.events).where(among(schema.events.c.order_id))


class OldEvent(msgspec.Struct, frozen=True):
    """One event as it is stored: `at` in microseconds since 1970, `data` the JSON of it."""

    position: int
    order_id: str
    number: int
    at: int
    type: str
    data: msgspec.Raw


class OldHistories(msgspec.Struct, frozen=True):
    """Histories that may be moved: their events, and the version of each order (None: it is deleted).

    The next step begins `after` this position.
    """

    events: list[OldEvent]
    versions: dict[str, int | None]
    after: int


class Moved(msgspec.Struct, frozen=True):
    """How much was removed."""

    orders: int
    events: int


async def old_histories(connection: Connection, *, after: int, before: int) -> OldHistories | None:
    """Return the histories of orders at rest, or deleted, since before `before` that have events beyond `after`.

    None: there are no more events that old.
    """
    oldest = [row for row in await connection.fetch(_OLDEST_EVENTS, after=after) if row[2] < before]
    if not oldest:
        return None
    ids = list(dict.fromkeys(row[1] for row in oldest))
    rows = await connection.fetch(_AT_REST, ids=ids, before=before)
    versions: dict[str, int | None] = {row[0]: row[1] for row in rows}
    versions |= {row[0]: None for row in await connection.fetch(_LONG_DELETED, ids=ids, before=before)}
    if versions:
        # A webhook that waits, or was given up and may be asked for again, is made of its order's history.
        for order_id in await still_needed(connection, list(versions)):
            del versions[order_id]
    rows = await connection.fetch(_HISTORIES, ids=list(versions)) if versions else []
    events = [
        OldEvent(position, order_id, number, at, type, msgspec.Raw(data.encode()))
        for position, order_id, number, at, type, data in rows
    ]
    return OldHistories(sorted(events, key=lambda event: event.position), versions, oldest[-1][0])


async def remove_histories(connection: Connection, *, versions: Mapping[str, int | None]) -> Moved:
    """Remove every event of these orders, except of those that have changed since they had these versions."""
    rows = await connection.fetch(_LOCK_ORDERS, ids=list(versions))
    unchanged = [row[0] for row in rows if versions[row[0]] == row[1]]
    # An id is used once: what is deleted stays as it is.
    unchanged += [order_id for order_id, version in versions.items() if version is None]
    if not unchanged:
        return Moved(0, 0)
    newest = (await connection.fetch(_NEWEST_OF, ids=unchanged))[0][0]
    removed = await connection.run(_REMOVE_HISTORIES, ids=unchanged)
    if newest is not None:
        await note_archived(connection, newest)  # last: it locks the feed
    return Moved(len(unchanged), removed)


async def retire_caches(connection: Connection) -> None:
    """Move the feed's position on without an event: whoever compares it drops what it has cached."""
    await connection.pass_over(POSITION)
