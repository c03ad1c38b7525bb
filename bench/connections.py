"""Ten thousand connections at once: each places an order, all stay open, and each places a second one.

    python bench/connections.py http://127.0.0.1:8000 [--connections 10000] [--pid PID]

Every connection is opened before the first order is placed, and none is closed before the second one is answered.
At most `IN_FLIGHT_MAX` of them are opening, or waiting for an answer, at a time. What went wrong is counted: a
connection that is refused, reset or closed, and every answer but 201 and 202. Then the service is asked how many
orders it has more than before, and some of those that it acknowledged are read back. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import uvloop

#: Connections that are being opened, or that wait for an answer, at a time.
IN_FLIGHT_MAX = 512
#: Acknowledged orders that are read back one by one.
SAMPLE = 100
#: Seconds that everything may take.
SECONDS_MAX = 300.0
#: Descriptors for everything but the connections.
DESCRIPTORS_RESERVED = 64


class Held(NamedTuple):
    """What came of it. `lost`: acknowledged orders that the service does not have."""

    connections: int
    open_at_once: int
    acknowledged: int
    errors: int
    lost: int
    seconds_to_open: float
    seconds: float
    peak_rss_mb: float | None
    faults: dict[str, int]


class Connection(asyncio.Protocol):
    """One keep-alive connection: places an order when asked to, and tells how it went."""

    __slots__ = ("_crowd", "_order_id", "_received", "_transport")

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._order_id = ""
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._crowd.opened(self)

    def place(self, order_id: str) -> None:
        """Place an order; without a connection that is an error at once."""
        if self._transport is None:
            self._crowd.answered(None, "closed before its order")
            return
        self._order_id = order_id
        self._transport.write(self._crowd.request(order_id))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if not lengths or len(body) < int(lengths[0]):
            return
        self._received = b""
        order_id, self._order_id = self._order_id, ""
        status = int(head.split(b" ", 2)[1])
        self._crowd.answered(order_id, "" if status in (201, 202) else f"status {status}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._crowd.ended()
        if self._order_id:
            self._order_id = ""
            self._crowd.answered(None, "closed before its answer" if exc is None else str(exc))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Crowd:
    """All connections, and what they have met."""

    def __init__(self, url: str, connections: int) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._count = connections
        self._run = uuid.uuid4().hex[:8]
        self._connections: list[Connection] = []
        self._open = 0
        self._free = asyncio.Semaphore(IN_FLIGHT_MAX)
        self.open_at_once = 0
        self.acknowledged: list[str] = []
        self.faults: Counter[str] = Counter()
        self.seconds_to_open = 0.0

    def request(self, order_id: str) -> bytes:
        """Return the bytes that place an order of two priced lines."""
        body = (
            f'{{"order_id":"{order_id}","customer_id":"customer_123","items":['
            '{"item_id":"item_001","item_name":"Burger","quantity":2,"price":12.99},'
            '{"item_id":"item_002","item_name":"Fries","quantity":1,"price":3.49}]}'
        ).encode()
        return (
            b"POST /orders HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    def opened(self, connection: Connection) -> None:
        self._connections.append(connection)
        self._open += 1
        self.open_at_once = max(self._open, self.open_at_once)

    def ended(self) -> None:
        self._open -= 1

    def answered(self, order_id: str | None, fault: str) -> None:
        self._free.release()
        if fault:
            self.faults[fault] += 1
        elif order_id is not None:
            self.acknowledged.append(order_id)

    async def gather(self) -> float:
        """Open all, let each place two orders, and return the seconds from the first to the last."""
        started = time.perf_counter()
        await self._in_flight([self._connect for _ in range(self._count)])
        self.seconds_to_open = time.perf_counter() - started
        for turn in range(2):
            await self._in_flight(
                [
                    lambda each=each, order_id=f"C-{self._run}-{turn}-{number}": each.place(order_id)
                    for number, each in enumerate(self._connections)
                ]
            )
        seconds = time.perf_counter() - started
        for connection in self._connections:
            connection.close()
        return seconds

    async def _in_flight(self, begin: list[Callable[[], object]]) -> None:
        """Begin all, so many at a time; each gives its place back when it has ended."""
        for each in begin:
            await self._free.acquire()
            each()
        for _ in range(IN_FLIGHT_MAX):
            await self._free.acquire()
        for _ in range(IN_FLIGHT_MAX):
            self._free.release()

    def _connect(self) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self._open_one())

    async def _open_one(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: Connection(self), self._host, self._port)
        except OSError as error:
            self.faults[f"not opened: {error.strerror}"] += 1
        finally:
            self._free.release()


def hold(url: str, connections: int, pid: int | None = None) -> Held:
    """Hold `connections` open to the service at `url` while each places two orders.

    `pid` is the service's process, for its peak memory. Raises SystemExit that says what to do if this process may
    not open so many files.
    """
    _raise_file_limit(connections)
    before = _orders(url)

    async def run() -> tuple[Crowd, float]:
        crowd = Crowd(url, connections)
        async with asyncio.timeout(SECONDS_MAX):
            return crowd, await crowd.gather()

    crowd, seconds = uvloop.run(run())
    kept = len(crowd.acknowledged)
    missing = max(0, kept - (_orders(url) - before))
    sample = crowd.acknowledged[:: max(1, kept // SAMPLE)]
    unread = sum(not _is_there(url, order_id) for order_id in sample)
    return Held(
        connections=connections,
        open_at_once=crowd.open_at_once,
        acknowledged=kept,
        errors=max(crowd.faults.total(), 2 * connections - kept),
        lost=max(missing, unread),
        seconds_to_open=round(crowd.seconds_to_open, 2),
        seconds=round(seconds, 2),
        peak_rss_mb=None if pid is None else _peak_rss_mb(pid),
        faults=dict(crowd.faults),
    )


def _raise_file_limit(connections: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = connections + DESCRIPTORS_RESERVED
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise SystemExit(
            f"{connections} connections need {needed} open files, and {soft} are allowed: "
            f"raise the hard limit (`ulimit -n {needed}` as root, or in /etc/security/limits.conf)"
        )


def _orders(url: str) -> int:
    """Return how many orders there are, in whatever state."""
    with urllib.request.urlopen(f"{url}/orders?limit=1", timeout=60) as answer:
        return int(json.load(answer)["total"])


def _is_there(url: str, order_id: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/orders/{order_id}", timeout=60) as answer:
            return bool(json.load(answer)["order_id"] == order_id)
    except urllib.error.HTTPError:
        return False


def _peak_rss_mb(pid: int) -> float:
    found = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return round(int(found[0].split()[1]) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--pid", type=int, help="the service's process: its peak memory is measured")
    options = parser.parse_args()
    print(json.dumps(hold(options.url, options.connections, options.pid)._asdict()))


if __name__ == "__main__":
    main()
