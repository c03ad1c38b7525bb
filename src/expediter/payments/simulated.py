"""A payment gateway that moves no money: for trying out, for tests, and for measuring.

It honours idempotency keys. What it has charged it keeps in memory, or in a ledger file (one JSON line per charge
or refund, appended), which survives a killed process, is shared by all processes that name it, and can be counted.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from urllib.parse import SplitResult, parse_qs

import msgspec

from expediter.errors import (
    ConfigurationError,
    PaymentConflict,
    PaymentDeclined,
    PaymentUnavailable,
    PaymentUnknown,
)
from expediter.payments.port import Charge, Payment, PaymentState, Refund, Refunded

#: What a `payment_token` can ask of the simulation, whatever the success rate.
TOKEN_DECLINED = "tok_declined"
TOKEN_UNAVAILABLE = "tok_unavailable"
#: The charge succeeds but its answer is lost.
TOKEN_UNKNOWN = "tok_unknown"


#: Payments that are kept in memory without a ledger, some 40 MB; then the oldest are forgotten.
ACCOUNTS_MAX = 100_000
#: Lines of a ledger: each process keeps what they say in memory, some 100 MB.
LEDGER_ENTRIES_MAX = 250_000


class LedgerEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the ledger; `action` is charge, authorize, capture, void or refund, `key` that of the payment.

    The trial gateway's ledger has these fields, and more.
    """

    action: str
    key: str
    amount_minor: int
    currency: str
    refund_key: str = ""


class Account(msgspec.Struct):
    """What a ledger says of one payment: what was reserved or charged, what was taken, each refund by its key."""

    amount_minor: int
    currency: str
    captured_minor: int = 0
    voided: bool = False
    refunds: dict[str, int] = {}

    @property
    def refunded_minor(self) -> int:
        """The sum of what was given back."""
        return sum(self.refunds.values())

    @property
    def state(self) -> PaymentState:
        """Where the payment is."""
        if self.voided:
            return PaymentState.VOIDED
        return PaymentState.SUCCEEDED if self.captured_minor else PaymentState.AUTHORIZED


def _enter(accounts: dict[str, Account], entry: LedgerEntry) -> None:
    """Take note of what a line of the ledger says; what moves no money is passed over."""
    if entry.action in ("charge", "authorize"):
        captured = entry.amount_minor if entry.action == "charge" else 0
        accounts[entry.key] = Account(entry.amount_minor, entry.currency, captured)
        return
    account = accounts.get(entry.key)
    if account is None:
        return
    if entry.action == "capture":
        account.captured_minor = entry.amount_minor
    elif entry.action == "void":
        account.voided = True
    elif entry.action == "refund":
        account.refunds[entry.refund_key or f"{entry.key}-refund"] = entry.amount_minor


def read_ledger(path: Path) -> dict[str, Account]:
    """Return the payments in a ledger by their keys. Raises OSError, msgspec.MsgspecError."""
    accounts: dict[str, Account] = {}
    for line in path.read_bytes().splitlines():
        _enter(accounts, msgspec.json.decode(line, type=LedgerEntry))
    return accounts


