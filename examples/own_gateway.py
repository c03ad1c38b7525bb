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
            entry = book.setdefault(
                charge.key,
                {
                    "amount": charge.amount_minor,
                    "currency": charge.currency,
                    "captured": charge.amount_minor if charge.capture else 0,
                    "voided": False,
                    "refunds": {},
                },
            )
        if (entry["amount"], entry["currency"]) != (charge.amount_minor, charge.currency):
            raise PaymentConflict("Another amount was charged under this key")
        return _payment(charge.key, entry)

    async def find(self, key: str) -> Payment | None:
        with self._book() as book:
            return _payment(key, book[key]) if key in book else None

    async def capture(self, key: str, amount_minor: int) -> Payment:
        with self._book() as book:
            entry = _known(book, key)
            if not entry["voided"] and not entry["captured"]:
                entry["captured"] = amount_minor
        return _payment(key, entry)

    async def void(self, key: str) -> Payment:
        with self._book() as book:
            entry = _known(book, key)
            entry["voided"] = not entry["captured"]
        return _payment(key, entry)

    async def refund(self, refund: Refund) -> Refunded:
        with self._book() as book:
            entry = _known(book, refund.payment_key)
            before = entry["refunds"].get(refund.key)
            if before not in (None, refund.amount_minor):
                raise PaymentConflict("Another amount was given back under this key")
            if before is None and refund.amount_minor > entry["captured"] - sum(entry["refunds"].values()):
                raise PaymentDeclined("There is not as much left to give back")
            entry["refunds"][refund.key] = refund.amount_minor
        return Refunded(reference=f"refund {refund.key}")

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


def _known(book: dict[str, Any], key: str) -> dict[str, Any]:
    if key not in book:
        raise PaymentDeclined("There is no such payment")
    entry: dict[str, Any] = book[key]
    return entry


def _payment(key: str, entry: dict[str, Any]) -> Payment:
    state = PaymentState.SUCCEEDED if entry["captured"] else PaymentState.AUTHORIZED
    return Payment(
        reference=f"payment {key}",
        state=PaymentState.VOIDED if entry["voided"] else state,
        amount_minor=entry["amount"],
        currency=entry["currency"],
        captured_minor=entry["captured"],
        refunded_minor=sum(entry["refunds"].values()),
    )
