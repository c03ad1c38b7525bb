"""Where money moves: the port, and the table of its implementations."""

from __future__ import annotations

from urllib.parse import urlsplit

from expediter.errors import ConfigurationError
from expediter.payments.port import (
    Action,
    Charge,
    Payment,
    PaymentGateway,
    PaymentLister,
    PaymentPage,
    PaymentState,
    Refund,
    Refunded,
    RefundState,
)
from expediter.payments.simulated import SimulatedGateway

__all__ = [
    "Action",
    "Charge",
    "Payment",
    "PaymentGateway",
    "PaymentLister",
    "PaymentPage",
    "PaymentState",
    "Refund",
    "RefundState",
    "Refunded",
    "open_gateway",
]

_KNOWN = "simulated, simulated:///ledger/file?seed=7, https://host/base, python:package.module:Name"


def open_gateway(
    address: str,
    *,
    success_rate: float,
    latency_ms_min: int,
    latency_ms_max: int,
    token: str | None = None,
    reserving: bool = False,
) -> PaymentGateway:
    """Return the gateway that `address` names; the rate and the latencies are the simulation's.

    `reserving`: it will be asked to reserve money, and to capture it later.

    Raises ConfigurationError for an address that is not known, or cannot be used.
    """
    if address.startswith("python:"):
        from expediter.payments.python import load_gateway

        return load_gateway(address.removeprefix("python:"), reserving=reserving)
    try:
        parts = urlsplit(address if "://" in address else f"{address}://")
        _ = parts.port
    except ValueError as error:
        raise ConfigurationError(f"PAYMENT_GATEWAY cannot be read: {error}") from error
    if parts.scheme in ("http", "https"):
        from expediter.payments.http import HttpGateway

        return HttpGateway(parts, token)
    if parts.scheme != "simulated":
        raise ConfigurationError(f"PAYMENT_GATEWAY={address} is not known; there are: {_KNOWN}")
    return SimulatedGateway.from_address(
        parts, success_rate=success_rate, latency_ms_min=latency_ms_min, latency_ms_max=latency_ms_max
    )
