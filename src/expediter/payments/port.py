"""What is asked of a payment gateway, what it answers, and the port itself."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol, runtime_checkable

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
    """A charge to make. `key` is the same however often it has to be asked for; amounts are whole minor units."""

    key: str
    order_id: str
    amount_minor: int
    currency: str
    token: str | None = None
    customer_id: int | str | None = None


class Payment(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway knows of a charge; `reference` is its own name for it."""

    reference: str
    state: PaymentState
    amount_minor: int
    currency: str
    captured_minor: int = 0
    refunded_minor: int = 0
    error: str | None = None


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

    async def refund(self, refund: Refund) -> Refunded:
        """Give back a part or all of a charge, or return what became of the same refund before."""

    async def close(self) -> None:
        """Give back connections."""
