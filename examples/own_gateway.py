"""A payment gateway of one's own: `PAYMENT_GATEWAY=python:own_gateway:OwnGateway`, with this folder in PYTHONPATH.

This one moves no money. Its bank is a file, named by OWN_GATEWAY_BOOK, so that every process sees one account.
What matters is that each key is honoured: whatever is asked twice under one key happens once.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from expediter.errors import PaymentConflict, PaymentDeclined
from expediter.payments import Charge, Payment, PaymentState, Refund, Refunded


class OwnGateway:
    """See expediter.payments.PaymentGateway for what each call promises."""

    name = "a file"
    key_window_seconds = 365 * 86_400.0

    def __init__(self) -> None:
        self._path = os.environ.get("OWN_GATEWAY_BOOK", "own-gateway.json")

    async def charge(self, charge: Charge) -> Payment:
        if charge.token == "tok_declined":
            raise PaymentDeclined("The bank says no")
        with self._book() as book:
            entry = book.setdefault(charge.key, [charge.amount_minor, charge.currency, 0])
        if entry[:2] != [charge.amount_minor, charge.currency]:
            raise PaymentConflict("Another amount was charged under this key")
        return _payment(charge.key, entry)

    async def find(self, key: str) -> Payment | None:
        with self._book() as book:
            return _payment(key, book[key]) if key in book else None

    async def refund(self, refund: Refund) -> Refunded:
        with self._book() as book:
            if refund.payment_key not in book:
                raise PaymentDeclined("There is nothing to give back")
            book[refund.payment_key][2] = refund.amount_minor
        return Refunded(reference=f"refund of {refund.payment_key}")

    async def close(self) -> None:
        pass

    @contextmanager
    def _book(self) -> Iterator[dict[str, Any]]:
        with open(self._path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            book = json.loads(file.read() or "{}")
            before = json.dumps(book)
            yield book
            if json.dumps(book) != before:
                file.truncate(0)
                file.write(json.dumps(book))


def _payment(key: str, entry: list[Any]) -> Payment:
    amount, currency, refunded = entry
    return Payment(
        reference=f"payment {key}",
        state=PaymentState.SUCCEEDED,
        amount_minor=amount,
        currency=currency,
        captured_minor=amount,
        refunded_minor=refunded,
    )
