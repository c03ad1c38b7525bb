"""Several processes on one database, without a cache or a broker between them."""

from __future__ import annotations

from pathlib import Path

from auditing import charges, gateway_with_ledger, wait_until, working
from serving import Serving
from storing import Place, rows


def test_an_order_written_at_one_process_is_read_at_the_other(folder: Path, at: Place) -> None:
    """A client that writes at one process and reads at the other never sees an older version."""
    settings = {"DATABASE_URL": at.address}
    with (
        Serving(folder, "--no-workers", **settings) as one,
        Serving(folder, "--no-workers", **settings) as two,
    ):
        for number in range(300):
            order_id = f"A{number // 3}"
            if number % 3 == 0:
                body = {"order_id": order_id, "user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}
                version = one.client.post("/orders", json=body).json()["version"]
            else:
                status = "processing" if number % 3 == 1 else "completed"
                answer = one.client.patch(f"/orders/{order_id}/status", json={"status": status})
                assert answer.status_code == 200, answer.text
                version = answer.json()["version"]
            assert two.client.get(f"/orders/{order_id}").json()["version"] == version


def test_a_killed_worker_s_orders_are_taken_over(folder: Path, at: Place) -> None:
    """When a working process is killed amid its orders, another brings them to rest, each charged once."""
    slow = {"PAYMENT_MOCK_LATENCY_MIN": "20", "PAYMENT_MOCK_LATENCY_MAX": "200"}
    settings = {"DATABASE_URL": at.address, "PAYMENT_GATEWAY": gateway_with_ledger(folder), "LEASE_SECONDS": "2"}
    with Serving(folder, "--no-workers", **settings) as service:
        with working(folder, **settings, **slow) as doomed:
            service.client.post("/orders/populate", json={"total_entries": 600})
            wait_until(lambda: len(charges(folder)) > 50)
            doomed.kill()
        with working(folder, **settings):
            wait_until(lambda: rows(at, "SELECT count(*) FROM jobs") == [(0,)])
        counts = service.client.get("/orders/metrics").json()["order_status_counts"]
    assert counts["completed"] == 600
    made = charges(folder)
    assert len(made) == len({key for key, _ in made}) == 600
