"""What one connection may cost: the clocks of slow clients, and the bytes that wait for them."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from expediter.web.http import BODY_SECONDS_MAX, HEADER_BYTES_MAX

#: Seconds that a connection may be open without a request: longer than load balancers keep theirs (60), so that
#: none of them sends a request into a connection that is being closed here.
IDLE_SECONDS_MAX = 75
#: Seconds from the first byte of a request to the end of its headers.
HEADER_SECONDS_MAX = 10.0
#: Seconds of silence in a body: a moment longer, because whoever reads the body gives the better answer.
BODY_SILENCE_SECONDS_MAX = 11.0
#: Seconds in which a client must take at least some of an answer that it has not taken whole.
UNREAD_SECONDS_MAX = 10.0
#: Seconds that a connection beyond the limit has for its request.
TURNED_AWAY_SECONDS_MAX = 1.0
#: Seconds that a stop leaves to a connection that has not asked for anything yet.
FIRST_REQUEST_SECONDS_MAX = 1.0

#: Bytes of answers that one client has not taken; beyond them its next request waits.
UNREAD_BYTES_PER_CLIENT = 16 * 1024
#: Bytes of answers that clients beyond that have not taken, all together; then who is longest behind is cut off.
UNREAD_BYTES_MAX = 64 * 1024 * 1024

#: A body up to so many bytes is copied behind its head, to be sent at once.
JOINED_BYTES_MAX = 64 * 1024

#: Seconds between two warnings of the same kind.
WARNING_SECONDS = 60.0

#: Linger for no second: what is not sent is thrown away.
_RESET = struct.pack("ii", 1, 0)

log = structlog.get_logger(__name__)


class State(ServerState):
    """What the connections of one server share. `stopping`: it takes up no more."""

    def __init__(self, connections_max: int, turn_away: Any) -> None:
        """Serve `connections_max` at once; requests of others are answered by the application `turn_away`."""
        super().__init__()
        self.connections_max = connections_max
        self.turn_away = turn_away
        self.turned_away = 0
        self.stopping = False
        self.on_end: Callable[[], None] = lambda: None
        #: Connections whose client does not read, longest first, and the bytes that each has not taken.
        self._unread: dict[BoundedProtocol, int] = {}
        self._unread_bytes = 0
        self._warned: dict[str, float] = {}

    @property
    def full(self) -> bool:
        """Whether those that came last are too many."""
        return len(self.connections) - self.turned_away > self.connections_max

    def hold(self, connection: BoundedProtocol, size: int) -> None:
        """Count an answer that waits for its reader, and cut off who is longest behind if it is all too much."""
        self.let_go(connection)
        self._unread[connection] = size
        self._unread_bytes += size
        while self._unread_bytes > UNREAD_BYTES_MAX:
            slowest = next(iter(self._unread))
            self.let_go(slowest)
            self.warn("clients that do not read their answers are cut off", limit_bytes=UNREAD_BYTES_MAX)
            slowest.cut_off()

    def let_go(self, connection: BoundedProtocol) -> None:
        """Forget an answer: it was taken, or never will be."""
        self._unread_bytes -= self._unread.pop(connection, 0)

    def warn(self, text: str, **facts: object) -> None:
        """Log a warning, unless the same one was logged a moment ago."""
        now = asyncio.get_running_loop().time()
        if now - self._warned.get(text, -WARNING_SECONDS) >= WARNING_SECONDS:
            self._warned[text] = now
            log.warning(text, **facts)


class _WholeAnswers:
    """A transport that sends the head of an answer together with the body that follows it.

    uvicorn writes them one after the other, and each would be a call of the kernel.
    """

    __slots__ = ("_head", "_on_end", "_transport", "is_closing", "write")

    def __init__(self, transport: Any, on_end: Callable[[], None]) -> None:
        self._transport = transport
        self._on_end = on_end
        self._head = b""
        self.write: Callable[[bytes], None] = self._keep
        self.is_closing = transport.is_closing

    def _keep(self, data: bytes) -> None:
        self._head = data
        self.write = self._send

    def _send(self, data: bytes) -> None:
        head, self._head = self._head, b""
        self.write = self._transport.write
        self.write(head + data if len(data) <= JOINED_BYTES_MAX else head)
        if len(data) > JOINED_BYTES_MAX:
            self.write(data)

    def end(self) -> None:
        """Send the head of an answer that has no body, and say that it is over."""
        if self._head:
            self._send(b"")
        self._on_end()

    def close(self) -> None:
        """Send what there is, and close."""
        if self._head:
            self._send(b"")
        self._transport.close()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself waits without limit for the rest of a request, and for slow readers."""

    server_state: State

    def __init__(self, config: uvicorn.Config, state: State, app_state: dict[str, Any]) -> None:
        """Take what uvicorn's takes."""
        super().__init__(config, state, app_state)
        self._surplus = False
        self._unfinished = True
        self._in_headers = True
        self._asked = False
        self._header_bytes = 0
        self._silence: asyncio.TimerHandle | None = None
        #: Whether the clock that runs is that of headers that have begun.
        self._timing_headers = False
        self._unread: asyncio.TimerHandle | None = None
        self._unread_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Begin to listen for the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNREAD_BYTES_PER_CLIENT)
        if self.server_state.full:
            self._surplus = True
            self.server_state.turned_away += 1
            limit = self.server_state.connections_max
            self.server_state.warn("new connections are turned away: there are too many", limit=limit)
        self._listen()
        if self.server_state.stopping:
            self.shutdown()

    def shutdown(self) -> None:
        """Close once the request under way is answered, or the first one, which may be on its way.

        A client that was let in and is then sent away unheard would see a failure at every rolling restart.
        """
        if not self._asked:
            # Half of the drain time at most, so that silence alone never uses it up.
            seconds = min(FIRST_REQUEST_SECONDS_MAX, (self.config.timeout_graceful_shutdown or 0) / 2)
            self.loop.call_later(seconds, self._close_unasked)
        else:
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        """Read on, count header bytes, and see to the clock while the request is unfinished."""
        super().data_received(data)
        if self._unfinished:
            if self._in_headers:
                self._header_bytes += len(data)
                if self._header_bytes > HEADER_BYTES_MAX:
                    self._refuse(431, "Request Header Fields Too Large", f"more than {HEADER_BYTES_MAX} bytes")
                    return
            self._listen()
        else:
            self._stop_listening()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._unfinished = self._in_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its headers are there."""
        self._in_headers = self._timing_headers = False
        self._header_bytes = 0
        if self._surplus and self.url != b"/healthz":  # whoever asks whether it lives must not take it for dead
            self.app = self.server_state.turn_away
        super().on_headers_complete()
        if not self.expect_100_continue:
            whole = _WholeAnswers(self.transport, self.on_response_complete)
            self.cycle.transport = whole  # type: ignore[assignment]
            self.cycle.on_response = whole.end
        self._asked = True
        if self.server_state.stopping or self._surplus:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Its body is there."""
        self._unfinished = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Its answer was given to the transport."""
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._wait_for_reader()

    def pause_writing(self) -> None:
        """The client does not take its answers."""
        super().pause_writing()
        self._wait_for_reader()
        self.server_state.hold(self, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has taken most of them."""
        super().resume_writing()
        self._unread_bytes = sys.maxsize
        self.server_state.let_go(self)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; one whose client still reads is not idle."""
        if self.transport.get_write_buffer_size():
            self._wait_for_reader()
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clocks, and make room for another one."""
        self._stop_listening()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)
        self.server_state.let_go(self)
        if self._surplus:
            self.server_state.turned_away -= 1
        self.server_state.on_end()

    def cut_off(self) -> None:
        """End the connection by a reset, so that the kernel does not keep what nobody reads either."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def _close_unasked(self) -> None:
        if not self._asked:
            self.transport.close()

    def _listen(self) -> None:
        """Start the clock of what is to come. That of headers is not started anew by more of them."""
        if self._timing_headers:
            return
        self._stop_listening()
        if not self._in_headers:
            seconds = BODY_SILENCE_SECONDS_MAX
        elif self._header_bytes:
            seconds = HEADER_SECONDS_MAX
            self._timing_headers = True
        else:
            seconds = IDLE_SECONDS_MAX
        if self._surplus:
            seconds = min(seconds, TURNED_AWAY_SECONDS_MAX)
        self._silence = self.loop.call_later(seconds, self._on_silence)

    def _stop_listening(self) -> None:
        self._timing_headers = False
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _on_silence(self) -> None:
        if self.flow.read_paused:
            self._timing_headers = False
            self._listen()  # it is this side that does not read
        elif not self._in_headers and self.cycle.response_started:
            self.transport.close()
        elif self._header_bytes:
            self._refuse(408, "Request Timeout", f"its headers took more than {HEADER_SECONDS_MAX:g} seconds")
        elif not self._in_headers:
            self._refuse(408, "Request Timeout", f"nothing came for {BODY_SECONDS_MAX:g} seconds")
        else:
            self.transport.close()  # it never asked for anything

    def _wait_for_reader(self) -> None:
        if self._unread is None:
            self._unread_bytes = self.transport.get_write_buffer_size()
            self._unread = self.loop.call_later(UNREAD_SECONDS_MAX, self._on_unread)

    def _on_unread(self) -> None:
        """Cut off a client that has taken nothing meanwhile; otherwise look again later."""
        self._unread = None
        left = self.transport.get_write_buffer_size()
        if left and left >= self._unread_bytes:
            self.cut_off()
        elif left:
            self._wait_for_reader()
        elif not self.flow.write_paused and self.cycle.response_complete and not self.transport.is_closing():
            # It has read all, and may ask for more.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(IDLE_SECONDS_MAX, self.timeout_keep_alive_handler)

    def _refuse(self, status: int, title: str, error: str) -> None:
        body = (
            f'{{"type":"about:blank","title":"{title}","status":{status},'
            f'"detail":"The request was not read: {error}","error":"The request was not read: {error}"}}'
        ).encode()
        head = (
            f"HTTP/1.1 {status} {title}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        ).encode()
        self.transport.write(head + body)
        self.transport.close()
