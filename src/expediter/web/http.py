"""Requests and replies, and what every handler needs to read and to answer."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

import msgspec
import uuid_utils

from expediter.errors import BadRequest, ExpediterError, Fault, InvalidInput, Overloaded, Unauthorized
from expediter.store.scopes import Scope
from expediter.store.submissions import Answer, IdempotencyKey
from expediter.web.fingerprints import fingerprinted

Header = tuple[bytes, bytes]

#: What a call may do that came without an API key, where one is needed.
NO_SCOPES: frozenset[Scope] = frozenset()

#: Bytes of one request's body, at most; counted while it arrives.
BODY_BYTES_MAX = 1024 * 1024
#: Bytes of all bodies that a process gathers while they arrive, at most; one that would be more is refused.
BODIES_BYTES_MAX = 64 * 1024 * 1024
#: Bytes of one request's headers, at most.
HEADER_BYTES_MAX = 32 * 1024
#: Bytes of a request's target, at most.
TARGET_BYTES_MAX = 8 * 1024
#: Seconds after which a request is answered that has not been, whatever it waits for; batches, admin calls and
#: `?wait=` may take longer.
ANSWER_SECONDS_MAX = 9.5
#: Seconds in which a body must arrive.
BODY_SECONDS_MAX = 10.0

JSON: Header = (b"content-type", b"application/json")

_PASSED_OVER = ("_", "utm_")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_TAG = re.compile(r'"([^"]*)"')
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

to_json = msgspec.json.Encoder(decimal_format="number").encode


class Reply:
    """An answer: status, body and raw headers."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, body: bytes = b"", headers: list[Header] | None = None) -> None:
        """`headers` have lower-case names; those of the connection are added where it is sent."""
        self.status = status
        self.body = body
        self.headers = headers if headers is not None else []


class Writer(Protocol):
    """Where a streamed answer goes."""

    async def write(self, data: bytes) -> None:
        """Send a part, and wait while the client is slow. Nothing happens once it has gone."""

    async def until_gone(self) -> None:
        """Return when the client has closed its connection."""


class Streamed(Reply):
    """An answer whose body comes in parts."""

    __slots__ = ()

    async def stream(self, writer: Writer) -> None:
        """Write the whole body."""
        raise NotImplementedError


#: What answers calls: at once, or by what has to be awaited.
App = Callable[["Call"], Reply | Coroutine[Any, Any, Reply]]


async def answered(answer: Reply | Coroutine[Any, Any, Reply]) -> Reply:
    """Return the reply of an application, once it is there."""
    return answer if isinstance(answer, Reply) else await answer


def json_reply(status: int, document: Any) -> Reply:
    """Return `document` as JSON."""
    return Reply(status, to_json(document), [JSON])


