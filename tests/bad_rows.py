"""Everything bad that a client may send, and what it is answered: the rows of `bad_input.py`.

Nothing of the service is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

HOST = b"Host: bad-input\r\n"
JSON = b"Content-Type: application/json\r\n"
NDJSON = b"Content-Type: application/x-ndjson\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
PEN: dict[str, Any] = {"name": "Pen", "quantity": 1}
GOOD: dict[str, Any] = {"customer_id": "c", "items": [PEN]}
#: Limits that docs/limits.md promises.
BODY_BYTES_MAX = 1024 * 1024
DEPTH_MAX = 32


class Row(NamedTuple):
    """What is sent, and how its answers are described (`Answered.text`); `{order}` in it is an order at rest.

    `behind` is the description behind nginx with its own defaults, where it is another. `half` is sent at once and
    the rest never, so that the service has to end it: these rows take as long as its longest limit.
    """

    input: str
    sent: bytes
    expected: str
    behind: str | None = None
    half: bool = False


def head(line: str, headers: bytes = HOST) -> bytes:
    """Return a request without a body."""
    return f"{line} HTTP/1.1\r\n".encode() + headers + b"\r\n"


def get(target: str, headers: bytes = b"") -> bytes:
    return head(f"GET {target}", HOST + headers)


def call(body: str | bytes, line: str = "POST /orders", headers: bytes = JSON) -> bytes:
    """Return a request with a body whose length is said."""
    data = body.encode() if isinstance(body, str) else body
    return f"{line} HTTP/1.1\r\n".encode() + HOST + headers + b"Content-Length: %d\r\n\r\n" % len(data) + data


def chunked(*parts: bytes, headers: bytes = JSON, version: bytes = b"1.1") -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"POST /orders HTTP/" + version + b"\r\n" + HOST + headers + CHUNKED + b"\r\n" + chunks + b"0\r\n\r\n"


def order(**fields: Any) -> str:
    """Return a good order but for `fields`; a lone surrogate is written as its escape."""
    return json.dumps({**GOOD, **fields})


def item(**fields: Any) -> str:
    return order(items=[{**PEN, **fields}])


GOOD_BYTES = order().encode()
LENGTH = b"Content-Length: %d\r\n" % len(GOOD_BYTES)


def not_json() -> Iterator[Row]:
    """What no reader of JSON takes."""
    bodies: dict[str, str | bytes] = {
        "no body": "",
        "JSON that is cut off": order()[:-5],
        "a comma too many": '{"customer_id": 1,}',
        "text behind the JSON": order() + "x",
        "two documents": order() * 2,
        "single quotes": "{'customer_id': 1}",
        "a comment": '{"customer_id": 1 /* me */}',
        "NaN": '{"customer_id": 1, "total_amount": NaN}',
        "Infinity": '{"customer_id": 1, "total_amount": Infinity}',
        "-Infinity": '{"customer_id": 1, "total_amount": -Infinity}',
        "a leading zero": '{"customer_id": 007}',
        "a bare control character": b'{"customer_id": "a\x01"}',
        "a bare NUL": b'{"customer_id": "a\x00"}',
        "bytes that are no UTF-8": b'{"customer_id": "\xff"}',
        "a surrogate in UTF-8": b'{"customer_id": "\xed\xa0\x80"}',
        "an overlong form in UTF-8": b'{"customer_id": "\xc0\xaf"}',
        "a byte order mark": b"\xef\xbb\xbf" + order().encode(),
        "UTF-16": order().encode("utf-16"),
        "33 levels": '{"metadata": {"a": ' + "[" * (DEPTH_MAX - 1) + "]" * (DEPTH_MAX - 1) + "}}",
        "33 levels under an unknown name": '{"x": ' + "[" * DEPTH_MAX + "]" * DEPTH_MAX + "}",
        "100,000 lists that do not end": "[" * 100_000,
        "100,000 objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    }
    for name, body in bodies.items():
        yield Row(name, call(body), "400")


#: Calls that take a JSON object, each with a member that may be in it.
ROUTES = (
    ("POST /orders", '"customer_id": 1'),
    ("POST /api/v1/orders", '"customer_id": 1'),
    ("PATCH /orders/{order}/status", '"status": "cancelled"'),
    ("PATCH /api/v1/orders/{order}/status", '"status": "cancelled"'),
    ("POST /orders/{order}/refunds", '"amount": 1'),
    ("POST /api/v1/orders/{order}/refunds", '"amount": 1'),
    ("POST /orders/{order}/fulfilment", '"outcome": "done"'),
    ("POST /api/v1/orders/{order}/fulfilment", '"outcome": "done"'),
    ("POST /orders/populate", '"total_entries": 1'),
    ("POST /api/v1/orders/populate", '"total_entries": 1'),
    ("POST /api/v1/webhooks", '"url": "https://example.com/"'),
    ("PATCH /api/v1/webhooks/nobody", '"description": "a"'),
    ("POST /api/v1/webhooks/nobody/redeliver", '"since": "2026-01-01T00:00:00Z"'),
)


def every_route() -> Iterator[Row]:
    """What is refused wherever JSON is taken."""
    for line, member in ROUTES:
        yield Row(f"{line}: broken JSON", call("{", line), "400")
        yield Row(f"{line}: a name twice", call(f"{{{member}, {member}}}", line), "400")
        yield Row(f"{line}: a byte order mark", call(b"\xef\xbb\xbf{}", line), "400")
        yield Row(f"{line}: a list", call("[1]", line), "422 ''")
        yield Row(f"{line}: an unknown field", call(f'{{{member}, "x~/y": 1}}', line), "422 /x~0~1y")
        yield Row(
            f"{line}: text", call("{}", line, b"Content-Type: text/plain\r\n"), "415 accept: application/json"
        )
        yield Row(
            f"{line}: gzip",
            call("{}", line, JSON + b"Content-Encoding: gzip\r\n"),
            "415 accept-encoding: identity",
        )
        announced = head(line, HOST + JSON + b"Content-Length: %d\r\n" % (BODY_BYTES_MAX + 1))
        yield Row(f"{line}: over 1 MiB", announced, "413; closes", "413 by nginx")


def twice() -> Iterator[Row]:
    """A name twice in one object, at any depth: which one would count?"""
    bodies = {
        "in the order, the same value": '{"customer_id": 1, "customer_id": 1, "items": [PEN]}',
        "in the order, another value": '{"customer_id": 1, "items": [PEN], "customer_id": 2}',
        "in a line": '{"customer_id": 1, "items": [{"name": "Pen", "quantity": 1, "quantity": 2}]}',
        "in the last line": '{"customer_id": 1, "items": [PEN, {"name": "a", "quantity": 1, "name": "b"}]}',
        "in metadata": '{"customer_id": 1, "items": [PEN], "metadata": {"a": 1, "a": 2}}',
        "once as an escape": '{"customer_id": 1, "items": [PEN], "metadata": {"a": 1, "\\u0061": 2}}',
        "with a blank before the colon": '{"customer_id": 1, "items": [PEN], "user_id" : 1, "user_id" : 1}',
        "null and then a value": '{"customer_id": null, "customer_id": 1, "items": [PEN]}',
        "beside colons in a text": '{"customer_id": "\\":", "customer_id": 1, "items": [PEN]}',
        "in an unknown field": '{"customer_id": 1, "items": [PEN], "x": [{"a": 1, "a": 2}]}',
    }
    for name, text in bodies.items():
        body = text.replace("PEN", json.dumps(PEN))
        yield Row(f"a name twice: {name}", call(body), "400")
        lines = order().replace("\n", "") + "\n" + body + "\n" + order()
        yield Row(
            f"a name twice: {name}, in a row of NDJSON",
            call(lines, "POST /orders/batch", NDJSON),
            "200 rows: 202 400 202",
        )
        yield Row(
            f"a name twice: {name}, in a list",
            call(f"[{order()}, {body}]", "POST /api/v1/orders/batch"),
            "200 rows: 202 400",
        )


#: What a value is not to be, by kind; a value that its field takes is left out there.
_WRONG: dict[str, Any] = {"true": True, "1.5": 1.5, "a list": [[]], "an object": {"a": 1}}
_TEXT = {**_WRONG, "a number": 1, "an empty text": "", "NUL": "a\x00b", "half a surrogate pair": "a\ud800"}
_ID = {
    **_WRONG,
    "an empty text": "",
    "a number beyond 2**53": 2**53,
    "NUL": "\x00",
    "half a surrogate pair": "\udfff",
}
_AMOUNT = {
    "true": True,
    "a list": [1],
    "an object": {},
    "an empty text": "",
    "words": "two",
    "an underscore": "1_0",
    "the text NaN": "NaN",
    "the text sNaN": "sNaN",
    "the text Infinity": "-Infinity",
    "Arabic digits": "\u0663",
    "a third decimal": 1.005,
    "below zero": -0.01,
    "more than there is": "10000000000000",
}
_COUNT = {**_WRONG, "zero": 0, "below zero": -1, "a text": "1", "null": None, "over a million": 1_000_001}
#: Fields of an order and of a line, what they do not take, and further fields that are needed beside them.
FIELDS: dict[str, dict[str, Any]] = {
    "customer_id": {**_ID, "129 characters": "x" * 129},
    "user_id": {**_ID, "129 characters": "x" * 129},
    "customer_name": {**_TEXT, "257 characters": "x" * 257},
    "items": {
        "null": None,
        "a text": "Pen",
        "true": True,
        "an object": {"0": PEN},
        "none": [],
        "2,001": [PEN] * 2001,
    },
    "item_ids": {"a text": "1", "an object": {}, "none": [], "beside items": [1]},
    "total_amount": _AMOUNT,
    "order_id": {
        **_WRONG,
        "an empty text": "",
        "a slash": "a/b",
        "a line end": "a\n",
        "dots": "..",
        "NUL": "a\x00",
    }
    | {"65 characters": "x" * 65, "a word of a path": "metrics", "a letter beyond ASCII": "\u00e9"},
    "currency": {**_TEXT, "small letters": "usd", "none that is known": "XXX", "four letters": "EURO"},
    "metadata": {
        "a text": "a",
        "a number": 1,
        "true": True,
        "a list": [],
        "51 entries": dict.fromkeys(map(str, range(51))),
    },
    "payment_token": {**_TEXT, "257 characters": "x" * 257},
}
LINE_FIELDS: dict[str, dict[str, Any]] = {
    "quantity": _COUNT,
    "item_id": _ID,
    "name": {**_TEXT, "513 characters": "x" * 513},
    "item_name": {**_TEXT, "another than name": "Ink"},
    "price": _AMOUNT,
    "unit_price": _AMOUNT,
}
METADATA = {
    "an object": ({"a": {"b": 1}}, "/metadata/a"),
    "a list": ({"good": 1, "c/d": [1]}, "/metadata/c~1d"),
    "NUL": ({"a": "\x00"}, "/metadata/a"),
    "half a surrogate pair": ({"a": "\udc00x"}, "/metadata/a"),
    "1,025 characters": ({"a": "x" * 1025}, "/metadata/a"),
    "a name of 65 characters": ({"x" * 65: 1}, "/metadata"),
    "a number beyond 2**53": ({"a": 2**53}, "/metadata/a"),
}


def wrong_values() -> Iterator[Row]:
    """Every field with what it does not take: each fault at its JSON pointer."""
    for field, values in FIELDS.items():
        for what, value in values.items():
            yield Row(f"{field}: {what}", call(order(**{field: value})), f"422 /{field}")
    for field, values in LINE_FIELDS.items():
        for what, value in values.items():
            yield Row(f"{field} of a line: {what}", call(item(**{field: value})), f"422 /items/0/{field}")
    for what, (value, pointer) in METADATA.items():
        yield Row(f"an entry of metadata: {what}", call(order(metadata=value)), f"422 {pointer}")
    huge = {"5,000 digits": "9" * 5000, "a large exponent": "1e999999", "a larger one": "1e99999999999999999999"}
    for what, number in huge.items():
        for field in ("quantity", "price"):
            body = f'{{"customer_id": 1, "items": [{{"name": "a", "quantity": 1, "{field}": {number}}}]}}'
            body = body.replace('"quantity": 1, "quantity"', '"quantity"')
            yield Row(f"{field}: {what}", call(body), f"422 /items/0/{field}")
        for field in ("customer_id", "total_amount"):
            body = f'{{"user_id": 1, "items": [{json.dumps(PEN)}], "{field}": {number}}}'
            yield Row(f"{field}: {what}", call(body), f"422 /{field}")
    yield Row("nothing in it", call("{}"), "422 /customer_id /items")
    yield Row(
        "faults in many places",
        call(order(customer_id={}, items=[{}, 5], x=1)),
        "422 /x /customer_id /items/0/quantity /items/1",
    )
    yield Row(
        "a status that is none", call('{"status": "shipped"}', "PATCH /orders/{order}/status"), "422 /status"
    )
    yield Row("a body where none is taken", call('{"a": 1}', "POST /orders/{order}/cancel"), "422 ''")


def parameters() -> Iterator[Row]:
    """What stands behind the question mark."""
    for target, name in (
        ("/orders?colour=blue", "colour"),
        ("/orders?limit=1&limit=2", "limit"),
        ("/orders?limit=0", "limit"),
        ("/orders?limit=201", "limit"),
        ("/orders?limit=1e1", "limit"),
        ("/orders?limit=99999999999999999999", "limit"),
        ("/orders?offset=-1", "offset"),
        ("/orders?page=0", "page"),
        ("/orders?cursor=nonsense", "cursor"),
        ("/orders?status=shipped", "status"),
        ("/orders?created_after=yesterday", "created_after"),
        ("/orders?customer_id=a%00b", "customer_id"),
        ("/orders?customer_id=%ff", "customer_id"),
        ("/orders/{order}?wait=31", "wait"),
        ("/orders/{order}?wait=nan", "wait"),
        ("/orders/{order}?min_version=-1", "min_version"),
        ("/orders/metrics?getOrderIds=maybe", "getOrderIds"),
        ("/api/v1/events?after=nonsense", "after"),
        ("/api/v1/events?types=order.done", "types"),
    ):
        yield Row(f"GET {target}", get(target), f"422 {name}")


def paths_and_methods() -> Iterator[Row]:
    """What is not there, and what cannot be done with what is."""
    for target in (
        "/nothing",
        "/api/v2/orders",
        "/orders/a/b",
        "/orders/nobody",
        "/orders/%00",
        "/orders/%ff",
        "/orders/..%2f..",
        "/orders/" + "x" * 65,
        "/orders/a%20b",
        "/orders/nobody/events",
        "/api/v1/orders/nobody/explain",
        "/api/v1/webhooks/nobody",
    ):
        behind = "400 by nginx" if target in ("/orders/%00", "/orders/..%2f..") else None
        yield Row(f"GET {target[:40]}", get(target), "404", behind)
    for line in ("DELETE /orders/nobody", "POST /orders/nobody/cancel", "POST /api/v1/orders/nobody/retry"):
        yield Row(line, head(line), "404")
    status = call('{"status": "cancelled"}', "PATCH /orders/nobody/status")
    yield Row("PATCH /orders/nobody/status", status, "404")
    for line, allowed in (
        ("DELETE /orders", "GET, HEAD, POST"),
        ("PUT /api/v1/orders/", "GET, HEAD, POST"),
        ("POST /orders/{order}", "DELETE, GET, HEAD"),
        ("GET /orders/{order}/status", "PATCH"),
        ("OPTIONS /orders/{order}/retry", "POST"),
        ("DELETE /orders/metrics", "GET, HEAD"),
        ("POST /health", "GET, HEAD"),
        ("PURGE /healthz", "GET, HEAD"),
    ):
        yield Row(line, head(line), f"405 allow: {allowed}")
    yield Row("TRACE /healthz", head("TRACE /healthz"), "405 allow: GET, HEAD", "405 by nginx")
    for line in ("FOO /healthz", "DESCRIBE /healthz"):
        yield Row(f"{line}, a method that nobody knows", head(line), "501; closes")
    for line, behind in (("get /healthz", "400 by nginx"), ("CONNECT a:80", "400 by nginx")):
        yield Row(line, head(line), "501; closes", behind)


def keys_and_versions() -> Iterator[Row]:
    """Headers that decide what is done."""
    for what, key in (
        ("empty", b""),
        ("a blank", b"a b"),
        ("256 characters", b"x" * 256),
        ("a letter beyond ASCII", b"\xe9"),
    ):
        sent = call(order(), headers=JSON + b"Idempotency-Key: " + key + b"\r\n")
        yield Row(f"Idempotency-Key: {what}", sent, "400")
    for what, line in (
        ("two", "POST /orders"),
        ("two, at a status", "PATCH /orders/{order}/status"),
        ("two, at a batch", "POST /orders/batch"),
    ):
        body = {"PATCH": '{"status": "cancelled"}'}.get(line[:5], f"[{order()}]" if "batch" in line else order())
        sent = call(body, line, JSON + b"Idempotency-Key: a\r\nidempotency-key: a\r\n")
        yield Row(f"Idempotency-Key: {what}", sent, "400")
    again = JSON + b"Idempotency-Key: bad-input\r\n"
    yield Row(
        "Idempotency-Key: another body",
        call(order(customer_id="one"), headers=again) + call(order(customer_id="two"), headers=again),
        "201, 422",
    )
    status = '{"status": "processing"}', "PATCH /orders/{order}/status"
    for what, tag, expected in (
        ("an older version", b'"1"', '412 etag: "2"'),
        ("no version", b'"x"', '412 etag: "2"'),
        ("without quotes", b"2", '412 etag: "2"'),
        ("a weak tag", b'W/"2"', '412 etag: "2"'),
        ("a number without end", b'"' + b"9" * 400 + b'"', '412 etag: "2"'),
        ("two tags", b'"1", "2"', "400"),
    ):
        yield Row(f"If-Match: {what}", call(*status, JSON + b"If-Match: " + tag + b"\r\n"), expected)
    yield Row("an illegal move", call(*status), "409 legal: none")
    yield Row("an id that is taken", call(order(order_id="{order}")), "409")


def admin(password: str) -> Iterator[Row]:
    """What only an administrator may do; without a password to show nothing of it is asked."""
    basic = 'www-authenticate: Basic realm="expediter admin"'
    for line in ("POST /admin/reset", "POST /admin/seed", "POST /admin/verify"):
        yield Row(f"{line}: no password", head(line), f"401 {basic}")
        wrong = HOST + b"X-Admin-Password: wrong" + password.encode() + b"\r\n"
        yield Row(f"{line}: a wrong password", head(line, wrong), f"401 {basic}")
        yield Row(f"{line}: no Basic", head(line, HOST + b"Authorization: Basic %%%\r\n"), f"401 {basic}")
    given = JSON + b"X-Admin-Password: " + password.encode() + b"\r\n"
    for what, body, expected in (
        ("broken JSON", "{", "400"),
        ("a name twice", '{"count": 1, "count": 2}', "400"),
        ("no order", '{"count": 0}', "422 /count"),
        ("a text", '{"count": "1"}', "422 /count"),
    ):
        yield Row(f"POST /admin/seed: {what}", call(body, "POST /admin/seed", given), expected)


def api_keys() -> Iterator[Row]:
    """No key, a wrong one, one without the scope: nothing here asks for a key yet."""
    return iter(())


def rates() -> Iterator[Row]:
    """More than is taken from one client: nothing here counts yet."""
    return iter(())


def sizes() -> Iterator[Row]:
    """What is too large."""
    large = b" " * (BODY_BYTES_MAX + 1)
    yield Row("a body over 1 MiB", call(large), "413; closes", "413 by nginx")
    yield Row(
        "a body over 1 MiB that is only announced",
        b"POST /orders HTTP/1.1\r\n" + HOST + JSON + b"Content-Length: 900000000\r\n\r\n{",
        "413; closes",
        "413 by nginx",
    )
    yield Row("chunks over 1 MiB", chunked(*[b" " * 0x8000] * 33), "413; closes", "413 by nginx")
    row = b'{"metadata": {"a": "' + large + b'"}}'
    lines = b"\n".join([GOOD_BYTES, row, GOOD_BYTES])
    yield Row(
        "a row over 1 MiB", call(lines, "POST /orders/batch", NDJSON), "200 rows: 202 413 202", "413 by nginx"
    )
    yield Row(
        "headers over 32 KiB", get("/healthz", b"X: " + b"a" * 40_000 + b"\r\n"), "431; closes", "400 by nginx"
    )
    many = b"".join(b"X-%d: %050d\r\n" % (number, number) for number in range(700))
    yield Row("many headers", get("/healthz", many), "431; closes", "400 by nginx")
    yield Row("a target over 8 KiB", get("/healthz?_=" + "a" * 9000), "414; closes", "414 by nginx")
    long_trailer = chunked(GOOD_BYTES)[:-2] + b"X: " + b"a" * 120_000 + b"\r\n\r\n"
    yield Row("trailers over 32 KiB", long_trailer, "431; closes", "201")


def bodies() -> Iterator[Row]:
    """Bodies whose end, or whose form, two readers could see differently."""
    chunks = chunked(GOOD_BYTES)
    end = chunks.index(b"\r\n\r\n") + 2
    both = chunks[:end] + LENGTH + chunks[end:]
    packed = JSON + b"Content-Encoding: gzip\r\n"
    refused = "400; closes", "400 by nginx"
    for what, sent, expected, behind in (
        ("chunks and a length", both, *refused),
        ("two lengths", call(GOOD_BYTES, headers=JSON + b"Content-Length: 5\r\n"), *refused),
        ("the same length twice", call(GOOD_BYTES, headers=JSON + LENGTH), *refused),
        ("a length below zero", head("POST /orders", HOST + JSON + b"Content-Length: -1\r\n"), *refused),
        ("a length with a sign", head("POST /orders", HOST + JSON + b"Content-Length: +9\r\n"), *refused),
        ("chunks in HTTP/1.0", chunked(GOOD_BYTES, version=b"1.0"), *refused),
        ("chunks, said twice", chunked(GOOD_BYTES, headers=JSON + CHUNKED), *refused),
        ("gzip, chunked", chunks.replace(b"chunked", b"gzip, chunked"), "501; closes", "501 by nginx"),
        ("gzip alone", chunks.replace(b"chunked", b"gzip"), "400; closes", "501 by nginx"),
        ("a chunk whose size is none", chunks.replace(b"\r\n\r\n", b"\r\n\r\nzz\r\n", 1), *refused),
        ("a chunk that is longer than it says", chunks.replace(b"}]}\r\n", b"}]}}\r\n"), *refused),
        ("a body in gzip", call(b"\x1f\x8b\x08\x00", headers=packed), "415 accept-encoding: identity", None),
        (
            "a batch in gzip",
            call(b"\x1f\x8b", "POST /orders/batch", NDJSON + packed[len(JSON) :]),
            "415 accept-encoding: identity",
            None,
        ),
        ("a body of no type", call(GOOD_BYTES, headers=b""), "415 accept: application/json", None),
        (
            "a form",
            call("a=b", headers=b"Content-Type: application/x-www-form-urlencoded\r\n"),
            "415 accept: application/json",
            None,
        ),
        ("NDJSON for one order", call(GOOD_BYTES, headers=NDJSON), "415 accept: application/json", None),
        (
            "text for a batch",
            call("[]", "POST /orders/batch", b"Content-Type: text/csv\r\n"),
            "415 accept: application/json, application/x-ndjson",
            None,
        ),
        ("a body asked for", call(GOOD_BYTES, headers=JSON + b"Expect: 100-continue\r\n"), "201", None),
        ("something else expected", call(GOOD_BYTES, headers=JSON + b"Expect: tea\r\n"), "417; closes", "201"),
        (
            "a refused body that is asked for",
            call(b"", headers=JSON + b"Content-Length: 2000000\r\nExpect: 100-continue\r\n").replace(
                b"Content-Length: 0\r\n", b""
            ),
            "413; closes",
            "413 by nginx",
        ),
    ):
        yield Row(what, sent, expected, behind)


def framing() -> Iterator[Row]:
    """What HTTP/1.1 itself forbids, or leaves open."""
    health = get("/healthz")
    unknown = head("FOO /healthz")
    refused = "400; closes", "400 by nginx"
    for what, sent, expected, behind in (
        ("no Host", head("GET /healthz", b""), *refused),
        ("two Hosts", head("GET /healthz", HOST + HOST), *refused),
        ("a folded header", get("/healthz", b"X: a\r\n b\r\n"), *refused),
        ("a bare carriage return", get("/healthz", b"X: a\rb\r\n"), *refused),
        ("bare line feeds", b"GET /healthz HTTP/1.1\nHost: a\n\n", "400; closes", "200"),
        ("NUL in a header", get("/healthz", b"X: a\x00b\r\n"), *refused),
        ("a blank before the colon", head("GET /healthz", b"Host : a\r\n"), *refused),
        ("a header without a colon", get("/healthz", b"X\r\n"), "400; closes", "200"),
        ("an address as target", get("http://bad-input/orders/nobody"), "404", None),
        ("an address with another name", get("http://elsewhere/orders/nobody"), "404", None),
        ("a target that is no path", get("healthz"), *refused),
        ("a blank in the target", get("/healthz a"), *refused),
        ("a byte beyond ASCII in the target", b"GET /\xe9 HTTP/1.1\r\n" + HOST + b"\r\n", "400; closes", "400"),
        ("HTTP/1.0", health.replace(b"1.1", b"1.0", 1), "200; closes", "200"),
        ("HTTP/1.0 without Host", b"GET /healthz HTTP/1.0\r\n\r\n", "200; closes", "200"),
        ("HTTP/1.2", health.replace(b"1.1", b"1.2", 1), "505; closes", "200"),
        ("HTTP/2.0", health.replace(b"1.1", b"2.0", 1), "505; closes", "505 by nginx"),
        ("HTTP/2 from the start", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "505; closes", "400 by nginx"),
        ("RTSP/1.0", health.replace(b"HTTP/1.1", b"RTSP/1.0", 1), "505; closes", "400 by nginx"),
        ("no HTTP: the beginning of TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", *refused),
        ("three at once", health + get("/nothing") + call(GOOD_BYTES), "200, 404, 201", None),
        ("bad JSON between two", health + call("{") + health, "200, 400, 200", None),
        ("an unknown method behind another request", health + unknown, "200, 501; closes", "200, 501"),
        ("an unknown method behind an order", call(GOOD_BYTES) + unknown, "201, 501; closes", "201, 501"),
        ("nonsense behind a request", health + b"\x00\x00", "200, 400; closes", "200, 400 by nginx"),
        (
            "a request in the body of GET",
            get("/healthz", b"Content-Length: %d\r\n" % len(unknown)) + unknown,
            "200",
            None,
        ),
        ("an upgrade", get("/healthz", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"), "200", None),
    ):
        yield Row(what, sent, expected, behind)


def slow() -> Iterator[Row]:
    """What never comes to its end."""
    yield Row("headers that never end", b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: ", "408; closes", "", half=True)
    body = call(GOOD_BYTES)[:-5]
    yield Row("a body that never ends", body, "408; closes", "", half=True)
    yield Row("chunks that never end", chunked(GOOD_BYTES)[:-5], "408; closes", "", half=True)


def all_rows(password: str | None) -> Iterator[Row]:
    """Every row; those of administrators only with their password."""
    yield from slow()
    for group in (not_json, every_route, twice, wrong_values, parameters, paths_and_methods, keys_and_versions):
        yield from group()
    for group in (sizes, bodies, framing, api_keys, rates):
        yield from group()
    if password is not None:
        yield from admin(password)
