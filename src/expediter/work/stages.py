"""What each kind of job does: talks to the outside, and says in a command what came of it.

The intent to charge is stored before the gateway is called, so a stage may be repeated at any time: an outcome
that nobody knows is settled by asking the gateway, or by the same key again while the gateway remembers it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec

from expediter.errors import (
    FulfilmentError,
    FulfilmentRefused,
    PaymentConflict,
    PaymentDeclined,
    PaymentError,
    PaymentUnavailable,
    PaymentUnknown,
)
from expediter.fulfilment import Fulfiller, Handed
from expediter.orders.commands import (
    FulfilmentOutcome,
    ParkJob,
    RecordFulfilment,
    RecordPayment,
    RecordRefund,
    RecordReserved,
    WorkerCommand,
)
from expediter.orders.order import (
    MICROSECONDS,
    JobKind,
    Line,
    Order,
    PaymentOutcome,
    PaymentStatus,
    Stages,
    gateway_key,
    refund_key,
)
from expediter.orders.resilience import BACKOFF_BASE, backoff
from expediter.payments import Action, Charge, Payment, PaymentGateway, PaymentState, Refund, Refunded, RefundState
from expediter.payments.callbacks import (
    ERROR_CHARACTERS_MAX,
    REFERENCE_CHARACTERS_MAX,
    fitting,
    stored_action,
)
from expediter.store.submissions import Claimed

#: Seconds that one call to the outside may take, at most; with a short lease it is half of that.
CALL_SECONDS_MAX = 15.0
#: Seconds that a gateway may ask us to wait before the next try, at most.
RETRY_AFTER_SECONDS_MAX = 3600.0
#: The pauses between two looks at a payment that waits for its customer (microseconds).
ACTION_LOOK_MIN, ACTION_LOOK_MAX = 2 * MICROSECONDS, 60 * MICROSECONDS
#: Characters from which on a payment token is taken out of what a gateway says: a shorter one may be any word.
TOKEN_CHARACTERS_MIN = 4


class Tools(msgspec.Struct, frozen=True):
    """What the stages work with.

    `random` returns a number in [0, 1), `lines` reads an order's lines, `key_prefix` goes into the gateway's keys.
    `payment_retry_delay` is the longest pause after the first failed charge, and who has taken an order is to
    report within `report_in` (microseconds; None: some time). With `capture_later` the money is reserved, and
    captured when the order is completed. A customer who must act has `action_in` microseconds.
    """

    gateway: PaymentGateway
    fulfiller: Fulfiller
    payment_attempts_max: int
    lease: int
    random: Callable[[], float]
    lines: Callable[[str], Awaitable[Sequence[Line]]]
    key_prefix: str = ""
    payment_retry_delay: int = BACKOFF_BASE
    fulfilment_attempts_max: int = 5
    report_in: int | None = None
    capture_later: bool = False
    action_in: int = 900 * MICROSECONDS

    @property
    def kinds(self) -> frozenset[JobKind]:
        """The kinds of jobs that workers do."""
        return frozenset(JobKind) - {JobKind.FULFIL} if self.fulfiller.by_hand else frozenset(JobKind)

    @property
    def call_seconds_max(self) -> float:
        """Seconds that one call may take: its outcome must be stored before the lease ends."""
        return min(CALL_SECONDS_MAX, self.lease / MICROSECONDS / 2)


async def run(claimed: Claimed, tools: Tools, now: int) -> WorkerCommand:
    """Do what the job asks for and return the command that records it. Raises nothing that is foreseen."""
    match claimed.job.kind:
        case JobKind.CAPTURE | JobKind.VOID:
            return await _reserved(claimed, tools)
        case JobKind.CHARGE:
            return await _charge(claimed, tools, now)
        case JobKind.FULFIL:
            return await _fulfil(claimed, tools)
        case JobKind.REFUND:
            return await _refund(claimed, tools)
        case JobKind.CONFIRM | JobKind.REPORT:
            raise AssertionError("it is done by its claim")


async def _charge(claimed: Claimed, tools: Tools, now: int) -> WorkerCommand:
    order, job = claimed.order, claimed.job
    settling = order.payment_status in (PaymentStatus.UNKNOWN, PaymentStatus.ACTION_REQUIRED)
    since = now - (order.charge_started_at or order.created_at)
    if settling and since > tools.gateway.key_window_seconds * MICROSECONDS:
        lost = "the outcome of the charge is unknown and the gateway has forgotten its key: look it up there"
        return ParkJob(order_id=order.order_id, fence=job.fence, error=lost)
    try:
        said = await _call(_charge_once(order, tools, settling, now), order, tools.call_seconds_max)
    except PaymentConflict as error:
        return ParkJob(order_id=order.order_id, fence=job.fence, error=_conflict(error, order))
    outcome = said.outcome
    if settling and outcome is PaymentOutcome.UNAVAILABLE:
        outcome = PaymentOutcome.UNKNOWN
    retry_in = max(said.wait, backoff(job.failures + 1, tools.random(), tools.payment_retry_delay))
    action, until = None, None
    if outcome is PaymentOutcome.ACTION_REQUIRED:
        action, until = stored_action(said.action), _deadline(said.action, order, tools, now)
        retry_in = _next_look(order, until, now)
    return RecordPayment(
        order_id=order.order_id,
        fence=job.fence,
        outcome=outcome,
        reference=said.reference,
        error=said.error,
        retry_in=retry_in,
        counts=not claimed.probe,
        failures_max=tools.payment_attempts_max,
        lease=0 if tools.fulfiller.by_hand else tools.lease,
        action=action,
        action_until=until,
    )


def _deadline(action: Action | None, order: Order, tools: Tools, now: int) -> int:
    """Return until when the customer must have acted: the gateway's limit or ours, whichever comes first."""
    ours = order.action_expires_at or now + tools.action_in
    theirs = action.expires_at if action is not None else None
    return ours if theirs is None else min(ours, theirs)


