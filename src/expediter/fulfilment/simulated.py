"""A fulfiller that only takes its time, and fails at a given rate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from expediter.errors import FulfilmentUnavailable
from expediter.fulfilment.port import Handed
from expediter.orders.order import Line, Order


class SimulatedFulfiller:
    """Carries orders out after a random delay; a failure is a fulfiller that is briefly unavailable."""

    name = "simulated"
    by_hand = False

    def __init__(
        self,
        *,
        success_rate: float = 1.0,
        latency_ms_min: int = 0,
        latency_ms_max: int = 0,
        seed: int | None = None,
    ) -> None:
        """Take a rate in [0, 1], a range of milliseconds, and a seed for repeatable runs."""
        self._success_rate = success_rate
        self._latency = (latency_ms_min / 1000, latency_ms_max / 1000)
        self._random = Random(seed)

    async def fulfil(self, order: Order, lines: Callable[[], Awaitable[Sequence[Line]]]) -> Handed:
        """See Fulfiller."""
        low, high = self._latency
        if high > 0:
            await asyncio.sleep(self._random.uniform(low, high))
        if self._success_rate < 1 and self._random.random() >= self._success_rate:
            raise FulfilmentUnavailable("The fulfiller is unavailable (simulated)")
        return Handed.DONE

    async def close(self) -> None:
        """Nothing is held."""
