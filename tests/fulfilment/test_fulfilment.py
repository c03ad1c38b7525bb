"""The simulated fulfiller: who it is by its address, and what its failures lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from expediter.errors import ConfigurationError
from expediter.fulfilment import open_fulfiller
from serving import Serving


@pytest.mark.parametrize(
    "address", ["simulated", "simulated://", "simulated://?seed=7", "simulated://?success_rate=0"]
)
def test_a_simulation_is_known_by_its_address(address: str) -> None:
    """The simulated fulfiller is opened by name, with a seed and a rate where they are given."""
    assert open_fulfiller(address, latency_ms_min=0, latency_ms_max=0).name == "simulated"


@pytest.mark.parametrize(
    "address", ["", "kitchen", "simulated://?success_rate=2", "simulated://?seed=x", "simulated://?speed=1"]
)
def test_another_address_is_refused(address: str) -> None:
    """Whatever is not understood is refused by the name of the setting."""
    with pytest.raises(ConfigurationError, match="FULFILMENT"):
        open_fulfiller(address, latency_ms_min=0, latency_ms_max=0)


def test_failures_are_tried_again_until_the_order_is_complete(folder: Path) -> None:
    """A fulfiller that fails now and then is asked again after a back-off, and the order completes."""
    with Serving(folder, FULFILMENT="simulated://?success_rate=0.7&seed=3", STAGES="fulfilment") as service:
        body = {"user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}
        ids = [service.client.post("/orders", json=body).json()["order_id"] for _ in range(10)]
        assert {service.until_rest(order_id)["status"] for order_id in ids} == {"completed"}
        histories = [service.client.get(f"/orders/{order_id}/events").json()["events"] for order_id in ids]
        assert any(event["type"] == "fulfilment.unavailable" for history in histories for event in history)


def test_by_hand_nobody_but_a_caller_moves_an_order_on(folder: Path) -> None:
    """With FULFILMENT=manual what is due is charged, and then the order waits for those who carry it out."""
    with Serving(folder, FULFILMENT="manual") as service:
        client = service.client
        paid = client.post("/orders", json={"user_id": 1, "item_ids": [1], "total_amount": 5}).json()["order_id"]
        free = client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
        confirmed = service.until_version(paid, 3)
        assert (confirmed["status"], confirmed["payment_status"]) == ("confirmed", "paid")
        # Charging the other showed that the worker runs: this one it leaves alone.
        assert client.get(f"/orders/{free}").json()["version"] == 1
        for order_id in (paid, free):
            assert "waits for whoever carries it out" in client.get(f"/orders/{order_id}/explain").json()["why"]
            moved = client.patch(f"/orders/{order_id}/status", json={"status": "processing"})
            assert moved.json()["status"] == "processing"
            assert "waits for whoever carries it out" in client.get(f"/orders/{order_id}/explain").json()["why"]
        assert client.patch(f"/orders/{free}/status", json={"status": "failed"}).json()["status"] == "failed"
        assert client.post(f"/orders/{free}/retry").json()["status"] == "processing"
        for order_id in (paid, free):
            done = client.patch(f"/orders/{order_id}/status", json={"status": "completed"})
            assert (done.status_code, done.json()["status"]) == (200, "completed")
        cancelled = client.post("/orders", json={"user_id": 1, "item_ids": [1], "total_amount": 5}).json()[
            "order_id"
        ]
        service.until_version(cancelled, 3)
        client.post(f"/orders/{cancelled}/cancel")
        assert service.until_rest(cancelled)["payment_status"] == "refunded"


def test_what_waited_for_people_is_done_once_a_worker_may(folder: Path) -> None:
    """The setting is not the order's: with another one, what waits goes on."""
    with Serving(folder, FULFILMENT="manual") as service:
        order_id = service.client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
    with Serving(folder) as service:
        assert service.until_rest(order_id)["status"] == "completed"
