"""What clients mean and write in another way: words in any case, sums of floats, parameters of browsers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import ADMIN_PASSWORD, Serving

PEN = {"user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}


def place(service: Serving, **more: Any) -> dict[str, Any]:
    answer = service.client.post("/orders", json={**PEN, **more})
    assert answer.status_code == 201, answer.text
    order: dict[str, Any] = answer.json()
    return order


def total_of(service: Serving, body: str) -> tuple[int, Any]:
    """Post a body as it is written; return the status, and the total or the faults."""
    answer = service.client.post("/orders", content=body, headers={"content-type": "application/json"})
    document = answer.json()
    return answer.status_code, document["total_minor"] if answer.status_code == 201 else document["errors"]


@pytest.mark.parametrize("word", ["processing", "PROCESSING", "Processing"])
def test_a_status_is_taken_in_any_case(idle_service: Serving, word: str) -> None:
    """PATCH and the list's filter take it as clients write it, and it is shown as it is."""
    order_id = place(idle_service)["order_id"]
    changed = idle_service.client.patch(f"/orders/{order_id}/status", json={"status": word})
    assert (changed.status_code, changed.json()["status"]) == (200, "processing")
    listed = idle_service.client.get("/orders", params={"status": word}).json()["orders"]
    assert order_id in [order["order_id"] for order in listed]
    assert {order["status"] for order in listed} == {"processing"}


def test_another_word_is_no_status(idle_service: Serving) -> None:
    """What no status is called is refused by PATCH and by the list."""
    order_id = place(idle_service)["order_id"]
    assert idle_service.client.patch(f"/orders/{order_id}/status", json={"status": "Sent"}).status_code == 422
    assert idle_service.client.get("/orders", params={"status": "Sent"}).status_code == 422


@pytest.mark.parametrize("status", ["pending", "processing", "completed", "cancelled"])
def test_where_an_order_is_already_nothing_happens(idle_service: Serving, status: str) -> None:
    """PATCH to the status that it has is 200; neither version nor history grows, also at the end of the road."""
    order_id = place(idle_service)["order_id"]
    road = {"completed": ["processing", "completed"], "pending": []}.get(status, [status])
    for step in road:
        assert idle_service.client.patch(f"/orders/{order_id}/status", json={"status": step}).status_code == 200
    before = idle_service.client.get(f"/orders/{order_id}/events").json()

    again = idle_service.client.patch(f"/orders/{order_id}/status", json={"status": status})

    assert again.status_code == 200
    assert (again.json()["status"], again.json()["version"]) == (status, len(road) + 1)
    assert idle_service.client.get(f"/orders/{order_id}/events").json() == before
    stale = idle_service.client.patch(
        f"/orders/{order_id}/status", json={"status": status}, headers={"if-match": '"99"'}
    )
    assert stale.status_code == 412


def test_the_answer_to_an_idle_change_is_kept_for_its_key(idle_service: Serving) -> None:
    """The same request with its key gets the same answer, although the order has moved on meanwhile."""
    order_id = place(idle_service)["order_id"]
    send = {
        "url": f"/orders/{order_id}/status",
        "json": {"status": "pending"},
        "headers": {"idempotency-key": "k"},
    }
    first = idle_service.client.patch(**send)
    idle_service.client.patch(f"/orders/{order_id}/status", json={"status": "processing"})
    second = idle_service.client.patch(**send)
    assert first.content == second.content
    assert second.headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize(
    ("written", "minor"),
    [
        ("249.98000000000002", 24998),  # 199.99 + 49.99
        ("0.30000000000000004", 30),  # 0.1 + 0.2
        ("26.979999999999997", 2698),
        ("2.4998000000000002e2", 24998),
        ("12.990", 1299),
        ('"12.990"', 1299),
        ("12.9900000000", 1299),
    ],
)
@pytest.mark.parametrize("field", ["total_amount", "price", "unit_price"])
def test_a_sum_of_floats_means_its_amount(idle_service: Serving, field: str, written: str, minor: int) -> None:
    """A number whose last digits are the noise of binary floats is the amount beside it; zeros are no digits."""
    if field == "total_amount":
        body = f'{{"user_id": 1, "item_ids": [1], "total_amount": {written}}}'
    else:
        body = f'{{"user_id": 1, "items": [{{"item_id": 1, "quantity": 1, "{field}": {written}}}]}}'
    assert total_of(idle_service, body) == (201, minor)


