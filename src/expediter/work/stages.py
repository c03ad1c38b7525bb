"""What each kind of job does: talks to the outside, and says in a command what came of it.

The intent to charge is stored before the gateway is called, so a stage may be repeated at any time: an outcome
that nobody knows is settled by asking the gateway, or by the same key again while the gateway remembers it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from expediter.errors import (
    FulfilmentError,
    FulfilmentRefused,
    PaymentDeclined,
    PaymentError,
    PaymentUnavailable,
    PaymentUnknown,
)
from expediter.fulfilment import Fulfiller
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
from expediter.payments import PaymentGateway
from expediter.store.submissions import Claimed

#: Seconds that one call to the outside may take, at most; with a short lease it is half of that.
CALL_SECONDS_MAX = 15.0


class Tools(msgspec.Struct, frozen=True):
    """What the stages work with.

    `random` returns a number in [0, 1), `lines` reads an order's lines, `key_prefix` goes into the gateway's keys.
    `payment_retry_delay` is the longest pause after the first failed charge (microseconds).
    """

    gateway: PaymentGateway
    fulfiller: Fulfiller
    payment_attempts_max: int
    lease: int
    random: Callable[[], float]
    lines: Callable[[str], Awaitable[Sequence[Line]]]
    key_prefix: str = ""
    payment_retry_delay: int = BACKOFF_BASE

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
        case JobKind.CONFIRM:
            raise AssertionError("a confirmation is done by its claim")


async def _charge(claimed: Claimed, tools: Tools, now: int) -> WorkerCommand:
    order, job = claimed.order, claimed.job
    settling = order.payment_status is PaymentStatus.UNKNOWN
    since = now - (order.charge_started_at or order.created_at)
    if settling and since > tools.gateway.key_window_seconds * MICROSECONDS:
        lost = "the outcome of the charge is unknown and the gateway has forgotten its key: look it up there"
        return ParkJob(order_id=order.order_id, fence=job.fence, error=lost)
    outcome, reference, error = await _call(_charge_once(order, tools, settling), tools.call_seconds_max)
    if settling and outcome is PaymentOutcome.UNAVAILABLE:
        outcome = PaymentOutcome.UNKNOWN
    return RecordPayment(
        order_id=order.order_id,
        fence=job.fence,
        outcome=outcome,
        reference=reference,
        error=error,
        retry_in=backoff(job.failures + 1, tools.random(), tools.payment_retry_delay),
        counts=not claimed.probe,
        failures_max=tools.payment_attempts_max,
        lease=0 if tools.fulfiller.by_hand else tools.lease,
    )


async def _charge_once(order: Order, tools: Tools, settling: bool) -> str:
    key = gateway_key(order.order_id, order.generation, tools.key_prefix)
    if settling:
        found = await tools.gateway.find(key)
        if found is not None:
            return found
    return await tools.gateway.charge(
        order.total_minor, order.currency, idempotency_key=key, token=order.payment_token
    )


async def _refund(claimed: Claimed, tools: Tools) -> WorkerCommand:
    order, job = claimed.order, claimed.job
    key = gateway_key(order.order_id, order.generation, tools.key_prefix)
    outcome, reference, error = await _call(tools.gateway.refund(key), tools.call_seconds_max)
    if outcome is PaymentOutcome.DECLINED:
        error = f"the gateway refuses the refund: {error}"
        return ParkJob(order_id=order.order_id, fence=job.fence, error=error, outcome=outcome)
    return RecordRefund(
        order_id=order.order_id,
        fence=job.fence,
        outcome=outcome,
        reference=reference,
        error=error,
        retry_in=backoff(job.failures + 1, tools.random()),
    )


async def _call(call: Awaitable[str], seconds_max: float) -> tuple[PaymentOutcome, str | None, str | None]:
    """Return outcome, reference and error of a call to the gateway; no answer in time is an unknown outcome."""
    try:
        async with asyncio.timeout(seconds_max):
            return PaymentOutcome.SUCCEEDED, await call, None
    except PaymentDeclined as error:
        return PaymentOutcome.DECLINED, None, str(error)
    except PaymentUnavailable as error:
        return PaymentOutcome.UNAVAILABLE, None, str(error)
    except (PaymentUnknown, PaymentError) as error:
        return PaymentOutcome.UNKNOWN, None, str(error)
    except TimeoutError:
        return PaymentOutcome.UNKNOWN, None, f"no answer within {seconds_max:g} s"


async def _fulfil(claimed: Claimed, tools: Tools) -> WorkerCommand:
    order, job = claimed.order, claimed.job
    outcome, error = FulfilmentOutcome.DONE, None

    async def lines() -> Sequence[Line]:
        return await tools.lines(order.order_id)

    try:
        async with asyncio.timeout(tools.call_seconds_max):
            await tools.fulfiller.fulfil(order, lines)
    except FulfilmentRefused as refused:
        outcome, error = FulfilmentOutcome.REFUSED, str(refused)
    except FulfilmentError as failed:
        outcome, error = FulfilmentOutcome.UNAVAILABLE, str(failed)
    except TimeoutError:
        outcome, error = FulfilmentOutcome.UNAVAILABLE, f"no answer within {tools.call_seconds_max:g} s"
    return RecordFulfilment(
        order_id=order.order_id,
        fence=job.fence,
        outcome=outcome,
        error=error,
        retry_in=backoff(job.failures + 1, tools.random()),
    )
