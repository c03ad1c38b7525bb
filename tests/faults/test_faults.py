"""Each fault alone, in the midst of clients: what was accepted is there, once, at rest, and charged once.

`make test` brings about those that are quick, on the databases that each names; `make test-faults` all of them.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from bringing import PASSES
from disks import Disk, small_disk
from enduring import EVERYTHING, Fault, Mortals, endure
from expediter.backends.points import NAMES
from known import FAULTS

CASES = [
    pytest.param(fault, database, id=f"{fault.name} on {database}")
    for fault in FAULTS
    for database in (fault.on if EVERYTHING else fault.quick)
]


@pytest.mark.parametrize(("fault", "database"), CASES)
def test_a_fault_loses_and_repeats_nothing(fault: Fault, database: str, folder: Path, mortals: Mortals) -> None:
    """No more and no less than what was accepted is there, every law holds, and each order is charged once."""
    endure(fault, database, folder, mortals)


def test_a_process_is_killed_at_every_named_point() -> None:
    """No named moment is left out."""
    assert tuple(PASSES) == NAMES


def test_what_was_not_flushed_does_not_survive_a_power_cut() -> None:
    """The cut is one: a file that was flushed is there afterwards, one that was only written is not."""
    with small_disk() as disk:
        for name in ("flushed", "written"):
            with (disk.at / name).open("wb") as file:
                file.write(b"an order")
                if name == "flushed":
                    file.flush()
                    os.fsync(file.fileno())
        disk.cut_power()
        disk.power_on()
        assert (disk.at / "flushed").read_bytes() == b"an order"
        assert not (disk.at / "written").exists()


@pytest.mark.parametrize(("synchronous", "kept"), [("FULL", 50), ("NORMAL", 0)])
def test_sqlite_needs_full_synchronous(synchronous: str, kept: int) -> None:
    """After a power cut SQLite has what it committed with FULL, and none of it with NORMAL."""
    with small_disk() as disk:
        commit(disk, synchronous, 50)
        disk.power_on()
        with closing(sqlite3.connect(disk.at / "orders.db")) as raw:
            assert raw.execute("SELECT count(*) FROM orders").fetchone() == (kept,)


def commit(disk: Disk, synchronous: str, count: int) -> None:
    """Commit so many rows, each alone, and cut the power."""
    with closing(sqlite3.connect(disk.at / "orders.db", isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode=WAL")
        raw.execute("CREATE TABLE orders (id INTEGER)")
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        raw.execute(f"PRAGMA synchronous={synchronous}")
        for number in range(count):
            raw.execute("INSERT INTO orders VALUES (?)", (number,))
        disk.cut_power()
