"""What a gateway tells by itself: signed documents, read into the command that takes them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from standardwebhooks import Webhook, WebhookVerificationError
from standardwebhooks.webhooks import EmptyWebhookSecretError

from expediter.errors import BadRequest, CallbackRefused, ConfigurationError
from expediter.orders.commands import HearGateway
from expediter.orders.order import PaymentOutcome
from expediter.payments.http import PaymentDocument, as_payment
from expediter.payments.port import Action, Payment, PaymentState

_OUTCOMES: Mapping[PaymentState, PaymentOutcome] = {
    PaymentState.SUCCEEDED: PaymentOutcome.SUCCEEDED,
    PaymentState.AUTHORIZED: PaymentOutcome.AUTHORIZED,
    PaymentState.ACTION_REQUIRED: PaymentOutcome.ACTION_REQUIRED,
    PaymentState.PROCESSING: PaymentOutcome.UNKNOWN,
    PaymentState.DECLINED: PaymentOutcome.DECLINED,
    PaymentState.VOIDED: PaymentOutcome.VOIDED,
}
#: Characters of what a gateway says that are kept.
REFERENCE_CHARACTERS_MAX = 128
ERROR_CHARACTERS_MAX = 500


def open_secret(secret: str, name: str) -> Webhook:
    """Return what signs and verifies with a `whsec_...` secret. Raises ConfigurationError."""
    try:
        return Webhook(secret)
    except (ValueError, EmptyWebhookSecretError) as error:
        raise ConfigurationError(f"{name} must be whsec_ and a secret in base64") from error


def verify(webhook: Webhook, headers: Mapping[str, str], body: bytes) -> None:
    """Raise CallbackRefused unless these headers sign this body, within the last five minutes."""
    try:
        webhook.verify(body, dict(headers), json_parse=False)
    except WebhookVerificationError as error:
        raise CallbackRefused(f"The signature is refused: {error}") from error
    except (ValueError, TypeError) as error:  # a header that is no base64, a body that is no text
        raise CallbackRefused("The signature cannot be read") from error


def read_callback(body: bytes, key_prefix: str, action_in: int) -> HearGateway:
    """Return the command for a payment document that the gateway has sent. Raises BadRequest, CallbackRefused."""
    try:
        document = msgspec.json.decode(body, type=PaymentDocument)
        payment = as_payment(document)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise BadRequest(f"This is no payment document: {error}") from error
    return hear(payment, key_prefix, action_in)


def hear(payment: Payment, key_prefix: str, action_in: int) -> HearGateway:
    """Return the command that takes what the gateway says of a payment. Raises BadRequest."""
    if payment.key is None or payment.order_id is None:
        raise BadRequest("The payment document names no key and order_id")
    return HearGateway(
        order_id=payment.order_id,
        key=payment.key,
        key_prefix=key_prefix,
        outcome=_OUTCOMES[payment.state],
        amount_minor=payment.amount_minor,
        currency=payment.currency,
        captured_minor=payment.captured_minor,
        refunded_minor=payment.refunded_minor,
        reference=fitting(payment.reference, REFERENCE_CHARACTERS_MAX),
        error=None if payment.error is None else fitting(payment.error, ERROR_CHARACTERS_MAX),
        action=stored_action(payment.action),
        action_in=action_in,
        action_until=None if payment.action is None else payment.action.expires_at,
    )


def stored_action(action: Action | None) -> str | None:
    """Return what the customer must do as the order keeps it: JSON text, without its end."""
    if action is None:
        return None
    shown = {"type": action.type, "url": action.url, "client_secret": action.client_secret}
    return msgspec.json.encode({name: value for name, value in shown.items() if value is not None}).decode()


def fitting(text: str, characters_max: int) -> str:
    """Return a text of the outside as every database can store it, and no longer than that."""
    plain = "".join(each if each.isprintable() else " " for each in text.encode("utf-8", "replace").decode())
    return plain if len(plain) <= characters_max else f"{plain[: characters_max - 1]}…"
