"""Requests and replies, as thin as they can be over ASGI; what every handler needs to read and to answer."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from msgspec.structs import replace
from starlette.types import Receive, Scope, Send

from expediter.errors import BadRequest, Fault, InvalidInput
from expediter.orders.commands import PlaceOrder
from expediter.orders.order import Stages
from expediter.store.submissions import Answer, IdempotencyKey

Header = tuple[bytes, bytes]

#: Bytes of one request's body, at most; counted while it arrives.
BODY_BYTES_MAX = 1024 * 1024
#: Bytes of one request's headers, at most.
HEADER_BYTES_MAX = 32 * 1024
#: Seconds after which a request is answered that has not been, whatever it waits for; batches, admin calls and
#: `?wait=` may take longer.
ANSWER_SECONDS_MAX = 9.5
#: Seconds in which a body must arrive.
BODY_SECONDS_MAX = 10.0

#: The key in a request's scope that says that a change of status goes all the way.
THROUGH = "expediter.through"

JSON: Header = (b"content-type", b"application/json")

_PASSED_OVER = ("_", "utm_")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_TAG = re.compile(r'"([^"]*)"')

_sorted_json = msgspec.json.Encoder(order="sorted").encode
to_json = msgspec.json.Encoder(decimal_format="number").encode


class Reply:
    """An answer: status, body and raw headers."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, body: bytes = b"", headers: list[Header] | None = None) -> None:
        """`headers` have lower-case names; the length is added when it is sent."""
        self.status = status
        self.body = body
        self.headers = headers if headers is not None else []

    async def send(self, send: Send) -> None:
        """Send it."""
        if self.status not in (204, 304):
            self.headers.append((b"content-length", str(len(self.body)).encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


def json_reply(status: int, document: Any) -> Reply:
    """Return `document` as JSON."""
    return Reply(status, to_json(document), [JSON])


class Call:
    """One HTTP request. `order_id` and the like come from the path."""

    __slots__ = ("_headers", "_receive", "path", "path_values", "request_id", "scope", "until")

    def __init__(self, scope: Scope, receive: Receive, request_id: str) -> None:
        """Wrap what ASGI gives."""
        self.scope = scope
        #: When it is answered that it took too long, on the monotonic clock.
        self.until = time.monotonic() + ANSWER_SECONDS_MAX
        self.path: str = scope["path"]
        self.path_values: dict[str, str] = scope.get("path_params", {})
        self.request_id = request_id
        self._receive = receive
        self._headers: dict[bytes, bytes] | None = None

    @property
    def short(self) -> bool:
        """Whether it came by the short paths (`/orders...`)."""
        return not self.path.startswith("/api/")

    def may_take(self, seconds: float) -> None:
        """Let it take so many seconds from now before it is answered that it took too long."""
        self.until = time.monotonic() + seconds

    def header(self, name: bytes) -> str | None:
        """Return a header by its lower-case name."""
        if self._headers is None:
            self._headers = dict(self.scope["headers"])
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    def query(self, *allowed: str) -> dict[str, str]:
        """Return the query parameters. Raises InvalidInput for one that is not `allowed`, or comes twice.

        Those that only browsers and advertisers read (`_=1712`, `utm_source`) are passed over.
        """
        raw: bytes = self.scope["query_string"]
        if not raw:
            return {}
        found: dict[str, str] = {}
        faults = []
        for name, value in parse_qsl(raw.decode("latin-1"), keep_blank_values=True):
            if name.startswith(_PASSED_OVER):
                continue
            if name not in allowed:
                faults.append(Fault(name, f"is not a parameter here; there are: {', '.join(allowed) or 'none'}"))
            elif name in found:
                faults.append(Fault(name, "is given twice"))
            elif "\x00" in value or "\ufffd" in value:
                faults.append(Fault(name, "must be text without NUL, in UTF-8"))
            found[name] = value
        if faults:
            raise InvalidInput(faults)
        return found

    async def body(self) -> bytes:
        """Return the whole body. Raises BodyTooLarge, BodyTooSlow, BadRequest if the client goes away."""
        self.until += BODY_SECONDS_MAX  # a body that is late has its own limit, and its own answer
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("The client went away before its body was complete")
        self.until -= BODY_SECONDS_MAX
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(body) > BODY_BYTES_MAX:
                raise BodyTooLarge
            return body
        length = self.header(b"content-length")
        if length and length.isdigit() and int(length) > BODY_BYTES_MAX:
            raise BodyTooLarge
        return await self._rest_of_body(body)

    async def _rest_of_body(self, body: bytes) -> bytes:
        parts = [body]
        size = len(body)
        self.may_take(BODY_SECONDS_MAX + ANSWER_SECONDS_MAX)
        try:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise BadRequest("The client went away before its body was complete")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > BODY_BYTES_MAX:
                        raise BodyTooLarge
                    if not message.get("more_body", False):
                        self.may_take(ANSWER_SECONDS_MAX)
                        return b"".join(parts)
        except TimeoutError:
            raise BodyTooSlow from None

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives, however long it is. Raises BodyTooSlow, BadRequest."""
        while True:
            try:
                async with asyncio.timeout(BODY_SECONDS_MAX):
                    message = await self._receive()
            except TimeoutError:
                raise BodyTooSlow from None
            if message["type"] == "http.disconnect":
                raise BadRequest("The client went away before its body was complete")
            yield message.get("body", b"")
            if not message.get("more_body", False):
                return

    async def until_gone(self) -> None:
        """Return when the client has closed its connection. Only after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def has_media_type(self, *media_types: str) -> bool:
        """Return whether the body is said to be of one of these types, as it is."""
        given = (self.header(b"content-type") or "").partition(";")[0].strip().lower()
        headers = self._headers or {}
        packed = b"content-encoding" in headers and headers[b"content-encoding"].strip().lower() != b"identity"
        return given in media_types and not packed

    def idempotency_key(self, asked: Any, keep: int) -> IdempotencyKey | None:
        """Return the caller's Idempotency-Key and what identifies this request. Raises BadRequest.

        `asked` is what the body means, decoded: how it was written does not count.
        """
        given = self.header(b"idempotency-key")
        if given is None:
            return None
        if [name for name, _ in self.scope["headers"]].count(b"idempotency-key") > 1:
            raise BadRequest("Idempotency-Key is given twice; a request has one")
        key = given[1:-1] if len(given) > 1 and given[0] == given[-1] == '"' else given
        if not _KEY.fullmatch(key):
            raise BadRequest("Idempotency-Key must be 1 to 255 visible ASCII characters")
        seen = hashlib.sha256(f"{self.scope['method']} {self.path}\n".encode() + fingerprinted(asked))
        return IdempotencyKey(key, seen.hexdigest(), keep)

    def if_version(self) -> int | None:
        """Return the version that If-Match asks for, None for any, -1 for a tag that no version has."""
        given = self.header(b"if-match")
        if given is None or given.strip() == "*":
            return None
        tags = _TAG.findall(given)
        if len(tags) > 1:
            raise BadRequest("If-Match takes one entity tag here")
        return int(tags[0]) if tags and tags[0].isdecimal() and len(tags[0]) < 19 and "W/" not in given else -1

    def knows_version(self, version: int) -> bool:
        """Return whether If-None-Match names this version."""
        given = self.header(b"if-none-match")
        if given is None:
            return False
        return given.strip() == "*" or str(version) in _TAG.findall(given)


def fingerprinted(asked: Any) -> bytes:
    """Return what identifies a request: the same for all that ask for the same."""
    if isinstance(asked, PlaceOrder):
        # Its id if the client has chosen it; and neither the time nor the stages, which the settings say.
        changes: dict[str, Any] = {"order_id": ""} if asked.fresh else {}
        metadata = _plain_numbers(msgspec.json.decode(asked.metadata))
        plain = replace(asked, placed_at=None, stages=Stages.PAYMENT, metadata="", **changes)
        return _sorted_json((plain, metadata))
    return _sorted_json(asked)


def _plain_numbers(metadata: dict[str, Any]) -> dict[str, Any]:
    """Write 1.0 as 1: in JSON they are the same number."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in metadata.items()
    }


class BodyTooLarge(Exception):
    """The body has more than BODY_BYTES_MAX bytes."""


class BodyTooSlow(Exception):
    """The body took more than BODY_SECONDS_MAX seconds."""


def answer_reply(answer: Answer, *, replayed: bool) -> Reply:
    """Return a stored or newly made answer."""
    headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    if replayed:
        headers.append((b"idempotency-replayed", b"true"))
    return Reply(answer.status_code, answer.body.encode(), headers)


def whole_number(given: dict[str, str], name: str, low: int, high: int, default: int, faults: list[Fault]) -> int:
    """Return a parameter as a whole number in [low, high]; what is not one becomes a fault."""
    text = given.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 18 or not low <= int(text) <= high:
        faults.append(Fault(name, f"must be a whole number from {low} to {high}"))
        return default
    return int(text)
