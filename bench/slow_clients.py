"""200 slow clients beside 64 busy ones: what the busy ones keep, and that a stop ends in time all the same.

    python bench/slow_clients.py [--slow 200] [--seconds 3]

Starts a service of its own. 64 clients read one order as fast as they are answered, alone and beside the slow
ones (in a process of their own), in turns that follow each other. A third of the slow ones sends headers a byte
at a time, a third a body, a third takes long answers a byte at a time. At the end SIGTERM comes while all are
there. Prints one line of JSON: requests a second and the service's processor time for each, the share that the
busy ones keep, and the seconds of the stop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import uvloop
from alone import END_SECONDS_MAX, service

BUSY = 64
TURNS = 5
DRAIN_SECONDS = 10.0
#: Seconds between two bytes of a slow client: none of them is late for its limit by that alone.
SLOW_SECONDS = 0.25

READ = b"GET /orders/seen HTTP/1.1\r\nHost: a\r\n\r\n"
LONG = b"GET /docs HTTP/1.1\r\nHost: a\r\nAccept-Encoding: identity\r\n\r\n"
HEADERS = b"GET /orders HTTP/1.1\r\nHost: a\r\nX-Slow: "
BODY = b"POST /orders HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"


class Busy(asyncio.Protocol):
    """Reads one order again and again."""

    def __init__(self) -> None:
        self.answers = 0
        self.going = True
        self._bytes = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(READ)

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        head, found, body = self._bytes.partition(b"\r\n\r\n")
        if found and len(body) >= int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]):
            self._bytes = b""
            self.answers += 1
            if self.going:
                self._transport.write(READ)

    def close(self) -> None:
        self.going = False
        self._transport.close()


class Bench:
    """A service, and its clients."""

    def __init__(self, url: str, pid: int, slow: int) -> None:
        self._url = url
        parts = urlsplit(url)
        self._place = parts.hostname or "", parts.port or 80
        self._pid = pid
        self._slow = slow

    def cpu_seconds(self) -> float:
        with open(f"/proc/{self._pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def busy(self, seconds: float) -> tuple[float, float]:
        """Return the requests a second of the busy clients, and the service's processor time for each."""
        loop = asyncio.get_running_loop()
        clients = [(await loop.create_connection(Busy, *self._place))[1] for _ in range(BUSY)]
        answers, cpu, began = sum(client.answers for client in clients), self.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(seconds)
        answers = sum(client.answers for client in clients) - answers
        passed, cpu = time.perf_counter() - began, self.cpu_seconds() - cpu
        for client in clients:
            client.close()
        return answers / passed, cpu / max(1, answers)

    async def measure(self, seconds: float) -> dict[str, Any]:
        """Return what the busy clients keep, over turns that follow each other; the slow ones stay at the end."""
        rates: dict[str, list[float]] = {"alone": [], "beside": []}
        cpu: dict[str, list[float]] = {"alone": [], "beside": []}
        for turn in range(TURNS):
            slow = None
            for kind in rates:
                if kind == "beside":
                    command = [sys.executable, __file__, "--be-slow", self._url, "--slow", str(self._slow)]
                    slow = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
                    assert slow.stdout is not None
                    await slow.stdout.readline()
                rate, each = await self.busy(seconds)
                rates[kind].append(rate)
                cpu[kind].append(each)
            if turn == TURNS - 1:
                os.kill(self._pid, signal.SIGTERM)
                stopped = await self._until_gone()
            assert slow is not None
            slow.kill()
            await slow.wait()
        pairs = zip(rates["beside"], rates["alone"], strict=True)
        return {
            "requests_per_second": {kind: round(statistics.median(found)) for kind, found in rates.items()},
            "kept": round(statistics.median([beside / alone for beside, alone in pairs]), 2),
            "cpu_us_per_request": {kind: round(statistics.median(found) * 1e6) for kind, found in cpu.items()},
            "stop_seconds": round(stopped, 2),
            "drain_seconds": DRAIN_SECONDS,
        }

    async def _until_gone(self) -> float:
        began = time.perf_counter()
        while _state(self._pid) not in ("Z", ""):  # noqa: ASYNC110 (no event tells of another process)
            await asyncio.sleep(0.02)
        return time.perf_counter() - began


def _state(pid: int) -> str:
    with suppress(FileNotFoundError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]
    return ""


async def be_slow(url: str, count: int) -> None:
    """Be so many slow clients for a minute."""
    parts = urlsplit(url)
    there: set[int] = set()
    clients = [_be_slow((parts.hostname or "", parts.port or 80), number, there, count) for number in range(count)]
    with suppress(TimeoutError):
        async with asyncio.timeout(60):
            await asyncio.gather(*clients)


async def _be_slow(place: tuple[str, int], number: int, there: set[int], count: int) -> None:
    """Be one for ever, and come again whenever the service has had enough."""
    loop = asyncio.get_running_loop()
    while True:
        with suppress(OSError), socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(client, place)
            await loop.sock_sendall(client, (HEADERS, BODY, LONG)[number % 3])
            there.add(number)
            if len(there) == count:
                print("all are there", flush=True)
                there.clear()
            while True:
                await asyncio.sleep(SLOW_SECONDS)
                if number % 3 < 2:
                    await loop.sock_sendall(client, b"x")
                elif not await loop.sock_recv(client, 1):
                    break
        await asyncio.sleep(SLOW_SECONDS)


async def place(url: str) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = b'{"order_id": "seen", "user_id": 1, "item_ids": [1]}'
    writer.write(BODY.replace(b"1000", b"%d" % len(body)) + body)
    assert b" 201 " in await reader.readline()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--be-slow", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_slow:
        asyncio.run(be_slow(options.be_slow, options.slow))
        return
    with service(DRAIN_SECONDS=f"{DRAIN_SECONDS:g}") as (url, process):

        async def run() -> dict[str, Any]:
            await place(url)
            return await Bench(url, process.pid, options.slow).measure(options.seconds)

        measured = uvloop.run(run())
        print(json.dumps({**measured, "exit_status": process.wait(END_SECONDS_MAX)}))


if __name__ == "__main__":
    main()
