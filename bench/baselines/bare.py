"""Bare: httptools on uvloop, the service's own decoder, and an answer from a future. The limit of the language.

    python bare.py PORT

No framework, no headers but those that a client needs, and nothing is stored. The futures of one turn of the loop
are resolved together, as those of a batch are after its commit.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import httptools
import msgspec
import uvloop

from expediter.web.payloads import OrderBody

_decode = msgspec.json.Decoder(OrderBody).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode
_HEAD = b"HTTP/1.1 202 Accepted\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class Committer:
    """Answers what came in one turn of the loop in the next one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[tuple[asyncio.Future[OrderBody], OrderBody]] = []

    def submit(self, order: OrderBody) -> asyncio.Future[OrderBody]:
        future: asyncio.Future[OrderBody] = self._loop.create_future()
        if not self._waiting:
            self._loop.call_soon(self._commit)
        self._waiting.append((future, order))
        return future

    def _commit(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future, order in waiting:
            future.set_result(order)


class Connection(asyncio.Protocol):
    """One keep-alive connection; every request on it is an order."""

    def __init__(self, committer: Committer) -> None:
        self._committer = committer
        self._parser = httptools.HttpRequestParser(self)
        self._parts: list[bytes] = []
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)

    def on_message_complete(self) -> None:
        order = _decode(b"".join(self._parts))
        self._parts.clear()
        self._committer.submit(order).add_done_callback(self._answer)

    def _answer(self, future: asyncio.Future[OrderBody]) -> None:
        body = _encode(future.result())
        self._transport.write(_HEAD % len(body) + body)


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    committer = Committer(loop)
    server = await loop.create_server(lambda: Connection(committer), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
