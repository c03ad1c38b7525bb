"""An order while a command is being decided on."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from expediter.errors import IllegalTransition
from expediter.orders.events import Changes, Event, evolve
from expediter.orders.order import (
    NEVER,
    PARKED,
    TRANSITIONS,
    Attempt,
    AttemptResult,
    Job,
    JobKind,
    Line,
    Order,
    OrderRefund,
    PaymentOutcome,
    PaymentStatus,
    RefundStatus,
    Status,
    gateway_key,
)


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What a command changes: the order and job afterwards (None: no more), and the facts to store."""

    order: Order | None
    job: Job | None
    events: tuple[Event, ...] = ()
    attempts: tuple[Attempt | AttemptResult, ...] = ()
    lines: tuple[Line, ...] = ()
    refunds: tuple[OrderRefund, ...] = ()


#: Claims between two versions of an order never reach this, so a fence that starts at version x this only grows.
FENCES_PER_VERSION = 1 << 20


class Draft:
    """An order being decided on: collects events, and keeps the order their replay at every step.

    `refunds` has those of its refunds that are open, by their numbers.
    """

    __slots__ = ("attempts", "events", "job", "now", "order", "refunds", "settled")

    def __init__(self, order: Order, job: Job | None, now: int, refunds: Iterable[OrderRefund] = ()) -> None:
        """Start from the order, its job and its refunds as they are."""
        self.order = order
        self.job = job
        # A clock that stepped back must not make an order younger than its last change.
        self.now = max(now, order.updated_at)
        self.events: tuple[Event, ...] = ()
        self.attempts: tuple[Attempt | AttemptResult, ...] = ()
        self.refunds = {refund.number: refund for refund in refunds if refund.open}
        self.settled: dict[int, OrderRefund] = {}

    def change(self, type: str, data: Changes) -> None:
        """Add the event `type` and let it change the order. Raises IllegalTransition for what is no move."""
        order, wanted = self.order, data.status
        if wanted is not UNSET and wanted is not order.status and wanted not in TRANSITIONS[order.status]:
            raise IllegalTransition(order.order_id, order.status, wanted, TRANSITIONS[order.status])
        number = self.order.version + 1
        self.events += (Event(self.order.order_id, number, self.now, type, data),)
        self.order = evolve(self.order, number, self.now, data)

    def go_on(self, kind: JobKind | None, due_at: int | None = None) -> None:
        """Queue what the order's road needs next (None: nothing), due now; it waits behind money that is to move.

        Whoever held the last job is fenced off, unless that was about the money.
        """
        if kind is not None and due_at is None:
            due_at = self.now
        job = self.job
        money = self._money_due()
        if job is not None and self._goes_first(job) and (job.dead_at is None or job.kind is JobKind.CHARGE):
            self.job = replace(job, then_kind=kind, then_due_at=due_at)
        elif money is not None:
            self.job = self._new_job(money, self.now, kind, due_at)
        elif kind is not None and due_at is not None:
            self.job = self._new_job(kind, due_at)
        elif self.refunds:
            self.job = self._new_job(JobKind.REFUND, PARKED)
        else:
            self.job = None

    def complete(self, reference: str | UnsetType = UNSET) -> None:
        """The order is carried out: what was reserved is captured now, and what is not paid is for a person."""
        unpaid = self.order.payment_status in (PaymentStatus.VOIDED, PaymentStatus.DECLINED)
        error = UNSET if unpaid else None
        changes = Changes(status=Status.COMPLETED, completed_at=self.now, last_error=error, reference=reference)
        self.change("order.completed", changes)
        if unpaid:
            self.park(JobKind.CAPTURE)
        else:
            authorized = self.order.payment_status is PaymentStatus.AUTHORIZED
            self.go_on(JobKind.CAPTURE if authorized else None)

    def try_later(self, job: Job, retry_in: int, failures: int, *, claims: int = 0) -> None:
        """Give the job back, to be tried again; money goes first."""
        self.job = replace(job, holder=None, due_at=self.now + retry_in, claims=claims, failures=failures)
        self.money_first()

    def start_attempt(
        self, action: str, type: str, changes: Changes, key_prefix: str, amount_minor: int | None = None
    ) -> None:
        """Store the intent to call the gateway; `amount_minor` None: about the order's total."""
        order = self.order
        number = order.attempts + 1
        self.change(type, replace(changes, attempts=number))
        self.attempts += (
            Attempt(
                order_id=order.order_id,
                number=number,
                action=action,
                gateway_key=gateway_key(order.order_id, order.generation, key_prefix),
                amount_minor=order.total_minor if amount_minor is None else amount_minor,
                currency=order.currency,
                started_at=self.now,
            ),
        )

    def money_moved(self) -> None:
        """The job about the money is done: what waits behind it comes next."""
        job = self.job
        assert job is not None
        self.job = None
        self.go_on(job.then_kind, job.then_due_at)

    def _money_due(self) -> JobKind | None:
        """Return what is to be done about the money, beside the road."""
        if self.order.charged_late:
            return JobKind.CHARGE
        pending = any(refund.status is RefundStatus.PENDING for refund in self.refunds.values())
        return JobKind.REFUND if pending else None

    def money_first(self) -> None:
        """Put what is to be done about the money in front of what the road needs next.

        If a worker is at that right now, it comes when that is done.
        """
        job, kind = self.job, self._money_due()
        if kind is None:
            return
        if job is None or (job.kind is JobKind.REFUND and job.dead_at is not None):
            self.job = self._new_job(kind, self.now)
        elif not self._goes_first(job) and (job.holder is None or job.due_at <= self.now):
            due_at = PARKED if job.dead_at is not None else job.due_at
            self.job = self._new_job(kind, self.now, job.kind, due_at)

    def park(self, kind: JobKind) -> None:
        """Set a job of this kind aside for a person."""
        self.job = self._new_job(kind, PARKED)

    def _goes_first(self, job: Job) -> bool:
        return job.kind is JobKind.REFUND or (job.kind is JobKind.CHARGE and self.order.charged_late)

    def _new_job(
        self, kind: JobKind, due_at: int, then_kind: JobKind | None = None, then_due_at: int | None = None
    ) -> Job:
        parked = due_at == PARKED
        return Job(
            kind=kind,
            due_at=NEVER if parked else due_at,
            created_at=self.now,
            fence=self.order.version * FENCES_PER_VERSION,
            dead_at=self.now if parked else None,
            then_kind=then_kind,
            then_due_at=then_due_at,
        )

    def enter_refund(self, refund: OrderRefund) -> None:
        """Take note of a new refund, or of what became of one."""
        self.settled[refund.number] = refund
        if refund.open:
            self.refunds[refund.number] = refund
        else:
            self.refunds.pop(refund.number, None)

    def start_fulfilment(self) -> None:
        """Move the order to `processing`, unless it is there."""
        if self.order.status is not Status.PROCESSING:
            started = self.order.processing_started_at or self.now
            changes = Changes(status=Status.PROCESSING, processing_started_at=started, last_error=None)
            self.change("fulfilment.started", changes)

    def end_attempt(self, outcome: PaymentOutcome, reference: str | None, error: str | None) -> None:
        """Complete the latest attempt."""
        self.attempts += (
            AttemptResult(
                order_id=self.order.order_id,
                number=self.order.attempts,
                finished_at=self.now,
                outcome=outcome,
                reference=reference,
                error=error,
            ),
        )

    def done(self) -> Decision:
        """Return what was decided."""
        return Decision(self.order, self.job, self.events, self.attempts, (), tuple(self.settled.values()))
