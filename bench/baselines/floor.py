"""Floor: the rows of an order, written in transactions of 100 orders by the fastest plain way, without HTTP.

    python floor.py DATABASE_URL COUNT       prints the orders per second

sqlite3's executemany, or asyncpg's COPY, into the service's own tables with their indexes and triggers. The rows
are made before the clock starts: what is measured is the database.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import asyncpg
import msgspec

from expediter.orders.commands import PlaceOrder
from expediter.orders.decisions import decide
from expediter.orders.order import Line, Stages, Status
from expediter.store.migrations import upgrade
from expediter.store.rows import JOBS, STATUS_COUNTERS, job_row, line_row, order_row

BATCH_ORDERS = 100
LINES = (Line(1, "item_001", "Burger", 2, 1299), Line(2, "item_002", "Fries", 1, 349))
#: What each order adds one to, and the slot of a process that adds.
COUNTERS = ((STATUS_COUNTERS[Status.PENDING], 63), (JOBS, 63))
_to_json = msgspec.json.Encoder().encode
Rows = dict[str, list[tuple[Any, ...]]]


def rows_of(numbers: Sequence[int], now: int) -> Rows:
    """Return the rows of new orders of two lines by table: what the core decides, as the service writes it."""
    made: Rows = {"order_lines": [], "orders": [], "jobs": [], "events": []}
    for number in numbers:
        order_id = f"FLOOR-{now}-{number:08}"
        place = PlaceOrder(
            order_id=order_id,
            fresh=True,
            customer_id="customer_123",
            customer_name=None,
            currency="USD",
            total_minor=2947,
            priced=True,
            lines=LINES,
            metadata="{}",
            payment_token=None,
            stages=Stages.PAYMENT_FULFILMENT,
        )
        decision = decide(None, None, place, now)
        assert decision.order is not None and decision.job is not None
        made["order_lines"] += [line_row(order_id, line) for line in LINES]
        made["orders"].append(order_row(decision.order))
        made["jobs"].append(job_row(order_id, decision.job))
        (event,) = decision.events
        data = _to_json(event.data).decode()
        made["events"].append((number, order_id, event.number, event.at, event.type, data))
    return made


def batches(count: int, first: int) -> list[Rows]:
    numbers = iter(range(first, first + count))
    now = time.time_ns() // 1000
    made = []
    while part := list(islice(numbers, BATCH_ORDERS)):
        made.append(rows_of(part, now))
    return made


def on_sqlite(path: str, count: int) -> float:
    raw = sqlite3.connect(path, isolation_level=None)
    raw.execute("PRAGMA journal_mode=WAL")
    raw.execute("PRAGMA synchronous=FULL")
    first = raw.execute("SELECT position FROM feed").fetchone()[0] + 1
    made = batches(count, first)
    started = time.perf_counter()
    for batch in made:
        raw.execute("BEGIN IMMEDIATE")
        for table, rows in batch.items():
            raw.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(rows[0]))})", rows)
        for counter in COUNTERS:
            raw.execute(
                "INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
                (*counter, len(batch["orders"])),
            )
        raw.execute("UPDATE feed SET position = position + ?", (len(batch["events"]),))
        raw.execute("COMMIT")
    return count / (time.perf_counter() - started)


async def on_postgresql(address: str, count: int) -> float:
    raw = await asyncpg.connect(address)
    made = batches(count, await raw.fetchval("SELECT last_value FROM feed_position") + 1)
    started = time.perf_counter()
    for batch in made:
        async with raw.transaction():
            for table, rows in batch.items():
                await raw.copy_records_to_table(table, records=rows)
            for counter in COUNTERS:
                await raw.execute(
                    "INSERT INTO counters VALUES ($1, $2, $3)"
                    " ON CONFLICT (name, slot) DO UPDATE SET value = counters.value + excluded.value",
                    *counter,
                    len(batch["orders"]),
                )
            await raw.execute(
                "SELECT setval('feed_position', last_value + $1) FROM feed_position", len(batch["events"])
            )
    seconds = time.perf_counter() - started
    await raw.close()
    return count / seconds


def floor(address: str, count: int) -> float:
    """Return orders per second."""
    upgrade(address)
    if address.startswith("sqlite:///"):
        return on_sqlite(address.removeprefix("sqlite:///"), count)
    return asyncio.run(on_postgresql(address, count))


if __name__ == "__main__":
    print(floor(sys.argv[1], int(sys.argv[2])))
