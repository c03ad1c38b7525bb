"""What people do to an order by hand: move it, cancel it, retry it, delete it."""

from __future__ import annotations

from msgspec import UNSET
from msgspec.structs import replace

from expediter.errors import Conflict, IllegalTransition, MoneyInFlight, PreconditionFailed
from expediter.orders import charges, refunds
from expediter.orders.commands import ReportFulfilment
from expediter.orders.draft import FENCES_PER_VERSION, Decision, Draft
from expediter.orders.events import Changes
from expediter.orders.order import (
    PAST_PAYMENT,
    TRANSITIONS,
    JobKind,
    Order,
    PaymentOutcome,
    PaymentStatus,
    Stages,
    Status,
)


def check_version(order: Order, if_version: int | None) -> None:
    """Raise PreconditionFailed unless the order has this version (None: any)."""
    if if_version is not None and if_version != order.version:
        raise PreconditionFailed(order.order_id, order.version)


def legal_moves(order: Order) -> list[Status]:
    """Return where this very order may go: the table's moves, less those that its road and payment rule out."""
    return [move for move in Status if move in TRANSITIONS[order.status] and _fits(order, move)]


def _fits(order: Order, move: Status) -> bool:
    nothing_to_pay = order.payment_status is PaymentStatus.NOT_REQUIRED
    match move:
        case Status.PAYMENT_PROCESSING:
            return not nothing_to_pay
        case Status.PROCESSING if order.stages is Stages.PAYMENT:
            return False
        case Status.PROCESSING if order.status is Status.PENDING:
            return nothing_to_pay
        case _:
            return True


def _check_move(draft: Draft, wanted: Status, *, towards: Status | None = None) -> None:
    order, job = draft.order, draft.job
    legal = legal_moves(order)
    if wanted not in legal:
        raise IllegalTransition(order.order_id, order.status, towards or wanted, legal)
    # A parked charge of unknown outcome is for a person to look up; what they found they say by the status.
    settled = job is not None and job.dead_at is not None and wanted in (Status.CONFIRMED, Status.PAYMENT_FAILED)
    # What is charged beside the road does not hold it up; and whoever may still pay can be told not to.
    beside = order.charged_late and wanted is not Status.CANCELLED
    if not settled and not beside:
        _check_money(order, f"become {wanted}")
    if order.payment_status is PaymentStatus.ACTION_REQUIRED and not beside and wanted is not Status.CANCELLED:
        raise MoneyInFlight(
            f"Order {order.order_id} cannot become {wanted} while its customer may still pay: cancel it, or wait"
        )


def _check_money(order: Order, what: str) -> None:
    if order.charge_open:
        raise MoneyInFlight(
            f"Order {order.order_id} cannot {what} while the outcome of a charge or refund is open; try again"
        )


def change_status(draft: Draft, wanted: Status, *, through: bool = False) -> None:
    """Move the order to `wanted`, with all that the move brings with it; where it is there, nothing happens.

    `through`: work that nobody has told of was begun before it ended.
    """
    if wanted is draft.order.status:
        return
    if through and wanted in (Status.COMPLETED, Status.FAILED) and draft.order.status is not Status.PROCESSING:
        _check_move(draft, Status.PROCESSING, towards=wanted)
        draft.start_fulfilment()
    _check_move(draft, wanted)
    started = draft.order.processing_started_at or draft.now
    match wanted:
        case Status.CANCELLED:
            _cancel(draft)
        case Status.PAYMENT_PROCESSING:
            changes = Changes(
                status=wanted,
                payment_status=PaymentStatus.PENDING,
                processing_started_at=started,
                last_error=None,
            )
            draft.change("payment.requested", changes)
            draft.go_on(JobKind.CHARGE)
        case Status.PROCESSING:
            draft.start_fulfilment()
            draft.go_on(JobKind.FULFIL)
        case Status.CONFIRMED:
            _confirm_by_hand(draft)
        case Status.PAYMENT_FAILED:
            _fail_payment_by_hand(draft)
        case Status.COMPLETED:
            draft.complete()
        case Status.FAILED:
            draft.change("fulfilment.failed", Changes(status=wanted, last_error="failed by hand"))
            draft.go_on(None)


def _confirm_by_hand(draft: Draft) -> None:
    """Payment was settled outside the gateway, or by the gateway in a charge that somebody has looked up there."""
    found = draft.order.payment_status is PaymentStatus.UNKNOWN
    if found:
        draft.end_attempt(PaymentOutcome.SUCCEEDED, None, "settled by hand")
    # What was settled outside, the gateway cannot refund: nothing is due from it or to it.
    paid = PaymentStatus.PAID if found else PaymentStatus.NOT_REQUIRED
    event = "payment.succeeded" if found else "payment.waived"
    changes = Changes(status=Status.CONFIRMED, payment_status=paid, last_error=None)
    if draft.order.stages is Stages.PAYMENT:
        draft.change(event, replace(changes, completed_at=draft.now))
        draft.job = None
    else:
        draft.change(event, changes)
        draft.go_on(JobKind.FULFIL)


