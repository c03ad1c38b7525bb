"""Who carries an order out (cooks, packs, issues): the port, and the table of its implementations."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

from expediter.errors import ConfigurationError
from expediter.fulfilment.manual import ManualFulfiller
from expediter.fulfilment.port import Fulfiller, Handed, Ticket
from expediter.fulfilment.simulated import SimulatedFulfiller

__all__ = ["Fulfiller", "Handed", "Ticket", "open_fulfiller"]

_KNOWN = (
    "manual, simulated, simulated://?success_rate=0.9&seed=7, https://host/path, python:package.module:function"
)


def open_fulfiller(
    address: str, *, latency_ms_min: int, latency_ms_max: int, token: str | None = None
) -> Fulfiller:
    """Return the fulfiller that `address` names; the latencies are the simulation's.

    Raises ConfigurationError for an address that is not known, or cannot be used.
    """
    if address == "manual":
        return ManualFulfiller()
    if address.startswith("python:"):
        from expediter.fulfilment.python import PythonFulfiller

        return PythonFulfiller(address.removeprefix("python:"))
    if address.startswith(("http://", "https://")):
        from expediter.fulfilment.http import HttpFulfiller

        try:
            parts = urlsplit(address)
            _ = parts.port
        except ValueError as error:
            raise ConfigurationError(f"FULFILMENT cannot be read: {error}") from error
        return HttpFulfiller(parts, token)
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
        raise ConfigurationError(f"FULFILMENT={address} is not known; there are: {_KNOWN}") from error
