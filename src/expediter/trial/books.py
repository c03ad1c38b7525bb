"""The books of the trial gateway: every payment, in memory and in a ledger file that survives a killed process.

The ledger has one line of JSON for each thing that happened; its first fields are those of the simulated gateway's
ledger, so that `expediter verify --ledger` reads it as well. What is to happen later has its time in its line, so
that it happens after a restart, too.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import os
from collections import Counter
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

import msgspec

from expediter.errors import ConfigurationError
from expediter.trial.documents import Error, Payment, Refund

#: Payments that one gateway keeps, all of them in memory: some 200 MB. Then it takes no more.
PAYMENTS_MAX = 250_000

#: What a payment is after a line about it.
_STATUSES = {
    "charge": "succeeded",
    "authorize": "authorized",
    "decline": "declined",
    "action": "action_required",
    "process": "processing",
}
#: Why a payment or a refund is not what was asked for, by the code that says so.
_MESSAGES = {
    "declined": "The card was declined",
    "authentication_failed": "The customer said no",
    "expired": "The time for it is over",
    "refund_failed": "The customer's bank does not take it back",
}


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the ledger.

    `action` is charge, authorize, decline, action (the customer must act), process, capture, void, refund,
    refund_pending or refund_failed. `until` is when what waits is decided without being asked.
    """

    action: str
    key: str
    amount_minor: int
    currency: str
    id: str
    at: str
    order_id: str = ""
    refund_key: str = ""
    until: str = ""
    code: str = ""
    capture: bool = True
    return_url: str = ""


class Terms(msgspec.Struct):
    """What was agreed on for a payment: when it is decided unasked, whether it is captured at once."""

    until: str = ""
    capture: bool = True
    return_url: str = ""