def _fail_payment_by_hand(draft: Draft) -> None:
    settled = draft.order.payment_status is PaymentStatus.UNKNOWN
    if settled:
        draft.end_attempt(PaymentOutcome.DECLINED, None, "settled by hand")
    changes = Changes(
        status=Status.PAYMENT_FAILED,
        payment_status=PaymentStatus.DECLINED,
        generation=draft.order.generation + settled,
        last_error="failed by hand",
    )
    draft.change("payment.failed", changes)
    draft.job = None


def report(draft: Draft, command: ReportFulfilment) -> None:
    """Say that the order is carried out, or cannot be; said twice, the second time changes nothing.

    Whoever carries it out may be faster than the worker that handed it over, or nobody has told that it was begun.
    """
    order = draft.order
    wanted = Status.COMPLETED if command.done else Status.FAILED
    if order.status is wanted:
        return
    if order.status in (Status.PENDING, Status.CONFIRMED):
        _check_move(draft, Status.PROCESSING, towards=wanted)
        draft.start_fulfilment()
    if draft.order.status is not Status.PROCESSING:
        raise IllegalTransition(order.order_id, order.status, wanted, legal_moves(order))
    _check_move(draft, wanted)
    reference = command.reference or UNSET
    if command.done:
        draft.complete(reference)
    else:
        changes = Changes(
            status=wanted, last_error=command.reason or "it was reported as failed", reference=reference
        )
        draft.change("fulfilment.failed", changes)
        draft.go_on(None)


def cancel(draft: Draft) -> None:
    """Cancel the order; what was charged is refunded."""
    _check_move(draft, Status.CANCELLED)
    _cancel(draft)


def _cancel(draft: Draft) -> None:
    # A cancelled order is not a completed one, even where `confirmed` was the end of its road.
    order = draft.order
    changes = Changes(status=Status.CANCELLED, cancelled_at=draft.now, completed_at=None)
    if order.captured_minor:
        refunds.give_back(draft, "order.cancelled", changes, "the order was cancelled")
        return
    if order.payment_status is PaymentStatus.PENDING:
        changes = replace(changes, payment_status=PaymentStatus.VOIDED)
    draft.change("order.cancelled", changes)
    # What is reserved, or may still be paid, is let go of at the gateway.
    reserved = order.payment_status in (PaymentStatus.AUTHORIZED, PaymentStatus.ACTION_REQUIRED)
    draft.job = None
    draft.go_on(JobKind.VOID if reserved else None)


def retry(draft: Draft) -> None:
    """Take up what failed or was parked."""
    order, job = draft.order, draft.job
    if order.status in PAST_PAYMENT and order.payment_status in (PaymentStatus.VOIDED, PaymentStatus.DECLINED):
        if order.status is Status.FAILED:
            change_status(draft, Status.PROCESSING)
        charges.charge_again(draft)
    elif (job is None or job.dead_at is None or job.kind is JobKind.REFUND) and refunds.retry(draft):
        return
    elif job is not None and job.dead_at is not None:
        draft.change("job.revived", Changes(last_error=None))
        fence = draft.order.version * FENCES_PER_VERSION
        draft.job = replace(job, dead_at=None, due_at=draft.now, claims=0, failures=0, fence=fence)
    elif job is not None and job.kind is JobKind.REPORT:
        draft.change("job.revived", Changes(last_error=None))
        draft.go_on(JobKind.FULFIL)
    elif order.status is Status.PAYMENT_FAILED:
        change_status(draft, Status.PAYMENT_PROCESSING)
    elif order.status is Status.FAILED:
        change_status(draft, Status.PROCESSING)
    else:
        raise Conflict(f"Order {order.order_id} is {order.status}; only a failed or parked order can be retried")


def delete(draft: Draft) -> Decision:
    """Remove the order, unless money is in flight or was taken for nothing yet."""
    order = draft.order
    _check_money(order, "be deleted")
    moving = order.charging or order.refunding_minor
    if moving or order.payment_status in (PaymentStatus.AUTHORIZED, PaymentStatus.ACTION_REQUIRED):
        raise MoneyInFlight(f"Order {order.order_id} cannot be deleted while its money is on the way; try again")
    if order.captured_minor > order.refunded_minor and not (order.at_rest and order.completed_at):
        raise MoneyInFlight(f"Order {order.order_id} is paid and not complete: cancel it before deleting it")
    draft.change("order.deleted", Changes())
    return Decision(None, None, draft.events)
