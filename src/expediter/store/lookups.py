"""Reading the store: one order, a page, the counters, the history. Nothing here scans a table."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Select, and_, bindparam, func, or_, select
from sqlalchemy.sql import Executable

from expediter.backends.databases import Connection
from expediter.errors import DuplicateOrder, OrderUnreadable
from expediter.orders.events import Event
from expediter.orders.order import NEVER, Attempt, Job, Line, Order, OrderRefund, Status
from expediter.orders.resilience import Breaker
from expediter.store import schema
from expediter.store.breaker import SharedBreaker
from expediter.store.rows import lines_by_order, read_attempt, read_order_and_job, read_orders, read_refund
from expediter.store.statements import DELETED_ORDERS, LINES, ORDERS_AND_JOBS, REFUNDS, among
from expediter.store.submissions import PageQuery


class HistoryRow(NamedTuple):
    """One event of an order; `data` is JSON text."""

    number: int
    at: int
    type: str
    data: str


#: A stored order with its job and its lines.
Whole = tuple[Order, Job | None, tuple[Line, ...]]

_ORDERS = select(schema.orders).where(among(schema.orders.c.order_id))
_ORDER_AND_JOB = ORDERS_AND_JOBS.where(schema.orders.c.order_id == bindparam("order_id"))
_VERSION = select(schema.orders.c.version).where(schema.orders.c.order_id == bindparam("order_id"))
_HISTORY = (
    select(schema.events.c.number, schema.events.c.at, schema.events.c.type, schema.events.c.data)
    .where(schema.events.c.order_id == bindparam("order_id"))
    .order_by(schema.events.c.number)
)
_ATTEMPTS = (
    select(schema.payment_attempts)
    .where(schema.payment_attempts.c.order_id == bindparam("order_id"))
    .order_by(schema.payment_attempts.c.number)
)
_ATTEMPTS_OF_ALL = select(schema.payment_attempts).where(among(schema.payment_attempts.c.order_id))
_COUNTERS = select(schema.counters.c.name, func.sum(schema.counters.c.value)).group_by(schema.counters.c.name)
_IDS = (
    select(schema.orders.c.order_id)
    .where(schema.orders.c.status == bindparam("status"))
    .order_by(schema.orders.c.created_at.desc(), schema.orders.c.order_id.desc())
    .limit(bindparam("limit"))
)
_LOCK_FEED = select(schema.feed.c.feed_id).with_for_update()
_EVENT_AT = select(schema.events.c.at, schema.events.c.type).where(
    schema.events.c.order_id == bindparam("order_id"), schema.events.c.number == bindparam("number")
)
#: Orders that are counted by a filter that no counter knows, at most.
COUNTED_MAX = 1_000

_number = attrgetter("number")
_BY_ID = (schema.orders.c.created_at.desc(), schema.orders.c.order_id.desc())


async def orders_with_lines(
    connection: Connection, ids: list[str]
) -> list[tuple[Order | OrderUnreadable, list[Line]]]:
    """Return those of these orders (at least one id) that there are, each with its lines."""
    orders = read_orders(await connection.fetch(_ORDERS, ids=ids))
    if not orders:
        return []
    lines = await lines_of(connection, [order.order_id for order in orders])
    return [(order, lines[order.order_id]) for order in orders]


async def version(connection: Connection, order_id: str) -> int | None:
    """Return the version of an order, None where there is none."""
    rows = await connection.fetch(_VERSION, order_id=order_id)
    return int(rows[0][0]) if rows else None


async def order_and_job(
    connection: Connection, order_id: str
) -> tuple[Order, Job | None, tuple[Attempt, ...], int] | None:
    """Return an order, its job, its payment attempts, and the database's time."""
    rows = await connection.fetch(_ORDER_AND_JOB, order_id=order_id)
    if not rows:
        return None
    order, job = read_order_and_job(rows[0])
    attempts = await attempts_of(connection, order_id)
    return order, job, attempts, await connection.now()


async def order_and_refunds(connection: Connection, order_id: str) -> tuple[Order, list[OrderRefund]] | None:
    """Return an order and its refunds, by their numbers."""
    rows = await connection.fetch(_ORDER_AND_JOB, order_id=order_id)
    if not rows:
        return None
    order, _ = read_order_and_job(rows[0])
    return order, [read_refund(row) for row in await connection.fetch(REFUNDS, ids=[order_id])]


async def order_job_and_lines(connection: Connection, order_id: str, *, placing: bool = False) -> Whole | None:
    """Return an order, its job and its lines; None where there is none.

    Raises DuplicateOrder where `placing` and the id belongs to a deleted order.
    """
    rows = await connection.fetch(_ORDER_AND_JOB, order_id=order_id)
    if not rows:
        if placing and await connection.fetch(DELETED_ORDERS, ids=[order_id]):
            raise DuplicateOrder(order_id, deleted=True)
        return None
    lines = await lines_of(connection, [order_id])
    return *read_order_and_job(rows[0]), tuple(lines[order_id])


async def is_deleted(connection: Connection, order_id: str) -> bool:
    """Return whether an order was deleted, or its id is taken by one that was removed."""
    return bool(await connection.fetch(DELETED_ORDERS, ids=[order_id]))


async def was_committed(connection: Connection, event: Event | None) -> bool:
    """Return whether a batch whose commit was never answered is in the database, by its last event.

    Where a lock on the feed's row orders the commits, waits until its transaction has ended one way or the other;
    elsewhere it has (see Database.rule_out).
    """
    await connection.fetch(_LOCK_FEED)
    if event is None:
        return False
    rows = await connection.fetch(_EVENT_AT, order_id=event.order_id, number=event.number)
    return [tuple(row) for row in rows] == [(event.at, event.type)]


