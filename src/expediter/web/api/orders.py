"""Orders over HTTP: the same handlers behind `/api/v1/orders` and the short `/orders` paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
import uuid_utils
from msgspec import UNSET, UnsetType

from expediter.backends.cache import Entry
from expediter.errors import ExpediterError, Fault, InvalidInput, OrderNotFound, PreconditionFailed
from expediter.orders.commands import (
    CancelOrder,
    ChangeStatus,
    Command,
    DeleteOrder,
    ReportFulfilment,
    RetryOrder,
)
from expediter.orders.documents import EventDocument, OrderDocument, event_document, order_document
from expediter.orders.order import Line, Order, is_order_id
from expediter.queued.intake import Word
from expediter.store.scopes import Scope
from expediter.store.submissions import Answer, Applied, Outcome, Queued, Replayed, Request
from expediter.web.context import Context
from expediter.web.http import (
    ANSWER_SECONDS_MAX,
    JSON,
    Call,
    Header,
    Reply,
    answer_reply,
    json_reply,
    whole_number,
)
from expediter.web.operations import IDEMPOTENCY_KEY, IF_MATCH, IF_NONE_MATCH, Handler, Operation, both, query
from expediter.web.payloads import FulfilmentBody, OrderBody, StatusBody, decode, place_order
from expediter.web.problems import not_taken

#: Seconds that `?wait=` may hold an answer.
WAIT_SECONDS_MAX = 30.0

_SECONDS = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")


class Placed(OrderDocument, frozen=True, kw_only=True):
    """A new order as the short path answers it."""

    message: str


class Accepted(msgspec.Struct, frozen=True):
    """A change that was accepted and is carried out as soon as it can be."""

    order_id: str
    message: str


class History(msgspec.Struct, frozen=True, omit_defaults=True):
    """The history of one order, numbered without gaps, from 1 or after those that were moved to the archive."""

    events: list[EventDocument]
    archived: int = 0


def new_order_id() -> str:
    """Return a fresh, time-ordered id: `ORD-` and the 32 hex digits of a UUIDv7 (RFC 9562)."""
    return f"ORD-{uuid_utils.uuid7().hex}"


def path_order_id(call: Call) -> str:
    """Return the order id of the path. Raises OrderNotFound for what no order can be called."""
    order_id = call.path_values["order_id"]
    if not is_order_id(order_id):
        raise OrderNotFound(order_id)
    return order_id


def require_json(call: Call) -> None:
    """Raise a 415 unless the body is said to be JSON."""
    if not call.has_media_type("application/json"):
        raise not_taken(call, "application/json")


class ShownOrder(OrderDocument, frozen=True, kw_only=True):
    """An order as it is stored; `pending_changes` were accepted and are not applied yet (only `INTAKE=queued`)."""

    pending_changes: int | UnsetType = UNSET


async def carry_out(
    context: Context, request: Request, word: Word, body_bytes: int = 0
) -> tuple[Applied | None, Reply | None]:
    """Submit a request; return what was applied, or the answer of a queued or an earlier one. Raises the refusal.

    `word` has the answer to a queued one. `body_bytes` count towards what may wait.
    """
    if context.intake is None:
        outcome: Outcome | Queued = await context.committer.submit(request, body_bytes)
    else:
        outcome = await context.intake.submit(request, word, body_bytes)
    if isinstance(outcome, Queued):
        return None, answer_reply(outcome.answer, replayed=False)
    if isinstance(outcome, Applied):
        return outcome, answer_reply(outcome.answer, replayed=False) if outcome.answer else None
    if isinstance(outcome, Replayed):
        return None, answer_reply(outcome.answer, replayed=True)
    assert isinstance(outcome, ExpediterError)
    raise outcome


async def create_order(call: Call, context: Context) -> Reply:
    """Take an order and store it before answering: 202 on the canonical path, 201 on the short one.

    Priced lines, named lines, or item ids with a total; amounts as numbers or strings, read as decimal text.
    """
    call.query()
    require_json(call)
    body = await call.body()
    command = place_order(
        decode(body, OrderBody),
        body,
        fresh_id=new_order_id(),
        currency=context.settings.default_currency,
        stages=context.settings.stages,
    )
    short = call.short
    key = call.idempotency_key(command, context.keep)
    word = partial(_answer, _placed_reply, short) if key else None
    queued = partial(_queued_answer, call=call, order_id=None)
    applied, reply = await carry_out(context, Request(command, key, word), queued, len(body))
    if reply is not None:
        return reply
    assert applied is not None
    return _placed_reply(applied.order, applied.lines, short)


def refuse_at_once(call: Call, context: Context) -> None:
    """Refuse a new order while too many wait: before its body is read. Raises Overloaded."""
    if context.intake is None:
        context.committer.admit()


def _placed_reply(order: Order, lines: tuple[Line, ...], short: bool) -> Reply:
    return _placed(order_document(order, lines), order.order_id, order.version, short, 201 if short else 202)


def _placed(document: bytes, order_id: str, version: int, short: bool, status: int) -> Reply:
    prefix = b"/orders/" if short else b"/api/v1/orders/"
    headers = [JSON, (b"location", prefix + order_id.encode()), (b"etag", b'"%d"' % version)]
    body = document[:-1] + b',"message":"Order created"}' if short else document
    return Reply(status, body, headers)


def _answer(reply: Callable[..., Reply], how: object, applied: Applied) -> Answer:
    return kept(reply(applied.order, applied.lines, how))


def kept(reply: Reply) -> Answer:
    """Return a reply as it is kept for an idempotency key."""
    headers = {name.decode(): value.decode() for name, value in reply.headers}
    return Answer(reply.status, headers, reply.body.decode())


async def get_order(call: Call, context: Context) -> Reply:
    """Return one order. `wait` holds the answer until the order changes or has ended."""
    order_id = path_order_id(call)
    given = call.query("wait", "min_version")
    if not given:
        entry = await context.queries.order(order_id)
    else:
        faults: list[Fault] = []
        min_version = whole_number(given, "min_version", 0, 2**53, 0, faults)
        seconds = _seconds(given, faults)
        if faults:
            raise InvalidInput(faults)
        entry = await context.queries.order(order_id, min_version=min_version)
        if seconds > 0:
            call.may_take(seconds + ANSWER_SECONDS_MAX)
            known = call.header(b"if-none-match")
            if entry.version < min_version:
                beyond = min_version - 1
            elif known is None or call.knows_version(entry.version):
                beyond = entry.version
            else:
                beyond = -1
            if beyond >= 0:
                entry = await context.queries.wait(order_id, beyond=beyond, seconds=seconds, left=call.leaving())
        if entry.version < min_version:
            raise PreconditionFailed(order_id, entry.version, f"version {min_version} or newer")
    return _shown(call, entry)


def get_order_at_once(call: Call, context: Context) -> Reply | None:
    """Return one order that the cache in this process has; None: the handler looks further."""
    entry = None if call.query_string else context.queries.known(path_order_id(call))
    return None if entry is None else _shown(call, entry)


def _shown(call: Call, entry: Entry) -> Reply:
    if entry.pending_changes:
        # No ETag: a change that comes to nothing ends without another version.
        return Reply(200, _with_changes(entry.body or b"", entry.pending_changes), [JSON])
    headers: list[Header] = [JSON, (b"etag", b'"%d"' % entry.version)]
    if call.knows_version(entry.version):
        return Reply(304, b"", headers[1:])
    return Reply(200, entry.body or b"", headers)


def _seconds(given: dict[str, str], faults: list[Fault]) -> float:
    text = given.get("wait", "0")
    if _SECONDS.fullmatch(text) and float(text) <= WAIT_SECONDS_MAX:
        return float(text)
    faults.append(Fault("wait", f"must be seconds from 0 to {WAIT_SECONDS_MAX:g}"))
    return 0.0


async def change_status(call: Call, context: Context) -> Reply:
    """Move an order by hand, through the lifecycle table; an illegal move is 409 and names the legal ones."""
    order_id = path_order_id(call)
    call.query()
    require_json(call)
    status = decode(await call.body(), StatusBody).status
    command = ChangeStatus(order_id=order_id, status=status, through=call.through, if_version=call.if_version())
    return await _change(call, context, command, 200)


async def cancel_order(call: Call, context: Context) -> Reply:
    """Cancel an order; what was charged is refunded. 409 while the outcome of a charge is open."""
    command = CancelOrder(order_id=path_order_id(call), if_version=call.if_version())
    await no_body(call)
    return await _change(call, context, command, 202)


async def retry_order(call: Call, context: Context) -> Reply:
    """Try again what failed, or take up a parked order."""
    command = RetryOrder(order_id=path_order_id(call), if_version=call.if_version())
    await no_body(call)
    return await _change(call, context, command, 202)


async def report_fulfilment(call: Call, context: Context) -> Reply:
    """Say that an order is carried out, or cannot be. The same report again changes nothing."""
    order_id = path_order_id(call)
    call.query()
    require_json(call)
    body = decode(await call.body(), FulfilmentBody)
    command = ReportFulfilment(
        order_id=order_id,
        done=body.outcome == "done",
        reason=body.reason,
        reference=body.reference,
        if_version=call.if_version(),
    )
    return await _change(call, context, command, 200)


async def delete_order(call: Call, context: Context) -> Reply:
    """Delete an order; its id is not used again. 409 while money is in flight."""
    command = DeleteOrder(order_id=path_order_id(call), if_version=call.if_version())
    await no_body(call)
    return await _change(call, context, command, 204)


async def no_body(call: Call) -> None:
    """Refuse a body where none is taken. Raises InvalidInput."""
    call.query()
    if (await call.body()).strip() not in (b"", b"{}"):
        raise InvalidInput([Fault("", "this call takes no body")])


async def _change(call: Call, context: Context, command: Command, status: int) -> Reply:
    key = call.idempotency_key(command, context.keep)
    word = partial(_answer, _changed_reply, status) if key else None
    request = Request(command, key, word, with_lines=status != 204)
    queued = partial(_queued_answer, call=call, order_id=command.order_id)
    applied, reply = await carry_out(context, request, queued)
    if reply is not None:
        return reply
    assert applied is not None
    return _changed_reply(applied.order, applied.lines, status)


def _changed_reply(order: Order, lines: tuple[Line, ...], status: int) -> Reply:
    if status == 204:
        return Reply(204)
    return Reply(status, order_document(order, lines), [JSON, (b"etag", b'"%d"' % order.version)])


def _queued_answer(document: bytes | None, changes: int, *, call: Call, order_id: str | None) -> Answer:
    """Word the answer to a command that the broker has: the order as it is now, where that is known.

    `order_id` None: it is a new order, and its document says its id.
    """
    if document is None:
        return kept(json_reply(202, Accepted(order_id or "", "Accepted; it is carried out as soon as it can be")))
    if order_id is None:
        return kept(_placed(document, _id_in(document).order_id, 1, call.short, 202))
    return kept(Reply(202, _with_changes(document, changes), [JSON]))


class _Named(msgspec.Struct):
    order_id: str


_id_in = msgspec.json.Decoder(_Named).decode


def _with_changes(document: bytes, changes: int) -> bytes:
    return document[:-1] + b',"pending_changes":%d}' % changes


async def order_events(call: Call, context: Context) -> Reply:
    """Return the history of an order, oldest first."""
    order_id = path_order_id(call)
    call.query()
    rows = await context.queries.history(order_id)
    events = [event_document(row.number, row.at, row.type, row.data) for row in rows]
    archived = rows[0].number - 1 if rows else (await context.queries.order(order_id)).version
    return json_reply(200, History(events, archived))


#: The order as it is now; where the database is away and nobody can say, that the change was accepted.
_QUEUED = (ShownOrder, Accepted)


def _change_of(
    rest: str,
    handler: Handler,
    summary: str,
    answers: Mapping[int, Any],
    *,
    method: str = "POST",
    body: Any = None,
) -> Operation:
    return Operation(
        method=method,
        paths=both(f"/{{order_id}}{rest}"),
        handler=handler,
        scope=Scope.ORDERS_WRITE,
        summary=summary,
        answers=answers,
        problems=(409, 412),
        body=body,
        parameters=(IDEMPOTENCY_KEY, IF_MATCH),
    )


OPERATIONS = (
    Operation(
        method="POST",
        paths=("/api/v1/orders",),
        handler=create_order,
        scope=Scope.ORDERS_WRITE,
        at_once=refuse_at_once,
        summary="Place an order",
        answers={202: OrderDocument},
        problems=(409,),
        body=OrderBody,
        parameters=(IDEMPOTENCY_KEY,),
    ),
    Operation(
        method="POST",
        paths=("/orders",),
        handler=create_order,
        scope=Scope.ORDERS_WRITE,
        at_once=refuse_at_once,
        summary="Place an order",
        answers={201: Placed, 202: Placed},
        problems=(409,),
        body=OrderBody,
        parameters=(IDEMPOTENCY_KEY,),
    ),
    Operation(
        paths=both("/{order_id}"),
        handler=get_order,
        scope=Scope.ORDERS_READ,
        at_once=get_order_at_once,
        summary="Get an order",
        answers={200: ShownOrder, 304: None},
        problems=(409, 412),
        parameters=(
            query(
                "wait",
                "Hold the answer until the order changes: seconds, as `5` or `0.5`.",
                type="number",
                minimum=0,
                maximum=30,
            ),
            query("min_version", "Never answer an older version.", type="integer", minimum=0, maximum=2**53),
            IF_NONE_MATCH,
        ),
        fault=("wait", "must be seconds from 0 to 30"),
    ),
    _change_of("", delete_order, "Delete an order", {202: _QUEUED, 204: None}, method="DELETE"),
    _change_of(
        "/status",
        change_status,
        "Change an order's status",
        {200: OrderDocument, 202: _QUEUED},
        method="PATCH",
        body=StatusBody,
    ),
    _change_of("/cancel", cancel_order, "Cancel an order", {202: _QUEUED}),
    _change_of("/retry", retry_order, "Retry an order", {202: _QUEUED}),
    _change_of(
        "/fulfilment",
        report_fulfilment,
        "Report what became of an order",
        {200: OrderDocument, 202: _QUEUED},
        body=FulfilmentBody,
    ),
    Operation(
        paths=both("/{order_id}/events"),
        handler=order_events,
        scope=Scope.ORDERS_READ,
        summary="An order's history",
        answers={200: History},
    ),
)
