"""What each command changes, decided purely.

No clock, no randomness, no I/O: `now` is handed in, ids and delays come with the commands. An order's row is by
construct the replay of its events: `decide` changes an order only through events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from expediter.errors import (
    DuplicateOrder,
    OrderNotFound,
    StaleLease,
)
from expediter.orders import by_hand, charges, refunds
from expediter.orders.commands import (
    CancelOrder,
    Change,
    ChangeStatus,
    ClaimJob,
    Command,
    DeleteOrder,
    FailJob,
    FulfilmentOutcome,
    HearDispute,
    HearGateway,
    ParkJob,
    PlaceOrder,
    RecordFulfilment,
    RecordPayment,
    RecordRefund,
    RecordRefusal,
    RecordReserved,
    RefundOrder,
    ReleaseJob,
    ReportFulfilment,
    RetryOrder,
    WorkerCommand,
)
from expediter.orders.draft import FENCES_PER_VERSION, Decision, Draft
from expediter.orders.events import Changes, Event, Placed
from expediter.orders.order import (
    NEVER,
    Job,
    JobKind,
    Order,
    OrderRefund,
    PaymentOutcome,
    PaymentStatus,
    Stages,
    Status,
)


def decide(
    order: Order | None, job: Job | None, command: Command, now: int, refunds_open: Iterable[OrderRefund] = ()
) -> Decision:
    """Return what `command` changes at `now` in `order` with its `job` (both None: there is no such order).

    `refunds_open` are those of its refunds that are not settled.

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
    draft = Draft(order, job, now, refunds_open)
    match command:
        case ClaimJob():
            _claim(draft, _due(draft, now), command)
        case RecordPayment():
            charges.record(draft, _held(draft, command, JobKind.CHARGE), command)
        case RecordReserved():
            charges.record_reserved(draft, _held(draft, command, *_RESERVED), command)
        case HearGateway():
            charges.hear(draft, command)
        case HearDispute():
            charges.dispute(draft, command)
        case RecordFulfilment():
            _record_fulfilment(draft, _held(draft, command, JobKind.FULFIL), command)
        case RecordRefund():
            refunds.record(draft, _held(draft, command, JobKind.REFUND), command)
        case ReleaseJob():
            charges.release(draft, _held(draft, command), command.retry_in)
        case FailJob():
            _fail_job(draft, _held(draft, command), command)
        case ParkJob():
            _park(draft, _held(draft, command), command.error, command.outcome, command.refund)
        case ChangeStatus():
            by_hand.change_status(draft, command.status, through=command.through)
        case CancelOrder():
            by_hand.cancel(draft)
        case RefundOrder():
            refunds.request(draft, command)
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


def _held(draft: Draft, command: WorkerCommand, *kinds: JobKind) -> Job:
    """Return the job (of these kinds; none: any) if `command` comes from the worker that still holds it."""
    job = draft.job
    if (
        job is None
        or job.holder is None
        or job.fence != command.fence
        or job.due_at <= draft.now
        or (kinds and job.kind not in kinds)
    ):
        raise StaleLease(f"order {command.order_id} is no longer held under fence {command.fence}")
    return job


#: The statuses in which there is something to do for each kind of job.
_CLAIMED_IN: Mapping[JobKind, frozenset[Status]] = {
    JobKind.CHARGE: frozenset({Status.PENDING, Status.PAYMENT_PROCESSING}),
    JobKind.CONFIRM: frozenset({Status.PENDING}),
    JobKind.FULFIL: frozenset({Status.PENDING, Status.CONFIRMED, Status.PROCESSING}),
    JobKind.REPORT: frozenset({Status.PROCESSING}),
    JobKind.CAPTURE: frozenset({Status.COMPLETED, Status.CONFIRMED}),
    JobKind.VOID: frozenset({Status.CANCELLED}),
    JobKind.REFUND: frozenset(Status) - {Status.PENDING, Status.PAYMENT_PROCESSING, Status.PAYMENT_FAILED},
}
_RESERVED = (JobKind.CAPTURE, JobKind.VOID)


