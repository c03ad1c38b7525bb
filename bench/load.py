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

HERE = Path(__file__).parent


class Sample(NamedTuple):
    """What one side did in each round, in its own unit (mostly requests per second)."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        return f"{min(self.values):,.0f} to {max(self.values):,.0f}"


def rounds(sides: Mapping[str, Callable[[], float]], count: int) -> dict[str, Sample]:
    """Measure every side in turn, `count` times: the machine's speed drifts, and all sides drift together."""
    found: dict[str, Sample] = {name: Sample([]) for name in sides}
    for number in range(count):
        # Every other round runs backwards, so that no side is always the one after the same other.
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            found[name].values.append(sides[name]())
    return found


def ratio(one: Sample, other: Sample) -> float:
    """Return the median of the ratios, round by round."""
    return statistics.median(a / b for a, b in zip(one.values, other.values, strict=True))


def wrk(url: str, connections: int, seconds: int, script: str | None = None, **environment: str) -> float:
    """Return answers per second over keep-alive connections; any answer but 2xx ends the run."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-s", str(HERE / "wrk" / script)] if script else []
    run = subprocess.run(
        [*command, url], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    if "Non-2xx" in run.stdout or "Socket errors" in run.stdout:
        raise SystemExit(f"the load on {url} met errors:\n{run.stdout}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", run.stdout)
    assert found is not None, run.stdout
    return float(found[1])


class Latency(NamedTuple):
    """Milliseconds from the moment at which a request was due, and how many were not answered 201 or 202."""

    p50: float
    p99: float
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
