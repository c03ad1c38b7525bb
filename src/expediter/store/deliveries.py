"""Deliveries as rows: what waits for a receiver, what was given up, and the newest of what was delivered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Select, bindparam, select

from expediter.backends.databases import Connection
from expediter.errors import OrderUnreadable
from expediter.orders.notices import Known, after, before, notice
from expediter.orders.order import MICROSECONDS
from expediter.store import schema
from expediter.store.feed import FeedEvent
from expediter.store.lookups import orders_with_lines
from expediter.store.statements import among

WAITING, DELIVERED, GIVEN_UP = "waiting", "delivered", "given_up"
STATUSES = (WAITING, DELIVERED, GIVEN_UP)

#: Deliveries of one endpoint that are kept after they succeeded: the newest.
DELIVERED_KEPT = 500
#: Given-up deliveries of one endpoint that are kept, and for how long (days).
GIVEN_UP_KEPT = 10_000
GIVEN_UP_DAYS = 30

_kept = schema.webhook_deliveries
_of_it = _kept.c.endpoint_id == bindparam("the_endpoint")
_WAITING = select(_kept).where(_of_it, _kept.c.status == WAITING).order_by(_kept.c.position)
_REPLACE = _kept.delete().where(_of_it, _kept.c.position.in_(bindparam("positions", expanding=True)))
_NTH = (
    select(_kept.c.position)
    .where(_of_it, _kept.c.status == bindparam("status"))
    .order_by(_kept.c.position.desc())
    .offset(bindparam("offset"))
    .limit(1)
)
_TRIM = _kept.delete().where(
    _of_it, _kept.c.status == bindparam("the_status"), _kept.c.position <= bindparam("until")
)
_TRIM_OLD = _kept.delete().where(
    _of_it, _kept.c.status == GIVEN_UP, _kept.c.last_tried_at < bindparam("tried_before")
)
_HISTORIES = (
    select(schema.events)
    .where(among(schema.events.c.order_id))
    .order_by(schema.events.c.order_id, schema.events.c.number)
)
_STILL_NEEDED = (
    select(_kept.c.order_id).where(among(_kept.c.order_id), _kept.c.status.in_((WAITING, GIVEN_UP))).distinct()
)


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `webhook_deliveries`, its columns in their order; times are microseconds since 1970."""

    endpoint_id: str
    position: int
    notice_id: str
    order_id: str
    number: int
    at: int
    type: str
    status: str
    tries: int = 0
    first_tried_at: int | None = None
    last_tried_at: int | None = None
    next_try_at: int | None = None
    answer_status: int | None = None
    answer: str | None = None
    error: str | None = None
    took_ms: int | None = None


class History(NamedTuple):
    """The events of an order that are in the database, by their numbers.

    `base` is the order as it is stored, where its first events are in the archive and nothing can be replayed.
    """

    events: Sequence[FeedEvent]
    base: Known | None


def told_from(history: History, delivery: Delivery) -> tuple[bytes, Known | None] | None:
    """Return what is sent of an event, and the order after it, from the order's history; None: it is not there."""
    for event in history.events:
        if (event.number, event.at) == (delivery.number, delivery.at):
            known = history.base
            if known is None:
                known = after(before(history.events, event.number), event)
            return notice(event, delivery.position, known), known
    return None


class DeliveryPage(NamedTuple):
    """Deliveries, the histories of their orders, and whether there are older ones."""

    deliveries: Sequence[Delivery]
    histories: dict[str, History]
    more: bool


_NAMES = Delivery.__struct_fields__


def read_delivery(row: Sequence[Any]) -> Delivery:
    """Return the delivery that a row holds."""
    return Delivery(**dict(zip(_NAMES, row, strict=True)))


async def waiting_deliveries(connection: Connection, endpoint_id: str) -> list[Delivery]:
    """Return what an endpoint waits for, by position."""
    return [read_delivery(row) for row in await connection.fetch(_WAITING, the_endpoint=endpoint_id)]


async def keep_deliveries(
    connection: Connection, endpoint_id: str, deliveries: Sequence[Delivery], gone: Sequence[int]
) -> None:
    """Store these, each in the place of what was kept of its event before, and forget those at `gone`."""
    positions = [*gone, *(each.position for each in deliveries)]
    await connection.run(_REPLACE, the_endpoint=endpoint_id, positions=positions)
    if deliveries:
        await connection.insert(_kept, [msgspec.structs.astuple(each) for each in deliveries])


async def trim_deliveries(connection: Connection, endpoint_id: str) -> None:
    """Remove what is kept for nobody any more."""
    for status, most in ((DELIVERED, DELIVERED_KEPT), (GIVEN_UP, GIVEN_UP_KEPT)):
        rows = await connection.fetch(_NTH, the_endpoint=endpoint_id, status=status, offset=most)
        if rows:
            await connection.run(_TRIM, the_endpoint=endpoint_id, the_status=status, until=rows[0][0])
    before = await connection.now() - GIVEN_UP_DAYS * 24 * 3600 * MICROSECONDS
    await connection.run(_TRIM_OLD, the_endpoint=endpoint_id, tried_before=before)


async def histories(connection: Connection, order_ids: Sequence[str]) -> dict[str, History]:
    """Return the histories of these orders (at least one), by order id; an order without events has none here."""
    found: dict[str, list[FeedEvent]] = {}
    for row in await connection.fetch(_HISTORIES, ids=list(order_ids)):
        found.setdefault(row[1], []).append(FeedEvent(*row))
    cut = [order_id for order_id, events in found.items() if events[0].number != 1]
    bases: dict[str, Known] = {}
    if cut:
        for order, lines in await orders_with_lines(connection, cut):
            if not isinstance(order, OrderUnreadable):
                bases[order.order_id] = Known(order, tuple(lines))
    return {order_id: History(events, bases.get(order_id)) for order_id, events in found.items()}


async def still_needed(connection: Connection, order_ids: Sequence[str]) -> set[str]:
    """Return which of these orders (at least one) have deliveries that wait or may be asked for again."""
    return {row[0] for row in await connection.fetch(_STILL_NEEDED, ids=list(order_ids))}


async def deliveries_page(
    connection: Connection,
    endpoint_id: str,
    *,
    status: str | None,
    order_id: str | None,
    before: int | None,
    limit: int,
) -> DeliveryPage:
    """Return deliveries of an endpoint whose positions are below `before`, the newest event first."""
    statement = _page((status is not None, order_id is not None, before is not None))
    rows = await connection.fetch(
        statement,
        the_endpoint=endpoint_id,
        status=status,
        the_order=order_id,
        before=before,
        limit=limit + 1,
    )
    found = [read_delivery(row) for row in rows[:limit]]
    ids = list(dict.fromkeys(each.order_id for each in found))
    return DeliveryPage(found, await histories(connection, ids) if ids else {}, len(rows) > limit)


#: One compiled statement for each combination of filters (at most 2**3).
_pages: dict[tuple[bool, bool, bool], Select[Any]] = {}


def _page(shape: tuple[bool, bool, bool]) -> Select[Any]:
    if shape not in _pages:
        conditions: list[ColumnElement[bool]] = [
            _kept.c.status == bindparam("status"),
            _kept.c.order_id == bindparam("the_order"),
            _kept.c.position < bindparam("before"),
        ]
        wanted = [condition for asked, condition in zip(shape, conditions, strict=True) if asked]
        _pages[shape] = (
            select(_kept).where(_of_it, *wanted).order_by(_kept.c.position.desc()).limit(bindparam("limit"))
        )
    return _pages[shape]