class Gathered:
    """The bytes of the bodies that all connections gather now."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        """There are none."""
        self.size = 0

    def add(self, size: int) -> None:
        """Count more. Raises Overloaded when it is too much for one process."""
        if self.size + size > BODIES_BYTES_MAX:
            raise Overloaded("Too many bodies arrive at once; try again")
        self.size += size


class Body:
    """The body of a request: all of it, or what has arrived so far."""

    __slots__ = ("_arrived", "_on_wanted", "complete", "gathered", "lost", "parts", "size")

    def __init__(
        self,
        data: bytes = b"",
        *,
        on_wanted: Callable[[], None] | None = None,
        gathered: Gathered | None = None,
    ) -> None:
        """Give all of a body; or what is told that somebody waits for more, of one that still arrives.

        It counts among what is `gathered` while it does.
        """
        self.gathered = gathered or Gathered()
        self.parts = [data] if data else []
        #: Bytes that wait to be read.
        self.size = len(data)
        self.complete = on_wanted is None
        #: Why the rest will not come.
        self.lost: Exception | None = None
        self._on_wanted = on_wanted
        self._arrived: asyncio.Future[None] | None = None

    def add(self, data: bytes) -> None:
        """Take what has arrived."""
        self.parts.append(data)
        self.size += len(data)
        self._wake()

    def end(self) -> None:
        """All has arrived."""
        self.complete = True
        self._wake()

    def lose(self, error: Exception) -> None:
        """Nothing more will arrive; whoever reads on is raised this."""
        if not self.complete and self.lost is None:
            self.lost = error
            self._wake()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def take(self) -> bytes:
        """Return what waits to be read."""
        data = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts.clear()
        self.size = 0
        return data

    async def more(self) -> bytes:
        """Return what has come since; wait for it unless all is there. Raises what the body was lost by."""
        if not self.parts and not self.complete and self.lost is None:
            assert self._on_wanted is not None  # it was not complete from the start
            self._arrived = asyncio.get_running_loop().create_future()
            self._on_wanted()
            await self._arrived
        if self.lost is not None and not self.parts:
            raise self.lost
        return self.take()


class Call:
    """One HTTP request. `order_id` and the like come from the path."""

    __slots__ = (
        "_leaving",
        "arriving",
        "began",
        "client",
        "continued",
        "headers",
        "key_id",
        "last",
        "left",
        "method",
        "named",
        "path",
        "path_values",
        "query_string",
        "refusal",
        "request_id",
        "route",
        "scopes",
        "secure",
        "stranger",
        "target",
        "task",
        "through",
        "until",
        "version",
    )

    def __init__(
        self,
        method: str,
        target: bytes,
        headers: list[Header],
        arriving: Body,
        *,
        version: str = "1.1",
        client: str = "",
        refusal: ExpediterError | None = None,
    ) -> None:
        """`target` is a path with its query; `headers` have lower-case names; `refusal` is what it is answered."""
        self.method = method
        self.target = target
        self.headers = headers
        self.arriving = arriving
        self.version = version
        #: The address of who asks: the peer's, or what a trusted proxy says of it, which also tells of https.
        self.client = client
        self.secure = False
        self.refusal = refusal
        #: When it began, and when it is answered that it took too long, on the monotonic clock.
        self.began = time.monotonic()
        self.until = self.began + ANSWER_SECONDS_MAX
        raw, _, self.query_string = target.partition(b"?")
        path = raw.decode("latin-1")
        if "%" in path:
            path = unquote(path)
        #: With and without a slash at the end is the same.
        self.path = path[:-1] if len(path) > 1 and path[-1] == "/" else path
        self.path_values: dict[str, str] = {}
        #: The canonical path of the operation that is asked for, names in braces; empty: there is none.
        self.route = ""
        #: The headers by their names; of one that comes more than once, the last.
        self.named = dict(headers)
        given = self.named.get(b"x-request-id")
        self.request_id = given.decode() if given and _REQUEST_ID.fullmatch(given) else uuid_utils.uuid7().hex
        #: What waits for the answer, and may be cancelled when that takes too long.
        self.task: asyncio.Task[None] | None = None
        #: The API key that it came with ('' for none), what that is for, and why nobody is known by it.
        self.key_id = ""
        self.scopes: frozenset[Scope] = NO_SCOPES
        self.stranger: Unauthorized | None = None
        #: Whether a change of status goes all the way.
        self.through = False
        #: Whether its connection ends with the answer.
        self.last = False
        #: Whether its client sends the body unasked, or was told to.
        self.continued = True
        #: Whether its client says no more, or has gone.
        self.left = False
        self._leaving: asyncio.Future[None] | None = None

    @property
    def short(self) -> bool:
        """Whether it came by the short paths (`/orders...`)."""
        return not self.path.startswith("/api/")

    def may_take(self, seconds: float) -> None:
        """Let it take so many seconds from now before it is answered that it took too long."""
        self.until = time.monotonic() + seconds

    def leave(self) -> None:
        """Its client says no more, or has gone; the two cannot be told apart before something is written to it."""
        self.left = True
        if self._leaving is not None and not self._leaving.done():
            self._leaving.set_result(None)

    def leaving(self) -> asyncio.Future[None]:
        """Return what is done once its client has left: then nothing is worth waiting for."""
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().create_future()
            if self.left:
                self._leaving.set_result(None)
        return self._leaving

    def header(self, name: bytes) -> str | None:
        """Return a header by its lower-case name."""
        value = self.named.get(name)
        return None if value is None else value.decode("latin-1")

    def query(self, *allowed: str) -> dict[str, str]:
        """Return the query parameters. Raises InvalidInput for one that is not `allowed`, or comes twice.

        Those that only browsers and advertisers read (`_=1712`, `utm_source`) are passed over.
        """
        raw: bytes = self.query_string
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
        if not self.arriving.complete:
            return await self._whole_body()
        if self.arriving.size > BODY_BYTES_MAX:
            raise BodyTooLarge
        return self.arriving.take()

    async def _whole_body(self) -> bytes:
        length = self.named.get(b"content-length")
        if length and int(length) > BODY_BYTES_MAX:
            raise BodyTooLarge
        began = time.monotonic()
        self.until += BODY_SECONDS_MAX  # a body that is late has its own limit, and its own answer
        body = bytearray()
        gathered, counted = self.arriving.gathered, 0
        try:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                while True:
                    part = await self.arriving.more()
                    gathered.add(len(part))
                    counted += len(part)
                    body += part
                    if len(body) > BODY_BYTES_MAX:
                        raise BodyTooLarge
                    if self.arriving.complete and not self.arriving.parts:
                        return bytes(body)
        except TimeoutError:
            raise BodyTooSlow from None
        finally:
            gathered.size -= counted
            self.until += time.monotonic() - began - BODY_SECONDS_MAX

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives, however long it is. Raises BodyTooSlow, BadRequest."""
        while not self.arriving.complete or self.arriving.parts:
            try:
                async with asyncio.timeout(BODY_SECONDS_MAX):
                    part = await self.arriving.more()
            except TimeoutError:
                raise BodyTooSlow from None
            yield part

    def has_media_type(self, *media_types: str) -> bool:
        """Return whether the body is said to be of one of these types, as it is."""
        given = (self.header(b"content-type") or "").partition(";")[0].strip().lower()
        return given in media_types and not self.packed

    @property
    def packed(self) -> bool:
        """Whether the body is said to be compressed, or changed in another way."""
        return self.named.get(b"content-encoding", b"identity").strip().lower() != b"identity"

    def idempotency_key(self, asked: Any, keep: int) -> IdempotencyKey | None:
        """Return the caller's Idempotency-Key and what identifies this request. Raises BadRequest.

        `asked` is what the body means, decoded: how it was written does not count. The same text belongs to each
        API key by itself; no text that a client can send is kept under a name with a blank.
        """
        given = self.header(b"idempotency-key")
        if given is None:
            return None
        if [name for name, _ in self.headers].count(b"idempotency-key") > 1:
            raise BadRequest("Idempotency-Key is given twice; a request has one")
        key = given[1:-1] if len(given) > 1 and given[0] == given[-1] == '"' else given
        if not _KEY.fullmatch(key):
            raise BadRequest("Idempotency-Key must be 1 to 255 visible ASCII characters")
        seen = hashlib.sha256(f"{self.method} {self.path}\n".encode() + fingerprinted(asked))
        if not self.key_id:
            return IdempotencyKey(key, seen.hexdigest(), keep)
        owned = f"{self.key_id} {hashlib.sha256(key.encode()).hexdigest()}"
        return IdempotencyKey(owned, seen.hexdigest(), keep, unowned=key)

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


def passed_on(call: Call, reply: Reply) -> Reply:
    """Return a reply with the headers that go back as they came; the request id may be made."""
    reply.headers.append((b"x-request-id", call.request_id.encode()))
    traced = call.named.get(b"traceparent")
    if traced is not None and _TRACEPARENT.fullmatch(traced):
        reply.headers.append((b"traceparent", traced))
    return reply


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
