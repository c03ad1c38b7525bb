"""A receiver of webhooks to try things on: it says what arrives and whether it can be trusted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp.web as web
import msgspec
from standardwebhooks.webhooks import Webhook

from expediter.trial.listening import listening
from expediter.trial.signatures import webhook_of, what_is_wrong

#: Bytes of a webhook, at most: an order of 2,000 items is below it.
BODY_BYTES_MAX = 4 * 1024 * 1024
#: Characters that are shown of a word of a webhook.
WORD_CHARACTERS_MAX = 128
#: Webhooks that are answered at once, at most; those that wait forever count. One more is answered 503.
UNDER_WAY_MAX = 1_000

VERIFIED = "verified"
UNVERIFIED = "unverified"
#: What is wrong with a webhook although its signature may be right.
NO_JSON = "no JSON"
TOO_LONG = "too long"


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """How it misbehaves: every so many answers are 500, each takes so long, each is 410, none ever comes."""

    fail_every: int = 0
    slow_seconds: float = 0.0
    gone: bool = False
    dead: bool = False


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook that arrived. `verdict` is verified, unverified, or what is wrong with it.

    `status` is what it is answered, None where no answer ever comes. A payment document, which has no type, is
    told by its status. Texts are as they may be printed: without what a terminal would obey.
    """

    at: str
    verdict: str
    status: int | None
    id: str
    type: str
    order_id: str
    number: int | None
    position: int | None
    body: Any


class Receiver:
    """The receiver as a web application; what arrives goes to `heard`."""

    def __init__(self, webhook: Webhook | None, faults: Faults) -> None:
        """Without `webhook` nothing can be verified."""
        self.heard: asyncio.Queue[Heard] = asyncio.Queue(UNDER_WAY_MAX)
        self._webhook = webhook
        self._faults = faults
        self._count = self._under_way = 0
        self.app = web.Application(client_max_size=BODY_BYTES_MAX)
        self.app.add_routes([web.post("/{path:.*}", self._receive)])

    async def _receive(self, request: web.Request) -> web.StreamResponse:
        if self._under_way >= UNDER_WAY_MAX:
            return web.Response(status=503, text="Too many webhooks wait for their answer here\n")
        self._under_way += 1
        try:
            return await self._judge(request)
        finally:
            self._under_way -= 1

    async def _judge(self, request: web.Request) -> web.StreamResponse:
        at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        document = None
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            verdict = TOO_LONG
        else:
            verdict = UNVERIFIED
            if self._webhook is not None:
                verdict = what_is_wrong(self._webhook, body, request.headers) or VERIFIED
            try:
                document = msgspec.json.decode(body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                verdict = NO_JSON if verdict in (VERIFIED, UNVERIFIED) else verdict
        self._count += 1
        status = self._status(verdict)
        name = printable(request.headers.get("webhook-id", ""))
        await self.heard.put(heard(document, at=at, verdict=verdict, status=status, name=name))
        if self._faults.slow_seconds:
            await asyncio.sleep(self._faults.slow_seconds)
        if status is None:
            await asyncio.Event().wait()  # for as long as the sender, or this program, has patience
        said = None if status == 204 else f"{verdict}\n"
        return web.Response(status=status or 500, text=said)

    def _status(self, verdict: str) -> int | None:
        if self._faults.dead:
            return None
        if self._faults.gone:
            return 410
        if self._faults.fail_every and self._count % self._faults.fail_every == 0:
            return 500
        if verdict in (VERIFIED, UNVERIFIED):
            return 204
        return 413 if verdict == TOO_LONG else 400 if verdict == NO_JSON else 401


def heard(document: Any, *, at: str, verdict: str, status: int | None, name: str) -> Heard:
    """Read what a webhook says, whatever it is: an event, a payment document, or anything else."""
    whole = document if isinstance(document, dict) else {}
    data = whole.get("data")
    data = data if isinstance(data, dict) else whole
    payment = f"payment {whole.get('status')}" if "captured_minor" in whole else ""
    return Heard(
        at=at,
        verdict=verdict,
        status=status,
        id=name,
        type=_word(whole.get("type")) or printable(payment),
        order_id=_word(data.get("order_id")),
        number=_number(data.get("number")),
        position=_number(data.get("position")),
        body=document,
    )


def printable(text: str) -> str:
    """Return a text as it may go to a terminal: what is no character to be seen is replaced, and it has an end."""
    shown = "".join(each if each.isprintable() else "\ufffd" for each in text[:WORD_CHARACTERS_MAX])
    return shown if len(text) <= WORD_CHARACTERS_MAX else f"{shown}..."


def _word(value: Any) -> str:
    return printable(value) if isinstance(value, str) else ""


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


async def serve(
    *,
    port: int,
    secret: str | None,
    faults: Faults,
    announce: Callable[[str], None],
    told: Callable[[Heard], None],
) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT; `told` gets what arrives, in that order.

    Raises ConfigurationError, AddressTaken, and whatever `told` raises.
    """
    receiver = Receiver(None if secret is None else webhook_of(secret, "--secret"), faults)
    async with listening(receiver.app, port, "receiver", gives_up=True) as (address, stop):
        announce(address)
        stopped = asyncio.create_task(stop.wait())
        try:
            while True:
                arrived = asyncio.create_task(receiver.heard.get())
                await asyncio.wait([arrived, stopped], return_when=asyncio.FIRST_COMPLETED)
                if not arrived.done():
                    arrived.cancel()
                    return
                told(arrived.result())
        finally:
            stopped.cancel()
