"""An order, its lifecycle, and the job that will move it on.

Times are whole microseconds since 1970-01-01 UTC; durations are in microseconds unless the name says otherwise.
"""

import re
import uuid
from collections.abc import Mapping
from enum import StrEnum

import msgspec

#: Most lines that one order may have.
LINES_MAX = 2_000
#: Largest quantity of one line.
QUANTITY_MAX = 1_000_000

#: One second, in the unit of every time here.
MICROSECONDS = 1_000_000
#: The `then_due_at` of a job that is parked, and waits behind another one.
PARKED = -1
#: The `due_at` of a parked job: past every clock, so that no search for due jobs meets it.
NEVER = 1 << 62

_ORDER_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

#: Words that stand where an order id stands in a path, so no order may have them as its id.
RESERVED_IDS = frozenset({"metrics", "status", "populate", "batch", ".", ".."}) | frozenset(
    # Of calls to come: an order that has such an id could not be reached any more.
    {"events", "export", "fulfilment", "import", "keys", "payments", "refunds", "search", "stream", "webhooks"}
)

#: The name space of gateway keys (uuid5): one order and generation has the same key on every machine, for ever.
_KEY_NAMESPACE = uuid.UUID("6f1c5c0e-1d1b-5d57-9d0e-7f2c8a1b9e43")


class Status(StrEnum):
    """Where an order is on its road."""

    PENDING = "pending"
    PAYMENT_PROCESSING = "payment_processing"
    PAYMENT_FAILED = "payment_failed"
    CONFIRMED = "confirmed"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @classmethod
    def _missing_(cls, value: object) -> "Status | None":
        """Take it in any case, as clients write it."""
        return cls._value2member_map_.get(value.lower()) if isinstance(value, str) else None  # type: ignore[return-value]


class PaymentStatus(StrEnum):
    """Where the money of an order is."""

    NOT_REQUIRED = "not_required"
    PENDING = "pending"
    UNKNOWN = "unknown"
    #: The customer must confirm it (3-D Secure and the like).
    ACTION_REQUIRED = "action_required"
    #: Reserved, and captured when the order is completed.
    AUTHORIZED = "authorized"
    PAID = "paid"
    DECLINED = "declined"
    #: Cancelled, and not everything is back yet.
    REFUND_PENDING = "refund_pending"
    PARTIALLY_REFUNDED = "partially_refunded"
    REFUNDED = "refunded"
    #: Cancelled before anything was charged, or what was reserved is let go of, or has expired.
    VOIDED = "voided"


#: Every legal move of an order; anything absent is refused with IllegalTransition.
TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.PENDING: frozenset({Status.PAYMENT_PROCESSING, Status.PROCESSING, Status.CANCELLED}),
    Status.PAYMENT_PROCESSING: frozenset({Status.CONFIRMED, Status.PAYMENT_FAILED, Status.CANCELLED}),
    Status.PAYMENT_FAILED: frozenset({Status.PAYMENT_PROCESSING, Status.CANCELLED}),
    Status.CONFIRMED: frozenset({Status.PROCESSING, Status.CANCELLED}),
    Status.PROCESSING: frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED}),
    Status.FAILED: frozenset({Status.PROCESSING, Status.CANCELLED}),
    Status.COMPLETED: frozenset(),
    Status.CANCELLED: frozenset(),
}


class Stages(StrEnum):
    """The road that an order takes; kept with each order, so that a changed setting moves no old one."""

    PAYMENT_FULFILMENT = "payment,fulfilment"
    PAYMENT = "payment"
    FULFILMENT = "fulfilment"

    @property
    def end(self) -> Status:
        """The status at which an order of this road is complete."""
        return Status.CONFIRMED if self is Stages.PAYMENT else Status.COMPLETED


class JobKind(StrEnum):
    """What must happen next."""

    CHARGE = "charge"
    #: Nothing to pay on the payment road: done by the claim itself.
    CONFIRM = "confirm"
    FULFIL = "fulfil"
    #: It was handed over: due when the report of whoever carries it out is late, and never where that has no end.
    REPORT = "report"
    #: What was reserved is taken, now that the order is completed.
    CAPTURE = "capture"
    #: What was reserved, or waits for its customer, is let go of.
    VOID = "void"
    REFUND = "refund"


class PaymentOutcome(StrEnum):
    """What became of one call to the gateway."""

    SUCCEEDED = "succeeded"
    AUTHORIZED = "authorized"
    ACTION_REQUIRED = "action_required"
    VOIDED = "voided"
    DECLINED = "declined"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"
    #: The intent was stored but the gateway was never called (drain, open breaker).
    NOT_SENT = "not_sent"


class Line(msgspec.Struct, frozen=True, gc=False):
    """One line of an order; `line` counts from 1. An unpriced line has `price_minor` None."""

    line: int
    item_id: int | str | None
    name: str | None
    quantity: int
    price_minor: int | None


