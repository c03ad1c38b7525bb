"""A gateway behind the HTTP payment protocol (docs/payments.md): JSON over HTTP, amounts in whole minor units.

What an answer means is decided here, once: it was done, it was not, or nobody knows. Whoever asks settles the last
by `find`. So everything that is not surely one of the first two is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

import msgspec

from expediter.backends.calls import Called, Caller, NoAnswer, NotSent, retry_after
from expediter.errors import PaymentConflict, PaymentDeclined, PaymentUnavailable, PaymentUnknown
from expediter.orders.order import MICROSECONDS
from expediter.payments.port import (
    Action,
    Charge,
    Payment,
    PaymentPage,
    PaymentState,
    Refund,
    Refunded,
    RefundState,
)

#: `GET ?key=` answers for as long as the gateway keeps a payment, so nothing is forgotten soon.
KEY_WINDOW_SECONDS = 365 * 86_400.0
#: Characters of the address or the secret of what a customer must do; a payment with a longer one counts as
#: unknown.
ACTION_CHARACTERS_MAX = 2_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

T = TypeVar("T")


class _Error(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _Action(msgspec.Struct):
    type: str
    url: str | None = None
    client_secret: str | None = None
    expires_at: datetime | None = None


class PaymentDocument(msgspec.Struct):
    """A payment document as it comes; what is not read here is passed over."""

    id: str
    key: str
    status: PaymentState
    amount_minor: int
    currency: str
    order_id: str | None = None
    captured_minor: int = 0
    refunded_minor: int = 0
    action: _Action | None = None
    error: _Error | None = None
    created_at: datetime | None = None


class _Page(msgspec.Struct):
    payments: list[PaymentDocument]
    next_cursor: str | None = None


class _RefundDocument(msgspec.Struct):
    id: str
    status: RefundState
    amount_minor: int
    error: _Error | str | None = None


class _Refusal(msgspec.Struct):
    error: _Error | str | None = None


class HttpGateway:
    """A gateway at an address. `token` goes along as a bearer token."""

    key_window_seconds = KEY_WINDOW_SECONDS

    def __init__(self, base: SplitResult, token: str | None) -> None:
        """Nothing is opened yet. Raises ConfigurationError for an address that cannot be used."""
        self._caller = Caller("PAYMENT_GATEWAY", base, token)
        self.name = f"the gateway at {base.netloc}"

    async def charge(self, charge: Charge) -> Payment:
        """See PaymentGateway."""
        body = {
            "key": charge.key,
            "order_id": charge.order_id,
            "amount_minor": charge.amount_minor,
            "currency": charge.currency,
            "token": charge.token,
            "capture": charge.capture,
            "customer_id": charge.customer_id,
            "return_url": charge.return_url,
        }
        answer = await self._ask("POST", "/payments", body, key=charge.key)
        return self._payment(self._about(charge.key, self._accepted(answer, PaymentDocument)))

    async def find(self, key: str) -> Payment | None:
        """See PaymentGateway."""
        found = await self._look(key)
        return None if found is None else self._payment(found)

    async def capture(self, key: str, amount_minor: int) -> Payment:
        """See PaymentGateway."""
        return await self._settle(key, "capture", {"amount_minor": amount_minor})

    async def void(self, key: str) -> Payment:
        """See PaymentGateway."""
        return await self._settle(key, "void", {})

    async def _settle(self, key: str, what: str, body: Mapping[str, Any]) -> Payment:
        """Ask for the capture or the void of a payment, unless it is settled; a refusal is looked at again."""
        found = await self._look(key)
        if found is None:
            raise PaymentDeclined("The gateway knows of no payment under this key")
        if found.status not in _UNSETTLED[what]:
            return self._payment(found)
        answer = await self._ask("POST", f"/payments/{quote(found.id, safe='')}/{what}", body, key=f"{key}-{what}")
        if answer.status in _REFUSED or answer.status == 409:
            # It was settled by somebody else meanwhile, or cannot be: what it is now says which.
            said = _refusal(answer.body)
            now = await self._look(key)
            if now is None or now.status in _UNSETTLED[what]:
                raise PaymentDeclined(said or f"The gateway refuses the {what}")
            return self._payment(now)
        return self._payment(self._about(key, self._accepted(answer, PaymentDocument)))

    async def payments(self, since: int, until: int, cursor: str | None) -> PaymentPage:
        """See PaymentLister."""
        query = {"since": _written(since), "until": _written(until)}
        if cursor is not None:
            query["cursor"] = cursor
        page = self._accepted(await self._ask("GET", "/payments", None, query=query), _Page)
        return PaymentPage([self._payment(document) for document in page.payments], page.next_cursor)

    async def refund(self, refund: Refund) -> Refunded:
        """See PaymentGateway. The payment is looked up first: its id may be longer than what is stored of it."""
        payment = await self._look(refund.payment_key)
        if payment is None:
            raise PaymentDeclined("The gateway knows of no payment to refund")
        body = {"key": refund.key, "amount_minor": refund.amount_minor, "reason": refund.reason}
        answer = await self._ask("POST", f"/payments/{quote(payment.id, safe='')}/refunds", body, key=refund.key)
        if answer.status in _REFUSED:
            raise PaymentDeclined(_refusal(answer.body) or f"The gateway refuses the refund ({answer.status})")
        document = self._accepted(answer, _RefundDocument)
        if document.amount_minor != refund.amount_minor:
            raise PaymentConflict(f"The gateway has a refund of {document.amount_minor} under this key")
        return Refunded(reference=document.id, state=document.status, error=_said(document.error))

    async def close(self) -> None:
        """See PaymentGateway."""
        await self._caller.close()

    async def _look(self, key: str) -> PaymentDocument | None:
        answer = await self._ask("GET", "/payments", None, query={"key": key})
        if answer.status == 404:
            return None
        return self._about(key, self._accepted(answer, PaymentDocument))

    def _about(self, key: str, document: PaymentDocument) -> PaymentDocument:
        if document.key != key:
            raise PaymentUnknown(f"{self.name} was asked about one payment and answered about another")
        return document

    def _payment(self, document: PaymentDocument) -> Payment:
        """Return what a document says. Raises PaymentUnknown for one that leaves out what the customer must do."""
        try:
            return as_payment(document)
        except ValueError as error:
            raise PaymentUnknown(f"{self.name} gave an answer that cannot be used: {error}") from error

    def _accepted(self, answer: Called, kind: type[T]) -> T:
        """Return what a good answer says; raise what any other one means."""
        status = answer.status
        if status in (200, 201):
            try:
                return msgspec.json.decode(answer.body, type=kind)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise PaymentUnknown(f"{self.name} gave an answer that cannot be read: {error}") from error
        said = _refusal(answer.body)
        if status == 402:
            raise PaymentDeclined(said or "The payment was declined")
        if status == 409:
            raise PaymentConflict(said or "The gateway has something else under this key")
        again = retry_after(answer.headers)
        if status == 429 or (status == 503 and again is not None):
            raise PaymentUnavailable(f"{self.name} is busy ({status}){said and f': {said}'}", again)
        raise PaymentUnknown(f"{self.name} answered with status {status}{said and f': {said}'}")

    async def _ask(
        self,
        method: str,
        path: str,
        document: Mapping[str, Any] | None,
        *,
        key: str = "",
        query: Mapping[str, str] | None = None,
    ) -> Called:
        """Send one request. Raises PaymentUnavailable where it cannot have arrived, PaymentUnknown elsewhere."""
        body = None if document is None else msgspec.json.encode(document)
        try:
            return await self._caller.call(method, path, body, key=key, query=query)
        except NotSent as error:
            raise PaymentUnavailable(f"{self.name} {error}") from error
        except NoAnswer as error:
            raise PaymentUnknown(f"{self.name} {error}") from error


#: How a gateway refuses what is asked of a payment that it has: nothing was done, and will not be.
_REFUSED = frozenset({400, 402, 404, 410, 422})
#: In which states there is something to capture, and something to let go of.
_UNSETTLED = {
    "capture": frozenset({PaymentState.AUTHORIZED}),
    "void": frozenset({PaymentState.AUTHORIZED, PaymentState.ACTION_REQUIRED, PaymentState.PROCESSING}),
}


def as_payment(document: PaymentDocument) -> Payment:
    """Return what a payment document says. Raises ValueError for an action that leads nowhere."""
    action = None
    if document.status is PaymentState.ACTION_REQUIRED:
        action = _action(document.action)
    captured = document.captured_minor
    if document.status is PaymentState.SUCCEEDED and not captured:
        captured = document.amount_minor
    return Payment(
        reference=document.id,
        state=document.status,
        amount_minor=document.amount_minor,
        currency=document.currency,
        captured_minor=captured,
        refunded_minor=document.refunded_minor,
        error=_said(document.error),
        action=action,
        key=document.key,
        order_id=document.order_id,
        created_at=_microseconds(document.created_at),
    )


def _action(given: _Action | None) -> Action:
    if given is None:
        raise ValueError("it says action_required, and not which")
    if given.type == "redirect" and urlsplit(given.url or "").scheme not in ("http", "https"):
        raise ValueError("a redirect needs a url, of http or https")
    if given.type == "client_secret" and not given.client_secret:
        raise ValueError("a client_secret is missing")
    if given.type not in ("redirect", "client_secret"):
        raise ValueError(f"the action {given.type!r} is not known")
    if len(given.url or given.client_secret or "") > ACTION_CHARACTERS_MAX:
        raise ValueError(f"an action is longer than {ACTION_CHARACTERS_MAX} characters")
    return Action(
        type=given.type,
        url=given.url if given.type == "redirect" else None,
        client_secret=given.client_secret if given.type == "client_secret" else None,
        expires_at=_microseconds(given.expires_at),
    )


def _microseconds(at: datetime | None) -> int | None:
    if at is None:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return int(at.timestamp() * MICROSECONDS)


def _written(at: int) -> str:
    return (_EPOCH + timedelta(microseconds=at)).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _refusal(body: bytes) -> str:
    try:
        return _said(msgspec.json.decode(body, type=_Refusal).error) or ""
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""


def _said(error: _Error | str | None) -> str | None:
    if isinstance(error, _Error):
        return error.message or error.code
    return error