class SimulatedGateway:
    """Succeeds at a given rate after a random delay; a failure is a gateway that is briefly unavailable.

    Without a ledger it remembers the last `ACCOUNTS_MAX` payments. A refund of what it may have
    forgotten succeeds: a real gateway would still know of it.
    """

    name = "simulated"
    key_window_seconds = 24 * 3600.0

    def __init__(
        self,
        *,
        success_rate: float = 1.0,
        latency_ms_min: int = 0,
        latency_ms_max: int = 0,
        seed: int | None = None,
        ledger: Path | None = None,
    ) -> None:
        """Take a rate in [0, 1], a range of milliseconds, a seed for repeatable runs, and a ledger's path."""
        self._success_rate = success_rate
        self._latency = (latency_ms_min / 1000, latency_ms_max / 1000)
        self._random = Random(seed)
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        self._entries = 0
        self._ledger = -1
        self._read = 0
        self._has_forgotten = False
        if ledger is not None:
            self._open_ledger(ledger)

    @classmethod
    def from_address(
        cls, parts: SplitResult, *, success_rate: float, latency_ms_min: int, latency_ms_max: int
    ) -> SimulatedGateway:
        """Read `simulated://[/ledger/file][?seed=7]`. Raises ConfigurationError."""
        options = parse_qs(parts.query)
        seed = options.pop("seed", ["none"])[0]
        if options or (seed != "none" and not seed.lstrip("-").isdigit()):
            raise ConfigurationError("PAYMENT_GATEWAY=simulated:// takes ?seed=NUMBER and nothing else")
        return cls(
            success_rate=success_rate,
            latency_ms_min=latency_ms_min,
            latency_ms_max=latency_ms_max,
            seed=None if seed == "none" else int(seed),
            ledger=Path(parts.netloc + parts.path) if parts.netloc + parts.path else None,
        )

    def _open_ledger(self, path: Path) -> None:
        try:
            self._ledger = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._read_ledger()
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigurationError(f"The ledger of PAYMENT_GATEWAY cannot be used: {error}") from error

    def _read_ledger(self) -> None:
        """Take note of what has been appended, by this process or another, since the last look."""
        size = os.fstat(self._ledger).st_size
        if size > self._read:
            for line in os.pread(self._ledger, size - self._read, self._read).splitlines():
                _enter(self._accounts, msgspec.json.decode(line, type=LedgerEntry))
                self._entries += 1
            self._read = size

    @contextmanager
    def _books(self) -> Iterator[dict[str, Account]]:
        """Give the accounts, held still against other processes that share the ledger."""
        if self._ledger < 0:
            yield self._accounts
            return
        fcntl.flock(self._ledger, fcntl.LOCK_EX)
        try:
            self._read_ledger()
            yield self._accounts
        finally:
            fcntl.flock(self._ledger, fcntl.LOCK_UN)

    async def charge(self, charge: Charge) -> Payment:
        """See PaymentGateway."""
        await self._delay()
        with self._books() as accounts:
            account = accounts.get(charge.key)
            if account is None:
                if charge.token == TOKEN_DECLINED:
                    raise PaymentDeclined("The card was declined (simulated)")
                if charge.token == TOKEN_UNAVAILABLE or self._random.random() >= self._success_rate:
                    raise PaymentUnavailable("The payment gateway is unavailable (simulated)")
                action = "charge" if charge.capture else "authorize"
                self._enter(LedgerEntry(action, charge.key, charge.amount_minor, charge.currency))
                if charge.token == TOKEN_UNKNOWN:
                    raise PaymentUnknown("The payment gateway did not answer (simulated)")
                account = accounts[charge.key]
            elif (account.amount_minor, account.currency) != (charge.amount_minor, charge.currency):
                raise PaymentConflict("Another amount was charged under this key (simulated)")
            return _payment(charge.key, account)

    async def find(self, key: str) -> Payment | None:
        """See PaymentGateway."""
        await self._delay()
        with self._books() as accounts:
            account = accounts.get(key)
            return None if account is None else _payment(key, account)

    async def capture(self, key: str, amount_minor: int) -> Payment:
        """See PaymentGateway."""
        await self._delay()
        with self._books() as accounts:
            account = self._account(accounts, key)
            if account.state is PaymentState.AUTHORIZED:
                if not 0 < amount_minor <= account.amount_minor:
                    raise PaymentDeclined(
                        f"{amount_minor} of {account.amount_minor} cannot be captured (simulated)"
                    )
                self._enter(LedgerEntry("capture", key, amount_minor, account.currency))
            return _payment(key, account)

    async def void(self, key: str) -> Payment:
        """See PaymentGateway."""
        await self._delay()
        with self._books() as accounts:
            account = self._account(accounts, key)
            if account.state is PaymentState.AUTHORIZED:
                self._enter(LedgerEntry("void", key, account.amount_minor, account.currency))
            return _payment(key, account)

    async def refund(self, refund: Refund) -> Refunded:
        """See PaymentGateway."""
        await self._delay()
        with self._books() as accounts:
            account = accounts.get(refund.payment_key)
            if account is None and not self._has_forgotten:
                raise PaymentDeclined("There is no charge under this key to refund (simulated)")
            if account is not None and refund.key not in account.refunds:
                left = account.captured_minor - account.refunded_minor
                if not 0 < refund.amount_minor <= left:
                    raise PaymentDeclined(f"{left} (minor units) of this charge are left to refund (simulated)")
                key, amount = refund.payment_key, refund.amount_minor
                self._enter(LedgerEntry("refund", key, amount, account.currency, refund.key))
            elif account is not None and account.refunds[refund.key] != refund.amount_minor:
                raise PaymentConflict("Another amount was refunded under this key (simulated)")
        return Refunded(reference=f"re_{refund.key}")

    def _account(self, accounts: dict[str, Account], key: str) -> Account:
        if key not in accounts:
            raise PaymentDeclined("There is no charge under this key (simulated)")
        return accounts[key]

    async def close(self) -> None:
        """Close the ledger."""
        if self._ledger >= 0:
            os.close(self._ledger)
            self._ledger = -1

    async def _delay(self) -> None:
        low, high = self._latency
        if high > 0:
            await asyncio.sleep(self._random.uniform(low, high))

    def _enter(self, entry: LedgerEntry) -> None:
        if self._ledger >= 0 and self._entries >= LEDGER_ENTRIES_MAX:
            raise PaymentUnavailable(
                f"The ledger has {LEDGER_ENTRIES_MAX:,} entries and is full: name a new file in PAYMENT_GATEWAY"
            )
        _enter(self._accounts, entry)
        self._entries += 1
        if self._ledger < 0 and len(self._accounts) > ACCOUNTS_MAX:
            self._accounts.popitem(last=False)
            self._has_forgotten = True
        if self._ledger >= 0:
            self._read += os.write(self._ledger, msgspec.json.encode(entry) + b"\n")


def _payment(key: str, account: Account) -> Payment:
    return Payment(
        reference=f"ch_{key}",
        state=account.state,
        amount_minor=account.amount_minor,
        currency=account.currency,
        captured_minor=account.captured_minor,
        refunded_minor=account.refunded_minor,
        key=key,
    )