def _next_look(order: Order, until: int, now: int) -> int:
    """Return the pause before the gateway is asked again: the longer it takes, the more seldom."""
    since = now - (order.charge_started_at or now)
    pause = min(max(since // 4, ACTION_LOOK_MIN), ACTION_LOOK_MAX)
    return max(0, min(pause, until - now))


async def _charge_once(order: Order, tools: Tools, settling: bool, now: int) -> _Found:
    key = gateway_key(order.order_id, order.generation, tools.key_prefix)
    payment = await tools.gateway.find(key) if settling else None
    if payment is None:
        charge = Charge(
            key=key,
            order_id=order.order_id,
            amount_minor=order.total_minor,
            currency=order.currency,
            token=order.payment_token,
            customer_id=order.customer_id,
            # The road that ends with the payment has no later moment; what is charged late is owed already.
            capture=not tools.capture_later or order.stages is Stages.PAYMENT or order.charged_late,
        )
        payment = await tools.gateway.charge(charge)
    late = order.action_expires_at is not None and now >= order.action_expires_at
    if payment.state is PaymentState.ACTION_REQUIRED and late:
        # What was captured in this very moment is returned as that.
        payment = await tools.gateway.void(key)
        if payment.state in (PaymentState.VOIDED, PaymentState.DECLINED):
            return _Found(
                PaymentOutcome.VOIDED, payment.reference, "the customer did not confirm the payment in time"
            )
    return _paid(payment, order)


class _Found(NamedTuple):
    """What a gateway says of a payment."""

    outcome: PaymentOutcome
    reference: str
    error: str | None = None
    action: Action | None = None


def _check_amount(payment: Payment, order: Order) -> None:
    """Raise PaymentConflict for a payment of another amount."""
    if (payment.amount_minor, payment.currency.upper()) != (order.total_minor, order.currency):
        raise PaymentConflict(
            f"the gateway has {payment.amount_minor} {payment.currency} (minor units) under its key"
        )


def _paid(payment: Payment, order: Order) -> _Found:
    """Return what a payment that is as it was asked for has come to. Raises PaymentError for any other."""
    _check_amount(payment, order)
    match payment.state:
        case PaymentState.SUCCEEDED:
            return _Found(PaymentOutcome.SUCCEEDED, payment.reference)
        case PaymentState.AUTHORIZED:
            return _Found(PaymentOutcome.AUTHORIZED, payment.reference)
        case PaymentState.ACTION_REQUIRED:
            return _Found(PaymentOutcome.ACTION_REQUIRED, payment.reference, None, payment.action)
        case PaymentState.DECLINED | PaymentState.VOIDED:
            raise PaymentDeclined(payment.error or f"The payment is {payment.state.value} at the gateway")
        case _:
            raise PaymentUnknown(f"The gateway says that the payment is {payment.state.value}")


async def _reserved(claimed: Claimed, tools: Tools) -> WorkerCommand:
    """Capture what was reserved, or let go of it."""
    order, job = claimed.order, claimed.job
    try:
        said = await _call(_settled(order, tools, job.kind), order, tools.call_seconds_max)
    except PaymentConflict as error:
        return ParkJob(order_id=order.order_id, fence=job.fence, error=_conflict(error, order))
    if said.outcome is PaymentOutcome.DECLINED:
        refused = f"the gateway refuses to {job.kind.value}: {said.error}"
        return ParkJob(order_id=order.order_id, fence=job.fence, error=refused, outcome=said.outcome)
    return RecordReserved(
        order_id=order.order_id,
        fence=job.fence,
        outcome=said.outcome,
        reference=said.reference,
        error=said.error,
        retry_in=max(said.wait, backoff(job.failures + 1, tools.random())),
    )


async def _settled(order: Order, tools: Tools, kind: JobKind) -> _Found:
    key = gateway_key(order.order_id, order.generation, tools.key_prefix)
    if kind is JobKind.CAPTURE:
        payment = await tools.gateway.capture(key, order.total_minor)
    else:
        payment = await tools.gateway.void(key)
    _check_amount(payment, order)
    match payment.state:
        case PaymentState.SUCCEEDED:
            return _Found(PaymentOutcome.SUCCEEDED, payment.reference)
        case PaymentState.VOIDED | PaymentState.DECLINED:
            return _Found(PaymentOutcome.VOIDED, payment.reference)
        case _:
            raise PaymentUnknown(f"The gateway says that the payment is {payment.state.value}")


async def _refund(claimed: Claimed, tools: Tools) -> WorkerCommand:
    order, job, asked = claimed.order, claimed.job, claimed.refund
    assert asked is not None  # it comes with every job to refund
    key = gateway_key(order.order_id, order.generation, tools.key_prefix)
    refund = Refund(
        key=refund_key(key, asked),
        payment_key=key,
        amount_minor=asked.amount_minor,
        currency=order.currency,
        reason=asked.reason or "",
    )
    try:
        said = await _call(_refunded(tools.gateway.refund(refund)), order, tools.call_seconds_max)
    except PaymentConflict as error:
        number, words = asked.number, _conflict(error, order)
        return ParkJob(order_id=order.order_id, fence=job.fence, error=words, refund=number)
    if said.outcome is PaymentOutcome.DECLINED:
        words = f"the gateway refuses the refund: {said.error}"
        return ParkJob(
            order_id=order.order_id, fence=job.fence, error=words, outcome=said.outcome, refund=asked.number
        )
    return RecordRefund(
        order_id=order.order_id,
        fence=job.fence,
        refund=asked.number,
        outcome=said.outcome,
        reference=said.reference,
        error=said.error,
        retry_in=max(said.wait, backoff(job.failures + 1, tools.random())),
    )


async def _refunded(call: Awaitable[Refunded]) -> _Found:
    """Return what a refund that is made is called. Raises PaymentError for any other."""
    refunded = await call
    match refunded.state:
        case RefundState.SUCCEEDED:
            return _Found(PaymentOutcome.SUCCEEDED, refunded.reference)
        case RefundState.FAILED:
            raise PaymentDeclined(refunded.error or "The refund has failed at the gateway")
        case RefundState.PENDING:
            raise PaymentUnknown("The gateway says that the refund is pending")


class _Said(NamedTuple):
    """What came of a call to the gateway; `wait` is how long it asked us to wait (microseconds)."""

    outcome: PaymentOutcome
    reference: str | None = None
    error: str | None = None
    wait: int = 0
    action: Action | None = None


async def _call(call: Awaitable[_Found], order: Order, seconds_max: float) -> _Said:
    """Return what came of a call to the gateway; no answer in time is unknown. Raises PaymentConflict."""
    try:
        async with asyncio.timeout(seconds_max):
            found = await call
        reference = fitting(found.reference, REFERENCE_CHARACTERS_MAX)
        return _Said(found.outcome, reference, found.error, action=found.action)
    except PaymentConflict:
        raise
    except PaymentDeclined as error:
        return _Said(PaymentOutcome.DECLINED, error=_words(error, order))
    except PaymentUnavailable as error:
        wait = min(max(error.retry_after_seconds or 0.0, 0.0), RETRY_AFTER_SECONDS_MAX)
        return _Said(PaymentOutcome.UNAVAILABLE, error=_words(error, order), wait=int(wait * MICROSECONDS))
    except PaymentError as error:
        return _Said(PaymentOutcome.UNKNOWN, error=_words(error, order))
    except TimeoutError:
        return _Said(PaymentOutcome.UNKNOWN, error=f"no answer within {seconds_max:g} s")


def _conflict(error: PaymentConflict, order: Order) -> str:
    return f"the gateway knows this order's key from something else, look it up there: {_words(error, order)}"


def _words(error: Exception, order: Order) -> str:
    """Return what the outside said, fit to be stored and shown: never with the payment token in it."""
    text = str(error)
    token = order.payment_token
    if token is not None and len(token) >= TOKEN_CHARACTERS_MIN:
        text = text.replace(token, "***")
    return fitting(text, ERROR_CHARACTERS_MAX)


async def _fulfil(claimed: Claimed, tools: Tools) -> WorkerCommand:
    order, job = claimed.order, claimed.job
    outcome, error = FulfilmentOutcome.DONE, None

    async def lines() -> Sequence[Line]:
        return await tools.lines(order.order_id)

    try:
        async with asyncio.timeout(tools.call_seconds_max):
            handed = await tools.fulfiller.fulfil(order, lines)
        outcome = FulfilmentOutcome.TAKEN if handed is Handed.TAKEN else FulfilmentOutcome.DONE
    except FulfilmentRefused as refused:
        outcome, error = FulfilmentOutcome.REFUSED, _words(refused, order)
    except FulfilmentError as failed:
        outcome, error = FulfilmentOutcome.UNAVAILABLE, _words(failed, order)
    except TimeoutError:
        outcome, error = FulfilmentOutcome.UNAVAILABLE, f"no answer within {tools.call_seconds_max:g} s"
    return RecordFulfilment(
        order_id=order.order_id,
        fence=job.fence,
        outcome=outcome,
        error=error,
        retry_in=backoff(job.failures + 1, tools.random()),
        failures_max=tools.fulfilment_attempts_max,
        report_in=tools.report_in,
    )
