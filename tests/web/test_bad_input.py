"""Requests that are refused: which status, which fields, and in what form."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import pytest

from serving import Serving
from wire import connect, exchange, read_answer, request

JSON = {"Content-Type": "application/json"}
GOOD = {"customer_id": "c", "items": [{"name": "Pen", "quantity": 1}]}
BODY_BYTES_MAX = 1024 * 1024


def refusal(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """Check that `answer` is a problem document of this status, and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    check_problem(problem, status, answer.headers["x-request-id"])
    return problem


def check_problem(problem: dict[str, Any], status: int, request_id: str) -> None:
    """Check what every problem document promises."""
    assert problem["status"] == status
    assert problem["request_id"] == request_id
    assert {"type", "title", "detail", "error"} <= problem.keys()
    assert problem["error"].strip()
    assert "\n" not in problem["error"]
    assert not re.search(r"Traceback|File \"|msgspec|sqlite3|expediter\.", json.dumps(problem))


def send(service: Serving, body: str | bytes, path: str = "/orders") -> httpx2.Response:
    """Post a body as it is."""
    return service.client.post(path, content=body, headers=JSON)


def order(**fields: Any) -> str:
    """Return a body that is good but for `fields`, in ASCII (a lone surrogate as its escape)."""
    return json.dumps({**GOOD, **fields})


def fields_of(problem: dict[str, Any]) -> list[str]:
    """Return the pointers of a problem's faults."""
    assert all(error["message"] for error in problem["errors"])
    return [error["field"] for error in problem["errors"]]


# 400: what is not JSON

NOT_JSON: dict[str, str | bytes] = {
    "empty": "",
    "cut off": '{"customer_id": "c", "items": [',
    "trailing comma": '{"customer_id": "c",}',
    "trailing text": json.dumps(GOOD) + "x",
    "two documents": json.dumps(GOOD) + json.dumps(GOOD),
    "single quotes": "{'customer_id': 'c'}",
    "a comment": '{"customer_id": "c" /* me */}',
    "NaN": '{"customer_id": "c", "items": [{"name": "x", "quantity": 1, "price": NaN}]}',
    "Infinity": '{"customer_id": "c", "total_amount": Infinity}',
    "-Infinity": '{"customer_id": "c", "total_amount": -Infinity}',
    "a leading zero": '{"customer_id": 007}',
    "a bare control character": b'{"customer_id": "a\x00b"}',
    "invalid UTF-8": b'{"customer_id": "\xff"}',
    "an encoded surrogate": b'{"customer_id": "\xed\xa0\x80"}',
    "an overlong encoding": b'{"customer_id": "\xc0\xaf"}',
    "UTF-16 with a mark": json.dumps(GOOD).encode("utf-16"),
    "UTF-16 without a mark": json.dumps(GOOD).encode("utf-16-le"),
    "UTF-32": json.dumps(GOOD).encode("utf-32-be"),
    "33 levels": '{"metadata": {"a": ' + "[" * 31 + "]" * 31 + "}}",
    "33 levels under an unknown field": '{"x": ' + "[" * 32 + "]" * 32 + "}",
    "100,000 levels": "[" * 100_000,
    "100,000 levels, closed": "[" * 100_000 + "]" * 100_000,
    "100,000 objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
}


@pytest.mark.parametrize("path", ["/orders", "/api/v1/orders"])
@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_not_json_is_400(idle_service: Serving, name: str, path: str) -> None:
    """A body that is not JSON in UTF-8, or is nested more than 32 levels deep, is a 400."""
    refusal(send(idle_service, NOT_JSON[name], path), 400)


def test_32_levels_are_read(idle_service: Serving) -> None:
    """A body nested exactly 32 levels deep is read, and refused for what it says, not for its depth."""
    problem = refusal(send(idle_service, '{"metadata": ' + "[" * 31 + "]" * 31 + "}"), 422)

    assert any(field.startswith("/metadata") for field in fields_of(problem))


@pytest.mark.parametrize("path", ["/orders/x/status", "/orders/populate", "/admin/seed"])
def test_every_body_is_read_alike(idle_service: Serving, path: str) -> None:
    """Broken JSON is a 400 wherever a body is taken."""
    method = "PATCH" if path.endswith("/status") else "POST"
    headers = {**JSON, "X-Admin-Password": "open sesame"}

    refusal(idle_service.client.request(method, path, content="{", headers=headers), 400)


