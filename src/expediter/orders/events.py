"""The history of an order: numbered facts, whose replay is the order's row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from expediter.orders.order import Line, Order, PaymentStatus, Status


class EventWord(NamedTuple):
    """What a type of event says, and the fields that its data may have (orders/documents.py, EventData)."""

    meaning: str
    data: tuple[str, ...]


#: What may happen to an order, in the words of its history.
EVENTS: Mapping[str, EventWord] = {
    "order.placed": EventWord("It was taken in; `order` is the whole of it.", ("order",)),
    "payment.requested": EventWord(
        "Somebody asked for another try to charge.",
        ("status", "payment_status", "processing_started_at", "last_error"),
    ),
    "payment.started": EventWord(
        "The gateway is about to be asked to charge; `attempt` counts the calls.",
        ("status", "attempt", "processing_started_at"),
    ),
    "payment.action_required": EventWord(
        "The customer must confirm the payment; the order says how, in `payment_action`.",
        ("payment_status", "last_error"),
    ),
    "payment.authorized": EventWord(
        "The money is reserved; it is captured when the order is completed.",
        ("status", "payment_status", "completed_at", "last_error"),
    ),
    "payment.succeeded": EventWord(
        "It is paid; `captured_minor` is there where it goes back at once.",
        (
            "status",
            "payment_status",
            "authorized_minor",
            "captured_minor",
            "refunding_minor",
            "refund",
            "completed_at",
            "last_error",
        ),
    ),
    "payment.expired": EventWord(
        "What was reserved is gone at the gateway; a retry charges it anew.", ("payment_status", "last_error")
    ),
    "payment.voided": EventWord("What was reserved is let go of.", ("payment_status", "last_error")),
    "payment.disputed": EventWord("The customer disputes the payment.", ("last_error", "reference")),
    "payment.contradicted": EventWord(
        "The gateway says something that cannot be: look it up there.", ("last_error", "reference")
    ),
    "capture.started": EventWord(
        "The gateway is about to be asked to capture; `attempt` counts the calls.", ("attempt",)
    ),
    "capture.unavailable": EventWord("The capture is not made yet; it is tried again.", ("last_error",)),
    "void.started": EventWord(
        "The gateway is about to be asked to void; `attempt` counts the calls.", ("attempt",)
    ),
    "void.unavailable": EventWord("The void is not made yet; it is tried again.", ("last_error",)),
    "payment.failed": EventWord(
        "The charge was declined, or the last try was in vain.", ("status", "payment_status", "last_error")
    ),
    "payment.unknown": EventWord(
        "The gateway did not say what became of the charge; it is looked up.", ("payment_status", "last_error")
    ),
    "payment.unavailable": EventWord(
        "The gateway did not take the charge; it is tried again.", ("payment_status", "last_error")
    ),
    "payment.postponed": EventWord("The call was not made after all; it is made later.", ()),
    "payment.skipped": EventWord("There is nothing to pay.", ("status", "processing_started_at")),
    "payment.waived": EventWord(
        "Somebody said that it is paid, or need not be.",
        ("status", "payment_status", "completed_at", "last_error"),
    ),
    "order.confirmed": EventWord("Its road ends with the payment, and it is there.", ("status", "completed_at")),
    "fulfilment.started": EventWord("It is being carried out.", ("status", "processing_started_at", "last_error")),
    "fulfilment.taken": EventWord("Whoever carries it out has it, and will report.", ("last_error",)),
    "fulfilment.overdue": EventWord("The report is late: FULFILMENT_SECONDS_MAX have passed.", ("last_error",)),
    "fulfilment.unavailable": EventWord("Nobody could carry it out now; it is tried again.", ("last_error",)),
    "fulfilment.failed": EventWord("It cannot be carried out.", ("status", "last_error", "reference")),
    "order.completed": EventWord("It is done.", ("status", "completed_at", "last_error", "reference")),
    "order.cancelled": EventWord(
        "It was cancelled; what was charged goes back.",
        ("status", "payment_status", "refunding_minor", "refund", "completed_at", "cancelled_at", "last_error"),
    ),
    "refund.started": EventWord(
        "The gateway is about to be asked to refund; `attempt` counts the calls.", ("attempt", "refund")
    ),
    "refund.requested": EventWord(
        "Somebody asked for a part or all of it back; `refund` is the number of the refund.",
        ("refund", "refunding_minor"),
    ),
    "refund.succeeded": EventWord(
        "The money is back.",
        ("refund", "payment_status", "refunded_minor", "refunding_minor", "last_error", "reference"),
    ),
    "refund.unavailable": EventWord("The refund is not made yet; it is tried again.", ("refund", "last_error")),
    "job.failed": EventWord("A worker failed at it in a way that nobody foresaw.", ("last_error",)),
    "job.parked": EventWord(
        "It is set aside until somebody looks at it; `last_error` says why.",
        ("payment_status", "refund", "last_error"),
    ),
    "job.revived": EventWord("Somebody has taken it up again.", ("last_error",)),
    "command.refused": EventWord(
        "A change that had been accepted into the queue was refused when it was applied.", ("last_error",)
    ),
    "order.deleted": EventWord("It was deleted; its id is never used again.", ()),
}
EVENT_TYPES = tuple(EVENTS)


def types_named(word: str) -> list[str]:
    """Return the types of events that a word names: `order.placed`, `order.*`, or `*` for all; none for others."""
    if word == "*":
        return list(EVENT_TYPES)
    stem = word.removesuffix("*")
    return [each for each in EVENT_TYPES if each == word or (word.endswith(".*") and each.startswith(stem))]


class Placed(msgspec.Struct, frozen=True, gc=False):
    """The data of `order.placed`: the whole order but for its payment token, and its lines."""

    order: Order
    lines: tuple[Line, ...]


class Changes(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """The data of every later event: the fields of the order that it changed.

    The amounts are there where they are not what the payment status says by itself (`evolve`).
    """

    status: Status | UnsetType = UNSET
    payment_status: PaymentStatus | UnsetType = UNSET
    charging: bool | UnsetType = UNSET
    generation: int | UnsetType = UNSET
    attempts: int | UnsetType = UNSET
    charge_started_at: int | None | UnsetType = UNSET
    authorized_minor: int | UnsetType = UNSET
    captured_minor: int | UnsetType = UNSET
    refunded_minor: int | UnsetType = UNSET
    refunding_minor: int | UnsetType = UNSET
    refunds: int | UnsetType = UNSET
    payment_action: str | None | UnsetType = UNSET
    action_expires_at: int | None | UnsetType = UNSET
    processing_started_at: int | None | UnsetType = UNSET
    completed_at: int | None | UnsetType = UNSET
    cancelled_at: int | None | UnsetType = UNSET
    last_error: str | None | UnsetType = UNSET
    #: No fields of the order: the name that the other side has for what it did, and the refund that it is about.
    reference: str | UnsetType = UNSET
    refund: int | UnsetType = UNSET


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

    It has no payment token, and no secret of an action: whoever reads a history, or the archive, must not find
    what can be charged (`without_secrets`).
    """
    order: Order | None = None
    for event in events:
        if isinstance(event.data, Placed):
            order = without_secrets(event.data.order)
        elif event.type == "order.deleted":
            order = None
        elif order is not None:
            order = evolve(order, event.number, event.at, event.data)
    return order


