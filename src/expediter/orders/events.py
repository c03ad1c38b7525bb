"""The history of an order: numbered facts, whose replay is the order's row."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from expediter.orders.order import Line, Order, PaymentStatus, Status

#: What may happen to an order, in the words of its history.
EVENT_TYPES = (
    "order.placed",
    "payment.requested",
    "payment.started",
    "payment.succeeded",
    "payment.failed",
    "payment.unknown",
    "payment.unavailable",
    "payment.postponed",
    "payment.skipped",
    "payment.waived",
    "order.confirmed",
    "fulfilment.started",
    "fulfilment.unavailable",
    "fulfilment.failed",
    "order.completed",
    "order.cancelled",
    "refund.started",
    "refund.succeeded",
    "refund.unavailable",
    "job.failed",
    "job.parked",
    "job.revived",
    "command.refused",
    "order.deleted",
)


class Placed(msgspec.Struct, frozen=True, gc=False):
    """The data of `order.placed`: the whole order but for its payment token, and its lines."""

    order: Order
    lines: tuple[Line, ...]


class Changes(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """The data of every later event: the fields of the order that it changed."""

    status: Status | UnsetType = UNSET
    payment_status: PaymentStatus | UnsetType = UNSET
    charging: bool | UnsetType = UNSET
    generation: int | UnsetType = UNSET
    attempts: int | UnsetType = UNSET
    charge_started_at: int | None | UnsetType = UNSET
    processing_started_at: int | None | UnsetType = UNSET
    completed_at: int | None | UnsetType = UNSET
    cancelled_at: int | None | UnsetType = UNSET
    last_error: str | None | UnsetType = UNSET


class Event(msgspec.Struct, frozen=True, gc=False):
    """One fact in the history of one order; `number` counts from 1 without gaps."""

    order_id: str
    number: int
    at: int
    type: str
    data: Placed | Changes


_placed = msgspec.json.Decoder(Placed)
_changes = msgspec.json.Decoder(Changes)


def event_data(type: str, text: str) -> Placed | Changes:
    """Return the data of a stored event from its JSON text. Raises msgspec.DecodeError, a ValueError."""
    return _placed.decode(text) if type == "order.placed" else _changes.decode(text)


def replay(events: Iterable[Event]) -> Order | None:
    """Return the order that these events (all of one order, by number) add up to; None once it is deleted.

    It has no payment token: whoever reads a history, or the archive, must not find what can be charged.
    """
    order: Order | None = None
    for event in events:
        if isinstance(event.data, Placed):
            order = replace(event.data.order, payment_token=None)
        elif event.type == "order.deleted":
            order = None
        elif order is not None:
            order = evolve(order, event.number, event.at, event.data)
    return order


_CHANGEABLE = Changes.__struct_fields__


def evolve(order: Order, number: int, at: int, data: Changes) -> Order:
    """Return `order` after the event `number` that happened `at` and changed `data`."""
    changed = {name: value for name in _CHANGEABLE if (value := getattr(data, name)) is not UNSET}
    return replace(order, version=number, updated_at=at, **changed)