# 404 and 405: paths and methods


@pytest.mark.parametrize(
    "path", ["/nothing", "/api/v1", "/api/v2/orders", "/orders/a/b", "/orders/x/nothing", "/admin"]
)
def test_an_unknown_path_is_404(idle_service: Serving, path: str) -> None:
    """A path that no operation has is a 404 problem."""
    refusal(idle_service.client.get(path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/orders", {"GET", "HEAD", "POST"}),
        ("PUT", "/api/v1/orders/", {"GET", "HEAD", "POST"}),
        ("POST", "/orders/x", {"GET", "HEAD", "DELETE"}),
        ("PATCH", "/orders/x", {"GET", "HEAD", "DELETE"}),
        ("GET", "/orders/x/status", {"PATCH"}),
        ("GET", "/orders/x/cancel", {"POST"}),
        ("OPTIONS", "/orders/x/retry", {"POST"}),
        ("DELETE", "/orders/x/events", {"GET", "HEAD"}),
        ("POST", "/orders/metrics", {"GET", "HEAD"}),
        ("DELETE", "/orders/metrics", {"GET", "HEAD"}),
        ("GET", "/orders/populate", {"POST"}),
        ("GET", "/admin/reset", {"POST"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("TRACE", "/", {"GET", "HEAD"}),
    ],
)
def test_a_wrong_method_is_405_with_allow(
    idle_service: Serving, method: str, path: str, allowed: set[str]
) -> None:
    """A method that a path does not have is a 405 whose Allow names exactly the ones it has."""
    answer = idle_service.client.request(method, path)

    refusal(answer, 405)
    assert set(answer.headers["allow"].split(", ")) == allowed


# 413, 408, 431: what is too large or too slow


@pytest.mark.parametrize("path", ["/orders", "/api/v1/orders", "/orders/populate", "/admin/seed"])
def test_a_body_over_one_mebibyte_is_413(idle_service: Serving, path: str) -> None:
    """A body of one byte more than 1 MiB is refused."""
    refusal(send(idle_service, json.dumps(GOOD).ljust(BODY_BYTES_MAX + 1), path), 413)


def test_a_body_of_one_mebibyte_is_taken(idle_service: Serving) -> None:
    """A body of exactly 1 MiB is read."""
    assert send(idle_service, json.dumps(GOOD).ljust(BODY_BYTES_MAX)).status_code == 201


def test_an_announced_large_body_is_413_before_it_is_sent(idle_service: Serving) -> None:
    """A Content-Length over 1 MiB is refused without waiting for the body."""
    head = request("POST", "/orders", content_type="application/json", content_length="900000000")
    with connect(idle_service.url) as connection:
        connection.sendall(head + b'{"customer_id"')
        answer = read_answer(connection)

    assert answer.status == 413
    check_problem(answer.json(), 413, answer.headers["x-request-id"])


def test_a_chunked_body_is_counted_while_it_streams(idle_service: Serving) -> None:
    """A body sent in chunks, without a length and without an end, is refused once 1 MiB has come."""
    head = request("POST", "/orders", content_type="application/json", transfer_encoding="chunked")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with connect(idle_service.url) as connection:
        connection.sendall(head + chunk * 17)
        answer = read_answer(connection)

    assert answer.status == 413
    check_problem(answer.json(), 413, answer.headers["x-request-id"])


def test_a_chunked_body_is_taken(idle_service: Serving) -> None:
    """A good body may come in chunks."""
    parts = re.findall(".{1,7}", json.dumps(GOOD))
    answer = idle_service.client.post("/orders", content=(part.encode() for part in parts), headers=JSON)

    assert answer.status_code == 201


def test_a_body_that_does_not_end_is_408(idle_service: Serving) -> None:
    """A body that has not come after ten seconds is refused, and the connection is closed."""
    head = request("POST", "/orders", content_type="application/json", content_length="100")
    with connect(idle_service.url) as connection:
        connection.sendall(head.replace(b"connection: close\r\n", b"") + b'{"customer_id"')
        answer = read_answer(connection)

    assert answer.status == 408
    check_problem(answer.json(), 408, answer.headers["x-request-id"])


@pytest.mark.parametrize(
    "headers",
    [{"X-Long": "a" * 33_000}, {"X-Longer": "a" * 60_000}, {f"X-{number}": "a" * 1_000 for number in range(40)}],
    ids=["one", "a longer one", "many"],
)
def test_headers_over_32_kibibytes_are_431(idle_service: Serving, headers: dict[str, str]) -> None:
    """Headers of more than 32 KiB together are refused."""
    refusal(idle_service.client.get("/orders", headers=headers), 431)


def test_headers_of_30_kibibytes_are_taken(idle_service: Serving) -> None:
    """Headers that stay below 32 KiB are no reason to refuse."""
    assert idle_service.client.get("/orders", headers={"X-Long": "a" * 30_000}).status_code == 200


# 400: what is said twice, or not at all

TWICE = {
    "a field": '{"customer_id": "c", "customer_id": "d", "items": [{"name": "Pen", "quantity": 1}]}',
    "the same value": '{"customer_id":"c","items":[{"name":"Pen","quantity":1}],"customer_id":"c"}',
    "in a line": '{"customer_id":"c","items":[{"name":"Pen","quantity":1,"quantity":2}]}',
    "in metadata": '{"customer_id":"c","metadata":{"a":1,"a":2},"items":[{"name":"Pen","quantity":1}]}',
    "null first": '{"customer_id":null,"customer_id":"c","items":[{"name":"Pen","quantity":1}]}',
    "escaped": '{"customer_id":"c","\\u0063ustomer_id":"d","items":[{"name":"Pen","quantity":1}]}',
    "apart": '{"customer_id" :"c","customer_id"\n: "d","items":[{"name":"Pen","quantity":1}]}',
    "hidden by text": '{"customer_id" :"c","customer_id":"d","items" : [{"name":"a:b\\":","quantity" :1}]}',
}


@pytest.mark.parametrize("body", TWICE.values(), ids=TWICE)
def test_a_name_that_is_given_twice_is_400(idle_service: Serving, body: str) -> None:
    """Of two members of one name a reader cannot know which was meant."""
    assert "twice" in refusal(send(idle_service, body), 400)["error"]


def test_many_names_of_which_the_last_comes_twice_hold_nobody_up(idle_service: Serving) -> None:
    """To find the one costs no more than to read the body: the time does not grow with its square."""
    names = ",".join(f'"{number:x}":1' for number in range(90_000))
    refused = refusal(send(idle_service, f'{{{names},"15f8f":2}}'), 400)
    assert "twice" in refused["error"] and "15f8f" in refused["error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/orders/populate", '{"total_entries": 1, "total_entries": 2}'),
        ("/orders/batch", f"[{order()}, {TWICE['a field']}]"),
    ],
)
def test_a_name_that_is_given_twice_elsewhere(idle_service: Serving, path: str, body: str) -> None:
    """So it is in every body; in a batch it is the verdict of its row."""
    answer = send(idle_service, body, path)
    if path == "/orders/batch":
        assert [row["status"] for row in answer.json()["results"]] == [202, 400]
    else:
        refusal(answer, 400)


