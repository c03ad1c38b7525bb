"""Row 13: events that one process delivers to one fast receiver, and what intake keeps while it does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from load import Run, Sample, ask, metered, rounds, until, wrk
from meter import Processes
from programs import HERE, Site

from serving import Serving

ORDERS, HOOKS = "/api/v1/orders", "/api/v1/webhooks"
#: Nothing is charged and nobody fulfils: the working process does nothing but deliver.
ONLY_TAKEN_IN = {"STAGES": "fulfilment", "FULFILMENT": "manual"}


@contextmanager
def receiver() -> Iterator[str]:
    """Run a receiver that answers at once; yield its address."""
    process = subprocess.Popen([sys.executable, str(HERE / "receiver.py")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/hooks"
    finally:
        process.terminate()
        process.wait()


def subscribe(service: Serving, url: str, begin: str) -> str:
    """Make an endpoint; return where it is shown."""
    made = ask(service.url + HOOKS, json.dumps({"url": url, "from": begin}).encode())
    return f"{service.url}{HOOKS}/{made['id']}"


def behind(endpoint: str) -> int:
    found: int = ask(endpoint)["behind"]
    return found


def deliveries(site: Site, orders: int, pairs: int) -> Sample:
    """Return the events that one process delivers in a second, on PostgreSQL, once for each pair."""
    database = site.postgresql()
    runs = []
    with (
        site.service("--no-workers", database=database) as service,
        receiver() as url,
        site.worker(DATABASE_URL=database),
    ):
        for start in range(0, orders, 10_000):
            body = {"total_entries": min(10_000, orders - start), "batch_id": f"b{start}"}
            ask(f"{service.url}/orders/populate", json.dumps(body).encode())
        until(lambda: ask(f"{service.url}/orders/status")["queue_length"] == 0)
        for _ in range(pairs):
            endpoint = subscribe(service, url, "beginning")
            events = behind(endpoint)
            until(lambda endpoint=endpoint, events=events: behind(endpoint) < events)  # type: ignore[misc]
            started, left = time.perf_counter(), behind(endpoint)
            until(lambda endpoint=endpoint: behind(endpoint) == 0)  # type: ignore[misc]
            runs.append(Run(left / (time.perf_counter() - started), left))
    return Sample(runs)


def intake_beside(site: Site, seconds: int, pairs: int) -> tuple[Sample, Sample]:
    """Return orders per second with an endpoint subscribed, and without one, on PostgreSQL in pairs."""
    addresses = {name: site.postgresql() for name in ("with", "without")}
    with (
        receiver() as url,
        site.service("--no-workers", database=addresses["with"], **ONLY_TAKEN_IN) as one,
        site.service("--no-workers", database=addresses["without"], **ONLY_TAKEN_IN) as other,
        site.worker(DATABASE_URL=addresses["with"], **ONLY_TAKEN_IN) as delivering,
        site.worker(DATABASE_URL=addresses["without"], **ONLY_TAKEN_IN) as idle,
    ):
        endpoint = subscribe(one, url, "now")

        def subscribed() -> Run:
            found = wrk(one.url + ORDERS, 64, seconds, "order.lua")
            until(lambda: behind(endpoint) == 0)  # the other side is to have the machine to itself
            return found

        def alone() -> Run:
            return wrk(other.url + ORDERS, 64, seconds, "order.lua")

        database = site.database_pid
        sides = {
            "with": metered(subscribed, Processes(one.process.pid, delivering.process.pid, database)),
            "without": metered(alone, Processes(other.process.pid, idle.process.pid, database)),
        }
        for side in sides.values():
            side()
        found = rounds(sides, pairs)
    return found["with"], found["without"]
