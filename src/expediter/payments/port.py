"""What is asked of a payment gateway, what it answers, and the port itself."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec


class PaymentState(StrEnum):
    """Where a payment is, by the gateway's word."""

    SUCCEEDED = "succeeded"
    AUTHORIZED = "authorized"
    ACTION_REQUIRED = "action_required"
    PROCESSING = "processing"
    DECLINED = "declined"
    VOIDED = "voided"


class RefundState(StrEnum):
    """Where a refund is, by the gateway's word."""

    SUCCEEDED = "succeeded"
    PENDING = "pending"
    FAILED = "failed"


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """A charge to make. `key` is the same however often it has to be asked for; amounts are whole minor units.

    Without `capture` the money is only reserved: `PaymentGateway.capture` takes it, `PaymentGateway.void` lets it
    go. `return_url` is where a customer who had to act is sent afterwards.
    """

    key: str
    order_id: str
    amount_minor: int
    currency: str
    token: str | None = None
    customer_id: int | str | None = None
    capture: bool = True
    return_url: str | None = None


class Action(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the customer must do before the gateway takes the money: 3-D Secure and the like.

    `type` is "redirect" with a `url` to send the customer to, or "client_secret" with what the shop's page hands
    to the gateway's own script. `expires_at` is until when, in microseconds since 1970; None: the gateway has not
    said.
    """

    type: str
    url: str | None = None
    client_secret: str | None = None
    expires_at: int | None = None


class Payment(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway knows of a charge; `reference` is its own name for it.

    `action` is there while the state is ACTION_REQUIRED. `key`, `order_id` and `created_at` (microseconds since
    1970) are for payments that were not asked for by their key: in lists and callbacks.
    """

    reference: str
    state: PaymentState
    amount_minor: int
    currency: str
    captured_minor: int = 0
    refunded_minor: int = 0
    error: str | None = None
    action: Action | None = None
    key: str | None = None
    order_id: str | None = None
    created_at: int | None = None


class Refund(msgspec.Struct, frozen=True, kw_only=True):
    """A refund to make, of the charge that was made under `payment_key`. `key` is the refund's own."""

    key: str
    payment_key: str
    amount_minor: int
    currency: str
    reason: str = ""


class Refunded(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway says of a refund; `reference` is its own name for it."""

    reference: str
    state: RefundState = RefundState.SUCCEEDED
    error: str | None = None


@runtime_checkable
class PaymentGateway(Protocol):
    """Where money moves. Whatever is asked twice under one key happens once, for `key_window_seconds` at least.

    Every call raises PaymentDeclined (definite: no money moved, and none will under this key), PaymentUnavailable
    (definite: this call did nothing), PaymentConflict (the key was used for something else: a bug) or
    PaymentUnknown (no answer: it may have happened). Anything else that is raised counts as unknown.
    """

    name: str
    key_window_seconds: float

    async def charge(self, charge: Charge) -> Payment:
        """Charge, or return what became of the same charge before."""

    async def find(self, key: str) -> Payment | None:
        """Return the charge made under this key, None if the gateway knows of none."""

    async def capture(self, key: str, amount_minor: int) -> Payment:
        """Take what was reserved under this key; said again, it changes nothing. What is gone is VOIDED."""

    async def void(self, key: str) -> Payment:
        """Let go of what was reserved under this key, or of a payment that waits for its customer.

        Said again, it changes nothing. What was captured meanwhile stays so, and is returned as it is.
        """

    async def refund(self, refund: Refund) -> Refunded:
        """Give back a part or all of a charge, or return what became of the same refund before."""

    async def close(self) -> None:
        """Give back connections."""


class PaymentPage(NamedTuple):
    """Payments, and where the next page begins (None: there is none). Each has its `key`."""

    payments: list[Payment]
    next_cursor: str | None


@runtime_checkable
class PaymentLister(Protocol):
    """A gateway that can also list what it has: `expediter reconcile` asks for it."""

    async def payments(self, since: int, until: int, cursor: str | None) -> PaymentPage:
        """Return a page of the payments made in [since, until) (microseconds since 1970), the oldest first."""