@pytest.mark.parametrize(
    "body",
    [
        '{"customer_name": "a:b \\":\\" c", "items": [{"name": "x : y", "quantity": 1}], '
        '"metadata": {"a:b": "c:d"}}',
        '{"customer_id" : "c", "user_id" : null, "items" : [{"name" : "Pen", "quantity" : 1}]}',
    ],
)
def test_colons_elsewhere_are_no_names(idle_service: Serving, body: str) -> None:
    """Texts may have colons and quotes, and names may stand apart from theirs."""
    assert send(idle_service, body).status_code == 201


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
def test_a_byte_order_mark_is_named(idle_service: Serving, mark: bytes) -> None:
    """What some editors put before a text is refused by its name."""
    assert "byte order mark" in refusal(send(idle_service, mark + order().encode()), 400)["error"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n", 400),
        (b"GET /healthz HTTP/1.0\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n", 200),
    ],
)
def test_a_request_says_its_host_once(idle_service: Serving, head: bytes, status: int) -> None:
    """As HTTP/1.1 asks; HTTP/1.0 does not."""
    assert exchange(idle_service.url, head + b"Connection: close\r\n\r\n").status == status


# 415: media types


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "text/json", "", None]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/orders"),
        ("POST", "/api/v1/orders/"),
        ("PATCH", "/orders/x/status"),
        ("POST", "/orders/populate"),
    ],
)
def test_another_media_type_is_415(idle_service: Serving, method: str, path: str, media_type: str | None) -> None:
    """A body that is not said to be application/json is refused, whatever it holds."""
    headers = {} if media_type is None else {"Content-Type": media_type}

    refusal(idle_service.client.request(method, path, content=json.dumps(GOOD), headers=headers), 415)


