"""Taking money: charged or reserved, confirmed by the customer, captured, let go of, told by the gateway."""

from __future__ import annotations

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from expediter.errors import Conflict, UnknownPayment
from expediter.orders import refunds
from expediter.orders.commands import HearDispute, HearGateway, RecordPayment, RecordReserved
from expediter.orders.draft import Draft
from expediter.orders.events import Changes, told_action
from expediter.orders.order import (
    Job,
    JobKind,
    Order,
    PaymentOutcome,
    PaymentStatus,
    Stages,
    Status,
    gateway_key,
)

#: The answers of a gateway that leave nothing open, and those that settle what was open.
_TAKEN = frozenset({PaymentOutcome.SUCCEEDED, PaymentOutcome.AUTHORIZED})
_DEFINITE = _TAKEN | {PaymentOutcome.DECLINED, PaymentOutcome.ACTION_REQUIRED, PaymentOutcome.VOIDED}
#: What is asked about, and not charged again.
_ASKED_ABOUT = frozenset({PaymentStatus.UNKNOWN, PaymentStatus.ACTION_REQUIRED})
_STARTED = {JobKind.CAPTURE: "capture.started", JobKind.VOID: "void.started"}
_UNAVAILABLE = {JobKind.CAPTURE: "capture.unavailable", JobKind.VOID: "void.unavailable"}
_CONTRADICTED = "the gateway has taken money under a key that it had declined before: look it up there"


def start_charge(draft: Draft, key_prefix: str) -> None:
    """Store the intent to charge, unless what became of the last charge has to be found out first."""
    order = draft.order
    if order.charging:
        # The last holder stored its intent and never came back: nobody knows what the gateway did.
        draft.end_attempt(PaymentOutcome.UNKNOWN, None, "the worker went away during the charge")
        draft.change("payment.unknown", Changes(charging=False, payment_status=PaymentStatus.UNKNOWN))
    elif order.payment_status not in _ASKED_ABOUT:
        changes = Changes(
            status=UNSET if order.charged_late else Status.PAYMENT_PROCESSING,
            charging=True,
            charge_started_at=draft.now,
            processing_started_at=order.processing_started_at or draft.now,
        )
        draft.start_attempt("charge", "payment.started", changes, key_prefix)


def start_reserved(draft: Draft, kind: JobKind, key_prefix: str) -> None:
    """Store the intent to capture, or to void. Under one key it is done once, whatever became of the last call."""
    if draft.order.charging:
        draft.end_attempt(PaymentOutcome.UNKNOWN, None, f"the worker went away during the {kind.value}")
    draft.start_attempt(kind.value, _STARTED[kind], Changes(charging=True), key_prefix)


def record(draft: Draft, job: Job, command: RecordPayment) -> None:
    """Record what the gateway said to a charge, or when it was asked about one."""
    order = draft.order
    outcome = command.outcome
    failures = job.failures + command.counts
    if order.payment_status in _ASKED_ABOUT and outcome not in _DEFINITE:
        # Only the gateway's yes or no settles what is open; anything less leaves it so.
        draft.try_later(job, command.retry_in, failures)
        return
    if outcome is PaymentOutcome.ACTION_REQUIRED and order.payment_status is PaymentStatus.ACTION_REQUIRED:
        draft.try_later(job, command.retry_in, 0)
        return
    if outcome is PaymentOutcome.NOT_SENT:
        release(draft, job, command.retry_in)
        return
    draft.end_attempt(outcome, command.reference, command.error)
    match outcome:
        case PaymentOutcome.SUCCEEDED | PaymentOutcome.AUTHORIZED:
            _taken(draft, outcome, command.reference, holder=job.holder, lease=command.lease)
        case PaymentOutcome.ACTION_REQUIRED:
            _must_act(draft, command.action, command.action_until, command.error)
            draft.try_later(job, command.retry_in, 0)
        case PaymentOutcome.VOIDED:
            _too_late(draft, command.error)
        case PaymentOutcome.UNKNOWN:
            changes = Changes(charging=False, payment_status=PaymentStatus.UNKNOWN, last_error=command.error)
            draft.change("payment.unknown", changes)
            draft.try_later(job, command.retry_in, failures)
        case PaymentOutcome.UNAVAILABLE if failures < command.failures_max:
            changes = Changes(charging=False, payment_status=PaymentStatus.PENDING, last_error=command.error)
            draft.change("payment.unavailable", changes)
            draft.try_later(job, command.retry_in, failures)
        case _:
            _failed(draft, command.error, declined=outcome is PaymentOutcome.DECLINED)


