"""What holds of every order at every moment, told from all that is stored about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from msgspec import UNSET

from expediter.orders.events import CHANGEABLE, Event, Placed, replay, without_secrets
from expediter.orders.order import (
    TRANSITIONS,
    Attempt,
    Job,
    JobKind,
    Line,
    Order,
    OrderRefund,
    PaymentOutcome,
    PaymentStatus,
    RefundStatus,
    Status,
)

#: Where the money of an order was taken, and where it was given back.
_CHARGED = frozenset(
    {
        PaymentStatus.PAID,
        PaymentStatus.REFUND_PENDING,
        PaymentStatus.PARTIALLY_REFUNDED,
        PaymentStatus.REFUNDED,
    }
)


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
    refunds: Sequence[OrderRefund] = ()


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
    yield from _money(order, dossier.attempts, dossier.refunds)
    if order.status is Status.CANCELLED:
        if order.payment_status in (PaymentStatus.PAID, PaymentStatus.PARTIALLY_REFUNDED):
            yield "it is cancelled and its money was kept"
        refunding = dossier.job is not None and dossier.job.kind is JobKind.REFUND
        if refunding is not (order.payment_status is PaymentStatus.REFUND_PENDING):
            yield f"it is cancelled and {order.payment_status.value}, and its job is {dossier.job}"
    waits = any(refund.status is RefundStatus.PENDING for refund in dossier.refunds)
    job = dossier.job
    if waits and not (job is not None and (job.kind is JobKind.REFUND or job.holder is not None)):
        yield f"a refund waits, and its job is {job}"


def _history(order: Order, events: Sequence[Event]) -> Iterator[str]:
    """Give what is wrong with the events of an order: their numbers, their moves, and what they add up to."""
    if not events:
        return  # they are all in the archive
    first = events[0].number
    told = without_secrets(order)
    if [event.number for event in events] != list(range(first, order.version + 1)):
        yield f"its events are not numbered from {first} to {order.version}"
        return
    if first == 1:
        if replay(events) != told:
            yield "its events do not add up to its row"
    elif any(_last(events, name) not in (UNSET, getattr(told, name)) for name in CHANGEABLE):
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


def _money(order: Order, attempts: Sequence[Attempt], refunds: Sequence[OrderRefund]) -> Iterator[str]:
    """Give what is wrong with the calls to the gateway: what they took and gave back is what the order says."""
    if [attempt.number for attempt in attempts] != list(range(1, order.attempts + 1)):
        yield f"its calls to the gateway are not numbered from 1 to {order.attempts}"
    done = [attempt for attempt in attempts if attempt.outcome is PaymentOutcome.SUCCEEDED]
    charged = sum(attempt.action != "refund" for attempt in done)
    if charged > 1:
        yield f"it was charged {charged} times"
    if charged != (order.payment_status in _CHARGED):
        yield f"it is {order.payment_status.value} with {charged} successful charges"
    if order.captured_minor != (order.total_minor if order.payment_status in _CHARGED else 0):
        yield f"it is {order.payment_status.value}, and {order.captured_minor} were captured"
    if not order.captured_minor <= order.authorized_minor <= order.total_minor:
        yield f"{order.captured_minor} were captured and {order.authorized_minor} authorized"
    open_calls = [attempt.number for attempt in attempts if attempt.outcome is None]
    if open_calls != ([order.attempts] if order.charging else []):
        yield f"its calls {open_calls} to the gateway have no outcome, and its row says charging={order.charging}"
    amounts = {refund.amount_minor for refund in refunds}
    for attempt in attempts:
        of_it = attempt.amount_minor in amounts if attempt.action == "refund" else False
        if attempt.currency != order.currency or not (of_it or attempt.amount_minor == order.total_minor):
            yield "a call to the gateway was about another amount"
    yield from _given_back(order, done, refunds)


def _given_back(order: Order, done: Sequence[Attempt], refunds: Sequence[OrderRefund]) -> Iterator[str]:
    """Give what is wrong with the refunds of an order: settled once, and together what it says."""
    if [refund.number for refund in refunds] != list(range(1, order.refunds + 1)):
        yield f"its refunds are not numbered from 1 to {order.refunds}"
    made = [refund for refund in refunds if refund.status is RefundStatus.SUCCEEDED]
    if sum(refund.amount_minor for refund in made) != order.refunded_minor:
        yield f"its refunds do not add up to the {order.refunded_minor} that are given back"
    if sum(refund.amount_minor for refund in refunds if refund.open) != order.refunding_minor:
        yield f"its open refunds do not add up to the {order.refunding_minor} that are set aside"
    if order.refunded_minor + order.refunding_minor > order.captured_minor:
        yield "more is given back than was captured"
    by_calls = sum(attempt.amount_minor for attempt in done if attempt.action == "refund")
    if by_calls != sum(refund.amount_minor for refund in made if not refund.by_hand):
        yield f"its calls to the gateway have given back {by_calls}, and its refunds say otherwise"
    if order.captured_minor:
        back = order.refunded_minor
        wanted = PaymentStatus.REFUND_PENDING if order.status is Status.CANCELLED else PaymentStatus.PAID
        if back == order.captured_minor:
            wanted = PaymentStatus.REFUNDED
        elif back and order.status is not Status.CANCELLED:
            wanted = PaymentStatus.PARTIALLY_REFUNDED
        if order.payment_status is not wanted:
            yield f"it is {order.payment_status.value} with {back} of {order.captured_minor} given back"