@pytest.mark.parametrize(("coding", "status"), [("gzip", 415), ("br, identity", 415), ("identity", 201)])
def test_a_body_that_is_packed_is_415(idle_service: Serving, coding: str, status: int) -> None:
    """A Content-Encoding is refused by a sentence, and not by what its bytes look like as JSON."""
    answer = idle_service.client.post("/orders", content=order(), headers=JSON | {"Content-Encoding": coding})
    assert answer.status_code == status
    if status == 415:
        assert "Content-Encoding" in refusal(answer, 415)["error"]


@pytest.mark.parametrize(
    "media_type", ["application/json; charset=utf-8", "Application/JSON", "application/json ;a=b"]
)
def test_json_by_any_spelling_is_taken(idle_service: Serving, media_type: str) -> None:
    """The media type is read without regard to case or parameters."""
    answer = idle_service.client.post("/orders", content=json.dumps(GOOD), headers={"Content-Type": media_type})

    assert answer.status_code == 201


# 422: JSON that breaks a rule

ITEM = {"name": "Pen", "quantity": 1}
BROKEN_RULES: dict[str, tuple[str, list[str]]] = {
    "null": ("null", [""]),
    "an array": ("[]", [""]),
    "a text": ('"order"', [""]),
    "nothing given": ("{}", ["/customer_id", "/items"]),
    "no customer": (json.dumps({"items": [ITEM]}), ["/customer_id"]),
    "a null customer": (order(customer_id=None), ["/customer_id"]),
    "an empty customer": (order(customer_id=""), ["/customer_id"]),
    "a customer of 129 characters": (order(customer_id="x" * 129), ["/customer_id"]),
    "a boolean customer": (order(customer_id=True), ["/customer_id"]),
    "a fraction as customer": (order(customer_id=1.5), ["/customer_id"]),
    "an object as customer": (order(customer_id={"id": 1}), ["/customer_id"]),
    "a customer beyond 2**53": (order(customer_id=2**53), ["/customer_id"]),
    "two customers": (order(user_id="d"), ["/user_id"]),
    "a customer id of another type": (order(customer_id=1, user_id="1"), ["/user_id"]),
    "no items": (json.dumps({"customer_id": 1}), ["/items"]),
    "null items": (order(items=None), ["/items"]),
    "empty items": (order(items=[]), ["/items"]),
    "empty item ids": (order(items=None, item_ids=[]), ["/item_ids"]),
    "items and item ids": (order(item_ids=[1]), ["/item_ids"]),
    "items as an object": (order(items={"0": ITEM}), ["/items"]),
    "2,001 items": (order(items=[ITEM] * 2_001), ["/items"]),
    "2,001 item ids": (order(items=None, item_ids=[1] * 2_001), ["/item_ids"]),
    "an item that is a number": (order(items=[ITEM, 5]), ["/items/1"]),
    "an item without a name": (order(items=[{"quantity": 1}]), ["/items/0"]),
    "an item without a quantity": (order(items=[{"name": "Pen"}]), ["/items/0/quantity"]),
    "quantity 0": (order(items=[{"name": "Pen", "quantity": 0}]), ["/items/0/quantity"]),
    "a negative quantity": (order(items=[{"name": "Pen", "quantity": -1}]), ["/items/0/quantity"]),
    "a fractional quantity": (order(items=[{"name": "Pen", "quantity": 1.5}]), ["/items/0/quantity"]),
    "a quantity as text": (order(items=[{"name": "Pen", "quantity": "1"}]), ["/items/0/quantity"]),
    "a boolean quantity": (order(items=[{"name": "Pen", "quantity": True}]), ["/items/0/quantity"]),
    "a quantity over a million": (order(items=[{"name": "Pen", "quantity": 1_000_001}]), ["/items/0/quantity"]),
    "two names": (order(items=[{**ITEM, "item_name": "Ink"}]), ["/items/0/item_name"]),
    "two prices": (order(items=[{**ITEM, "price": 1, "unit_price": 2}]), ["/items/0/unit_price"]),
    "an unknown field": (order(customer="c"), ["/customer"]),
    "an unknown field of an item": (order(items=[{**ITEM, "colour": "blue"}]), ["/items/0/colour"]),
    "an unknown field to be escaped": (order(**{"a/b~c": 1}), ["/a~1b~0c"]),
    "an empty unknown field": (order(**{"": 1}), ["/"]),
    "three decimals in USD": (order(items=[{**ITEM, "price": 1.005}]), ["/items/0/price"]),
    "a third decimal": (order(items=[{**ITEM, "price": "1.291"}]), ["/items/0/price"]),
    "one decimal in JPY": (order(items=[{**ITEM, "price": 1.5}], currency="JPY"), ["/items/0/price"]),
    "four decimals in KWD": (order(total_amount="0.0001", currency="KWD"), ["/total_amount"]),
    "a negative price": (order(items=[{**ITEM, "price": -0.01}]), ["/items/0/price"]),
    "a boolean price": (order(items=[{**ITEM, "price": False}]), ["/items/0/price"]),
    "an empty price": (order(items=[{**ITEM, "price": ""}]), ["/items/0/price"]),
    "a price in words": (order(items=[{**ITEM, "price": "two"}]), ["/items/0/price"]),
    "a price with a sign of money": (order(items=[{**ITEM, "price": "$2"}]), ["/items/0/price"]),
    "a price with a comma": (order(items=[{**ITEM, "price": "1,50"}]), ["/items/0/price"]),
    "a price with an underscore": (order(items=[{**ITEM, "price": "1_0"}]), ["/items/0/price"]),
    "a price in Arabic digits": (order(items=[{**ITEM, "price": "\u0663"}]), ["/items/0/price"]),
    "a price as the text NaN": (order(items=[{**ITEM, "price": "NaN"}]), ["/items/0/price"]),
    "a price as the text sNaN": (order(items=[{**ITEM, "price": "sNaN"}]), ["/items/0/price"]),
    "sNaN beside another price": (
        order(items=[{**ITEM, "price": 1, "unit_price": "sNaN"}]),
        ["/items/0/unit_price"],
    ),
    "a price as the text Infinity": (order(items=[{**ITEM, "price": "-Infinity"}]), ["/items/0/price"]),
    "a price over the limit": (order(items=[{**ITEM, "price": "10000000000000"}]), ["/items/0/price"]),
    "a sum over the limit": (
        order(items=[{"name": "Pen", "quantity": 1_000_000, "price": "9999999999999.99"}]),
        ["/items"],
    ),
    "a total that is not the sum": (order(items=[{**ITEM, "price": 1}], total_amount=2), ["/total_amount"]),
    "one priced line of two": (order(items=[{**ITEM, "price": 1}, ITEM]), ["/items/1/price"]),
    "an unknown currency": (order(currency="XXX"), ["/currency"]),
    "a currency in small letters": (order(currency="usd"), ["/currency"]),
    "a currency of four letters": (order(currency="EURO"), ["/currency"]),
    "an empty id": (order(order_id=""), ["/order_id"]),
    "an id with a slash": (order(order_id="a/b"), ["/order_id"]),
    "an id with a line end": (order(order_id="a\n"), ["/order_id"]),
    "an id of 65 characters": (order(order_id="x" * 65), ["/order_id"]),
    "a reserved id": (order(order_id="metrics"), ["/order_id"]),
    "an id of dots": (order(order_id=".."), ["/order_id"]),
    "metadata that is an array": (order(metadata=[]), ["/metadata"]),
    "an empty payment token": (order(payment_token=""), ["/payment_token"]),
    "NUL in a text": (order(customer_name="a\x00b"), ["/customer_name"]),
    "NUL in an id": (order(order_id="a\x00"), ["/order_id"]),
    "NUL in a line": (order(items=[ITEM, {"name": "a\x00", "quantity": 1}]), ["/items/1/name"]),
    "NUL in a customer id": (order(customer_id="\x00"), ["/customer_id"]),
    "NUL in metadata": (order(metadata={"note": "\x00"}), ["/metadata/note"]),
    "half a surrogate pair": (order(customer_name="a\ud800b"), ["/customer_name"]),
    "the other half": (order(customer_name="\udfff"), ["/customer_name"]),
    "half a pair in metadata": (order(metadata={"note": "\udc00x"}), ["/metadata/note"]),
}
HUGE = {
    "5,000 digits": "9" * 5_000,
    "a large exponent": "1e999999",
    "a larger exponent": "1e99999999999999999999",
    "a tiny number": "1e-999999",
    "a tinier number": "1e-99999999999999999999",
    "many decimals": "0." + "0" * 5_000 + "1",
}