def _taken(
    draft: Draft, outcome: PaymentOutcome, reference: str | None, *, holder: str | None = None, lease: int = 0
) -> None:
    """The money is charged or reserved; with a `lease` its `holder` carries the order out at once."""
    order = draft.order
    authorized = outcome is PaymentOutcome.AUTHORIZED
    event = "payment.authorized" if authorized else "payment.succeeded"
    changes = Changes(
        payment_status=PaymentStatus.AUTHORIZED if authorized else PaymentStatus.PAID,
        charging=False,
        last_error=None,
    )
    if order.payment_action is not None:
        changes = replace(changes, payment_action=None, action_expires_at=None)
    if order.charged_late:
        draft.change(event, changes)
        done = order.completed_at is not None and authorized
        _charged(draft)
        if done:
            draft.go_on(JobKind.CAPTURE)
        return
    changes = replace(changes, status=Status.CONFIRMED)
    if order.stages is Stages.PAYMENT:
        draft.change(event, replace(changes, completed_at=draft.now))
        draft.go_on(JobKind.CAPTURE if authorized else None)
        return
    draft.change(event, changes)
    if lease:
        draft.start_fulfilment()
    draft.go_on(JobKind.FULFIL)
    if lease and draft.job is not None:
        draft.job = replace(draft.job, holder=holder, claims=1, due_at=draft.now + lease)


def _must_act(draft: Draft, action: str | None, until: int | None, error: str | None) -> None:
    changes = Changes(
        payment_status=PaymentStatus.ACTION_REQUIRED,
        charging=False,
        payment_action=told_action(action),
        action_expires_at=until,
        last_error=error,
    )
    draft.change("payment.action_required", changes)
    # The row has the secret that the shop's page needs; the history has not.
    draft.order = replace(draft.order, payment_action=action)


def _too_late(draft: Draft, error: str | None) -> None:
    """The customer did not act in time, and the gateway has let go of the payment: the order is cancelled."""
    changes = Changes(payment_status=PaymentStatus.VOIDED, charging=False, last_error=error)
    changes = _without_action(draft.order, changes)
    if draft.order.charged_late:
        draft.change("payment.voided", changes)
        _unpaid(draft)
        return
    draft.change("order.cancelled", replace(changes, status=Status.CANCELLED, cancelled_at=draft.now))
    draft.job = None


def _failed(draft: Draft, error: str | None, *, declined: bool) -> None:
    # A definite decline uses its key up; after mere unavailability the next try keeps the same key.
    order = draft.order
    late = order.charged_late
    changes = Changes(
        status=UNSET if late else Status.PAYMENT_FAILED,
        payment_status=PaymentStatus.DECLINED,
        charging=False,
        generation=order.generation + declined,
        last_error=error,
    )
    draft.change("payment.failed", _without_action(order, changes))
    if late:
        _unpaid(draft)
    else:
        draft.job = None


def _unpaid(draft: Draft) -> None:
    """The charge beside its road has come to nothing: the road goes on; at its end it waits for a person."""
    if draft.order.completed_at is not None:
        draft.park(JobKind.CAPTURE)
    else:
        _charged(draft)


def _charged(draft: Draft) -> None:
    """The charge beside the road is settled; a worker may be at the road just now."""
    if draft.job is not None and draft.job.kind is JobKind.CHARGE:
        draft.money_moved()


def _without_action(order: Order, changes: Changes) -> Changes:
    if order.payment_action is None:
        return changes
    return replace(changes, payment_action=None, action_expires_at=None)


