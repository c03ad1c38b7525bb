"""Placing orders with INTAKE=queued: what is answered 202, who can read it, and what is stored."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from auditing import rows, wait_until
from queueing import BURGER, Doors, locked, new_id, order, shared_doors  # noqa: F401 - the fixture "doors"
from serving import Serving


def test_an_accepted_order_is_read_everywhere_before_anybody_works(doors: Doors) -> None:
    """POST answers 202 with id, Location and ETag, and both processes show the order while no worker runs."""
    for path in ("/orders", "/api/v1/orders"):
        placed = doors.place(order(None, BURGER), path)
        order_id = placed.json()["order_id"]
        assert placed.headers["location"] == f"{path}/{order_id}"
        assert placed.headers["etag"] == '"1"'
        for answer in doors.both(f"{path}/{order_id}"):
            assert (answer.status_code, answer.headers["etag"]) == (200, '"1"'), answer.text
            document = answer.json()
            assert (document["status"], document["total_amount"]) == ("pending", 25.98)
            assert document == {key: placed.json()[key] for key in document}
        assert doors.temporary(order_id)["state"] == "pending"
        assert doors.temporary(order_id)["order"]["items"][0]["name"] == "Burger"
        assert rows(doors.folder, "SELECT count(*) FROM orders WHERE order_id = ?", order_id) == [(0,)]


def test_a_stored_order_is_the_accepted_one(doors: Doors) -> None:
    """A worker stores the order as it was accepted, temp_order ends a second later, and reads go on."""
    placed = doors.place(order(None, BURGER)).json()
    order_id = placed["order_id"]
    with doors.worker(TEMP_ORDER_CACHE_TTL="1"):
        doors.until(order_id, "completed")
        assert int(doors.redis.pttl(f"temp_order:{order_id}")) <= 1000  # type: ignore[arg-type]
        wait_until(lambda: not doors.temporary(order_id))
    for answer in doors.both(f"/orders/{order_id}"):
        document = answer.json()
        assert document["created_at"] == placed["created_at"]
        for name in ("items", "total_minor", "customer_name", "metadata", "currency"):
            assert document[name] == placed[name]
    events = doors.two.client.get(f"/orders/{order_id}/events").json()["events"]
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    assert events[0]["at"] == placed["created_at"]


def test_bad_input_is_refused_as_ever(doors: Doors) -> None:
    """422, 400, 415 and 413 are what they are with direct intake, and nothing is queued."""
    depth = doors.queue_depth()
    with Serving(doors.folder, "--no-workers", **{**doors.settings, "INTAKE": "direct"}) as direct:
        json_type = {"Content-Type": "application/json"}
        bad: list[tuple[bytes, dict[str, str]]] = [
            (b"{", json_type),
            (b"{}", json_type),
            (b'{"customer_name": "Ann", "items": []}', json_type),
            (b'{"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 1}], "colour": 1}', json_type),
            (b'{"customer_name": "Ann", "items": [{"name": "Pen", "quantity": -1}]}', json_type),
            (b'{"order_id": "metrics", "user_id": 1, "item_ids": [1]}', json_type),
            (b"x" * (1024 * 1024 + 1), json_type),
            (json.dumps(order()).encode(), {"Content-Type": "text/plain"}),
            (json.dumps(order()).encode(), json_type | {"Idempotency-Key": "a" * 256}),
        ]
        for body, headers in bad:
            answers = [
                client.post("/orders", content=body, headers=headers)
                for client in (doors.one.client, direct.client)
            ]
            facts = [
                (answer.status_code, {k: v for k, v in answer.json().items() if k != "request_id"})
                for answer in answers
            ]
            assert facts[0] == facts[1]
            assert facts[0][0] in (400, 413, 415, 422)
    assert doors.queue_depth() == depth


def test_back_to_direct_while_commands_wait(doors: Doors) -> None:
    """Workers with INTAKE=direct still apply what waits in the queue."""
    order_id = doors.placed(BURGER)
    with doors.worker(INTAKE="direct"):
        doors.until(order_id, "completed")


def test_who_asks_for_more_than_was_accepted_is_told_to_wait(doors: Doors) -> None:
    """events and explain of an order that nobody has stored are 503 with Retry-After, wait ends with its time."""
    order_id = doors.placed()
    with ThreadPoolExecutor(3) as askers:
        asked = [
            askers.submit(doors.two.client.get, f"/orders/{order_id}{path}", timeout=30)
            for path in ("/events", "/explain", "?wait=0.5")
        ]
        events, explain, waited = (each.result() for each in asked)
    for answer in (events, explain):
        assert (answer.status_code, answer.headers.get("retry-after")) == (503, "1"), answer.text
    assert (waited.status_code, waited.json()["status"]) == (200, "pending")
    with ThreadPoolExecutor(3) as askers, doors.worker():
        with locked(doors.folder):
            order_id = doors.placed()
            asked = [
                askers.submit(doors.two.client.get, f"/orders/{order_id}{path}", timeout=30)
                for path in ("/events", "/explain", "?wait=20")
            ]
        events, explain, waited = (each.result() for each in asked)
    assert [answer.status_code for answer in (events, explain, waited)] == [200, 200, 200]
    assert waited.json()["version"] > 1


def test_a_batch_takes_no_id_that_waits_in_the_queue(doors: Doors) -> None:
    """A row of a batch whose id was accepted before is refused, and the others are stored."""
    waiting, free = doors.placed(), new_id()
    other = [order(waiting, {"name": "Ink", "quantity": 9}), order(free), order()]
    answer = doors.two.client.post("/orders/batch", json=other)
    assert [row["status"] for row in answer.json()["results"]] == [409, 202, 202], answer.text
    doors.drain()
    assert doors.one.client.get(f"/orders/{waiting}").json()["items"][0]["name"] == "Pen"
    doors.until(free, "completed")
