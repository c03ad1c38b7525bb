"""Core statements that more than one module uses, and the pieces that they are made of."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, ColumnElement, bindparam, literal_column, select

from expediter.store import schema


def among(column: Column[Any]) -> ColumnElement[bool]:
    """Return the condition that `column` is one of the list that is bound as `ids`."""
    return column.in_(bindparam("ids", expanding=True))


#: Orders, each beside its job, or beside nulls where it has none.
ORDERS_AND_JOBS = select(schema.orders, schema.jobs).select_from(
    schema.orders.outerjoin(schema.jobs, schema.jobs.c.order_id == schema.orders.c.order_id)
)
# In one order everywhere, so that two batches about the same orders wait for each other and do not deadlock.
# As an expression: without statistics PostgreSQL might walk the whole index rather than sort a few rows.
_BY_ID = schema.orders.c.order_id.concat(literal_column("''"))
# Whatever is decided on is locked first. The jobs are read by a statement of their own, after the lock: beside a
# row that another transaction has just changed, PostgreSQL returns what is joined to it as it was before.
# Nobody changes a job without the lock on its order.
LOCK_ORDERS = select(schema.orders).where(among(schema.orders.c.order_id)).order_by(_BY_ID).with_for_update()
#: Orders that have a job, each beside it, both locked: what is joined and locked is read anew after a wait, too.
LOCK_ORDERS_AND_JOBS = (
    select(schema.orders, schema.jobs)
    .select_from(schema.orders.join(schema.jobs, schema.jobs.c.order_id == schema.orders.c.order_id))
    .where(among(schema.orders.c.order_id))
    .order_by(_BY_ID)
    .with_for_update()
)
JOBS = select(schema.jobs).where(among(schema.jobs.c.order_id))
# In no order: asked for one, PostgreSQL may walk the whole index in it until it has its statistics.
LINES = select(schema.order_lines).where(among(schema.order_lines.c.order_id))
DELETED_ORDERS = select(schema.deleted_orders.c.order_id).where(among(schema.deleted_orders.c.order_id))
#: Every refund of these orders, by its number.
REFUNDS = (
    select(schema.refunds)
    .where(among(schema.refunds.c.order_id))
    .order_by(schema.refunds.c.order_id, schema.refunds.c.number)
)
#: Refunds that are not settled. Nobody changes one without the lock on its order.
OPEN_REFUNDS = select(schema.refunds).where(
    among(schema.refunds.c.order_id), schema.refunds.c.status.in_(["pending", "parked"])
)
#: The number that the positions of events are taken from.
POSITION = schema.feed.c.position
