"""Idempotency-Key: the same request again does nothing, and says what the first one said."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import httpx2
import pytest

from serving import PATIENCE_SECONDS, Serving
from wire import burst, request

BODY = {"customer_id": "c", "items": [{"name": "Pen", "quantity": 1, "price": "1.20"}]}


def fresh_key() -> str:
    return uuid.uuid4().hex


def send(service: Serving, method: str, path: str, key: str, body: Any = None) -> httpx2.Response:
    return service.client.request(method, path, json=body, headers={"Idempotency-Key": key})


def place(service: Serving) -> str:
    order_id: str = service.client.post("/orders", json=BODY).json()["order_id"]
    return order_id


def total(service: Serving) -> int:
    count: int = service.client.get("/orders").json()["total"]
    return count


def same(first: httpx2.Response, second: httpx2.Response) -> None:
    """Check that `second` is `first` replayed."""
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert second.status_code == first.status_code
    assert second.content == first.content
    for name in ("content-type", "etag", "location"):
        assert second.headers.get(name) == first.headers.get(name)


#: The same order, written in other ways.
OTHER_WAYS = (
    '{"customer_id": "c", "items": [{"name": "Pen", "quantity": 1, "price": "1.20"}], '
    '"metadata": {"a": 1, "b": 2}}',
    '{"metadata":{"b":2,"a":1},"items":[{"price":1.2,"quantity":1,"name":"Pen"}],"customer_id":"c"}',
    '{"user_id": "c", "items": [{"item_name": "Pen", "quantity": 1, "unit_price": "1.2"}],\n"metadata": '
    '{"a": 1.0, "b": 2}, "total_amount": 1.2, "order_id": null}',
)


def test_the_same_request_in_other_words_is_the_same(idle_service: Serving) -> None:
    """What counts is what a request asks for: not blanks, the order of fields, or how numbers are written."""
    key = {"Idempotency-Key": fresh_key(), "Content-Type": "application/json"}
    answers = [idle_service.client.post("/orders", content=body, headers=key) for body in OTHER_WAYS]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert len({answer.content for answer in answers}) == 1
    other = idle_service.client.post("/orders", json=BODY | {"customer_id": "d"}, headers=key)
    assert (other.status_code, other.json()["order_id"]) == (422, answers[0].json()["order_id"])
    assert answers[0].json()["order_id"] in other.json()["error"]


def test_a_changed_setting_makes_no_other_request(folder: Any) -> None:
    """Sent again to a service that was started anew with other stages, a request is still the same."""
    key = fresh_key()
    with Serving(folder, "--no-workers", STAGES="payment") as before:
        first = send(before, "POST", "/orders", key, BODY)
    with Serving(folder, "--no-workers", STAGES="fulfilment") as after:
        same(first, send(after, "POST", "/orders", key, BODY))


def test_two_keys_are_400(idle_service: Serving) -> None:
    """A request has one Idempotency-Key."""
    headers = [("Idempotency-Key", fresh_key()), ("Idempotency-Key", fresh_key())]
    assert idle_service.client.post("/orders", json=BODY, headers=headers).status_code == 400


@pytest.mark.parametrize("path", ["/orders", "/api/v1/orders"])
def test_placing_again_replays(idle_service: Serving, path: str) -> None:
    """The same POST with the same key answers the same bytes, status, ETag and Location, and makes no order."""
    before, key = total(idle_service), fresh_key()
    first = send(idle_service, "POST", path, key, BODY)
    second = send(idle_service, "POST", path + "/", key, BODY)

    same(first, second)
    assert first.is_success
    assert total(idle_service) == before + 1


def test_a_replay_is_the_answer_of_then(idle_service: Serving) -> None:
    """A replay shows the order as it was when it was placed, whatever has become of it."""
    key = fresh_key()
    first = send(idle_service, "POST", "/orders", key, BODY)
    order_id = first.json()["order_id"]
    idle_service.client.post(f"/orders/{order_id}/cancel")
    cancelled = send(idle_service, "POST", "/orders", key, BODY)
    idle_service.client.delete(f"/orders/{order_id}")
    deleted = send(idle_service, "POST", "/orders", key, BODY)

    same(first, cancelled)
    same(first, deleted)


@pytest.mark.parametrize("path", ["/orders", "/api/v1/orders"])
def test_moving_again_replays(idle_service: Serving, path: str) -> None:
    """The same PATCH again replays, although the move would now be illegal."""
    order_id, key = place(idle_service), fresh_key()
    body = {"status": "payment_processing"}
    first = send(idle_service, "PATCH", f"{path}/{order_id}/status", key, body)
    second = send(idle_service, "PATCH", f"{path}/{order_id}/status", key, body)

    assert first.status_code == 200
    same(first, second)
    assert idle_service.client.get(f"/orders/{order_id}").json()["version"] == 2


def test_cancelling_again_replays(idle_service: Serving) -> None:
    """The same cancel again replays with 202."""
    order_id, key = place(idle_service), fresh_key()
    first, second = (send(idle_service, "POST", f"/orders/{order_id}/cancel", key) for _ in range(2))

    assert first.status_code == 202
    same(first, second)


def test_retrying_again_replays(idle_service: Serving) -> None:
    """The same retry again replays, and the order is taken up once."""
    order_id, key = place(idle_service), fresh_key()
    for status in ("payment_processing", "payment_failed"):
        idle_service.client.patch(f"/orders/{order_id}/status", json={"status": status})
    first, second = (send(idle_service, "POST", f"/orders/{order_id}/retry", key) for _ in range(2))

    assert first.status_code == 202
    same(first, second)


def test_deleting_again_replays(idle_service: Serving) -> None:
    """The same DELETE again replays its 204, where without the key it would be a 404."""
    order_id, key = place(idle_service), fresh_key()
    first, second = (send(idle_service, "DELETE", f"/orders/{order_id}", key) for _ in range(2))

    assert first.status_code == 204
    same(first, second)
    assert idle_service.client.delete(f"/orders/{order_id}").status_code == 404


def test_populating_again_replays(idle_service: Serving) -> None:
    """The same populate again with its key makes no more orders."""
    before, key = total(idle_service), fresh_key()
    body = {"total_entries": 3, "batch_id": "b-1"}
    first, second = (send(idle_service, "POST", "/orders/populate", key, body) for _ in range(2))

    assert (first.status_code, second.status_code) == (201, 201)
    assert total(idle_service) == before + 3
    same(first, second)


def test_seeding_again_replays(idle_service: Serving) -> None:
    """The same /admin/seed again with its key makes no more orders."""
    before, key = total(idle_service), fresh_key()
    body = {"count": 3, "admin_password": "open sesame"}
    first, second = (send(idle_service, "POST", "/admin/seed", key, body) for _ in range(2))

    assert (first.status_code, second.status_code) == (201, 201)
    assert total(idle_service) == before + 3
    same(first, second)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/orders", {**BODY, "customer_id": "d"}),
        ("/orders", {**BODY, "currency": "EUR"}),
        ("/orders/{order_id}/cancel", None),
        ("/orders/{order_id}/status", {"status": "cancelled"}),
    ],
)
def test_another_request_under_the_key_is_422(idle_service: Serving, path: str, body: Any) -> None:
    """A key that was used for another request is refused with 422, and nothing is done."""
    key, before = fresh_key(), place(idle_service)
    send(idle_service, "POST", "/orders", key, BODY)
    count = total(idle_service)
    refused = send(idle_service, "PATCH" if "status" in path else "POST", path.format(order_id=before), key, body)

    assert refused.status_code == 422
    assert "Idempotency-Key" in refused.json()["error"]
    assert refused.headers["content-type"] == "application/problem+json"
    assert total(idle_service) == count
    assert idle_service.client.get(f"/orders/{before}").json()["status"] == "pending"


@pytest.mark.parametrize(
    ("path", "first", "second"),
    [
        ("/orders/populate", {"total_entries": 2}, {"total_entries": 3}),
        (
            "/admin/seed",
            {"count": 2, "admin_password": "open sesame"},
            {"count": 3, "admin_password": "open sesame"},
        ),
    ],
)
def test_another_count_under_the_key_is_422(idle_service: Serving, path: str, first: Any, second: Any) -> None:
    """A key under which orders were made up is refused with 422 for another number of them, and none is made."""
    key = fresh_key()
    made = send(idle_service, "POST", path, key, first)
    before = total(idle_service)
    refused = send(idle_service, "POST", path, key, second)

    assert (made.status_code, refused.status_code) == (201, 422)
    assert total(idle_service) == before


def test_resetting_again_replays(idle_service: Serving) -> None:
    """The same /admin/reset again with its key replays, and spares the orders placed since."""
    key, password = fresh_key(), {"admin_password": "open sesame"}
    place(idle_service)
    first = send(idle_service, "POST", "/admin/reset", key, password)
    order_id = place(idle_service)
    second = send(idle_service, "POST", "/admin/reset", key, password)

    assert first.status_code == 200
    same(first, second)
    assert idle_service.client.get(f"/orders/{order_id}").status_code == 200


def test_the_same_key_for_another_order_is_422(idle_service: Serving) -> None:
    """A key belongs to one call on one order."""
    first, second, key = place(idle_service), place(idle_service), fresh_key()
    send(idle_service, "POST", f"/orders/{first}/cancel", key)

    assert send(idle_service, "POST", f"/orders/{second}/cancel", key).status_code == 422
    assert idle_service.client.get(f"/orders/{second}").json()["status"] == "pending"


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "schlüssel"])
@pytest.mark.parametrize("call", ["POST", "PATCH", "DELETE", "cancel", "populate"])
def test_a_malformed_key_is_400(idle_service: Serving, call: str, key: str) -> None:
    """A key that is empty, too long, or not of visible ASCII is refused, and nothing is done."""
    order_id = place(idle_service)
    method, path, body = {
        "POST": ("POST", "/orders", BODY),
        "PATCH": ("PATCH", f"/orders/{order_id}/status", {"status": "cancelled"}),
        "DELETE": ("DELETE", f"/orders/{order_id}", None),
        "cancel": ("POST", f"/orders/{order_id}/cancel", None),
        "populate": ("POST", "/orders/populate", {"total_entries": 1}),
    }[call]
    before = total(idle_service)
    refused = idle_service.client.request(method, path, json=body, headers={"Idempotency-Key": key.encode()})

    assert refused.status_code == 400
    assert "Idempotency-Key" in refused.json()["error"]
    assert total(idle_service) == before
    assert idle_service.client.get(f"/orders/{order_id}").json()["status"] == "pending"


@pytest.mark.parametrize(
    "key", ["k", "x" * 255, "!~#$%&'()*+,-./:;<=>?@[]^_`{|}", '"8e03978e-40d5-43dd-bc93-6894a57f9324"']
)
def test_a_good_key_is_taken(idle_service: Serving, key: str) -> None:
    """A key is 1 to 255 visible ASCII characters, in quotes or not."""
    place_id = place(idle_service)
    answer = send(idle_service, "POST", f"/orders/{place_id}/cancel", key)

    assert answer.status_code == 202


def test_a_refused_request_keeps_no_key(idle_service: Serving) -> None:
    """A request that was refused may be mended and sent again under its key."""
    key = fresh_key()
    refused = send(idle_service, "POST", "/orders", key, {**BODY, "items": []})
    mended = send(idle_service, "POST", "/orders", key, BODY)

    assert (refused.status_code, mended.status_code) == (422, 201)
    assert "idempotency-replayed" not in mended.headers


def test_a_conflict_keeps_no_key(idle_service: Serving) -> None:
    """A move that was illegal is tried afresh under its key once it is legal."""
    order_id, key = place(idle_service), fresh_key()
    body = {"status": "confirmed"}
    refused = send(idle_service, "PATCH", f"/orders/{order_id}/status", key, body)
    idle_service.client.patch(f"/orders/{order_id}/status", json={"status": "payment_processing"})
    taken = send(idle_service, "PATCH", f"/orders/{order_id}/status", key, body)

    assert (refused.status_code, taken.status_code) == (409, 200)
    assert "idempotency-replayed" not in taken.headers


async def test_100_concurrent_duplicates_make_one_order(service: Serving) -> None:
    """100 equal requests under one key, sent at once, make one order; one is new, 99 are marked as replays."""
    before, headers = total(service), {"Idempotency-Key": fresh_key()}
    async with httpx2.AsyncClient(base_url=service.url, timeout=PATIENCE_SECONDS) as client:
        answers = await asyncio.gather(*(client.post("/orders", json=BODY, headers=headers) for _ in range(100)))

    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 99
    assert total(service) == before + 1


def test_duplicates_that_arrive_at_the_same_instant_make_one_order(idle_service: Serving) -> None:
    """Equal requests that are stored together in one transaction make one order, too."""
    before = total(idle_service)
    body = json.dumps(BODY).encode()
    raw = request("POST", "/orders", body, content_type="application/json", idempotency_key=fresh_key())
    answers = burst(idle_service.url, [raw] * 50)

    assert {answer.status for answer in answers} == {201}
    assert len({answer.body for answer in answers}) == 1
    assert total(idle_service) == before + 1


@pytest.mark.parametrize("call", ["PATCH", "DELETE", "cancel"])
def test_equal_changes_at_the_same_instant_are_made_once(idle_service: Serving, call: str) -> None:
    """Equal changes under one key that arrive together all get the answer of the one that was made."""
    for _ in range(5):
        order_id, key = place(idle_service), fresh_key()
        method, path, body = {
            "PATCH": ("PATCH", f"/orders/{order_id}/status", b'{"status": "payment_processing"}'),
            "DELETE": ("DELETE", f"/orders/{order_id}", b""),
            "cancel": ("POST", f"/orders/{order_id}/cancel", b""),
        }[call]
        raw = request(method, path, body, content_type="application/json", idempotency_key=key)
        answers = burst(idle_service.url, [raw] * 40)

        assert {answer.status for answer in answers} == {{"PATCH": 200, "DELETE": 204, "cancel": 202}[call]}
        assert len({answer.body for answer in answers}) == 1
        assert sum("idempotency-replayed" in answer.headers for answer in answers) == 39


def test_one_key_for_many_orders_at_the_same_instant_moves_one(idle_service: Serving) -> None:
    """One key on forty cancels of forty orders, sent at once, cancels one order; the others are 422."""
    for _ in range(5):
        ids, key = [place(idle_service) for _ in range(40)], fresh_key()
        raws = [request("POST", f"/orders/{order_id}/cancel", b"", idempotency_key=key) for order_id in ids]
        answers = burst(idle_service.url, raws)
        statuses = [idle_service.client.get(f"/orders/{order_id}").json()["status"] for order_id in ids]

        assert sorted(answer.status for answer in answers) == [202] + [422] * 39
        assert statuses.count("cancelled") == 1


def test_a_key_outlives_a_killed_process(folder: Any) -> None:
    """A request that was answered before kill -9 is replayed by the process that comes after it."""
    key = fresh_key()
    with Serving(folder, "--no-workers") as first_process:
        first = send(first_process, "POST", "/orders", key, BODY)
        first_process.kill()
    with Serving(folder, "--no-workers") as second_process:
        second = send(second_process, "POST", "/orders", key, BODY)

        same(first, second)
        assert total(second_process) == 1
