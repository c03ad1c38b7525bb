"""Webhooks: who is told of events, what became of it, and what is sent again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec
import uuid_utils
from msgspec import UNSET, UnsetType

from expediter.backends.addresses import destination
from expediter.errors import Fault, InvalidInput
from expediter.orders.documents import microseconds, timestamp
from expediter.orders.events import EVENT_TYPES, types_named
from expediter.orders.order import MICROSECONDS
from expediter.store.deliveries import STATUSES, Delivery, History, told_from
from expediter.store.feed import Cursor
from expediter.store.scopes import Scope
from expediter.store.submissions import Answer, Replayed
from expediter.store.webhooks import Endpoint, Standing, Tried
from expediter.web.api.orders import no_body, require_json
from expediter.web.context import Context
from expediter.web.http import Call, Reply, answer_reply, json_reply, to_json, whole_number
from expediter.web.operations import IDEMPOTENCY_KEY, Handler, Operation, query
from expediter.web.payloads import RedeliverBody, WebhookBody, WebhookChangeBody, decode

#: Deliveries on a page: at most, and where nobody says.
DELIVERIES_MAX, DELIVERIES_DEFAULT = 100, 50
#: Seconds that a test waits for the receiver, and for the database.
TEST_SECONDS_MAX = 30.0
#: The type of what a test sends; no event has it.
TEST_TYPE = "webhook.test"


class WebhookDocument(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A webhook endpoint. `behind` counts the events that it has still to get, or to pass over.

    `secret` is there only in the answer that makes it.
    """

    id: str
    url: str
    types: list[str]
    description: str
    status: Literal["active", "paused", "failing"]
    position: int
    behind: int
    last_success_at: str | None
    last_error: str | None
    created_at: str
    secret: str | UnsetType = UNSET


class WebhookList(msgspec.Struct, frozen=True):
    """Every webhook endpoint, the oldest first."""

    webhooks: list[WebhookDocument]


class ReceiverAnswer(msgspec.Struct, frozen=True):
    """What a receiver answered: `body` is how it begins, null where there was no answer at all."""

    status: int | None
    body: str | None
    seconds: float


class DeliveryDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one event. `id` is its `webhook-id`; `request` what is sent, null once it is in the archive.

    `next_try_at` is null where it waits for an earlier event of its order, and where nothing is tried any more.
    """

    id: str
    order_id: str
    number: int
    position: int
    type: str
    status: Literal["waiting", "delivered", "given_up"]
    tries: int
    first_tried_at: str | None
    last_tried_at: str | None
    next_try_at: str | None
    request: msgspec.Raw | None
    answer: ReceiverAnswer | None
    error: str | None


class DeliveryList(msgspec.Struct, frozen=True):
    """Deliveries, the newest event first; read on with `cursor=next_cursor`."""

    deliveries: list[DeliveryDocument]
    next_cursor: str | None


class WebhookTested(msgspec.Struct, frozen=True):
    """What came of a test, which was sent as `id`; `error` null: the receiver took it."""

    id: str
    delivered: bool
    answer: ReceiverAnswer
    error: str | None


async def create_webhook(call: Call, context: Context) -> Reply:
    """Send every event of these types to an address from now on, signed; the secret is shown here only."""
    call.query()
    require_json(call)
    body = decode(await call.body(), WebhookBody)
    faults: list[Fault] = []
    _check_url(body.url, context, faults)
    types = body.types or ["*"]
    _check_types(types, faults)
    begin: Cursor | Literal["now", "beginning"] = "now"
    if body.begin == "beginning":
        begin = "beginning"
    elif body.begin not in (None, "now"):
        cursor = Cursor.read(body.begin or "")
        if cursor is None:
            faults.append(Fault("/from", "must be now, beginning, or a next_cursor of the events"))
        else:
            begin = cursor
    if faults:
        raise InvalidInput(faults)
    key = call.idempotency_key(body, context.keep)
    word = _worded(lambda made: json_reply(201, _document(made, secret=True)))
    made = await context.webhooks.create(body.url, types, body.description or "", begin, key=key, word=word)
    return _said(made, word)


async def list_webhooks(call: Call, context: Context) -> Reply:
    """Return every webhook endpoint."""
    call.query()
    return json_reply(200, WebhookList([_document(each) for each in await context.webhooks.all()]))


async def get_webhook(call: Call, context: Context) -> Reply:
    """Return a webhook endpoint, and how far it has come."""
    call.query()
    return json_reply(200, _document(await context.webhooks.one(_id(call))))


async def change_webhook(call: Call, context: Context) -> Reply:
    """Change address, types or description, pause it, or let it go on; what waits is then tried at once."""
    call.query()
    require_json(call)
    body = decode(await call.body(), WebhookChangeBody)
    faults: list[Fault] = []
    if body.url is not None:
        _check_url(body.url, context, faults)
    if body.types is not None:
        _check_types(body.types, faults)
    if faults:
        raise InvalidInput(faults)
    given = {name: value for name in body.__struct_fields__ if (value := getattr(body, name)) is not None}
    key = call.idempotency_key(body, context.keep)
    word = _worded(lambda changed: json_reply(200, _document(changed)))
    return _said(await context.webhooks.change(_id(call), given, key=key, word=word), word)


async def delete_webhook(call: Call, context: Context) -> Reply:
    """Remove a webhook endpoint, and what is kept of its deliveries."""
    await no_body(call)
    key = call.idempotency_key("", context.keep)
    word = _worded(lambda _: Reply(204))
    return _said(await context.webhooks.remove(_id(call), key=key, word=word), word)


async def rotate_secret(call: Call, context: Context) -> Reply:
    """Make a new secret, which is shown here only. For 24 hours the old one signs, too."""
    await no_body(call)
    key = call.idempotency_key("", context.keep)
    word = _worded(lambda rotated: json_reply(200, _document(rotated, secret=True)))
    return _said(await context.webhooks.rotate(_id(call), key=key, word=word), word)


async def test_webhook(call: Call, context: Context) -> Reply:
    """Send a test, once and at once, also to an endpoint that is paused; return what the receiver answered."""
    await no_body(call)
    call.may_take(TEST_SECONDS_MAX)
    key = call.idempotency_key("", context.keep)
    if key is not None and (known := await context.webhooks.known(key)):
        return answer_reply(known.answer, replayed=True)
    endpoint, now = await context.webhooks.with_time(_id(call))
    name = f"test_{uuid_utils.uuid7().hex}"
    sent = {"type": TEST_TYPE, "timestamp": timestamp(now), "data": {"webhook": endpoint.endpoint_id}}
    tried = await context.send(endpoint, name, to_json(sent), now)
    reply = json_reply(200, WebhookTested(name, tried.error is None, _answer(tried), tried.error))
    if key is not None:
        await context.webhooks.keep(key, _kept(reply))
    return reply


async def list_deliveries(call: Call, context: Context) -> Reply:
    """Return what waits, what was given up, and the newest of what was delivered: request, answer, next try."""
    given = call.query("status", "order_id", "cursor", "limit")
    faults: list[Fault] = []
    status = given.get("status")
    if status is not None and status not in STATUSES:
        faults.append(Fault("status", f"must be one of {', '.join(STATUSES)}"))
    before_position = given.get("cursor")
    if before_position is not None and not (before_position.isdecimal() and len(before_position) < 19):
        faults.append(Fault("cursor", "must be a next_cursor of this list"))
    limit = whole_number(given, "limit", 1, DELIVERIES_MAX, DELIVERIES_DEFAULT, faults)
    if faults:
        raise InvalidInput(faults)
    page = await context.webhooks.deliveries(
        _id(call),
        status=status,
        order_id=given.get("order_id"),
        before=None if before_position is None else int(before_position),
        limit=limit,
    )
    shown = [_delivery(each, page.histories.get(each.order_id)) for each in page.deliveries]
    return json_reply(200, DeliveryList(shown, str(page.deliveries[-1].position) if page.more else None))


async def redeliver(call: Call, context: Context) -> Reply:
    """Send deliveries again, or every event since a moment, each under its `webhook-id` of before."""
    call.query()
    require_json(call)
    body = decode(await call.body(), RedeliverBody)
    if (body.since is None) == (body.delivery_ids is None):
        raise InvalidInput([Fault("", "give since or delivery_ids, one of the two")])
    since = None
    if body.since is not None:
        try:
            since = microseconds(body.since)
        except ValueError as error:
            raise InvalidInput([Fault("/since", str(error))]) from error
    key = call.idempotency_key(body, context.keep)
    word = _worded(lambda there: json_reply(202, _document(there)))
    again = await context.webhooks.redeliver(
        _id(call), since=since, ids=body.delivery_ids or (), key=key, word=word
    )
    return _said(again, word)


def _id(call: Call) -> str:
    return call.path_values["webhook_id"]


def _check_url(url: str, context: Context, faults: list[Fault]) -> None:
    try:
        destination(url, allow_http=context.settings.webhook_allow_http)
    except ValueError as error:
        faults.append(Fault("/url", str(error)))


def _check_types(words: list[str], faults: list[Fault]) -> None:
    for index, word in enumerate(words):
        if not types_named(word):
            known = ", ".join(EVENT_TYPES)
            faults.append(Fault(f"/types/{index}", f"{word!r} is no type of event; there are: *, {known}"))


def _worded(reply: Callable[[Standing], Reply]) -> Callable[[Standing], Answer]:
    """Return what makes of a change the answer that is kept under its key."""
    return lambda standing: _kept(reply(standing))


def _kept(reply: Reply) -> Answer:
    headers = {name.decode(): value.decode() for name, value in reply.headers}
    return Answer(reply.status, headers, reply.body.decode())


def _said(made: Standing | Replayed, word: Callable[[Standing], Answer]) -> Reply:
    if isinstance(made, Replayed):
        return answer_reply(made.answer, replayed=True)
    return answer_reply(word(made), replayed=False)


def _document(standing: Standing, *, secret: bool = False) -> WebhookDocument:
    endpoint = standing.endpoint
    return WebhookDocument(
        id=endpoint.endpoint_id,
        url=endpoint.url,
        types=list(endpoint.types),
        description=endpoint.description,
        status=_status(endpoint),
        position=endpoint.position,
        behind=standing.behind,
        last_success_at=timestamp(endpoint.last_success_at),
        last_error=endpoint.last_error,
        created_at=timestamp(endpoint.created_at) or "",
        secret=endpoint.secret if secret else UNSET,
    )


def _status(endpoint: Endpoint) -> Literal["active", "paused", "failing"]:
    if endpoint.status == "paused":
        return "paused"
    return "active" if endpoint.failing_since is None else "failing"


def _delivery(delivery: Delivery, history: History | None) -> DeliveryDocument:
    answered = delivery.took_ms is not None
    told = None if history is None else told_from(history, delivery)
    return DeliveryDocument(
        id=delivery.notice_id,
        order_id=delivery.order_id,
        number=delivery.number,
        position=delivery.position,
        type=delivery.type,
        status=delivery.status,  # type: ignore[arg-type]
        tries=delivery.tries,
        first_tried_at=timestamp(delivery.first_tried_at),
        last_tried_at=timestamp(delivery.last_tried_at),
        next_try_at=timestamp(delivery.next_try_at),
        request=None if told is None else msgspec.Raw(told[0]),
        answer=_answer(delivery) if answered else None,
        error=delivery.error,
    )


def _answer(tried: Tried | Delivery) -> ReceiverAnswer:
    return ReceiverAnswer(tried.answer_status, tried.answer, (tried.took_ms or 0) * 1_000 / MICROSECONDS)


def _operation(
    rest: str,
    handler: Handler,
    summary: str,
    answers: Mapping[int, Any],
    *,
    method: str = "POST",
    body: Any = None,
    problems: tuple[int, ...] = (),
    fault: tuple[str, str] = ("/url", "must begin with https://"),
) -> Operation:
    return Operation(
        method=method,
        paths=(f"/api/v1/webhooks{rest}",),
        handler=handler,
        scope=Scope.WEBHOOKS,
        summary=summary,
        tag="webhooks",
        answers=answers,
        body=body,
        problems=(*problems, 422),
        parameters=() if method == "GET" else (IDEMPOTENCY_KEY,),
        fault=fault,
    )


OPERATIONS = (
    _operation(
        "", create_webhook, "Send events to an address", {201: WebhookDocument}, body=WebhookBody, problems=(409,)
    ),
    _operation("", list_webhooks, "Every webhook endpoint", {200: WebhookList}, method="GET"),
    _operation("/{webhook_id}/rotate-secret", rotate_secret, "Make a new secret", {200: WebhookDocument}),
    _operation("/{webhook_id}/test", test_webhook, "Send a test", {200: WebhookTested}),
    Operation(
        paths=("/api/v1/webhooks/{webhook_id}/deliveries",),
        handler=list_deliveries,
        scope=Scope.WEBHOOKS,
        summary="What became of events",
        tag="webhooks",
        answers={200: DeliveryList},
        parameters=(
            query("status", "Only these.", type="string", enum=list(STATUSES)),
            query("order_id", "Only of this order.", type="string"),
            query("cursor", "`next_cursor` of the page before.", type="string", pattern="^[0-9]{1,18}$"),
            query("limit", "Deliveries on the page.", type="integer", minimum=1, maximum=DELIVERIES_MAX),
        ),
        fault=("status", f"must be one of {', '.join(STATUSES)}"),
    ),
    _operation(
        "/{webhook_id}/redeliver",
        redeliver,
        "Send events again",
        {202: WebhookDocument},
        body=RedeliverBody,
        fault=("/since", "must be a date or time such as 2026-11-21 or 2026-11-21T09:30:00Z"),
    ),
    _operation("/{webhook_id}", get_webhook, "A webhook endpoint", {200: WebhookDocument}, method="GET"),
    _operation(
        "/{webhook_id}",
        change_webhook,
        "Change or pause an endpoint",
        {200: WebhookDocument},
        method="PATCH",
        body=WebhookChangeBody,
    ),
    _operation("/{webhook_id}", delete_webhook, "Remove an endpoint", {204: None}, method="DELETE"),
)
