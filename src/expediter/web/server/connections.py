"""One connection: its requests are answered one after the other, and it costs no more than is granted to it."""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import sys
from collections.abc import Coroutine
from typing import Any

from expediter.errors import BadRequest, ExpediterError
from expediter.web.http import BodyTooSlow, Call, Reply, Streamed
from expediter.web.problems import bug_reply
from expediter.web.server.addresses import place_of, plain
from expediter.web.server.heads import CLOSE, CONTINUE, LAST_CHUNK, chunk, head
from expediter.web.server.refusals import headers_too_slow
from expediter.web.server.requests import BODY, HEADERS, NOTHING, Requests
from expediter.web.server.state import State

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
#: Seconds for which what a client still sends is thrown away after the last answer: a connection that is closed
#: over unread bytes takes the answer along.
LINGER_SECONDS_MAX = 2.0

#: Bytes of answers that one client has not taken; beyond them its next request waits.
UNREAD_BYTES_PER_CLIENT = 16 * 1024
#: Bytes of a body that wait for whoever reads it.
BODY_BYTES_WAITING_MAX = 64 * 1024
#: Bytes that are looked at in one go: so many short requests may wait at one connection.
BYTES_PER_LOOK = 16 * 1024
#: A body up to so many bytes is copied behind its head.
JOINED_BYTES_MAX = 64 * 1024

#: Linger for no second: what is not sent is thrown away.
_RESET = struct.pack("ii", 1, 0)
#: Why the rest of a body is not read.
_ANSWERED = BadRequest("The request is answered")


