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
