"""Changing, cancelling, retrying and deleting orders with INTAKE=queued."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx2

from auditing import rows, wait_until
from queueing import Doors, new_id, order, shared_doors  # noqa: F401 - the fixture "doors"
from serving import Program, Serving


def test_changes_are_accepted_and_applied_in_their_order(doors: Doors) -> None:
    """PATCH, cancel, retry and DELETE are 202; GET shows the order as it is, and how many changes wait."""
    moved, cancelled, retried, deleted = (doors.placed() for _ in range(4))
    one, two = doors.clients
    for changes, status in ((1, "processing"), (2, "completed")):
        answer = one.patch(f"/orders/{moved}/status", json={"status": status})
        read = two.get(f"/orders/{moved}")
        for each in (answer, read):
            document = each.json()
            assert (document["status"], document["version"], document["pending_changes"]) == (
                "pending",
                1,
                changes,
            )
            # A change that comes to nothing ends without another version.
            assert "etag" not in each.headers
        assert (answer.status_code, read.status_code) == (202, 200)
        one, two = two, one
    assert one.post(f"/orders/{cancelled}/cancel").status_code == 202
    for status in ("processing", "failed"):
        assert one.patch(f"/api/v1/orders/{retried}/status", json={"status": status}).status_code == 202
    assert two.post(f"/api/v1/orders/{retried}/retry").status_code == 202
    gone = one.delete(f"/orders/{deleted}")
    assert (gone.status_code, gone.json()["order_id"], gone.json()["pending_changes"]) == (202, deleted, 1)
    orders = (moved, cancelled, retried, deleted)
    for order_id, changes in zip(orders, (2, 1, 3, 1), strict=True):
        for answer in doors.both(f"/orders/{order_id}"):
            assert answer.json()["pending_changes"] == changes
            assert answer.json()["status"] == "pending"
    doors.apply()
    for order_id, status in zip(orders, ("completed", "cancelled", "processing", "404"), strict=True):
        assert doors.states(order_id) == {status}
        assert ["pending_changes" in answer.json() for answer in doors.both(f"/orders/{order_id}")] == [
            False,
            False,
        ]
    doors.drain()
    for order_id, status in zip(orders, ("completed", "cancelled", "completed", "404"), strict=True):
        assert doors.states(order_id) == {status}
    refused = "SELECT order_id, data FROM events WHERE type = 'command.refused' AND order_id IN (?, ?, ?, ?)"
    assert rows(doors.folder, refused, *orders) == []


def test_a_deleted_order_is_gone_before_redis_hears_of_it(doors: Doors) -> None:
    """Stored by a worker that died before it said so, and deleted at once: a change of it is 404, not accepted."""
    doors.drain()  # else the worker dies at something that an earlier test has left
    order_id = doors.placed()
    worker = Program(doors.folder, "work", **doors.settings, EXPEDITER_TEST_POINTS="applied:kill:1")
    try:
        wait_until(lambda: worker.process.poll() is not None)
    finally:
        worker.kill()
    with Serving(doors.folder, "--no-workers", **{**doors.settings, "INTAKE": "direct"}) as direct:
        wait_until(lambda: direct.client.delete(f"/orders/{order_id}").status_code == 204)
    assert doors.temporary(order_id)["state"] == "pending"
    for client in doors.clients:
        assert client.post(f"/orders/{order_id}/cancel").status_code == 404
        assert client.get(f"/orders/{order_id}").status_code == 404


def test_what_cannot_be_is_refused_before_it_is_queued(doors: Doors) -> None:
    """An illegal move is 409 with the legal ones, a stale If-Match 412, an unknown order 404, and quickly."""
    order_id = doors.placed()
    client = doors.two.client
    assert client.post("/orders", json=order(order_id)).status_code == 409
    doors.apply()
    illegal = client.patch(f"/orders/{order_id}/status", json={"status": "completed"})
    assert (illegal.status_code, illegal.json()["legal"]) == (409, ["processing", "cancelled"])
    stale = client.patch(f"/orders/{order_id}/status", json={"status": "cancelled"}, headers={"If-Match": '"7"'})
    assert (stale.status_code, stale.headers["etag"]) == (412, '"1"')
    assert client.post(f"/orders/{order_id}/retry").status_code == 409
    assert client.post("/orders", json=order(order_id)).status_code == 409
    assert "pending_changes" not in client.get(f"/orders/{order_id}").json()
    good = client.post(f"/orders/{order_id}/cancel", headers={"If-Match": '"1"'})
    assert good.status_code == 202
    doors.drain()
    started = time.monotonic()
    assert client.get("/orders/NOBODY").status_code == 404
    assert client.patch("/orders/NOBODY/status", json={"status": "cancelled"}).status_code == 404
    assert client.delete("/orders/NOBODY").status_code == 404
    assert client.post("/orders/NOBODY/cancel").status_code == 404
    assert time.monotonic() - started < 5


def test_commands_on_one_order_are_applied_in_their_order(doors: Doors) -> None:
    """Create, two moves and a deletion in quick succession all take effect, with two workers at it."""
    moves: list[tuple[str, str]] = []
    road = {"FULFILMENT_MOCK_LATENCY_MIN": "8000", "FULFILMENT_MOCK_LATENCY_MAX": "8000"}

    def shop(number: int) -> None:
        order_id = new_id()
        with httpx2.Client(base_url=(doors.one, doors.two)[number % 2].url, timeout=30) as client:
            other = (doors.two, doors.one)[number % 2].client
            answers = [client.post("/orders", json=order(order_id)).status_code]
            answers.append(other.post(f"/orders/{order_id}/cancel").status_code)
            if number % 3:
                answers.append(client.delete(f"/orders/{order_id}").status_code)
                moves.append((order_id, "404"))
            else:
                moves.append((order_id, "cancelled"))
            assert set(answers) == {202}, answers

    with ThreadPoolExecutor(6) as shoppers, doors.worker(**road), doors.worker(**road):
        for done in [shoppers.submit(shop, number) for number in range(120)]:
            done.result()
        wait_until(lambda: not doors.pending())
        # At once: a process looks twice, with a pause between, before it says that there is no such order.
        for done in [shoppers.submit(doors.until, *move) for move in moves]:
            done.result()
    refused = "SELECT order_id, data FROM events WHERE type = 'command.refused'"
    known = {order_id for order_id, _ in moves}
    assert [row for row in rows(doors.folder, refused) if row[0] in known] == []


def test_the_id_of_a_deleted_order_is_refused_at_once(doors: Doors) -> None:
    """An id is used once, also when nothing in Redis remembers its order any more."""
    order_id = doors.placed()
    assert doors.one.client.delete(f"/orders/{order_id}").status_code == 202
    doors.apply()
    assert not doors.temporary(order_id)
    for client in doors.clients:
        answer = client.post("/orders", json=order(order_id))
        assert (answer.status_code, "deleted" in answer.json()["error"]) == (409, True), answer.text
