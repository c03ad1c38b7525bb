"""The rows of the table: what is measured, against what, and what is to be reached."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import connections
import fill
from intake import ORDERS, intake_on_postgresql, intake_on_sqlite, posting, waiting_for_rows
from load import Run, ask, constant_rate, metered, ratio, rounds, until, wrk
from meter import Processes
from programs import BASELINE_BIN, HERE, Site, Web
from results import RATE, Plan, Result, at_least, at_most, told
from webhooks import deliveries, intake_beside

from servers import in_thread
from serving import Serving

ORDER = json.loads((HERE / "order.json").read_text())


def getting(url: str, plan: Plan, width: int = 64) -> Callable[[], Run]:
    return lambda: wrk(url, width, plan.seconds)


def cached_reads(site: Site, plan: Plan) -> list[Result]:
    with (
        site.service("--no-workers") as memory,
        site.service("--no-workers", REDIS_URL=site.cache()) as shared,
        site.echo() as echo,
    ):
        sides = {"echo": posting(f"{echo.url}/orders", plan)}
        for name, service in (("memory", memory), ("redis", shared)):
            placed = ask(service.url + ORDERS, json.dumps(ORDER).encode())
            sides[name] = getting(f"{service.url}{ORDERS}/{placed['order_id']}", plan)
        for side in sides.values():
            side()
        found = rounds(sides, plan.pairs)
    return [
        at_least("3", "GET one order, cache hit in memory", found["memory"], "echo", found["echo"], 2.5),
        at_least("3", "GET one order, cache hit in Redis", found["redis"], "echo", found["echo"], 1.6),
    ]


def seed(url: str, count: int, ids: Path) -> str:
    """Place orders of known ids and write these into a file; return its name for the scripts."""
    names = [f"SEED{number:05}" for number in range(count)]
    for name in names:
        ask(url, json.dumps({**ORDER, "order_id": name}).encode())
    ids.write_text("\n".join(names))
    return str(ids)


def mixed(site: Site, plan: Plan) -> list[Result]:
    database = site.postgresql()
    with (
        site.service("--no-workers", database=database, REDIS_URL=site.cache()) as service,
        site.usual() as usual,
    ):
        sides = {}
        running = {
            "expediter": Web(service.url + ORDERS, service.process.pid),
            "usual": Web(f"{usual.url}/orders", usual.pid),
        }
        for name, web in running.items():
            ids = seed(web.url, 1000, site.folder / f"{name}.ids")
            load = partial(wrk, web.url, 64, plan.seconds, "mix.lua", IDS=ids)
            sides[name] = metered(load, Processes(web.pid, database=site.database_pid))
            sides[name]()
        found = rounds(sides, plan.pairs)
    name = "90 % reads, 10 % writes on PostgreSQL and Redis"
    return [at_least("4", name, found["expediter"], "usual", found["usual"], 40)]


def at_rest(service: Serving, count: int) -> Run:
    """Place orders and wait until all of them are completed; placing is included."""
    before = ask(f"{service.url}/orders/metrics")["completed"]["count"]
    started = time.perf_counter()
    for start in range(0, count, 10_000):
        body = json.dumps({"total_entries": min(10_000, count - start)}).encode()
        ask(f"{service.url}/orders/populate", body)
    until(lambda: ask(f"{service.url}/orders/metrics")["completed"]["count"] >= before + count)
    return Run(count / (time.perf_counter() - started), count)


def celery_orders(environment: dict[str, str], count: int) -> Run:
    command = [str(BASELINE_BIN / "python"), "celery_app.py", str(count)]
    run = subprocess.run(
        command, env=environment, cwd=HERE / "baselines", capture_output=True, text=True, check=True
    )
    return Run(float(run.stdout), count)


def pipelines(site: Site, plan: Plan) -> list[Result]:
    settings = {"DATABASE_URL": site.postgresql(), "REDIS_URL": site.cache(), "BROKER_URL": site.queue()}
    with (
        site.service("--no-workers", database=settings["DATABASE_URL"], **settings) as served,
        site.worker(**settings) as worker,
        site.service() as alone,
        site.celery() as (celery, celery_pid),
    ):
        database = site.database_pid
        sides = {
            "servers": metered(
                lambda: at_rest(served, plan.orders),
                Processes(served.process.pid, worker.process.pid, database),
            ),
            "sqlite": metered(lambda: at_rest(alone, plan.orders), Processes(alone.process.pid)),
            "celery": metered(
                lambda: celery_orders(celery, plan.celery_orders), Processes(None, celery_pid, database)
            ),
        }
        for side in sides.values():
            side()
        found = rounds(sides, plan.pairs)
    server, one = "whole pipeline on PostgreSQL and Redis Streams", "whole pipeline on SQLite, one process"
    return [
        at_least("5", server, found["servers"], "celery", found["celery"], 16),
        at_least("6", one, found["sqlite"], "celery", found["celery"], 24),
    ]


def latency(site: Site, plan: Plan) -> list[Result]:
    results = []
    for name, database in (("SQLite", None), ("PostgreSQL", site.postgresql())):
        with site.service("--no-workers", database=database) as service:
            url = service.url + ORDERS
            constant_rate(url, 1000, 2)
            processes = Processes(service.process.pid, database=site.database_pid if database else None)
            before = processes.used()
            runs = [constant_rate(url, 1000, max(5, plan.seconds)) for _ in range(plan.pairs)]
            cpu = processes.used().since(before).of_one(sum(run.sent for run in runs))
        if errors := sum(run.errors for run in runs):
            raise SystemExit(f"{errors} orders were not accepted at 1,000 a second")
        for what, field, target in (("p50", "p50", 3.0), ("p99", "p99", 15.0), ("p99.9", "p999", 50.0)):
            values = [getattr(run, field) for run in runs]
            spread = f"{min(values):.1f} to {max(values):.1f}"
            title = f"latency at 1,000 orders/s on {name}, {what}"
            results.append(at_most("7", title, statistics.median(values), target, "ms", spread, cpu))
    return results


def many_connections(site: Site, plan: Plan) -> list[Result]:
    with site.service("--no-workers") as service:
        processes = Processes(service.process.pid)
        before = processes.used()
        held = connections.hold(service.url, 10_000, service.process.pid)
        cpu = processes.used().since(before).of_one(max(1, held.acknowledged))
    if held.faults:
        print(held.faults)
    seconds = f"{held.acknowledged:,} orders in {held.seconds:.1f} s"
    return [
        at_most("8", "10,000 connections: errors", held.errors, 1, "", seconds, cpu),
        at_most("8", "10,000 connections: orders lost", held.lost, 1, "", seconds),
        at_most("8", "10,000 connections: memory", held.peak_rss_mb or 0.0, 200, "MB", seconds),
    ]


def order_ids(address: str, ids: Path) -> str:
    """Write 5,000 ids by chance into a file, and return its name for the scripts."""
    ids.write_text("\n".join(fill.some_ids(address, 5000)))
    return str(ids)


def growth(site: Site, plan: Plan) -> list[Result]:
    results = []
    for name in ("SQLite", "PostgreSQL"):
        addresses = {}
        for count in (10_000, plan.grown):
            folder = site.new_folder()
            address = f"sqlite:///{folder}/orders.db" if name == "SQLite" else site.postgresql()
            fill.fill(address, count)
            addresses[count] = address
        results += grown(site, plan, name, addresses)
    return results


def grown(site: Site, plan: Plan, name: str, addresses: dict[int, str]) -> list[Result]:
    small, large = addresses
    with ExitStack() as stack:
        # Without the cache, which would answer for 10,000 orders and not for a million.
        running = {
            count: stack.enter_context(site.service("--no-workers", database=address, CACHE_DISABLED="true"))
            for count, address in addresses.items()
        }
        results = []
        loads: dict[str, Callable[[Serving, str], Run]] = {
            "intake": lambda service, ids: posting(service.url + ORDERS, plan)(),
            "detail": lambda service, ids: wrk(service.url + ORDERS, 64, plan.seconds, "detail.lua", IDS=ids),
            "page": lambda service, ids: getting(f"{service.url}{ORDERS}?limit=50", plan)(),
            "metrics": lambda service, ids: getting(f"{service.url}/orders/metrics", plan)(),
        }
        ids = {count: order_ids(address, site.folder / f"{count}.ids") for count, address in addresses.items()}
        for what, load in loads.items():
            sides: dict[str, Callable[[], Run]] = {}
            for count, service in running.items():
                side = partial(load, service, ids[count])
                database = site.database_pid if name == "PostgreSQL" else None
                processes = Processes(service.process.pid, database=database)
                sides[str(count)] = metered(side, processes) if what == "intake" else side
            for side in sides.values():
                side()
            found = rounds(sides, plan.pairs)
            title = f"{what} at {large:,} orders on {name}"
            one, other = found[str(large)], found[str(small)]
            results.append(at_least("9", title, one, f"at {small:,}", other, 0.90))
        results += at_depth(running[large], plan, name, large // 2)
    return results


def at_depth(service: Serving, plan: Plan, name: str, depth: int) -> list[Result]:
    url = service.url + ORDERS
    cursor = ask(f"{url}?limit=50&offset={depth - 50}")["next_cursor"]
    paths = {
        f"page of 50 at depth {depth:,}": f"{url}?limit=50&cursor={cursor}",
        "metrics": f"{service.url}/orders/metrics",
        "counts by status": f"{service.url}/orders/status",
    }
    first = f"{url}?limit=50"
    results = []
    for what, path in paths.items():
        found = rounds({"first": getting(first, plan, 8), "this": getting(path, plan, 8)}, plan.pairs)
        slower = ratio(found["first"], found["this"])
        title = f"{what} on {name}, time against the first page"
        line = at_most("10", title, slower, 1.2, "x", told(found["this"]))
        results.append(line._replace(baseline="first page", against=told(found["first"])))
    return results


def resident_mb(pid: int) -> float:
    """Return the memory of a process in MB."""
    found = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(found[0].split()[1]) / 1024


def start_and_memory(site: Site, plan: Plan) -> list[Result]:
    seconds, memory = [], []
    for number in range(plan.pairs + 1):
        started = time.perf_counter()
        with site.service("--no-workers") as service:
            ask(service.url + ORDERS, json.dumps(ORDER).encode())
            if number:  # the first one warms the disk
                seconds.append(time.perf_counter() - started)
                memory.append(resident_mb(service.process.pid))
    return [
        at_most("11", "memory of an idle API process", statistics.median(memory), 80, "MB"),
        at_most("11", "start to first stored order, new database", statistics.median(seconds), 0.8, "s"),
    ]


def bulk(site: Site, plan: Plan) -> list[Result]:
    results = []
    rows = (json.dumps(ORDER).encode() + b"\n") * plan.orders
    for name in ("SQLite", "PostgreSQL"):
        addresses = [
            f"sqlite:///{site.new_folder()}/orders.db" if name == "SQLite" else site.postgresql() for _ in range(2)
        ]
        with site.service("--no-workers", database=addresses[0]) as service:

            def batch(service: Serving = service) -> Run:
                started = time.perf_counter()
                verdicts = in_thread(lambda: _post_rows(service.url, rows))
                if verdicts != plan.orders:
                    raise SystemExit(f"only {verdicts} of {plan.orders} rows were accepted")
                return Run(plan.orders / (time.perf_counter() - started), plan.orders)

            def floor(address: str = addresses[1]) -> Run:
                command = [sys.executable, str(HERE / "baselines" / "floor.py"), address, str(plan.orders)]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                return Run(float(said), plan.orders)

            database = site.database_pid if name == "PostgreSQL" else None
            sides = {"batch": metered(batch, Processes(service.process.pid, database=database)), "floor": floor}
            for side in sides.values():
                side()
            found = rounds(sides, plan.pairs)
        title = f"bulk intake by NDJSON on {name}"
        results.append(at_least("12", title, found["batch"], "floor", found["floor"], 0.80))
    return results


def webhooks(site: Site, plan: Plan) -> list[Result]:
    sent = deliveries(site, plan.orders, plan.pairs)
    subscribed, alone = intake_beside(site, plan.seconds, plan.pairs)
    name = "events delivered to one fast receiver by one process"
    return [
        Result("13", name, None, sent.median, "≥", 1_500, RATE, told(sent)),
        at_least("13", "intake with a webhook subscribed", subscribed, "without", alone, 0.85),
    ]


async def _post_rows(url: str, rows: bytes) -> int:
    """Send rows as NDJSON and return how many were accepted."""
    import httpx2

    async with httpx2.AsyncClient(timeout=300) as client:
        answer = await client.post(
            f"{url}{ORDERS}/batch", content=rows, headers={"Content-Type": "application/x-ndjson"}
        )
    return answer.content.count(b'"status":202')


ROWS: dict[str, Callable[[Site, Plan], list[Result]]] = {
    "1": intake_on_postgresql,
    "2": intake_on_sqlite,
    "3": cached_reads,
    "4": mixed,
    "5": pipelines,
    "7": latency,
    "8": many_connections,
    "9": growth,
    "11": start_and_memory,
    "12": bulk,
    "13": webhooks,
    "14": waiting_for_rows,
}
#: Rows that are measured together with another.
WITH = {"1b": "1", "6": "5", "10": "9"}
