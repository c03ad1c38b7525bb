"""The archive: the history of orders long at rest, moved out of the database into a file.

What is moved is on the disk before it leaves the database, so a crash in between leaves it in both: in the files
an event may be found twice, and is named by its order and number.
"""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from expediter.backends.databases import UPKEEP_SECONDS_MAX, Database
from expediter.errors import ConfigurationError
from expediter.orders.order import MICROSECONDS
from expediter.store.maintenance import OldEvent, old_histories, remove_histories

DAY = 24 * 60 * 60 * MICROSECONDS

_to_json = msgspec.json.Encoder().encode


class Archived(msgspec.Struct, frozen=True):
    """What was moved, and where to (None: there was nothing to move)."""

    orders: int
    events: int
    path: Path | None


async def archive(database: Database, folder: Path, *, days: float, advance: Callable[[int], None]) -> Archived:
    """Move every event of the orders that have been at rest, or deleted, for `days` into a file in `folder`.

    The file is gzip'd NDJSON: a line for each event, as it is stored. Orders themselves stay, and so does their
    place in every page and count. `advance` is told how many more events were moved. It may be stopped at any
    moment and run again. Raises Unavailable, and ConfigurationError for a folder that cannot be written to.
    """
    now = await database.read(lambda connection: connection.now())
    file = _File(folder)
    orders = events = after = 0
    while True:
        look = partial(old_histories, after=after, before=now - int(days * DAY))
        found = await database.read(look, seconds=UPKEEP_SECONDS_MAX)
        if found is None:
            return Archived(orders, events, file.path)
        if found.events:
            file.append(found.events)
            move = partial(remove_histories, versions=found.versions)
            moved = await database.write(move, seconds=UPKEEP_SECONDS_MAX)
            orders += moved.orders
            events += moved.events
            advance(moved.events)
        after = found.after


def _for_its_owner(path: str, flags: int) -> int:
    """Open a file that nobody else may read: customers are named in it."""
    return os.open(path, flags, 0o600)


class _File:
    """A file that is made when there is something for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path: Path | None = None

    def append(self, events: Sequence[OldEvent]) -> None:
        """Append events and wait until they are on the disk. Raises ConfigurationError."""
        lines = b"".join([_to_json(event) + b"\n" for event in events])
        try:
            if self.path is None:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.path = self._folder / f"events-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.ndjson.gz"
            # Each batch is a gzip member of its own, so that what is there can be read whatever comes after it.
            with open(self.path, "ab", opener=_for_its_owner) as file:
                file.write(gzip.compress(lines))
                file.flush()
                os.fsync(file.fileno())
            descriptor = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ConfigurationError(
                f"The archive in {self._folder} cannot be written: {error.strerror}"
            ) from error