@pytest.mark.parametrize("name", BROKEN_RULES)
def test_a_broken_rule_is_422_at_its_pointer(idle_service: Serving, name: str) -> None:
    """JSON that breaks a rule is refused, and the fault is named by its JSON pointer."""
    body, pointers = BROKEN_RULES[name]
    problem = refusal(send(idle_service, body), 422)

    assert fields_of(problem) == pointers


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("field", ["price", "quantity", "customer_id", "total_amount", "metadata"])
def test_a_number_without_measure_is_422(idle_service: Serving, field: str, number: str) -> None:
    """A number too large, too small or too long for its field is refused at its pointer, in little time."""
    item = f'{{"name": "x", "quantity": {HUGE[number] if field == "quantity" else 1}'
    item += f', "price": {HUGE[number]}}}' if field == "price" else "}"
    extra = {
        "customer_id": f'"customer_id": {HUGE[number]}',
        "total_amount": f'"customer_id": 1, "total_amount": {HUGE[number]}',
        "metadata": f'"customer_id": 1, "metadata": {{"a": {HUGE[number]}}}',
    }.get(field, '"customer_id": 1')
    answer = send(idle_service, f'{{{extra}, "items": [{item}]}}')

    if field == "metadata" and HUGE[number].startswith(("1e-", "0.")):
        assert answer.status_code in (201, 422)  # as a number it is next to 0, which is a fine thing to note down
        return
    pointer = f"/items/0/{field}" if field in ("price", "quantity") else f"/{field}"
    assert all(found.startswith(pointer) for found in fields_of(refusal(answer, 422)))