class Spans(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that what waits may wait."""

    action_seconds: float = 900.0
    authorized_seconds: float = 7 * 86_400.0
    slow_seconds: float = 20.0


class Course(StrEnum):
    """What becomes of a new payment."""

    TAKEN = "charge"
    DECLINED = "decline"
    ASKED = "action"
    LATER = "process"


class Clash(Exception):
    """The key belongs to something else."""


class Refused(Exception):
    """It cannot be done, now or ever; nothing was. `code` says why to a program."""

    def __init__(self, message: str, code: str = "refused") -> None:
        """Say why."""
        super().__init__(message)
        self.code = code


class Books:
    """Every payment that was asked for. Use it from one thread; the file belongs to one process."""

    def __init__(self, ledger: Path | None, spans: Spans) -> None:
        """Read what the ledger has. Raises ConfigurationError if it cannot be used, or another process has it."""
        self.payments: dict[str, Payment] = {}
        self._spans = spans
        self._by_id: dict[str, Payment] = {}
        self._terms: dict[str, Terms] = {}
        self._refunds: dict[str, tuple[Payment, Refund]] = {}
        #: What of a payment is on its way back.
        self._pending_minor: Counter[str] = Counter()
        #: What is decided by the clock: when, the payment's key, and the refund's if it is one.
        self._due: list[tuple[str, str, str]] = []
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

    def terms(self, payment: Payment) -> Terms:
        """Return what was agreed on for a payment."""
        return self._terms.get(payment.key) or Terms()

    def pay(
        self,
        key: str,
        order_id: str,
        amount_minor: int,
        currency: str,
        *,
        course: Course,
        capture: bool = True,
        return_url: str = "",
    ) -> tuple[Payment, bool]:
        """Begin a payment, or find it; return it and whether it is a new one. Raises Clash, Refused.

        Without `capture` the money is reserved only.
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
        at = _now()
        payment = Payment(f"pay_{key}", key, order_id, "", amount_minor, currency, at)
        action, until = course.value, ""
        if course is Course.TAKEN and not capture:
            action, until = "authorize", _after(at, self._spans.authorized_seconds)
        elif course is Course.ASKED:
            until = _after(at, self._spans.action_seconds)
        elif course is Course.LATER:
            until = _after(at, self._spans.slow_seconds)
        self._enter(action, payment, at=at, until=until, capture=capture, return_url=return_url)
        return self.payments[key], True

    def answer(self, payment: Payment, *, yes: bool) -> bool:
        """Take the customer's answer, unless the payment waits for none; return whether it was taken."""
        if payment.status != "action_required":
            return False
        if yes:
            self._take(payment)
        else:
            self._enter("decline", payment, code="authentication_failed")
        return True

    def capture(self, payment: Payment, amount_minor: int) -> bool:
        """Take what is reserved; return whether that is new. Raises Refused."""
        if payment.status == "succeeded" and payment.captured_minor == amount_minor:
            return False
        if payment.error is not None and payment.error.code == "expired":
            raise Refused("It is too late: what was reserved is free again", "expired")
        if payment.status != "authorized" or not 0 < amount_minor <= payment.amount_minor:
            raise Refused(f"{amount_minor} of a payment that is {payment.status} cannot be captured")
        self._enter("capture", payment, amount_minor)
        return True

    def void(self, payment: Payment) -> bool:
        """Let go of what is reserved, or of what the customer was asked for; return whether that is new.

        Raises Refused.
        """
        if payment.status == "voided":
            return False
        if payment.status not in ("authorized", "action_required"):
            raise Refused(f"A payment that is {payment.status} cannot be voided")
        self._enter("void", payment)
        return True

    def refund(self, payment: Payment, key: str, amount_minor: int, reason: str) -> tuple[Refund, bool]:
        """Give back a part or all of what was captured, once for each key; return also whether it is new.

        The reasons `fail` and `pending` ask for a refund that fails, and for one that takes its time. Raises
        Clash, Refused.
        """
        before = self._refunds.get(key)
        if before is not None:
            if before[0] is not payment or before[1].amount_minor != amount_minor:
                raise Clash(f"The key {key} belongs to a refund of {before[1].amount_minor} of {before[0].id}")
            return before[1], False
        left = payment.captured_minor - payment.refunded_minor - self._pending_minor[payment.key]
        if not 0 < amount_minor <= left:
            raise Refused(f"{amount_minor} cannot be refunded: {left} of this payment is left")
        id = f"ref_{len(self._refunds) + 1}_{payment.key}"
        if reason == "fail":
            self._enter("refund_failed", payment, amount_minor, id=id, refund_key=key, code="refund_failed")
        elif reason == "pending":
            until = _after(_now(), self._spans.slow_seconds)
            self._enter("refund_pending", payment, amount_minor, id=id, refund_key=key, until=until)
        else:
            self._enter("refund", payment, amount_minor, id=id, refund_key=key)
        return self._refunds[key][1], True

    def advance(self) -> list[Payment]:
        """Let everything happen whose time has come; return the payments that it changed."""
        changed = []
        while self._due and self._due[0][0] <= _now():
            due = heapq.heappop(self._due)
            try:
                payment = self._decide(*due)
            except OSError:
                heapq.heappush(self._due, due)  # it is not written down, so it has not happened
                raise
            if payment is not None:
                changed.append(payment)
        return changed

    def seconds_to_next(self) -> float | None:
        """Return how long it is until `advance` has something to do; None: nothing is due."""
        if not self._due:
            return None
        return (datetime.fromisoformat(self._due[0][0]) - datetime.now(UTC)).total_seconds()

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

    def _take(self, payment: Payment) -> None:
        if self._terms[payment.key].capture:
            self._enter("charge", payment)
        else:
            self._enter("authorize", payment, until=_after(_now(), self._spans.authorized_seconds), capture=False)

    def _decide(self, until: str, key: str, refund_key: str) -> Payment | None:
        """Let happen what was due at `until`, unless something else has come before it."""
        payment = self.payments[key]
        if refund_key:
            refund = self._refunds[refund_key][1]
            self._enter("refund", payment, refund.amount_minor, id=refund.id, refund_key=refund_key)
        elif self._terms[key].until != until:
            return None
        elif payment.status == "processing":
            self._take(payment)
        elif payment.status == "action_required":
            self._enter("decline", payment, code="expired")
        elif payment.status == "authorized":
            self._enter("void", payment, code="expired")
        else:
            return None
        return payment

    def _enter(
        self,
        action: str,
        payment: Payment,
        amount_minor: int | None = None,
        *,
        id: str = "",
        at: str = "",
        refund_key: str = "",
        until: str = "",
        code: str = "",
        capture: bool = True,
        return_url: str = "",
    ) -> None:
        line = Line(
            action,
            payment.key,
            payment.amount_minor if amount_minor is None else amount_minor,
            payment.currency,
            id or payment.id,
            at or _now(),
            payment.order_id,
            refund_key,
            until,
            code,
            capture,
            return_url,
        )
        if self._descriptor >= 0:
            self._write(msgspec.json.encode(line) + b"\n")
        self._apply(line)

    def _write(self, data: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        if os.write(self._descriptor, data) < len(data):
            # Half a line in the midst of the file would make all of it unreadable.
            os.ftruncate(self._descriptor, size)
            raise OSError(errno.ENOSPC, "The ledger has no room left")

    def _apply(self, line: Line) -> None:
        if line.action in _STATUSES:
            self._apply_status(line)
            return
        payment = self.payments[line.key]
        if line.action == "capture":
            payment.status, payment.captured_minor = "succeeded", line.amount_minor
        elif line.action == "void":
            payment.status, payment.error = "voided", _error(line.code)
        elif line.action.startswith("refund"):
            self._apply_refund(line, payment)

    def _apply_status(self, line: Line) -> None:
        payment = self.payments.get(line.key)
        if payment is None:
            payment = Payment(line.id, line.key, line.order_id, "", line.amount_minor, line.currency, line.at)
            self.payments[line.key] = self._by_id[line.id] = payment
        payment.status = _STATUSES[line.action]
        if line.action == "charge":
            payment.captured_minor = line.amount_minor
        elif line.action == "decline":
            payment.error = _error(line.code or "declined")
        if line.until:
            terms = self._terms.setdefault(line.key, Terms(capture=line.capture, return_url=line.return_url))
            terms.until = line.until
            heapq.heappush(self._due, (line.until, line.key, ""))

    def _apply_refund(self, line: Line, payment: Payment) -> None:
        known = self._refunds.get(line.refund_key)
        refund = Refund(line.id, line.refund_key, line.amount_minor) if known is None else known[1]
        self._refunds[line.refund_key] = payment, refund
        if line.action == "refund_failed":
            refund.status, refund.error = "failed", _error(line.code)
        elif line.action == "refund_pending":
            refund.status = "pending"
            self._pending_minor[payment.key] += line.amount_minor
            heapq.heappush(self._due, (line.until, line.key, line.refund_key))
        else:
            if refund.status == "pending":
                self._pending_minor[payment.key] -= line.amount_minor
            refund.status = "succeeded"
            payment.refunded_minor += line.amount_minor


def _error(code: str) -> Error | None:
    return Error(code, _MESSAGES.get(code, code)) if code else None


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _now() -> str:
    return _text(datetime.now(UTC))


def _after(at: str, seconds: float) -> str:
    return _text(datetime.fromisoformat(at) + timedelta(seconds=seconds))
