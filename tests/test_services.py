"""The calls that the five replaced services documented, as their clients make them."""

from __future__ import annotations

import base64
import re
import time

import pytest

from serving import PATIENCE_SECONDS, Serving

BURGER = {"item_id": "item_001", "item_name": "Burger", "quantity": 2, "price": 12.99}
ORD003 = {"user_id": 1, "order_id": "ORD003", "item_ids": [101, 102, 103], "total_amount": 59.99}
SERVER_MADE_ID = r"ORD-[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}"


# Service A: cached orders over short paths.


def test_a_creates_lists_and_gets(service: Serving) -> None:
    """Service A's client places an order with names, finds it first in the list, and gets it by its id."""
    placed = service.client.post(
        "/orders", json={"customer_name": "Alice", "items": [{"name": "Pen", "quantity": 2}]}
    )
    order_id = placed.json()["order_id"]

    listed = service.client.get("/orders", params={"limit": 5, "offset": 0})
    got = service.client.get(f"/orders/{order_id}")

    assert placed.status_code == 201
    assert re.fullmatch(SERVER_MADE_ID, order_id)
    assert listed.json()["orders"][0]["order_id"] == order_id
    assert got.json()["customer_name"] == "Alice"
    assert got.json()["items"][0]["name"] == "Pen"


def test_a_sees_its_write_at_once(service: Serving) -> None:
    """A page that was just read, and so is cached, shows an order placed after it on the very next read."""
    for number in range(5):
        service.client.get("/orders", params={"limit": 2, "offset": 0})
        order_id = service.client.post(
            "/orders", json={"customer_name": f"Reader {number}", "items": [{"name": "Pen", "quantity": 1}]}
        ).json()["order_id"]
        page = service.client.get("/orders", params={"limit": 2, "offset": 0}).json()

        assert page["orders"][0]["order_id"] == order_id


def test_a_operator_watches_hits_and_misses(service: Serving) -> None:
    """Reading one order twice counts at least one hit of the cache, which /health shows."""

    def hits() -> int:
        detail = service.client.get("/health").json()["dependencies"]["cache"]["detail"]
        return int(re.search(r"(\d+) hits", detail)[1])  # type: ignore[index]

    order_id = service.client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
    service.until_rest(order_id)
    before = hits()

    for _ in range(3):
        service.client.get(f"/orders/{order_id}")

    assert hits() > before


# Service B: status changes, deletion, and the admin calls.


def test_b_changes_a_status_and_deletes(idle_service: Serving) -> None:
    """Service B's client moves an order on by PATCH and removes it by DELETE."""
    client = idle_service.client
    order_id = client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]

    changed = client.patch(f"/orders/{order_id}/status", json={"status": "processing"})
    deleted = client.delete(f"/orders/{order_id}")
    gone = client.get(f"/orders/{order_id}")

    assert (changed.status_code, changed.json()["status"]) == (200, "processing")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert (gone.status_code, gone.json()["error"]) == (404, "Order not found")


def test_b_seeds_and_resets(idle_service: Serving) -> None:
    """Service B's operator makes orders with /admin/seed and removes them all with /admin/reset."""
    client = idle_service.client
    basic = base64.b64encode(b"admin:open sesame").decode()

    seeded = client.post("/admin/seed", json={"count": 7, "admin_password": "open sesame"})
    count = client.get("/orders").json()["total"]
    reset = client.post("/admin/reset", headers={"Authorization": f"Basic {basic}"})

    assert seeded.status_code == 201
    assert count >= 7
    assert (reset.status_code, reset.json()["deleted"]) == (200, count)
    assert client.get("/orders").json()["total"] == 0


# Service C: the in-process order processor.


