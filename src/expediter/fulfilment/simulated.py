"""A fulfiller that only takes its time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from expediter.orders import Line, Order


class SimulatedFulfiller:
    """Carries every order out after a random delay."""

    name = "simulated"

    def __init__(self, *, latency_ms_min: int = 0, latency_ms_max: int = 0, seed: int | None = None) -> None:
        """Take a range of milliseconds, and a seed for repeatable runs."""
        self._latency = (latency_ms_min / 1000, latency_ms_max / 1000)
        self._random = Random(seed)

    async def fulfil(self, order: Order, lines: Callable[[], Awaitable[Sequence[Line]]]) -> None:
        """See Fulfiller."""
        low, high = self._latency
        if high > 0:
            await asyncio.sleep(self._random.uniform(low, high))

    async def close(self) -> None:
        """Nothing is held."""
