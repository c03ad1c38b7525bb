"""A store of the test's own, and commands that say only what a test is about."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

from expediter.cache import Cache, NoCache
from expediter.commands import PlaceOrder
from expediter.committer import Committer
from expediter.dialects import SqliteDatabase
from expediter.migrations import upgrade
from expediter.orders import MICROSECONDS, Line, Stages
from expediter.requests import Applied, Asked, ClaimDue, Claims, Outcome, Request

LEASE = 30 * MICROSECONDS


def place(order_id: str, *, fresh: bool = False, **changes: Any) -> Request:
    """Return a request for an order of two priced lines that add up to 29.97 USD."""
    fields: dict[str, Any] = {
        "customer_id": "customer_1",
        "customer_name": None,
        "currency": "USD",
        "total_minor": 2997,
        "priced": True,
        "lines": (Line(1, "item_001", "Burger", 2, 1299), Line(2, "item_002", "Fries", 1, 399)),
        "metadata": "{}",
        "payment_token": None,
        "stages": Stages.PAYMENT_FULFILMENT,
        **changes,
    }
    return Request(PlaceOrder(order_id=order_id, fresh=fresh, **fields))


def claim(holder: str = "worker", limit: int = 50, lease: int = LEASE, claims_max: int = 5) -> ClaimDue:
    return ClaimDue(holder, limit, lease, claims_max)


@asynccontextmanager
async def open_committer(
    folder: Path, *, cache: Cache | None = None, database: SqliteDatabase | None = None
) -> AsyncIterator[Committer]:
    """A running committer over a database file in `folder`, which may be there already."""
    path = folder / "orders.db"
    upgrade(f"sqlite:///{path}")
    database = database or SqliteDatabase(path)
    committer = Committer(database, cache or NoCache(), slot=7)
    committer.start()
    try:
        yield committer
    finally:
        await committer.stop()
        await database.close()


async def ask(committer: Committer, *asked: Asked) -> list[Outcome]:
    return await committer.submit_all(asked)


async def applied(committer: Committer, request: Request) -> Applied:
    outcome = await committer.submit(request)
    assert isinstance(outcome, Applied), outcome
    return outcome


async def claimed(committer: Committer, asked: ClaimDue | None = None) -> Claims:
    (outcome,) = await committer.submit_all([asked or claim()])
    assert isinstance(outcome, Claims), outcome
    return outcome


def rows(folder: Path, statement: str, *values: object) -> Sequence[Any]:
    """Return what another reader of the file sees."""
    with closing(sqlite3.connect(folder / "orders.db")) as raw:
        return raw.execute(statement, values).fetchall()