def test_c_ord003_is_completed_with_three_durations(fulfilment_service: Serving) -> None:
    """Service C's example order ends completed, and its three durations add up."""
    placed = fulfilment_service.client.post("/orders", json=ORD003)
    order = fulfilment_service.until_rest("ORD003")

    assert placed.status_code == 201
    assert (placed.json()["order_id"], placed.json()["status"]) == ("ORD003", "pending")
    assert placed.json()["item_ids"] == "101,102,103"
    assert placed.json()["message"]
    assert order["status"] == "completed"
    assert (order["user_id"], order["total_amount"], order["total_minor"]) == (1, 59.99, 5999)
    pending, processing = order["pending_duration"], order["processing_duration"]
    assert isinstance(pending, float)
    assert isinstance(processing, float)
    assert pending >= 0
    assert processing >= 0.02
    assert order["total_duration"] == pytest.approx(pending + processing, abs=2e-6)


def test_c_metrics_with_ids(fulfilment_service: Serving) -> None:
    """With getOrderIds=true, service C's metrics count the completed orders and name them."""
    order_id = fulfilment_service.client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
    fulfilment_service.until_rest(order_id)

    metrics = fulfilment_service.client.get("/orders/metrics", params={"getOrderIds": "true"}).json()

    assert metrics["total_orders"] >= 1
    assert order_id in metrics["completed"]["order_ids"]
    assert metrics["completed"]["count"] == len(metrics["completed"]["order_ids"])
    assert metrics["average_processing_time"] >= 0.02
    assert metrics["average_processing_time_from_creation"] >= metrics["average_processing_time"]


def test_c_metrics_without_ids(fulfilment_service: Serving) -> None:
    """Without getOrderIds the three groups have a count and no list."""
    metrics = fulfilment_service.client.get("/orders/metrics").json()

    assert [set(metrics[group]) for group in ("pending", "processing", "completed")] == [{"count"}] * 3


def test_c_populates(fulfilment_service: Serving) -> None:
    """Service C's populate answers with its own words, and the orders are there and get completed."""
    answer = fulfilment_service.client.post("/orders/populate", json={"total_entries": 4, "batch_id": "batch-7"})
    orders = fulfilment_service.client.get("/orders", params={"limit": 200}).json()["orders"]
    mine = [order["order_id"] for order in orders if order["metadata"].get("batch_id") == "batch-7"]

    assert answer.status_code == 201
    assert answer.json() == {
        "batch_id": "batch-7",
        "errors": [],
        "failure_count": 0,
        "success_count": 4,
        "total_entries": 4,
    }
    assert len(mine) == 4
    assert {fulfilment_service.until_rest(order_id)["status"] for order_id in mine} == {"completed"}


def test_c_errors_are_one_sentence(fulfilment_service: Serving) -> None:
    """Service C's client finds its `error` sentence in a refusal."""
    refused = fulfilment_service.client.post("/orders", json={"user_id": 1})

    assert refused.status_code == 422
    assert "item" in refused.json()["error"]


def test_the_fulfilment_road_never_pays(fulfilment_service: Serving) -> None:
    """With STAGES=fulfilment a priced order is completed without a single call to the gateway."""
    placed = fulfilment_service.client.post("/api/v1/orders", json={"customer_id": "c", "items": [BURGER]})
    order_id = placed.json()["order_id"]
    order = fulfilment_service.until_rest(order_id)

    assert (order["status"], order["payment_status"]) == ("completed", "not_required")
    assert fulfilment_service.client.get(f"/orders/{order_id}/explain").json()["attempts"] == []


# Service D: food delivery.


def test_d_order_is_confirmed(payment_service: Serving) -> None:
    """Service D's order is accepted with 202, charged once, and ends confirmed and paid."""
    client = payment_service.client
    placed = client.post("/api/v1/orders", json={"customer_id": "customer_123", "items": [BURGER]})
    order_id = placed.json()["order_id"]
    order = payment_service.until_rest(order_id)
    attempts = client.get(f"/api/v1/orders/{order_id}/explain").json()["attempts"]

    assert placed.status_code == 202
    assert placed.json()["status"] == "pending"
    assert (order["status"], order["payment_status"]) == ("confirmed", "paid")
    assert (order["total_amount"], order["total_minor"]) == (25.98, 2598)
    assert order["completed_at"] is not None
    assert [(attempt["action"], attempt["outcome"]) for attempt in attempts] == [("charge", "succeeded")]


