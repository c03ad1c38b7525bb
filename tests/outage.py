"""Draw the picture of docs/monitoring.md: a gateway that is away for a minute, in Prometheus' own graph.

`make outage` runs it. It needs prometheus and chromium, and takes three and a half minutes.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlencode

import httpx2

from monitoring import ROOT, faster, prometheus
from proxying import program, running
from servers import free_port
from serving import PATIENCE_SECONDS, Program, environment

PICTURE = ROOT / "docs" / "pictures" / "outage.png"
ORDER = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 2, "price": "1.20"}]}
#: Seconds before, without and after the gateway.
BEFORE, AWAY, AFTER = 60, 60, 75
ORDERS_PER_SECOND = 20
#: What is drawn, one below the other.
GRAPHS = (
    "expediter:orders_accepted:rate1m",
    "sum by (outcome) (rate(expediter_gateway_call_duration_seconds_count[10s]))",
    'expediter_gateway_breaker_state{state="open"}',
    'expediter:jobs:max{state="ready"}',
)


@contextmanager
def gateway(folder: Path, port: int) -> Iterator[None]:
    """The gateway to try things on, for as long as this lasts."""
    command = [sys.executable, "-m", "expediter", "gateway", "--port", str(port)]
    command += ["--ledger", str(folder / "payments.jsonl"), "--latency-ms", "20"]
    with running(command, folder, port):
        yield


@contextmanager
def customers(client: httpx2.Client) -> Iterator[Callable[[], int]]:
    """Place ORDERS_PER_SECOND orders; what is yielded says how many there are."""
    over, placed = threading.Event(), [0]

    def place() -> None:
        while not over.wait(1 / ORDERS_PER_SECOND):
            placed[0] += client.post("/orders", json=ORDER).status_code == 201

    thread = threading.Thread(target=place)
    thread.start()
    try:
        yield lambda: placed[0]
    finally:
        over.set()
        thread.join()


def draw(folder: Path, url: str, until: float) -> None:
    """Let Chromium open the graphs in Prometheus' own page, and keep what it shows."""
    asked: dict[str, str] = {}
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(until))
    for number, query in enumerate(GRAPHS):
        asked |= {
            f"g{number}.expr": query,
            f"g{number}.tab": "0",
            f"g{number}.range_input": f"{BEFORE + AWAY + AFTER - 15}s",
            f"g{number}.end_input": moment,
            f"g{number}.step_input": "1",
        }
    PICTURE.parent.mkdir(exist_ok=True)
    command = [program("chromium", "chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--window-size=900,3060", "--virtual-time-budget=30000", f"--user-data-dir={folder}/profile"]
    command += [f"--screenshot={PICTURE}", f"{url}/graph?{urlencode(asked)}"]
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS, capture_output=True)


def main() -> None:
    with TemporaryDirectory(prefix="outage-") as name, ExitStack() as stack:
        folder, port = Path(name), free_port()
        settings = {
            "API_WORKERS": "2",
            "WORKER_COUNT": "1",
            "PAYMENT_GATEWAY": f"http://127.0.0.1:{port}",
            "CIRCUIT_BREAKER_RECOVERY_SECONDS": "5",
            "PAYMENT_RETRY_ATTEMPTS": "100",
        }
        service = Program(folder, "up", "--foreground", **environment(folder, **settings))
        stack.callback(service.stop)
        url = service.wait_for(r"listens on (http://[^\s]+)")[1]
        client = stack.enter_context(httpx2.Client(base_url=url, timeout=PATIENCE_SECONDS))
        configuration = faster(folder, url.removeprefix("http://"), alerts=False)
        found = stack.enter_context(prometheus(folder, configuration, free_port()))
        with customers(client) as placed:
            with gateway(folder, port):
                time.sleep(BEFORE)
            print(f"{placed()} orders; the gateway is away")
            time.sleep(AWAY)
            with gateway(folder, port):
                print(f"{placed()} orders; it is back. Firing: {sorted(found.firing())}")
                time.sleep(AFTER)
                counts = client.get("/orders/metrics").json()["order_status_counts"]
                print(f"{placed()} orders; {counts}")
                seconds = ("expediter_overview_seconds", "scrape_duration_seconds")
                print({name: found.value(f"max(max_over_time({name}[3m]))") for name in seconds})
                draw(folder, found.url, time.time())
    print(f"drawn: {PICTURE.relative_to(ROOT)}, {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
