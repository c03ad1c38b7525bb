"""Where money moves: the port, and the table of its implementations."""

from __future__ import annotations

from typing import Protocol
from urllib.parse import urlsplit

from expediter.errors import ConfigurationError
from expediter.payments.simulated import SimulatedGateway


class PaymentGateway(Protocol):
    """Where money moves. An implementation must honour `idempotency_key` for `key_window_seconds`.

    Every call raises PaymentDeclined (definite: no money moved, and the key is used up), PaymentUnavailable
    (definite: this call did nothing) or PaymentUnknown (no answer: it may have happened).
    """

    name: str
    key_window_seconds: int

    async def charge(self, amount_minor: int, currency: str, *, idempotency_key: str, token: str | None) -> str:
        """Charge `amount_minor` (whole minor units of `currency`) and return the gateway's own reference."""

    async def find(self, idempotency_key: str) -> str | None:
        """Return the reference of the charge made under this key, None if the gateway knows of none."""

    async def refund(self, idempotency_key: str) -> str:
        """Give back what was charged under this key, once however often it is asked; return the reference."""

    async def close(self) -> None:
        """Give back connections."""


def open_gateway(
    address: str, *, success_rate: float, latency_ms_min: int, latency_ms_max: int
) -> SimulatedGateway:
    """Return the gateway that `address` names: `simulated`, or `simulated://[/ledger/file][?seed=7]`.

    Raises ConfigurationError for any other.
    """
    try:
        parts = urlsplit(address if "://" in address else f"{address}://")
    except ValueError as error:
        raise ConfigurationError(f"PAYMENT_GATEWAY={address} cannot be read: {error}") from error
    if parts.scheme != "simulated":
        raise ConfigurationError(f"PAYMENT_GATEWAY={address} is not known; this version has: simulated")
    return SimulatedGateway.from_address(
        parts, success_rate=success_rate, latency_ms_min=latency_ms_min, latency_ms_max=latency_ms_max
    )
