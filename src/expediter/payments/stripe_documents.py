"""What Stripe says, read: PaymentIntents, charges, refunds, and the events of its callbacks."""

from __future__ import annotations

import time
from typing import Any, NoReturn

import msgspec
import stripe

from expediter.errors import CallbackRefused, PaymentConflict, PaymentDeclined
from expediter.orders.order import MICROSECONDS
from expediter.payments.port import Action, Payment, PaymentState, RefundState

#: Metadata of ours at a PaymentIntent and at a refund.
ORDER_ID = "order_id"
KEY = "expediter_key"
#: Seconds that a callback's signature may be old, or ahead of this machine's clock.
SIGNATURE_SECONDS_MAX = 300
#: Where Stripe's smallest unit is not that of ISO 4217: how many of its units are one of ours, and the reverse.
#: https://docs.stripe.com/currencies#special-cases and #zero-decimal
_FINER = {"ISK": 100, "UGX": 100}
_COARSER = {"MGA": 100}

_STATES = {
    "succeeded": PaymentState.SUCCEEDED,
    "requires_capture": PaymentState.AUTHORIZED,
    "requires_action": PaymentState.ACTION_REQUIRED,
    "processing": PaymentState.PROCESSING,
    "requires_payment_method": PaymentState.DECLINED,
    "canceled": PaymentState.VOIDED,
}
#: Nobody has confirmed it yet, so no money can have moved.
UNCONFIRMED = "requires_confirmation"
REFUND_STATES = {
    "succeeded": RefundState.SUCCEEDED,
    "pending": RefundState.PENDING,
    "requires_action": RefundState.PENDING,
    "failed": RefundState.FAILED,
    "canceled": RefundState.FAILED,
}
#: Events that carry a PaymentIntent whose state counts.
_INTENT_EVENTS = frozenset(
    f"payment_intent.{name}"
    for name in (
        "succeeded",
        "amount_capturable_updated",
        "requires_action",
        "payment_failed",
        "canceled",
        "processing",
    )
)


class _Failure(msgspec.Struct):
    message: str | None = None
    code: str | None = None


class _Redirect(msgspec.Struct):
    url: str | None = None


class _NextAction(msgspec.Struct):
    type: str
    redirect_to_url: _Redirect | None = None


class ChargeDocument(msgspec.Struct):
    """The charge of a PaymentIntent."""

    amount: int
    currency: str
    amount_refunded: int = 0
    amount_captured: int | None = None
    payment_intent: str | None = None
    metadata: dict[str, str] = {}
    created: int | None = None


class IntentDocument(msgspec.Struct):
    """A PaymentIntent; what is not read here is passed over."""

    id: str
    status: str
    amount: int
    currency: str
    created: int | None = None
    client_secret: str | None = None
    amount_received: int | None = None
    metadata: dict[str, str] = {}
    next_action: _NextAction | None = None
    last_payment_error: _Failure | None = None
    latest_charge: ChargeDocument | str | None = None

    @property
    def begun(self) -> bool:
        """Whether anybody has tried to take money by it."""
        waiting = self.status == "requires_payment_method" and self.last_payment_error is None
        return self.status != UNCONFIRMED and not waiting


class IntentList(msgspec.Struct):
    """A page of PaymentIntents."""

    data: list[IntentDocument]
    has_more: bool = False


class RefundDocument(msgspec.Struct):
    """A refund."""

    id: str
    status: str
    amount: int
    currency: str
    metadata: dict[str, str] = {}
    failure_reason: str | None = None


class RefundList(msgspec.Struct):
    """A page of refunds."""

    data: list[RefundDocument]
    has_more: bool = False


class Reported(msgspec.Struct, frozen=True, kw_only=True):
    """What a callback says. `payment` None and `dispute` None: nothing that concerns an order.

    `reference` is the PaymentIntent's id, as it stands at the order. A dispute has no metadata of ours, so that
    alone names its order; `dispute` is its id and `reason` Stripe's word for why.
    """

    event: str
    payment: Payment | None = None
    dispute: str | None = None
    reason: str | None = None
    reference: str | None = None
    order_id: str | None = None
    key: str | None = None


class _Dispute(msgspec.Struct):
    id: str
    payment_intent: str | None = None
    reason: str | None = None


class _Data(msgspec.Struct):
    object: msgspec.Raw


class _Event(msgspec.Struct):
    id: str
    type: str
    data: _Data


def to_stripe(amount_minor: int, currency: str) -> int:
    """Return an amount in Stripe's units. Raises PaymentDeclined for what Stripe cannot charge."""
    coarser = _COARSER.get(currency, 1)
    if amount_minor % coarser:
        raise PaymentDeclined(f"Stripe charges {currency} in whole units only")
    return amount_minor // coarser * _FINER.get(currency, 1)