def test_d_unpriced_order_is_confirmed_without_a_charge(payment_service: Serving) -> None:
    """On the payment road an order without a price passes to confirmed, and the gateway hears nothing of it."""
    placed = payment_service.client.post("/api/v1/orders", json={"customer_id": "c", "item_ids": [1]})
    order_id = placed.json()["order_id"]
    order = payment_service.until_rest(order_id)

    assert (order["status"], order["payment_status"]) == ("confirmed", "not_required")
    assert payment_service.client.get(f"/orders/{order_id}/explain").json()["attempts"] == []


def test_d_reader_of_an_unpriced_order_sees_it_confirmed(payment_service: Serving) -> None:
    """A reader who got the pending order gets the confirmed one as soon as /explain says that it is at rest."""
    client = payment_service.client
    for _ in range(10):
        order_id = client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
        client.get(f"/orders/{order_id}")

        assert payment_service.until_rest(order_id)["status"] == "confirmed"


def test_d_lists_by_customer_status_and_page(payment_service: Serving) -> None:
    """Service D's list takes customer_id, status, page and page_size together."""
    client = payment_service.client
    placed = [
        client.post("/api/v1/orders", json={"customer_id": "lister", "items": [BURGER]}).json()["order_id"]
        for _ in range(3)
    ]
    for order_id in placed:
        payment_service.until_rest(order_id)

    query = {"customer_id": "lister", "status": "confirmed", "page_size": "2"}
    pages = [client.get("/api/v1/orders", params={**query, "page": str(page)}).json() for page in (1, 2)]

    assert [order["order_id"] for page in pages for order in page["orders"]] == placed[::-1]
    assert [(page["page"], page["page_size"]) for page in pages] == [(1, 2), (2, 2)]


def test_d_metrics_count_confirmed_as_completed(payment_service: Serving) -> None:
    """With STAGES=payment the metrics' `completed` are the confirmed orders."""
    order_id = payment_service.client.post("/orders", json={"user_id": 1, "items": [BURGER]}).json()["order_id"]
    payment_service.until_rest(order_id)

    metrics = payment_service.client.get("/api/v1/orders/metrics", params={"getOrderIds": "true"}).json()

    assert order_id in metrics["completed"]["order_ids"]
    assert metrics["completed"]["count"] == metrics["order_status_counts"]["confirmed"]


def test_d_failed_payment_is_tried_three_times(failing_service: Serving) -> None:
    """With a gateway that takes nothing, service D's order ends payment_failed after 3 recorded attempts."""
    client = failing_service.client
    placed = client.post("/api/v1/orders", json={"customer_id": "customer_123", "items": [BURGER]})
    order_id = placed.json()["order_id"]

    order = failing_service.until_rest(order_id)
    explained = client.get(f"/api/v1/orders/{order_id}/explain").json()

    assert placed.status_code == 202
    assert order["status"] == "payment_failed"
    assert order["last_error"]
    attempts = explained["attempts"]
    assert [attempt["number"] for attempt in attempts] == [1, 2, 3]
    assert {attempt["outcome"] for attempt in attempts} == {"unavailable"}
    assert len({attempt["gateway_key"] for attempt in attempts}) == 1
    assert all(attempt["error"] and attempt["started_at"] <= attempt["finished_at"] for attempt in attempts)
    assert explained["at_rest"] is True
    assert explained["next_action"] is None


def test_d_declined_payment_is_not_tried_again(payment_service: Serving) -> None:
    """A definite decline ends in payment_failed after one attempt."""
    body = {"customer_id": "c", "items": [BURGER], "payment_token": "tok_declined"}
    order_id = payment_service.client.post("/api/v1/orders", json=body).json()["order_id"]
    order = payment_service.until_rest(order_id)
    attempts = payment_service.client.get(f"/api/v1/orders/{order_id}/explain").json()["attempts"]

    assert (order["status"], order["payment_status"]) == ("payment_failed", "declined")
    assert [attempt["outcome"] for attempt in attempts] == ["declined"]


