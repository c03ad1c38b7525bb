"""Twice as many orders as can be stored, for a while: who is accepted, who is refused, and how it ends.

    python bench/overload.py [--seconds 60] [--times 2.0] [--after-seconds 8] [--database URL]

Starts a service of its own. Measures how many orders a second it stores with 64 busy clients, then sends `--times`
as many at a constant rate, each at its own moment: an open loop, nobody waits for an answer to send the next. Then
come half as many as it stores. Latency counts from when a request was due; on a machine that others use, too, also
since it was sent, and how many cores the service got. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import sys
import time
import urllib.request
from collections import Counter, deque
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import uvloop
from alone import service

#: Connections: as many as there may be requests under way.
CONNECTIONS = 2048
#: Clients that measure what can be stored.
BUSY = 64
#: An answer that takes longer is not normal.
NORMAL_SECONDS = 0.25

BODY = (
    b'{"customer_id":"customer_123","items":['
    b'{"item_id":"item_001","item_name":"Burger","quantity":2,"price":12.99},'
    b'{"item_id":"item_002","item_name":"Fries","quantity":1,"price":3.49}]}'
)
HEAD = b"POST /orders HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
REQUEST = HEAD % len(BODY) + BODY


class Answered(NamedTuple):
    """One answer: when its request was due, the seconds from then and since it was sent, and what it says."""

    due: float
    seconds: float
    since_sent: float
    status: int
    says_when: bool


class Connection(asyncio.Protocol):
    """One keep-alive connection; it has one request under way at most."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._due = self._sent = 0.0
        self._bytes = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, due: float) -> None:
        self._due, self._sent = due, time.perf_counter()
        self._transport.write(REQUEST)

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        head, found, body = self._bytes.partition(b"\r\n\r\n")
        if not found:
            return
        low = head.lower()
        if len(body) >= int(low.partition(b"content-length:")[2].split(b"\r\n", 1)[0]):
            self._bytes = b""
            now = time.perf_counter()
            status, says_when = int(head[9:12]), b"\r\nretry-after:" in low
            answer = Answered(self._due, now - self._due, now - self._sent, status, says_when)
            self._crowd.answered(self, answer)

    def connection_lost(self, error: Exception | None) -> None:
        self._crowd.lost += 1


class Crowd:
    """All connections, and what they were answered."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port or 80
        self._idle: deque[Connection] = deque()
        self._waiting: deque[float] = deque()
        self._expected = 0
        self._at_once_again = False
        self._done = asyncio.Event()
        self.answers: list[Answered] = []
        self.lost = 0

    async def connect(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(count - len(self._idle)):
            _, connection = await loop.create_connection(lambda: Connection(self), *self._address)
            self._idle.append(connection)

    async def stored_per_second(self, seconds: float) -> float:
        """Return how many orders are stored a second when each client sends the next after the last answer."""
        self.answers, self._at_once_again, begin = [], True, time.perf_counter()
        self._expected = sys.maxsize
        for _ in range(len(self._idle)):
            self._idle.popleft().send(time.perf_counter())
        await asyncio.sleep(seconds)
        self._at_once_again, stored, passed = False, len(self.answers), time.perf_counter() - begin
        self._done.clear()
        self._expected = stored + BUSY
        async with asyncio.timeout(60):
            await self._done.wait()
        return stored / passed

    async def at_a_rate(self, rate: float, seconds: float) -> list[Answered]:
        """Send so many a second, each when it is due, and return all answers."""
        self.answers, self._expected = [], int(rate * seconds)
        self._done.clear()
        begin = time.perf_counter()
        for number in range(self._expected):
            due = begin + number / rate
            if (pause := due - time.perf_counter()) > 0.001:
                await asyncio.sleep(pause)
            if self._idle:
                self._idle.popleft().send(due)
            else:
                self._waiting.append(due)
            if number % 16 == 0:
                await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await self._done.wait()
        return self.answers

    def answered(self, connection: Connection, answer: Answered) -> None:
        self.answers.append(answer)
        if self._at_once_again:
            connection.send(time.perf_counter())
        elif self._waiting:
            connection.send(self._waiting.popleft())
        else:
            self._idle.append(connection)
        if len(self.answers) >= self._expected:
            self._done.set()


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return the middle, the 99th percentile and the worst in milliseconds; nothing of nothing."""
    ordered = sorted(seconds)
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    return {
        name: round(ordered[min(last, int(len(ordered) * share))] * 1000, 1)
        for name, share in shares.items()
        if ordered
    }


async def measure(
    url: str, pid: int, *, measure_seconds: float, times: float, seconds: float, after_seconds: float
) -> dict[str, Any]:
    """Return what came of it."""
    crowd = Crowd(url)
    await crowd.connect(BUSY)
    capacity = await crowd.stored_per_second(measure_seconds)
    placed = sum(answer.status == 201 for answer in crowd.answers)
    await crowd.connect(CONNECTIONS)
    began, cpu = time.perf_counter(), _cpu_seconds(pid)
    answers = await crowd.at_a_rate(capacity * times, seconds)
    ended = time.perf_counter()
    cores = (_cpu_seconds(pid) - cpu) / (ended - began)
    accepted = [answer.seconds for answer in answers if answer.status == 201]
    since_sent = [answer.since_sent for answer in answers if answer.status == 201]
    refused = [answer for answer in answers if answer.status != 201]
    after = await crowd.at_a_rate(capacity / 2, after_seconds)
    late = [each.due - ended for each in after if each.status != 201 or each.seconds > NORMAL_SECONDS]
    placed += len(accepted) + sum(answer.status == 201 for answer in after)
    stored = _orders(url)
    return {
        "stored_per_second": round(capacity),
        "sent_per_second": round(capacity * times),
        "seconds": seconds,
        "accepted": len(accepted),
        "accepted_ms": quantiles(accepted),
        "accepted_since_sent_ms": quantiles(since_sent),
        "refused": dict(Counter(answer.status for answer in refused)),
        "refused_ms": quantiles([each.seconds for each in refused]),
        "refused_without_retry_after": sum(not answer.says_when for answer in refused),
        "cores_of_the_service": round(cores, 2),
        "connections_lost": crowd.lost,
        "acknowledged_and_lost": max(0, placed - stored),
        "normal_after_seconds": round(max(late, default=0.0), 2),
        "peak_rss_mb": _peak_rss_mb(pid),
    }


def _orders(url: str) -> int:
    with urllib.request.urlopen(f"{url}/orders?limit=1", timeout=60) as answer:
        return int(json.load(answer)["total"])


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_rss_mb(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return round(int(found[1]) / 1024, 1) if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--measure-seconds", type=float, default=3.0, help="how long what can be stored is measured"
    )
    parser.add_argument("--after-seconds", type=float, default=8.0, help="how long it is looked at afterwards")
    parser.add_argument("--times", type=float, default=2.0)
    parser.add_argument("--database", default="")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with service(**({"DATABASE_URL": options.database} if options.database else {})) as (url, process):
        measured = measure(
            url,
            process.pid,
            measure_seconds=options.measure_seconds,
            times=options.times,
            seconds=options.seconds,
            after_seconds=options.after_seconds,
        )
        print(json.dumps(uvloop.run(measured)))


if __name__ == "__main__":
    main()
