"""More than can be taken: who is accepted, who is refused, what it costs, and that nothing accepted is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "bench"


def test_twice_the_orders_that_can_be_stored() -> None:
    """Who is accepted is stored; all others are told when to come again; memory stays bounded."""
    command = [sys.executable, str(BENCH / "overload.py"), "--seconds", "3", "--after-seconds", "1", "--times", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(ended.stdout)
    assert found["acknowledged_and_lost"] == found["connections_lost"] == 0, found
    assert found["accepted"] > 0, found
    assert found["refused"].keys() == {"503"}, found
    assert found["refused_without_retry_after"] == 0, found
    assert found["peak_rss_mb"] < 250, found
    # What waits for longer is refused; answering takes a moment on a slow machine.
    assert found["accepted_ms"]["max"] < 10_000, found
