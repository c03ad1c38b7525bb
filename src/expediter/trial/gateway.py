"""The trial gateway: speaks the HTTP payment protocol, and misbehaves when it is told to.

It moves no money. What it is told to do wrong comes after the charge is in the books, so that whoever asked has to
find out: that is what makes a good client.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, quote

import aiohttp.web as web
import msgspec
import structlog
from standardwebhooks.webhooks import Webhook

from expediter.orders.money import AMOUNT_MINOR_MAX
from expediter.trial import page
from expediter.trial.books import Books, Clash, Course, Refused
from expediter.trial.callbacks import Callbacks, Manners
from expediter.trial.documents import Action, Payment
from expediter.trial.listening import listening

#: What a payment token can ask for, and what comes of it.
TOKENS = {
    "tok_declined": "the card is declined (402)",
    "tok_unavailable": "503 with Retry-After, and nothing is charged",
    "tok_unknown": "it is charged, and the connection is dropped without an answer",
    "tok_error": "it is charged, and the answer is 500",
    "tok_slow": "it is charged, and the answer comes after --slow-seconds",
    "tok_action": "the customer must say yes or no on a page of the gateway, within --action-seconds",
    "tok_processing": "the payment is `processing`, and succeeds after --slow-seconds",
}
#: Where the pages are on which customers answer.
_PAGE = "/pay/"
#: Bytes of a request, at most.
BODY_BYTES_MAX = 64 * 1024
#: Payments on a page.
PAGE_PAYMENTS = 200
#: Seconds until the gateway looks again at what is due, after the ledger could not be written.
RETRY_SECONDS = 1.0

log = structlog.get_logger(__name__)


class Habits(msgspec.Struct, frozen=True, kw_only=True):
    """How it misbehaves without being asked by a token; 0: never.

    `drop_every` and `error_every` count new charges, the others all requests to pay. Times are in seconds.
    """

    latency_seconds: float = 0.0
    slow_seconds: float = 20.0
    drop_every: int = 0
    error_every: int = 0
    decline_every: int = 0
    unavailable_every: int = 0
    action_every: int = 0


class _PaymentBody(msgspec.Struct):
    key: str
    order_id: str
    amount_minor: int
    currency: str
    token: str | None = None
    capture: bool = True
    return_url: str | None = None


class _CaptureBody(msgspec.Struct):
    amount_minor: int


class _RefundBody(msgspec.Struct):
    key: str
    amount_minor: int
    reason: str | None = None


class Gateway:
    """The gateway as a web application over its books."""

    def __init__(self, books: Books, habits: Habits, token: str | None, callbacks: Callbacks | None) -> None:
        """`token` is what callers must bring as a bearer token; None: anybody may call."""
        self._books = books
        self._habits = habits
        self._token = token
        self._callbacks = callbacks
        self._asked = self._charged = 0
        self._sooner = asyncio.Event()
        #: Where customers find it; known once it listens.
        self.address = ""
        self.app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[self._guarded])
        self.app.add_routes(
            [
                web.post("/payments", self._pay),
                web.get("/payments", self._find),
                web.post("/payments/{id}/capture", self._capture),
                web.post("/payments/{id}/void", self._void),
                web.post("/payments/{id}/refunds", self._refund),
                web.get(f"{_PAGE}{{id}}", self._show),
                web.post(f"{_PAGE}{{id}}", self._answer),
            ]
        )

    async def keep_time(self) -> None:
        """Let happen what is due, when it is due, for as long as the gateway runs."""
        while True:
            self._sooner.clear()
            try:
                self._advance()
                pause = self._books.seconds_to_next()
            except OSError as error:
                log.warning("what is due cannot be written down", error=str(error))
                pause = RETRY_SECONDS
            with suppress(TimeoutError):
                await asyncio.wait_for(self._sooner.wait(), None if pause is None else max(0.0, pause))

    @web.middleware
    async def _guarded(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not request.path.startswith(_PAGE) and not self._may_call(request):
            return _refusal(401, "unauthorized", "Bring the gateway's token as Authorization: Bearer ...")
        if self._habits.latency_seconds:
            await asyncio.sleep(self._habits.latency_seconds)
        self._advance()
        try:
            return await handler(request)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return _refusal(400, "unreadable", str(error))
        except Clash as error:
            return _refusal(409, "key_in_use", str(error))
        except Refused as error:
            return _refusal(422, error.code, str(error))
        finally:
            self._sooner.set()  # something may be due earlier than before

    def _may_call(self, request: web.Request) -> bool:
        if self._token is None:
            return True
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())

    async def _pay(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=_PaymentBody)
        if request.headers.get("Idempotency-Key") != body.key:
            return _refusal(400, "key", "Idempotency-Key and the body's key must be the same")
        if not 0 < body.amount_minor <= AMOUNT_MINOR_MAX:
            return _refusal(400, "amount", f"amount_minor must be from 1 to {AMOUNT_MINOR_MAX}")
        self._asked += 1
        known = body.key in self._books.payments
        if not known and (body.token == "tok_unavailable" or _is_due(self._asked, self._habits.unavailable_every)):
            return _refusal(503, "unavailable", "Come back later", {"Retry-After": "1"})
        payment, new = self._books.pay(
            body.key,
            body.order_id,
            body.amount_minor,
            body.currency,
            course=self._course(body.token),
            capture=body.capture,
            return_url=page.safe_return_url(body.return_url),
        )
        log.info(
            "pays" if new else "asks again",
            order_id=payment.order_id,
            amount=body.amount_minor,
            status=payment.status,
        )
        if payment.status == "declined":
            return _json(402, {"error": payment.error, "payment": payment})
        if not new:
            return _json(200, self._document(payment))
        if payment.status in ("succeeded", "authorized"):
            tried = self._tell(payment)
            if tried is not None:
                await tried.wait()
        return await self._misbehaved(request, body.token) or _json(201, self._document(payment))

    def _course(self, token: str | None) -> Course:
        if token == "tok_declined" or _is_due(self._asked, self._habits.decline_every):
            return Course.DECLINED
        if token == "tok_action" or _is_due(self._asked, self._habits.action_every):
            return Course.ASKED
        return Course.LATER if token == "tok_processing" else Course.TAKEN

    async def _misbehaved(self, request: web.Request, token: str | None) -> web.StreamResponse | None:
        """Return what a new charge is answered instead of its document, None: the document."""
        self._charged += 1
        if token == "tok_slow":
            await asyncio.sleep(self._habits.slow_seconds)
        if token == "tok_unknown" or _is_due(self._charged, self._habits.drop_every):
            return _dropped(request)
        if token == "tok_error" or _is_due(self._charged, self._habits.error_every):
            return _refusal(500, "broken", "Something went wrong after the charge")
        return None

    async def _find(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        if "key" in query:
            payment = self._books.payments.get(query["key"])
            if payment is None:
                return _refusal(404, "unknown", "No payment has this key")
            return _json(200, self._document(payment))
        cursor = query.get("cursor", "0")
        if not cursor.isdecimal():
            return _refusal(400, "cursor", "This cursor is none")
        found, following = self._books.page(
            query.get("since", ""), query.get("until", ""), int(cursor), PAGE_PAYMENTS
        )
        documents = [self._document(payment) for payment in found]
        return _json(200, {"payments": documents, "next_cursor": None if following is None else str(following)})

    async def _capture(self, request: web.Request) -> web.StreamResponse:
        payment = self._payment(request)
        body = msgspec.json.decode(await request.read(), type=_CaptureBody)
        if self._books.capture(payment, body.amount_minor):
            log.info("captures", order_id=payment.order_id, amount=body.amount_minor)
            self._tell(payment)
        return _json(200, self._document(payment))

    async def _void(self, request: web.Request) -> web.StreamResponse:
        payment = self._payment(request)
        if self._books.void(payment):
            log.info("voids", order_id=payment.order_id)
            self._tell(payment)
        return _json(200, self._document(payment))

    async def _refund(self, request: web.Request) -> web.StreamResponse:
        payment = self._payment(request)
        body = msgspec.json.decode(await request.read(), type=_RefundBody)
        refund, new = self._books.refund(payment, body.key, body.amount_minor, body.reason or "")
        if new:
            log.info("refunds", order_id=payment.order_id, amount=body.amount_minor, status=refund.status)
            if refund.status == "succeeded":
                self._tell(payment)
        return _json(201 if new else 200, refund)

    async def _show(self, request: web.Request) -> web.StreamResponse:
        payment = self._books.by_id(request.match_info["id"])
        if payment is None:
            return _html(404, page.unknown_page())
        return _html(200, page.payment_page(payment, self._books.terms(payment)))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        payment = self._books.by_id(request.match_info["id"])
        if payment is None:
            return _html(404, page.unknown_page())
        given = parse_qs((await request.read()).decode(errors="replace")).get("answer")
        if given not in (["yes"], ["no"]):
            return _html(400, page.payment_page(payment, self._books.terms(payment)))
        if self._books.answer(payment, yes=given == ["yes"]):
            log.info("the customer answers", order_id=payment.order_id, status=payment.status)
            self._tell(payment)
        # Whatever the answer came to is shown by the page itself, which can be loaded again.
        return web.Response(status=303, headers={"Location": request.path_qs} | page.headers())

    def _payment(self, request: web.Request) -> Payment:
        payment = self._books.by_id(request.match_info["id"])
        if payment is None:
            raise web.HTTPNotFound(
                body=msgspec.json.encode({"error": {"code": "unknown", "message": "There is no such payment"}}),
                content_type="application/json",
            )
        return payment

    def _advance(self) -> None:
        for payment in self._books.advance():
            log.info("time has passed", order_id=payment.order_id, status=payment.status)
            self._tell(payment)

    def _document(self, payment: Payment) -> Payment:
        """Return the document as it is sent: the page's address depends on where the gateway listens."""
        if payment.status != "action_required":
            return payment
        url = f"{self.address}{_PAGE}{quote(payment.id, safe='')}"
        return msgspec.structs.replace(payment, action=Action("redirect", url, self._books.terms(payment).until))

    def _tell(self, payment: Payment) -> asyncio.Event | None:
        """Call back what became of a payment; see Callbacks.send."""
        if self._callbacks is None:
            return None
        return self._callbacks.send(msgspec.json.encode(self._document(payment)), payment.order_id)


def _is_due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0


def _dropped(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _json(status: int, document: Any, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(document), content_type="application/json", headers=headers
    )


def _refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return _json(status, {"error": {"code": code, "message": message}}, headers)


def _html(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text, content_type="text/html", headers=page.headers())


class Calling(msgspec.Struct, frozen=True, kw_only=True):
    """Where callbacks go, what signs them, and how they are sent."""

    url: str
    webhook: Webhook
    manners: Manners = Manners()


async def serve(
    *,
    port: int,
    books: Books,
    habits: Habits,
    token: str | None,
    calling: Calling | None,
    announce: Callable[[str], None],
) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT, and close the books. Raises ConfigurationError, AddressTaken."""
    callbacks = None
    try:
        if calling is not None:
            callbacks = Callbacks(calling.url, calling.webhook, calling.manners)
        gateway = Gateway(books, habits, token, callbacks)
        async with listening(gateway.app, port, "gateway") as (address, stop):
            gateway.address = address
            announce(address)
            clock = asyncio.create_task(gateway.keep_time())
            try:
                await stop.wait()
            finally:
                clock.cancel()
    finally:
        if callbacks is not None:
            await callbacks.close()
        books.close()
