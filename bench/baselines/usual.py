"""Usual: FastAPI, SQLAlchemy's async ORM, one session and one commit a request, a Redis list as the queue.

    DATABASE_URL=postgresql+asyncpg://... REDIS_URL=redis://... uvicorn usual:app

The design of a food-delivery order service: the order and its lines are stored, its id is pushed to the list from
which payment workers take it, and its status says so. Reads go to the database.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis
from sqlalchemy import ForeignKey, Numeric, String, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

engine = create_async_engine(os.environ["DATABASE_URL"], pool_size=20, max_overflow=10)
new_session = async_sessionmaker(engine, expire_on_commit=False)
queue = Redis.from_url(os.environ["REDIS_URL"])


def now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "order_items"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str] = mapped_column(ForeignKey("orders.order_id"), index=True)
    item_id: Mapped[str]
    item_name: Mapped[str]
    quantity: Mapped[int]
    price: Mapped[Decimal] = mapped_column(Numeric(12, 2))


class Order(Base):
    __tablename__ = "orders"

    order_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    customer_id: Mapped[str] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(String(24), index=True)
    total_amount: Mapped[Decimal] = mapped_column(Numeric(12, 2))
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)
    items: Mapped[list[Item]] = relationship()


class ItemIn(BaseModel):
    item_id: str
    item_name: str
    quantity: int = Field(ge=1)
    price: Decimal = Field(ge=0)


class OrderIn(BaseModel):
    order_id: str | None = None
    customer_id: str
    items: list[ItemIn] = Field(min_length=1)


class ItemOut(ItemIn):
    model_config = ConfigDict(from_attributes=True)


class OrderOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    order_id: str
    customer_id: str
    status: str
    total_amount: Decimal
    created_at: datetime
    updated_at: datetime
    items: list[ItemOut]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()
    await queue.aclose()


async def session() -> AsyncIterator[AsyncSession]:
    async with new_session() as opened:
        yield opened


Session = Annotated[AsyncSession, Depends(session)]
app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=202)
async def create(body: OrderIn, session: Session) -> OrderOut:
    order = Order(
        order_id=body.order_id or str(uuid.uuid4()),
        customer_id=body.customer_id,
        status="pending",
        total_amount=sum((item.price * item.quantity for item in body.items), Decimal(0)),
        items=[Item(**item.model_dump()) for item in body.items],
    )
    session.add(order)
    await session.flush()
    await queue.lpush("order_queue", order.order_id)
    order.status = "payment_processing"
    await session.commit()
    return OrderOut.model_validate(order)


@app.get("/orders/{order_id}")
async def read(order_id: str, session: Session) -> OrderOut:
    found = await session.execute(
        select(Order).where(Order.order_id == order_id).options(selectinload(Order.items))
    )
    order = found.scalar_one_or_none()
    if order is None:
        raise HTTPException(404, "Order not found")
    return OrderOut.model_validate(order)


@app.get("/orders")
async def page(session: Session, limit: int = 20, offset: int = 0) -> list[OrderOut]:
    found = await session.execute(
        select(Order)
        .order_by(Order.created_at.desc())
        .limit(limit)
        .offset(offset)
        .options(selectinload(Order.items))
    )
    return [OrderOut.model_validate(order) for order in found.scalars()]
