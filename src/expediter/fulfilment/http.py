"""A fulfiller behind HTTP (docs/fulfilment.md): it gets the order document, and answers what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import SplitResult

import msgspec

from expediter.backends.calls import Called, Caller, NoAnswer, NotSent
from expediter.errors import FulfilmentRefused, FulfilmentUnavailable
from expediter.fulfilment.port import Handed, key_of
from expediter.orders.documents import order_document
from expediter.orders.order import Line, Order

#: Refusals that may be none the next time: too slow, in the way of another, too early, too many.
_TRY_AGAIN = frozenset({408, 409, 425, 429})


class _Refusal(msgspec.Struct):
    error: str | None = None
    detail: str | None = None


class HttpFulfiller:
    """Whoever carries orders out, at an address. `token` goes along as a bearer token."""

    by_hand = False

    def __init__(self, address: SplitResult, token: str | None) -> None:
        """Nothing is opened yet. Raises ConfigurationError for an address that cannot be used."""
        self._caller = Caller("FULFILMENT", address, token)
        self.name = f"the fulfiller at {address.netloc}"

    async def fulfil(self, order: Order, lines: Callable[[], Awaitable[Sequence[Line]]]) -> Handed:
        """See Fulfiller."""
        document = order_document(order, await lines())
        try:
            answer = await self._caller.call("POST", "", document, key=key_of(order))
        except (NotSent, NoAnswer) as error:
            raise FulfilmentUnavailable(f"{self.name} {error}") from error
        if answer.status in (200, 204):
            return Handed.DONE
        if answer.status == 202:
            return Handed.TAKEN
        said = _said(answer)
        if 400 <= answer.status < 500 and answer.status not in _TRY_AGAIN:
            raise FulfilmentRefused(said or f"{self.name} refused the order with status {answer.status}")
        raise FulfilmentUnavailable(f"{self.name} answered with status {answer.status}{said and f': {said}'}")

    async def close(self) -> None:
        """See Fulfiller."""
        await self._caller.close()


def _said(answer: Called) -> str:
    try:
        refusal = msgspec.json.decode(answer.body, type=_Refusal)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""
    return refusal.error or refusal.detail or ""
