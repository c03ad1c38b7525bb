"""Who carries an order out (cooks, packs, issues): the port, and the table of its implementations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from expediter.errors import ConfigurationError
from expediter.fulfilment.simulated import SimulatedFulfiller
from expediter.orders import Line, Order


class Fulfiller(Protocol):
    """Who carries an order out. It may be asked twice for the same order id and must then do it once.

    Raises FulfilmentRefused (this order never) or FulfilmentUnavailable (try again).
    """

    name: str

    async def fulfil(self, order: Order, lines: Callable[[], Awaitable[Sequence[Line]]]) -> None:
        """Carry `order` out; `lines()` reads its lines."""

    async def close(self) -> None:
        """Give back connections."""


def open_fulfiller(address: str, *, latency_ms_min: int, latency_ms_max: int) -> SimulatedFulfiller:
    """Return the fulfiller that `address` names: `simulated`. Raises ConfigurationError for any other."""
    if address != "simulated":
        raise ConfigurationError(f"FULFILMENT={address} is not known; this version has: simulated")
    return SimulatedFulfiller(latency_ms_min=latency_ms_min, latency_ms_max=latency_ms_max)
