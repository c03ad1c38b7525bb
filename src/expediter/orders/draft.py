"""An order while a command is being decided on."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from expediter.errors import IllegalTransition
from expediter.orders.events import Changes, Event, evolve
from expediter.orders.order import (
    TRANSITIONS,
    Attempt,
    AttemptResult,
    Job,
    JobKind,
    Line,
    Order,
    PaymentOutcome,
    Status,
)


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What a command changes: the order and job afterwards (None: no more), and the facts to store."""

    order: Order | None
    job: Job | None
    events: tuple[Event, ...] = ()
    attempts: tuple[Attempt | AttemptResult, ...] = ()
    lines: tuple[Line, ...] = ()


#: Claims between two versions of an order never reach this, so a fence that starts at version x this only grows.
FENCES_PER_VERSION = 1 << 20


class Draft:
    """An order being decided on: collects events, and keeps the order their replay at every step."""

    __slots__ = ("attempts", "events", "job", "now", "order")

    def __init__(self, order: Order, job: Job | None, now: int) -> None:
        """Start from the order and job as they are."""
        self.order = order
        self.job = job
        # A clock that stepped back must not make an order younger than its last change.
        self.now = max(now, order.updated_at)
        self.events: tuple[Event, ...] = ()
        self.attempts: tuple[Attempt | AttemptResult, ...] = ()

    def change(self, type: str, data: Changes) -> None:
        """Add the event `type` and let it change the order. Raises IllegalTransition for what is no move."""
        order, wanted = self.order, data.status
        if wanted is not UNSET and wanted is not order.status and wanted not in TRANSITIONS[order.status]:
            raise IllegalTransition(order.order_id, order.status, wanted, TRANSITIONS[order.status])
        number = self.order.version + 1
        self.events += (Event(self.order.order_id, number, self.now, type, data),)
        self.order = evolve(self.order, number, self.now, data)

    def next_job(self, kind: JobKind) -> None:
        """Queue a new job, due now; whoever held the last one is fenced off."""
        fence = self.order.version * FENCES_PER_VERSION
        self.job = Job(kind=kind, due_at=self.now, created_at=self.now, fence=fence)

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
        return Decision(self.order, self.job, self.events, self.attempts)
