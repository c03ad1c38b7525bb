"""From the bytes of a connection to calls."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Any

import httptools

from expediter.errors import BadRequest, ExpediterError
from expediter.web.http import BODY_BYTES_MAX, HEADER_BYTES_MAX, TARGET_BYTES_MAX, Body, Call, Gathered, Header
from expediter.web.server import refusals
from expediter.web.server.addresses import Proxies, came_by_https

#: What a connection is in the middle of reading.
NOTHING, HEADERS, BODY = range(3)

_FOREIGN = refusals.FOREIGN
_LENGTHS = frozenset({b"content-length", b"transfer-encoding"})


class Requests:
    """Reads requests with httptools, whose callbacks are the methods named `on_`.

    Where RFC 9112 leaves a choice, the careful one is made: what two readers could take for different requests is
    refused, and the connection ends.
    """

    def __init__(
        self, client: str, on_wanted: Callable[[], None], gathered: Gathered, proxies: Proxies | None = None
    ) -> None:
        """`client` is its address; `on_wanted` is told that somebody waits for the body of a call.

        The bodies count among what is `gathered`. `proxies` where the client is one of them: it asks for others.
        """
        self._client = client
        self._gathered = gathered
        self._proxies = proxies
        self._on_wanted = on_wanted
        self._parser: Any = httptools.HttpRequestParser(self)
        #: What was read and is not begun; the last may still arrive.
        self.waiting: deque[Call] = deque()
        self.newest: Call | None = None
        self.reading = NOTHING
        #: How many have begun.
        self.begun = 0
        #: Nothing that comes is a request any more.
        self.deaf = False
        self._target = b""
        self._headers: list[Header] = []
        #: Bytes that are looked at now; those of headers before them; those behind the last part of a body.
        self._looked = self._header_bytes = self._between_bytes = 0
        #: Bytes of a body that came after the answer.
        self._dropped_bytes = 0
        #: Whether the newest asks to go on with another protocol.
        self._upgrading = False
        #: What came before, while headers are not all there; and how many requests had begun before that. None: it
        #: does not begin where a request does.
        self._kept = b""
        self._begun_before: int | None = 0
        #: What is looked at, if the name of another protocol is in it.
        self._foreign = b""

    def close(self) -> None:
        """Nothing more will come: let go of what leads back here."""
        self.deaf = True
        self.waiting.clear()
        if self.newest is not None:
            self.newest.arriving.lose(BadRequest("The client went away before its body was complete"))
        self.newest = self._parser = None

    def look_at(self, data: bytes) -> None:
        """Read on."""
        self._looked = len(data)
        self._between_bytes += self._looked
        seen = data
        if self.reading == NOTHING:
            self._begun_before = self.begun
        elif self.reading == BODY:
            self._begun_before = None
        elif self._kept:
            seen = self._kept + data
            self._kept = b""
        self._foreign = seen if _FOREIGN in seen else b""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self.break_off(refusals.misread(error, seen if self._begun_before is not None else b""))
        else:
            if self.reading == HEADERS:
                self._kept = seen
                self._header_bytes += self._looked
                if len(self._target) > TARGET_BYTES_MAX:
                    self.break_off(refusals.target_too_long())
                elif self._header_bytes > HEADER_BYTES_MAX:
                    self.break_off(refusals.headers_too_large())
            elif self.reading == BODY and self._between_bytes > HEADER_BYTES_MAX:
                self.break_off(refusals.headers_too_large())  # the ends of chunks, and trailers
            elif self.reading == BODY and self._dropped_bytes > BODY_BYTES_MAX:
                self.deaf = True

    def break_off(self, error: Exception) -> None:
        """Read no more: what has begun is refused, after what came before it."""
        self.deaf = True
        if self.reading == BODY and self.newest is not None:
            self.newest.last = True
            self.newest.arriving.lose(error)
        elif isinstance(error, ExpediterError):
            self.reading = HEADERS
            target = refusals.origin_form(self._target) or b"-"
            self.waiting.append(Call("-", target, [], Body(), client=self._client, refusal=error))

    def _stay(self, rest: bytes) -> None:
        """Go on with HTTP/1.1, whatever else was asked for. The parser has stopped before the body."""
        assert self.newest is not None
        if self.newest.refusal is not None:
            self.deaf = True
            return
        lengths = b"".join(b"%b: %b\r\n" % each for each in self.newest.headers if each[0] in _LENGTHS)
        self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % lengths)
        if rest:
            self.look_at(rest)

    def on_message_begin(self) -> None:
        """A request begins."""
        if not self._upgrading:
            self.begun += 1
            self.reading = HEADERS
            self._target = b""
            self._headers = []
            self._header_bytes = -self._looked  # it begins somewhere in what is looked at

    def on_url(self, url: bytes) -> None:
        """Take a part of its target."""
        if not self._upgrading:
            self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. What comes behind a body is passed over."""
        if self.reading == HEADERS:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Its headers are there."""
        if self._upgrading:
            self._upgrading = False  # they are read once more, for what tells the end of the body
            return
        self.reading = BODY
        self._between_bytes = self._dropped_bytes = 0
        parser, target = self._parser, self._target
        plain = target[:1] == b"/" and b"#" not in target
        call = self.newest = Call(
            parser.get_method().decode("latin-1"),
            target if plain else refusals.origin_form(target),
            self._headers,
            Body(on_wanted=self._on_wanted, gathered=self._gathered),
            version=parser.get_http_version(),
            client=self._client,
        )
        if self._proxies is not None:
            call.client = self._proxies.client_of(self._client, self._headers)
            call.secure = came_by_https(self._headers)
        call.last = not parser.should_keep_alive()
        call.continued = b"expect" not in call.named or call.version == "1.0"
        self._upgrading = parser.should_upgrade()
        if (
            not plain
            or not call.continued
            or call.version != "1.1"
            or self._foreign
            or len(target) > TARGET_BYTES_MAX
            or b"transfer-encoding" in call.named
            or b"host" not in call.named
            or len(call.named) < len(self._headers)
        ):
            call.refusal = refusals.refusal_of(call)
            if self._foreign and self._is_foreign():
                call.refusal = refusals.version_not_known()
        if self._header_bytes > 0 and sum(len(n) + len(v) for n, v in self._headers) > HEADER_BYTES_MAX:
            call.refusal = refusals.headers_too_large()
        self.waiting.append(call)

    def _is_foreign(self) -> bool:
        """Return whether the newest request names another protocol, which the parser passes over."""
        line = self._foreign
        if self._begun_before is not None:
            line = refusals.behind_whole(line, self.begun - self._begun_before - 1).lstrip().partition(b"\n")[0]
        named = rb"%b +%b +%b" % (self._parser.get_method(), re.escape(self._target), _FOREIGN)
        return re.search(named, line) is not None

    def on_body(self, data: bytes) -> None:
        """Take a part of its body; what nobody reads any more is thrown away."""
        assert self.newest is not None
        self._between_bytes = 0
        body = self.newest.arriving
        if body.lost is None:
            body.add(data)
        else:
            self._dropped_bytes += len(data)

    def on_message_complete(self) -> None:
        """Its body is there."""
        if not self._upgrading and self.newest is not None:
            self.reading = NOTHING
            self.newest.arriving.end()