def test_d_lost_answer_of_the_gateway_is_settled(payment_service: Serving) -> None:
    """A charge whose answer was lost is looked up, not repeated: the order is confirmed with one charge."""
    body = {"customer_id": "c", "items": [BURGER], "payment_token": "tok_unknown"}
    order_id = payment_service.client.post("/api/v1/orders", json=body).json()["order_id"]
    order = payment_service.until_rest(order_id)
    events = payment_service.client.get(f"/api/v1/orders/{order_id}/events").json()["events"]

    assert (order["status"], order["payment_status"]) == ("confirmed", "paid")
    assert "payment.unknown" in [event["type"] for event in events]


def test_d_accepts_orders_while_the_gateway_is_down(cut_off_service: Serving) -> None:
    """After five failures in a row the breaker is open, /health says degraded, and orders are still accepted."""
    client = cut_off_service.client
    for _ in range(5):
        client.post("/api/v1/orders", json={"customer_id": "c", "items": [BURGER]})
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (health := client.get("/health")).json()["status"] != "degraded" and time.monotonic() < deadline:
        client.get("/orders", params={"limit": 1})

    placed = client.post("/api/v1/orders", json={"customer_id": "c", "items": [BURGER]})
    order_id = placed.json()["order_id"]
    explained = client.get(f"/api/v1/orders/{order_id}/explain").json()

    assert health.status_code == 200
    assert health.json()["status"] == "degraded"
    assert health.json()["dependencies"]["payment_gateway"]["status"] == "degraded"
    assert health.json()["dependencies"]["database"]["status"] == "ok"
    assert placed.status_code == 202
    assert explained["at_rest"] is False
    assert explained["attempts"] == []
    assert "circuit breaker" in explained["why"]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_d_pages_describe_the_interface(service: Serving, path: str) -> None:
    """The two pages of the interface are HTML that reads /openapi.json and nothing from another host."""
    page = service.client.get(path)

    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "/openapi.json" in page.text
    assert re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(?:https?:)?//""", page.text) == []


# Service E: the queue.


def test_e_reads_the_queue(idle_service: Serving) -> None:
    """Service E's /orders/status counts the jobs that wait and names the orders in pending and in processing."""
    client = idle_service.client
    before = client.get("/orders/status").json()
    waiting = client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
    worked_on = client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
    client.patch(f"/orders/{worked_on}/status", json={"status": "processing"})

    queue = client.get("/orders/status").json()

    assert queue["ready"] == before["ready"] + 2
    assert (queue["leased"], queue["dead"]) == (0, 0)
    assert queue["oldest_age_seconds"] >= 0
    assert waiting in queue["pending"]
    assert worked_on in queue["processing"]
    assert client.get("/api/v1/orders/status").json()["ready"] == queue["ready"]


def test_e_orders_are_taken_up_in_the_order_they_came(fulfilment_service: Serving) -> None:
    """Orders placed one after the other are started in that order."""
    placed = [
        fulfilment_service.client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
        for _ in range(10)
    ]
    started = [fulfilment_service.until_rest(order_id)["processing_started_at"] for order_id in placed]

    assert all(started)
    assert started == sorted(started, key=str)


def test_e_metrics_have_both_vocabularies(service: Serving) -> None:
    """One document of metrics has the names of both services, and a count for every status."""
    metrics = service.client.get("/orders/metrics").json()

    assert set(metrics) == {
        "total_orders",
        "average_processing_time",
        "average_processing_time_from_creation",
        "average_processing_time_seconds",
        "pending",
        "processing",
        "completed",
        "order_status_counts",
    }
    assert set(metrics["order_status_counts"]) == {
        "pending",
        "payment_processing",
        "payment_failed",
        "confirmed",
        "processing",
        "completed",
        "failed",
        "cancelled",
    }
    assert metrics["total_orders"] == sum(metrics["order_status_counts"].values())
    assert metrics["average_processing_time_seconds"] == metrics["average_processing_time"]
