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
    WorkerCommand,
)
from expediter.orders.order import MICROSECONDS, JobKind, Line, Order, PaymentOutcome, PaymentStatus, gateway_key
from expediter.orders.resilience import BACKOFF_BASE, backoff
from expediter.payments import Charge, Payment, PaymentGateway, PaymentState, Refund, Refunded, RefundState
from expediter.store.submissions import Claimed

#: Seconds that one call to the outside may take, at most; with a short lease it is half of that.
CALL_SECONDS_MAX = 15.0
#: Characters of what the outside says that are stored: its name for a payment, and its words.
REFERENCE_CHARACTERS_MAX = 128
ERROR_CHARACTERS_MAX = 500
#: Seconds that a gateway may ask us to wait before the next try, at most.
RETRY_AFTER_SECONDS_MAX = 3600.0
#: Characters from which on a payment token is taken out of what a gateway says: a shorter one may be any word.
TOKEN_CHARACTERS_MIN = 4


class Tools(msgspec.Struct, frozen=True):
    """What the stages work with.

    `random` returns a number in [0, 1), `lines` reads an order's lines, `key_prefix` goes into the gateway's keys.
    `payment_retry_delay` is the longest pause after the first failed charge, and who has taken an order is to
    report within `report_in` (microseconds; None: some time).
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
    settling = order.payment_status is PaymentStatus.UNKNOWN
    since = now - (order.charge_started_at or order.created_at)
    if settling and since > tools.gateway.key_window_seconds * MICROSECONDS:
        lost = "the outcome of the charge is unknown and the gateway has forgotten its key: look it up there"
        return ParkJob(order_id=order.order_id, fence=job.fence, error=lost)
    try:
        said = await _call(_charge_once(order, tools, settling), order, tools.call_seconds_max)
    except PaymentConflict as error:
        return ParkJob(order_id=order.order_id, fence=job.fence, error=_conflict(error, order))
    outcome = said.outcome
    if settling and outcome is PaymentOutcome.UNAVAILABLE:
        outcome = PaymentOutcome.UNKNOWN
    return RecordPayment(
        order_id=order.order_id,
        fence=job.fence,
        outcome=outcome,
        reference=said.reference,
        error=said.error,
        retry_in=max(said.wait, backoff(job.failures + 1, tools.random(), tools.payment_retry_delay)),
        counts=not claimed.probe,
        failures_max=tools.payment_attempts_max,
        lease=0 if tools.fulfiller.by_hand else tools.lease,
    )


async def _charge_once(order: Order, tools: Tools, settling: bool) -> str:
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
        )
        payment = await tools.gateway.charge(charge)
    return _paid(payment, order)


def _paid(payment: Payment, order: Order) -> str:
    """Return the reference of a payment that is what was asked for. Raises PaymentError for any other."""
    if (payment.amount_minor, payment.currency.upper()) != (order.total_minor, order.currency):
        raise PaymentConflict(
            f"the gateway has {payment.amount_minor} {payment.currency} (minor units) under its key"
        )
    match payment.state:
        case PaymentState.SUCCEEDED:
            return payment.reference
        case PaymentState.DECLINED | PaymentState.VOIDED:
            raise PaymentDeclined(payment.error or f"The payment is {payment.state.value} at the gateway")
        case _:
            raise PaymentUnknown(f"The gateway says that the payment is {payment.state.value}")


async def _refund(claimed: Claimed, tools: Tools) -> WorkerCommand:
    order, job = claimed.order, claimed.job
    key = gateway_key(order.order_id, order.generation, tools.key_prefix)
    refund = Refund(
        key=f"{key}-refund",
        payment_key=key,
        amount_minor=order.total_minor,
        currency=order.currency,
        reason="the order was cancelled",
    )
    try:
        said = await _call(_refunded(tools.gateway.refund(refund)), order, tools.call_seconds_max)
    except PaymentConflict as error:
        return ParkJob(order_id=order.order_id, fence=job.fence, error=_conflict(error, order))
    if said.outcome is PaymentOutcome.DECLINED:
        refused = f"the gateway refuses the refund: {said.error}"
        return ParkJob(order_id=order.order_id, fence=job.fence, error=refused, outcome=said.outcome)
    return RecordRefund(
        order_id=order.order_id,
        fence=job.fence,
        outcome=said.outcome,
        reference=said.reference,
        error=said.error,
        retry_in=max(said.wait, backoff(job.failures + 1, tools.random())),
    )


async def _refunded(call: Awaitable[Refunded]) -> str:
    """Return the reference of a refund that is made. Raises PaymentError for any other."""
    refunded = await call
    match refunded.state:
        case RefundState.SUCCEEDED:
            return refunded.reference
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


async def _call(call: Awaitable[str], order: Order, seconds_max: float) -> _Said:
    """Return what came of a call to the gateway; no answer in time is unknown. Raises PaymentConflict."""
    try:
        async with asyncio.timeout(seconds_max):
            return _Said(PaymentOutcome.SUCCEEDED, _fitting(await call, REFERENCE_CHARACTERS_MAX))
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
    return _fitting(text, ERROR_CHARACTERS_MAX)


def _fitting(text: str, characters_max: int) -> str:
    """Return a text of the outside as every database can store it, and no longer than that."""
    plain = "".join(each if each.isprintable() else " " for each in text.encode("utf-8", "replace").decode())
    return plain if len(plain) <= characters_max else f"{plain[: characters_max - 1]}…"


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
