"""One order over HTTP: placing, reading, moving, cancelling, deleting; what a client sees."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from serving import PATIENCE_SECONDS, Serving

Document = dict[str, Any]

FAMILIES = ["/orders", "/api/v1/orders"]
PRICED = {
    "customer_id": "customer_123",
    "items": [{"item_id": "item_001", "item_name": "Burger", "quantity": 2, "price": 12.99}],
}
NAMED = {"customer_name": "Alice", "items": [{"name": "Pen", "quantity": 2}]}
TOTALLED = {"user_id": 1, "item_ids": [101, 102, 103], "total_amount": 59.99}

#: The promised keys of an order.
ORDER_KEYS = {
    "order_id",
    "status",
    "payment_status",
    "customer_id",
    "user_id",
    "customer_name",
    "currency",
    "total_amount",
    "total_minor",
    "items",
    "metadata",
    "version",
    "created_at",
    "updated_at",
    "processing_started_at",
    "completed_at",
    "cancelled_at",
    "pending_duration",
    "processing_duration",
    "total_duration",
    "last_error",
}
LINE_KEYS = {"line", "item_id", "name", "item_name", "quantity", "price", "price_minor"}


def place(service: Serving, path: str = "/orders", **fields: Any) -> Document:
    """Place an order (unpriced unless `fields` say otherwise) and return it."""
    answer = service.client.post(
        path, json={"customer_id": "c", "items": [{"name": "Pen", "quantity": 1}], **fields}
    )
    assert answer.is_success, answer.text
    order: Document = answer.json()
    return order


def move(service: Serving, order_id: str, *statuses: str) -> None:
    """Move an order by hand, step by step."""
    for status in statuses:
        answer = service.client.patch(f"/orders/{order_id}/status", json={"status": status})
        assert answer.status_code == 200, answer.text


def until(service: Serving, order_id: str, status: str) -> Document:
    """Return the order as soon as it has `status`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    order: Document = service.client.get(f"/orders/{order_id}").json()
    while order["status"] != status:
        assert time.monotonic() < deadline, order
        tag = f'"{order["version"]}"'
        answer = service.client.get(f"/orders/{order_id}", params={"wait": 5}, headers={"If-None-Match": tag})
        if answer.status_code == 200:
            order = answer.json()
    return order


# Placing


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("body", [PRICED, NAMED, TOTALLED], ids=["priced", "named", "totalled"])
def test_every_shape_is_taken_on_every_path(service: Serving, family: str, slash: str, body: Document) -> None:
    """Each of the three bodies is accepted in both path families, with and without a slash, without a redirect."""
    answer = service.client.post(family + slash, json=body)
    order = answer.json()

    assert answer.history == []
    assert answer.status_code == (201 if family == "/orders" else 202)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["location"] == f"{family}/{order['order_id']}"
    assert answer.headers["etag"] == f'"{order["version"]}"' == '"1"'
    assert order.keys() >= ORDER_KEYS
    assert all(line.keys() >= LINE_KEYS for line in order["items"])
    assert order["status"] == "pending"
    assert service.client.get(answer.headers["location"]).json()["order_id"] == order["order_id"]


def test_the_short_path_adds_a_message_and_item_ids(service: Serving) -> None:
    """Under /orders a new order comes with `message`, and its item ids joined by commas."""
    placed = place(service, item_ids=["a-1", 2, "3"], items=None)

    assert placed["message"]
    assert placed["item_ids"] == "a-1,2,3"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"user_id": "u-1"}, {"customer_id": "u-1", "user_id": "u-1"}),
        ({"customer_id": 7}, {"customer_id": 7, "user_id": 7}),
        ({"customer_id": "7"}, {"customer_id": "7", "user_id": "7"}),
        ({"customer_id": 0}, {"customer_id": 0, "user_id": 0}),
        ({"customer_id": "c", "user_id": "c"}, {"customer_id": "c"}),
        ({"customer_name": "Zoë 😀"}, {"customer_name": "Zoë 😀", "customer_id": None}),
    ],
)
def test_customers_come_back_as_they_were_sent(service: Serving, fields: Document, expected: Document) -> None:
    """A customer's id keeps its type, number or string, under both of its names."""
    answer = service.client.post("/orders", json={**fields, "items": [{"name": "Pen", "quantity": 1}]})
    stored = service.client.get(f"/orders/{answer.json()['order_id']}").json()

    assert expected.items() <= answer.json().items()
    assert expected.items() <= stored.items()


