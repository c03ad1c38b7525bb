"""Orders that callers carry out: the kitchen, the shop, another program."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from expediter.errors import FulfilmentUnavailable
from expediter.fulfilment.port import Handed
from expediter.orders.order import Line, Order


class ManualFulfiller:
    """Nobody is asked: whoever does the work says so by PATCH of the order's status."""

    name = "manual"
    by_hand = True

    async def fulfil(self, order: Order, lines: Callable[[], Awaitable[Sequence[Line]]]) -> Handed:
        """See Fulfiller. No worker takes these jobs; one that has it all the same leaves the order as it is."""
        raise FulfilmentUnavailable("It waits for a caller to change its status (FULFILMENT=manual)")

    async def close(self) -> None:
        """Nothing is held."""
