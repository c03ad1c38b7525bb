"""A receiver of webhooks that does nothing but answer 204, as fast as it can; it prints its port."""

from __future__ import annotations

import asyncio

ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


class Receiver(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.held = b""

    def data_received(self, data: bytes) -> None:
        self.held += data
        while (end := self.held.find(b"\r\n\r\n") + 4) >= 4:
            head = self.held[:end].lower()
            begin = head.index(b"content-length:") + 15
            end += int(head[begin : head.index(b"\r\n", begin)])
            if len(self.held) < end:
                return
            self.held = self.held[end:]
            self.transport.write(ANSWER)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Receiver, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
