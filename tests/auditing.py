"""What tests of whole processes share: counting in the database file and in the gateway's ledger from outside."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from serving import PATIENCE_SECONDS, Program


def gateway_with_ledger(folder: Path) -> str:
    """Return a PAYMENT_GATEWAY that writes down in `folder` what it charges."""
    return f"simulated://{folder}/ledger.jsonl"


def charges(folder: Path) -> list[tuple[str, int]]:
    """Return every charge in the ledger, as (gateway key, minor units), in the order in which they were made."""
    ledger = folder / "ledger.jsonl"
    entries = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    return [(entry["key"], entry["amount_minor"]) for entry in entries if entry["action"] == "charge"]


def rows(folder: Path, query: str, *values: object) -> list[tuple[Any, ...]]:
    """Return what `query` finds in the database of `folder`, in a connection of its own."""
    with closing(sqlite3.connect(f"file:{folder}/orders.db?mode=ro", uri=True, timeout=10)) as database:
        return database.execute(query, values).fetchall()


def order_ids(folder: Path) -> set[str]:
    """Return the ids of all stored orders."""
    return {order_id for (order_id,) in rows(folder, "SELECT order_id FROM orders")}


def jobs_left(folder: Path) -> int:
    """Return how many orders have a next action, parked ones included."""
    return int(rows(folder, "SELECT count(*) FROM jobs")[0][0])


def held(folder: Path) -> int:
    """Return how many jobs a worker holds."""
    return int(rows(folder, "SELECT count(*) FROM jobs WHERE holder IS NOT NULL")[0][0])


@contextmanager
def working(folder: Path, **settings: str) -> Iterator[Program]:
    """Run a process that works off the orders of `folder`; it is killed at the end, unless it has ended before."""
    program = Program(folder, "work", **settings)
    try:
        program.wait_for("works off")
        yield program
    finally:
        if program.process.poll() is None:
            program.kill()


def wait_until(fact: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Return once `fact` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, f"it did not come about within {seconds:g} s"
        time.sleep(0.02)


def assert_sound(folder: Path) -> None:
    """Assert what holds at every moment, also right after a crash."""
    assert rows(folder, "PRAGMA integrity_check") == [("ok",)]
    _assert_counters(folder)
    _assert_history(folder)
    _assert_charges(folder)
    totals = """
        SELECT order_id, total_minor, (SELECT sum(quantity * price_minor) FROM order_lines AS line
                                       WHERE line.order_id = orders.order_id) AS lines_minor
        FROM orders WHERE priced AND total_minor IS NOT lines_minor
    """
    assert rows(folder, totals) == [], "orders whose lines do not add up"
    lost = """
        SELECT order_id, status FROM orders WHERE order_id NOT IN (SELECT order_id FROM jobs)
        AND status NOT IN ('completed', 'cancelled', 'payment_failed', 'failed')
    """
    assert rows(folder, lost) == [], "orders that neither rest nor have a next action"


def _assert_counters(folder: Path) -> None:
    counted = dict(rows(folder, "SELECT name, sum(value) FROM counters GROUP BY name HAVING sum(value) != 0"))
    real: Counter[str] = Counter()
    facts = "SELECT status, created_at, coalesce(processing_started_at, created_at), completed_at FROM orders"
    for status, created_at, started_at, completed_at in rows(folder, facts):
        real[f"status:{status}"] += 1
        if completed_at is not None:
            real["completed"] += 1
            real["completed:work"] += completed_at - started_at
            real["completed:total"] += completed_at - created_at
    real["jobs"], real["jobs:dead"] = rows(folder, "SELECT count(*), count(dead_at) FROM jobs")[0]
    assert counted == +real, "the counters differ from the rows"


def _assert_history(folder: Path) -> None:
    numbers: dict[str, list[int]] = {}
    positions = []
    for position, order_id, number in rows(
        folder, "SELECT position, order_id, number FROM events ORDER BY position"
    ):
        positions.append(position)
        numbers.setdefault(order_id, []).append(number)
    assert positions == list(range(1, len(positions) + 1)), "positions with a gap or twice"
    assert rows(folder, "SELECT position FROM feed") == [(len(positions),)]
    versions = dict(rows(folder, "SELECT order_id, version FROM orders"))
    for (order_id,) in rows(folder, "SELECT order_id FROM deleted_orders"):
        assert numbers[order_id] == list(range(1, len(numbers[order_id]) + 1))
        versions[order_id] = len(numbers[order_id])  # its history stays
    assert numbers == {order_id: list(range(1, version + 1)) for order_id, version in versions.items()}


def _assert_charges(folder: Path) -> None:
    made = charges(folder)
    assert len({key for key, _ in made}) == len(made), "a gateway key was charged twice"
    intents = {
        key: (order_id, amount)
        for key, order_id, amount in rows(
            folder, "SELECT gateway_key, order_id, amount_minor FROM payment_attempts"
        )
    }
    charged = Counter(intents[key][0] for key, _ in made)
    assert [order_id for order_id, times in charged.items() if times > 1] == [], "orders charged under two keys"
    assert all(intents[key][1] == amount for key, amount in made)
    unpaid = """
        SELECT order_id FROM orders WHERE order_id NOT IN (SELECT order_id FROM jobs)
        AND payment_status NOT IN ('paid', 'refunded')
    """
    assert [order_id for (order_id,) in rows(folder, unpaid) if order_id in charged] == [], (
        "charged, at rest, not paid"
    )
    paid = dict(rows(folder, "SELECT order_id, total_minor FROM orders WHERE payment_status = 'paid'"))
    amounts = {intents[key][0]: amount for key, amount in made}
    assert {order_id: amounts.get(order_id) for order_id in paid} == paid, "paid orders that were not charged"
