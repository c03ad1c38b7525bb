"""What others are told of an event: the order as it was after it, and what it changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from expediter.orders.documents import EventData, event_document, order_document
from expediter.orders.events import Placed, event_data, evolve
from expediter.orders.order import Line, Order


class Told(Protocol):
    """An event as it is stored; `data` is JSON text, `at` microseconds since 1970."""

    @property
    def order_id(self) -> str:
        """Which order it is about."""

    @property
    def number(self) -> int:
        """It counts the events of the order, from 1."""

    @property
    def at(self) -> int:
        """When it happened."""

    @property
    def type(self) -> str:
        """What happened, in a word."""

    @property
    def data(self) -> str:
        """What it changed."""


class Known(NamedTuple):
    """An order and its lines as they were after some event; its version is that event's number."""

    order: Order
    lines: tuple[Line, ...]


class NoticeData(msgspec.Struct, frozen=True, gc=False):
    """What happened to which order. `order` is null once it is deleted, as no GET shows it any more."""

    order_id: str
    number: int
    position: int
    order: msgspec.Raw | None
    change: EventData


class Notice(msgspec.Struct, frozen=True, gc=False):
    """What a webhook sends of one event."""

    type: str
    timestamp: str
    data: NoticeData


_encode = msgspec.json.Encoder().encode


def after(known: Known | None, event: Told) -> Known | None:
    """Return the order after an event, from the order before it. Raises msgspec.DecodeError, a ValueError."""
    data = event_data(event.type, event.data)
    if isinstance(data, Placed):
        return Known(replace(data.order, payment_token=None), data.lines)
    if known is None or event.type == "order.deleted":
        return None
    return Known(evolve(known.order, event.number, event.at, data), known.lines)


def before(history: Iterable[Told], number: int) -> Known | None:
    """Return the order as it was before the event of this number, from its events by their numbers."""
    known: Known | None = None
    for event in history:
        if event.number >= number:
            break
        known = after(known, event)
    return known


def notice(event: Told, position: int, known: Known | None) -> bytes:
    """Return what is sent of an event, as JSON; `known` is the order after it."""
    shown = event_document(event.number, event.at, event.type, event.data)
    order = None if known is None else msgspec.Raw(order_document(known.order, known.lines))
    return _encode(
        Notice(event.type, shown.at, NoticeData(event.order_id, event.number, position, order, shown.data))
    )


def notice_id(event: Told) -> str:
    """Return the name of an event: the same whenever it is sent, and another's after a backup came back."""
    what = f"{event.order_id}\n{event.number}\n{event.at}\n{event.type}"
    return "evt_" + hashlib.sha256(what.encode()).hexdigest()[:32]
