"""Everything that changes an order is a command; `decisions.decide` says what each one changes."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from expediter.orders.order import Line, PaymentOutcome, Stages, Status


class FulfilmentOutcome(StrEnum):
    """What became of one call to the fulfiller."""

    DONE = "done"
    TAKEN = "taken"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"


class Command(msgspec.Struct, frozen=True, gc=False, kw_only=True, tag=True):
    """What every command has: the order that it is about. Its JSON says which it is by the name of its class."""

    order_id: str


class PlaceOrder(Command, frozen=True, gc=False, kw_only=True):
    """Take a new order. `fresh` says that the server has just made the id, so that nobody can have it yet.

    `placed_at` (microseconds since 1970) is when it was accepted, if that was before it is stored.
    """

    fresh: bool
    customer_id: int | str | None
    customer_name: str | None
    currency: str
    total_minor: int
    priced: bool
    lines: tuple[Line, ...]
    metadata: str
    payment_token: str | None
    stages: Stages
    placed_at: int | None = None


class Change(Command, frozen=True, gc=False, kw_only=True):
    """What people do to an order by hand; with `if_version` only while it has that version."""

    if_version: int | None = None


class ChangeStatus(Change, frozen=True, gc=False, kw_only=True):
    """Move an order by hand, through the lifecycle table; `through`: by two moves where one is not enough."""

    status: Status
    through: bool = False


class CancelOrder(Change, frozen=True, gc=False, kw_only=True):
    """Cancel an order; what was charged is refunded."""


class ReportFulfilment(Change, frozen=True, gc=False, kw_only=True):
    """Say that an order is carried out, or cannot be; `reference` is the reporter's own name for it."""

    done: bool
    reason: str | None = None
    reference: str | None = None


class RetryOrder(Change, frozen=True, gc=False, kw_only=True):
    """Try again what failed, or take up a parked job."""


class DeleteOrder(Change, frozen=True, gc=False, kw_only=True):
    """Remove an order; its events stay, its id is never used again."""


class RecordRefusal(Command, frozen=True, gc=False, kw_only=True):
    """Record that a queued command was refused after its client had been answered."""

    error: str


class ClaimJob(Command, frozen=True, gc=False, kw_only=True):
    """Lease the order's due job and take its first step (store the intent to charge, start fulfilment).

    `key_prefix` goes into the key of the call to the gateway.
    """

    holder: str
    lease: int
    claims_max: int
    key_prefix: str = ""


class WorkerCommand(Command, frozen=True, gc=False, kw_only=True):
    """What every report of a worker has: the fence that it holds the job under."""

    fence: int


class RecordCall(WorkerCommand, frozen=True, gc=False, kw_only=True):
    """Record what the gateway said; `retry_in` is the back-off (microseconds) if it must be tried again."""

    outcome: PaymentOutcome
    reference: str | None = None
    error: str | None = None
    retry_in: int = 0


class RecordPayment(RecordCall, frozen=True, gc=False, kw_only=True):
    """Record what the gateway said to a charge.

    `counts` is False for a probe of an open breaker, which spends no attempt; `lease` above 0 keeps the job for
    this worker, which fulfils at once.
    """

    counts: bool = True
    failures_max: int = 3
    lease: int = 0


class RecordFulfilment(WorkerCommand, frozen=True, gc=False, kw_only=True):
    """Record what the fulfiller said; who has taken the order reports within `report_in` (None: some time)."""

    outcome: FulfilmentOutcome
    report_in: int | None = None
    error: str | None = None
    retry_in: int = 0
    failures_max: int = 5


class RecordRefund(RecordCall, frozen=True, gc=False, kw_only=True):
    """Record what the gateway said to a refund; anything but success is tried again."""


class ReleaseJob(WorkerCommand, frozen=True, gc=False, kw_only=True):
    """Give a job back whose outside call was never made; it costs the order nothing."""

    retry_in: int = 0


class FailJob(WorkerCommand, frozen=True, gc=False, kw_only=True):
    """Give a job back after an error that nobody foresaw; the claim stays counted."""

    error: str
    retry_in: int


class ParkJob(WorkerCommand, frozen=True, gc=False, kw_only=True):
    """Set a job aside for a person to look at; `outcome` is that of the call to the gateway, if one is open."""

    error: str
    outcome: PaymentOutcome = PaymentOutcome.UNKNOWN