@pytest.mark.parametrize(
    "written", ['"249.98000000000002"', "249.9801", "249.985", "0.001", '"12.991"', "12.99002", "12.989999"]
)
def test_any_other_digit_is_refused(idle_service: Serving, written: str) -> None:
    """A text is exact, and a number that is further off than noise says something else."""
    status, errors = total_of(idle_service, f'{{"user_id": 1, "item_ids": [1], "total_amount": {written}}}')
    assert status == 422
    assert [error["field"] for error in errors] == ["/total_amount"]
    assert "has more digits after the point than USD has (2)" in errors[0]["message"]


def test_zeros_beyond_a_currency_without_digits_are_the_same_amount(idle_service: Serving) -> None:
    """500.0 yen are 500 yen."""
    body = '{"user_id": 1, "item_ids": [1], "currency": "JPY", "total_amount": 500.0}'
    assert total_of(idle_service, body) == (201, 500)


def test_the_noise_of_a_cart_is_nobodys_mistake(idle_service: Serving) -> None:
    """A cart whose total its client has summed in floats is taken, also in a batch; not where it is a text."""
    prices = [0.1, 0.2, 199.99, 49.99]
    items = [{"item_id": str(price), "quantity": 1, "price": price} for price in prices]
    cart = {"user_id": 1, "items": items, "total_amount": sum(prices)}
    assert total_of(idle_service, json.dumps(cart)) == (201, 25028)
    wrong = {**cart, "total_amount": str(sum(prices) + 1e-10)}
    answer = idle_service.client.post("/api/v1/orders/batch", json=[cart, wrong])
    assert [row["status"] for row in answer.json()["results"]] == [202, 422]


@settings(max_examples=100, deadline=None)
@given(minors=st.lists(st.integers(min_value=0, max_value=10_000_00), min_size=1, max_size=20))
def test_every_sum_of_prices_is_read_as_it_was_meant(minors: list[int]) -> None:
    """Up to twenty prices of up to 10,000 summed in floats: the noise stays far below what is passed over."""
    from decimal import Decimal

    from expediter.orders.money import nearest_minor

    summed = 0.0
    for minor in minors:
        summed += minor / 100
    assert nearest_minor(Decimal(repr(summed)), "USD") == sum(minors)


@pytest.mark.parametrize("query", ["_=1712", "utm_source=mail&utm_medium=x", "_=1&_=2&limit=1"])
def test_what_browsers_add_is_passed_over(idle_service: Serving, query: str) -> None:
    """Parameters against caches and for advertisers mean nothing here."""
    assert idle_service.client.get(f"/orders?{query}").status_code == 200
    assert idle_service.client.get(f"/orders/status?{query.replace('&limit=1', '')}").status_code == 200
    assert idle_service.client.get(f"/orders?{query}&nonsense=1").status_code == 422


def test_a_made_id_has_36_characters(idle_service: Serving) -> None:
    """ORD- and 32 hex digits that begin with the time: later ones sort behind earlier ones."""
    made = [place(idle_service)["order_id"] for _ in range(20)]
    assert {len(order_id) for order_id in made} == {36}
    assert made == sorted(made)
    assert place(idle_service)["message"] == "Order created"


def test_the_queue_in_other_words(idle_service: Serving) -> None:
    """`/orders/status` has the words of other services beside its own."""
    place(idle_service)
    found = idle_service.client.get("/orders/status").json()
    assert found["queue_length"] == found["ready"] + found["scheduled"] + found["leased"] > 0
    assert found["pending_orders"] == found["pending_count"] > 0
    done = idle_service.client.get("/orders", params={"status": "completed"}).json()["total"]
    assert found["total_processed"] == done


def test_a_made_up_batch_can_be_found_and_is_made_once(idle_service: Serving) -> None:
    """Its orders have ids by number; the same name again is 409 and makes nothing."""
    client = idle_service.client
    body = {"total_entries": 3, "batch_id": "b1"}
    assert client.post("/orders/populate", json=body).json()["success_count"] == 3
    assert [client.get(f"/orders/sim_b1_{number}").status_code for number in range(5)] == [404, 200, 200, 200, 404]
    before = client.get("/orders").json()["total"]
    again = client.post("/orders/populate", json=body)
    assert again.status_code == 409
    assert "b1 has been made before" in again.json()["error"]
    assert client.get("/orders").json()["total"] == before


