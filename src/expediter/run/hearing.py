"""Who listens to the payment gateway: verifies what comes, and reads it into the command that takes it."""

from __future__ import annotations

from collections.abc import Mapping

from expediter.errors import CallbackRefused, UnknownPayment
from expediter.orders.commands import HearDispute, HearGateway
from expediter.orders.order import MICROSECONDS
from expediter.payments import PaymentGateway
from expediter.payments.callbacks import fitting, hear, open_secret, read_callback, verify
from expediter.settings import Settings

#: Characters of Stripe's word for why a customer disputes a payment that are kept.
REASON_CHARACTERS_MAX = 100


class Hearing:
    """Reads the callbacks of the HTTP protocol and those of Stripe."""

    def __init__(self, settings: Settings, gateway: PaymentGateway) -> None:
        """Raises ConfigurationError for a secret that is none."""
        secret = settings.payment_gateway_secret
        self._webhook = open_secret(secret.get_secret_value(), "PAYMENT_GATEWAY_SECRET") if secret else None
        self._stripe_secret = settings.stripe_webhook_secret
        self._gateway = gateway
        self._prefix = settings.gateway_key_prefix
        self._action_in = int(settings.payment_action_seconds * MICROSECONDS)

    async def callback(self, headers: Mapping[str, str], body: bytes) -> HearGateway:
        """Return the command for a payment document. Raises CallbackRefused, BadRequest."""
        if self._webhook is None:
            raise CallbackRefused("Set PAYMENT_GATEWAY_SECRET to the secret that the gateway signs with")
        verify(self._webhook, headers, body)
        return read_callback(body, self._prefix, self._action_in)

    async def stripe(self, headers: Mapping[str, str], body: bytes) -> HearGateway | HearDispute | None:
        """Return the command for an event of Stripe's, None for one that concerns no order.

        Raises CallbackRefused, UnknownPayment for a dispute of a payment that no order has made, and PaymentError
        while Stripe cannot be asked whose a disputed payment is.
        """
        if self._stripe_secret is None:
            raise CallbackRefused("Set STRIPE_WEBHOOK_SECRET to the signing secret of this endpoint at Stripe")
        from expediter.payments.stripe_documents import read_event

        said = read_event(self._stripe_secret.get_secret_value(), headers.get("stripe-signature", ""), body)
        if said.dispute is not None and said.reference is not None:
            return await self._dispute(said.reference, said.dispute, said.reason)
        if said.payment is None or said.key is None or said.order_id is None:
            return None  # what the account has besides our orders
        return hear(said.payment, self._prefix, self._action_in)

    async def _dispute(self, reference: str, dispute: str, reason: str | None) -> HearDispute:
        from expediter.payments.stripe import StripeGateway

        if not isinstance(self._gateway, StripeGateway):
            raise UnknownPayment("PAYMENT_GATEWAY is not stripe: no payment of Stripe's is known here")
        payment = await self._gateway.payment(reference)
        if payment.order_id is None:
            raise UnknownPayment(f"No order has asked for the payment {reference}")
        words = fitting(reason or "no reason given", REASON_CHARACTERS_MAX)
        return HearDispute(order_id=payment.order_id, reference=fitting(dispute, 128), reason=words)
