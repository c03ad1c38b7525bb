"""What each command changes, decided purely.

No clock, no randomness, no I/O: `now` is handed in, ids and delays come with the commands. An order's row is by
construct the replay of its events: `decide` changes an order only through events.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from expediter.errors import (
    DuplicateOrder,
    OrderNotFound,
    StaleLease,
)
from expediter.orders import by_hand
from expediter.orders.commands import (
    CancelOrder,
    Change,
    ChangeStatus,
    ClaimJob,
    Command,
    DeleteOrder,
    FailJob,
    FulfilmentOutcome,
    ParkJob,
    PlaceOrder,
    RecordFulfilment,
    RecordPayment,
    RecordRefund,
    RecordRefusal,
    ReleaseJob,
    ReportFulfilment,
    RetryOrder,
    WorkerCommand,
)
from expediter.orders.draft import FENCES_PER_VERSION, Decision, Draft
from expediter.orders.events import Changes, Event, Placed
from expediter.orders.order import (
    NEVER,
    Attempt,
    Job,
    JobKind,
    Order,
    PaymentOutcome,
    PaymentStatus,
    Stages,
    Status,
    gateway_key,
)


def decide(order: Order | None, job: Job | None, command: Command, now: int) -> Decision:
    """Return what `command` changes at `now` in `order` with its `job` (both None: there is no such order).

    Raises OrderNotFound, DuplicateOrder, IllegalTransition, MoneyInFlight, PreconditionFailed, Conflict; for a
    worker whose lease is gone, StaleLease. Applying one placing, claiming or recording command twice changes
    nothing the second time: it is refused.
    """
    if isinstance(command, PlaceOrder):
        if order is not None:
            raise DuplicateOrder(command.order_id)
        return _place(command, now)
    if order is None:
        if isinstance(command, (WorkerCommand, ClaimJob)):
            raise StaleLease(f"order {command.order_id} is gone")
        raise OrderNotFound(command.order_id)
    if isinstance(command, Change):
        by_hand.check_version(order, command.if_version)
    draft = Draft(order, job, now)
    match command:
        case ClaimJob():
            _claim(draft, _due(draft, now), command)
        case RecordPayment():
            _record_payment(draft, _held(draft, command, JobKind.CHARGE), command)
        case RecordFulfilment():
            _record_fulfilment(draft, _held(draft, command, JobKind.FULFIL), command)
        case RecordRefund():
            _record_refund(draft, _held(draft, command, JobKind.REFUND), command)
        case ReleaseJob():
            _release(draft, _held(draft, command, None), command.retry_in)
        case FailJob():
            _fail_job(draft, _held(draft, command, None), command)
        case ParkJob():
            _park(draft, _held(draft, command, None), command.error, command.outcome)
        case ChangeStatus():
            by_hand.change_status(draft, command.status, through=command.through)
        case CancelOrder():
            by_hand.cancel(draft)
        case ReportFulfilment():
            by_hand.report(draft, command)
        case RetryOrder():
            by_hand.retry(draft)
        case DeleteOrder():
            return by_hand.delete(draft)
        case RecordRefusal():
            draft.change("command.refused", Changes(last_error=command.error))
        case _:
            raise TypeError(f"not a command: {command!r}")
    return draft.done()


def _place(command: PlaceOrder, now: int) -> Decision:
    # By a clock that may be ahead of the database's: no order is made in the future.
    created_at = min(now, command.placed_at or now)
    due = command.stages is not Stages.FULFILMENT and command.total_minor > 0
    order = Order(
        order_id=command.order_id,
        status=Status.PENDING,
        payment_status=PaymentStatus.PENDING if due else PaymentStatus.NOT_REQUIRED,
        stages=command.stages,
        customer_id=command.customer_id,
        customer_name=command.customer_name,
        currency=command.currency,
        total_minor=command.total_minor,
        priced=command.priced,
        metadata=command.metadata,
        payment_token=command.payment_token,
        version=1,
        created_at=created_at,
        updated_at=created_at,
    )
    # With nothing to pay there is no charge to wait for, nor a gateway that could be away.
    free = JobKind.CONFIRM if command.stages is Stages.PAYMENT else JobKind.FULFIL
    kind = JobKind.CHARGE if due else free
    job = Job(kind=kind, due_at=now, created_at=now, fence=FENCES_PER_VERSION)
    told = order if order.payment_token is None else replace(order, payment_token=None)
    event = Event(command.order_id, 1, created_at, "order.placed", Placed(told, command.lines))
    return Decision(order, job, (event,), (), command.lines)


def _due(draft: Draft, now: int) -> Job:
    job = draft.job
    if job is None or job.dead_at is not None or job.due_at > now:
        raise StaleLease(f"order {draft.order.order_id} has no due job")
    return job


def _held(draft: Draft, command: WorkerCommand, kind: JobKind | None) -> Job:
    """Return the job if `command` comes from the worker that holds it and whose lease still runs."""
    job = draft.job
    if (
        job is None
        or job.holder is None
        or job.fence != command.fence
        or job.due_at <= draft.now
        or (kind is not None and job.kind is not kind)
    ):
        raise StaleLease(f"order {command.order_id} is no longer held under fence {command.fence}")
    return job


#: The statuses in which there is something to do for each kind of job.
_CLAIMED_IN: Mapping[JobKind, frozenset[Status]] = {
    JobKind.CHARGE: frozenset({Status.PENDING, Status.PAYMENT_PROCESSING}),
    JobKind.CONFIRM: frozenset({Status.PENDING}),
    JobKind.FULFIL: frozenset({Status.PENDING, Status.CONFIRMED, Status.PROCESSING}),
    JobKind.REPORT: frozenset({Status.PROCESSING}),
    JobKind.REFUND: frozenset({Status.CANCELLED}),
}


def _claim(draft: Draft, job: Job, command: ClaimJob) -> None:
    if job.claims >= command.claims_max:
        _park(draft, job, f"gave up after {job.claims} claims without an outcome")
        return
    if draft.order.status not in _CLAIMED_IN[job.kind]:
        # It cannot come to this. Should it all the same, nothing is called: least of all the gateway.
        _park(draft, job, f"an order that is {draft.order.status.value} has nothing to {job.kind.value}")
        return
    draft.job = replace(
        job,
        holder=command.holder,
        fence=job.fence + 1,
        claims=job.claims + 1,
        due_at=draft.now + command.lease,
    )
    match job.kind:
        case JobKind.CHARGE:
            _start_charge(draft, command.key_prefix)
        case JobKind.CONFIRM:
            _skip_payment(draft)
        case JobKind.FULFIL:
            draft.start_fulfilment()
        case JobKind.REPORT:
            draft.change("fulfilment.overdue", Changes(last_error="whoever has it is late with the report"))
            draft.job = replace(job, due_at=NEVER, fence=job.fence + 1)
        case JobKind.REFUND:
            if draft.order.charging:
                draft.end_attempt(PaymentOutcome.UNKNOWN, None, "the worker went away during the refund")
            # The same key again: whatever became of the last call, the gateway refunds once.
            changes = Changes(charging=True)
            _start_attempt(draft, "refund", "refund.started", changes, command.key_prefix)


def _skip_payment(draft: Draft) -> None:
    """With nothing to pay on the payment road it passes through the same statuses, and no gateway is called."""
    changes = Changes(status=Status.PAYMENT_PROCESSING, processing_started_at=draft.now)
    draft.change("payment.skipped", changes)
    draft.change("order.confirmed", Changes(status=Status.CONFIRMED, completed_at=draft.now))
    draft.job = None


def _start_charge(draft: Draft, key_prefix: str) -> None:
    order = draft.order
    if order.charging:
        # The last holder stored its intent and never came back: nobody knows what the gateway did.
        draft.end_attempt(PaymentOutcome.UNKNOWN, None, "the worker went away during the charge")
        draft.change("payment.unknown", Changes(charging=False, payment_status=PaymentStatus.UNKNOWN))
    elif order.payment_status is not PaymentStatus.UNKNOWN:
        changes = Changes(
            status=Status.PAYMENT_PROCESSING,
            charging=True,
            charge_started_at=draft.now,
            processing_started_at=order.processing_started_at or draft.now,
        )
        _start_attempt(draft, "charge", "payment.started", changes, key_prefix)


def _start_attempt(draft: Draft, action: str, type: str, changes: Changes, key_prefix: str) -> None:
    order = draft.order
    number = order.attempts + 1
    draft.change(type, replace(changes, attempts=number))
    draft.attempts += (
        Attempt(
            order_id=order.order_id,
            number=number,
            action=action,
            gateway_key=gateway_key(order.order_id, order.generation, key_prefix),
            amount_minor=order.total_minor,
            currency=order.currency,
            started_at=draft.now,
        ),
    )


#: The answers of a gateway that leave nothing open.
_DEFINITE = frozenset({PaymentOutcome.SUCCEEDED, PaymentOutcome.DECLINED})


def _record_payment(draft: Draft, job: Job, command: RecordPayment) -> None:
    order = draft.order
    failures = job.failures + command.counts
    if order.payment_status is PaymentStatus.UNKNOWN and command.outcome not in _DEFINITE:
        # Only the gateway's yes or no settles what is unknown; anything less leaves it so.
        _reschedule(draft, job, command.retry_in, failures)
        return
    if command.outcome is PaymentOutcome.NOT_SENT:
        _release(draft, job, command.retry_in)
        return
    draft.end_attempt(command.outcome, command.reference, command.error)
    match command.outcome:
        case PaymentOutcome.SUCCEEDED:
            _paid(draft, job, command.lease)
        case PaymentOutcome.UNKNOWN:
            changes = Changes(charging=False, payment_status=PaymentStatus.UNKNOWN, last_error=command.error)
            draft.change("payment.unknown", changes)
            _reschedule(draft, job, command.retry_in, failures)
        case PaymentOutcome.UNAVAILABLE if failures < command.failures_max:
            changes = Changes(charging=False, payment_status=PaymentStatus.PENDING, last_error=command.error)
            draft.change("payment.unavailable", changes)
            _reschedule(draft, job, command.retry_in, failures)
        case _:
            # A definite decline uses its key up; after mere unavailability the next try keeps the same key.
            declined = command.outcome is PaymentOutcome.DECLINED
            changes = Changes(
                status=Status.PAYMENT_FAILED,
                payment_status=PaymentStatus.DECLINED,
                charging=False,
                generation=order.generation + declined,
                last_error=command.error,
            )
            draft.change("payment.failed", changes)
            draft.job = None


def _paid(draft: Draft, job: Job, lease: int) -> None:
    changes = Changes(status=Status.CONFIRMED, payment_status=PaymentStatus.PAID, charging=False, last_error=None)
    if draft.order.stages is Stages.PAYMENT:
        draft.change("payment.succeeded", replace(changes, completed_at=draft.now))
        draft.job = None
        return
    draft.change("payment.succeeded", changes)
    if lease:
        draft.start_fulfilment()
    draft.next_job(JobKind.FULFIL)
    if lease and draft.job is not None:
        draft.job = replace(draft.job, holder=job.holder, claims=1, due_at=draft.now + lease)


def _reschedule(draft: Draft, job: Job, retry_in: int, failures: int) -> None:
    draft.job = replace(job, holder=None, due_at=draft.now + retry_in, claims=0, failures=failures)


def _record_fulfilment(draft: Draft, job: Job, command: RecordFulfilment) -> None:
    failures = job.failures + 1
    if command.outcome is FulfilmentOutcome.DONE:
        changes = Changes(status=Status.COMPLETED, completed_at=draft.now, last_error=None)
        draft.change("order.completed", changes)
        draft.job = None
    elif command.outcome is FulfilmentOutcome.TAKEN:
        draft.change("fulfilment.taken", Changes(last_error=None))
        draft.next_job(JobKind.REPORT)
        assert draft.job is not None
        due_at = NEVER if command.report_in is None else draft.now + command.report_in
        draft.job = replace(draft.job, due_at=due_at)
    elif command.outcome is FulfilmentOutcome.UNAVAILABLE and failures < command.failures_max:
        draft.change("fulfilment.unavailable", Changes(last_error=command.error))
        _reschedule(draft, job, command.retry_in, failures)
    else:
        draft.change("fulfilment.failed", Changes(status=Status.FAILED, last_error=command.error))
        draft.job = None


def _record_refund(draft: Draft, job: Job, command: RecordRefund) -> None:
    draft.end_attempt(command.outcome, command.reference, command.error)
    if command.outcome is PaymentOutcome.SUCCEEDED:
        changes = Changes(charging=False, payment_status=PaymentStatus.REFUNDED, last_error=None)
        draft.change("refund.succeeded", changes)
        draft.job = None
    else:
        draft.change("refund.unavailable", Changes(charging=False, last_error=command.error))
        _reschedule(draft, job, command.retry_in, job.failures + 1)


def _release(draft: Draft, job: Job, retry_in: int) -> None:
    if draft.order.charging:
        draft.end_attempt(PaymentOutcome.NOT_SENT, None, None)
        draft.change("payment.postponed", Changes(charging=False))
    draft.job = replace(job, holder=None, due_at=draft.now + retry_in, claims=job.claims - 1)


def _fail_job(draft: Draft, job: Job, command: FailJob) -> None:
    # `charging` stays: if a call may have gone out, the next claim finds the open intent and settles it first.
    draft.change("job.failed", Changes(last_error=command.error))
    draft.job = replace(job, holder=None, due_at=draft.now + command.retry_in, failures=job.failures + 1)


def _park(draft: Draft, job: Job, error: str, outcome: PaymentOutcome = PaymentOutcome.UNKNOWN) -> None:
    changes = Changes(last_error=error)
    if draft.order.charging:
        draft.end_attempt(outcome, None, error)
        changes = replace(changes, charging=False)
        if job.kind is JobKind.CHARGE:
            changes = replace(changes, payment_status=PaymentStatus.UNKNOWN)
    draft.change("job.parked", changes)
    draft.job = replace(job, holder=None, due_at=NEVER, dead_at=draft.now, fence=job.fence + 1)