def test_an_id_that_a_batch_meets_is_told(idle_service: Serving) -> None:
    """An order that somebody placed under such an id stays as it is, and is among the errors."""
    place(idle_service, order_id="sim_b2_2")
    done = idle_service.client.post("/orders/populate", json={"total_entries": 3, "batch_id": "b2"}).json()
    assert (done["success_count"], done["failure_count"]) == (2, 1)
    assert "sim_b2_2" in done["errors"][0]


def test_a_batch_without_a_name_gets_a_short_one(idle_service: Serving) -> None:
    """Eight hex digits, by which its orders are found."""
    made = idle_service.client.post("/orders/populate", json={"total_entries": 1}).json()["batch_id"]
    assert len(made) == 8
    assert int(made, 16) >= 0
    assert idle_service.client.get(f"/orders/sim_{made}_1").status_code == 200


def test_the_password_by_its_other_name(idle_service: Serving) -> None:
    """`password` beside `admin_password`; a wrong one opens nothing."""
    seed = {"count": 1, "password": ADMIN_PASSWORD}
    assert idle_service.client.post("/admin/seed", json=seed).status_code == 201
    assert idle_service.client.post("/admin/seed", json={**seed, "password": "no"}).status_code == 401


def test_other_filters_are_counted_up_to_a_thousand(idle_service: Serving) -> None:
    """`total` is exact for a customer and for dates; beyond a thousand it is null, and there is more."""
    rows = [{"customer_id": "many", "items": PEN["items"]} for _ in range(1_001)]
    rows += [{"customer_id": "few", "items": PEN["items"]} for _ in range(3)]
    lines = "\n".join(json.dumps(row) for row in rows)
    headers = {"content-type": "application/x-ndjson"}
    assert idle_service.client.post("/orders/batch", content=lines, headers=headers).status_code == 200

    def listed(**query: str) -> tuple[int | None, bool]:
        page = idle_service.client.get("/orders", params=query).json()
        return page["total"], page["has_more"]

    assert listed(customer_id="few") == (3, False)
    assert listed(customer_id="few", limit="2") == (3, True)
    assert listed(customer_id="few", status="pending") == (3, False)
    assert listed(customer_id="few", status="completed") == (0, False)
    assert listed(customer_id="many") == (None, True)
    assert listed(created_after="2020-01-01") == (None, True)
    assert listed(created_before="2020-01-01") == (0, False)
    page = idle_service.client.get("/orders", params={"customer_id": "few", "limit": "2"}).json()
    assert listed(customer_id="few", cursor=page["next_cursor"]) == (3, False)


SHOP = "https://shop.example"


@pytest.fixture(scope="module", params=[f"{SHOP}, http://localhost:3000", "*"])
def open_service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("open"), "--no-workers", CORS_ORIGINS=request.param) as running:
        yield running


def test_a_page_of_another_origin_may_call(open_service: Serving) -> None:
    """Its preflight is granted with its own headers, and it may read answers, refusals and their headers."""
    asks = {
        "origin": SHOP,
        "access-control-request-method": "PATCH",
        "access-control-request-headers": "content-type, idempotency-key",
    }
    granted = open_service.client.options("/orders/ORD-1/status", headers=asks)
    assert granted.status_code == 200
    assert granted.headers["access-control-allow-origin"] in (SHOP, "*")
    assert "PATCH" in granted.headers["access-control-allow-methods"]
    assert "idempotency-key" in granted.headers["access-control-allow-headers"]
    for answer in (
        open_service.client.post("/orders", json=PEN, headers={"origin": SHOP}),
        open_service.client.post("/orders", json={}, headers={"origin": SHOP}),
        open_service.client.get("/nowhere", headers={"origin": SHOP}),
        open_service.client.get("/health", headers={"origin": SHOP}),
    ):
        assert answer.headers["access-control-allow-origin"] in (SHOP, "*")
        assert "ETag" in answer.headers["access-control-expose-headers"]


def test_a_page_of_a_stranger_may_not(open_service: Serving, idle_service: Serving) -> None:
    """Where origins are named, no other is let in; without the setting nobody is."""
    stranger = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    alone = open_service.client.options("/orders", headers=stranger)
    assert alone.headers.get("access-control-allow-origin") in (None, "*")
    if "access-control-allow-origin" not in alone.headers:
        assert alone.status_code == 400
    off = idle_service.client.options("/orders", headers=stranger)
    assert "access-control-allow-origin" not in off.headers
