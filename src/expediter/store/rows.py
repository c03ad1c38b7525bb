"""Orders, lines and jobs as rows and back: the one place that knows how a field is stored."""

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from msgspec.structs import astuple, replace

from expediter.errors import OrderUnreadable
from expediter.orders.order import (
    Attempt,
    Job,
    JobKind,
    Line,
    Order,
    OrderRefund,
    PaymentOutcome,
    PaymentStatus,
    RefundStatus,
    Stages,
    Status,
)
from expediter.orders.resilience import Breaker
from expediter.store import schema

#: A row as the drivers give and take it: whole numbers, text and None, in the order of the table's columns.
Row = Sequence[Any]

# `_value_` is `value` without a property's call: four of them are on every order's way.

#: The counters of all jobs, of the parked ones among them, of completed orders, and of the microseconds that those
#: took from the start of work and from their creation.
JOBS = "jobs"
DEAD_JOBS = "jobs:dead"
HANDED_OVER = "jobs:handed_over"
COMPLETED = "completed"
COMPLETED_WORK = "completed:work"
COMPLETED_TOTAL = "completed:total"
#: The counters of orders in each status.
STATUS_COUNTERS: Mapping[Status, str] = {status: f"status:{status.value}" for status in Status}

#: The columns of `orders` that change after an order is placed, in the order of `changed_order_row`.
ORDER_CHANGES = (
    "status",
    "payment_status",
    "version",
    "updated_at",
    "processing_started_at",
    "completed_at",
    "cancelled_at",
    "charging",
    "generation",
    "attempts",
    "charge_started_at",
    "last_error",
    "authorized_minor",
    "captured_minor",
    "refunded_minor",
    "refunding_minor",
    "refunds",
    "payment_action",
    "action_expires_at",
)

_STATUS = {status.value: status for status in Status}
_PAYMENT_STATUS = {status.value: status for status in PaymentStatus}
_STAGES = {stages.value: stages for stages in Stages}
_KIND = {kind.value: kind for kind in JobKind}

_number = attrgetter("line")

_ORDER_COLUMNS = schema.orders.columns.keys()
_ORDER_WIDTH = len(_ORDER_COLUMNS)
_CREATED_AT = _ORDER_COLUMNS.index("created_at")
#: The flags, counted from the first column after the customer's id.
_PRICED, _CHARGING = (_ORDER_COLUMNS.index(name) - 6 for name in ("priced", "charging"))
#: Where a job's second kind is, counted from the first field after its kind.
_THEN_KIND = Job.__struct_fields__.index("then_kind") - 1
_changes = itemgetter(*map(_ORDER_COLUMNS.index, (*ORDER_CHANGES, "order_id")))


def id_columns(value: int | str | None) -> tuple[str | None, int]:
    """Return a customer's or item's id as its two columns: the text, and 1 if it came as a number."""
    if isinstance(value, int):
        return str(value), 1
    return value, 0


def id_value(text: str | None, number: int) -> int | str | None:
    """Return the id that `id_columns` made these from."""
    return int(text) if number and text is not None else text


def order_row(order: Order) -> Row:
    """Return the row of an order. Field by field: by their names it takes three times as long, for every order."""
    customer_id, number = id_columns(order.customer_id)
    return (
        order.order_id,
        order.status._value_,
        order.payment_status._value_,
        order.stages._value_,
        customer_id,
        number,
        order.customer_name,
        order.currency,
        order.total_minor,
        int(order.priced),
        order.metadata,
        order.payment_token,
        order.version,
        order.created_at,
        order.updated_at,
        order.processing_started_at,
        order.completed_at,
        order.cancelled_at,
        int(order.charging),
        order.generation,
        order.attempts,
        order.charge_started_at,
        order.last_error,
        order.authorized_minor,
        order.captured_minor,
        order.refunded_minor,
        order.refunding_minor,
        order.refunds,
        order.payment_action,
        order.action_expires_at,
    )


def changed_order_row(order: Order) -> Row:
    """Return the values of ORDER_CHANGES, then the order id."""
    changed: Row = _changes(order_row(order))
    return changed


def read_order(row: Row) -> Order:
    """Return the order that the first columns of `row` hold. Raises OrderUnreadable."""
    order_id, status, payment_status, stages, customer, number, *more = row[:_ORDER_WIDTH]
    more[_PRICED] = bool(more[_PRICED])
    more[_CHARGING] = bool(more[_CHARGING])
    try:
        statuses = _STATUS[status], _PAYMENT_STATUS[payment_status], _STAGES[stages]
        return Order(order_id, *statuses, id_value(customer, number), *more)
    except (KeyError, TypeError, ValueError) as error:
        raise OrderUnreadable(order_id, row[_CREATED_AT], error) from error


