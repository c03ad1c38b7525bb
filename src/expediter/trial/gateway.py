"""The trial gateway: speaks the HTTP payment protocol, and misbehaves when it is told to.

It moves no money. What it is told to do wrong comes after the charge is in the books, so that whoever asked has to
find out: that is what makes a good client.
"""

from __future__ import annotations

import asyncio
import hmac
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp.web as web
import msgspec
import structlog

from expediter.errors import AddressTaken
from expediter.trial.books import Books, Clash, Payment, Refused

#: What a payment token can ask for, and what comes of it.
TOKENS = {
    "tok_declined": "the card is declined (402)",
    "tok_unavailable": "503 with Retry-After, and nothing is charged",
    "tok_unknown": "it is charged, and the connection is dropped without an answer",
    "tok_error": "it is charged, and the answer is 500",
    "tok_slow": "it is charged, and the answer comes after --slow-seconds",
}
#: Bytes of a request, at most.
BODY_BYTES_MAX = 64 * 1024
#: Payments on a page.
PAGE_PAYMENTS = 200

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


class _PaymentBody(msgspec.Struct):
    key: str
    order_id: str
    amount_minor: int
    currency: str
    token: str | None = None
    capture: bool = True


class _CaptureBody(msgspec.Struct):
    amount_minor: int


class _RefundBody(msgspec.Struct):
    key: str
    amount_minor: int
    reason: str | None = None


class Gateway:
    """The gateway as a web application over its books."""

    def __init__(self, books: Books, habits: Habits, token: str | None) -> None:
        """`token` is what callers must bring as a bearer token; None: anybody may call."""
        self._books = books
        self._habits = habits
        self._token = token
        self._asked = self._charged = 0
        self.app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[self._guarded])
        self.app.add_routes(
            [
                web.post("/payments", self._pay),
                web.get("/payments", self._find),
                web.post("/payments/{id}/capture", self._capture),
                web.post("/payments/{id}/void", self._void),
                web.post("/payments/{id}/refunds", self._refund),
            ]
        )

    @web.middleware
    async def _guarded(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if self._token is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            return _refusal(401, "unauthorized", "Bring the gateway's token as Authorization: Bearer ...")
        if self._habits.latency_seconds:
            await asyncio.sleep(self._habits.latency_seconds)
        try:
            return await handler(request)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return _refusal(400, "unreadable", str(error))
        except Clash as error:
            return _refusal(409, "key_in_use", str(error))
        except Refused as error:
            return _refusal(422, "refused", str(error))

    async def _pay(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=_PaymentBody)
        if request.headers.get("Idempotency-Key") != body.key:
            return _refusal(400, "key", "Idempotency-Key and the body's key must be the same")
        if body.amount_minor <= 0:
            return _refusal(400, "amount", "amount_minor must be above 0")
        self._asked += 1
        known = body.key in self._books.payments
        if not known and (body.token == "tok_unavailable" or _is_due(self._asked, self._habits.unavailable_every)):
            return _refusal(503, "unavailable", "Come back later", {"Retry-After": "1"})
        declined = body.token == "tok_declined" or _is_due(self._asked, self._habits.decline_every)
        payment, new = self._books.pay(
            body.key,
            body.order_id,
            body.amount_minor,
            body.currency,
            capture=body.capture,
            declined="The card was declined" if declined else None,
        )
        log.info(
            "pays" if new else "asks again",
            order_id=payment.order_id,
            amount=body.amount_minor,
            status=payment.status,
        )
        if payment.status == "declined":
            return _json(402, {"error": payment.error, "payment": payment})
        if new:
            self._charged += 1
            if body.token == "tok_slow":
                await asyncio.sleep(self._habits.slow_seconds)
            if body.token == "tok_unknown" or _is_due(self._charged, self._habits.drop_every):
                return _dropped(request)
            if body.token == "tok_error" or _is_due(self._charged, self._habits.error_every):
                return _refusal(500, "broken", "Something went wrong after the charge")
        return _json(201 if new else 200, payment)

    async def _find(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        if "key" in query:
            payment = self._books.payments.get(query["key"])
            return _refusal(404, "unknown", "No payment has this key") if payment is None else _json(200, payment)
        cursor = query.get("cursor", "0")
        if not cursor.isdecimal():
            return _refusal(400, "cursor", "This cursor is none")
        found, following = self._books.page(
            query.get("since", ""), query.get("until", ""), int(cursor), PAGE_PAYMENTS
        )
        return _json(200, {"payments": found, "next_cursor": None if following is None else str(following)})

    async def _capture(self, request: web.Request) -> web.StreamResponse:
        payment = self._payment(request)
        body = msgspec.json.decode(await request.read(), type=_CaptureBody)
        self._books.capture(payment, body.amount_minor)
        log.info("captures", order_id=payment.order_id, amount=body.amount_minor)
        return _json(200, payment)

    async def _void(self, request: web.Request) -> web.StreamResponse:
        payment = self._payment(request)
        self._books.void(payment)
        log.info("voids", order_id=payment.order_id)
        return _json(200, payment)

    async def _refund(self, request: web.Request) -> web.StreamResponse:
        payment = self._payment(request)
        body = msgspec.json.decode(await request.read(), type=_RefundBody)
        refund = self._books.refund(payment, body.key, body.amount_minor)
        log.info("refunds", order_id=payment.order_id, amount=body.amount_minor)
        return _json(200, refund)

    def _payment(self, request: web.Request) -> Payment:
        payment = self._books.by_id(request.match_info["id"])
        if payment is None:
            raise web.HTTPNotFound(
                body=msgspec.json.encode({"error": {"code": "unknown", "message": "There is no such payment"}}),
                content_type="application/json",
            )
        return payment


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


async def serve(
    *, port: int, ledger: Path | None, habits: Habits, token: str | None, announce: Callable[[str], None]
) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT. Raises ConfigurationError, AddressTaken."""
    books = Books(ledger)
    runner = web.AppRunner(Gateway(books, habits, token).app, access_log=None, handle_signals=False)
    await runner.setup()
    stop = asyncio.Event()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port)
        try:
            await site.start()
        except OSError as error:
            raise AddressTaken(f"The gateway cannot listen on port {port}: {error.strerror}") from error
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        announce(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await stop.wait()
    finally:
        await runner.cleanup()
        books.close()
