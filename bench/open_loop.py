"""Places orders at a constant rate and prints their latency, counted from when each was due.

    python open_loop.py URL RATE SECONDS CONNECTIONS

A client that waits for an answer before it sends the next request does not notice how long the requests had waited
that it did not send (coordinated omission, G. Tene). Here each request has its moment; if every connection is busy
then, it waits in a queue, and that waiting counts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from typing import Any
from urllib.parse import urlsplit

import uvloop

BODY = (
    b'{"customer_id":"customer_123","items":['
    b'{"item_id":"item_001","item_name":"Burger","quantity":2,"price":12.99},'
    b'{"item_id":"item_002","item_name":"Fries","quantity":1,"price":3.49}]}'
)


class Connection(asyncio.Protocol):
    """One keep-alive connection; it has one request under way at most."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._due = 0.0
        self._bytes = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, due: float) -> None:
        self._due = due
        self._transport.write(self._client.request)

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        head, found, body = self._bytes.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(body) >= length:
            self._bytes = b""
            self._client.answered(self, self._due, head[9:12])

    def connection_lost(self, error: Exception | None) -> None:
        self._client.lost()


class Client:
    def __init__(self, url: str, rate: int, seconds: float) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._address = parts.hostname, parts.port
        self._rate = rate
        self._count = int(rate * seconds)
        self.request = (
            f"POST {parts.path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(BODY)}\r\n\r\n"
        ).encode() + BODY
        self._idle: deque[Connection] = deque()
        self._waiting: deque[float] = deque()
        self._seconds: list[float] = []
        self._errors = 0
        self._done = asyncio.Event()

    async def run(self, connections: int) -> list[float]:
        """Return p50, p99, p99.9 and the worst in milliseconds, how many were sent, and how many failed."""
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            _, connection = await loop.create_connection(lambda: Connection(self), *self._address)
            self._idle.append(connection)
        begin = time.perf_counter() + 0.1
        for number in range(self._count):
            due = begin + number / self._rate
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            if self._idle:
                self._idle.popleft().send(due)
            else:
                self._waiting.append(due)
            if number % 16 == 0:
                await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await self._done.wait()
        ordered = sorted(self._seconds)
        at = [ordered[int(len(ordered) * share)] * 1000 for share in (0.5, 0.99, 0.999)]
        return [*at, ordered[-1] * 1000, self._count, self._errors]

    def answered(self, connection: Connection, due: float, status: bytes) -> None:
        self._seconds.append(time.perf_counter() - due)
        self._errors += status not in (b"201", b"202")
        if self._waiting:
            connection.send(self._waiting.popleft())
        else:
            self._idle.append(connection)
        if len(self._seconds) + self._errors >= self._count:
            self._done.set()

    def lost(self) -> None:
        if not self._done.is_set():
            self._errors += 1


def main() -> None:
    url, rate, seconds, connections = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    print(json.dumps(uvloop.run(Client(url, rate, seconds).run(connections))))


if __name__ == "__main__":
    main()
