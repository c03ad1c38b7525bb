"""SQLite's log does not grow with what is written, whichever processes are there and whoever reads."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from expediter.backends.databases.sqlite import LOG_BYTES, LOG_BYTES_MAX
from serving import Serving

#: Some 3 MB in the database.
ORDER = {
    "customer_id": "c",
    "items": [{"item_id": f"i{number}", "name": "n" * 500, "quantity": 1} for number in range(1900)],
}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Let two readers read side by side, so that there is always one."""
    over = threading.Event()

    def read() -> None:
        with closing(sqlite3.connect(path)) as raw:
            while not over.is_set():
                raw.execute("SELECT count(*), max(name) FROM order_lines").fetchall()

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        yield
    finally:
        over.set()
        for reader in readers:
            reader.join()


def write(service: Serving, folder: Path, limit: int) -> int:
    """Write three times as much as the log may hold; return the most bytes that it had."""
    most, written = 0, 0
    while written < 3 * limit:
        assert service.client.post("/orders", json=ORDER).status_code == 201
        written += 3_000_000
        most = max(most, (folder / "orders.db-wal").stat().st_size)
    return most


def test_the_log_stays_short_beside_an_idle_process(folder: Path) -> None:
    """The process that came first, and now does nothing, keeps the others from nothing."""
    with Serving(folder, "--no-workers") as idle, Serving(folder, "--no-workers") as busy:
        assert idle.client.post("/orders", json=ORDER).status_code == 201
        assert write(busy, folder, LOG_BYTES) < 2 * LOG_BYTES


def test_the_log_begins_anew_beside_readers(folder: Path) -> None:
    """Where somebody reads at every moment they are waited for, now and then."""
    with Serving(folder, "--no-workers") as service:
        assert service.client.post("/orders", json=ORDER).status_code == 201
        with reading(folder / "orders.db"):
            assert write(service, folder, LOG_BYTES_MAX) < 2 * LOG_BYTES_MAX
