"""How things stand: one order explained, the metrics, the queue."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from expediter.errors import Fault, InvalidInput
from expediter.orders.documents import seconds, timestamp
from expediter.orders.order import MICROSECONDS, NEVER, Attempt, Job, JobKind, Order, PaymentStatus, Status
from expediter.orders.resilience import GATEWAY_KINDS, Breaker
from expediter.store.rows import COMPLETED, COMPLETED_TOTAL, COMPLETED_WORK, count_of
from expediter.store.scopes import Scope
from expediter.web.api.orders import path_order_id
from expediter.web.context import Context
from expediter.web.http import Call, Reply, json_reply
from expediter.web.operations import Operation, both, query

#: Ids in one list, at most; the counts beside it are always exact.
IDS_MAX = 1_000

Count = Annotated[int, Meta(ge=0)]


class AttemptDocument(msgspec.Struct, frozen=True):
    """One call to the payment gateway; `outcome` is null while it is open."""

    number: int
    action: str
    gateway_key: str
    started_at: str | None
    finished_at: str | None
    outcome: str | None
    reference: str | None
    error: str | None


class NextAction(msgspec.Struct, frozen=True):
    """What happens next, and when; `held_by` names the worker that is at it."""

    action: str
    due_at: str | None
    due_in_seconds: float | None
    held_by: str | None
    claims: int
    failures: int
    parked: bool


class Explanation(msgspec.Struct, frozen=True):
    """Why an order is where it is."""

    order_id: str
    status: str
    payment_status: str
    at_rest: bool
    why: str
    next_action: NextAction | None
    last_error: str | None
    attempts: list[AttemptDocument]


class Bucket(msgspec.Struct, frozen=True, omit_defaults=True):
    """How many orders are there, and which (at most 1,000, newest first) if they were asked for."""

    count: Count
    order_ids: list[str] | UnsetType = UNSET


class Metrics(msgspec.Struct, frozen=True):
    """Counts and averages (seconds; 0 where no order is complete yet) over all orders."""

    total_orders: Count
    average_processing_time: float
    average_processing_time_from_creation: float
    average_processing_time_seconds: float
    pending: Bucket
    processing: Bucket
    completed: Bucket
    order_status_counts: dict[str, int]


class Queue(msgspec.Struct, frozen=True):
    """The jobs by state, the age of the one that is due longest, and the orders that wait or are worked on.

    Orders that were `handed_over` wait for a report, and are in no other state.
    `queue_length` is ready, scheduled and leased; `total_processed` counts the orders at the end of their road.
    """

    ready: Count
    scheduled: Count
    leased: Count
    dead: Count
    oldest_age_seconds: float | None
    queue_length: Count
    pending_orders: Count
    pending_count: Count
    processing_count: Count
    total_processed: Count
    pending: list[str]
    processing: list[str]
    handed_over: Count = 0


async def explain_order(call: Call, context: Context) -> Reply:
    """Say why an order is where it is: the next action and when, the attempts, the last error, who holds it."""
    order_id = path_order_id(call)
    call.query()
    order, job, attempts, now = await context.queries.inspect(order_id)
    breaker = await context.queries.breaker()
    return json_reply(
        200,
        Explanation(
            order_id=order_id,
            status=order.status,
            payment_status=order.payment_status,
            at_rest=order.at_rest and job is None,
            why=_why(order, job, breaker, now, by_hand=context.settings.fulfilment == "manual"),
            next_action=_next_action(job, now) if job else None,
            last_error=order.last_error,
            attempts=[_attempt(attempt) for attempt in attempts],
        ),
    )


def _why(order: Order, job: Job | None, breaker: Breaker, now: int, *, by_hand: bool) -> str:
    if job is None:
        asked = ""
        if order.status in (Status.PAYMENT_FAILED, Status.FAILED):
            asked = " POST to its /retry to try again, or to its /cancel."
        return f"It is {order.status}; nothing more will happen to it unasked.{asked}"
    if job.dead_at is not None:
        if order.payment_status in (PaymentStatus.VOIDED, PaymentStatus.DECLINED):
            return "It is done, and not paid: what was reserved has expired. POST to its /retry to charge it anew."
        if job.kind is JobKind.REFUND:
            return (
                "A refund is parked: see its /refunds. POST to its /retry to ask the gateway again, or record "
                'one that was made by hand: POST {"amount": ..., "by_hand": true} to its /refunds.'
            )
        return "It is parked: see last_error, mend the cause, then POST to its /retry."
    if job.kind is JobKind.REPORT:
        late = " It is overdue." if order.last_error and job.due_at == NEVER else ""
        return f"It was handed over; whoever carries it out reports by POST to its /fulfilment.{late}"
    if job.holder is not None and job.due_at > now:
        return f"A worker is at it ({job.kind}) and has until {timestamp(job.due_at)} to report."
    if order.payment_status is PaymentStatus.ACTION_REQUIRED and job.kind is JobKind.CHARGE:
        until = timestamp(order.action_expires_at)
        return f"Its customer must confirm the payment until {until}: see payment_action at the order."
    if by_hand and job.kind is JobKind.FULFIL:
        return "It waits for whoever carries it out: PATCH its /status when that is done (FULFILMENT=manual)."
    if job.kind in GATEWAY_KINDS and breaker.open_until is not None:
        return (
            f"The payment gateway failed {breaker.failures} times in a row, so the circuit breaker is open; "
            f"one call is let through from {timestamp(breaker.open_until)} on."
        )
    if order.payment_status is PaymentStatus.UNKNOWN:
        return "The gateway did not say what became of the charge; it will be asked again."
    if job.due_at > now:
        return f"The last try failed; the next one ({job.kind}) is due at {timestamp(job.due_at)}."
    return f"It waits for a worker ({job.kind})."


def _next_action(job: Job, now: int) -> NextAction:
    parked = job.dead_at is not None
    never = job.due_at == NEVER
    return NextAction(
        action=job.kind,
        due_at=None if never else timestamp(job.due_at),
        due_in_seconds=None if never else seconds(now, max(now, job.due_at)),
        held_by=job.holder,
        claims=job.claims,
        failures=job.failures,
        parked=parked,
    )


def _attempt(attempt: Attempt) -> AttemptDocument:
    return AttemptDocument(
        number=attempt.number,
        action=attempt.action,
        gateway_key=attempt.gateway_key,
        started_at=timestamp(attempt.started_at),
        finished_at=timestamp(attempt.finished_at),
        outcome=attempt.outcome,
        reference=attempt.reference,
        error=attempt.error,
    )


def _under_way(end: Status) -> list[Status]:
    """Return the statuses that lie between `pending` and the end of the road."""
    if end is Status.CONFIRMED:
        return [Status.PAYMENT_PROCESSING]
    return [Status.PAYMENT_PROCESSING, Status.CONFIRMED, Status.PROCESSING]


async def order_metrics(call: Call, context: Context) -> Reply:
    """Return counts and averages from exact counters; `getOrderIds=true` adds up to 1,000 ids to each count."""
    given = call.query("getOrderIds")
    wanted = given.get("getOrderIds", "false").lower()
    if wanted not in ("true", "false", "1", "0"):
        raise InvalidInput([Fault("getOrderIds", "must be true or false")])
    counters = await context.queries.counters()
    end = context.settings.stages.end
    groups = {"pending": [Status.PENDING], "processing": _under_way(end), "completed": [end]}
    ids: dict[Status, list[str]] = {}
    if wanted in ("true", "1"):
        ids = await context.queries.ids([status for group in groups.values() for status in group], IDS_MAX)
    buckets = {name: _bucket(group, counters, ids) for name, group in groups.items()}
    completed = counters.get(COMPLETED, 0)
    work = _average(counters.get(COMPLETED_WORK, 0), completed)
    return json_reply(
        200,
        Metrics(
            total_orders=count_of(counters, *Status),
            average_processing_time=work,
            average_processing_time_from_creation=_average(counters.get(COMPLETED_TOTAL, 0), completed),
            average_processing_time_seconds=work,
            order_status_counts={status.value: count_of(counters, status) for status in Status},
            **buckets,
        ),
    )


def _bucket(group: list[Status], counters: dict[str, int], ids: dict[Status, list[str]]) -> Bucket:
    found = [order_id for status in group for order_id in ids.get(status, ())]
    return Bucket(count_of(counters, *group), found[:IDS_MAX] if ids else UNSET)


def _average(total: int, count: int) -> float:
    return total / count / MICROSECONDS if count else 0.0


async def queue_status(call: Call, context: Context) -> Reply:
    """Return the state of the queue, and up to 1,000 ids of the orders that wait and that are worked on."""
    call.query()
    end = context.settings.stages.end
    under_way = _under_way(end)
    queue = await context.queries.queue([Status.PENDING, *under_way], IDS_MAX)
    state, counters, ids = queue.backlog, queue.counters, queue.ids
    return json_reply(
        200,
        Queue(
            ready=state.ready,
            scheduled=state.scheduled,
            leased=state.leased,
            dead=state.dead,
            oldest_age_seconds=seconds(state.oldest_due_at, state.now),
            queue_length=state.ready + state.scheduled + state.leased,
            pending_orders=count_of(counters, Status.PENDING),
            pending_count=count_of(counters, Status.PENDING),
            processing_count=count_of(counters, *under_way),
            total_processed=count_of(counters, end),
            pending=ids[Status.PENDING],
            processing=[order_id for status in under_way for order_id in ids[status]][:IDS_MAX],
            handed_over=state.handed_over,
        ),
    )


OPERATIONS = (
    Operation(
        paths=both("/metrics"),
        handler=order_metrics,
        scope=Scope.ORDERS_READ,
        summary="Counts and averages",
        tag="progress",
        answers={200: Metrics},
        parameters=(query("getOrderIds", "Also list ids.", type="boolean"),),
        fault=("getOrderIds", "must be true or false"),
    ),
    Operation(
        paths=both("/status"),
        handler=queue_status,
        scope=Scope.ORDERS_READ,
        summary="The state of the queue",
        tag="progress",
        answers={200: Queue},
        problems=(422,),
    ),
    Operation(
        paths=both("/{order_id}/explain"),
        handler=explain_order,
        scope=Scope.ORDERS_READ,
        summary="Why an order is where it is",
        tag="progress",
        answers={200: Explanation},
    ),
)
