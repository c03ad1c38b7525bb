"""Read this first: the whole life of an order over HTTP, from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import Serving

ORDER = {
    "order_id": "STORY-1",
    "customer_id": "customer_123",
    "items": [{"item_id": "item_001", "item_name": "Burger", "quantity": 2, "price": 12.99}],
}


@pytest.fixture(scope="module")
def expediter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The service as `make run` starts it, in an empty folder; only its gateway never fails."""
    folder: Path = tmp_path_factory.mktemp("story")
    with Serving(folder, PAYMENT_MOCK_SUCCESS_RATE="1") as running:
        yield running


def test_the_life_of_an_order(expediter: Serving) -> None:
    """An order is placed once, charged once, carried out, and everything about it can be asked."""
    http = expediter.client

    # It is stored before this answer. The key makes it safe to send it again.
    placed = http.post("/api/v1/orders", json=ORDER, headers={"Idempotency-Key": "story-1"})
    assert placed.status_code == 202
    assert placed.headers["location"] == "/api/v1/orders/STORY-1"
    assert placed.json()["status"] == "pending"
    assert placed.json()["total_amount"] == 25.98

    # A client that never saw the answer asks again: the same answer, and still one order.
    again = http.post("/api/v1/orders", json=ORDER, headers={"Idempotency-Key": "story-1"})
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json() == placed.json()

    # The workers of the same process charge it and carry it out. Waiting is part of reading.
    order = placed.json()
    while order["status"] != "completed":
        order = http.get("/api/v1/orders/STORY-1", params={"wait": 30}).json()
    assert order["payment_status"] == "paid"
    assert order["total_duration"] > 0

    # Its history is numbered from 1 without gaps, and its version is the number of the last event.
    events = http.get("/api/v1/orders/STORY-1/events").json()["events"]
    assert [event["type"] for event in events] == [
        "order.placed",
        "payment.started",
        "payment.succeeded",
        "fulfilment.started",
        "order.completed",
    ]
    assert [event["number"] for event in events] == [1, 2, 3, 4, 5]
    assert order["version"] == 5

    # Why it is where it is: nothing is left to do, and one call went to the gateway.
    why = http.get("/api/v1/orders/STORY-1/explain").json()
    assert why["next_action"] is None
    assert [attempt["outcome"] for attempt in why["attempts"]] == ["succeeded"]

    # What is done is done: the refusal names the legal moves, and there are none.
    refused = http.post("/api/v1/orders/STORY-1/cancel")
    assert refused.status_code == 409
    assert refused.headers["content-type"] == "application/problem+json"
    assert "it can become: nothing" in refused.json()["error"]

    # Everything is counted as it happens, so asking costs the same with one order and with a million.
    metrics = http.get("/orders/metrics", params={"getOrderIds": "true"}).json()
    assert metrics["completed"] == {"count": 1, "order_ids": ["STORY-1"]}
    assert metrics["total_orders"] == 1


def test_an_order_that_its_customer_takes_back(expediter: Serving) -> None:
    """A declined order waits for a decision; cancelled, it is at rest, and its id is never used again."""
    http = expediter.client
    declined = {**ORDER, "order_id": "STORY-2", "payment_token": "tok_declined"}

    http.post("/orders", json=declined)
    order = http.get("/orders/STORY-2").json()
    while order["status"] != "payment_failed":
        order = http.get("/orders/STORY-2", params={"wait": 30}).json()
    assert order["payment_status"] == "declined"

    cancelled = http.post("/orders/STORY-2/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (202, "cancelled")

    assert http.delete("/orders/STORY-2").status_code == 204
    assert http.get("/orders/STORY-2").status_code == 404
    assert http.post("/orders", json=declined).status_code == 409
