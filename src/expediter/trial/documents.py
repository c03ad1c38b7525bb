"""What the trial gateway answers with: the documents of the HTTP payment protocol (docs/payments.md)."""

from __future__ import annotations

import msgspec


class Error(msgspec.Struct):
    """Why a payment was declined, has ended, or could not be refunded."""

    code: str
    message: str


class Action(msgspec.Struct):
    """What the customer has to do: open the page at `url`."""

    type: str
    url: str
    expires_at: str


class Payment(msgspec.Struct):
    """A payment document, as the protocol has it."""

    id: str
    key: str
    order_id: str
    status: str
    amount_minor: int
    currency: str
    created_at: str
    captured_minor: int = 0
    refunded_minor: int = 0
    action: Action | None = None
    error: Error | None = None


class Refund(msgspec.Struct):
    """A refund, as the protocol has it."""

    id: str
    key: str
    amount_minor: int
    status: str = "succeeded"
    error: Error | None = None
