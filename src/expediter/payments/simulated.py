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


#: Charges and refunds that are kept in memory without a ledger, some 30 MB; then the oldest are forgotten.
ENTRIES_MAX = 100_000
#: Charges and refunds in a ledger: each process keeps them all in memory, some 75 MB.
LEDGER_ENTRIES_MAX = 250_000


class LedgerEntry(msgspec.Struct, frozen=True):
    """One line of the ledger; `action` is "charge" or "refund"."""

    action: str
    key: str
    amount_minor: int
    currency: str


def read_ledger(path: Path) -> dict[tuple[str, str], LedgerEntry]:
    """Return the entries of a ledger by action and key. Raises OSError, msgspec.MsgspecError.

    The trial gateway's has further actions. Its capture of a reserved amount is a charge, and several refunds of
    one payment are one of their sum; what moves no money is left out.
    """
    entries: dict[tuple[str, str], LedgerEntry] = {}
    for line in path.read_bytes().splitlines():
        entry = msgspec.json.decode(line, type=LedgerEntry)
        action = "charge" if entry.action == "capture" else entry.action
        if action == "charge":
            entries[action, entry.key] = msgspec.structs.replace(entry, action=action)
        elif action == "refund":
            before = entries.get((action, entry.key))
            given_back = entry.amount_minor + (0 if before is None else before.amount_minor)
            entries[action, entry.key] = msgspec.structs.replace(entry, amount_minor=given_back)
    return entries


class SimulatedGateway:
    """Succeeds at a given rate after a random delay; a failure is a gateway that is briefly unavailable.

    Without a ledger it remembers the last `ENTRIES_MAX` charges and refunds. A refund of what it may have
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
        self._entries: OrderedDict[tuple[str, str], LedgerEntry] = OrderedDict()
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
                entry = msgspec.json.decode(line, type=LedgerEntry)
                self._entries[entry.action, entry.key] = entry
            self._read = size

    @contextmanager
    def _books(self) -> Iterator[dict[tuple[str, str], LedgerEntry]]:
        """Give the entries, held still against other processes that share the ledger."""
        if self._ledger < 0:
            yield self._entries
            return
        fcntl.flock(self._ledger, fcntl.LOCK_EX)
        try:
            self._read_ledger()
            yield self._entries
        finally:
            fcntl.flock(self._ledger, fcntl.LOCK_UN)

    async def charge(self, charge: Charge) -> Payment:
        """See PaymentGateway."""
        await self._delay()
        with self._books() as entries:
            entry = entries.get(("charge", charge.key))
            if entry is None:
                if charge.token == TOKEN_DECLINED:
                    raise PaymentDeclined("The card was declined (simulated)")
                if charge.token == TOKEN_UNAVAILABLE or self._random.random() >= self._success_rate:
                    raise PaymentUnavailable("The payment gateway is unavailable (simulated)")
                entry = LedgerEntry("charge", charge.key, charge.amount_minor, charge.currency)
                self._enter(entry)
                if charge.token == TOKEN_UNKNOWN:
                    raise PaymentUnknown("The payment gateway did not answer (simulated)")
            elif (entry.amount_minor, entry.currency) != (charge.amount_minor, charge.currency):
                raise PaymentConflict("Another amount was charged under this key (simulated)")
            return self._payment(entries, entry)

    async def find(self, key: str) -> Payment | None:
        """See PaymentGateway."""
        await self._delay()
        with self._books() as entries:
            entry = entries.get(("charge", key))
            return None if entry is None else self._payment(entries, entry)

    async def refund(self, refund: Refund) -> Refunded:
        """See PaymentGateway. It refunds a charge once, as a whole."""
        await self._delay()
        key = refund.payment_key
        with self._books() as entries:
            charged = entries.get(("charge", key))
            if charged is None and not self._has_forgotten:
                raise PaymentDeclined("There is no charge under this key to refund (simulated)")
            if charged is not None and refund.amount_minor != charged.amount_minor:
                raise PaymentDeclined("Only the whole amount can be refunded (simulated)")
            if charged is not None and ("refund", key) not in entries:
                self._enter(LedgerEntry("refund", key, charged.amount_minor, charged.currency))
        return Refunded(reference=f"re_{key}")

    def _payment(self, entries: dict[tuple[str, str], LedgerEntry], entry: LedgerEntry) -> Payment:
        given_back = entries.get(("refund", entry.key))
        return Payment(
            reference=f"ch_{entry.key}",
            state=PaymentState.SUCCEEDED,
            amount_minor=entry.amount_minor,
            currency=entry.currency,
            captured_minor=entry.amount_minor,
            refunded_minor=0 if given_back is None else given_back.amount_minor,
        )

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
        if self._ledger >= 0 and len(self._entries) >= LEDGER_ENTRIES_MAX:
            raise PaymentUnavailable(
                f"The ledger has {LEDGER_ENTRIES_MAX:,} entries and is full: name a new file in PAYMENT_GATEWAY"
            )
        self._entries[entry.action, entry.key] = entry
        if self._ledger < 0 and len(self._entries) > ENTRIES_MAX:
            self._entries.popitem(last=False)
            self._has_forgotten = True
        if self._ledger >= 0:
            self._read += os.write(self._ledger, msgspec.json.encode(entry) + b"\n")