class Order(msgspec.Struct, frozen=True, gc=False):
    """An order without its lines, exactly as its row holds it, field by field in the order of its columns.

    `version` is the number of its last event. `metadata` is JSON text. `charging` is True between the stored
    intent to charge (or refund) and its recorded outcome. `generation` counts the gateway keys that a definite
    decline has used up; `attempts` counts the calls to the gateway, `charge_started_at` is when the latest charge
    was stored as intended: the gateway cannot have forgotten its key before that and its key window have passed.

    Of the amounts, `captured_minor` was taken, `refunded_minor` given back, and `refunding_minor` is to be given
    back. `refunds` counts its refunds. `payment_action` is JSON text: what the customer must do, until
    `action_expires_at`.
    """

    order_id: str
    status: Status
    payment_status: PaymentStatus
    stages: Stages
    customer_id: int | str | None
    customer_name: str | None
    currency: str
    total_minor: int
    priced: bool
    metadata: str
    payment_token: str | None
    version: int
    created_at: int
    updated_at: int
    processing_started_at: int | None = None
    completed_at: int | None = None
    cancelled_at: int | None = None
    charging: bool = False
    generation: int = 1
    attempts: int = 0
    charge_started_at: int | None = None
    last_error: str | None = None
    authorized_minor: int = 0
    captured_minor: int = 0
    refunded_minor: int = 0
    refunding_minor: int = 0
    refunds: int = 0
    payment_action: str | None = None
    action_expires_at: int | None = None

    @property
    def at_rest(self) -> bool:
        """Nothing more will happen to it unasked."""
        paid = self.payment_status
        if paid in _MOVING or self.refunding_minor:
            return False
        if self.status is Status.COMPLETED or (self.status is Status.CONFIRMED and self.stages is Stages.PAYMENT):
            return paid not in _OWING
        if self.status is Status.CANCELLED:
            return paid is not PaymentStatus.AUTHORIZED
        if self.status is Status.FAILED:
            return paid is not PaymentStatus.PENDING
        return self.status is Status.PAYMENT_FAILED

    @property
    def charge_open(self) -> bool:
        """A charge was asked for and has no outcome yet: nobody can say whether there is money to return."""
        if self.charging and self.payment_status is PaymentStatus.PENDING:
            return True
        return self.payment_status is PaymentStatus.UNKNOWN

    @property
    def charged_late(self) -> bool:
        """It is charged again beside its road, because what was reserved had expired."""
        return self.status in PAST_PAYMENT and self.payment_status in _UNPAID


_MOVING = frozenset({PaymentStatus.REFUND_PENDING, PaymentStatus.UNKNOWN, PaymentStatus.ACTION_REQUIRED})
#: An order at the end of its road has its money; one that has not is unfinished.
_OWING = frozenset({PaymentStatus.AUTHORIZED, PaymentStatus.VOIDED, PaymentStatus.DECLINED, PaymentStatus.PENDING})
PAST_PAYMENT = frozenset({Status.CONFIRMED, Status.PROCESSING, Status.COMPLETED, Status.FAILED})
_UNPAID = frozenset({PaymentStatus.PENDING, PaymentStatus.UNKNOWN, PaymentStatus.ACTION_REQUIRED})


class Job(msgspec.Struct, frozen=True, gc=False):
    """The next action of an order; it leaves the table when the order is at rest. Its fields are its row's.

    `due_at` is when it may next be claimed: its schedule, or the end of the lease while `holder` has it. `fence`
    grows with every claim and every takeover. `claims` counts claims since the last recorded outcome, `failures`
    the recorded failures that lead to back-off. A parked job has `dead_at`.

    Money goes first: behind a job to refund, or to charge again, waits what the order's road needs next, of
    `then_kind` and due at `then_due_at` (PARKED: it is parked).
    """

    kind: JobKind
    due_at: int
    created_at: int
    holder: str | None = None
    fence: int = 0
    claims: int = 0
    failures: int = 0
    dead_at: int | None = None
    then_kind: JobKind | None = None
    then_due_at: int | None = None


class RefundStatus(StrEnum):
    """Where a refund is."""

    PENDING = "pending"
    #: It waits for a person: the gateway refuses it, or nobody could find out what became of it.
    PARKED = "parked"
    SUCCEEDED = "succeeded"
    #: It was not made; another one has taken its place.
    FAILED = "failed"


class OrderRefund(msgspec.Struct, frozen=True, gc=False):
    """A refund of a part or all of an order, as its row holds it; numbers count from 1 in each order.

    `generation` counts the keys at the gateway that a definite refusal has used up. One `by_hand` was made
    outside.
    """

    order_id: str
    number: int
    amount_minor: int
    status: RefundStatus
    requested_at: int
    reason: str | None = None
    by_hand: bool = False
    generation: int = 1
    reference: str | None = None
    error: str | None = None
    settled_at: int | None = None

    @property
    def open(self) -> bool:
        """It is not settled: its amount is set aside."""
        return self.status is RefundStatus.PENDING or self.status is RefundStatus.PARKED


class Attempt(msgspec.Struct, frozen=True, gc=False):
    """One call to the gateway, as its row holds it: stored with `outcome` None before it, completed after it."""

    order_id: str
    number: int
    action: str  # "charge", "capture", "void" or "refund"
    gateway_key: str
    amount_minor: int
    currency: str
    started_at: int
    finished_at: int | None = None
    outcome: PaymentOutcome | None = None
    reference: str | None = None
    error: str | None = None


class AttemptResult(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The end of an attempt that is already stored."""

    order_id: str
    number: int
    finished_at: int
    outcome: PaymentOutcome
    reference: str | None
    error: str | None


def is_order_id(text: str) -> bool:
    """Return whether `text` may be an order's id: 1-64 of `A-Z a-z 0-9 . _ -`, and no reserved path word."""
    return _ORDER_ID.fullmatch(text) is not None and text not in RESERVED_IDS


def gateway_key(order_id: str, generation: int, prefix: str = "") -> str:
    """Return the idempotency key under which the gateway sees this order's charge (UUIDv5, RFC 9562).

    `prefix` tells apart installations that share an account at the gateway; no order's id has a colon.
    """
    name = f"{order_id}:{generation}"
    return str(uuid.uuid5(_KEY_NAMESPACE, f"{prefix}:{name}" if prefix else name))


def refund_key(payment_key: str, refund: OrderRefund) -> str:
    """Return the idempotency key under which the gateway sees this refund."""
    number = "" if refund.number == 1 else f"-{refund.number}"
    again = "" if refund.generation == 1 else f".{refund.generation}"
    return f"{payment_key}-refund{number}{again}"
