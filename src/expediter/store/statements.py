"""Core statements that more than one module uses, and the pieces that they are made of."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, ColumnElement, bindparam, select

from expediter.store import schema


def among(column: Column[Any]) -> ColumnElement[bool]:
    """Return the condition that `column` is one of the list that is bound as `ids`."""
    return column.in_(bindparam("ids", expanding=True))


#: Orders, each beside its job, or beside nulls where it has none.
ORDERS_AND_JOBS = select(schema.orders, schema.jobs).select_from(
    schema.orders.outerjoin(schema.jobs, schema.jobs.c.order_id == schema.orders.c.order_id)
)
# In no order: asked for one, PostgreSQL may walk the whole index in it until it has its statistics.
LINES = select(schema.order_lines).where(among(schema.order_lines.c.order_id))
DELETED_ORDERS = select(schema.deleted_orders.c.order_id).where(among(schema.deleted_orders.c.order_id))
#: The position of the newest event.
FEED = select(schema.feed.c.position)
