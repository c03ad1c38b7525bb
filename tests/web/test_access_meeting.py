"""Keys and several processes: what one of them makes or revokes counts at the others, on each database."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from expediter.store.keys import LOOK_SECONDS, LOOK_SECONDS_MAX
from servers import DurableRedisServer, PostgresServer
from serving import ADMIN_PASSWORD, PATIENCE_SECONDS, Serving
from storing import Place

ADMIN = {"X-Admin-Password": ADMIN_PASSWORD}
#: Seconds in which a key counts, or counts no more, at every process: one is promised, and machines may be slow.
WITHIN_SECONDS = 3.0


@contextmanager
def two_doors(folder: Path, address: str) -> Iterator[tuple[Serving, Serving]]:
    """Two serving processes on one database."""
    settings = {"DATABASE_URL": address, "ADMIN_PASSWORD": ADMIN_PASSWORD}
    with Serving(folder, "--no-workers", **settings) as one, Serving(folder, "--no-workers", **settings) as other:
        yield one, other


def make(door: Serving, name: str, *scopes: str) -> dict[str, Any]:
    made = door.client.post("/admin/keys", json={"name": name, "scopes": scopes}, headers=ADMIN)
    assert made.status_code == 201, made.text
    document: dict[str, Any] = made.json()
    return document


def seconds_until(fact: Callable[[], bool]) -> float:
    """Return how long it took until `fact` held."""
    began = time.monotonic()
    while not fact():
        assert time.monotonic() - began < 10 * WITHIN_SECONDS
    return time.monotonic() - began


def place(door: Serving, key: str | None, text: str, name: str) -> httpx2.Response:
    """Place an order under an Idempotency-Key."""
    headers = {"Idempotency-Key": text, **({"X-API-Key": key} if key else {})}
    order = {"customer_name": name, "items": [{"name": "Pen", "quantity": 1, "price": 2}]}
    return door.client.post("/api/v1/orders", json=order, headers=headers)


def test_keys_count_everywhere_within_a_second(folder: Path, at: Place) -> None:
    """A first key closes the other process; a revoked one is refused there, and its stream there ends."""
    with two_doors(folder, at.address) as (one, other):
        kept = place(one, None, "T", "Ann")

        first = make(one, "first", "orders:read", "orders:write")
        assert one.client.get("/orders").status_code == 401, "where it was made it counts at once"
        assert seconds_until(lambda: other.client.get("/orders").status_code == 401) < WITHIN_SECONDS
        second = make(one, "second", "orders:write")
        belonging(one, other, kept, first["key"], second["key"])

        reader = make(one, "reader", "events:read")
        seconds_until(lambda: listen(other, reader["key"]).status_code == 200)
        with streamed(other, reader["key"]) as over:
            revoked = one.client.delete(f"/admin/keys/{reader['id']}", headers=ADMIN)
            assert revoked.json()["revoked_at"] is not None
            took = seconds_until(lambda: listen(other, reader["key"]).status_code == 401)
            assert over.wait(WITHIN_SECONDS), "the stream goes on"
        assert took < WITHIN_SECONDS
        again = one.client.delete(f"/admin/keys/{reader['id']}", headers=ADMIN)
        assert again.json()["revoked_at"] == revoked.json()["revoked_at"]

        # With the last key gone nobody is asked any more: this service can be reached from this machine only.
        for each in (first, second):
            one.client.delete(f"/admin/keys/{each['id']}", headers=ADMIN)
        assert seconds_until(lambda: other.client.get("/orders").status_code == 200) < WITHIN_SECONDS


def belonging(one: Serving, other: Serving, kept: httpx2.Response, first: str, second: str) -> None:
    """An Idempotency-Key belongs to its API key; what was kept before there were any answers the same request."""
    seconds_until(lambda: place(other, second, "U", "Bob").status_code == 202)
    by_first, by_second = place(one, first, "U", "Ann"), place(other, second, "U", "Bob")
    assert by_first.json()["order_id"] != by_second.json()["order_id"]
    assert by_second.headers["idempotency-replayed"] == "true" and "idempotency-replayed" not in by_first.headers
    assert place(other, first, "U", "Ann").json() == by_first.json()
    assert place(other, first, "U", "Bob").status_code == 422

    same = place(other, second, "T", "Ann")
    assert (same.json(), same.headers["idempotency-replayed"]) == (kept.json(), "true")
    free = place(other, second, "T", "Bob")
    assert free.status_code == 202 and free.json()["order_id"] != kept.json()["order_id"]
    rows = [{"customer_name": "Eve", "items": [{"name": "Pen", "quantity": 1}]}]
    verdicts = [
        door.client.post("/orders/batch", json=rows, headers={"Idempotency-Key": "B", "X-API-Key": key}).json()
        for door, key in ((one, first), (other, second), (other, first))
    ]
    ids = [each["results"][0]["order_id"] for each in verdicts]
    assert ids[0] == ids[2] != ids[1]


def listen(door: Serving, key: str) -> httpx2.Response:
    return door.client.get("/api/v1/events", headers={"X-API-Key": key})


@contextmanager
def streamed(door: Serving, key: str) -> Iterator[threading.Event]:
    """Follow the events with a key; what is yielded is set once the service has ended the stream in order."""
    over, begun = threading.Event(), threading.Event()

    def follow() -> None:
        headers = {"Accept": "text/event-stream", "X-API-Key": key}
        with httpx2.stream(
            "GET", f"{door.url}/api/v1/events", headers=headers, timeout=PATIENCE_SECONDS
        ) as answer:
            begun.set()
            for _ in answer.iter_lines():
                pass
        over.set()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        assert begun.wait(PATIENCE_SECONDS)
        yield over
    finally:
        thread.join(PATIENCE_SECONDS)


def test_what_is_known_goes_on_counting_while_the_database_hangs(
    folder: Path, postgresql: PostgresServer, mortal_redis: DurableRedisServer
) -> None:
    """Orders are taken in from who has a key, and refused to others, for longer than a look at keys may take."""
    redis = mortal_redis.new_database()
    settings = {"DATABASE_URL": postgresql.made_database(), "REDIS_URL": redis, "BROKER_URL": redis}
    with Serving(folder, "--no-workers", INTAKE="queued", ADMIN_PASSWORD=ADMIN_PASSWORD, **settings) as service:
        key = make(service, "till", "orders:write")["key"]
        with postgresql.frozen():
            until = time.monotonic() + LOOK_SECONDS + LOOK_SECONDS_MAX + 0.5
            while time.monotonic() < until:
                assert service.client.get("/orders", headers={"X-API-Key": key}).status_code == 403
                assert service.client.get("/orders").status_code == 401
            order = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 1}]}
            taken = service.client.post("/orders", json=order, headers={"X-API-Key": key})
            assert taken.status_code == 202, taken.text
            assert service.client.post("/orders", json=order).status_code == 401
