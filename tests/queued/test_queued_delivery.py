"""Messages that come twice, late, from a dead worker, after their queue was lost, or not as commands at all."""

from __future__ import annotations

import time

from auditing import assert_sound, rows, wait_until
from queueing import BURGER, STREAM, Doors, locked, order, shared_doors  # noqa: F401 - the fixture "doors"


def test_a_message_that_comes_again_changes_nothing(doors: Doors) -> None:
    """Messages that are in the queue twice, and once more at the end, make one order and one charge."""
    doors.drain()
    fresh = doors.place(order(None, BURGER)).json()["order_id"]
    named = doors.placed(BURGER)
    cancelled = doors.placed(BURGER)
    assert doors.two.client.post(f"/orders/{cancelled}/cancel").status_code == 202
    bodies = doors.messages()
    assert bodies
    doors.publish(*bodies, *bodies)
    doors.apply()
    doors.drain()
    doors.until(fresh, "completed")
    before = [doors.both(f"/orders/{each}/events")[0].json() for each in (fresh, named, cancelled)]
    doors.publish(*bodies, *reversed(bodies))
    doors.drain()
    for each, status in ((fresh, "completed"), (named, "completed"), (cancelled, "cancelled")):
        assert doors.states(each) == {status}
    assert [doors.both(f"/orders/{each}/events")[0].json() for each in (fresh, named, cancelled)] == before
    assert_sound(doors.folder)
    attempts = "SELECT order_id, count(*) FROM payment_attempts WHERE order_id IN (?, ?, ?) GROUP BY order_id"
    assert sorted(rows(doors.folder, attempts, fresh, named, cancelled)) == sorted([(fresh, 1), (named, 1)])
    assert doors.redis.exists(f"temp_order:{fresh}")


def test_a_worker_killed_amid_application_loses_nothing(doors: Doors) -> None:
    """Commands in the hands of a worker that is killed are applied by the next one, once and in their order."""
    with locked(doors.folder):
        with doors.worker() as doomed:
            ids = [doors.placed() for _ in range(5)]
            wait_until(doors.taken)
            doomed.kill()
        for order_id in ids[:2]:
            assert doors.two.client.post(f"/orders/{order_id}/cancel").status_code == 202
        if doors.rabbit is None:
            doors.let_a_minute_pass()
    # Slowly, so that every order can still be cancelled when its cancellation is applied.
    slow = {"FULFILMENT_MOCK_LATENCY_MIN": "3000", "FULFILMENT_MOCK_LATENCY_MAX": "3000"}
    with doors.worker(LEASE_SECONDS="10", DRAIN_SECONDS="0.1", **slow) as slow_worker:
        for order_id in ids[:2]:
            doors.until(order_id, "cancelled")
        slow_worker.stop()
    doors.drain()
    for order_id in ids[2:]:
        doors.until(order_id, "completed")
    for order_id in ids[:2]:
        types = [event["type"] for event in doors.one.client.get(f"/orders/{order_id}/events").json()["events"]]
        assert types[-1] == "order.cancelled"
        assert "command.refused" not in types
    assert_sound(doors.folder)


def test_a_change_waits_for_the_order_that_a_dead_worker_holds(doors: Doors) -> None:
    """A change whose order is in the hands of a killed worker is applied after it."""
    if doors.rabbit is not None:
        return  # it gives back at once what a dead worker held
    with locked(doors.folder):
        with doors.worker() as doomed:
            order_id = doors.placed()
            wait_until(doors.taken)
            doomed.kill()
        assert doors.two.client.post(f"/orders/{order_id}/cancel").status_code == 202
    with doors.busy_worker():
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            for answer in doors.both(f"/orders/{order_id}"):
                document = answer.json()
                assert (document["status"], document.get("pending_changes")) in (
                    ("pending", 1),
                    ("cancelled", None),
                )
        for entry in doors.streams.xpending_range(STREAM, "workers", "-", "+", 100):
            mine = entry["message_id"]
            doors.streams.xclaim(STREAM, "workers", entry["consumer"], 0, [mine], idle=86_400_000)
        doors.until(order_id, "cancelled")
    types = [event["type"] for event in doors.one.client.get(f"/orders/{order_id}/events").json()["events"]]
    assert types == ["order.placed", "order.cancelled"]


def test_what_is_no_command_is_put_aside(doors: Doors) -> None:
    """Garbage in the queue lands among the dead, /health says so, and orders behind it are stored."""
    doors.drain()
    order_id = doors.placed()
    (create,) = doors.messages()
    other = b'[{"token":"x","command":{"type":"ClaimJob","order_id":"A"}}]'
    garbage = [b"", b"garbage", b"\xff\xfe", b"{}", b'[{"token":"x"}]', b"[null]", b'[{"token":1}]', other]
    doors.publish(*garbage, create, b"[]")
    doors.drain()
    doors.until(order_id, "completed")
    for client in doors.clients:
        health = client.get("/health").json()
        queue = health["dependencies"]["queue"]
        assert (health["status"], queue["status"]) == ("degraded", "degraded")
        assert f"{len(garbage)} are put aside" in queue["detail"]
    if doors.rabbit is None:
        dead = doors.streams.xrange("orders:commands:dead")
        assert all(fields.get(b"reason") or fields.get("reason") for _, fields in dead)
        doors.streams.delete("orders:commands:dead")
    else:
        doors.rabbit.query("", f"DELETE {doors.settings['RABBITMQ_QUEUE_NAME']}.dead")


def test_redis_flushed_before_the_order_is_stored(doors: Doors) -> None:
    """An accepted order is never a 404 while Redis has forgotten it, is shown again, and is stored in the end."""
    order_id = doors.placed(BURGER)
    moved = doors.placed()
    assert doors.one.client.post(f"/orders/{moved}/cancel").status_code == 202
    assert doors.states(order_id) == {"pending"}
    doors.redis.flushdb()
    if doors.rabbit is not None:
        doors.lose_the_queue()
    seen: set[str] = set()

    def shown_again() -> bool:
        seen.update(doors.states(order_id), doors.states(moved))
        return bool(doors.temporary(order_id)) and bool(doors.temporary(moved))

    wait_until(shown_again)
    assert seen <= {"503", "pending"}
    wait_until(lambda: doors.one.client.get(f"/orders/{moved}").json().get("pending_changes") == 1)
    doors.apply()
    doors.drain()
    doors.until(order_id, "completed")
    doors.until(moved, "cancelled")


def test_a_lost_queue_is_filled_again(doors: Doors) -> None:
    """Commands whose queue or stream was deleted are given to the broker again, and applied in their order."""
    order_id, moved = doors.placed(BURGER), doors.placed()
    assert doors.one.client.post(f"/orders/{moved}/cancel").status_code == 202
    doors.lose_the_queue()
    slow = {"FULFILMENT_MOCK_LATENCY_MIN": "10000", "FULFILMENT_MOCK_LATENCY_MAX": "10000"}
    with doors.worker(DRAIN_SECONDS="0.1", **slow):
        doors.until(order_id, "processing")
        doors.until(moved, "cancelled")
    assert doors.both(f"/orders/{moved}/events")[0].json()["events"][-1]["type"] == "order.cancelled"
