"""What tests of whole processes share: counting in the database file and in the gateway's ledger from outside."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from serving import PATIENCE_SECONDS, Program, attending
from verifying import assert_verified


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
    with attending(folder, settings):
        program = Program(folder, "work", **settings)
        try:
            program.wait_for("works off")
            yield program
        finally:
            program.kill()


def wait_until(fact: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Return once `fact` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, f"it did not come about within {seconds:g} s"
        time.sleep(0.02)


def assert_sound(folder: Path) -> None:
    """Assert what holds of the database in `folder` at every moment, also right after a crash."""
    assert rows(folder, "PRAGMA integrity_check") == [("ok",)]
    ledger = folder / "ledger.jsonl"
    assert_verified(f"sqlite:///{folder}/orders.db", ledger if ledger.exists() else None)
    positions = [position for (position,) in rows(folder, "SELECT position FROM events ORDER BY position")]
    assert positions == list(range(1, len(positions) + 1)), "positions with a gap or twice"
    assert rows(folder, "SELECT position FROM feed") == [(len(positions),)]
    made = charges(folder)
    assert len({key for key, _ in made}) == len(made), "a gateway key was charged twice"
