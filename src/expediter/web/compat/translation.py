"""Between clients that speak as another service's do and the handlers: one step on the way in, one out.

What is stored, decided and guaranteed is the same. Nothing of this is there without COMPAT.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expediter.errors import BadRequest, ExpediterError
from expediter.orders.documents import timestamp
from expediter.orders.order import Attempt, PaymentOutcome
from expediter.store.queries import Queries
from expediter.store.submissions import PageQuery
from expediter.web.api.pages import LIST_PARAMETERS, OFFSET_MAX, PAGE_SIZE_MAX, page_query
from expediter.web.compat.dialect import Dialect, Kind, Refusals
from expediter.web.faults import VALUES_MAX, each_once, refuse_constant
from expediter.web.http import BODY_SECONDS_MAX, THROUGH, BodyTooLarge, BodyTooSlow, Call, to_json
from expediter.web.payloads import ItemBody, OrderBody
from expediter.web.problems import problem_reply

#: Orders in a list without `limit`, at most; `next_offset` says where the rest begins.
ALL_ORDERS_MAX = 10_000
#: Bytes of the documents of such a list, after which it ends.
ALL_ORDERS_BYTES_MAX = 16 * 1024 * 1024
#: Orders of a list that are counted where clients need a number; of more than that, this is the number.
COUNTED_MAX = 100_000

_PATH = re.compile(r"(/api/v1)?/orders(?:/([^/]+)(/[a-z]+)?)?")
_ROUTES = {
    ("GET", ""): Kind.LIST,
    ("POST", ""): Kind.PLACE,
    ("GET", "metrics"): Kind.METRICS,
    ("POST", "populate"): Kind.POPULATE,
    ("GET", "id"): Kind.GET,
    ("DELETE", "id"): Kind.DELETE,
    ("PATCH", "id/status"): Kind.CHANGE,
    ("POST", "id/cancel"): Kind.CHANGE,
    ("POST", "id/retry"): Kind.CHANGE,
}
_ORDER_NAMES = frozenset(OrderBody.__struct_fields__)
_ITEM_NAMES = frozenset(ItemBody.__struct_fields__)
#: The parameters that there are; of any others a lenient dialect says nothing.
_PARAMETERS = {
    Kind.LIST: frozenset(LIST_PARAMETERS),
    Kind.GET: frozenset({"wait", "min_version"}),
    Kind.METRICS: frozenset({"getOrderIds"}),
}
#: What became of a call to the gateway, in the words of the delivery service.
_ATTEMPTS = {None: "pending", PaymentOutcome.SUCCEEDED: "success", PaymentOutcome.UNKNOWN: "unknown"}

Document = dict[str, Any]


def _raw(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())


# Numbers with a point stay as they are written.
_read = msgspec.json.Decoder(float_hook=_raw).decode
#: The same of what a client has sent, all numbers as they are written. Raises what is refused anyway.
_read_once = partial(
    json.loads, object_pairs_hook=each_once, parse_float=_raw, parse_int=_raw, parse_constant=refuse_constant
)


class Translation:
    """An ASGI application before the service's own, for the clients that its dialect is of."""

    def __init__(self, app: ASGIApp, dialect: Dialect, queries: Queries) -> None:
        """Pass requests on to `app` as it understands them, and its answers back as their clients do."""
        self._app = app
        self._dialect = dialect
        self._queries = queries

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Translate a request and its answer, where the dialect has something to say of them."""
        kind = self._kind(scope) if scope["type"] == "http" else None
        if kind is None:
            await self._app(scope, receive, send)
            return
        scope = {**scope, THROUGH: self._dialect.through}
        if kind in (Kind.PLACE, Kind.CHANGE):
            receive = await self._with_body(scope, receive)
        everything = self._translate_query(kind, scope)
        answer = _Answer(send, partial(self._answer, kind, scope, everything))
        await self._app(scope, receive, answer.take)

    def _kind(self, scope: Scope) -> Kind | None:
        path: str = scope["path"].rstrip("/")
        if path.startswith("/admin/"):
            return Kind.ADMIN
        found = _PATH.fullmatch(path)
        if found is None or (found[1] and not self._dialect.canonical):
            return None
        named = found[2] in ("metrics", "status", "populate", "batch")
        rest = (found[2] or "") if named else ("id" if found[2] else "") + (found[3] or "")
        return _ROUTES.get((scope["method"], rest), Kind.OTHER)

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body and return what hands it on, as the service knows it."""
        try:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                body = await Call(scope, receive, "").body()
        except TimeoutError:
            return partial(_raise, BodyTooSlow())
        except (BadRequest, BodyTooLarge, BodyTooSlow) as error:
            return partial(_raise, error)
        # What cannot be read, or has more than anything here can have, is handed on and refused as it is.
        if body.count(b",") + body.count(b"{") + body.count(b"[") <= VALUES_MAX:
            with suppress(ValueError, RecursionError, BadRequest):
                asked = _read_once(body.decode())
                if isinstance(asked, dict):
                    self._mean(asked)
                    body = msgspec.json.encode(asked)
        return partial(_hand_on, body)

    def _mean(self, asked: Document) -> None:
        """Change a body into what is meant by it."""
        dialect = self._dialect
        if isinstance(word := asked.get("status"), str) and word.lower() in dialect.meant:
            asked["status"] = dialect.meant[word.lower()]
        listed = asked.get("items")
        items = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
        if dialect.digits:
            for item in items:
                quantity = item.get("quantity")
                if isinstance(quantity, str) and quantity.isascii() and quantity.isdigit() and len(quantity) < 10:
                    item["quantity"] = int(quantity)
        if dialect.lenient:
            _keep(asked, _ORDER_NAMES | {"status"})
            for item in items:
                _keep(item, _ITEM_NAMES)

    def _translate_query(self, kind: Kind, scope: Scope) -> bool:
        """Change the parameters into what is meant by them; return whether a list of all orders is asked for."""
        if self._dialect.lenient:
            known = _PARAMETERS.get(kind, frozenset())
            pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            scope["query_string"] = urlencode([pair for pair in pairs if pair[0] in known]).encode()
        if kind is not Kind.LIST or not self._dialect.whole_lists:
            return False
        given = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        if (word := given.get("status", "").lower()) in self._dialect.meant:
            given["status"] = self._dialect.meant[word]
        everything = not given.keys() & {"limit", "page", "page_size", "cursor"}
        for name, low, high in (("limit", 1, PAGE_SIZE_MAX), ("offset", 0, OFFSET_MAX)):
            if name in given:
                number = _whole_number(given[name])
                if number is None:
                    del given[name]
                else:
                    given[name] = str(min(max(number, low), high))
        if everything:
            given["limit"] = str(PAGE_SIZE_MAX)
        scope["query_string"] = urlencode(given).encode()
        return everything

    async def _answer(self, kind: Kind, scope: Scope, everything: bool, start: Message, body: bytes) -> bytes:
        """Translate an answer; where what it should have besides cannot be read now, the answer is that."""
        try:
            return await self._translate(kind, scope, everything, start, body)
        except ExpediterError as error:
            given = {name: value.decode() for name, value in start["headers"]}
            reply = problem_reply(error, given.get("x-request-id", ""))
            start["status"], start["headers"] = reply.status, reply.headers
            return self._refusal(kind, start, reply.body)

    async def _translate(self, kind: Kind, scope: Scope, everything: bool, start: Message, body: bytes) -> bytes:
        """Change the head of an answer, and return its body, as the client knows them."""
        dialect = self._dialect
        status: int = start["status"]
        if status >= 400:
            return self._refusal(kind, start, body)
        start["status"] = dialect.codes.get((kind, status), status)
        if kind is Kind.DELETE and dialect.deleted:
            _set_header(start, b"content-type", b"application/json")
            return msgspec.json.encode(
                {"message": dialect.deleted, "order_id": scope["path"].rstrip("/").rpartition("/")[2]}
            )
        if not body or kind in (Kind.OTHER, Kind.ADMIN, Kind.POPULATE):
            return body
        document: Document = _read(body)
        if kind is Kind.METRICS:
            if dialect.empty_ids:
                for bucket in ("pending", "processing", "completed"):
                    document[bucket].setdefault("order_ids", [])
        elif kind is Kind.LIST:
            await self._translate_list(document, scope, everything)
        elif "status" in document:
            # What was just placed or changed has no further look at the database that could fail.
            await self._translate_orders([document], attempts=kind is Kind.GET)
            if kind is Kind.PLACE and dialect.attempts:
                document["payment_attempts"] = []
            if kind is Kind.PLACE and dialect.placed_as:
                document["status"] = dialect.placed_as
        return to_json(document)

    async def _translate_list(self, document: Document, scope: Scope, everything: bool) -> None:
        dialect = self._dialect
        orders: list[Document] = document["orders"]
        if everything and document["next_cursor"]:
            await self._add_the_rest(document, scope)
        if document["total"] is None and (dialect.counted or dialect.whole_lists):
            document["total"] = await self._queries.count(_filters(scope), COUNTED_MAX)
        await self._translate_orders(orders, attempts=True)
        if dialect.whole_lists:
            more = document["has_more"] and document["offset"] is not None
            document["count"] = len(orders)
            document["total_orders"] = document["total"]
            document["next_offset"] = document["offset"] + len(orders) if more else None

    async def _add_the_rest(self, document: Document, scope: Scope) -> None:
        """Add the further pages to the first, by cursor: what is placed meanwhile moves none of them."""
        orders: list[Document] = document["orders"]
        wanted = _filters(scope)
        after = page_query({"cursor": document["next_cursor"]})[0].after
        size = 0
        while after is not None and len(orders) < ALL_ORDERS_MAX and size < ALL_ORDERS_BYTES_MAX:
            limit = min(PAGE_SIZE_MAX, ALL_ORDERS_MAX - len(orders))
            page = await self._queries.page(msgspec.structs.replace(wanted, limit=limit, offset=0, after=after))
            orders += [_read(each) for each in page.documents]
            size += sum(len(bytes(each)) for each in page.documents)
            after = page.after
        document["has_more"] = after is not None
        document["limit"] = document["page_size"] = ALL_ORDERS_MAX
        document["next_cursor"] = document["page"] = None

    async def _translate_orders(self, orders: Sequence[Document], *, attempts: bool) -> None:
        dialect = self._dialect
        made: dict[str, list[Attempt]] = {}
        if dialect.attempts and attempts:
            made = await self._queries.attempts([order["order_id"] for order in orders])
        for order in orders:
            order["status"] = dialect.shown.get(order.get("status", ""), order.get("status"))
            if dialect.naive_times:
                for name, value in order.items():
                    if name.endswith("_at") and isinstance(value, str):
                        order[name] = value.removesuffix("Z")
            if dialect.attempts:
                order["id"] = order["order_id"]
            if dialect.attempts and attempts:
                order["payment_attempts"] = [
                    {
                        "attempt_number": number,
                        "status": _ATTEMPTS.get(attempt.outcome, "failed"),
                        "amount": order["total_amount"],
                        "error": attempt.error,
                        "created_at": timestamp(attempt.started_at),
                    }
                    for number, attempt in enumerate(made.get(order["order_id"], ()), 1)
                ]

    def _refusal(self, kind: Kind, start: Message, body: bytes) -> bytes:
        refused, refusals = self._dialect.refused, self._dialect.refusals
        status: int = start["status"]
        start["status"] = refused.get((kind, status), refused.get((None, status), status))
        if refusals is None or not body:
            return body
        try:
            problem: Document = _read(body)
        except msgspec.MsgspecError:
            return body  # no problem document of this service
        _set_header(start, b"content-type", b"application/json")
        if refusals is Refusals.ERROR:
            return msgspec.json.encode({"error": problem["error"]})
        detail: Any = problem["error"]
        if problem.get("errors"):
            place = "query" if kind is Kind.LIST else "body"
            detail = [_detail(place, error) for error in problem["errors"]]
        return msgspec.json.encode({"detail": detail, "error": problem["error"]})