def read_orders(rows: Iterable[Row]) -> list[Order | OrderUnreadable]:
    """Return the orders that these rows hold; one that cannot be read is an error in its own place."""
    found: list[Order | OrderUnreadable] = []
    for row in rows:
        try:
            found.append(read_order(row))
        except OrderUnreadable as unreadable:
            found.append(unreadable)
    return found


def job_row(order_id: str, job: Job) -> Row:
    """Return the row of an order's job."""
    kind, *more = astuple(job)
    if job.then_kind is not None:
        more[_THEN_KIND] = job.then_kind._value_
    return (order_id, kind._value_, *more)


def read_order_and_job(row: Row) -> tuple[Order, Job | None]:
    """Return the order and job of a row of `orders` left-joined with `jobs`."""
    job = row[_ORDER_WIDTH:]
    return read_order(row), (read_job(job) if job[0] is not None else None)


def read_job(row: Row) -> Job:
    """Return the job that a row of `jobs` holds. Raises OrderUnreadable."""
    order_id, kind, *more = row
    then = more[_THEN_KIND]
    if kind not in _KIND or (then is not None and then not in _KIND):
        raise OrderUnreadable(order_id, None, f"a job to {kind}, then to {then}")
    if then is not None:
        more[_THEN_KIND] = _KIND[then]
    return Job(_KIND[kind], *more)


def attempt_row(attempt: Attempt) -> Row:
    """Return the row of a call to the gateway that has no outcome yet."""
    return astuple(attempt)


def read_attempt(row: Row) -> Attempt:
    """Return the call that a row of `payment_attempts` holds."""
    attempt = Attempt(*row)
    outcome = attempt.outcome
    return attempt if outcome is None else replace(attempt, outcome=PaymentOutcome(outcome))


def refund_row(refund: OrderRefund) -> Row:
    """Return the row of a refund."""
    order_id, number, amount_minor, status, requested_at, reason, by_hand, *more = astuple(refund)
    return (order_id, number, amount_minor, status._value_, requested_at, reason, int(by_hand), *more)


def read_refund(row: Row) -> OrderRefund:
    """Return the refund that a row of `refunds` holds. Raises ValueError for a status of a newer version."""
    order_id, number, amount_minor, status, requested_at, reason, by_hand, *more = row
    return OrderRefund(
        order_id, number, amount_minor, RefundStatus(status), requested_at, reason, bool(by_hand), *more
    )


def line_row(order_id: str, line: Line) -> Row:
    """Return the row of one line."""
    item_id, number = id_columns(line.item_id)
    return (order_id, line.line, item_id, number, line.name, line.quantity, line.price_minor)


def read_line(row: Row) -> Line:
    """Return the line that a row of `order_lines` holds."""
    return Line(row[1], id_value(row[2], row[3]), row[4], row[5], row[6])


def lines_by_order(rows: Iterable[Row], ids: Iterable[str]) -> dict[str, list[Line]]:
    """Return the lines in these rows, which come in any order, by their orders' ids; each order's by number."""
    found: dict[str, list[Line]] = {order_id: [] for order_id in ids}
    for row in rows:
        found[row[0]].append(read_line(row))
    for lines in found.values():
        lines.sort(key=_number)
    return found


def read_breaker(row: Row) -> Breaker:
    """Return the breaker that a row of `circuit_breakers` holds."""
    return Breaker(failures=row[1], open_until=row[2], probe_holder=row[3], probe_until=row[4])


def count_of(counters: Mapping[str, int], *statuses: Status) -> int:
    """Return how many orders are in these statuses."""
    return sum(counters.get(STATUS_COUNTERS[status], 0) for status in statuses)


def count_order(total: dict[str, int], order: Order, sign: int) -> None:
    """Add what an order adds to each counter (`sign` 1), or take it away (-1); times are in microseconds."""
    name = STATUS_COUNTERS[order.status]
    total[name] = total.get(name, 0) + sign
    if order.completed_at is not None:
        started = order.processing_started_at or order.created_at
        for name, value in (
            (COMPLETED, 1),
            (COMPLETED_WORK, order.completed_at - started),
            (COMPLETED_TOTAL, order.completed_at - order.created_at),
        ):
            total[name] = total.get(name, 0) + sign * value


def count_job(total: dict[str, int], job: Job, sign: int) -> None:
    """Add what a job adds to each counter (`sign` 1), or take it away (-1)."""
    total[JOBS] = total.get(JOBS, 0) + sign
    if job.dead_at is not None:
        total[DEAD_JOBS] = total.get(DEAD_JOBS, 0) + sign
    elif job.kind is JobKind.REPORT:
        total[HANDED_OVER] = total.get(HANDED_OVER, 0) + sign