def release(draft: Draft, job: Job, retry_in: int) -> None:
    """Give a job back whose outside call was never made."""
    if draft.order.charging:
        draft.end_attempt(PaymentOutcome.NOT_SENT, None, None)
        draft.change("payment.postponed", Changes(charging=False))
    draft.try_later(job, retry_in, job.failures, claims=job.claims - 1)


def record_reserved(draft: Draft, job: Job, command: RecordReserved) -> None:
    """Record what became of reserved money that was to be captured, or let go of."""
    draft.end_attempt(command.outcome, command.reference, command.error)
    if command.outcome is PaymentOutcome.SUCCEEDED or command.outcome is PaymentOutcome.VOIDED:
        _reserved_is(draft, command.outcome, command.error)
        return
    draft.change(_UNAVAILABLE[job.kind], Changes(charging=False, last_error=command.error))
    draft.try_later(job, command.retry_in, job.failures + 1)


def _reserved_is(draft: Draft, outcome: PaymentOutcome, error: str | None) -> None:
    """What was reserved is captured, or it is gone."""
    order = draft.order
    cancelled = order.status is Status.CANCELLED
    if outcome is PaymentOutcome.SUCCEEDED and cancelled:
        _landed(draft)
    elif outcome is PaymentOutcome.SUCCEEDED:
        changes = Changes(payment_status=PaymentStatus.PAID, charging=False, last_error=None)
        draft.change("payment.succeeded", changes)
        if draft.job is not None and draft.job.kind is JobKind.CAPTURE:
            draft.job = None
            draft.go_on(None)
    elif cancelled:
        changes = Changes(payment_status=PaymentStatus.VOIDED, charging=False, last_error=None)
        draft.change("payment.voided", _without_action(order, changes))
        draft.job = None
    else:
        said = error or "what was reserved has expired at the gateway: POST to its /retry to charge it anew"
        draft.change(
            "payment.expired", Changes(payment_status=PaymentStatus.VOIDED, charging=False, last_error=said)
        )
        if order.completed_at is not None:
            draft.park(JobKind.CAPTURE)


def _landed(draft: Draft) -> None:
    """Money was taken for a cancelled order: it goes back."""
    order = draft.order
    total = order.total_minor
    changes = Changes(
        charging=False,
        authorized_minor=total,
        captured_minor=total,
        last_error="it was charged although it is cancelled: the money goes back",
    )
    changes = _without_action(order, changes)
    draft.job = None
    refunds.give_back(draft, "payment.succeeded", changes, "the order is cancelled")


def charge_again(draft: Draft) -> None:
    """Ask for another charge of an order whose reserved money is gone."""
    generation = draft.order.generation + (draft.order.payment_status is PaymentStatus.VOIDED)
    changes = Changes(payment_status=PaymentStatus.PENDING, generation=generation, last_error=None)
    draft.change("payment.requested", changes)
    draft.job = None if draft.job is not None and draft.job.kind is JobKind.CAPTURE else draft.job
    draft.money_first()


def hear(draft: Draft, command: HearGateway) -> None:
    """Take what the gateway says by itself. What is known already, or was overtaken, changes nothing.

    Raises UnknownPayment for a key that is none of this order's, and Conflict for another amount.
    """
    order = draft.order
    generations = range(order.generation, 0, -1)
    keys = {gateway_key(order.order_id, number, command.key_prefix): number for number in generations}
    generation = keys.get(command.key)
    if generation is None:
        raise UnknownPayment(f"Order {order.order_id} has no payment with this key")
    if (command.amount_minor, command.currency.upper()) != (order.total_minor, order.currency):
        raise Conflict(
            f"Order {order.order_id} is about {order.total_minor} {order.currency} (minor units), and this "
            f"payment about {command.amount_minor} {command.currency}"
        )
    if generation != order.generation:
        if command.outcome in _TAKEN and order.last_error != _CONTRADICTED:
            reference: str | UnsetType = command.reference or UNSET
            draft.change("payment.contradicted", Changes(last_error=_CONTRADICTED, reference=reference))
        return
    _hear_current(draft, command)
    if draft.order.captured_minor:
        refunds.found_at_gateway(draft, command.refunded_minor, command.reference)


