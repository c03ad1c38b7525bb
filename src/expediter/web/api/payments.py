"""An order's money over HTTP: refunds, and what the payment gateway tells by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from expediter.errors import CallbackRefused, Conflict, ExpediterError, OrderNotFound, PaymentError, Unavailable
from expediter.orders.commands import HearDispute, HearGateway
from expediter.orders.documents import RefundDocument, refund_document
from expediter.orders.order import is_order_id
from expediter.store.scopes import Scope
from expediter.store.submissions import Answer, Applied, Replayed, Request
from expediter.web.api.orders import kept, path_order_id, require_json
from expediter.web.context import Context
from expediter.web.faults import refuse_twice
from expediter.web.http import Call, Reply, answer_reply, json_reply
from expediter.web.operations import IDEMPOTENCY_KEY, IF_MATCH, Operation, Parameter, both
from expediter.web.payloads import RefundBody, decode, refund_order
from expediter.web.problems import RequestRefused

#: The headers that sign a callback (Standard Webhooks).
_SIGNED = ("webhook-id", "webhook-timestamp", "webhook-signature")


class Refunds(msgspec.Struct, frozen=True):
    """The refunds of an order, the oldest first; amounts are whole minor units, `left_minor` can be given back."""

    refunds: list[RefundDocument]
    captured_minor: int
    refunded_minor: int
    refunding_minor: int
    left_minor: int


async def refund_payment(call: Call, context: Context) -> Reply:
    """Give back a part or all of what was paid; the sum of all refunds never exceeds it.

    202: a worker asks the gateway. 201: one that was made by hand is recorded. 409: there is not as much left.
    """
    order_id = path_order_id(call)
    call.query()
    require_json(call)
    body = await call.body()
    command = refund_order(decode(body, RefundBody), body, order_id, call.if_version())
    key = call.idempotency_key(command, context.keep)
    # Also where orders are queued: whoever asks for money hears at once whether there is as much.
    outcome = await context.committer.submit(Request(command, key, _word if key else None), len(body))
    if isinstance(outcome, OrderNotFound):
        await context.queries.order(order_id)
        raise Conflict(f"Order {order_id} is accepted and not stored yet: nothing was taken for it")
    if isinstance(outcome, Replayed):
        return answer_reply(outcome.answer, replayed=True)
    if isinstance(outcome, ExpediterError):
        raise outcome
    assert isinstance(outcome, Applied)
    return answer_reply(outcome.answer or _word(outcome), replayed=False)


def _word(applied: Applied) -> Answer:
    # Recording one by hand may change others: what was asked for is that one, or else the newest.
    asked = max(applied.refunds, key=lambda refund: (refund.by_hand, refund.number))
    document = refund_document(asked, applied.order.currency)
    return kept(json_reply(201 if document.by_hand else 202, document))


async def list_refunds(call: Call, context: Context) -> Reply:
    """Return every refund of an order, the oldest first."""
    order_id = path_order_id(call)
    call.query()
    order, refunds = await context.queries.refunds(order_id)
    return json_reply(
        200,
        Refunds(
            refunds=[refund_document(refund, order.currency) for refund in refunds],
            captured_minor=order.captured_minor,
            refunded_minor=order.refunded_minor,
            refunding_minor=order.refunding_minor,
            left_minor=order.captured_minor - order.refunded_minor - order.refunding_minor,
        ),
    )


async def payment_callback(call: Call, context: Context) -> Reply:
    """Take what the payment gateway tells by itself: a payment document, signed by the Standard Webhooks
    specification.

    204: it is stored with the order that it concerns, or was known already. Send it again after any other answer.
    """
    body = await _callback_body(call)
    try:
        command = await context.hear.callback(_headers(call, _SIGNED), body)
    except CallbackRefused as error:
        raise _unsigned(error) from error
    refuse_twice(body)
    return await _heard(call, context, command, len(body))


async def stripe_callback(call: Call, context: Context) -> Reply:
    """Take an event of Stripe's, signed with the endpoint's secret (`Stripe-Signature`).

    204: it is stored with the order that it concerns, or concerns none.
    """
    body = await _callback_body(call)
    try:
        command = await context.hear.stripe(_headers(call, ("stripe-signature",)), body)
    except CallbackRefused as error:
        raise _unsigned(error) from error
    except PaymentError as error:
        raise Unavailable(f"Stripe cannot be asked whose payment this is: {error}") from error
    refuse_twice(body)
    return Reply(204) if command is None else await _heard(call, context, command, len(body))


async def _callback_body(call: Call) -> bytes:
    call.query()
    require_json(call)
    return await call.body()


def _headers(call: Call, names: Iterable[str]) -> dict[str, str]:
    return {name: text for name in names if (text := call.header(name.encode())) is not None}


def _unsigned(error: CallbackRefused) -> RequestRefused:
    challenge = {"WWW-Authenticate": 'Signature realm="expediter"'}
    return RequestRefused(401, "Unauthorized", str(error), challenge)


async def _heard(call: Call, context: Context, command: HearGateway | HearDispute, size: int) -> Reply:
    if not is_order_id(command.order_id):
        raise OrderNotFound(command.order_id)
    key = call.idempotency_key(command, context.keep)
    outcome = await context.committer.submit(Request(command, key, _taken if key else None), size)
    if isinstance(outcome, ExpediterError):
        raise outcome
    return Reply(204)


def _taken(applied: Applied) -> Answer:
    return kept(Reply(204))


class StripeEventBody(msgspec.Struct, frozen=True):
    """An event as Stripe sends it; of other types than those in docs/payments.md nothing comes."""

    id: str
    type: str
    data: dict[str, Any]


def _signed(name: str, description: str) -> Parameter:
    return Parameter(name=name, where="header", schema={"type": "string"}, description=description)


class CallbackAction(msgspec.Struct, frozen=True):
    """What the customer must do: "redirect" with a `url`, or "client_secret" with one."""

    type: str
    url: str | None = None
    client_secret: str | None = None
    expires_at: str | None = None


class CallbackError(msgspec.Struct, frozen=True):
    """Why a payment was declined."""

    code: str | None = None
    message: str | None = None


class CallbackBody(msgspec.Struct, frozen=True, kw_only=True):
    """A payment document as gateways send it (docs/payments.md); amounts are whole minor units."""

    id: str
    key: str
    order_id: str
    status: Literal["succeeded", "authorized", "action_required", "processing", "declined", "voided"]
    amount_minor: int
    currency: str
    captured_minor: int = 0
    refunded_minor: int = 0
    action: CallbackAction | None = None
    error: CallbackError | None = None
    created_at: str | None = None


OPERATIONS = (
    Operation(
        method="POST",
        paths=both("/{order_id}/refunds"),
        handler=refund_payment,
        scope=Scope.ORDERS_WRITE,
        summary="Refund a part or all of an order",
        tag="payments",
        answers={201: RefundDocument, 202: RefundDocument},
        problems=(409, 412),
        body=RefundBody,
        parameters=(IDEMPOTENCY_KEY, IF_MATCH),
        fault=("/amount", "has more digits after the point than USD has (2)"),
    ),
    Operation(
        paths=both("/{order_id}/refunds"),
        handler=list_refunds,
        scope=Scope.ORDERS_READ,
        summary="An order's refunds",
        tag="payments",
        answers={200: Refunds},
    ),
    Operation(
        method="POST",
        paths=("/api/v1/payments/callback",),
        handler=payment_callback,
        scope=None,
        summary="Hear from the payment gateway",
        tag="payments",
        answers={204: None},
        problems=(400, 401, 404, 409),
        body=CallbackBody,
        parameters=(
            IDEMPOTENCY_KEY,
            _signed("webhook-id", "The same for every try."),
            _signed("webhook-timestamp", "Seconds since 1970, of this try; at most five minutes ago."),
            _signed("webhook-signature", "`v1,` and the signature in base64; several are parted by blanks."),
        ),
    ),
    Operation(
        method="POST",
        paths=("/api/v1/payments/stripe",),
        handler=stripe_callback,
        scope=None,
        summary="Hear from Stripe",
        tag="payments",
        answers={204: None},
        problems=(400, 401, 404, 409),
        body=StripeEventBody,
        parameters=(IDEMPOTENCY_KEY, _signed("stripe-signature", "`t=` the time and `v1=` the signature.")),
    ),
)
