"""Commands that were accepted and are refused when they are applied: the order shows why."""

from __future__ import annotations

import json

from auditing import rows, wait_until
from queueing import Doors, order, shared_doors  # noqa: F401 - the fixture "doors"


def test_a_refusal_after_acceptance_is_shown(doors: Doors) -> None:
    """An order that was accepted under a taken id is noted as a command.refused of the one that has it."""
    doors.drain()
    order_id = doors.placed()
    (create,) = doors.messages()
    doors.redis.delete(f"temp_order:{order_id}")
    doors.publish(create)
    other = order(order_id, {"name": "Ink", "quantity": 9})
    # Another client takes the same id while nobody can know of the first.
    answer = doors.two.client.post("/orders", json=other)
    assert answer.status_code == 202, answer.text
    doors.drain()
    document = doors.one.client.get(f"/orders/{order_id}").json()
    assert document["items"][0]["name"] == "Pen"
    events = doors.two.client.get(f"/orders/{order_id}/events").json()["events"]
    (refused,) = [event for event in events if event["type"] == "command.refused"]
    assert "already exists" in json.dumps(refused["data"])


def test_a_change_of_what_has_moved_on_is_refused_visibly(doors: Doors) -> None:
    """A cancellation that comes too late is refused visibly, and no reader sees time go back."""
    order_id, cancel = "", b""

    def stored() -> list[tuple[str]]:
        return rows(doors.folder, "SELECT status FROM orders WHERE order_id = ?", order_id)

    versions: list[int] = []
    # A worker that takes more than five seconds to begin sends the cancellation again by itself, and in time.
    while stored() != [("completed",)]:
        doors.drain()
        order_id = doors.placed()
        (create,) = doors.messages()
        assert doors.one.client.post(f"/orders/{order_id}/cancel").status_code == 202
        (cancel,) = doors.messages()
        doors.publish(create)
        with doors.worker():
            wait_until(lambda: stored() in ([("completed",)], [("cancelled",)]))
    with doors.worker():
        versions += [answer.json()["version"] for answer in doors.both(f"/orders/{order_id}")]
        doors.publish(cancel)
        doors.until(order_id, "completed")
    versions += [answer.json()["version"] for answer in doors.both(f"/orders/{order_id}")]
    assert versions == sorted(versions)
    document = doors.two.client.get(f"/orders/{order_id}").json()
    assert "refused" in document["last_error"] and "cancelled" in document["last_error"]
    types = [event["type"] for event in doors.one.client.get(f"/orders/{order_id}/events").json()["events"]]
    assert types[-1] == "command.refused"
