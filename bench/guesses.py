"""Ten thousand wrong admin passwords from one address: whether the others are answered as fast as before.

    python bench/guesses.py [--guesses 10000]

Starts a service of its own. A reader at 127.0.0.3 asks for one order again and again: alone, while eight clients
at 127.0.0.2 guess as fast as they can, and while they read that order instead. The three follow each other in
turns: on a machine that others use only the ratio of neighbours counts. Prints one line of JSON: milliseconds of
the reader's answers, and the service's processor time for each request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import uvloop
from alone import service

GUESSER, READER = "127.0.0.2", "127.0.0.3"
GUESSERS = 8
TURNS = 5


async def ask(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> int:
    """Send a request on a connection that stays open; return the status of its answer."""
    reader, writer = streams
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    if length is not None:
        await reader.readexactly(int(length[1]))
    return int(head[9:12])


def read(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()


def guess(number: int) -> bytes:
    return f"POST /admin/verify HTTP/1.1\r\nHost: a\r\nX-Admin-Password: guess-{number}\r\n\r\n".encode()


def place(order_id: str) -> bytes:
    body = json.dumps({"order_id": order_id, "user_id": 1, "item_ids": [1]}).encode()
    head = b"POST /orders HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


class Bench:
    """A service, and who asks it from where."""

    def __init__(self, url: str, pid: int) -> None:
        parts = urlsplit(url)
        self._place = parts.hostname, parts.port
        self._pid = pid
        self.statuses: Counter[int] = Counter()

    async def connect(self, source: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self._place, local_addr=(source, 0))

    def cpu_seconds(self) -> float:
        with open(f"/proc/{self._pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def turn(self, others: int, request: Any) -> tuple[list[float], float]:
        """Let the reader read while `others` ask; return its seconds, and processor time for each request."""
        reader = await self.connect(READER)
        streams = [await self.connect(GUESSER) for _ in range(GUESSERS)]
        left = iter(range(others))
        seconds: list[float] = []
        going = asyncio.Event()

        async def disturb(stream: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
            for number in left:
                self.statuses[await ask(stream, request(number))] += 1

        async def look() -> None:
            while not going.is_set():
                began = time.perf_counter()
                await ask(reader, read("/orders/seen"))
                seconds.append(time.perf_counter() - began)
                await asyncio.sleep(0.002)

        before = self.cpu_seconds()
        looking = asyncio.create_task(look())
        if others:
            await asyncio.gather(*(disturb(stream) for stream in streams))
        else:
            await asyncio.sleep(1.0)
        going.set()
        await looking
        used = self.cpu_seconds() - before
        for _, writer in [reader, *streams]:
            writer.close()
        return seconds, used / (len(seconds) + others)


async def measure(url: str, pid: int, guesses: int) -> dict[str, Any]:
    """Return what came of it, over turns of each kind that follow each other."""
    bench = Bench(url, pid)
    assert await ask(await bench.connect(READER), place("seen")) == 201
    kinds: dict[str, tuple[int, Any]] = {
        "alone": (0, None),
        "beside_reads": (guesses // TURNS, lambda number: read("/orders/seen")),
        "beside_guesses": (guesses // TURNS, guess),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
    guessed: Counter[int] = Counter()
    for _ in range(TURNS):
        for kind, (others, request) in kinds.items():
            bench.statuses.clear()
            took, each = await bench.turn(others, request)
            seconds[kind] += took
            cpu[kind].append(each)
            guessed += bench.statuses if kind == "beside_guesses" else Counter()
    return {
        "guesses": {str(status): count for status, count in sorted(guessed.items())},
        "reader_ms": {
            kind: {
                "p50": round(statistics.median(took) * 1000, 2),
                "p99": round(sorted(took)[len(took) * 99 // 100] * 1000, 2),
            }
            for kind, took in seconds.items()
        },
        "cpu_us_per_request": {kind: round(statistics.median(each) * 1e6) for kind, each in cpu.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guesses", type=int, default=10_000)
    options = parser.parse_args()
    with service(ADMIN_PASSWORD="open sesame") as (url, process):
        print(json.dumps(uvloop.run(measure(url, process.pid, options.guesses))))


if __name__ == "__main__":
    main()
