"""Load from outside: wrk for throughput, a client at a constant rate for latency, and the arithmetic of pairs."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from meter import Cpu, Processes

HERE = Path(__file__).parent


class Run(NamedTuple):
    """What one side did in one round: how many a second, how many, and the microseconds that one of them took."""

    rate: float
    count: int
    cpu: Cpu | None = None


class Sample(NamedTuple):
    """What one side did in each round."""

    runs: list[Run]

    @property
    def values(self) -> list[float]:
        return [run.rate for run in self.runs]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        return f"{min(self.values):,.0f} to {max(self.values):,.0f}"

    @property
    def cpu(self) -> Cpu | None:
        """Microseconds of processor time for each order: the median of the rounds, part by part."""
        found = [run.cpu for run in self.runs if run.cpu is not None]
        return Cpu(*map(statistics.median, zip(*found, strict=True))) if found else None


def metered(load: Callable[[], Run], processes: Processes) -> Callable[[], Run]:
    """Return the same load, which also tells what an order cost these processes."""

    def measured() -> Run:
        before = processes.used()
        run = load()
        return run._replace(cpu=processes.used().since(before).of_one(run.count))

    return measured


def rounds(sides: Mapping[str, Callable[[], Run]], count: int) -> dict[str, Sample]:
    """Measure every side in turn, `count` times: the machine's speed drifts, and all sides drift together."""
    found: dict[str, Sample] = {name: Sample([]) for name in sides}
    for number in range(count):
        # Every other round runs backwards, so that no side is always the one after the same other.
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            found[name].runs.append(sides[name]())
    return found


def ratio(one: Sample, other: Sample) -> float:
    """Return the median of the ratios, round by round."""
    return statistics.median(a / b for a, b in zip(one.values, other.values, strict=True))


def wrk(
    url: str, connections: int, seconds: int, script: str | None = None, *, tries: int = 3, **environment: str
) -> Run:
    """Return the answers over keep-alive connections; any answer but 2xx ends the run.

    A round in which nothing at all was answered is measured again, and that is said: the machine stood still.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-s", str(HERE / "wrk" / script)] if script else []
    run = subprocess.run(
        [*command, url], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    if "Non-2xx" in run.stdout or "Socket errors" in run.stdout:
        raise SystemExit(f"the load on {url} met errors:\n{run.stdout}")
    rate, count = (re.search(words, run.stdout) for words in (r"Requests/sec:\s+([\d.]+)", r"(\d+) requests in"))
    assert rate is not None and count is not None, run.stdout
    if not int(count[1]):
        if tries == 1:
            raise SystemExit(f"the load on {url} was not answered:\n{run.stdout}")
        print(f"nothing was answered within {seconds} s; once more: {url}", file=sys.stderr)
        return wrk(url, connections, seconds, script, tries=tries - 1, **environment)
    return Run(float(rate[1]), int(count[1]))


class Latency(NamedTuple):
    """Milliseconds from the moment at which a request was due, and how many were not answered 201 or 202."""

    p50: float
    p99: float
    p999: float
    worst: float
    sent: int
    errors: int


def constant_rate(url: str, rate: int, seconds: float, connections: int = 64) -> Latency:
    """Place `rate` orders a second, whatever the answers take, in a process of its own; see open_loop.py."""
    command = [sys.executable, str(HERE / "open_loop.py"), url, str(rate), str(seconds), str(connections)]
    return Latency(*json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def ask(url: str, body: bytes | None = None, media_type: str = "application/json") -> Any:
    """Return the JSON that one request brings."""
    request = urllib.request.Request(url, body, {"Content-Type": media_type} if body is not None else {})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def until(fact: Callable[[], bool], seconds: float = 300.0) -> None:
    """Return once `fact` holds; end the run if it does not come about."""
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            raise SystemExit(f"it did not come about within {seconds:g} s")
        time.sleep(0.02)
