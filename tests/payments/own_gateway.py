"""A user's own gateway, as `PAYMENT_GATEWAY=python:own_gateway:OwnGateway` names it: a book in a file."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from expediter.errors import PaymentConflict, PaymentDeclined
from expediter.payments import Charge, Payment, PaymentState, Refund, Refunded


class OwnGateway:
    """Keeps what it was told in a file; the file is the account."""

    name = "my bank"
    key_window_seconds = 86_400.0

    def __init__(self) -> None:
        self._path = Path(os.environ["OWN_BOOK"])
        self._path.touch()

    async def charge(self, charge: Charge) -> Payment:
        if charge.token == "tok_declined":
            raise PaymentDeclined("No")
        with self._path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            book: dict[str, Any] = json.loads(file.read() or "{}")
            entry = book.setdefault(charge.key, [charge.amount_minor, charge.currency, 0])
            if entry[:2] != [charge.amount_minor, charge.currency]:
                raise PaymentConflict("Another amount")
            file.seek(0)
            file.write(json.dumps(book))
        return _payment(charge.key, entry)

    async def find(self, key: str) -> Payment | None:
        entry = json.loads(self._path.read_text() or "{}").get(key)
        return None if entry is None else _payment(key, entry)

    async def refund(self, refund: Refund) -> Refunded:
        with self._path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            book = json.loads(file.read() or "{}")
            if refund.payment_key not in book:
                raise PaymentDeclined("Nothing to refund")
            book[refund.payment_key][2] = refund.amount_minor
            file.seek(0)
            file.write(json.dumps(book))
        return Refunded(reference=f"re {refund.key}")

    async def close(self) -> None:
        pass


def _payment(key: str, entry: list[Any]) -> Payment:
    amount, currency, refunded = entry
    return Payment(
        reference=f"ch {key}",
        state=PaymentState.SUCCEEDED,
        amount_minor=amount,
        currency=currency,
        captured_minor=amount,
        refunded_minor=refunded,
    )


class WithoutFind:
    name = "half a gateway"
    key_window_seconds = 1.0

    async def charge(self, charge: Charge) -> Payment:
        raise NotImplementedError
