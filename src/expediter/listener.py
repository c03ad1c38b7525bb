"""How connections are taken: the socket, uvicorn as a part among parts, and limits on what arrives unfinished."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from expediter.errors import ConfigurationError
from expediter.web.http import HEADER_BYTES_MAX

#: Connections that may wait to be taken up.
CONNECTIONS_WAITING_MAX = 4096
#: Seconds that a client may be silent in the middle of a request, or before its first one.
SILENCE_SECONDS_MAX = 10.0
#: The same in the middle of a body: a moment longer, because whoever reads the body gives the better answer.
BODY_SILENCE_SECONDS_MAX = 11.0
#: Seconds that a stop leaves to a connection that has not asked for anything yet.
FIRST_REQUEST_SECONDS_MAX = 1.0


class State(ServerState):
    """What the connections of one server share. `stopping`: it takes up no more."""

    stopping = False


class Server(uvicorn.Server):
    """uvicorn, but signals are the service's: it would end by the signal, where a drained stop is exit 0."""

    def __init__(self, config: uvicorn.Config) -> None:
        """Take what uvicorn takes."""
        super().__init__(config)
        self.server_state: State = State()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, and let connections know that are accepted but come to be only later."""
        self.server_state.stopping = True
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself waits without limit for the rest of a request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what uvicorn gives."""
        super().__init__(*args, **kwargs)
        self._unfinished = True
        self._in_headers = True
        self._asked = False
        self._header_bytes = 0
        self._silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to listen for the first request."""
        super().connection_made(transport)
        self._listen()
        if self._stopping:
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
        """Read on, count header bytes, and start the clock anew while the request is unfinished."""
        super().data_received(data)
        if self._unfinished:
            if self._in_headers:
                self._header_bytes += len(data)
                if self._header_bytes > HEADER_BYTES_MAX:
                    self._refuse(431, "Request Header Fields Too Large", f"more than {HEADER_BYTES_MAX} bytes")
                    return
            self._listen()
        elif self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def on_message_begin(self) -> None:
        """A request begins."""
        self._unfinished = self._in_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its headers are there."""
        self._in_headers = False
        self._header_bytes = 0
        super().on_headers_complete()
        self._asked = True
        if self._stopping:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Its body is there."""
        self._unfinished = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        if self._silence is not None:
            self._silence.cancel()
        super().connection_lost(exc)

    @property
    def _stopping(self) -> bool:
        return isinstance(self.server_state, State) and self.server_state.stopping

    def _close_unasked(self) -> None:
        if not self._asked:
            self.transport.close()

    def _listen(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
        seconds = SILENCE_SECONDS_MAX if self._in_headers else BODY_SILENCE_SECONDS_MAX
        self._silence = self.loop.call_later(seconds, self._on_silence)

    def _on_silence(self) -> None:
        if self.flow.read_paused:
            self._listen()  # it is this side that does not read
        elif not self._in_headers and self.cycle.response_started:
            self.transport.close()
        elif self._header_bytes or not self._in_headers:
            self._refuse(408, "Request Timeout", f"nothing came for {SILENCE_SECONDS_MAX:g} seconds")
        else:
            self.transport.close()  # it never asked for anything

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


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigurationError that says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # From here on a connection waits instead of being refused, so the address may be announced.
        listener.listen(CONNECTIONS_WAITING_MAX)
    except socket.gaierror as error:
        listener.close()
        raise ConfigurationError(f"HOST={host} is not the name of an address here ({error.strerror})") from error
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"{host}:{port} cannot be used ({error.strerror}): stop what listens there, or set another PORT"
        ) from error
    listener.setblocking(False)
    return listener


def inherit(descriptor: int) -> socket.socket:
    """Return the listening socket that this process was given at its start."""
    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the address of a listening socket for people: http://127.0.0.1:8000."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
