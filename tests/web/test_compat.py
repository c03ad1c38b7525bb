"""The five services' clients: each set-up is started by COMPAT alone, and called as its clients call it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from auditing import wait_until
from expediter.errors import DatabaseUnavailable
from expediter.store.keys import KeyRing
from expediter.web.compat.tables import DELIVERY
from expediter.web.compat.translation import Translation
from expediter.web.http import Body, Call, Reply, answered
from expediter.web.problems import problem_reply
from servers import RedisServer
from serving import ADMIN_PASSWORD, Serving

PEN = {"customer_name": "Alice", "items": [{"name": "Pen", "quantity": 2}]}
BURGER = {
    "customer_id": "customer_123",
    "items": [{"item_id": "item_001", "item_name": "Burger", "quantity": 2, "price": 12.99}],
}
BOOKS = {"user_id": 1, "order_id": "ORD003", "item_ids": [101, 102, 103], "total_amount": 59.99}
PAGE = {"origin": "http://localhost:5173"}
NAIVE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("cached"), COMPAT="cached", ADMIN_PASSWORD=ADMIN_PASSWORD) as running:
        yield running


@pytest.fixture(scope="module")
def queued(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[Serving]:
    address = redis_server.new_database()
    settings = {"BROKER_URL": address, "REDIS_URL": address, "ADMIN_PASSWORD": ADMIN_PASSWORD}
    with Serving(tmp_path_factory.mktemp("queued"), COMPAT="queued", **settings) as running:
        yield running


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("processor"), COMPAT="processor") as running:
        yield running


@pytest.fixture(scope="module")
def delivery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("delivery"), COMPAT="delivery") as running:
        yield running


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("streams"), COMPAT="streams") as running:
        yield running


@pytest.fixture(params=["cached", "queued"])
def by_hand(request: pytest.FixtureRequest) -> Serving:
    """The services whose callers move the orders."""
    running: Serving = request.getfixturevalue(request.param)
    return running


def placed(service: Serving, body: dict[str, Any] = PEN, path: str = "/orders") -> dict[str, Any]:
    answer = service.client.post(path, json=body)
    assert answer.status_code in (200, 201, 202), answer.text
    order: dict[str, Any] = answer.json()
    return order


def until(service: Serving, order_id: str, status: str) -> dict[str, Any]:
    """Return the order once it is shown in this status."""
    found: dict[str, Any] = {}

    def there() -> bool:
        found.update(service.client.get(f"/orders/{order_id}").json())
        return bool(found["status"] == status)

    wait_until(there)
    return found


# The cached orders API, and the same with queued writes.


def test_a_new_order_is_received(by_hand: Serving) -> None:
    """It is shown as `received` in the answer, alone and in lists, and nobody moves it on."""
    order = placed(by_hand)
    assert (order["status"], order["message"]) == ("received", "Order created")
    assert by_hand.client.get(f"/orders/{order['order_id']}").json()["status"] == "received"
    listed = by_hand.client.get("/orders").json()["orders"]
    shown = {each["order_id"]: each["status"] for each in listed}
    assert shown.get(order["order_id"], "received") == "received"
    assert "pending" not in shown.values()


def test_the_codes_of_a_new_order(cached: Serving, queued: Serving) -> None:
    """201 where it is stored, 202 where it is queued."""
    assert cached.client.post("/orders", json=PEN).status_code == 201
    assert queued.client.post("/orders", json=PEN).status_code == 202


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("preparing", "processing"),
        ("processing", "processing"),
        ("shipped", "processing"),
        ("completed", "completed"),
        ("delivered", "completed"),
        ("cancelled", "cancelled"),
        ("received", "received"),
        ("Delivered", "completed"),
    ],
)
def test_a_status_in_the_services_words(cached: Serving, queued: Serving, word: str, shown: str) -> None:
    """From received straight to any of them; 200 with the order, or 202 and soon."""
    order_id = placed(cached)["order_id"]
    answer = cached.client.patch(f"/orders/{order_id}/status", json={"status": word})
    assert (answer.status_code, answer.json()["status"]) == (200, shown)
    assert cached.client.get(f"/orders/{order_id}").json()["status"] == shown

    order_id = placed(queued)["order_id"]
    answer = queued.client.patch(f"/orders/{order_id}/status", json={"status": word})
    assert answer.status_code == 202
    assert answer.json()["order_id"] == order_id
    until(queued, order_id, shown)


def test_all_moves_of_one_change_are_one_step(cached: Serving) -> None:
    """A delivered order was begun before: its history has both, and nobody ever saw it between."""
    order_id = placed(cached)["order_id"]
    cached.client.patch(f"/orders/{order_id}/status", json={"status": "delivered"})
    events = cached.client.get(f"/orders/{order_id}/events").json()["events"]
    assert [event["type"] for event in events] == ["order.placed", "fulfilment.started", "order.completed"]
    assert len({event["at"] for event in events[1:]}) == 1


def test_a_move_that_does_not_exist_is_refused(cached: Serving) -> None:
    """What is delivered is not received again."""
    order_id = placed(cached)["order_id"]
    cached.client.patch(f"/orders/{order_id}/status", json={"status": "delivered"})
    refused = cached.client.patch(f"/orders/{order_id}/status", json={"status": "received"})
    assert refused.status_code == 409
    assert refused.json().keys() == {"error"}


def test_money_is_not_passed_over(cached: Serving) -> None:
    """An order with a price is charged; a change that would go around that is refused."""
    order_id = placed(cached, BURGER)["order_id"]
    until(cached, order_id, "confirmed")
    answer = cached.client.patch(f"/orders/{order_id}/status", json={"status": "delivered"})
    assert (answer.json()["status"], answer.json()["payment_status"]) == ("completed", "paid")


def test_a_quantity_may_be_digits(by_hand: Serving) -> None:
    """As a form sends it."""
    order = placed(by_hand, {**PEN, "items": [{"name": "Pen", "quantity": "3"}]})
    assert order["items"][0]["quantity"] == 3


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"customer_name": "Alice", "items": []},
        {**PEN, "items": [{"name": "Pen", "quantity": "many"}]},
        {**PEN, "items": [{"name": "Pen", "quantity": 0}]},
        {**PEN, "colour": "red"},
    ],
)
def test_a_refusal_is_400_and_a_sentence(by_hand: Serving, body: dict[str, Any]) -> None:
    """Also for a status that there is not, and for what is no JSON."""
    refused = by_hand.client.post("/orders", json=body)
    assert (refused.status_code, refused.headers["content-type"]) == (400, "application/json")
    assert list(refused.json()) == ["error"]


def test_other_refusals_are_a_sentence(by_hand: Serving) -> None:
    """404, what is no JSON, a member that is given twice, and a status that there is not."""
    client = by_hand.client
    # A Redis that has just started is asked again what it may have forgotten.
    wait_until(lambda: client.get("/orders/ORD-none").status_code != 503)
    unknown = client.get("/orders/ORD-none")
    assert (unknown.status_code, unknown.json()) == (404, {"error": "Order not found"})
    json_type = {"content-type": "application/json"}
    for broken in ("{", '{"customer_name": "A", "customer_name": "B", "items": [{"name": "Pen", "quantity": 1}]}'):
        refused = client.post("/orders", content=broken, headers=json_type)
        assert (refused.status_code, list(refused.json())) == (400, ["error"])
    order_id = placed(by_hand)["order_id"]
    assert client.patch(f"/orders/{order_id}/status", json={"status": "lost"}).status_code == 400


def test_a_list_without_limit_has_all(tmp_path_factory: pytest.TempPathFactory) -> None:
    """450 orders in one list, in the order of the pages; with counts, and no next offset."""
    with Serving(tmp_path_factory.mktemp("all"), COMPAT="cached", ADMIN_PASSWORD=ADMIN_PASSWORD) as service:
        client = service.client
        empty = client.get("/orders").json()
        assert (empty["orders"], empty["count"], empty["total_orders"]) == ([], 0, 0)
        client.post("/admin/seed", json={"count": 450, "password": ADMIN_PASSWORD})
        whole = client.get("/orders").json()
        assert (whole["count"], whole["total_orders"], whole["next_offset"]) == (450, 450, None)
        assert len({order["order_id"] for order in whole["orders"]}) == 450
        pages = [client.get("/orders", params={"limit": 200, "offset": offset}).json() for offset in (0, 200, 400)]
        assert [page["next_offset"] for page in pages] == [200, 400, None]
        assert [page["count"] for page in pages] == [200, 200, 50]
        ids = [order["order_id"] for page in pages for order in page["orders"]]
        assert [order["order_id"] for order in whole["orders"]] == ids
        rest = client.get("/orders", params={"offset": "425"}).json()
        assert [order["order_id"] for order in rest["orders"]] == ids[425:]


def test_a_list_of_all_has_a_bound_that_it_says(folder: Path) -> None:
    """10,000 orders at once; `next_offset` leads to the rest."""
    with Serving(folder, "--no-workers", COMPAT="cached", ADMIN_PASSWORD=ADMIN_PASSWORD) as service:
        service.client.post("/admin/seed", json={"count": 10_050, "password": ADMIN_PASSWORD})
        whole = service.client.get("/orders").json()
        assert (whole["count"], whole["total_orders"], whole["next_offset"]) == (10_000, 10_050, 10_000)
        assert len({order["order_id"] for order in whole["orders"]}) == 10_000
        rest = service.client.get("/orders", params={"offset": whole["next_offset"]}).json()
        assert (rest["count"], rest["next_offset"]) == (50, None)


@pytest.mark.parametrize(
    ("query", "limit", "offset"),
    [
        ({"limit": "0"}, 1, 0),
        ({"limit": "-5"}, 1, 0),
        ({"limit": "1000"}, 200, 0),
        ({"limit": "5", "offset": "-3"}, 5, 0),
        ({"limit": "5", "offset": "99999999999"}, 5, 1_000_000),
    ],
)
def test_limits_are_brought_into_their_range(
    cached: Serving, query: dict[str, str], limit: int, offset: int
) -> None:
    """Out of range they are not refused."""
    page = cached.client.get("/orders", params=query).json()
    assert (page["limit"], page["offset"]) == (limit, offset)


def test_a_list_is_filtered_by_the_services_words(cached: Serving) -> None:
    """`received` is a filter, too."""
    order_id = placed(cached)["order_id"]
    listed = cached.client.get("/orders", params={"status": "received", "limit": "1"}).json()
    assert [order["order_id"] for order in listed["orders"]] == [order_id]


def test_a_deletion_is_told(cached: Serving, queued: Serving) -> None:
    """200, or 202 where it is queued, with a message; then the order is gone."""
    for service, code in ((cached, 200), (queued, 202)):
        order_id = placed(service)["order_id"]
        answer = service.client.delete(f"/orders/{order_id}")
        assert (answer.status_code, answer.json()["order_id"]) == (code, order_id)
        assert answer.json()["message"]
        wait_until(
            lambda service=service, order_id=order_id: service.client.get(f"/orders/{order_id}").status_code == 404
        )  # type: ignore[misc]
        wait_until(
            lambda service=service, order_id=order_id: (
                service.client.delete(f"/orders/{order_id}").status_code == 404
            )
        )  # type: ignore[misc]


def test_a_page_of_any_origin_may_call(by_hand: Serving, delivery: Serving) -> None:
    """These services let every origin in."""
    for service in (by_hand, delivery):
        answer = service.client.post("/orders", json=PEN, headers=PAGE)
        assert answer.headers["access-control-allow-origin"] == "*"
        assert service.client.get("/orders/none", headers=PAGE).headers["access-control-allow-origin"] == "*"


def test_the_admin_calls_take_password(by_hand: Serving) -> None:
    """`password` in the body; a wrong one is a sentence."""
    wrong = by_hand.client.post("/admin/seed", json={"count": 2, "password": "no"})
    assert (wrong.status_code, list(wrong.json())) == (401, ["error"])
    assert by_hand.client.post("/admin/seed", json={"count": 2, "password": ADMIN_PASSWORD}).status_code == 201


def test_the_canonical_paths_speak_as_ever(cached: Serving, processor: Serving) -> None:
    """Under /api/v1 nothing is in other words."""
    for service in (cached, processor):
        answer = service.client.post("/api/v1/orders", json=PEN)
        assert (answer.status_code, answer.json()["status"]) == (202, "pending")
        assert service.client.post("/api/v1/orders", json={}).status_code == 422
        assert service.client.get("/api/v1/orders?limit=1000").status_code == 422


# The in-process order processor.


def test_the_processor_words_its_statuses_with_a_capital(processor: Serving) -> None:
    """Pending, then Completed; times without zone; durations in seconds."""
    answer = processor.client.post("/orders", json=BOOKS)
    assert (answer.status_code, answer.json()["status"], answer.json()["order_id"]) == (201, "Pending", "ORD003")
    done = until(processor, "ORD003", "Completed")
    for name in ("created_at", "processing_started_at", "completed_at"):
        assert NAIVE.fullmatch(done[name])
    assert done["item_ids"] == "101,102,103"
    assert done["total_amount"] == 59.99
    assert done["total_duration"] >= done["processing_duration"]
    assert processor.client.get("/orders", params={"status": "Completed"}).json()["orders"]


def test_the_processor_refuses_with_400(processor: Serving) -> None:
    """Every refusal of a body, a taken id, a taken batch; an unknown order is 404."""
    client = processor.client
    first = placed(processor, {**BOOKS, "order_id": "ORD004"})
    for refused in (
        client.post("/orders", json={**BOOKS, "order_id": first["order_id"]}),
        client.post("/orders", json={"user_id": 1}),
        client.post("/orders", json={**BOOKS, "total_amount": "much"}),
        client.post("/orders/populate", json={"total_entries": 0}),
    ):
        assert (refused.status_code, list(refused.json())) == (400, ["error"])
    assert client.post("/orders/populate", json={"total_entries": 2, "batch_id": "twice"}).status_code == 201
    assert client.post("/orders/populate", json={"total_entries": 2, "batch_id": "twice"}).status_code == 400
    unknown = client.get("/orders/ORD-none")
    assert (unknown.status_code, unknown.json()) == (404, {"error": "Order not found"})


def test_the_processor_always_lists_ids_in_its_metrics(processor: Serving) -> None:
    """Empty where they are not asked for."""
    plain = processor.client.get("/orders/metrics").json()
    assert [plain[name]["order_ids"] for name in ("pending", "processing", "completed")] == [[], [], []]
    placed(processor, {**BOOKS, "order_id": "ORD005"})
    until(processor, "ORD005", "Completed")
    asked = processor.client.get("/orders/metrics", params={"getOrderIds": "true"}).json()
    assert "ORD005" in asked["completed"]["order_ids"]
    assert asked["completed"]["count"] == len(asked["completed"]["order_ids"])


# The food-delivery service.


@pytest.mark.parametrize("path", ["/orders", "/api/v1/orders"])
def test_a_delivery_is_paid_and_confirmed(delivery: Serving, path: str) -> None:
    """Its answer says payment_processing; then it has its id as `id`, and each attempt to charge it."""
    answer = delivery.client.post(path, json=BURGER)
    order = answer.json()
    assert answer.status_code == (202 if path.startswith("/api") else 201)
    assert (order["status"], order["id"]) == ("payment_processing", order["order_id"])
    done = until(delivery, order["order_id"], "confirmed")
    assert done["id"] == order["order_id"]
    (attempt,) = done["payment_attempts"]
    assert (attempt["attempt_number"], attempt["status"], attempt["amount"], attempt["error"]) == (
        1,
        "success",
        25.98,
        None,
    )
    assert attempt["created_at"]
    listed = delivery.client.get(path, params={"customer_id": "customer_123", "page": 1, "page_size": 200}).json()
    (shown,) = [each for each in listed["orders"] if each["order_id"] == order["order_id"]]
    assert shown["payment_attempts"] == [attempt]


def test_a_declined_delivery_has_its_attempt(delivery: Serving) -> None:
    """What the gateway has said of it."""
    order_id = placed(delivery, {**BURGER, "payment_token": "tok_declined"})["order_id"]
    done = until(delivery, order_id, "payment_failed")
    (attempt,) = done["payment_attempts"]
    assert attempt["status"] == "failed"
    assert attempt["error"]


def test_a_delivery_is_refused_as_fastapi_does(delivery: Serving) -> None:
    """422 with where, what and of which kind; 404 with a sentence."""
    refused = delivery.client.post(
        "/api/v1/orders", json={"customer_id": "c", "items": [{"item_id": "i", "quantity": 0, "price": 1}]}
    )
    assert refused.status_code == 422
    (fault,) = refused.json()["detail"]
    assert fault["loc"] == ["body", "items", 0, "quantity"]
    assert fault["msg"]
    assert fault["type"]
    (fault,) = delivery.client.get("/api/v1/orders", params={"page": 0}).json()["detail"]
    assert fault["loc"] == ["query", "page"]
    unknown = delivery.client.get("/api/v1/orders/none")
    assert (unknown.status_code, unknown.json()["detail"]) == (404, "Order not found")


def test_a_list_of_deliveries_always_has_a_total(delivery: Serving) -> None:
    """A number for every filter, also beyond a thousand."""
    rows = "\n".join(['{"customer_id": "many", "item_ids": [1]}'] * 1_005)
    headers = {"content-type": "application/x-ndjson"}
    assert delivery.client.post("/api/v1/orders/batch", content=rows, headers=headers).status_code == 200
    assert delivery.client.get("/api/v1/orders", params={"customer_id": "many"}).json()["total"] == 1_005
    assert delivery.client.get("/api/v1/orders", params={"customer_id": "nobody"}).json()["total"] == 0


def test_a_new_order_is_answered_without_a_further_look(delivery: Serving) -> None:
    """It has its id at once; its attempts are shown to who reads it."""
    order = placed(delivery, BURGER)
    assert order["id"] == order["order_id"]
    assert order["payment_attempts"] == []
    cancelled = delivery.client.post(f"/orders/{placed(delivery, BURGER)['order_id']}/cancel")
    assert cancelled.status_code in (202, 409)


class _Away:
    """A store whose attempts cannot be read now."""

    async def attempts(self, order_ids: list[str]) -> dict[str, list[Any]]:
        raise DatabaseUnavailable("The database cannot be used now: it is frozen")


async def test_what_cannot_be_read_now_is_503_in_the_clients_words() -> None:
    """The order comes from the cache, and its attempts cannot be read: a refusal, not a broken answer."""

    def cached_order(call: Call) -> Reply:
        headers = [(b"content-type", b"application/json"), (b"x-request-id", b"r1"), (b"etag", b'"3"')]
        return Reply(200, b'{"order_id": "A", "status": "confirmed"}', headers)

    translation = Translation(cached_order, DELIVERY, _Away(), KeyRing())  # type: ignore[arg-type]
    reply = await answered(translation(Call("GET", b"/orders/A", [], Body())))
    assert reply.status == 503
    assert dict(reply.headers)[b"retry-after"]
    assert dict(reply.headers)[b"x-request-id"] == b"r1"
    assert "cannot be used now" in json.loads(reply.body)["detail"]


async def test_a_stranger_is_refused_in_the_clients_words_and_his_body_is_not_read() -> None:
    """Where callers need a key, a call without one goes to the refusal as it is."""

    def refused(call: Call) -> Reply:
        assert call.stranger is not None
        return problem_reply(call.stranger, "r1")

    ring = KeyRing()
    ring.always_ask()
    translation = Translation(refused, DELIVERY, _Away(), ring)  # type: ignore[arg-type]
    unread = Body(on_wanted=lambda: pytest.fail("the body is waited for"))
    reply = await answered(translation(Call("POST", b"/orders", [], unread)))
    assert reply.status == 401
    assert "API key" in json.loads(reply.body)["detail"]


# The scalable order processing system.


def test_streams_answers_200_and_passes_over_what_it_does_not_know(streams: Serving) -> None:
    """Unknown members and parameters mean nothing; times have no zone."""
    body = {**BOOKS, "order_id": "S1", "colour": "red", "nested": {"a": [1]}}
    answer = streams.client.post("/orders?debug=1", json=body)
    assert (answer.status_code, answer.json()["order_id"]) == (200, "S1")
    done = until(streams, "S1", "completed")
    assert NAIVE.fullmatch(done["created_at"])
    assert streams.client.get("/orders", params={"limit": 1, "sort": "asc"}).status_code == 200
    assert streams.client.get("/orders/S1", params={"verbose": "1"}).status_code == 200
    assert streams.client.get("/orders/metrics", params={"x": "1"}).json()["total_orders"] >= 1
    item = {"name": "Pen", "quantity": 1, "colour": "red"}
    assert streams.client.post("/orders", json={"user_id": 1, "items": [item]}).status_code == 200


def test_streams_tells_of_its_queue(streams: Serving) -> None:
    """The length of the queue, what waits and what is done."""
    placed(streams, {**BOOKS, "order_id": "S2"})
    until(streams, "S2", "completed")
    status = streams.client.get("/orders/status").json()
    assert status["total_processed"] >= 1
    assert {"queue_length", "pending_orders"} <= status.keys()


def test_streams_still_refuses_what_is_wrong(streams: Serving) -> None:
    """A known member with a wrong value, and one that is given twice."""
    assert streams.client.post("/orders", json={"user_id": 1, "items": []}).status_code == 422
    twice = '{"user_id": 1, "user_id": 2, "item_ids": [1]}'
    headers = {"content-type": "application/json"}
    assert streams.client.post("/orders", content=twice, headers=headers).status_code == 400


@pytest.mark.parametrize("name", ["cached", "processor", "delivery", "streams"])
def test_a_large_or_broken_body_is_refused_as_ever(request: pytest.FixtureRequest, name: str) -> None:
    """The translation keeps to the limits of the service."""
    service: Serving = request.getfixturevalue(name)
    headers = {"content-type": "application/json"}
    large = service.client.post("/orders", content=b" " * (1024 * 1024 + 1), headers=headers)
    assert large.status_code == 413
    wrong = [
        b"[" * 100_000,
        b"[" * 1_000 + b"]" * 1_000,
        b'{"items": 5}',
        b'{"items": [5], "customer_name": "A"}',
        b'{"items": {"a": 1}, "status": ["x"]}',
        b'{"customer_name": "A", "items": [{"name": "Pen", "quantity": 1' + b"0" * 100 + b"}]}",
        b'{"customer_name": "\\ud800", "items": [{"name": "Pen", "quantity": 1}]}',
        b'{"customer_name": "A", "items": [{"name": "Pen", "quantity": NaN}]}',
        '{"customer_name": "A", "items": [{"name": "Pen", "quantity": 1}]}'.encode("utf-16"),
        b'{"items": [' + b"{}," * 200_000 + b"{}]}",
        b'"text"',
        b"\xff",
        b"",
    ]
    for body in wrong:
        refused = service.client.post("/orders", content=body, headers=headers)
        assert refused.status_code in (400, 422), body[:100]
        refused.json()
    assert service.client.post("/orders", json=PEN).status_code in (200, 201)
