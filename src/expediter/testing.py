"""Fakes for tests of code that uses Expediter: a payment gateway that does as it is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from expediter.errors import PaymentError


class GatewayCall(NamedTuple):
    """One call that a ScriptedGateway received; `what` is "charge", "find" or "refund"."""

    what: str
    idempotency_key: str


class ScriptedGateway:
    """A PaymentGateway that answers from a script and records every call.

    Each step of the script is a reference (success), None (for `find`: nothing known), or a PaymentError to raise;
    after the last step every call succeeds.
    """

    name = "scripted"

    def __init__(
        self, script: Iterable[str | None | PaymentError] = (), *, key_window_seconds: int = 86_400
    ) -> None:
        """Follow `script`, in the order of the calls."""
        self.key_window_seconds = key_window_seconds
        self.calls: list[GatewayCall] = []
        self._script = list(script)

    async def charge(self, amount_minor: int, currency: str, *, idempotency_key: str, token: str | None) -> str:
        """See PaymentGateway."""
        return self._answer("charge", idempotency_key) or "reference"

    async def find(self, idempotency_key: str) -> str | None:
        """See PaymentGateway."""
        return self._answer("find", idempotency_key)

    async def refund(self, idempotency_key: str) -> str:
        """See PaymentGateway."""
        return self._answer("refund", idempotency_key) or "reference"

    async def close(self) -> None:
        """Nothing is held."""

    def _answer(self, what: str, idempotency_key: str) -> str | None:
        self.calls.append(GatewayCall(what, idempotency_key))
        step = self._script.pop(0) if self._script else "reference"
        if isinstance(step, PaymentError):
            raise step
        return step
