"""Reading everything that is stored, a part at a time, to hold it against the laws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
from sqlalchemy import Select, and_, bindparam, func, not_, select

from expediter.backends.databases import Connection, Row
from expediter.errors import OrderUnreadable
from expediter.orders.events import Event, event_data
from expediter.orders.laws import Dossier
from expediter.orders.order import Attempt, Order, OrderRefund, is_order_id
from expediter.store import schema
from expediter.store.rows import (
    count_job,
    count_order,
    lines_by_order,
    read_attempt,
    read_order_and_job,
    read_orders,
    read_refund,
)
from expediter.store.statements import DELETED_ORDERS, LINES, ORDERS_AND_JOBS, POSITION, REFUNDS, among

#: Orders, keys or rows of another table that are read at once.
ROWS_PER_LOOK = 500
#: Orphans of one kind that are named.
ORPHANS_MAX = 100

_ORDERS = (
    ORDERS_AND_JOBS.where(schema.orders.c.order_id > bindparam("after"))
    .order_by(schema.orders.c.order_id)
    .limit(ROWS_PER_LOOK)
)
_EVENTS = select(schema.events).where(among(schema.events.c.order_id))
_ATTEMPTS = (
    select(schema.payment_attempts)
    .where(among(schema.payment_attempts.c.order_id))
    .order_by(schema.payment_attempts.c.order_id, schema.payment_attempts.c.number)
)
_CHARGED = (
    select(schema.payment_attempts.c.order_id)
    .where(
        schema.payment_attempts.c.order_id > bindparam("after"),
        schema.payment_attempts.c.action == "charge",
        schema.payment_attempts.c.started_at >= bindparam("since"),
        schema.payment_attempts.c.started_at < bindparam("until"),
    )
    .distinct()
    .order_by(schema.payment_attempts.c.order_id)
    .limit(ROWS_PER_LOOK)
)
_ORDERS_OF = select(schema.orders).where(among(schema.orders.c.order_id))
_KEYS = (
    select(
        schema.idempotency_keys.c.idempotency_key,
        schema.idempotency_keys.c.headers,
        schema.idempotency_keys.c.body,
    )
    .where(schema.idempotency_keys.c.idempotency_key > bindparam("after"))
    .order_by(schema.idempotency_keys.c.idempotency_key)
    .limit(ROWS_PER_LOOK)
)
_DELETED = (
    select(schema.deleted_orders.c.order_id)
    .where(schema.deleted_orders.c.order_id > bindparam("after"))
    .order_by(schema.deleted_orders.c.order_id)
    .limit(ROWS_PER_LOOK)
)
_ORDERS_THERE = select(schema.orders.c.order_id).where(among(schema.orders.c.order_id))
_COUNTERS = select(schema.counters.c.name, func.sum(schema.counters.c.value)).group_by(schema.counters.c.name)
_NEWEST = select(func.max(schema.events.c.position))


class Read(msgspec.Struct, frozen=True):
    """One part of the orders: what is stored of each, what cannot be read, and where the next part begins."""

    dossiers: list[Dossier]
    unreadable: dict[str, str]
    positions: dict[str, list[int]]
    after: str | None


async def orders(connection: Connection, after: str, total: dict[str, int]) -> Read:
    """Return the orders whose ids come `after`; what they add to the counters is added to `total`."""
    rows = await connection.fetch(_ORDERS, after=after)
    if not rows:
        return Read([], {}, {}, None)
    ids = [row[0] for row in rows]
    lines = lines_by_order(await connection.fetch(LINES, ids=ids), ids)
    events = _grouped(await connection.fetch(_EVENTS, ids=ids), 1)
    attempts = _grouped(await connection.fetch(_ATTEMPTS, ids=ids), 0)
    refunds = _grouped(await connection.fetch(REFUNDS, ids=ids), 0)
    dossiers, unreadable, positions = [], {}, {}
    for row in rows:
        order_id = row[0]
        history = sorted(events[order_id], key=lambda event: int(event[2]))
        positions[order_id] = [event[0] for event in history]
        try:
            order, job = read_order_and_job(row)
            dossiers.append(
                Dossier(
                    order,
                    job,
                    lines[order_id],
                    [_event(event) for event in history],
                    [read_attempt(attempt) for attempt in attempts[order_id]],
                    [read_refund(refund) for refund in refunds[order_id]],
                )
            )
        except (OrderUnreadable, ValueError) as error:  # msgspec's errors are of the last kind
            unreadable[order_id] = str(error)
            continue
        count_order(total, order, 1)
        if job is not None:
            count_job(total, job, 1)
    return Read(dossiers, unreadable, positions, ids[-1])


def _grouped(rows: list[Row], column: int) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row[column]].append(row)
    return found


def _event(row: Row) -> Event:
    _, order_id, number, at, type, data = row
    return Event(order_id, number, at, type, event_data(type, data))


async def counters(connection: Connection) -> dict[str, int]:
    """Return every counter that is not 0, summed over its slots."""
    return {name: int(value) for name, value in await connection.fetch(_COUNTERS) if value}


async def feed(connection: Connection) -> tuple[int, int]:
    """Return the position that the feed is at, and that of the newest event (0: there is none)."""
    (newest,) = (await connection.fetch(_NEWEST))[0]
    return await connection.newest(POSITION), int(newest or 0)


async def kept_answers(
    connection: Connection, after: str, *, gone_too: bool = False
) -> tuple[dict[str, str], str | None]:
    """Return keys beyond `after` whose answers name an order that never was, with its id, and where to go on.

    With `gone_too` also those that name a deleted order.
    """
    rows = await connection.fetch(_KEYS, after=after)
    if not rows:
        return {}, None
    named = {key: order_id for key, headers, body in rows if (order_id := _named(headers, body))}
    ids = list(dict.fromkeys(named.values()))
    there = {row[0] for row in await connection.fetch(_ORDERS_THERE, ids=ids)} if ids else set()
    if ids and not gone_too:
        there |= {row[0] for row in await connection.fetch(DELETED_ORDERS, ids=ids)}
    return {key: order_id for key, order_id in named.items() if order_id not in there}, rows[-1][0]


def _named(headers: str, body: str) -> str | None:
    """Return the order that an answer is about, as far as it says."""
    location = msgspec.json.decode(headers, type=dict[str, str]).get("location")
    if location:
        return location.rpartition("/")[2]
    if is_order_id(body):
        return body  # so it is kept for a made-up order
    try:
        document = msgspec.json.decode(body) if body.startswith("{") else {}
    except msgspec.DecodeError:
        return None
    order_id = document.get("order_id") if isinstance(document, dict) else None
    return order_id if isinstance(order_id, str) else None


def _orphans(table: str, *, deleted_too: bool) -> Select[tuple[str]]:
    column = schema.metadata.tables[table].c.order_id
    gone = not_(select(schema.orders.c.order_id).where(schema.orders.c.order_id == column).exists())
    if deleted_too:
        deleted = schema.deleted_orders.c.order_id
        gone = and_(gone, not_(select(deleted).where(deleted == column).exists()))
    return select(column).where(gone).distinct().limit(ORPHANS_MAX)


_ORPHANS = {
    "jobs": _orphans("jobs", deleted_too=False),
    "order_lines": _orphans("order_lines", deleted_too=False),
    "payment_attempts": _orphans("payment_attempts", deleted_too=True),
    "refunds": _orphans("refunds", deleted_too=True),
    "events": _orphans("events", deleted_too=True),
}


async def charged_between(
    connection: Connection, *, after: str, since: int, until: int
) -> tuple[list[str], str | None]:
    """Return orders beyond `after` for which a charge was asked for in [since, until), and where to go on."""
    rows = await connection.fetch(_CHARGED, after=after, since=since, until=until)
    ids = [row[0] for row in rows]
    return ids, ids[-1] if len(ids) == ROWS_PER_LOOK else None


async def orders_and_refunds(
    connection: Connection, *, ids: Sequence[str]
) -> dict[str, tuple[Order, list[OrderRefund]]]:
    """Return those of these orders that are there and can be read, each with its refunds."""
    refunds = _grouped(await connection.fetch(REFUNDS, ids=list(ids)), 0)
    found = {}
    for order in read_orders(await connection.fetch(_ORDERS_OF, ids=list(ids))):
        if not isinstance(order, OrderUnreadable):
            found[order.order_id] = order, [read_refund(row) for row in refunds[order.order_id]]
    return found


async def calls_of_deleted(connection: Connection, *, order_id: str) -> list[Attempt]:
    """Return the calls to the gateway about an order that was deleted; none if it was not."""
    if not await connection.fetch(DELETED_ORDERS, ids=[order_id]):
        return []
    return [read_attempt(row) for row in await connection.fetch(_ATTEMPTS, ids=[order_id])]


async def deleted(connection: Connection, after: str) -> list[str]:
    """Return ids of deleted orders that come `after`, in order, up to ROWS_PER_LOOK."""
    return [row[0] for row in await connection.fetch(_DELETED, after=after)]


async def orphans(connection: Connection) -> dict[str, list[str]]:
    """Return, by table, ids of orders that it has rows of and that are not there; up to ORPHANS_MAX of each."""
    found = {}
    for table, statement in _ORPHANS.items():
        if rows := await connection.fetch(statement):
            found[table] = [row[0] for row in rows]
    return found
