"""A store of the test's own, and commands that say only what a test is about."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expediter.backends.cache import Cache, NoCache
from expediter.backends.databases import Database, open_database
from expediter.orders.commands import PlaceOrder
from expediter.orders.order import MICROSECONDS, Line, Stages
from expediter.store.committer import Committer
from expediter.store.migrations import upgrade
from expediter.store.submissions import Applied, Asked, ClaimDue, Claims, Outcome, Request
from servers import Server

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


@dataclass(frozen=True)
class Place:
    """Where a test's orders are stored: an address, and what another reader sees there."""

    address: str
    server: Server | None = None

    def rows(self, statement: str) -> Sequence[Any]:
        """Return what another reader of the database sees."""
        if self.server is not None:
            return self.server.query(self.address.rpartition("/")[2], statement)
        with closing(sqlite3.connect(self.address.removeprefix("sqlite:///"))) as raw:
            return raw.execute(statement).fetchall()

    def change(self, statement: str) -> None:
        """Change the database behind the program's back."""
        if self.server is not None:
            self.server.query(self.address.rpartition("/")[2], statement)
            return
        with closing(sqlite3.connect(self.address.removeprefix("sqlite:///"))) as raw, raw:
            raw.execute(statement)


@asynccontextmanager
async def open_committer(
    at: Place | Path, *, cache: Cache | None = None, database: Database | None = None, slot: int = 7
) -> AsyncIterator[Committer]:
    """A running committer over a database, which may be there already (a path: the file orders.db in it)."""
    address = at.address if isinstance(at, Place) else f"sqlite:///{at}/orders.db"
    await asyncio.to_thread(upgrade, address)
    database = database or open_database(address)
    committer = Committer(database, cache or NoCache(), slot=slot)
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


def rows(at: Place | Path, statement: str) -> Sequence[Any]:
    """Return what another reader of the database sees."""
    return (at if isinstance(at, Place) else Place(f"sqlite:///{at}/orders.db")).rows(statement)


def position(at: Place | Path) -> int:
    """Return the position that the feed is at."""
    on_postgresql = isinstance(at, Place) and at.address.startswith("postgresql")
    told = rows(at, "SELECT last_value FROM feed_position" if on_postgresql else "SELECT position FROM feed")
    return int(told[0][0])


def undo_money_and_webhooks(at: Place) -> None:
    """Take the steps from 0008 on of the database back."""
    at.change("DROP TABLE api_keys")
    at.change("ALTER TABLE installation DROP COLUMN api_keys_mark")
    if at.address.startswith("postgresql"):
        at.change("ALTER TABLE feed ADD COLUMN position bigint NOT NULL DEFAULT 0")
        at.change("UPDATE feed SET position = (SELECT last_value FROM feed_position)")
        at.change("DROP FUNCTION feed_position_hold, feed_position_settled")
        at.change("DROP SEQUENCE feed_position")
    at.change("DROP TABLE schema_needs")
    at.change("DROP TABLE webhook_endpoints")
    at.change("DROP TABLE webhook_deliveries")
    at.change("DROP TABLE refunds")
    if at.server is not None:
        for check in ("orders_captured_was_authorized", "orders_refunded_was_captured"):
            at.change(f"ALTER TABLE orders DROP CONSTRAINT {check}")
    amounts = ("refunded_minor", "refunding_minor", "captured_minor", "authorized_minor")
    for column in (*amounts, "refunds", "payment_action", "action_expires_at"):
        at.change(f"ALTER TABLE orders DROP COLUMN {column}")
    for column in ("then_kind", "then_due_at"):
        at.change(f"ALTER TABLE jobs DROP COLUMN {column}")
    at.change("UPDATE alembic_version SET version_num = '0007'")
