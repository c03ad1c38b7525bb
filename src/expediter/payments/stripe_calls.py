"""How Stripe is asked, and what its answers mean: it was done, it was not, or nobody knows."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import msgspec
import stripe

from expediter.backends.calls import Caller, NoAnswer, NotSent, retry_after
from expediter.errors import (
    ConfigurationError,
    PaymentConflict,
    PaymentDeclined,
    PaymentError,
    PaymentUnavailable,
    PaymentUnknown,
)


class Transport(stripe.HTTPClient):
    """How the library's requests go out: it would not say whether one that failed can have arrived."""

    name = "expediter"

    def __init__(self, caller: Caller) -> None:
        super().__init__()
        self._caller = caller

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: Any = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        """Send a request. Raises NotSent, NoAnswer."""
        body = post_data.encode() if isinstance(post_data, str) else post_data
        answer = await self._caller.send(method.upper(), url, body, headers)
        return answer.body, answer.status, answer.headers


class Said(NamedTuple):
    """An answer, and whether it is one that Stripe has saved under the key."""

    document: Any
    saved: bool


async def ask(call: Awaitable[Any], kind: type[Any]) -> Said:
    """Return what is answered, as `kind`. Raises PaymentError, whose cause is the library's own error."""
    try:
        response = (await call).last_response
        return Said(msgspec.json.decode(response.body, type=kind), _replayed(response.headers))
    except NotSent as error:
        raise PaymentUnavailable(f"Stripe {error}") from error
    except NoAnswer as error:
        raise PaymentUnknown(f"Stripe {error}") from error
    except stripe.StripeError as error:
        raise _meaning(error) from error
    except (msgspec.MsgspecError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise PaymentUnknown(f"Stripe gave an answer that cannot be read: {error}") from error


async def read(call: Awaitable[Any], kind: type[Any]) -> Any:
    """Return what is there. A refusal to say it is no refusal of the payment: it raises PaymentUnknown."""
    try:
        return (await ask(call, kind)).document
    except PaymentDeclined as error:
        raise PaymentUnknown(str(error)) from error.__cause__


def base_of(address: str) -> SplitResult:
    """Return the parts of an address. Raises ConfigurationError."""
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        raise ConfigurationError(f"STRIPE_API_BASE cannot be read: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise ConfigurationError("STRIPE_API_BASE begins with https:// (or http:// for tests)")
    return parts


def _replayed(headers: Mapping[str, str] | None) -> bool:
    return bool(headers) and str((headers or {}).get("Idempotent-Replayed")).lower() == "true"


def is_saved(error: BaseException | None) -> bool:
    """Whether this is a failure of Stripe's own that it has saved, and will answer again."""
    return isinstance(error, stripe.APIError) and (error.http_status or 0) >= 500 and _replayed(error.headers)


def _meaning(error: stripe.StripeError) -> PaymentError:
    """Return what an answer means that is not the one asked for."""
    status, said = error.http_status, error.user_message or error.code
    match error:
        case stripe.CardError():
            return PaymentDeclined(said or "The payment was declined")
        case stripe.IdempotencyError():
            return PaymentConflict(said or "Stripe has something else under this key")
        case stripe.RateLimitError():
            return PaymentUnavailable(f"Stripe is busy ({status})", retry_after(error.headers or {}))
        case stripe.AuthenticationError() | stripe.PermissionError():
            # Its own words repeat a part of the key.
            return PaymentUnavailable(f"Stripe does not take the key in STRIPE_API_KEY for this ({status})")
        case stripe.InvalidRequestError():
            return PaymentDeclined(said or "Stripe refuses the request")
        case _:
            return PaymentUnknown(f"Stripe answered with status {status}{f': {said}' if said else ''}"[:500])