#: The fields of an order that events change.
CHANGEABLE = tuple(name for name in Changes.__struct_fields__ if name not in ("reference", "refund"))


def evolve(order: Order, number: int, at: int, data: Changes) -> Order:
    """Return `order` after the event `number` that happened `at` and changed `data`."""
    changed = {name: value for name in CHANGEABLE if (value := getattr(data, name)) is not UNSET}
    if data.payment_status is not UNSET:
        changed = _implied(order, data.payment_status) | changed
    return replace(order, version=number, updated_at=at, **changed)


def _implied(order: Order, paid: PaymentStatus) -> dict[str, Any]:
    """Return the amounts that a payment status implies: most payments are of the whole, and given back whole."""
    if paid is PaymentStatus.PAID:
        return {"authorized_minor": order.total_minor, "captured_minor": order.total_minor}
    if paid is PaymentStatus.AUTHORIZED:
        return {"authorized_minor": order.total_minor}
    if paid is PaymentStatus.REFUND_PENDING and paid is not order.payment_status:
        return {"refunding_minor": order.captured_minor - order.refunded_minor, "refunds": order.refunds + 1}
    if paid is PaymentStatus.REFUNDED:
        return {"refunded_minor": order.captured_minor, "refunding_minor": 0}
    return {}


def told_action(action: str | None) -> str | None:
    """Return what the customer must do as the history has it: without a secret."""
    if action is None:
        return None
    told = {name: value for name, value in msgspec.json.decode(action).items() if name != "client_secret"}
    return msgspec.json.encode(told).decode()


def without_secrets(order: Order) -> Order:
    """Return the order as its history has it."""
    if order.payment_token is None and order.payment_action is None:
        return order
    return replace(order, payment_token=None, payment_action=told_action(order.payment_action))
