"""Between clients that speak as another service's do and the handlers: one step on the way in, one out.

What is stored, decided and guaranteed is the same. Nothing of this is there without COMPAT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec

from expediter.errors import BadRequest, ExpediterError
from expediter.orders.documents import timestamp
from expediter.orders.order import Attempt, PaymentOutcome
from expediter.store.keys import KeyRing
from expediter.store.queries import Queries
from expediter.store.submissions import PageQuery
from expediter.web.access import identify
from expediter.web.api.pages import LIST_PARAMETERS, OFFSET_MAX, PAGE_SIZE_MAX, page_query
from expediter.web.compat.dialect import Dialect, Kind, Refusals
from expediter.web.faults import VALUES_MAX, each_once, refuse_constant
from expediter.web.http import JSON, App, Body, BodyTooLarge, BodyTooSlow, Call, Reply, answered, to_json
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

#: Headers that an answer has whatever it says.
_KEPT = frozenset({b"x-request-id", b"traceparent"})

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
    """An application before the service's own, for the clients that its dialect is of."""

    def __init__(self, app: App, dialect: Dialect, queries: Queries, ring: KeyRing) -> None:
        """Pass requests on to `app` as it understands them, and its answers back as their clients do.

        Of a stranger to `ring` it reads no body: he is refused without it.
        """
        self._app = app
        self._dialect = dialect
        self._queries = queries
        self._ring = ring

    def __call__(self, call: Call) -> Reply | Coroutine[Any, Any, Reply]:
        """Translate a request and its answer, where the dialect has something to say of them."""
        if self._ring.asks:
            identify(call, self._ring)
        kind = self._kind(call)
        return self._app(call) if kind is None else self._translated(kind, call)

    async def _translated(self, kind: Kind, call: Call) -> Reply:
        call.through = self._dialect.through
        if kind in (Kind.PLACE, Kind.CHANGE) and call.stranger is None:
            await self._translate_body(call)
        everything = self._translate_query(kind, call)
        return await self._answer(kind, call, everything, await answered(self._app(call)))

    def _kind(self, call: Call) -> Kind | None:
        if call.refusal is not None:
            return None
        if call.path.startswith("/admin/"):
            return Kind.ADMIN
        found = _PATH.fullmatch(call.path)
        if found is None or (found[1] and not self._dialect.canonical):
            return None
        named = found[2] in ("metrics", "status", "populate", "batch")
        rest = (found[2] or "") if named else ("id" if found[2] else "") + (found[3] or "")
        return _ROUTES.get((call.method, rest), Kind.OTHER)

    async def _translate_body(self, call: Call) -> None:
        """Read the body, and hand it on as the service knows it."""
        try:
            body = await call.body()
        except (BadRequest, BodyTooLarge, BodyTooSlow) as error:
            call.arriving.lost = error  # whoever reads on is raised it, and answers
            return
        # What cannot be read, or has more than anything here can have, is handed on and refused as it is.
        if body.count(b",") + body.count(b"{") + body.count(b"[") <= VALUES_MAX:
            with suppress(ValueError, RecursionError, BadRequest):
                asked = _read_once(body.decode())
                if isinstance(asked, dict):
                    self._mean(asked)
                    body = msgspec.json.encode(asked)
        call.arriving = Body(body)

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

    def _translate_query(self, kind: Kind, call: Call) -> bool:
        """Change the parameters into what is meant by them; return whether a list of all orders is asked for."""
        if self._dialect.lenient:
            known = _PARAMETERS.get(kind, frozenset())
            pairs = parse_qsl(call.query_string.decode("latin-1"), keep_blank_values=True)
            call.query_string = urlencode([pair for pair in pairs if pair[0] in known]).encode()
        if kind is not Kind.LIST or not self._dialect.whole_lists:
            return False
        given = dict(parse_qsl(call.query_string.decode("latin-1"), keep_blank_values=True))
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
        call.query_string = urlencode(given).encode()
        return everything

    async def _answer(self, kind: Kind, call: Call, everything: bool, reply: Reply) -> Reply:
        """Translate an answer; where what it should have besides cannot be read now, the answer is that."""
        try:
            reply.body = await self._translate(kind, call, everything, reply)
        except ExpediterError as error:
            kept = [each for each in reply.headers if each[0] in _KEPT]
            reply = problem_reply(error, call.request_id)
            reply.headers += kept
            reply.body = self._refusal(kind, reply)
        return reply

    async def _translate(self, kind: Kind, call: Call, everything: bool, reply: Reply) -> bytes:
        """Change the head of an answer, and return its body, as the client knows them."""
        dialect = self._dialect
        body = reply.body
        if reply.status >= 400:
            return self._refusal(kind, reply)
        reply.status = dialect.codes.get((kind, reply.status), reply.status)
        if kind is Kind.DELETE and dialect.deleted:
            _set_type(reply)
            return msgspec.json.encode({"message": dialect.deleted, "order_id": call.path.rpartition("/")[2]})
        if not body or kind in (Kind.OTHER, Kind.ADMIN, Kind.POPULATE):
            return body
        document: Document = _read(body)
        if kind is Kind.METRICS:
            if dialect.empty_ids:
                for bucket in ("pending", "processing", "completed"):
                    document[bucket].setdefault("order_ids", [])
        elif kind is Kind.LIST:
            await self._translate_list(document, call, everything)
        elif "status" in document:
            # What was just placed or changed has no further look at the database that could fail.
            await self._translate_orders([document], attempts=kind is Kind.GET)
            if kind is Kind.PLACE and dialect.attempts:
                document["payment_attempts"] = []
            if kind is Kind.PLACE and dialect.placed_as:
                document["status"] = dialect.placed_as
        return to_json(document)

    async def _translate_list(self, document: Document, call: Call, everything: bool) -> None:
        dialect = self._dialect
        orders: list[Document] = document["orders"]
        if everything and document["next_cursor"]:
            await self._add_the_rest(document, call)
        if document["total"] is None and (dialect.counted or dialect.whole_lists):
            document["total"] = await self._queries.count(_filters(call), COUNTED_MAX)
        await self._translate_orders(orders, attempts=True)
        if dialect.whole_lists:
            more = document["has_more"] and document["offset"] is not None
            document["count"] = len(orders)
            document["total_orders"] = document["total"]
            document["next_offset"] = document["offset"] + len(orders) if more else None

    async def _add_the_rest(self, document: Document, call: Call) -> None:
        """Add the further pages to the first, by cursor: what is placed meanwhile moves none of them."""
        orders: list[Document] = document["orders"]
        wanted = _filters(call)
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

    def _refusal(self, kind: Kind, reply: Reply) -> bytes:
        refused, refusals = self._dialect.refused, self._dialect.refusals
        reply.status = refused.get((kind, reply.status), refused.get((None, reply.status), reply.status))
        if refusals is None or not reply.body:
            return reply.body
        try:
            problem: Document = _read(reply.body)
        except msgspec.MsgspecError:
            return reply.body  # no problem document of this service
        _set_type(reply)
        if refusals is Refusals.ERROR:
            return msgspec.json.encode({"error": problem["error"]})
        detail: Any = problem["error"]
        if problem.get("errors"):
            place = "query" if kind is Kind.LIST else "body"
            detail = [_detail(place, error) for error in problem["errors"]]
        return msgspec.json.encode({"detail": detail, "error": problem["error"]})


def _set_type(reply: Reply) -> None:
    reply.headers = [each for each in reply.headers if each[0] != JSON[0]] + [JSON]


def _filters(call: Call) -> PageQuery:
    """Return what a list is filtered by, as the handler has read it before."""
    wanted, _ = page_query(call.query(*LIST_PARAMETERS))
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
