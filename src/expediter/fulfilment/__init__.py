"""Who carries an order out (cooks, packs, issues): the port, and the table of its implementations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol
from urllib.parse import parse_qsl

from expediter.errors import ConfigurationError
from expediter.fulfilment.manual import ManualFulfiller
from expediter.fulfilment.simulated import SimulatedFulfiller
from expediter.orders.order import Line, Order


class Fulfiller(Protocol):
    """Who carries an order out. It may be asked twice for the same order id and must then do it once.

    Raises FulfilmentRefused (this order never) or FulfilmentUnavailable (try again).
    """

    name: str
    #: Whether callers move the orders on, and no worker does.
    by_hand: bool

    async def fulfil(self, order: Order, lines: Callable[[], Awaitable[Sequence[Line]]]) -> None:
        """Carry `order` out; `lines()` reads its lines."""

    async def close(self) -> None:
        """Give back connections."""


def open_fulfiller(address: str, *, latency_ms_min: int, latency_ms_max: int) -> Fulfiller:
    """Return the fulfiller that `address` names: `manual`, `simulated`, or `simulated://?success_rate=0.9&seed=7`.

    Raises ConfigurationError for any other.
    """
    if address == "manual":
        return ManualFulfiller()
    scheme, _, options = address.partition("://")
    try:
        given = dict(parse_qsl(options.removeprefix("?"), strict_parsing=True)) if options else {}
        success_rate, seed = float(given.pop("success_rate", "1")), given.pop("seed", None)
        if scheme != "simulated" or given or not 0 <= success_rate <= 1:
            raise ValueError(address)
        return SimulatedFulfiller(
            success_rate=success_rate,
            latency_ms_min=latency_ms_min,
            latency_ms_max=latency_ms_max,
            seed=None if seed is None else int(seed),
        )
    except ValueError as error:
        raise ConfigurationError(
            f"FULFILMENT={address} is not known; this version has: manual, simulated, simulated://?success_rate=0.9&seed=7"
        ) from error
