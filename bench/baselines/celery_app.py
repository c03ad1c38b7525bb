"""Celery: one task an order, which takes it through the same four steps, one session and commit a step.

    DATABASE_URL=postgresql+psycopg://... REDIS_URL=redis://... celery -A celery_app worker
    DATABASE_URL=... REDIS_URL=... python celery_app.py 1000    places orders, and prints the orders per second

Payment and fulfilment take no time here; what is measured is the way.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from datetime import UTC, datetime
from decimal import Decimal

from celery import Celery
from sqlalchemy import ForeignKey, Numeric, String, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

engine = create_engine(os.environ["DATABASE_URL"])
app = Celery("celery_app", broker=os.environ["REDIS_URL"])
app.conf.task_ignore_result = True

STEPS = ("payment_processing", "confirmed", "processing", "completed")


def now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "celery_order_items"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str] = mapped_column(ForeignKey("celery_orders.order_id"), index=True)
    item_id: Mapped[str]
    item_name: Mapped[str]
    quantity: Mapped[int]
    price: Mapped[Decimal] = mapped_column(Numeric(12, 2))


class Order(Base):
    __tablename__ = "celery_orders"

    order_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    customer_id: Mapped[str] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(String(24), index=True)
    total_amount: Mapped[Decimal] = mapped_column(Numeric(12, 2))
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)
    items: Mapped[list[Item]] = relationship()


@app.task
def process(order_id: str) -> None:
    with Session(engine) as session:
        order = session.get(Order, order_id)
        if order is None:
            return
        for status in STEPS:
            order.status = status
            session.commit()


def place(count: int) -> float:
    """Store orders in one transaction, hand each to Celery, and return orders per second until all are completed.

    Storing them is not counted: a web process would have done it.
    """
    Base.metadata.create_all(engine)
    ids = [str(uuid.uuid4()) for _ in range(count)]
    with Session(engine) as session:
        session.add_all(
            Order(
                order_id=order_id,
                customer_id="customer_123",
                status="pending",
                total_amount=Decimal("29.47"),
                items=[
                    Item(item_id="item_001", item_name="Burger", quantity=2, price=Decimal("12.99")),
                    Item(item_id="item_002", item_name="Fries", quantity=1, price=Decimal("3.49")),
                ],
            )
            for order_id in ids
        )
        session.commit()
    left = select(func.count()).select_from(Order).where(Order.status != "completed")
    started = time.perf_counter()
    for order_id in ids:
        process.delay(order_id)
    with Session(engine) as session:
        while session.execute(left).scalar_one():
            session.rollback()
            time.sleep(0.02)
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    print(place(int(sys.argv[1])))
