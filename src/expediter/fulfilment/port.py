"""What is asked of whoever carries an order out, what they may say to it, and the port itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from expediter.orders.order import Line, Order


class Handed(StrEnum):
    """What became of an order that was handed over."""

    #: It is carried out.
    DONE = "done"
    #: It was taken; whoever carries it out reports later.
    TAKEN = "taken"


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """An order as it is handed over. `key` is the same however often it has to be handed over."""

    order_id: str
    key: str
    customer_id: int | str | None
    customer_name: str | None
    currency: str
    total_minor: int
    items: tuple[Line, ...]
    metadata: dict[str, Any]


class Fulfiller(Protocol):
    """Who carries an order out. It may be asked twice for the same order and must then do it once.

    Raises FulfilmentRefused (this order never) or FulfilmentUnavailable (try again).
    """

    name: str
    #: Whether callers move the orders on, and no worker does.
    by_hand: bool

    async def fulfil(self, order: Order, lines: Callable[[], Awaitable[Sequence[Line]]]) -> Handed:
        """Carry `order` out, or take it; `lines()` reads its lines."""

    async def close(self) -> None:
        """Give back connections."""


def key_of(order: Order) -> str:
    """Return the key under which an order is handed over: of the order and its generation."""
    return f"{order.order_id}-{order.generation}"


def ticket_of(order: Order, lines: Sequence[Line]) -> Ticket:
    """Return an order as it is handed over."""
    return Ticket(
        order_id=order.order_id,
        key=key_of(order),
        customer_id=order.customer_id,
        customer_name=order.customer_name,
        currency=order.currency,
        total_minor=order.total_minor,
        items=tuple(lines),
        metadata=msgspec.json.decode(order.metadata),
    )
