"""The breaker over many calls at once: a gateway that fails now and then is healthy, one that is down is not."""

from __future__ import annotations

from pathlib import Path

from auditing import assert_sound, gateway_with_ledger, rows, wait_until
from serving import Serving

ORDERS = 2_000
MANY = {"PAYMENT_MOCK_LATENCY_MIN": "1", "PAYMENT_MOCK_LATENCY_MAX": "5", "STAGES": "payment"}


def place_many(service: Serving, count: int) -> None:
    order = {"customer_id": "c", "items": [{"item_id": "i", "quantity": 1, "price": 1}]}
    answer = service.client.post("/orders/batch", json=[order] * count)
    assert answer.status_code == 200


def test_a_gateway_that_fails_now_and_then_never_opens_it(folder: Path) -> None:
    """With one call in twenty failing, a hundred at once, all is charged, and the breaker is never written."""
    settings = {**MANY, "PAYMENT_GATEWAY": gateway_with_ledger(folder), "PAYMENT_MOCK_SUCCESS_RATE": "0.95"}
    with Serving(folder, PAYMENT_RETRY_ATTEMPTS="20", **settings) as service:
        before = rows(folder, "SELECT * FROM circuit_breakers")
        place_many(service, ORDERS)
        wait_until(lambda: rows(folder, "SELECT count(*) FROM orders WHERE status = 'confirmed'") == [(ORDERS,)])
        assert rows(folder, "SELECT * FROM circuit_breakers") == before
        assert service.client.get("/health").json()["status"] == "healthy"
    assert_sound(folder)


def test_a_gateway_that_is_down_opens_it_at_once(folder: Path) -> None:
    """With every call failing, few more than were under way go out before the breaker is open."""
    with Serving(folder, PAYMENT_MOCK_SUCCESS_RATE="0", WORKER_COUNT="1", **MANY) as service:
        place_many(service, 500)
        wait_until(lambda: rows(folder, "SELECT count(*) FROM circuit_breakers WHERE open_until > 0") == [(1,)])
        wait_until(lambda: rows(folder, "SELECT count(*) FROM jobs WHERE holder IS NOT NULL") == [(0,)])
        (calls,) = rows(folder, "SELECT count(*) FROM payment_attempts WHERE outcome = 'unavailable'")[0]
        assert calls < 100, "25 are under way at once"
        assert service.client.get("/health").json()["status"] == "degraded"