def test_every_fault_is_named_at_once(idle_service: Serving) -> None:
    """A body with faults in many places is answered with all of them, each at its own pointer."""
    body = {
        "customer_idd": "c",
        "items": [{"name": "", "quantity": 0, "x": 1}, {"quantity": "a", "price": []}, {"name": "ok"}, 5],
        "total_amount": {},
        "currency": 7,
        "order_id": "",
    }
    problem = refusal(send(idle_service, json.dumps(body)), 422)

    assert set(fields_of(problem)) == {
        "/customer_idd",
        "/items/0/x",
        "/items/0/name",
        "/items/0/quantity",
        "/items/1/quantity",
        "/items/1/price",
        "/items/2/quantity",
        "/items/3",
        "/total_amount",
        "/currency",
        "/order_id",
    }


def test_every_fault_of_sense_is_named_at_once(idle_service: Serving) -> None:
    """Faults that no single field shows are named together, too."""
    body = {
        "items": [{"quantity": 1}, {"name": "a", "item_name": "b", "quantity": 1, "price": "1.001"}],
        "currency": "XXX",
        "order_id": "metrics",
    }
    problem = refusal(send(idle_service, json.dumps(body)), 422)

    assert {"/customer_id", "/items/0", "/items/1/item_name", "/items/1/price", "/currency", "/order_id"} <= set(
        fields_of(problem)
    )


def test_each_fault_in_metadata_has_its_own_pointer(idle_service: Serving) -> None:
    """Metadata is flat: each nested value in it is named by its own pointer."""
    problem = refusal(send(idle_service, order(metadata={"a": {"b": 1}, "good": 1, "c/d": [1]})), 422)

    assert set(fields_of(problem)) == {"/metadata/a", "/metadata/c~1d"}


def test_escaped_pairs_and_backslashes_are_text(idle_service: Serving) -> None:
    r"""A whole surrogate pair, and a backslash before `u0000` or `ud800`, are ordinary text."""
    body = '{"customer_id": 1, "items": [{"name": "\\ud83c\\udf55 \\\\u0000 \\\\ud800", "quantity": 1}]}'
    answer = send(idle_service, body)

    assert answer.status_code == 201
    assert answer.json()["items"][0]["name"] == "🍕 \\u0000 \\ud800"


@pytest.mark.parametrize(
    "body",
    [
        {"status": "shipped"},
        {"status": "PENDING "},
        {"status": None},
        {"status": 1},
        {},
        {"status": "cancelled", "reason": "late"},
    ],
)
def test_a_status_that_is_none_is_422(idle_service: Serving, body: dict[str, Any]) -> None:
    """PATCH takes one known status and nothing else."""
    order_id = send(idle_service, order()).json()["order_id"]
    problem = refusal(idle_service.client.patch(f"/orders/{order_id}/status", json=body), 422)

    assert fields_of(problem) == ["/reason" if "reason" in body else "/status"]


