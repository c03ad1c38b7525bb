"""More than can be taken: who is accepted, who is refused, what it costs, and that nothing accepted is lost."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from expediter.errors import BadRequest, Overloaded
from expediter.web.http import BODIES_BYTES_MAX, BODY_BYTES_MAX, Body, Call, Gathered

BENCH = Path(__file__).resolve().parents[1] / "bench"


def test_twice_the_orders_that_can_be_stored() -> None:
    """Who is accepted is stored; all others are told when to come again; memory stays bounded.

    So short a burst is let in where it would not wait for longer than anybody may.
    """
    command = [
        sys.executable,
        str(BENCH / "overload.py"),
        "--seconds",
        "3",
        "--after-seconds",
        "1",
        "--times",
        "3",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(ended.stdout)
    assert found["acknowledged_and_lost"] == found["connections_lost"] == 0, found
    assert found["accepted"] > 0, found
    assert found["refused"].keys() <= {"503"}, found
    assert found["refused_without_retry_after"] == 0, found
    assert found["peak_rss_mb"] < 250, found
    # What waits for longer is refused; answering takes a moment on a slow machine.
    assert found["accepted_ms"]["max"] < 10_000, found


async def test_bodies_that_arrive_are_bounded_all_together() -> None:
    """Bodies without an end fill what room there is: one more is refused, and let in when one has ended."""
    gathered = Gathered()

    def arriving(size: int) -> Call:
        call = Call("POST", b"/orders", [], Body(on_wanted=lambda: None, gathered=gathered))
        call.arriving.add(b" " * size)
        return call

    calls = [arriving(BODY_BYTES_MAX) for _ in range(BODIES_BYTES_MAX // BODY_BYTES_MAX)]
    reading = [asyncio.create_task(call.body()) for call in calls]
    while gathered.size < BODIES_BYTES_MAX:
        await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="Too many bodies arrive at once"):
        await arriving(1).body()
    calls[0].arriving.end()
    assert len(await reading[0]) == BODY_BYTES_MAX
    short = arriving(1)
    short.arriving.end()
    assert await short.body() == b" "
    for call in calls[1:]:
        call.arriving.lose(BadRequest("gone"))
    assert {type(ended) for ended in await asyncio.gather(*reading[1:], return_exceptions=True)} == {BadRequest}
    assert gathered.size == 0
