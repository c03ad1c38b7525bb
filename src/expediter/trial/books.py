"""The books of the trial gateway: every payment, in memory and in a ledger file that survives a killed process.

The ledger has one line of JSON for each thing that happened; its first fields are those of the simulated gateway's
ledger, so that `expediter verify --ledger` reads it as well.
"""

from __future__ import annotations

import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from expediter.errors import ConfigurationError

#: Payments that one gateway keeps, all of them in memory: some 200 MB. Then it takes no more.
PAYMENTS_MAX = 250_000


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the ledger; `action` is charge, authorize, capture, void, decline or refund."""

    action: str
    key: str
    amount_minor: int
    currency: str
    id: str
    at: str
    order_id: str = ""
    refund_key: str = ""


class Error(msgspec.Struct):
    """Why a payment was declined."""

    code: str
    message: str


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
    action: None = None
    error: Error | None = None


class Refund(msgspec.Struct):
    """A refund, as the protocol has it."""

    id: str
    key: str
    amount_minor: int
    status: str = "succeeded"
    error: str | None = None


class Clash(Exception):
    """The key belongs to something else."""


class Refused(Exception):
    """It cannot be done, now or ever; nothing was."""


class Books:
    """Every payment that was asked for. Use it from one thread; the file belongs to one process."""

    def __init__(self, ledger: Path | None) -> None:
        """Read what the ledger has. Raises ConfigurationError if it cannot be used, or another process has it."""
        self.payments: dict[str, Payment] = {}
        self._by_id: dict[str, Payment] = {}
        self._refunds: dict[str, tuple[str, Refund]] = {}
        self._descriptor = -1
        if ledger is None:
            return
        try:
            descriptor = os.open(ledger, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigurationError(f"The ledger {ledger} is another gateway's, which runs") from None
            self._read(descriptor, ledger)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigurationError(f"The ledger {ledger} cannot be used: {error}") from error
        self._descriptor = descriptor

    def _read(self, descriptor: int, ledger: Path) -> None:
        data = ledger.read_bytes()
        whole = data.rfind(b"\n") + 1
        for text in data[:whole].splitlines():
            self._apply(msgspec.json.decode(text, type=Line))
        if whole < len(data):
            # The process was killed in the midst of a line: nobody was told that it happened.
            os.ftruncate(descriptor, whole)

    def by_id(self, payment_id: str) -> Payment | None:
        """Return a payment by the gateway's own name for it."""
        return self._by_id.get(payment_id)

    def pay(
        self, key: str, order_id: str, amount_minor: int, currency: str, *, capture: bool, declined: str | None
    ) -> tuple[Payment, bool]:
        """Charge (or reserve, without `capture`), or decline; return the payment and whether it is a new one.

        Raises Clash, Refused.
        """
        before = self.payments.get(key)
        if before is not None:
            if (before.amount_minor, before.currency, before.order_id) != (amount_minor, currency, order_id):
                raise Clash(
                    f"The key {key} belongs to {before.amount_minor} {before.currency} of {before.order_id}"
                )
            return before, False
        if len(self.payments) >= PAYMENTS_MAX:
            raise Refused(f"This gateway keeps {PAYMENTS_MAX:,} payments and is full: name a new ledger")
        action = "decline" if declined is not None else "charge" if capture else "authorize"
        self._enter(action, key, amount_minor, currency, f"pay_{key}", order_id=order_id)
        payment = self.payments[key]
        if declined is not None:
            payment.error = Error("declined", declined)
        return payment, True

    def capture(self, payment: Payment, amount_minor: int) -> None:
        """Take what is reserved. Raises Refused."""
        if payment.status == "succeeded" and payment.captured_minor == amount_minor:
            return
        if payment.status != "authorized" or not 0 < amount_minor <= payment.amount_minor:
            raise Refused(f"{amount_minor} of a payment that is {payment.status} cannot be captured")
        self._enter("capture", payment.key, amount_minor, payment.currency, payment.id)

    def void(self, payment: Payment) -> None:
        """Let go of what is reserved. Raises Refused."""
        if payment.status == "voided":
            return
        if payment.status != "authorized":
            raise Refused(f"A payment that is {payment.status} cannot be voided")
        self._enter("void", payment.key, payment.amount_minor, payment.currency, payment.id)

    def refund(self, payment: Payment, key: str, amount_minor: int) -> Refund:
        """Give back a part or all of what was captured, once for each key. Raises Clash, Refused."""
        before = self._refunds.get(key)
        if before is not None:
            if before[0] != payment.id or before[1].amount_minor != amount_minor:
                raise Clash(f"The key {key} belongs to a refund of {before[1].amount_minor} of {before[0]}")
            return before[1]
        if not 0 < amount_minor <= payment.captured_minor - payment.refunded_minor:
            left = payment.captured_minor - payment.refunded_minor
            raise Refused(f"{amount_minor} cannot be refunded: {left} of this payment is left")
        name = f"ref_{len(self._refunds) + 1}_{payment.key}"
        self._enter("refund", payment.key, amount_minor, payment.currency, name, refund_key=key)
        return self._refunds[key][1]

    def page(self, since: str, until: str, after: int, count: int) -> tuple[list[Payment], int | None]:
        """Return payments made in [since, until), the oldest first, and where the next page begins."""
        there = list(self.payments.values())
        found: list[Payment] = []
        for index in range(after, len(there)):
            if len(found) == count:
                return found, index
            if (not since or there[index].created_at >= since) and (not until or there[index].created_at < until):
                found.append(there[index])
        return found, None

    def close(self) -> None:
        """Close the ledger."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _enter(
        self,
        action: str,
        key: str,
        amount_minor: int,
        currency: str,
        id: str,
        *,
        order_id: str = "",
        refund_key: str = "",
    ) -> None:
        at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        line = Line(action, key, amount_minor, currency, id, at, order_id, refund_key)
        if self._descriptor >= 0:
            os.write(self._descriptor, msgspec.json.encode(line) + b"\n")
        self._apply(line)

    def _apply(self, line: Line) -> None:
        if line.action in ("charge", "authorize", "decline"):
            status = {"charge": "succeeded", "authorize": "authorized", "decline": "declined"}[line.action]
            payment = Payment(line.id, line.key, line.order_id, status, line.amount_minor, line.currency, line.at)
            payment.captured_minor = line.amount_minor if line.action == "charge" else 0
            if line.action == "decline":
                payment.error = Error("declined", "The card was declined")
            self.payments[line.key] = self._by_id[line.id] = payment
            return
        payment = self.payments[line.key]
        if line.action == "capture":
            payment.status, payment.captured_minor = "succeeded", line.amount_minor
        elif line.action == "void":
            payment.status = "voided"
        elif line.action == "refund":
            payment.refunded_minor += line.amount_minor
            self._refunds[line.refund_key] = payment.id, Refund(line.id, line.refund_key, line.amount_minor)