def _has_work(order: Order, kind: JobKind) -> bool:
    """Return whether there is something to do for a job of this kind: the gateway is never called for nothing."""
    if kind is JobKind.CHARGE and order.charged_late:
        return not order.captured_minor
    if kind is JobKind.CAPTURE and order.payment_status is not PaymentStatus.AUTHORIZED:
        return False
    return order.status in _CLAIMED_IN[kind]


def _claim(draft: Draft, job: Job, command: ClaimJob) -> None:
    if job.claims >= command.claims_max:
        _park(draft, job, f"gave up after {job.claims} claims without an outcome")
        return
    if not _has_work(draft.order, job.kind):
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
            charges.start_charge(draft, command.key_prefix)
        case JobKind.CAPTURE | JobKind.VOID:
            charges.start_reserved(draft, job.kind, command.key_prefix)
        case JobKind.CONFIRM:
            _skip_payment(draft)
        case JobKind.FULFIL:
            draft.start_fulfilment()
        case JobKind.REPORT:
            draft.change("fulfilment.overdue", Changes(last_error="whoever has it is late with the report"))
            draft.job = replace(job, due_at=NEVER, fence=job.fence + 1)
        case JobKind.REFUND:
            if not refunds.start(draft, command.key_prefix):
                refunds.park(draft, "there is no refund to make", PaymentOutcome.NOT_SENT)


def _skip_payment(draft: Draft) -> None:
    """With nothing to pay on the payment road it passes through the same statuses, and no gateway is called."""
    changes = Changes(status=Status.PAYMENT_PROCESSING, processing_started_at=draft.now)
    draft.change("payment.skipped", changes)
    draft.change("order.confirmed", Changes(status=Status.CONFIRMED, completed_at=draft.now))
    draft.job = None


def _record_fulfilment(draft: Draft, job: Job, command: RecordFulfilment) -> None:
    failures = job.failures + 1
    if command.outcome is FulfilmentOutcome.DONE:
        draft.complete()
    elif command.outcome is FulfilmentOutcome.TAKEN:
        draft.change("fulfilment.taken", Changes(last_error=None))
        draft.go_on(JobKind.REPORT, NEVER if command.report_in is None else draft.now + command.report_in)
    elif command.outcome is FulfilmentOutcome.UNAVAILABLE and failures < command.failures_max:
        draft.change("fulfilment.unavailable", Changes(last_error=command.error))
        draft.try_later(job, command.retry_in, failures)
    else:
        draft.change("fulfilment.failed", Changes(status=Status.FAILED, last_error=command.error))
        draft.go_on(None)


def _fail_job(draft: Draft, job: Job, command: FailJob) -> None:
    # `charging` stays: if a call may have gone out, the next claim finds the open intent and settles it first.
    draft.change("job.failed", Changes(last_error=command.error))
    draft.try_later(job, command.retry_in, job.failures + 1, claims=job.claims)


def _park(
    draft: Draft,
    job: Job,
    error: str,
    outcome: PaymentOutcome = PaymentOutcome.UNKNOWN,
    refund: int | None = None,
) -> None:
    if job.kind is JobKind.REFUND:
        refunds.park(draft, error, outcome, refund)
        return
    changes = Changes(last_error=error)
    if draft.order.charging:
        # Of a charge only the gateway's own word is believed.
        charge = job.kind is JobKind.CHARGE
        draft.end_attempt(PaymentOutcome.UNKNOWN if charge else outcome, None, error)
        changes = replace(changes, charging=False)
        if charge:
            changes = replace(changes, payment_status=PaymentStatus.UNKNOWN)
    draft.change("job.parked", changes)
    draft.job = replace(job, holder=None, due_at=NEVER, dead_at=draft.now, fence=job.fence + 1)
    draft.money_first()