def test_lines_come_back_under_both_names(service: Serving) -> None:
    """`name` and `item_name`, `price` and `unit_price` mean the same; item ids keep their type."""
    items = [
        {"item_id": 5, "item_name": "Tea", "quantity": 1, "unit_price": 1.5},
        {"item_id": "5", "name": "Tea", "quantity": 3, "price": "2.25"},
    ]
    stored = service.client.get(f"/orders/{place(service, items=items)['order_id']}").json()["items"]

    assert stored == [
        {
            "line": 1,
            "item_id": 5,
            "name": "Tea",
            "item_name": "Tea",
            "quantity": 1,
            "price": 1.5,
            "price_minor": 150,
        },
        {
            "line": 2,
            "item_id": "5",
            "name": "Tea",
            "item_name": "Tea",
            "quantity": 3,
            "price": 2.25,
            "price_minor": 225,
        },
    ]


def test_metadata_comes_back(service: Serving) -> None:
    """A flat JSON object given as metadata is stored and answered."""
    metadata = {"table": 7, "note": "no onions 🧅", "vip": True, "referrer": None, "tip": 0.15}
    placed = place(service, metadata=metadata)

    assert placed["metadata"] == metadata
    assert service.client.get(f"/orders/{placed['order_id']}").json()["metadata"] == metadata


def test_a_payment_token_is_never_shown(service: Serving) -> None:
    """No answer about an order repeats the payment token that it was placed with."""
    placed = service.client.post("/orders", json={**PRICED, "payment_token": "tok_very_secret"})
    order_id = placed.json()["order_id"]
    service.until_rest(order_id)
    answers = [placed, *(service.client.get(f"/orders/{order_id}{rest}") for rest in ("", "/events", "/explain"))]

    assert [answer.status_code for answer in answers] == [201, 200, 200, 200]
    assert not any("tok_very_secret" in answer.text for answer in answers)


def test_a_chosen_id_is_used_once(service: Serving) -> None:
    """A client may choose the id, as text or as a number; a second order of that id is a 409 that names it."""
    chosen = place(service, order_id="my.order_7-x")
    number = place(service, order_id=90210)
    again = service.client.post("/orders", json={**NAMED, "order_id": "my.order_7-x"})

    assert chosen["order_id"] == "my.order_7-x"
    assert number["order_id"] == "90210"
    assert again.status_code == 409
    assert again.json()["order_id"] == "my.order_7-x"


def test_server_made_ids_are_ordered_in_time(service: Serving) -> None:
    """Ids made by the service sort in the order in which the orders were placed."""
    made = [place(service)["order_id"] for _ in range(20)]

    assert made == sorted(made)
    assert len(set(made)) == 20


# Money


