"""Made-up orders, for filling a database and for trying things out."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from expediter.orders.commands import PlaceOrder
from expediter.orders.order import Line, Stages

_MENU = (
    ("item_001", "Burger", 1299),
    ("item_002", "Fries", 349),
    ("item_003", "Lemonade", 275),
    ("item_004", "Salad", 890),
    ("item_005", "Soup of the day", 640),
    ("item_006", "Pizza Margherita", 1050),
    ("item_007", "Tiramisu", 580),
    ("item_008", "Espresso", 240),
)


def sample_orders(
    count: int,
    random: Random,
    new_id: Callable[[], str],
    *,
    currency: str,
    stages: Stages,
    metadata: str = "{}",
    fresh: bool = True,
) -> list[PlaceOrder]:
    """Return commands for `count` orders of one to four priced lines, each by one of 500 customers.

    Not `fresh`: an order with an id that `new_id` returns may be there already.
    """
    return [_sample(random, new_id(), currency, stages, metadata, fresh) for _ in range(count)]


def _sample(
    random: Random, order_id: str, currency: str, stages: Stages, metadata: str, fresh: bool
) -> PlaceOrder:
    chosen = random.sample(_MENU, random.randint(1, 4))
    lines = tuple(
        Line(number, item_id, name, random.randint(1, 3), price)
        for number, (item_id, name, price) in enumerate(chosen, 1)
    )
    return PlaceOrder(
        order_id=order_id,
        fresh=fresh,
        customer_id=f"customer_{random.randint(1, 500)}",
        customer_name=None,
        currency=currency,
        total_minor=sum(line.quantity * (line.price_minor or 0) for line in lines),
        priced=True,
        lines=lines,
        metadata=metadata,
        payment_token=None,
        stages=stages,
    )
