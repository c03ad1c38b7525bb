"""What holds of every order at every moment, told from all that is stored about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from expediter.orders.events import CHANGEABLE, Event, Placed, replay
from expediter.orders.order import (
    TRANSITIONS,
    Attempt,
    Job,
    JobKind,
    Line,
    Order,
    PaymentOutcome,
    PaymentStatus,
    Status,
)

#: Where the money of an order was taken, and where it was given back.
_CHARGED = frozenset({PaymentStatus.PAID, PaymentStatus.REFUND_PENDING, PaymentStatus.REFUNDED})


#: Breaches that are named, at most; all are counted.
BREACHES_NAMED_MAX = 1_000


class Breach(msgspec.Struct, frozen=True):
    """One law that does not hold: of which order (None: of none in particular), and how."""

    order_id: str | None
    law: str


class Verified(msgspec.Struct):
    """What was looked at and what was found."""

    orders: int = 0
    found: int = 0
    breaches: list[Breach] = []

    def add(self, order_id: str | None, law: str) -> None:
        """Take note of a breach."""
        self.found += 1
        if len(self.breaches) < BREACHES_NAMED_MAX:
            self.breaches.append(Breach(order_id, law))


class Dossier(msgspec.Struct, frozen=True):
    """All that is stored about one order. The events are by number; earlier ones may have been archived."""

    order: Order
    job: Job | None
    lines: Sequence[Line]
    events: Sequence[Event]
    attempts: Sequence[Attempt]


def breaches(dossier: Dossier) -> Iterator[str]:
    """Give a sentence for each law that this order breaks."""
    order = dossier.order
    if dossier.job is None and not order.at_rest:
        yield f"it is {order.status.value} and {order.payment_status.value}, not at rest, and has no job"
    if dossier.job is not None and order.at_rest:
        yield f"it is at rest ({order.status.value}) and has a job to {dossier.job.kind.value}"
    of_lines = sum(line.quantity * (line.price_minor or 0) for line in dossier.lines)
    if order.priced and order.total_minor != of_lines:
        yield "its lines do not add up to its total"
    yield from _history(order, dossier.events)
    yield from _money(order, dossier.attempts)
    if order.status is Status.CANCELLED:
        if order.payment_status is PaymentStatus.PAID:
            yield "it is cancelled and its money was kept"
        refunding = dossier.job is not None and dossier.job.kind is JobKind.REFUND
        if refunding is not (order.payment_status is PaymentStatus.REFUND_PENDING):
            yield f"it is cancelled and {order.payment_status.value}, and its job is {dossier.job}"


def _history(order: Order, events: Sequence[Event]) -> Iterator[str]:
    """Give what is wrong with the events of an order: their numbers, their moves, and what they add up to."""
    if not events:
        return  # they are all in the archive
    first = events[0].number
    if [event.number for event in events] != list(range(first, order.version + 1)):
        yield f"its events are not numbered from {first} to {order.version}"
        return
    if first == 1:
        if replay(events) != replace(order, payment_token=None):
            yield "its events do not add up to its row"
    elif any(_last(events, name) not in (UNSET, getattr(order, name)) for name in CHANGEABLE):
        yield "its events since the archive do not add up to its row"
    status: Status | None = None
    for event in events:
        if isinstance(event.data, Placed):
            status = event.data.order.status
        elif (new := event.data.status) is not UNSET:
            if status is not None and new is not status and new not in TRANSITIONS[status]:
                yield f"event {event.number} moved it from {status.value} to {new.value}"
            status = new


def _last(events: Sequence[Event], name: str) -> object:
    return next(
        (value for event in reversed(events) if (value := getattr(event.data, name, UNSET)) is not UNSET), UNSET
    )


def _money(order: Order, attempts: Sequence[Attempt]) -> Iterator[str]:
    """Give what is wrong with the calls to the gateway: charged less refunded is what the order says."""
    if [attempt.number for attempt in attempts] != list(range(1, order.attempts + 1)):
        yield f"its calls to the gateway are not numbered from 1 to {order.attempts}"
    done = [attempt.action for attempt in attempts if attempt.outcome is PaymentOutcome.SUCCEEDED]
    charged, refunded = done.count("charge"), done.count("refund")
    if charged > 1:
        yield f"it was charged {charged} times"
    if charged != (order.payment_status in _CHARGED):
        yield f"it is {order.payment_status.value} with {charged} successful charges"
    if refunded != (order.payment_status is PaymentStatus.REFUNDED):
        yield f"it is {order.payment_status.value} with {refunded} successful refunds"
    open_calls = [attempt.number for attempt in attempts if attempt.outcome is None]
    if open_calls != ([order.attempts] if order.charging else []):
        yield f"its calls {open_calls} to the gateway have no outcome, and its row says charging={order.charging}"
    due = (order.total_minor, order.currency)
    if any((attempt.amount_minor, attempt.currency) != due for attempt in attempts):
        yield "a call to the gateway was about another amount"
