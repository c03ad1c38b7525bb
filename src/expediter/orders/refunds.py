"""Giving money back: asked for, made by a worker, refused by the gateway, recorded by hand.

What is to be given back is set aside at the order (`refunding_minor`) in the transaction that asks for it. So the
sum of all refunds never exceeds what was captured, however many ask at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal, InvalidOperation

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from expediter.errors import Conflict, Fault, InvalidInput, MoneyInFlight
from expediter.orders.commands import RecordRefund, RefundOrder
from expediter.orders.draft import Draft
from expediter.orders.events import Changes
from expediter.orders.money import MoneyError, format_minor, nearest_minor, parse_minor
from expediter.orders.order import (
    Job,
    JobKind,
    Order,
    OrderRefund,
    PaymentOutcome,
    PaymentStatus,
    RefundStatus,
    Status,
)

#: Refunds of one order, at most; the next one is refused.
REFUNDS_MAX = 1_000


def request(draft: Draft, command: RefundOrder) -> None:
    """Set a refund aside for a worker, or record one that was made by hand.

    Raises InvalidInput for what is no amount, MoneyInFlight, and Conflict for more than there is to give back.
    """
    order = draft.order
    if order.charge_open:
        raise MoneyInFlight(f"Order {order.order_id} cannot be refunded while the outcome of its charge is open")
    if not order.captured_minor:
        raise Conflict(f"Nothing was taken for order {order.order_id}: there is nothing to refund")
    if order.refunds >= REFUNDS_MAX:
        raise Conflict(f"Order {order.order_id} has {REFUNDS_MAX:,} refunds, and can have no more")
    left = order.captured_minor - order.refunded_minor - order.refunding_minor
    if command.by_hand:
        # What is parked may just be what was now made by hand.
        left += sum(refund.amount_minor for refund in _parked(draft))
    amount = left if command.amount is None else _amount(command.amount, order.currency, number=command.number)
    if amount > left or amount == 0:
        currency = order.currency
        raise Conflict(
            f"Of the {format_minor(order.captured_minor, currency)} {currency} that were taken for order "
            f"{order.order_id}, {format_minor(left, currency)} are left to refund"
        )
    if command.by_hand:
        _record_by_hand(draft, amount, command.reason, command.reference)
    else:
        _ask(draft, amount, command.reason)
        draft.money_first()


def _amount(text: str, currency: str, *, number: bool) -> int:
    try:
        amount = nearest_minor(Decimal(text), currency) if number else parse_minor(Decimal(text), currency)
    except (MoneyError, InvalidOperation) as error:
        wrong = str(error) if isinstance(error, MoneyError) else "must be an amount"
        raise InvalidInput([Fault("/amount", wrong)]) from error
    if amount == 0:
        raise InvalidInput([Fault("/amount", "must be above 0")])
    return amount


def _parked(draft: Draft) -> list[OrderRefund]:
    return [refund for refund in draft.refunds.values() if refund.status is RefundStatus.PARKED]


def _ask(draft: Draft, amount: int, reason: str | None) -> None:
    order = draft.order
    number = order.refunds + 1
    changes = Changes(refund=number, refunds=number, refunding_minor=order.refunding_minor + amount)
    draft.change("refund.requested", changes)
    draft.enter_refund(_pending(draft, number, amount, reason))


def _pending(draft: Draft, number: int, amount: int, reason: str | None) -> OrderRefund:
    return OrderRefund(
        order_id=draft.order.order_id,
        number=number,
        amount_minor=amount,
        status=RefundStatus.PENDING,
        requested_at=draft.now,
        reason=reason,
    )


def _record_by_hand(draft: Draft, amount: int, reason: str | None, reference: str | None) -> None:
    order = draft.order
    number = order.refunds + 1
    released = _release(draft, amount)
    refunding = order.refunding_minor - released
    refunded = order.refunded_minor + amount
    rest = order.captured_minor - refunded - refunding if order.status is Status.CANCELLED else 0
    changes = Changes(
        refund=number,
        refunds=number + (rest > 0),
        refunded_minor=refunded,
        refunding_minor=refunding + rest,
        payment_status=_status(order, refunded),
        last_error=None if released and not rest else UNSET,
        reference=reference or UNSET,
    )
    draft.change("refund.succeeded", changes)
    made = replace(
        _pending(draft, number, amount, reason),
        status=RefundStatus.SUCCEEDED,
        by_hand=True,
        reference=reference,
        settled_at=draft.now,
    )
    draft.enter_refund(made)
    if rest:
        left = replace(
            _pending(draft, number + 1, rest, "the rest of what was parked"), status=RefundStatus.PARKED
        )
        draft.enter_refund(left)
    job = draft.job
    if job is not None and job.kind is JobKind.REFUND and job.dead_at is not None and not draft.refunds:
        draft.job = None


def _release(draft: Draft, amount: int) -> int:
    """Give up parked refunds that one made by hand stands for: one as large, or as many as it takes."""
    order = draft.order
    needed = amount - (order.captured_minor - order.refunded_minor - order.refunding_minor)
    parked = sorted(_parked(draft), key=lambda refund: (refund.amount_minor != amount, refund.number))
    released = 0
    for refund in parked:
        if released >= needed and refund.amount_minor != amount:
            break
        draft.enter_refund(replace(refund, status=RefundStatus.FAILED, settled_at=draft.now))
        released += refund.amount_minor
        if refund.amount_minor == amount:
            break
    return released


def _status(order: Order, refunded: int) -> PaymentStatus:
    """Return the payment status with so much given back."""
    if refunded == order.captured_minor:
        return PaymentStatus.REFUNDED
    if order.status is Status.CANCELLED:
        return PaymentStatus.REFUND_PENDING
    return PaymentStatus.PARTIALLY_REFUNDED if refunded else PaymentStatus.PAID


def give_back(draft: Draft, type: str, changes: Changes, reason: str) -> None:
    """Change the cancelled order by an event that also sets aside all that was captured and is not given back.

    What waits for a person is taken up again as a part of that; a refund that is under way goes on.
    """
    order = draft.order
    captured = order.captured_minor if changes.captured_minor is UNSET else changes.captured_minor
    for refund in _parked(draft):
        draft.enter_refund(replace(refund, status=RefundStatus.FAILED, settled_at=draft.now))
    pending = sum(refund.amount_minor for refund in draft.refunds.values())
    rest = captured - order.refunded_minor - pending
    number = order.refunds + (rest > 0)
    status: PaymentStatus | UnsetType = PaymentStatus.REFUND_PENDING if captured > order.refunded_minor else UNSET
    draft.change(
        type,
        replace(
            changes,
            payment_status=status,
            refunding_minor=pending + rest,
            refunds=number,
            refund=number if rest else UNSET,
        ),
    )
    if rest:
        draft.enter_refund(_pending(draft, number, rest, reason))
    job = draft.job
    if job is not None and job.kind is JobKind.REFUND and job.dead_at is None:
        draft.job = replace(job, then_kind=None, then_due_at=None)
    else:
        draft.job = None
        draft.go_on(None)


def start(draft: Draft, key_prefix: str) -> bool:
    """Store the intent to make the first refund that waits; return whether there is one."""
    refund = first_pending(draft.refunds.values())
    if refund is None:
        return False
    if draft.order.charging:
        draft.end_attempt(PaymentOutcome.UNKNOWN, None, "the worker went away during the refund")
    # The same key again: whatever became of the last call, the gateway refunds once.
    changes = Changes(charging=True, refund=refund.number)
    draft.start_attempt("refund", "refund.started", changes, key_prefix, refund.amount_minor)
    return True


def first_pending(refunds: Iterable[OrderRefund]) -> OrderRefund | None:
    """Return the one that is made next: they are made one after the other, in the order of their numbers."""
    pending = [refund for refund in refunds if refund.status is RefundStatus.PENDING]
    return min(pending, key=lambda refund: refund.number, default=None)


def record(draft: Draft, job: Job, command: RecordRefund) -> None:
    """Record what the gateway said to the refund that was under way."""
    draft.end_attempt(command.outcome, command.reference, command.error)
    refund = draft.refunds[command.refund]  # only whoever holds the job settles it
    order = draft.order
    if command.outcome is not PaymentOutcome.SUCCEEDED:
        changes = Changes(charging=False, refund=refund.number, last_error=command.error)
        draft.change("refund.unavailable", changes)
        draft.try_later(job, command.retry_in, job.failures + 1)
        return
    refunded = order.refunded_minor + refund.amount_minor
    changes = Changes(
        charging=False,
        refund=refund.number,
        refunded_minor=refunded,
        refunding_minor=order.refunding_minor - refund.amount_minor,
        payment_status=_status(order, refunded),
        last_error=None,
        reference=command.reference or UNSET,
    )
    draft.change("refund.succeeded", changes)
    done = replace(
        refund, status=RefundStatus.SUCCEEDED, reference=command.reference, settled_at=draft.now, error=None
    )
    draft.enter_refund(done)
    draft.money_moved()


def park(draft: Draft, error: str, outcome: PaymentOutcome, number: int | None = None) -> None:
    """Set a refund (None: the next one) aside for a person; others, and the order's road, go on."""
    refund = first_pending(draft.refunds.values()) if number is None else draft.refunds.get(number)
    if draft.order.charging:
        draft.end_attempt(outcome, None, error)
    about: int | UnsetType = UNSET if refund is None else refund.number
    draft.change("job.parked", Changes(charging=False, refund=about, last_error=error))
    if refund is None:
        draft.park(JobKind.REFUND)
        return
    # A definite refusal has used its key up; what may have happened keeps it.
    generation = refund.generation + (outcome is PaymentOutcome.DECLINED)
    draft.enter_refund(replace(refund, status=RefundStatus.PARKED, error=error, generation=generation))
    draft.money_moved()


def retry(draft: Draft) -> bool:
    """Take up what is parked; return whether anything is."""
    parked = _parked(draft)
    if not parked:
        return False
    draft.change("job.revived", Changes(last_error=None))
    for refund in parked:
        draft.enter_refund(replace(refund, status=RefundStatus.PENDING, error=None))
    draft.money_first()
    return True


def found_at_gateway(draft: Draft, refunded_minor: int, reference: str | None) -> None:
    """Record what somebody has given back at the gateway itself, beyond what was asked for here."""
    order = draft.order
    beyond = min(refunded_minor, order.captured_minor) - order.refunded_minor - order.refunding_minor
    if beyond > 0 and order.refunds < REFUNDS_MAX:
        _record_by_hand(draft, beyond, "made at the gateway", reference)
