"""Whatever bytes come: a command or a refusal with JSON pointers, a request or a refusal, and never an error.

`make fuzz` goes on with this until something is found.
"""

from __future__ import annotations

import json
import os
import re
from itertools import pairwise
from typing import Any

import pytest
from exchanges import EXCHANGES
from hypothesis import HealthCheck, Phase, assume, event, example, given, settings
from hypothesis import strategies as st

from expediter.errors import BadRequest, ExpediterError, InvalidInput
from expediter.orders.commands import PlaceOrder
from expediter.orders.money import format_minor
from expediter.orders.order import Stages
from expediter.web import payloads
from expediter.web.http import Gathered
from expediter.web.payloads import OrderBody, decode, place_order
from expediter.web.problems import problem_reply, status_of
from expediter.web.server.requests import Requests

#: Inputs of each test; without the variable the same each time.
_ASKED = os.environ.get("EXPEDITER_FUZZ")
BOUNDED = settings(
    max_examples=int(_ASKED or 120),
    derandomize=_ASKED is None,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
KINDS = [
    kind for name, kind in vars(payloads).items() if name.endswith("Body") and isinstance(kind, type)
]  # every body that is taken

NAMES = st.sampled_from(
    [*OrderBody.__struct_fields__, *payloads.ItemBody.__struct_fields__, "status", "x", "", "a/~b"]
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", "c", "Pen", "USD", "JPY", "\x00", "\ud800", "1.20", "1_0", "sNaN", "-1e5", '":', "\\u0000"]
    ),
    st.text(max_size=8),
)
NUMBERS = st.one_of(
    st.integers(-2, 3),
    st.sampled_from([2**53, 2**63, 2**64, 10**400, 0.1 + 0.2, 1e308, 1.005, 249.98000000000002]),
    st.floats(allow_nan=True),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
LETTERS = st.characters(exclude_categories=["Cs"], min_codepoint=1)
IDS = st.one_of(st.integers(-5, 2**53 - 1), st.text(LETTERS, min_size=1, max_size=8))
PRICES = st.one_of(
    st.none(), st.decimals(0, 999, places=2).map(str), st.integers(0, 99), st.sampled_from([12.99, 1e2])
)


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    """A good order in one of its shapes, most of the time."""
    order: dict[str, Any] = {draw(st.sampled_from(["customer_id", "user_id"])): draw(IDS)}
    priced = draw(st.booleans())
    order["items"] = [
        {
            draw(st.sampled_from(["name", "item_name", "item_id"])): draw(IDS.map(str)),
            "quantity": draw(st.integers(1, 9)),
            **({draw(st.sampled_from(["price", "unit_price"])): draw(PRICES.filter(bool))} if priced else {}),
        }
        for _ in range(draw(st.integers(1, 3)))
    ]
    if draw(st.booleans()):
        order["metadata"] = draw(
            st.dictionaries(st.text("ab~/", min_size=1, max_size=3), TEXTS | st.integers(0, 9))
        )
    if draw(st.booleans()):
        order["currency"] = draw(st.sampled_from(["USD", "JPY", "KWD"]))
    if draw(st.booleans()):
        order["order_id"] = draw(st.text("aZ0._-", min_size=1, max_size=9))
    return order


@st.composite
def spoilt(draw: st.DrawFn, given_bytes: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few of them changed, taken out, doubled or put in."""
    data = draw(given_bytes)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, min(len(data), at + 12)))
        put = draw(
            st.one_of(st.just(b""), st.just(2 * data[at:end]), st.binary(max_size=3), st.sampled_from(PIECES))
        )
        data = data[:at] + put + data[end:]
    return data


PIECES = [
    b"\x00",
    b"\r",
    b"\n",
    b"\r\n",
    b" ",
    b":",
    b",",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\ud800",
    b"\\u0000",
    b"NaN",
    b"1e999",
    b"\xff",
    b"\xef\xbb\xbf",
    b"null",
    b"[" * 40,
    b"GET / HTTP/1.1\r\n",
    b"Host: a\r\n",
    b"0\r\n\r\n",
    b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"RTSP/1.0",
    b"HTTP/1.0",
    b"Expect: a\r\n",
]


def written(value: Any) -> bytes:
    return json.dumps(value).encode()


BODIES = st.one_of(
    st.binary(max_size=60),
    VALUES.map(written),
    st.dictionaries(NAMES, VALUES, max_size=6).map(written),
    orders().map(written),
    spoilt(st.one_of(orders().map(written), VALUES.map(written))),
)


def read(body: bytes) -> PlaceOrder:
    return place_order(
        decode(body, OrderBody), body, fresh_id="ORD-1", currency="USD", stages=Stages.PAYMENT_FULFILMENT
    )


def check_refusal(error: ExpediterError, body: bytes) -> None:
    """Check that a refusal can be sent, and that each fault's pointer leads into the body, or to what it lacks."""
    assert status_of(error) == (422 if isinstance(error, InvalidInput) else 400)
    document = json.loads(problem_reply(error, "id").body)
    for fault in document.get("errors", ()):
        assert fault["message"]
        place: Any = json.loads(body)
        *parts, last = fault["field"].split("/") if fault["field"] else ("", "")
        for part in parts[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            place = place[int(name)] if isinstance(place, list) else place.get(name, {})
        assert fault["field"] == "" or isinstance(place, (dict, list)), (fault, last)


@BOUNDED
@given(BODIES)
@example(b'{"customer_id": 1, "items": [{"name": "a", "quantity": 1, "price": 1e999999}]}')
@example(b'{"metadata": {"\\ud800": {}}}')
@example(b'{"customer_id": 1, "items": [{"name": "a", "quantity": 1}], "metadata": {"a": "\\u0000"}}')
@example(b'{"customer_id": 1, "items": [{"name": "a", "quantity": 1}], "payment_token": "\\ud800"}')
def test_a_body_becomes_a_command_or_a_refusal(body: bytes) -> None:
    """Nothing else is raised; what is accepted has no text that a database cannot hold."""
    try:
        command = read(body)
    except (BadRequest, InvalidInput) as error:
        event(type(error).__name__)
        check_refusal(error, body)
        return
    event("accepted")
    texts = [command.order_id, command.customer_name, command.payment_token, command.customer_id]
    texts += [text for entry in json.loads(command.metadata).items() for text in entry]
    texts += [text for line in command.lines for text in (line.name, line.item_id)]
    for text in texts:
        if isinstance(text, str):
            assert "\x00" not in text.encode().decode()
    assert command.total_minor >= 0


@BOUNDED
@given(BODIES, st.sampled_from(KINDS))
def test_every_kind_of_body_is_read_or_refused(body: bytes, kind: type[Any]) -> None:
    """What is sent to change a status, to refund, to subscribe: the same."""
    try:
        assert isinstance(decode(body, kind), kind)
    except (BadRequest, InvalidInput) as error:
        check_refusal(error, body)


def as_sent(command: PlaceOrder) -> dict[str, Any]:
    """Return the body that says the same as a command."""
    body: dict[str, Any] = {
        "customer_id": command.customer_id,
        "customer_name": command.customer_name,
        "currency": command.currency,
        "metadata": json.loads(command.metadata),
        "payment_token": command.payment_token,
        "items": [
            {"item_id": line.item_id, "name": line.name, "quantity": line.quantity}
            | ({} if line.price_minor is None else {"price": format_minor(line.price_minor, command.currency)})
            for line in command.lines
        ],
    }
    if not command.fresh:
        body["order_id"] = command.order_id
    if not command.priced:
        body["total_amount"] = format_minor(command.total_minor, command.currency)
    return body


@BOUNDED
@given(orders().map(written) | spoilt(orders().map(written)))
def test_what_is_accepted_says_the_same_when_it_is_sent_again(body: bytes) -> None:
    """An accepted order, written out in full, is accepted as the same order."""
    try:
        command = read(body)
    except (BadRequest, InvalidInput):
        assume(False)
    again = read(written(as_sent(command)))
    assert json.loads(again.metadata) == json.loads(command.metadata)
    assert (again.lines, again.total_minor, again.customer_id, again.order_id, again.currency) == (
        command.lines,
        command.total_minor,
        command.customer_id,
        command.order_id,
        command.currency,
    )


@BOUNDED
@given(orders(), st.data())
def test_a_name_twice_is_refused_wherever_it_stands(order: dict[str, Any], data: st.DataObject) -> None:
    """In any object of an order one member is written once more, with blanks and escapes as they come: 400."""
    objects = [order, *order["items"], *([order["metadata"]] if order.get("metadata") else [])]
    chosen = data.draw(st.sampled_from(objects))
    name = data.draw(st.sampled_from(sorted(chosen)))
    value = data.draw(st.sampled_from([chosen[name], None, 1, "a"]))
    escape = data.draw(st.booleans())
    spelt = "".join(f"\\u{ord(letter):04x}" for letter in name) if escape else json.dumps(name)[1:-1]
    blank = data.draw(st.sampled_from(["", " ", "\n\t"]))
    marker = "\ue000twice"
    chosen[marker] = 0  # it stands where the member is written once more
    text = json.dumps(order, ensure_ascii=False)
    body = text.replace(f'"{marker}": 0', f'"{spelt}"{blank}:{blank}{json.dumps(value)}').encode(
        "utf-8", "surrogatepass"
    )
    with pytest.raises((BadRequest, InvalidInput)) as refused:
        read(body)
    if b"\\u0000" not in body and b"\\ud" not in body and isinstance(refused.value, BadRequest):
        assert "twice" in str(refused.value) or "UTF-8" in str(refused.value) or "utf-8" in str(refused.value)


# Requests


SHORT = st.sampled_from([each.sent for each in EXCHANGES if len(each.sent) < 2000])


class Said:
    """What a connection has understood: of each request the line, the headers, the body, and why it is refused."""

    def __init__(self, pieces: list[bytes]) -> None:
        requests = Requests("127.0.0.1", lambda: None, Gathered())
        self.calls = []
        for piece in pieces:
            if requests.deaf:
                break
            requests.look_at(piece)
            while requests.waiting:
                self.calls.append(requests.waiting.popleft())
        self.deaf = requests.deaf

    def summary(self) -> list[tuple[object, ...]]:
        return [
            (call.method, call.target, call.headers, b"".join(call.arriving.parts))
            if (status := self.status(call)) is None
            else (status,)
            for call in self.calls
        ]

    @staticmethod
    def status(call: Any) -> int | None:
        """Return what it is refused by; 400 where it may depend on how it was cut (see test_exchanges.py)."""
        error = call.refusal or call.arriving.lost
        status = None if error is None else status_of(error)
        return 400 if status == 501 else status


@BOUNDED
@given(spoilt(st.lists(SHORT, max_size=3).map(b"".join)), st.lists(st.integers(0, 400), max_size=4))
def test_requests_are_read_or_refused_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    """Nothing is raised, a cut changes nothing, and what is not refused can be taken in one way only."""
    whole = Said([data[at : at + 16_384] for at in range(0, len(data), 16_384)])
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    assert Said([data[start:end] for start, end in pairwise(places)]).summary() == whole.summary()
    for call in whole.calls:
        if call.refusal is not None:
            continue
        names = [name for name, _ in call.headers]
        assert all(re.fullmatch(rb"[!#$%&'*+.^_`|~0-9a-z-]+", name) for name in names)
        assert not any(set(b"\r\n\x00") & set(value) for _, value in call.headers)
        assert names.count(b"host") <= 1 and (call.version == "1.0" or b"host" in names)
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
        assert call.target[:1] == b"/" or (call.method, call.target) == ("OPTIONS", b"*")
        assert not set(b" \r\n\x00") & set(call.target)