class _Answer:
    """Holds an answer back until it is whole, and sends it translated."""

    def __init__(self, send: Send, translate: Callable[[Message, bytes], Any]) -> None:
        self._send = send
        self._translate = translate
        self._start: Message = {}
        self._parts: list[bytes] = []

    async def take(self, message: Message) -> None:
        """Take one message of the answer."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = await self._translate(self._start, b"".join(self._parts))
        if self._start["status"] not in (204, 304):
            _set_header(self._start, b"content-length", str(len(body)).encode())
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})


def _set_header(start: Message, name: bytes, value: bytes) -> None:
    start["headers"] = [each for each in start["headers"] if each[0] != name] + [(name, value)]


def _filters(scope: Scope) -> PageQuery:
    """Return what a list is filtered by, as the handler has read it before."""
    wanted, _ = page_query(Call(scope, _nothing, "").query(*LIST_PARAMETERS))
    return msgspec.structs.replace(wanted, after=None)


def _keep(document: Document, names: frozenset[str]) -> None:
    for name in document.keys() - names:
        del document[name]


def _whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else None


def _detail(place: str, error: Document) -> Document:
    """Return a fault as FastAPI words it."""
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in error["field"].split("/") if part]
    return {"loc": [place, *parts], "msg": error["message"], "type": "value_error"}


async def _hand_on(body: bytes) -> Message:
    return {"type": "http.request", "body": body, "more_body": False}


async def _raise(error: Exception) -> Message:
    raise error


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
