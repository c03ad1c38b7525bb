"""Holds a database against the conservation laws, as `expediter verify` does."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from expediter.backends.databases import open_database
from expediter.orders.laws import Verified
from expediter.upkeep.verify import verify


def verified(address: str, ledger: Path | None = None) -> Verified:
    """Hold a database against the conservation laws, and against the gateway's ledger if there is one."""

    async def look() -> Verified:
        database = open_database(address)
        try:
            return await verify(database, ledger=ledger, advance=lambda count: None)
        finally:
            await database.close()

    with ThreadPoolExecutor(1) as other:  # a loop may be running here
        return other.submit(asyncio.run, look()).result()


def assert_verified(address: str, ledger: Path | None = None) -> None:
    """Assert that no law is broken."""
    found = verified(address, ledger)
    assert found.breaches == [], [f"{breach.order_id}: {breach.law}" for breach in found.breaches[:20]]
