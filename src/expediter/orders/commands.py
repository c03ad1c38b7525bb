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


class RefundOrder(Change, frozen=True, gc=False, kw_only=True):
    """Give back `amount` (decimal text in the order's currency; None: all that is left) of what was paid.

    An amount that was a `number` may have the noise of a sum of floats. One `by_hand` was made outside already,
    under the name `reference`.
    """

    amount: str | None = None
    number: bool = False
    reason: str | None = None
    by_hand: bool = False
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

    With ACTION_REQUIRED, `action` is JSON text: what the customer must do until `action_until`. `counts` is False
    for a probe of an open breaker, which spends no attempt; `lease` above 0 keeps the job for this worker, which
    fulfils at once.
    """

    counts: bool = True
    failures_max: int = 3
    lease: int = 0
    action: str | None = None
    action_until: int | None = None


class RecordFulfilment(WorkerCommand, frozen=True, gc=False, kw_only=True):
    """Record what the fulfiller said; who has taken the order reports within `report_in` (None: some time)."""

    outcome: FulfilmentOutcome
    report_in: int | None = None
    error: str | None = None
    retry_in: int = 0
    failures_max: int = 5


class RecordRefund(RecordCall, frozen=True, gc=False, kw_only=True):
    """Record what the gateway said to the refund of this number; anything but success is tried again."""

    refund: int


class RecordReserved(RecordCall, frozen=True, gc=False, kw_only=True):
    """Record what became of reserved money that was to be captured or let go of.

    SUCCEEDED says that it is captured, VOIDED that it is not, and never will be; anything else is tried again.
    """


class HearGateway(Command, frozen=True, gc=False, kw_only=True):
    """Take what the gateway says of a payment by itself: it may come twice, late, early, or out of order.

    `key` is the payment's, `outcome` where it is (UNKNOWN: it is under way); amounts are whole minor units. A
    customer who must act has `action_in` microseconds, and not longer than until `action_until` (the gateway's
    limit).
    """

    key: str
    key_prefix: str
    outcome: PaymentOutcome
    amount_minor: int
    currency: str
    captured_minor: int = 0
    refunded_minor: int = 0
    reference: str | None = None
    error: str | None = None
    action: str | None = None
    action_in: int = 900_000_000
    action_until: int | None = None


class HearDispute(Command, frozen=True, gc=False, kw_only=True):
    """Take note that the customer disputes the payment."""

    reference: str
    reason: str


class ReleaseJob(WorkerCommand, frozen=True, gc=False, kw_only=True):
    """Give a job back whose outside call was never made; it costs the order nothing."""

    retry_in: int = 0


class FailJob(WorkerCommand, frozen=True, gc=False, kw_only=True):
    """Give a job back after an error that nobody foresaw; the claim stays counted."""

    error: str
    retry_in: int


class ParkJob(WorkerCommand, frozen=True, gc=False, kw_only=True):
    """Set a job aside for a person to look at; `outcome` is that of the call to the gateway, if one is open.

    `refund` is the number of the refund that the job was about (None: the next one).
    """

    error: str
    outcome: PaymentOutcome = PaymentOutcome.UNKNOWN
    refund: int | None = None
