"""The archive: which histories are moved, what is left behind, and what a crash leaves."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from expediter.backends.databases import open_database
from expediter.errors import ConfigurationError
from expediter.orders.commands import CancelOrder, DeleteOrder
from expediter.orders.order import MICROSECONDS
from expediter.store.lookups import history
from expediter.store.maintenance import OLD_EVENTS_PER_BATCH, old_histories, remove_histories
from expediter.store.submissions import Request
from expediter.upkeep.archive import Archived, archive
from serving import Serving, environment
from storing import Place, applied, ask, open_committer, place, rows

HUNDRED_DAYS = 100 * 24 * 60 * 60 * MICROSECONDS


async def make_orders(at: Place) -> None:
    """Make orders of which R1, R2 and the deleted D have been at rest for 100 days; N is at rest, W waits."""
    async with open_committer(at) as committer:
        orders = ("R1", "W", "R2", "D", "N")
        await ask(committer, *(place(order_id, payment_token="tok_of_a_card") for order_id in orders))
        await ask(committer, *(Request(CancelOrder(order_id=order_id)) for order_id in ("R1", "R2", "D", "N")))
        await applied(committer, Request(DeleteOrder(order_id="D")))
    at.change(f"UPDATE orders SET updated_at = updated_at - {HUNDRED_DAYS} WHERE order_id <> 'N'")
    at.change(f"UPDATE deleted_orders SET deleted_at = deleted_at - {HUNDRED_DAYS}")
    at.change(f"UPDATE events SET at = at - {HUNDRED_DAYS}")


async def move(at: Place, folder: Path, days: float = 90) -> Archived:
    database = open_database(at.address)
    try:
        return await archive(database, folder, days=days, advance=lambda count: None)
    finally:
        await database.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """Return every event in the archive."""
    lines = [
        line for path in sorted(folder.glob("*.gz")) for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    return [json.loads(line) for line in lines]


def kept(at: Place) -> list[tuple[str, int]]:
    found = rows(at, "SELECT order_id, number FROM events ORDER BY order_id, number")
    return [(row[0], int(row[1])) for row in found]


async def test_what_is_long_at_rest_is_moved_whole(at: Place, tmp_path: Path) -> None:
    """Whole histories go, as they were stored, and only of orders at rest or deleted for long enough."""
    await make_orders(at)
    stored = rows(at, "SELECT position, order_id, number, at, type, data FROM events ORDER BY position")
    assert "tok_of_a_card" not in str(stored)
    moved = await move(at, tmp_path / "archive")
    assert (moved.orders, moved.events) == (3, 7)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "archive").iterdir()} == {"0o600"}
    assert kept(at) == [("N", 1), ("N", 2), ("W", 1)]
    fields = ("position", "order_id", "number", "at", "type", "data")
    told = [{**dict(zip(fields, row, strict=True)), "data": json.loads(row[5])} for row in stored]
    assert read(tmp_path / "archive") == [event for event in told if event["order_id"] in ("R1", "R2", "D")]
    assert rows(at, "SELECT count(*) FROM orders") == [(4,)]


async def test_a_second_run_has_nothing_to_move(at: Place, tmp_path: Path) -> None:
    """What was moved is not moved again, and no empty file is made."""
    await make_orders(at)
    await move(at, tmp_path / "archive")
    assert await move(at, tmp_path / "archive") == Archived(0, 0, None)
    assert len(list((tmp_path / "archive").iterdir())) == 1


async def test_an_order_goes_on_after_its_history_was_moved(at: Place, tmp_path: Path) -> None:
    """A change after the archive is the next event in number."""
    async with open_committer(at) as committer:
        await ask(committer, place("A"))
        at.change("DELETE FROM jobs")
        at.change(f"UPDATE orders SET updated_at = updated_at - {HUNDRED_DAYS}")
        at.change(f"UPDATE events SET at = at - {HUNDRED_DAYS}")
        await move(at, tmp_path / "archive")
        assert kept(at) == []
        await applied(committer, Request(CancelOrder(order_id="A")))
        assert kept(at) == [("A", 2)]


async def test_more_than_one_step(at: Place, tmp_path: Path) -> None:
    """Histories that fill several steps, spread over the feed, are each moved once."""
    count = OLD_EVENTS_PER_BATCH
    async with open_committer(at) as committer:
        await ask(committer, *(place(f"A{number}") for number in range(count)))
        await ask(committer, *(Request(CancelOrder(order_id=f"A{number}")) for number in range(count)))
    at.change(f"UPDATE orders SET updated_at = updated_at - {HUNDRED_DAYS}")
    at.change(f"UPDATE events SET at = at - {HUNDRED_DAYS}")
    moved = await move(at, tmp_path / "archive")
    assert (moved.orders, moved.events) == (count, 2 * count)
    numbers = defaultdict(list)
    for event in read(tmp_path / "archive"):
        numbers[event["order_id"]].append(event["number"])
    assert len(numbers) == count
    assert set(map(tuple, numbers.values())) == {(1, 2)}


async def test_a_run_that_ended_before_it_removed_loses_nothing(at: Place, tmp_path: Path) -> None:
    """After a crash between file and database nothing is gone; the history of an order that changed stays."""
    await make_orders(at)
    database = open_database(at.address)
    now = await database.read(lambda connection: connection.now())
    found = await database.read(lambda connection: old_histories(connection, after=0, before=now))
    assert found is not None
    at.change("UPDATE orders SET version = version + 1 WHERE order_id = 'R1'")
    await database.write(lambda connection: remove_histories(connection, versions=found.versions))
    assert [order_id for order_id, _ in kept(at)] == ["R1", "R1", "W"]
    assert await database.read(lambda connection: history(connection, "R1"))
    await database.close()


async def test_a_folder_that_cannot_be_written_removes_nothing(at: Place, tmp_path: Path) -> None:
    """Where the file cannot be made, the message says so and every event stays."""
    await make_orders(at)
    before = kept(at)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"The archive in"):
        await move(at, tmp_path / "file" / "archive")
    assert kept(at) == before


def test_by_command_and_over_http(folder: Path) -> None:
    """`expediter archive` beside a running service: the order stays, and its history says how much was moved."""
    with Serving(folder, "--no-workers") as service:
        order_id = service.client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
        service.client.post(f"/orders/{order_id}/cancel")
        assert "archived" not in service.client.get(f"/orders/{order_id}/events").json()
        at = Place(f"sqlite:///{folder}/orders.db")
        at.change(f"UPDATE orders SET updated_at = updated_at - {HUNDRED_DAYS}")
        at.change(f"UPDATE events SET at = at - {HUNDRED_DAYS}")
        said = [
            subprocess.run(
                [sys.executable, "-m", "expediter", "archive", "kept", "--older-than", "30"],
                cwd=folder,
                env=environment(folder),
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            ).stdout
            for _ in range(2)
        ]
        (path,) = (folder / "kept").iterdir()
        assert said == [
            f"Moved 2 events of 1 orders to kept/{path.name}\n",
            "No order with a history here has been at rest for 30 days\n",
        ]
        assert service.client.get(f"/orders/{order_id}/events").json() == {"events": [], "archived": 2}
        assert service.client.get(f"/orders/{order_id}").json()["status"] == "cancelled"


def test_old_histories_ends(folder: Path) -> None:
    """An empty database has nothing to move."""

    async def run() -> None:
        async with open_committer(folder):
            pass
        assert await move(Place(f"sqlite:///{folder}/orders.db"), folder / "archive") == Archived(0, 0, None)

    asyncio.run(run())
