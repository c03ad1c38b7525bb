"""An order as the JSON document that clients read: one form for every path."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache

import msgspec
from msgspec import UNSET, UnsetType

from expediter.orders.events import Placed, event_data
from expediter.orders.money import format_minor
from expediter.orders.order import MICROSECONDS, Line, Order, OrderRefund

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class LineDocument(msgspec.Struct, frozen=True, gc=False):
    """One line; `price` is a number with the currency's digits, null where the line has none."""

    line: int
    item_id: int | str | None
    name: str | None
    item_name: str | None
    quantity: int
    price: msgspec.Raw | None
    price_minor: int | None


class ActionDocument(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What the customer must do before it is paid: open `url`, or confirm it in the page with `client_secret`."""

    type: str
    expires_at: str
    url: str | UnsetType = UNSET
    client_secret: str | UnsetType = UNSET


class OrderDocument(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One order. Times are RFC 3339 in UTC and durations seconds; both are null until they happen."""

    order_id: str
    status: str
    payment_status: str
    customer_id: int | str | None
    user_id: int | str | None
    customer_name: str | None
    currency: str
    total_amount: msgspec.Raw
    total_minor: int
    items: list[LineDocument]
    item_ids: str
    metadata: msgspec.Raw
    version: int
    created_at: str
    updated_at: str
    processing_started_at: str | None
    completed_at: str | None
    cancelled_at: str | None
    pending_duration: float | None
    processing_duration: float | None
    total_duration: float | None
    last_error: str | None
    authorized_minor: int
    captured_minor: int
    refunded_minor: int
    payment_action: ActionDocument | None


_encode = msgspec.json.Encoder().encode


def timestamp(at: int | None) -> str | None:
    """Return microseconds since 1970 as RFC 3339 in UTC: 2026-11-21T02:49:50.000123Z."""
    if at is None:
        return None
    second, microsecond = divmod(at, MICROSECONDS)
    return f"{_to_the_second(second)}.{microsecond:06}Z"


def microseconds(text: str) -> int:
    """Return a date or time as microseconds since 1970; without a zone it is in UTC. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text.replace(" ", "+"))
        since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    except (ValueError, OverflowError) as error:
        raise ValueError("must be a date or time such as 2026-11-21 or 2026-11-21T09:30:00Z") from error
    return (since.days * 86_400 + since.seconds) * MICROSECONDS + since.microseconds


@lru_cache(maxsize=4096)
def _to_the_second(second: int) -> str:
    # Most times that are shown lie within the last moments.
    return (_EPOCH + timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%S")


def seconds(start: int | None, end: int | None) -> float | None:
    """Return the seconds between two times in microseconds, or None if either has not happened."""
    return None if start is None or end is None else (end - start) / MICROSECONDS


def order_document(order: Order, lines: Sequence[Line]) -> bytes:
    """Return the order as JSON text in UTF-8."""
    currency = order.currency
    created = timestamp(order.created_at) or ""
    end = order.completed_at
    return _encode(
        OrderDocument(
            order_id=order.order_id,
            status=order.status._value_,
            payment_status=order.payment_status._value_,
            customer_id=order.customer_id,
            user_id=order.customer_id,
            customer_name=order.customer_name,
            currency=currency,
            total_amount=msgspec.Raw(format_minor(order.total_minor, currency).encode()),
            total_minor=order.total_minor,
            items=[_line(line, currency) for line in lines],
            item_ids=",".join([str(line.item_id) for line in lines if line.item_id is not None]),
            metadata=msgspec.Raw(order.metadata.encode()),
            version=order.version,
            created_at=created,
            updated_at=created if order.updated_at == order.created_at else timestamp(order.updated_at) or "",
            processing_started_at=timestamp(order.processing_started_at),
            completed_at=timestamp(end),
            cancelled_at=timestamp(order.cancelled_at),
            pending_duration=seconds(order.created_at, order.processing_started_at),
            processing_duration=seconds(order.processing_started_at, end),
            total_duration=seconds(order.created_at, end),
            last_error=order.last_error,
            authorized_minor=order.authorized_minor,
            captured_minor=order.captured_minor,
            refunded_minor=order.refunded_minor,
            payment_action=None if order.payment_action is None else _action(order),
        )
    )


def _action(order: Order) -> ActionDocument:
    stored = msgspec.json.decode(order.payment_action or "{}")
    return ActionDocument(
        stored.get("type", ""),
        timestamp(order.action_expires_at) or "",
        stored.get("url", UNSET),
        stored.get("client_secret", UNSET),
    )


class RefundDocument(msgspec.Struct, frozen=True, gc=False):
    """One refund; numbers count from 1 in each order. `amount` is a number with the currency's digits."""

    number: int
    order_id: str
    status: str
    amount: msgspec.Raw
    amount_minor: int
    currency: str
    reason: str | None
    by_hand: bool
    reference: str | None
    error: str | None
    requested_at: str
    settled_at: str | None


def refund_document(refund: OrderRefund, currency: str) -> RefundDocument:
    """Return a refund for clients."""
    return RefundDocument(
        number=refund.number,
        order_id=refund.order_id,
        status=refund.status.value,
        amount=msgspec.Raw(format_minor(refund.amount_minor, currency).encode()),
        amount_minor=refund.amount_minor,
        currency=currency,
        reason=refund.reason,
        by_hand=refund.by_hand,
        reference=refund.reference,
        error=refund.error,
        requested_at=timestamp(refund.requested_at) or "",
        settled_at=timestamp(refund.settled_at),
    )


def _line(line: Line, currency: str) -> LineDocument:
    price = line.price_minor
    return LineDocument(
        line.line,
        line.item_id,
        line.name,
        line.name,
        line.quantity,
        None if price is None else msgspec.Raw(format_minor(price, currency).encode()),
        price,
    )


class EventData(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """What an event changed; only the fields that it changed are there. `order` is the order as it was placed."""

    order: msgspec.Raw | UnsetType = UNSET
    status: str | UnsetType = UNSET
    payment_status: str | UnsetType = UNSET
    attempt: int | UnsetType = UNSET
    processing_started_at: str | None | UnsetType = UNSET
    completed_at: str | None | UnsetType = UNSET
    cancelled_at: str | None | UnsetType = UNSET
    last_error: str | None | UnsetType = UNSET
    reference: str | UnsetType = UNSET
    authorized_minor: int | UnsetType = UNSET
    captured_minor: int | UnsetType = UNSET
    refunded_minor: int | UnsetType = UNSET
    refunding_minor: int | UnsetType = UNSET
    refund: int | UnsetType = UNSET


class EventDocument(msgspec.Struct, frozen=True, gc=False):
    """One event of an order; `number` counts from 1 without gaps."""

    number: int
    at: str
    type: str
    data: EventData


def event_document(number: int, at: int, type: str, data: str) -> EventDocument:
    """Return a stored event (`data` as its JSON text) for clients: without what is nobody's business."""
    changes = event_data(type, data)
    if isinstance(changes, Placed):
        shown = EventData(order=msgspec.Raw(order_document(changes.order, changes.lines)))
    else:
        shown = EventData(
            status=changes.status,
            payment_status=changes.payment_status,
            attempt=changes.attempts,
            processing_started_at=_shown_time(changes.processing_started_at),
            completed_at=_shown_time(changes.completed_at),
            cancelled_at=_shown_time(changes.cancelled_at),
            last_error=changes.last_error,
            reference=changes.reference,
            authorized_minor=changes.authorized_minor,
            captured_minor=changes.captured_minor,
            refunded_minor=changes.refunded_minor,
            refunding_minor=changes.refunding_minor,
            refund=changes.refund,
        )
    return EventDocument(number, timestamp(at) or "", type, shown)


def _shown_time(at: int | None | UnsetType) -> str | None | UnsetType:
    return UNSET if at is UNSET else timestamp(at)