def _hear_current(draft: Draft, command: HearGateway) -> None:
    order, outcome = draft.order, command.outcome
    if order.captured_minor or outcome not in _DEFINITE:
        return
    if order.status is Status.CANCELLED:
        _hear_cancelled(draft, command)
    elif order.payment_status is PaymentStatus.AUTHORIZED:
        if outcome is PaymentOutcome.SUCCEEDED or outcome is PaymentOutcome.VOIDED:
            _end_attempt(draft, command)
            _reserved_is(draft, outcome, None)
    elif order.status in (Status.PENDING, Status.PAYMENT_PROCESSING) or order.charged_late:
        _hear_charge(draft, command)
    elif outcome in _TAKEN and order.status is Status.PAYMENT_FAILED:
        # The gateway seemed to be away, and had charged all the same.
        draft.change("payment.requested", Changes(status=Status.PAYMENT_PROCESSING, last_error=None))
        _end_attempt(draft, command)
        _taken(draft, outcome, command.reference)
    elif outcome is PaymentOutcome.SUCCEEDED and order.payment_status is PaymentStatus.VOIDED:
        _end_attempt(draft, command)
        draft.change("payment.succeeded", Changes(payment_status=PaymentStatus.PAID, last_error=None))
        if draft.job is not None and draft.job.kind is JobKind.CAPTURE:
            draft.job = None


def _hear_cancelled(draft: Draft, command: HearGateway) -> None:
    order, outcome = draft.order, command.outcome
    open_still = order.payment_status in (PaymentStatus.AUTHORIZED, PaymentStatus.ACTION_REQUIRED)
    if outcome is PaymentOutcome.SUCCEEDED:
        _end_attempt(draft, command)
        _landed(draft)
    elif outcome is PaymentOutcome.AUTHORIZED and not open_still:
        changes = Changes(
            payment_status=PaymentStatus.AUTHORIZED, last_error="it was reserved although it is cancelled"
        )
        draft.change("payment.authorized", changes)
        draft.go_on(JobKind.VOID)
    elif open_still and outcome in (PaymentOutcome.VOIDED, PaymentOutcome.DECLINED):
        _end_attempt(draft, command)
        _reserved_is(draft, PaymentOutcome.VOIDED, None)


def _hear_charge(draft: Draft, command: HearGateway) -> None:
    order, outcome = draft.order, command.outcome
    if not order.attempts:
        return  # it was never asked for under this key: whoever made it has not asked us
    if outcome is PaymentOutcome.ACTION_REQUIRED:
        if order.payment_status is PaymentStatus.ACTION_REQUIRED or draft.job is None:
            return
        _end_attempt(draft, command)
        until = draft.now + command.action_in
        until = until if command.action_until is None else min(until, command.action_until)
        _must_act(draft, command.action, until, command.error)
        draft.job = replace(draft.job, fence=draft.job.fence + 1, dead_at=None)
        draft.try_later(draft.job, 0, 0)
        return
    _end_attempt(draft, command)
    if outcome in _TAKEN:
        _taken(draft, outcome, command.reference)
    else:
        voided = outcome is PaymentOutcome.VOIDED
        words = command.error or ("The payment is voided at the gateway" if voided else "The payment was declined")
        _failed(draft, words, declined=True)


def _end_attempt(draft: Draft, command: HearGateway) -> None:
    """Complete the latest call, or correct what was believed of it."""
    if draft.order.attempts:
        draft.end_attempt(command.outcome, command.reference, command.error)


def dispute(draft: Draft, command: HearDispute) -> None:
    """Show at the order that the customer disputes its payment; said again, it changes nothing."""
    words = f"the customer disputes the payment: {command.reason}"
    if draft.order.last_error != words:
        draft.change("payment.disputed", Changes(last_error=words, reference=command.reference))
