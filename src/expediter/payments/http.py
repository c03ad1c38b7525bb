"""A gateway behind the HTTP payment protocol (docs/payments.md): JSON over HTTP, amounts in whole minor units.

What an answer means is decided here, once: it was done, it was not, or nobody knows. Whoever asks settles the last
by `find`. So everything that is not surely one of the first two is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote

import aiohttp
import msgspec
import uuid_utils

from expediter.errors import (
    ConfigurationError,
    PaymentConflict,
    PaymentDeclined,
    PaymentUnavailable,
    PaymentUnknown,
    reason,
)
from expediter.payments.port import Charge, Payment, PaymentState, Refund, Refunded, RefundState

#: Bytes of an answer, at most: a longer one is not read on, and nobody knows what it would have said.
ANSWER_BYTES_MAX = 64 * 1024
#: Seconds in which a connection must stand, its TLS included.
CONNECT_SECONDS_MAX = 5.0
#: Seconds that an answer may take; whoever asks may have less patience.
ANSWER_SECONDS_MAX = 60.0
#: Connections to the gateway that a process has open, at most; further calls wait.
CONNECTIONS_MAX = 100
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


class _Answer(msgspec.Struct):
    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpGateway:
    """A gateway at an address. `token` goes along as a bearer token."""

    key_window_seconds = KEY_WINDOW_SECONDS

    def __init__(self, base: SplitResult, token: str | None) -> None:
        """Nothing is opened yet. Raises ConfigurationError for an address that cannot be used."""
        if not base.hostname:
            raise ConfigurationError("PAYMENT_GATEWAY has no host: write one like https://gateway.example/base")
        if base.username or base.password or base.query or base.fragment:
            raise ConfigurationError(
                "PAYMENT_GATEWAY is an address without user, password and `?`: its key goes into "
                "PAYMENT_GATEWAY_TOKEN"
            )
        self._base = base.geturl().rstrip("/")
        self._headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._session: aiohttp.ClientSession | None = None
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
        return self._payment(answer, charge.key)

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
        if self._session is not None:
            await self._session.close()

    async def _look(self, key: str) -> _PaymentDocument | None:
        answer = await self._ask("GET", "/payments", None, query={"key": key})
        if answer.status == 404:
            return None
        document = self._accepted(answer, _PaymentDocument)
        if document.key != key:
            raise PaymentUnknown(f"{self.name} was asked about one payment and answered about another")
        return document

    def _payment(self, answer: _Answer, key: str) -> Payment:
        document = self._accepted(answer, _PaymentDocument)
        if document.key != key:
            raise PaymentUnknown(f"{self.name} was asked for one payment and answered about another")
        return _payment(document)

    def _accepted(self, answer: _Answer, kind: type[T]) -> T:
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
        again = _seconds(answer.headers.get("Retry-After"))
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
    ) -> _Answer:
        """Send one request. Raises PaymentUnavailable where it cannot have arrived, PaymentUnknown elsewhere."""
        headers = {"X-Request-ID": uuid_utils.uuid7().hex}
        body = None
        if document is not None:
            headers |= {"Content-Type": "application/json", "Idempotency-Key": key}
            body = msgspec.json.encode(document)
        try:
            async with self._open().request(
                method, self._base + path, params=query, data=body, headers=headers, allow_redirects=False
            ) as response:
                return _Answer(response.status, response.headers, await self._read(response))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            # Refused, no such name, no TLS, no answer to the first packet: nothing was sent yet.
            raise PaymentUnavailable(f"{self.name} cannot be reached: {reason(error)}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise PaymentUnknown(f"{self.name} did not answer: {reason(error)}") from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > ANSWER_BYTES_MAX:
                raise PaymentUnknown(f"{self.name} gave an answer of more than {ANSWER_BYTES_MAX} bytes")
        return bytes(body)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX),
                timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX, sock_connect=CONNECT_SECONDS_MAX),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


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


def _seconds(text: str | None) -> float | None:
    """Return a `Retry-After` in seconds; one that is a date counts as a second, None: there is none."""
    if text is None:
        return None
    return float(text) if text.strip().isdecimal() and len(text) < 9 else 1.0
