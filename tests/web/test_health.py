"""Health that can be trusted: each part has a verdict, what the look has taken, and since when it is so."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

from auditing import wait_until
from servers import DurableRedisServer
from serving import Serving

#: Seconds within which the health is told, whatever hangs, and what a busy machine may add.
ANSWER_SECONDS = 2.0 + 1.0


def parts(service: Serving) -> dict[str, Any]:
    began = time.monotonic()
    health = service.client.get("/health").json()
    assert time.monotonic() - began < ANSWER_SECONDS, health
    found: dict[str, Any] = health["dependencies"]
    return found


def test_a_cache_that_hangs_is_noticed_by_whoever_asks(folder: Path, mortal_redis: DurableRedisServer) -> None:
    """Nobody has read or written: the look itself finds that Redis hangs, and later that it does not."""
    with Serving(folder, "--no-workers", REDIS_URL=mortal_redis.new_database()) as service:
        first = parts(service)
        assert {part["status"] for part in first.values()} == {"ok"}
        with mortal_redis.frozen():
            hung = parts(service)
            again = parts(service)
            assert service.client.get("/readyz").status_code == 200
        assert hung["cache"]["status"] == "degraded"
        assert hung["cache"]["latency_ms"] >= 500
        assert again["cache"]["since"] == hung["cache"]["since"] > first["cache"]["since"]
        assert again["database"]["since"] == first["database"]["since"]
        wait_until(lambda: parts(service)["cache"]["status"] == "ok")
        well = parts(service)["cache"]
        assert well["since"] > hung["cache"]["since"]
        assert datetime.fromisoformat(well["since"]).tzinfo is not None


def test_what_the_look_at_each_part_has_taken_is_told(folder: Path) -> None:
    """The database is asked, so it takes some time; the circuit breaker is read with it."""
    with Serving(folder, "--no-workers") as service:
        found = parts(service)
    assert found["database"]["latency_ms"] >= 0
    assert found["payment_gateway"]["latency_ms"] is None
    assert all(part["since"] for part in found.values())
