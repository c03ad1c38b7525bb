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

from expediter.store.migrations import upgrade

BATCH_ORDERS = 100
Rows = dict[str, list[tuple[Any, ...]]]


def rows_of(numbers: Sequence[int], now: int) -> Rows:
    """Return the rows of these orders by table, as the service writes them for a new order of two lines."""
    made: Rows = {"order_lines": [], "orders": [], "jobs": [], "events": []}
    for number in numbers:
        order_id = f"FLOOR-{now}-{number:08}"
        made["order_lines"] += [
            (order_id, 1, "item_001", 0, "Burger", 2, 1299),
            (order_id, 2, "item_002", 0, "Fries", 1, 349),
        ]
        made["orders"].append(
            (
                order_id,
                "pending",
                "pending",
                "payment,fulfilment",
                "customer_123",
                0,
                None,
                "USD",
                2947,
                1,
                "{}",
                None,
                1,
                now,
                now,
                None,
                None,
                None,
                0,
                0,
                0,
                None,
                None,
            )
        )
        made["jobs"].append((order_id, "charge", now, now, None, 1 << 20, 0, 0, None))
        data = '{"customer_id":"customer_123","currency":"USD","total_minor":2947}'
        made["events"].append((number, order_id, 1, now, "order.placed", data))
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
        raw.execute(
            "INSERT INTO counters VALUES ('status:pending', 63, ?) ON CONFLICT DO UPDATE SET value = value + ?",
            (BATCH_ORDERS, BATCH_ORDERS),
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
            await raw.execute(
                "INSERT INTO counters VALUES ('status:pending', 63, $1)"
                " ON CONFLICT (name, slot) DO UPDATE SET value = counters.value + $1",
                BATCH_ORDERS,
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
