"""First figures: durable intake over HTTP, and orders brought to rest, on SQLite in one process.

    make bench-intake

Intake (64 keep-alive connections, two priced lines, synchronous=FULL) is measured in turn with `/echo`, a route in
the same process that decodes the same body and stores nothing: the figure is the median of the ratios, pair by
pair. Rest counts the orders that go from placed to completed in a second, with a gateway and a fulfiller that take
no time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
CONNECTIONS = 64
TARGET = 0.30


def settings(folder: Path) -> dict[str, str]:
    zero = {f"{part}_MOCK_LATENCY_{end}": "0" for part in ("PAYMENT", "FULFILMENT") for end in ("MIN", "MAX")}
    return {
        **os.environ,
        "DATABASE_URL": f"sqlite:///{folder}/orders.db",
        "PORT": "0",
        "PAYMENT_MOCK_SUCCESS_RATE": "1",
        **zero,
    }


class Served:
    """The measured process, on a fresh database."""

    def __init__(self, *arguments: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="expediter-bench-")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "served.py"), *arguments],
            env=settings(Path(self.folder.name)),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.folder.cleanup()

    def metrics(self) -> dict[str, dict[str, int]]:
        with urllib.request.urlopen(f"{self.url}/orders/metrics", timeout=30) as answer:
            found: dict[str, dict[str, int]] = json.load(answer)
        return found

    def post(self, path: str, body: object) -> None:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=120).read()


def load(url: str, seconds: float) -> float:
    """Return requests per second; any answer but 2xx ends the run."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "-s", str(HERE / "order.lua"), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(f"the load met errors:\n{text}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert found is not None, text
    return float(found[1])


def intake(pairs: int, seconds: float) -> None:
    served = Served()
    try:
        load(f"{served.url}/echo", 1)
        load(f"{served.url}/api/v1/orders", 1)
        stored, echoed = [], []
        for _ in range(pairs):
            stored.append(load(f"{served.url}/api/v1/orders", seconds))
            echoed.append(load(f"{served.url}/echo", seconds))
    finally:
        served.close()
    # Pair by pair: the machine's speed drifts, and the two sides of a pair drift together.
    ratio = statistics.median(one / other for one, other in zip(stored, echoed, strict=True))
    print(f"intake   {statistics.median(stored):8,.0f} orders/s  ({min(stored):,.0f} to {max(stored):,.0f})")
    print(f"echo     {statistics.median(echoed):8,.0f} requests/s  ({min(echoed):,.0f} to {max(echoed):,.0f})")
    print(f"ratio    {ratio:8.1%}  target {TARGET:.0%}: {'reached' if ratio >= TARGET else 'missed'}")


def rest(rounds: int, orders: int) -> None:
    speeds = []
    for _ in range(rounds):
        served = Served("--workers")
        try:
            started = time.perf_counter()
            for _ in range(orders // 10_000):
                served.post("/orders/populate", {"total_entries": 10_000})
            while served.metrics()["completed"]["count"] < orders:
                time.sleep(0.05)
            speeds.append(orders / (time.perf_counter() - started))
        finally:
            served.close()
    print(f"at rest  {statistics.median(speeds):8,.0f} orders/s  ({min(speeds):,.0f} to {max(speeds):,.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--orders", type=int, default=20_000)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("This needs wrk: apt-get install wrk")
    intake(options.pairs, options.seconds)
    rest(options.pairs, options.orders)


main()