@pytest.mark.parametrize("call", ["cancel", "retry"])
def test_a_body_where_none_is_taken_is_422(idle_service: Serving, call: str) -> None:
    """Cancel and retry take no body; an empty object is as good as none."""
    order_id = send(idle_service, order()).json()["order_id"]

    refusal(idle_service.client.post(f"/orders/{order_id}/{call}", json={"why": "late"}), 422)
    assert idle_service.client.post(f"/orders/{order_id}/cancel", json={}).status_code == 202


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/orders?colour=blue", "colour"),
        ("/orders?limit=1&limit=2", "limit"),
        ("/orders?customer_id=a%00b", "customer_id"),
        ("/orders?customer_id=%ff", "customer_id"),
        ("/orders/x?colour=blue", "colour"),
        ("/orders/x?wait=31", "wait"),
        ("/orders/x?wait=-1", "wait"),
        ("/orders/x?wait=nan", "wait"),
        ("/orders/x?wait=1e1", "wait"),
        ("/orders/x?wait=", "wait"),
        ("/orders/x?wait=%D9%A3", "wait"),
        ("/orders/x?min_version=-1", "min_version"),
        ("/orders/x?min_version=1.5", "min_version"),
        ("/orders/x?min_version=99999999999999999999", "min_version"),
        ("/orders/metrics?getOrderIds=maybe", "getOrderIds"),
        ("/orders/status?x=1", "x"),
        ("/health?x=1", "x"),
    ],
)
def test_a_bad_query_parameter_is_422(idle_service: Serving, path: str, parameter: str) -> None:
    """A query parameter that is unknown, given twice, or has no sense is refused by its name."""
    assert fields_of(refusal(idle_service.client.get(path), 422)) == [parameter]


# What comes back with every answer


@pytest.mark.parametrize(
    "path", ["/orders", "/healthz", "/nothing", "/orders/ORD-nobody", "/docs", "/openapi.json"]
)
def test_request_id_and_traceparent_come_back(idle_service: Serving, path: str) -> None:
    """X-Request-ID and traceparent are returned as they came, with an answer or a refusal."""
    given = {"X-Request-ID": "checkout-42.a:b", "traceparent": f"00-{'4b' * 16}-{'f0' * 8}-01"}
    answer = idle_service.client.get(path, headers=given)

    assert answer.headers["x-request-id"] == "checkout-42.a:b"
    assert answer.headers["traceparent"] == given["traceparent"]


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "é"])
def test_a_request_id_is_made_where_none_is_good(idle_service: Serving, given: str | None) -> None:
    """Without a usable X-Request-ID the answer has a fresh one."""
    headers = {} if given is None else {"X-Request-ID": given.encode()}
    first, second = (idle_service.client.get("/healthz", headers=headers) for _ in range(2))

    assert re.fullmatch(r"[0-9a-f]{32}", first.headers["x-request-id"])
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_a_bad_traceparent_does_not_come_back(idle_service: Serving) -> None:
    """A traceparent that is not one is dropped."""
    assert "traceparent" not in idle_service.client.get("/healthz", headers={"traceparent": "00-x-y-01"}).headers


def test_what_is_not_http_is_400(idle_service: Serving) -> None:
    """Bytes that are no HTTP request are answered 400, and the service goes on."""
    answer = exchange(idle_service.url, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")

    assert answer.status == 400
    assert b"Traceback" not in answer.body
    assert idle_service.client.get("/healthz").status_code == 200


def test_head_is_get_without_its_body(idle_service: Serving) -> None:
    """HEAD answers the status and headers of GET and no body."""
    head, got = idle_service.client.head("/healthz"), idle_service.client.get("/healthz")

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]
    assert head.headers["content-type"] == got.headers["content-type"]


def test_a_refused_order_leaves_nothing_behind(idle_service: Serving) -> None:
    """A refused body stores no order: the total stays, and its id is free."""
    total = idle_service.client.get("/orders").json()["total"]
    refusal(send(idle_service, order(order_id="refused-1", items=[{**ITEM, "price": "1.001"}])), 422)

    assert idle_service.client.get("/orders").json()["total"] == total
    assert idle_service.client.get("/orders/refused-1").status_code == 404
    assert send(idle_service, order(order_id="refused-1")).status_code == 201
