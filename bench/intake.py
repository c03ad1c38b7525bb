"""Rows 1, 1b, 2 and 14: orders stored before they are answered, against programs that do the same or nothing."""

from __future__ import annotations

import asyncio
import statistics
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager

import asyncpg
from load import Run, Sample, metered, ratio, rounds, wrk
from meter import Processes
from programs import Site, Web
from results import Missing, Plan, Result, at_least, at_most, not_measured, told

ORDERS = "/api/v1/orders"
#: Who takes orders, against whom, and the ratio to be reached; where there is none the figures are told.
AGAINST: tuple[tuple[str, str, float | None], ...] = (
    ("one process", "usual", 30),
    ("one process", "go", 1.0),
    ("one process", "fastify", 1.2),
    ("one process", "fastify, as usual", None),
    ("two processes", "usual", None),
    ("two processes", "go", 1.5),
    ("two processes", "fastify", None),
)
#: The processor time that an order may take in the serving process, in that of a request which stores nothing.
BARE_REQUESTS_MAX = 6.0
#: How many processes take orders on one database in row 14, and how often its sessions are looked at.
SERVING_TOGETHER = 4
LOOK_SECONDS = 0.02
#: Sessions at work, and those among them that wait until another one lets go of a row.
BUSY = """
    SELECT count(*), count(*) FILTER (WHERE wait_event_type = 'Lock' AND wait_event IN ('transactionid', 'tuple'))
    FROM pg_stat_activity
    WHERE datname = current_database() AND state = 'active' AND pid <> pg_backend_pid()
"""


def posting(url: str, plan: Plan, width: int = 64) -> Callable[[], Run]:
    return lambda: wrk(url, width, plan.seconds, "order.lua")


def opened(site: Site, stack: ExitStack) -> tuple[dict[str, Web], dict[str, str]]:
    """Run all that take orders in row 1; return them, and why those are missing that are."""
    running: dict[str, Web] = {}
    missing: dict[str, str] = {}
    for name, more in (("one process", ()), ("two processes", ("--processes", "2"))):
        service = stack.enter_context(site.service("--no-workers", *more, database=site.postgresql()))
        running[name] = Web(service.url + ORDERS, service.process.pid)
    programs: dict[str, Callable[[], AbstractContextManager[Web]]] = {
        "usual": site.usual,
        "go": site.go,
        "fastify": lambda: site.fastify("tuned"),
        "fastify, as usual": lambda: site.fastify("usual"),
        "bare": site.bare,
    }
    for name, program in programs.items():
        try:
            web = stack.enter_context(program())
        except Missing as error:
            missing[name] = str(error)
        else:
            running[name] = Web(f"{web.url}/orders", web.pid)
    return running, missing


def intake_on_postgresql(site: Site, plan: Plan) -> list[Result]:
    results = []
    with ExitStack() as stack:
        running, missing = opened(site, stack)
        for web in running.values():
            wrk(web.url, 64, max(2, plan.seconds), "order.lua")  # Node compiles what it has seen often
        for width in (64, 256):
            sides = {
                name: metered(posting(web.url, plan, width), Processes(web.pid, database=site.database_pid))
                for name, web in running.items()
                if name != "bare" or width == 64
            }
            found = rounds(sides, plan.pairs)
            results += compared(found, missing, f"intake on PostgreSQL, {width} connections")
            if width == 64:
                cost = cost_of_an_order(found["one process"], found["bare"])
    return [*results, cost]


def compared(found: dict[str, Sample], missing: dict[str, str], name: str) -> list[Result]:
    return [
        at_least("1", f"{name}, {who}", found[who], whom, found[whom], target)
        if whom in found
        else not_measured("1", f"{name}, {who}", missing[whom], whom)
        for who, whom, target in AGAINST
    ]


def cost_of_an_order(service: Sample, bare: Sample) -> Result:
    """Return what an order costs the serving process, in requests to `bare`."""
    spent = [
        Sample([Run(run.cpu.serving, run.count) for run in sample.runs if run.cpu is not None])
        for sample in (service, bare)
    ]
    name = "µs of CPU in the serving process for an order"
    measured, against = (f"{each.median:.1f} ({min(each.values):.1f} to {max(each.values):.1f})" for each in spent)
    return Result("1b", name, "bare", ratio(*spent), "≤", BARE_REQUESTS_MAX, "x", measured, against)


def intake_on_sqlite(site: Site, plan: Plan) -> list[Result]:
    with site.service("--no-workers") as service, site.echo() as echo:
        sides = {
            "expediter": metered(posting(service.url + ORDERS, plan), Processes(service.process.pid)),
            "echo": metered(posting(f"{echo.url}/orders", plan), Processes(echo.pid)),
        }
        for side in sides.values():
            side()
        found = rounds(sides, plan.pairs)
    name = "intake on SQLite, 64 connections, one process"
    return [at_least("2", name, found["expediter"], "echo", found["echo"], 0.80)]


def waiting_for_rows(site: Site, plan: Plan) -> list[Result]:
    """Return how much of their working time the sessions of four serving processes wait for each other's rows."""
    database = site.postgresql()
    with site.service("--no-workers", "--processes", str(SERVING_TOGETHER), database=database) as service:
        take = metered(
            posting(service.url + ORDERS, plan), Processes(service.process.pid, database=site.database_pid)
        )
        take()
        runs, shares = [], []
        for _ in range(plan.pairs):
            with looking(database) as seen:
                runs.append(take())
            busy, waiting = (sum(counts) for counts in zip(*seen, strict=True))
            shares.append(waiting / busy)
    sample = Sample(runs)
    name = f"{SERVING_TOGETHER} serving processes, PostgreSQL: busy samples that wait for a row lock"
    spread = f"{min(shares):.1%} to {max(shares):.1%}, at {told(sample)} orders/s"
    return [at_most("14", name, statistics.median(shares), 0.05, "x", spread, sample.cpu)]


@contextmanager
def looking(database: str) -> Iterator[list[tuple[int, int]]]:
    """Look at the sessions of a database, again and again; yield how many were at work, and how many waited."""
    seen: list[tuple[int, int]] = []
    over = threading.Event()

    async def look() -> None:
        raw = await asyncpg.connect(database)
        try:
            while not over.wait(LOOK_SECONDS):
                seen.append(tuple(await raw.fetchrow(BUSY)))
        finally:
            await raw.close()

    with ThreadPoolExecutor(1) as thread:
        looked = thread.submit(lambda: asyncio.run(look()))
        try:
            yield seen
        finally:
            over.set()
        looked.result()
