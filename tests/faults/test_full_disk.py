"""A file that may not grow: what is answered, what is logged, and what is there when it may again."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from auditing import wait_until
from serving import Serving

BODY = {"customer_id": "c", "items": [{"item_id": "i", "quantity": 1, "price": 1}]}
#: Bytes that the database's log may still grow by: the next orders fit, or half of one does.
ROOM = (0, 3_000, 20_000)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits the files of a running process")
@pytest.mark.parametrize("room", ROOM)
def test_a_quota_costs_answers_and_no_orders(folder: Path, room: int) -> None:
    """Beyond a quota orders are refused in time, with a few lines of log; none that was accepted is lost."""
    with Serving(folder, "--no-workers") as service:
        placed = [service.client.post("/orders", json=BODY).json()["order_id"] for _ in range(5)]
        full = (folder / "orders.db-wal").stat().st_size + room
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
        refused = 0
        while refused < 10:
            began = time.monotonic()
            answer = service.client.post("/orders", json=BODY)
            assert time.monotonic() - began < 10
            assert answer.status_code in (201, 503), answer.text
            if answer.status_code == 201:
                placed.append(answer.json()["order_id"])
            else:
                refused += 1
        assert service.client.get("/readyz").status_code == 503
        assert service.client.get(f"/orders/{placed[-1]}").status_code == 200
        assert len(service.log) < 100, service.log[:20]
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, unlimited)
        wait_until(lambda: service.client.get("/readyz").status_code == 200)
        placed.append(service.client.post("/orders", json=BODY).json()["order_id"])
        assert {service.client.get(f"/orders/{order_id}").status_code for order_id in placed} == {200}