class Connection(asyncio.Protocol):
    """Has requests answered as they come, and writes the answers."""

    def __init__(self, state: State) -> None:
        """Share `state` with the other connections."""
        self._state = state
        self._loop = state.loop
        self._transport: Any = None
        self._requests: Requests
        self._call: Call | None = None
        #: What the answer is waited for by.
        self.task: asyncio.Task[None] | None = None
        #: What is looked at once what came before it is answered.
        self._rest = b""
        #: Why its request is refused: there is one connection too many.
        self._surplus: ExpediterError | None = None
        #: The address that it counts for; none, if that is a trusted proxy's.
        self._place = ""
        self._half_closed = False
        self._ended = False
        self._closed = False
        self._reading_paused = False
        self._writing_paused = False
        #: The number of the request whose headers are timed.
        self._timed = 0
        #: When it is looked at because nothing came, and because nothing was taken, on the loop's clock.
        self.silent_at = self.unread_at = math.inf
        self._unread_bytes = 0
        #: Wakes whoever writes a stream, and whoever waits for the client's end.
        self._drained: asyncio.Future[None] | None = None
        self._gone: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to listen for the first request."""
        self._transport = transport
        transport.set_write_buffer_limits(high=UNREAD_BYTES_PER_CLIENT)
        peername = transport.get_extra_info("peername")
        peer = plain(peername[0]) if peername else ""
        trusted = self._state.proxies.trusts(peer)
        self._requests = Requests(
            peer, self._want_body, self._state.bodies, self._state.proxies if trusted else None
        )
        self._place = "" if trusted or not peer else place_of(peer)
        self._surplus = self._state.add(self, self._place)
        self._listen(IDLE_SECONDS_MAX)
        if self._state.stopping:
            self.shut_down()

    def data_received(self, data: bytes) -> None:
        """Read requests, and begin to answer them."""
        if self._requests.deaf:
            return
        if len(data) <= BYTES_PER_LOOK and not self._rest:
            self._requests.look_at(data)
        else:
            self._rest += data
        self._go_on()

    def eof_received(self) -> bool:
        """Go on with what was asked whole: a client that says no more may still listen."""
        self._half_closed = True
        self._leave()
        asked = self._call is not None or bool(self._requests.waiting)
        return asked and not self._ended and self._requests.reading == NOTHING

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget everything, and make room for another one; what is under way goes on."""
        self._closed = True
        self._rest = b""
        self._requests.close()
        _wake(self._drained)
        self._leave()
        self._state.remove(self, self._place, surplus=self._surplus is not None)

    def _leave(self) -> None:
        """End what only waits for something to show: a reader that has gone must not keep its place for long."""
        _wake(self._gone)
        if self._call is not None:
            self._call.leave()

    def pause_writing(self) -> None:
        """The client does not take its answers."""
        self._writing_paused = True
        self._wait_for_reader()
        self._state.hold(self, self._transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has taken most of them."""
        self._writing_paused = False
        self._unread_bytes = sys.maxsize
        self._state.let_go(self)
        _wake(self._drained)
        self._go_on()

    def _want_body(self) -> None:
        """Somebody waits for the body of the call that is answered now: let it come."""
        if self._call is not None and not self._call.continued:
            self._call.continued = True
            self._transport.write(CONTINUE)
        self._go_on()

    def _go_on(self) -> None:
        """Begin what can be begun, look at what can be looked at, and see to the clock."""
        requests = self._requests
        self._begin()
        if self._rest and not requests.waiting and not requests.deaf:
            data, self._rest = self._rest[:BYTES_PER_LOOK], self._rest[BYTES_PER_LOOK:]
            requests.look_at(data)
            self._begin()
            if self._rest and not requests.waiting:
                self._loop.call_soon(self._go_on)  # other connections have their turn
        if self._closed or self._ended:
            return
        if (
            self._call is None
            and not requests.waiting
            and (requests.deaf or (self._half_closed and not self._rest))
        ):
            self._end()
            return
        full = requests.newest is not None and requests.newest.arriving.size > BODY_BYTES_WAITING_MAX
        if full or requests.waiting or self._rest or self._reading_paused:
            self._pause_reading(full or bool(requests.waiting or self._rest))
        if requests.reading == NOTHING:
            if self._call is None and not requests.waiting:
                self._listen(IDLE_SECONDS_MAX)
            else:
                self.silent_at = math.inf
        elif requests.reading == BODY:
            self._listen(BODY_SILENCE_SECONDS_MAX)
        elif self._timed != requests.begun:  # more of the same headers do not start their clock anew
            self._timed = requests.begun
            self._listen(HEADER_SECONDS_MAX)

    def _pause_reading(self, wanted: bool) -> None:
        if wanted and not self._reading_paused:
            self._transport.pause_reading()
        elif self._reading_paused and not wanted:
            self._transport.resume_reading()
        self._reading_paused = wanted

    def _begin(self) -> None:
        waiting = self._requests.waiting
        while waiting and self._call is None and not self._writing_paused:
            self._call = call = waiting.popleft()
            if self._half_closed:
                call.leave()
            if self._surplus is not None and call.path != "/healthz":
                call.refusal = self._surplus  # whoever asks whether it lives must not take it for dead
            answer = self._state.app(call)
            if isinstance(answer, Reply):
                self._send(call, answer)
            else:
                self.task = call.task = self._loop.create_task(self._answer(call, answer))

    async def _answer(self, call: Call, answer: Coroutine[Any, Any, Reply]) -> None:
        try:
            reply = await answer
            if isinstance(reply, Streamed):
                await self._stream(call, reply)
            else:
                self._send(call, reply)
        except BaseException:
            self._transport.abort()
            raise
        self._go_on()

    def _send(self, call: Call, reply: Reply) -> None:
        self._state.requests.note(call, reply.status)
        call.last = self._is_last(call, reply)
        try:
            begin = head(call, reply, len(reply.body))
        except ValueError as error:
            reply = bug_reply(error, call.request_id)
            begin = head(call, reply, len(reply.body))
        body = reply.body if call.method != "HEAD" else b""
        if self._closed:
            pass  # its client has gone
        elif len(body) <= JOINED_BYTES_MAX:
            self._transport.write(begin + body)
        else:
            self._transport.writelines((begin, body))
        self._sent(call, reply, len(body))

    async def _stream(self, call: Call, reply: Streamed) -> None:
        self._state.requests.note(call, reply.status)
        chunked = call.version == "1.1"
        call.last = self._is_last(call, reply) or not chunked
        writer = _Writer(self, chunked=chunked)
        self._transport.write(head(call, reply, None))
        await reply.stream(writer)
        if chunked:
            self._transport.write(LAST_CHUNK)
        call.last = self._is_last(call, reply)
        self._sent(call, reply, writer.size)

    def _is_last(self, call: Call, reply: Reply) -> bool:
        """Tell whether the connection ends with an answer."""
        if (
            call.last
            or call.refusal is not None
            or self._surplus is not None
            or self._state.stopping
            or CLOSE in reply.headers
        ):
            return True
        if not call.arriving.complete and not call.continued:
            return True  # whether its body will come is not known
        if self._requests.waiting:
            return False
        return self._requests.deaf or (self._half_closed and not self._rest)

    def _sent(self, call: Call, reply: Reply, size: int) -> None:
        self._call = self.task = None
        if call.arriving.parts or not call.arriving.complete:
            call.arriving.lose(_ANSWERED)
            call.arriving.take()
        if self._state.note is not None:
            self._state.note(call, reply, size)
        if call.last and not self._closed:
            self._end()

    def _end(self) -> None:
        """Close, once what was written is taken; what the client still sends is thrown away before."""
        self._ended = self._requests.deaf = True
        self._requests.waiting.clear()
        self._rest = b""
        self.silent_at = self._loop.time() + LINGER_SECONDS_MAX
        if self._requests.reading == NOTHING or self._half_closed:
            self._transport.close()
        else:
            self._transport.write_eof()
            self._pause_reading(False)
        if self._transport.get_write_buffer_size():
            self._wait_for_reader()

    def shut_down(self) -> None:
        """Close once the request under way is answered, or the first one, which may be on its way.

        A client that was let in and is then sent away unheard would see a failure at every rolling restart.
        """
        if self._requests.newest is None:
            # Half of the drain time at most, so that silence alone never uses it up.
            self._listen(min(FIRST_REQUEST_SECONDS_MAX, self._state.drain_seconds / 2))
        elif self._call is None and self._requests.reading == NOTHING:
            self._end()

    def on_silence(self) -> None:
        """Nothing came for too long."""
        self.silent_at = math.inf
        if self._ended:
            self._transport.close()
        elif self._reading_paused or self._requests.deaf:
            pass  # it is this side that does not read; it sees to the clock when it does again, or ends
        elif self._requests.reading == HEADERS:
            self._requests.break_off(headers_too_slow(HEADER_SECONDS_MAX))
            self._go_on()
        elif self._requests.reading == BODY:
            self._requests.break_off(BodyTooSlow())
            self._go_on()
        else:
            self._end()  # it asks for nothing

    def on_unread(self) -> None:
        """Cut off a client that has taken nothing meanwhile; otherwise look again later."""
        self.unread_at = math.inf
        left = self._transport.get_write_buffer_size()
        if left and left >= self._unread_bytes:
            self.cut_off()
        elif left:
            self._wait_for_reader()

    def cut_off(self) -> None:
        """End the connection by a reset, so that the kernel does not keep what nobody reads either."""
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def _listen(self, seconds: float) -> None:
        self.silent_at = self._loop.time() + (min(seconds, TURNED_AWAY_SECONDS_MAX) if self._surplus else seconds)

    def _wait_for_reader(self) -> None:
        if self.unread_at == math.inf:
            self._unread_bytes = self._transport.get_write_buffer_size()
            self.unread_at = self._loop.time() + UNREAD_SECONDS_MAX

    async def write(self, data: bytes) -> None:
        """Write a part of a stream, and wait while the client is slow."""
        if not self._closed:
            self._transport.write(data)
        if self._writing_paused and not self._closed:
            self._drained = self._loop.create_future()
            await self._drained

    async def until_gone(self) -> None:
        """Return when the client has closed its side, or all."""
        if not self._closed and not self._half_closed:
            self._gone = self._loop.create_future()
            await self._gone


class _Writer:
    """Writes the parts of a streamed answer."""

    def __init__(self, connection: Connection, *, chunked: bool) -> None:
        self._write = connection.write
        self._chunked = chunked
        self.until_gone = connection.until_gone
        self.size = 0

    async def write(self, data: bytes) -> None:
        """See Writer."""
        self.size += len(data)
        await self._write(chunk(data) if self._chunked else data)


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
