"""Idempotency keys with INTAKE=queued: one key, one order and one answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx2

from auditing import rows
from queueing import BURGER, PEN, Doors, new_id, order, shared_doors  # noqa: F401 - the fixture "doors"
from serving import Serving


def test_a_key_never_carries_a_refused_command_past_the_queue(doors: Doors) -> None:
    """What is refused because of commands that still wait is refused with an Idempotency-Key, too."""
    order_id = doors.placed()
    other = order(order_id, {"name": "Ink", "quantity": 9})
    for client in doors.clients:
        answer = client.post("/orders", json=other, headers={"Idempotency-Key": f"other-{order_id}"})
        assert answer.status_code == 409, answer.text
    assert rows(doors.folder, "SELECT count(*) FROM orders WHERE order_id = ?", order_id) == [(0,)]
    doors.drain()
    stored = doors.placed()
    doors.drain()  # it is stored, and at rest
    for status in ("payment_processing", "cancelled"):
        answer = doors.one.client.patch(
            f"/orders/{stored}/status", json={"status": status}, headers={"Idempotency-Key": f"{status}-{stored}"}
        )
        assert answer.status_code == 409
    document = doors.two.client.get(f"/orders/{order_id}").json()
    assert (document["items"][0]["name"], document["last_error"]) == ("Pen", None)


def test_a_key_has_one_answer_wherever_and_whenever_it_is_asked(doors: Doors) -> None:
    """The same key and body bring the same 202, marked, at both processes, before and after it is stored."""
    body, key = order(None, BURGER), {"Idempotency-Key": f"key-{new_id()}"}
    first = doors.place(body, **key)
    order_id = first.json()["order_id"]

    def assert_replayed() -> None:
        for client in doors.clients:
            again = client.post("/orders", json=body, headers=key)
            assert (again.status_code, again.headers.get("idempotency-replayed")) == (202, "true"), again.text
            assert again.json() == first.json()
            assert again.headers["location"] == first.headers["location"]
            other = client.post("/orders", json=order(None, BURGER, PEN | {"price": 1}), headers=key)
            assert other.status_code == 422

    assert_replayed()
    doors.drain()
    assert_replayed()
    doors.redis.flushdb()
    assert_replayed()
    doors.redis.delete("temp_orders:since")
    customers = rows(doors.folder, "SELECT count(*) FROM orders WHERE order_id = ?", order_id)
    assert customers == [(1,)]


def test_a_key_of_queued_intake_is_known_to_direct_intake(doors: Doors) -> None:
    """After INTAKE is set back to direct, a key that came before still brings its 202 and no second order."""
    body, key = order(None, BURGER), {"Idempotency-Key": f"key-{new_id()}"}
    first = doors.place(body, **key)
    change = {"Idempotency-Key": f"key-{new_id()}"}
    path = f"/orders/{first.json()['order_id']}/cancel"
    cancelled = doors.two.client.post(path, headers=change)
    doors.apply()
    doors.drain()
    with Serving(doors.folder, "--no-workers", **{**doors.settings, "INTAKE": "direct"}) as direct:
        again = direct.client.post("/orders", json=body, headers=key)
        assert (again.status_code, again.json()) == (202, first.json())
        again = direct.client.post(path, headers=change)
        assert (again.status_code, again.json()) == (cancelled.status_code, cancelled.json())


def test_fifty_duplicates_at_once_make_one_order(doors: Doors) -> None:
    """Fifty concurrent requests with one key at two processes make one order and have one answer."""
    body, key = order(None, BURGER) | {"customer_name": "Duplicate"}, {"Idempotency-Key": f"key-{new_id()}"}

    def send(number: int) -> httpx2.Response:
        while True:
            answer = doors.clients[number % 2].post("/orders", json=body, headers=key)
            if answer.status_code != 409:
                return answer
            assert "under way" in answer.json()["error"]

    with ThreadPoolExecutor(16) as senders:
        answers = list(senders.map(send, range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["order_id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    doors.drain()
    stored = "SELECT count(*) FROM orders WHERE customer_name = 'Duplicate'"
    assert rows(doors.folder, stored) == [(1,)]


def test_a_key_that_redis_forgot_makes_one_order(doors: Doors) -> None:
    """If Redis forgets a key before its order is stored, a second request with it is for the same order."""
    body, key = order(None, BURGER), {"Idempotency-Key": f"key-{new_id()}"}
    first = doors.place(body, **key).json()["order_id"]
    doors.redis.delete(f"temp_order:{first}", f"idempotency:{key['Idempotency-Key']}")
    second = doors.two.client.post("/orders", json=body, headers=key)
    assert (second.status_code, second.json()["order_id"]) == (202, first)
    doors.drain()
    doors.until(first, "completed")
    again = doors.one.client.post("/orders", json=body, headers=key)
    assert (again.status_code, again.json()["order_id"]) == (202, first)
