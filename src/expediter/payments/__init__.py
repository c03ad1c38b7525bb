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

_KNOWN = "simulated, simulated:///ledger/file?seed=7, https://host/base, stripe:, python:package.module:Name"


def open_gateway(
    address: str,
    *,
    success_rate: float,
    latency_ms_min: int,
    latency_ms_max: int,
    token: str | None = None,
    reserving: bool = False,
    stripe_api_key: str | None = None,
    stripe_api_base: str | None = None,
) -> PaymentGateway:
    """Return the gateway that `address` names; the rate and the latencies are the simulation's.

    `reserving`: it will be asked to reserve money, and to capture it later.

    Raises ConfigurationError for an address that is not known, or cannot be used.
    """
    if address.startswith("python:"):
        from expediter.payments.python import load_gateway

        return load_gateway(address.removeprefix("python:"), reserving=reserving)
    if address.partition(":")[0] == "stripe":
        return _stripe(address, stripe_api_key, stripe_api_base)
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


def _stripe(address: str, api_key: str | None, api_base: str | None) -> PaymentGateway:
    # What stands behind it may be a key, and is not repeated.
    if address not in ("stripe", "stripe:"):
        raise ConfigurationError("PAYMENT_GATEWAY=stripe: has nothing behind it: the key goes into STRIPE_API_KEY")
    if not api_key:
        raise ConfigurationError("PAYMENT_GATEWAY=stripe: needs STRIPE_API_KEY, or a file in STRIPE_API_KEY_FILE")
    try:
        from expediter.payments.stripe import StripeGateway
    except ModuleNotFoundError as error:
        raise ConfigurationError("PAYMENT_GATEWAY=stripe: needs: pip install 'expediter[stripe]'") from error
    return StripeGateway(api_key, api_base)
