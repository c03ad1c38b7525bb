"""The time that a server tells is UTC: it goes on while the server's own zone sets its clocks back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from expediter.backends.databases import open_database
from servers import MariadbServer, Server
from storing import Place

#: Seconds from the start of the server until its zone's summer time ends.
SUMMER_LEFT = 20


@pytest.fixture(params=[MariadbServer])
def at(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A database in a zone where summer time ends in a moment: one o'clock comes twice."""
    ends = time.gmtime(time.time() + SUMMER_LEFT + 2 * 3600)
    day, clock = ends.tm_yday - 1, time.strftime("%H:%M:%S", ends)
    monkeypatch.setitem(os.environ, "TZ", f"WIN-1SUM-2,{(day + 180) % 365}/0,{day}/{clock}")
    server: Server = request.param(tmp_path)
    monkeypatch.delitem(os.environ, "TZ")
    yield Place(server.new_database(), server)
    server.stop()


async def test_time_goes_on_when_summer_ends(at: Place) -> None:
    """The server's time is never behind this machine's by more than a moment, before and after the change."""
    assert at.server is not None
    database = open_database(at.address)
    local = set()
    try:
        until = time.monotonic() + SUMMER_LEFT + 10
        while time.monotonic() < until and len(local) < 2:
            told = await database.read(lambda connection: connection.now())
            assert abs(told / 1_000_000 - time.time()) < 5
            local.add(zone(at))
    finally:
        await database.close()
    assert local == {1, 2}, "the server's zone did not change its clocks"


def zone(at: Place) -> int:
    """Return by how many hours the server's own clock is ahead of UTC."""
    ahead = {
        "mysql": "SELECT TIMESTAMPDIFF(MINUTE, UTC_TIMESTAMP(), NOW())",
        "postgresql": "SELECT extract(timezone FROM now())::int / 60",
    }
    return round(int(at.rows(ahead[at.address.partition(":")[0]])[0][0]) / 60)
