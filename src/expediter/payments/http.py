"""A gateway behind the HTTP payment protocol (docs/payments.md): JSON over HTTP, amounts in whole minor units.

What an answer means is decided here, once: it was done, it was not, or nobody knows. Whoever asks settles the last
by `find`. So everything that is not surely one of the first two is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote

import msgspec

from expediter.backends.calls import Called, Caller, NoAnswer, NotSent, retry_after
from expediter.errors import PaymentConflict, PaymentDeclined, PaymentUnavailable, PaymentUnknown
from expediter.payments.port import Charge, Payment, PaymentState, Refund, Refunded, RefundState

#: `GET ?key=` answers for as long as the gateway keeps a payment, so nothing is forgotten soon.
KEY_WINDOW_SECONDS = 365 * 86_400.0

T = TypeVar("T")


class _Error(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _PaymentDocument(msgspec.Struct):
    """A payment document as it comes; what is not read here is passed over."""

    id: str
    key: str
    status: PaymentState
    amount_minor: int
    currency: str
    captured_minor: int = 0
    refunded_minor: int = 0
    error: _Error | None = None


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
            "capture": True,
            "customer_id": charge.customer_id,
            "return_url": None,
        }
        answer = await self._ask("POST", "/payments", body, key=charge.key)
        return _payment(self._about(charge.key, self._accepted(answer, _PaymentDocument)))

    async def find(self, key: str) -> Payment | None:
        """See PaymentGateway."""
        found = await self._look(key)
        return None if found is None else _payment(found)

    async def refund(self, refund: Refund) -> Refunded:
        """See PaymentGateway. The payment is looked up first: its id may be longer than what is stored of it."""
        payment = await self._look(refund.payment_key)
        if payment is None:
            raise PaymentDeclined("The gateway knows of no payment to refund")
        body = {"key": refund.key, "amount_minor": refund.amount_minor, "reason": refund.reason}
        answer = await self._ask("POST", f"/payments/{quote(payment.id, safe='')}/refunds", body, key=refund.key)
        document = self._accepted(answer, _RefundDocument)
        if document.amount_minor != refund.amount_minor:
            raise PaymentConflict(f"The gateway has a refund of {document.amount_minor} under this key")
        return Refunded(reference=document.id, state=document.status, error=_said(document.error))

    async def close(self) -> None:
        """See PaymentGateway."""
        await self._caller.close()

    async def _look(self, key: str) -> _PaymentDocument | None:
        answer = await self._ask("GET", "/payments", None, query={"key": key})
        if answer.status == 404:
            return None
        return self._about(key, self._accepted(answer, _PaymentDocument))

    def _about(self, key: str, document: _PaymentDocument) -> _PaymentDocument:
        if document.key != key:
            raise PaymentUnknown(f"{self.name} was asked about one payment and answered about another")
        return document

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


def _payment(document: _PaymentDocument) -> Payment:
    return Payment(
        reference=document.id,
        state=document.status,
        amount_minor=document.amount_minor,
        currency=document.currency,
        captured_minor=document.captured_minor,
        refunded_minor=document.refunded_minor,
        error=_said(document.error),
    )


def _refusal(body: bytes) -> str:
    try:
        return _said(msgspec.json.decode(body, type=_Refusal).error) or ""
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""


def _said(error: _Error | str | None) -> str | None:
    if isinstance(error, _Error):
        return error.message or error.code
    return error
