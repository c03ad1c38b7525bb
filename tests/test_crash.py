"""`kill -9` while orders are under way: what was acknowledged is there, and nobody pays twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import pytest

from auditing import (
    assert_sound,
    charges,
    gateway_with_ledger,
    held,
    jobs_left,
    order_ids,
    rows,
    wait_until,
    working,
)
from serving import Serving

#: Connections over which a client places orders.
CONNECTIONS = 64
#: Seconds that all orders together may take to come to rest after a crash: a killed worker's leases last 30.
REST_SECONDS_MAX = 75.0

SLOW = {
    "PAYMENT_MOCK_LATENCY_MIN": "5",
    "PAYMENT_MOCK_LATENCY_MAX": "40",
    "FULFILMENT_MOCK_LATENCY_MIN": "5",
    "FULFILMENT_MOCK_LATENCY_MAX": "40",
}

Order = dict[str, Any]


def an_order(number: int, **fields: object) -> Order:
    items = [{"item_id": number, "quantity": 1 + number % 3, "price": f"{number % 50 + 1}.25"}]
    return {"customer_id": number, "items": items, **fields}


class Client:
    """Places orders, each under a key of its own, and remembers every 2xx."""

    def __init__(self, orders: dict[str, Order]) -> None:
        self.orders = orders
        self.acknowledged: dict[str, str] = {}
        self.refused: list[str] = []

    def missing(self) -> Iterator[str]:
        return iter([key for key in self.orders if key not in self.acknowledged])

    async def place(self, url: str, keys: Iterator[str], noticed: Callable[[int], None] = lambda _: None) -> None:
        """Send the orders of `keys` until there are no more or the service is gone."""
        limits = httpx2.Limits(max_connections=CONNECTIONS)
        async with httpx2.AsyncClient(base_url=url, timeout=30.0, limits=limits) as http:

            async def send() -> None:
                for key in keys:
                    try:
                        response = await http.post(
                            "/orders", json=self.orders[key], headers={"Idempotency-Key": key}
                        )
                    except httpx2.TransportError:
                        return
                    if response.is_success:
                        self.acknowledged[key] = response.json()["order_id"]
                        noticed(len(self.acknowledged))
                    else:
                        self.refused.append(response.text)

            await asyncio.gather(*(send() for _ in range(CONNECTIONS)))

    def place_and_kill(self, service: Serving, after: int) -> None:
        """Place the missing orders, and kill the service once `after` in all are acknowledged."""

        def kill(acknowledged: int) -> None:
            if acknowledged == after:
                service.process.kill()

        asyncio.run(self.place(service.url, self.missing(), kill))
        service.kill()

    def place_the_rest(self, service: Serving) -> None:
        """Place the orders that were not acknowledged, under the keys that they had."""
        asyncio.run(self.place(service.url, self.missing()))


def wait_for_rest(folder: Path) -> None:
    """Wait until no order has a next action."""
    wait_until(lambda: jobs_left(folder) == 0, REST_SECONDS_MAX)


def counts(service: Serving) -> dict[str, int]:
    """Return how many orders there are by status, from /orders/metrics."""
    found = service.client.get("/orders/metrics").json()["order_status_counts"]
    return {status: count for status, count in found.items() if count}


def stored_counts(folder: Path) -> dict[str, int]:
    """Return the same from the rows."""
    return dict(rows(folder, "SELECT status, count(*) FROM orders GROUP BY status"))


def test_a_killed_service_keeps_every_acknowledged_order(folder: Path) -> None:
    """After `kill -9` amid 2,000 orders each acknowledged one is there, comes to rest, and is charged once."""
    # Every other order has an id of the client's own, the rest get one from the service.
    orders = {
        f"key-{number}": an_order(number, **({"order_id": f"mine-{number}"} if number % 2 else {}))
        for number in range(2_000)
    }
    client = Client(orders)
    settings = {"PAYMENT_GATEWAY": gateway_with_ledger(folder), **SLOW}
    # So slow that there is always something left to do.
    slower = {"FULFILMENT_MOCK_LATENCY_MIN": "1000", "FULFILMENT_MOCK_LATENCY_MAX": "1000"}
    with Serving(folder, **settings | slower) as service:
        client.place_and_kill(service, after=1_000)
    acknowledged = dict(client.acknowledged)
    assert len(acknowledged) >= 1_000
    assert jobs_left(folder) > 0, "the crash came too late to show anything"
    assert set(acknowledged.values()) <= order_ids(folder)
    assert_sound(folder)

    with Serving(folder, "--no-workers", **settings) as service:
        assert counts(service) == stored_counts(folder)
    with Serving(folder, **settings) as service:
        client.place_the_rest(service)
        wait_for_rest(folder)
        assert counts(service) == stored_counts(folder) == {"completed": 2_000}
        for order_id in list(acknowledged.values())[::100]:
            assert service.client.get(f"/orders/{order_id}").json()["status"] == "completed"
        assert service.stop() == 0
    assert client.refused == []
    assert len(client.acknowledged) == 2_000
    assert order_ids(folder) == set(client.acknowledged.values())
    assert len(charges(folder)) == 2_000
    assert_sound(folder)


def test_a_repeated_key_gives_one_order_across_a_crash(folder: Path) -> None:
    """Requests repeated with their Idempotency-Key after `kill -9` make no second order."""
    client = Client({f"key-{number}": an_order(number) for number in range(600)})
    with Serving(folder) as service:
        client.place_and_kill(service, after=300)
    before = dict(client.acknowledged)
    stored = order_ids(folder)
    assert set(before.values()) <= stored

    with Serving(folder) as service:
        asyncio.run(client.place(service.url, iter(client.orders)))
        repeated = service.client.post(
            "/orders", json=client.orders["key-0"], headers={"Idempotency-Key": "key-0"}
        )
    assert repeated.headers["idempotency-replayed"] == "true"
    assert client.refused == []
    assert {key: client.acknowledged[key] for key in before} == before
    assert stored <= order_ids(folder) == set(client.acknowledged.values())
    assert len(order_ids(folder)) == 600


@pytest.mark.parametrize("seed", [1, 2])
def test_repeated_kills_lose_and_repeat_nothing(folder: Path, seed: int) -> None:
    """Killed three times at chosen moments, amid declines and lost answers, it brings each order to rest."""
    random = Random(seed)
    tokens = [None] * 8 + ["tok_declined", "tok_unknown"]
    orders = {}
    for number in range(600):
        token = random.choice(tokens)
        orders[f"key-{number}"] = an_order(number, **({"payment_token": token} if token else {}))
    client = Client(orders)
    settings = {
        "PAYMENT_GATEWAY": gateway_with_ledger(folder) + f"?seed={seed}",
        **SLOW,
        "PAYMENT_MOCK_SUCCESS_RATE": "0.9",
        "PAYMENT_RETRY_ATTEMPTS": "2",
        "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "10000",
    }
    for after in sorted(random.sample(range(50, 550), 3)):
        with Serving(folder, **settings) as service:
            client.place_and_kill(service, after)
        assert set(client.acknowledged.values()) <= order_ids(folder)
        assert_sound(folder)

    with Serving(folder, **settings) as service:
        client.place_the_rest(service)
        wait_for_rest(folder)
        assert counts(service) == stored_counts(folder)
        assert service.stop() == 0
    assert client.refused == []
    assert order_ids(folder) == set(client.acknowledged.values())
    assert len(client.acknowledged) == 600
    assert_sound(folder)
    ends = dict(rows(folder, "SELECT order_id, status || ' ' || payment_status FROM orders"))
    for key, order in orders.items():
        # Where every try found the gateway away, an order that could have been paid is declined as well.
        declined = order.get("payment_token") == "tok_declined"
        possible = {"payment_failed declined"} if declined else {"payment_failed declined", "completed paid"}
        assert ends[client.acknowledged[key]] in possible
    assert list(ends.values()).count("completed paid") == len(charges(folder)) > 500


def test_a_killed_worker_process_is_replaced_by_another(folder: Path) -> None:
    """Orders that a killed `work` process held are finished by another one, and the serving process goes on."""
    settings = {"PAYMENT_GATEWAY": gateway_with_ledger(folder), **SLOW, "PAYMENT_MOCK_LATENCY_MAX": "1000"}
    client = Client({f"key-{number}": an_order(number) for number in range(400)})
    with Serving(folder, "--no-workers", **settings) as service:
        with working(folder, **settings) as first:
            client.place_the_rest(service)
            wait_until(lambda: held(folder) > 0)
            first.kill()
        assert held(folder) > 0
        with working(folder, **settings) as second:
            wait_for_rest(folder)
            assert counts(service) == {"completed": 400}
            assert second.stop() == 0
    assert client.refused == []
    assert len(charges(folder)) == 400
    assert_sound(folder)
