"""The breaker over many calls at once: a gateway that fails now and then is healthy, one that is down is not."""

from __future__ import annotations

import time
from pathlib import Path

from auditing import assert_sound, gateway_with_ledger, rows, wait_until
from expediter.orders.resilience import RETRIES_PER_CALL, RETRY_BURST, RETRY_SECONDS
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


def test_retries_are_a_tenth_of_first_calls_while_the_gateway_fails(folder: Path) -> None:
    """With a breaker that never opens, a failing gateway gets the burst, a tenth, and one more a second."""
    settings = {**MANY, "PAYMENT_MOCK_SUCCESS_RATE": "0", "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000000"}
    began = time.monotonic()
    with Serving(folder, PAYMENT_RETRY_ATTEMPTS="20", **settings) as service:
        place_many(service, ORDERS)
        postponed = "SELECT count(*) FROM events WHERE type = 'payment.postponed'"
        wait_until(lambda: rows(folder, postponed)[0][0] > ORDERS)
        calls = "SELECT count(*), count(DISTINCT order_id) FROM payment_attempts WHERE outcome = 'unavailable'"
        ended, first = rows(folder, calls)[0]
        assert first == ORDERS
        assert (
            ended - first <= RETRY_BURST + ORDERS * RETRIES_PER_CALL + (time.monotonic() - began) / RETRY_SECONDS
        )
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