@pytest.mark.parametrize(
    ("currency", "price", "total"),
    [
        ("USD", "12.9", "12.90"),
        ("USD", '"12.90"', "12.90"),
        ("USD", "0.1", "0.10"),
        ("USD", "1e1", "10.00"),
        ("USD", "9999999999999.99", "9999999999999.99"),
        ("JPY", "1290", "1290"),
        ("KWD", "12.9", "12.900"),
        ("KWD", "0.001", "0.001"),
    ],
)
def test_money_is_printed_with_the_currencys_digits(
    idle_service: Serving, currency: str, price: str, total: str
) -> None:
    """The JSON numbers of price and total have exactly the digits of the currency, and no float's noise."""
    body = (
        f'{{"user_id": 1, "currency": "{currency}", "items": [{{"name": "x", "quantity": 1, "price": {price}}}]}}'
    )
    placed = idle_service.client.post("/orders", content=body, headers={"Content-Type": "application/json"})
    got = idle_service.client.get(placed.headers["location"])

    for answer in (placed, got):
        assert re.search(r'"total_amount":([^,}]+)', answer.text)[1] == total  # type: ignore[index]
        assert re.search(r'"price":([^,}]+)', answer.text)[1] == total  # type: ignore[index]
        assert answer.json()["total_minor"] == int(total.replace(".", ""))


def test_the_total_is_the_sum_of_the_lines(idle_service: Serving) -> None:
    """Where every line has a price the total is computed, exactly, and an equal declared total is accepted."""
    items = [{"name": "a", "quantity": 3, "price": 0.1}, {"name": "b", "quantity": 1, "price": 0.2}]
    computed = place(idle_service, items=items)
    declared = place(idle_service, items=items, total_amount="0.50")

    assert (computed["total_minor"], declared["total_minor"]) == (50, 50)


def test_a_different_declared_total_is_refused(idle_service: Serving) -> None:
    """A total_amount that is not the sum of the priced lines is a 422 at /total_amount."""
    body = {"user_id": 1, "items": [{"name": "a", "quantity": 3, "price": 0.1}], "total_amount": 0.31}
    refused = idle_service.client.post("/orders", json=body)

    assert refused.status_code == 422
    assert [error["field"] for error in refused.json()["errors"]] == ["/total_amount"]


def test_only_a_total_is_the_total(service: Serving) -> None:
    """An order with item ids and a total is charged that total."""
    order = service.until_rest(str(place(service, items=None, item_ids=[1, 2], total_amount="59.99")["order_id"]))

    assert (order["total_minor"], order["payment_status"], order["status"]) == (5999, "paid", "completed")


def test_no_price_means_no_payment(service: Serving) -> None:
    """An order without any price has the total 0, needs no payment, and is completed without one."""
    placed = place(service)
    order = service.until_rest(placed["order_id"])

    assert (placed["total_minor"], placed["payment_status"]) == (0, "not_required")
    assert placed["items"][0]["price"] is None
    assert (order["status"], order["payment_status"]) == ("completed", "not_required")
    assert service.client.get(f"/orders/{placed['order_id']}/explain").json()["attempts"] == []


# Getting


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_order_is_read_on_every_path(idle_service: Serving, family: str, slash: str) -> None:
    """An order has the same document and ETag in both families, with and without a slash."""
    order_id = place(idle_service)["order_id"]
    answer = idle_service.client.get(f"{family}/{order_id}{slash}")

    assert (answer.status_code, answer.history) == (200, [])
    assert answer.headers["etag"] == '"1"'
    assert answer.json() == idle_service.client.get(f"/orders/{order_id}").json()


def test_times_are_rfc_3339_in_utc(service: Serving) -> None:
    """Every time of a completed order is RFC 3339 text in UTC, and none is before the one it follows."""
    order = service.until_rest(place(service)["order_id"])
    times = [str(order[name]) for name in ("created_at", "processing_started_at", "completed_at")]

    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", each) for each in times)
    assert times == sorted(times)
    assert order["updated_at"] == order["completed_at"]
    assert order["cancelled_at"] is None


def test_an_unchanged_order_is_304(idle_service: Serving) -> None:
    """If-None-Match with the current ETag answers 304 without a body; another ETag answers 200."""
    order_id = place(idle_service)["order_id"]
    tag = idle_service.client.get(f"/orders/{order_id}").headers["etag"]

    def status(asked: str) -> httpx2.Response:
        return idle_service.client.get(f"/orders/{order_id}", headers={"If-None-Match": asked})

    assert (status(tag).status_code, status(tag).content, status(tag).headers["etag"]) == (304, b"", tag)
    assert status("*").status_code == 304
    assert status(f'"99", W/{tag}').status_code == 304
    assert status('"99"').status_code == 200