def from_stripe(amount: int, currency: str) -> int:
    """Return an amount in minor units (ISO 4217). Raises PaymentConflict for a part of one."""
    finer = _FINER.get(currency, 1)
    if amount % finer:
        raise PaymentConflict(f"Stripe has a part of the smallest unit of {currency}")
    return amount // finer * _COARSER.get(currency, 1)


def payment_of(intent: IntentDocument) -> Payment:
    """Return what a PaymentIntent says of a payment."""
    currency = intent.currency.upper()
    charge = intent.latest_charge if isinstance(intent.latest_charge, ChargeDocument) else None
    captured = intent.amount_received
    if captured is None:
        captured = intent.amount if intent.status == "succeeded" else 0
    # A state that is none of those known has to be asked for again, as one that is under way.
    state = _STATES.get(intent.status, PaymentState.PROCESSING)
    error = None
    if state is PaymentState.DECLINED:
        failure = intent.last_payment_error
        error = (failure.message or failure.code) if failure else None
        error = error or "The customer has given no payment method"
    return Payment(
        reference=intent.id,
        state=state,
        amount_minor=from_stripe(intent.amount, currency),
        currency=currency,
        captured_minor=from_stripe(captured, currency),
        refunded_minor=from_stripe(_refunded(charge, captured), currency) if charge else 0,
        error=error,
        action=_action(intent) if state is PaymentState.ACTION_REQUIRED else None,
        key=intent.metadata.get(KEY),
        order_id=intent.metadata.get(ORDER_ID),
        created_at=None if intent.created is None else intent.created * MICROSECONDS,
    )


def _refunded(charge: ChargeDocument, captured: int) -> int:
    """Return what was given back of what was captured. What a capture left over may be in Stripe's sum, too."""
    return max(0, min(charge.amount_refunded, charge.amount_refunded + captured - charge.amount))


def _action(intent: IntentDocument) -> Action:
    redirect = intent.next_action and intent.next_action.redirect_to_url
    if redirect and redirect.url:
        return Action(type="redirect", url=redirect.url)
    return Action(type="client_secret", client_secret=intent.client_secret)


def read_event(secret: str, signature: str, body: bytes) -> Reported:
    """Return what a callback says whose `Stripe-Signature` header is `signature`.

    Raises CallbackRefused, and nothing else: for a signature that is wrong or not of the last
    SIGNATURE_SECONDS_MAX, and for a body that cannot be read. https://docs.stripe.com/webhooks#verify-manually
    """
    try:
        stripe.WebhookSignature.verify_header(body, signature, secret, SIGNATURE_SECONDS_MAX)
    except stripe.SignatureVerificationError as error:
        _refuse(error.user_message or "The signature cannot be verified", error)
    except (ValueError, TypeError) as error:  # no UTF-8, and signatures in other letters than ASCII's
        _refuse("The signature cannot be verified", error)
    # What the library lets pass: a signature that begins to count tomorrow could be kept until then.
    if _signed_at(signature) > time.time() + SIGNATURE_SECONDS_MAX:
        _refuse("The signature's time lies ahead", None)
    try:
        event = msgspec.json.decode(body, type=_Event)
        return _reported(event)
    except (msgspec.MsgspecError, ValueError, PaymentConflict) as error:
        _refuse(f"The event cannot be read: {error}", error)


def _signed_at(signature: str) -> int:
    return int(next(part[2:] for part in signature.split(",") if part.startswith("t=")))


def _refuse(why: str, error: Exception | None) -> NoReturn:
    raise CallbackRefused(why) from error


def _reported(event: _Event) -> Reported:
    if event.type in _INTENT_EVENTS:
        intent: IntentDocument = _as(event, IntentDocument)
        payment = payment_of(intent)
        return Reported(
            event=event.id, payment=payment, reference=intent.id, order_id=payment.order_id, key=payment.key
        )
    if event.type == "charge.refunded":
        charge: ChargeDocument = _as(event, ChargeDocument)
        if charge.payment_intent is None:
            return Reported(event=event.id)
        currency = charge.currency.upper()
        captured = charge.amount if charge.amount_captured is None else charge.amount_captured
        key, order_id = charge.metadata.get(KEY), charge.metadata.get(ORDER_ID)
        refunded = Payment(
            reference=charge.payment_intent,
            state=PaymentState.SUCCEEDED,
            amount_minor=from_stripe(charge.amount, currency),
            currency=currency,
            captured_minor=from_stripe(captured, currency),
            refunded_minor=from_stripe(_refunded(charge, captured), currency),
            key=key,
            order_id=order_id,
        )
        return Reported(
            event=event.id, payment=refunded, reference=charge.payment_intent, order_id=order_id, key=key
        )
    if event.type == "charge.dispute.created":
        dispute: _Dispute = _as(event, _Dispute)
        return Reported(
            event=event.id, dispute=dispute.id, reason=dispute.reason, reference=dispute.payment_intent
        )
    return Reported(event=event.id)


def _as(event: _Event, kind: Any) -> Any:
    return msgspec.json.decode(event.data.object, type=kind)
