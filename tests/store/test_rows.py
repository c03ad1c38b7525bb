"""Orders, jobs and attempts as rows: what is written is read back, and the columns are the fields."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from expediter.orders.order import (
    Attempt,
    Job,
    JobKind,
    Order,
    PaymentOutcome,
    PaymentStatus,
    Stages,
    Status,
)
from expediter.store import schema
from expediter.store.rows import (
    ORDER_CHANGES,
    attempt_row,
    changed_order_row,
    job_row,
    order_row,
    read_attempt,
    read_job,
    read_order,
    read_order_and_job,
)

times = st.integers(0, 1 << 61)
maybe_times = st.none() | times
texts = st.none() | st.text(max_size=5)
ORDERS = st.builds(
    Order,
    order_id=st.text(min_size=1, max_size=5),
    status=st.sampled_from(Status),
    payment_status=st.sampled_from(PaymentStatus),
    stages=st.sampled_from(Stages),
    customer_id=st.none() | st.integers(0, 1 << 60) | st.text(max_size=5),
    customer_name=texts,
    currency=st.text(max_size=3),
    total_minor=times,
    priced=st.booleans(),
    metadata=st.text(max_size=5),
    payment_token=texts,
    version=times,
    created_at=times,
    updated_at=times,
    processing_started_at=maybe_times,
    completed_at=maybe_times,
    cancelled_at=maybe_times,
    charging=st.booleans(),
    generation=st.integers(1, 9),
    attempts=st.integers(0, 9),
    charge_started_at=maybe_times,
    last_error=texts,
)
JOBS = st.builds(
    Job,
    kind=st.sampled_from(JobKind),
    due_at=times,
    created_at=times,
    holder=texts,
    fence=times,
    claims=st.integers(0, 9),
    failures=st.integers(0, 9),
    dead_at=maybe_times,
)
ATTEMPTS = st.builds(
    Attempt,
    order_id=st.text(min_size=1, max_size=5),
    number=st.integers(1, 9),
    action=st.sampled_from(["charge", "refund"]),
    gateway_key=st.text(max_size=5),
    amount_minor=times,
    currency=st.text(max_size=3),
    started_at=times,
    finished_at=maybe_times,
    outcome=st.none() | st.sampled_from(PaymentOutcome),
    reference=texts,
    error=texts,
)


@given(ORDERS, JOBS)
def test_orders_and_jobs_are_read_as_they_were_written(order: Order, job: Job) -> None:
    """A row holds only whole numbers, text and None, and is the order again when it is read."""
    row = (*order_row(order), *job_row(order.order_id, job))
    assert {type(value) for value in row} <= {int, str, type(None)}
    assert read_order(row) == order
    assert read_order_and_job(row) == (order, job)
    assert read_order_and_job((*order_row(order), *[None] * len(schema.jobs.columns))) == (order, None)
    assert read_job(job_row(order.order_id, job)) == job


@given(ATTEMPTS)
def test_attempts_are_read_as_they_were_written(attempt: Attempt) -> None:
    """A row of a call to the gateway is that call again when it is read."""
    assert read_attempt(attempt_row(attempt)) == attempt


@given(ORDERS)
def test_a_changed_order_has_its_changed_columns_and_its_id(order: Order) -> None:
    """What is set of an order that changes are the columns of ORDER_CHANGES, found by its id."""
    named = dict(zip(schema.orders.columns.keys(), order_row(order), strict=True))
    assert changed_order_row(order) == tuple(named[name] for name in (*ORDER_CHANGES, "order_id"))


def test_the_columns_are_the_fields() -> None:
    """Positions in a row are those of the fields: a field that is added has its column at the same place."""

    def fields(kind: type[msgspec.Struct]) -> list[str]:
        return [field.name for field in msgspec.structs.fields(kind)]

    columns = schema.orders.columns.keys()
    columns.remove("customer_id_number")
    assert columns == fields(Order)
    assert schema.jobs.columns.keys() == ["order_id", *fields(Job)]
    assert schema.payment_attempts.columns.keys() == fields(Attempt)