def test_waiting_holds_until_the_order_changes(idle_service: Serving) -> None:
    """A read with ?wait= is answered with the change, long before its time is up."""
    order_id = place(idle_service)["order_id"]
    with (
        httpx2.Client(base_url=idle_service.url, timeout=PATIENCE_SECONDS) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        started = time.monotonic()
        # With the ETag of version 1 it does not matter which of the two calls arrives first.
        waiting = pool.submit(
            other.get, f"/orders/{order_id}", params={"wait": "25"}, headers={"If-None-Match": '"1"'}
        )
        move(idle_service, order_id, "processing")
        answer = waiting.result()

    assert (answer.status_code, answer.json()["status"], answer.json()["version"]) == (200, "processing", 2)
    assert time.monotonic() - started < 10


def test_waiting_ends_without_a_change(idle_service: Serving) -> None:
    """When nothing changes, ?wait= answers the order as it is once the seconds are over."""
    order_id = place(idle_service)["order_id"]
    started = time.monotonic()
    answer = idle_service.client.get(f"/orders/{order_id}", params={"wait": "0.3"})

    assert time.monotonic() - started >= 0.29
    assert (answer.status_code, answer.json()["version"]) == (200, 1)


def test_waiting_for_what_has_ended_is_short(service: Serving) -> None:
    """An order that is at rest is answered at once, whatever ?wait= says."""
    order = service.until_rest(place(service)["order_id"])
    started = time.monotonic()
    answer = service.client.get(f"/orders/{order['order_id']}", params={"wait": "30"})

    assert answer.json()["status"] == "completed"
    assert time.monotonic() - started < 10


def test_waiting_past_a_known_change_is_short(idle_service: Serving) -> None:
    """With the ETag of an older version ?wait= answers the newer one at once."""
    order_id = place(idle_service)["order_id"]
    move(idle_service, order_id, "processing")
    started = time.monotonic()
    answer = idle_service.client.get(
        f"/orders/{order_id}", params={"wait": "30"}, headers={"If-None-Match": '"1"'}
    )

    assert (answer.status_code, answer.json()["version"]) == (200, 2)
    assert time.monotonic() - started < 10


def test_min_version_answers_that_version(idle_service: Serving) -> None:
    """?min_version= with a version that exists answers it or a newer one."""
    order_id = place(idle_service)["order_id"]
    move(idle_service, order_id, "processing")

    versions = [
        idle_service.client.get(f"/orders/{order_id}", params={"min_version": number}).json()["version"]
        for number in (0, 1, 2)
    ]

    assert versions == [2, 2, 2]


def test_min_version_never_answers_an_older_one(idle_service: Serving) -> None:
    """?min_version= with a version that does not exist yet is refused, not answered with an older one."""
    order_id = place(idle_service)["order_id"]
    answer = idle_service.client.get(f"/orders/{order_id}", params={"min_version": 9})

    assert not answer.is_success


@pytest.mark.parametrize("order_id", ["ORD-nobody", "a%20b", "%00", "x" * 65, "%C3%A9", "%ff"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_order_is_404(idle_service: Serving, family: str, order_id: str) -> None:
    """An id that no order has, or can have, is a 404 problem with "Order not found"."""
    answers = [idle_service.client.get(f"{family}/{order_id}{rest}") for rest in ("", "/events", "/explain")]
    answers += [
        idle_service.client.delete(f"{family}/{order_id}"),
        idle_service.client.patch(f"{family}/{order_id}/status", json={"status": "cancelled"}),
        idle_service.client.post(f"{family}/{order_id}/cancel"),
        idle_service.client.post(f"{family}/{order_id}/retry"),
    ]

    assert {answer.status_code for answer in answers} == {404}
    assert {answer.json()["error"] for answer in answers} == {"Order not found"}
    assert {answer.headers["content-type"] for answer in answers} == {"application/problem+json"}


# Moving


def test_patch_walks_the_lifecycle(idle_service: Serving) -> None:
    """A priced order can be moved by hand from pending to completed; each step is a new version and ETag."""
    order_id = place(idle_service, total_amount="5.00")["order_id"]
    seen = []
    for status in ("payment_processing", "confirmed", "processing", "completed"):
        answer = idle_service.client.patch(f"/api/v1/orders/{order_id}/status/", json={"status": status})
        seen.append((answer.status_code, answer.json()["status"], answer.headers["etag"]))

    assert seen == [
        (200, "payment_processing", '"2"'),
        (200, "confirmed", '"3"'),
        (200, "processing", '"4"'),
        (200, "completed", '"5"'),
    ]
    order = idle_service.client.get(f"/orders/{order_id}").json()
    assert order["completed_at"] is not None
    assert order["total_duration"] > 0


def test_patch_answers_the_whole_order(idle_service: Serving) -> None:
    """The answer to a move is what a read shows after it, lines included."""
    order_id = place(idle_service)["order_id"]
    answer = idle_service.client.patch(f"/orders/{order_id}/status", json={"status": "processing"})

    assert answer.json() == idle_service.client.get(f"/orders/{order_id}").json()
    assert len(answer.json()["items"]) == 1


@pytest.mark.parametrize(
    ("way", "wanted", "legal"),
    [
        ((), "completed", {"processing", "cancelled"}),
        (("processing",), "pending", {"completed", "failed", "cancelled"}),
        (("processing", "failed"), "completed", {"processing", "cancelled"}),
        (("processing", "completed"), "cancelled", set()),
        (("cancelled",), "processing", set()),
    ],
)
def test_an_illegal_move_names_the_legal_ones(
    idle_service: Serving, way: tuple[str, ...], wanted: str, legal: set[str]
) -> None:
    """A move that the lifecycle does not have is a 409 with the moves that this order may make."""
    order_id = place(idle_service)["order_id"]
    move(idle_service, order_id, *way)
    before = idle_service.client.get(f"/orders/{order_id}").content
    refused = idle_service.client.patch(f"/orders/{order_id}/status", json={"status": wanted})

    assert refused.status_code == 409
    assert set(refused.json()["legal"]) == legal
    assert all(move in refused.json()["error"] for move in legal)
    assert idle_service.client.get(f"/orders/{order_id}").content == before


@pytest.mark.parametrize("call", ["PATCH", "DELETE", "cancel", "retry"])
def test_a_stale_if_match_is_412(idle_service: Serving, call: str) -> None:
    """A change that names a version which the order no longer has is refused with 412 and changes nothing."""
    order_id = place(idle_service)["order_id"]
    move(idle_service, order_id, "processing", "failed")
    client, stale = idle_service.client, {"If-Match": '"2"'}

    match call:
        case "PATCH":
            refused = client.patch(f"/orders/{order_id}/status", json={"status": "processing"}, headers=stale)
        case "DELETE":
            refused = client.delete(f"/orders/{order_id}", headers=stale)
        case _:
            refused = client.post(f"/orders/{order_id}/{call}", headers=stale)

    assert refused.status_code == 412
    assert refused.headers["etag"] == '"3"'
    assert client.get(f"/orders/{order_id}").json()["version"] == 3


@pytest.mark.parametrize("tag", ['"1"', "*"])
def test_a_matching_if_match_is_carried_out(idle_service: Serving, tag: str) -> None:
    """A change that names the current version, or any, is made."""
    order_id = place(idle_service)["order_id"]
    answer = idle_service.client.post(f"/orders/{order_id}/cancel", headers={"If-Match": tag})

    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")


@pytest.mark.parametrize("tag", ["1", 'W/"1"', '"x"', "", '"99999999999999999999999"'])
def test_an_if_match_that_names_no_version_matches_none(idle_service: Serving, tag: str) -> None:
    """A weak, unquoted or made-up entity tag is never equal to an order's: 412."""
    order_id = place(idle_service)["order_id"]

    assert idle_service.client.delete(f"/orders/{order_id}", headers={"If-Match": tag}).status_code == 412


# Deleting


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deleted_order_is_gone_and_its_id_stays_used(idle_service: Serving, family: str) -> None:
    """DELETE is 204; then the order is 404 everywhere, leaves the list, and its id is a 409 for a new order."""
    order_id = place(idle_service, order_id=f"once-{len(family)}")["order_id"]
    total = idle_service.client.get("/orders").json()["total"]

    deleted = idle_service.client.delete(f"{family}/{order_id}")
    after = [
        idle_service.client.get(f"{family}/{order_id}"),
        idle_service.client.get(f"{family}/{order_id}/events"),
        idle_service.client.delete(f"{family}/{order_id}"),
    ]
    again = idle_service.client.post(family, json={**NAMED, "order_id": order_id})

    assert (deleted.status_code, deleted.content) == (204, b"")
    assert [answer.status_code for answer in after] == [404, 404, 404]
    assert idle_service.client.get("/orders").json()["total"] == total - 1
    assert again.status_code == 409


def test_money_in_flight_holds_an_order_where_it_is(slow_gateway_service: Serving) -> None:
    """While the gateway has a charge and has not answered, DELETE, cancel and PATCH are 409 and change nothing."""
    service = slow_gateway_service
    order_id = place(service, total_amount="5.00")["order_id"]
    order = until(service, order_id, "payment_processing")

    refused = [
        service.client.delete(f"/orders/{order_id}"),
        service.client.post(f"/orders/{order_id}/cancel"),
        service.client.patch(f"/orders/{order_id}/status", json={"status": "confirmed"}),
    ]

    assert [answer.status_code for answer in refused] == [409, 409, 409]
    assert all("outcome" in answer.json()["error"] for answer in refused)
    assert service.client.get(f"/orders/{order_id}").json() == order
    explained = service.client.get(f"/orders/{order_id}/explain").json()
    assert explained["next_action"]["held_by"]
    assert [attempt["outcome"] for attempt in explained["attempts"]] == [None]


def test_a_waiting_unpaid_order_can_be_deleted(idle_service: Serving) -> None:
    """An order whose charge nobody has begun is deleted without more ado."""
    order_id = place(idle_service, total_amount="5.00")["order_id"]

    assert idle_service.client.delete(f"/orders/{order_id}").status_code == 204


def test_a_completed_paid_order_can_be_deleted(service: Serving) -> None:
    """An order that is paid and completed is deleted with 204: its money has found its end."""
    order = service.until_rest(place(service, total_amount="5.00")["order_id"])

    assert order["payment_status"] == "paid"
    assert service.client.delete(f"/orders/{order['order_id']}").status_code == 204


# Cancelling and retrying


@pytest.mark.parametrize("family", FAMILIES)
def test_cancelling_a_pending_order(idle_service: Serving, family: str) -> None:
    """A pending order is cancelled with 202, the order and its ETag; nothing is left to do."""
    order_id = place(idle_service, total_amount="5.00")["order_id"]
    answer = idle_service.client.post(f"{family}/{order_id}/cancel/")
    explained = idle_service.client.get(f"/orders/{order_id}/explain").json()

    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    assert answer.json()["payment_status"] == "voided"
    assert answer.headers["etag"] == '"2"'
    assert answer.json()["cancelled_at"] is not None
    assert (explained["at_rest"], explained["next_action"]) == (True, None)


def test_a_second_cancel_is_409(idle_service: Serving) -> None:
    """A cancelled order cannot be cancelled again."""
    order_id = place(idle_service)["order_id"]
    idle_service.client.post(f"/orders/{order_id}/cancel")

    assert idle_service.client.post(f"/orders/{order_id}/cancel").status_code == 409


def test_cancelling_a_paid_order_refunds_it(payment_service: Serving) -> None:
    """A paid, confirmed order that is cancelled is refunded: the attempts show one charge and one refund."""
    order_id = place(payment_service, total_amount="5.00")["order_id"]
    payment_service.until_rest(order_id)

    cancelled = payment_service.client.post(f"/orders/{order_id}/cancel")
    order = payment_service.until_rest(order_id)
    attempts = payment_service.client.get(f"/orders/{order_id}/explain").json()["attempts"]

    assert (cancelled.status_code, cancelled.json()["status"]) == (202, "cancelled")
    assert (order["status"], order["payment_status"]) == ("cancelled", "refunded")
    assert [(attempt["action"], attempt["outcome"]) for attempt in attempts] == [
        ("charge", "succeeded"),
        ("refund", "succeeded"),
    ]


def test_a_failed_order_is_retried(idle_service: Serving) -> None:
    """Retry takes a failed order back to processing, with 202 and a new version."""
    order_id = place(idle_service)["order_id"]
    move(idle_service, order_id, "processing", "failed")
    answer = idle_service.client.post(f"/api/v1/orders/{order_id}/retry")

    assert (answer.status_code, answer.json()["status"]) == (202, "processing")
    assert answer.headers["etag"] == f'"{answer.json()["version"]}"'


def test_a_declined_order_is_retried(payment_service: Serving) -> None:
    """Retry of a declined payment makes a new attempt under a new key."""
    order_id = place(payment_service, total_amount="5.00", payment_token="tok_declined")["order_id"]
    payment_service.until_rest(order_id)
    answer = payment_service.client.post(f"/orders/{order_id}/retry")
    order = payment_service.until_rest(order_id)
    attempts = payment_service.client.get(f"/orders/{order_id}/explain").json()["attempts"]

    assert (answer.status_code, answer.json()["status"]) == (202, "payment_processing")
    assert order["status"] == "payment_failed"
    assert len(attempts) == len({attempt["gateway_key"] for attempt in attempts}) == 2


def test_only_what_failed_can_be_retried(idle_service: Serving) -> None:
    """Retry of an order that has not failed is a 409."""
    assert idle_service.client.post(f"/orders/{place(idle_service)['order_id']}/retry").status_code == 409


# History and explanation


@pytest.mark.parametrize("family", FAMILIES)
def test_events_are_numbered_from_one_without_gaps(service: Serving, family: str) -> None:
    """A completed order's history is numbered 1 to its version, begins with its placing, and is in time order."""
    order = service.until_rest(place(service, total_amount="5.00")["order_id"])
    events = service.client.get(f"{family}/{order['order_id']}/events").json()["events"]

    assert [event["number"] for event in events] == list(range(1, int(str(order["version"])) + 1))
    assert all(event.keys() == {"number", "at", "type", "data"} for event in events)
    assert events[0]["type"] == "order.placed"
    assert events[0]["data"]["order"]["order_id"] == order["order_id"]
    assert events[-1]["data"]["status"] == "completed"
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)


def test_a_waiting_order_is_explained(idle_service: Serving) -> None:
    """Without workers a new order's explanation says what is due, since when, and that nobody holds it."""
    placed = place(idle_service, total_amount="5.00")
    explained = idle_service.client.get(f"/api/v1/orders/{placed['order_id']}/explain").json()

    assert (explained["status"], explained["at_rest"]) == ("pending", False)
    assert explained["next_action"]["action"] == "charge"
    assert explained["next_action"]["due_at"] == placed["created_at"]
    assert explained["next_action"]["held_by"] is None
    assert explained["attempts"] == []
    assert "worker" in explained["why"]