async def attempts_of(connection: Connection, order_id: str) -> tuple[Attempt, ...]:
    """Return every call to the gateway about an order, oldest first."""
    rows = await connection.fetch(_ATTEMPTS, order_id=order_id)
    return tuple(read_attempt(row) for row in rows)


async def attempts_of_all(connection: Connection, ids: list[str]) -> dict[str, list[Attempt]]:
    """Return every call to the gateway about these orders (at least one id), oldest first, by order id."""
    found: dict[str, list[Attempt]] = {}
    for attempt in map(read_attempt, await connection.fetch(_ATTEMPTS_OF_ALL, ids=ids)):
        found.setdefault(attempt.order_id, []).append(attempt)
    for attempts in found.values():
        attempts.sort(key=_number)
    return found


async def history(connection: Connection, order_id: str) -> list[HistoryRow] | None:
    """Return the events of an order by number; None where there is no such order."""
    if await version(connection, order_id) is None:
        return None
    rows = await connection.fetch(_HISTORY, order_id=order_id)
    return [HistoryRow(*row) for row in rows]


async def page(connection: Connection, query: PageQuery) -> list[Order | OrderUnreadable]:
    """Return up to `query.limit` orders, newest first; one that cannot be read is an error in its place."""
    statement = _page_statement(query)
    values = msgspec.structs.asdict(query)
    if query.after is not None:
        # SQLite searches by one upper bound only, and may take the wrong one of two: it gets the tighter.
        before = NEVER if query.created_before is None else query.created_before
        newest_at = min(query.after[0], before - 1)
        values |= {"after_at": query.after[0], "after_id": query.after[1], "newest_at": newest_at}
    values["status"] = query.status.value if query.status else None
    return read_orders(await connection.fetch(statement, **values))


async def lines_of(connection: Connection, ids: list[str]) -> dict[str, list[Line]]:
    """Return the lines of these orders (at least one), by order id."""
    return lines_by_order(await connection.fetch(LINES, ids=ids), ids)


#: One compiled statement for each combination of filters that was asked for (at most 2**5).
_pages: dict[tuple[bool, ...], Select[tuple[object, ...]]] = {}


def _page_statement(query: PageQuery) -> Select[tuple[object, ...]]:
    shape = _shape(query)
    if shape not in _pages:
        statement = select(schema.orders).where(*_conditions(shape))
        _pages[shape] = statement.order_by(*_BY_ID).limit(bindparam("limit")).offset(bindparam("offset"))
    return _pages[shape]


def _shape(query: PageQuery) -> tuple[bool, ...]:
    filters = (query.customer_id, query.status, query.created_after, query.created_before, query.after)
    return tuple(value is not None for value in filters)


def _conditions(shape: tuple[bool, ...]) -> list[ColumnElement[bool]]:
    table = schema.orders.c
    conditions: list[tuple[bool, ColumnElement[bool]]] = [
        (shape[0], table.customer_id == bindparam("customer_id")),
        # A customer has few orders, a status may have nearly all. Without statistics SQLite cannot know:
        # inside a function the status leads to no index, so that the customer's is taken.
        (shape[1], (func.lower(table.status) if shape[0] else table.status) == bindparam("status")),
        (shape[2], table.created_at > bindparam("created_after")),
        (shape[3] and not shape[4], table.created_at < bindparam("created_before")),
        (
            shape[4],
            or_(
                table.created_at < bindparam("after_at"),
                and_(table.created_at == bindparam("after_at"), table.order_id < bindparam("after_id")),
            ),
        ),
        # Alone, the line above does not bound the index search: this does, and it is `created_before`, too.
        (shape[4], table.created_at <= bindparam("newest_at")),
    ]
    return [condition for wanted, condition in conditions if wanted]


#: The statements that count, by the filters.
_counts: dict[tuple[bool, ...], Executable] = {}


async def count(connection: Connection, query: PageQuery, most: int = COUNTED_MAX) -> int | None:
    """Return how many orders the filters of a page let through in all; None: more than `most`."""
    shape = _shape(msgspec.structs.replace(query, after=None))
    if shape not in _counts:
        # In the order of the pages, so that the same index leads to them.
        some = select(schema.orders.c.order_id).where(*_conditions(shape)).order_by(*_BY_ID)
        _counts[shape] = select(func.count()).select_from(some.limit(bindparam("limit")).subquery())
    values = msgspec.structs.asdict(query)
    values["status"] = query.status.value if query.status else None
    rows = await connection.fetch(_counts[shape], **values | {"limit": most + 1})
    found = int(rows[0][0])
    return found if found <= most else None


async def counters(connection: Connection) -> dict[str, int]:
    """Return every counter, summed over its slots: a bounded number of rows, however many orders there are."""
    return {name: int(value) for name, value in await connection.fetch(_COUNTERS)}


async def ids_by_status(connection: Connection, statuses: Sequence[Status], limit: int) -> dict[Status, list[str]]:
    """Return up to `limit` ids of the newest orders in each status."""
    found = {}
    for status in statuses:
        rows = await connection.fetch(_IDS, status=status.value, limit=limit)
        found[status] = [row[0] for row in rows]
    return found


async def breaker(connection: Connection) -> Breaker:
    """Return the payment gateway's breaker."""
    return await SharedBreaker(connection).read()
