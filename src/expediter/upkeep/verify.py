"""`expediter verify`: the conservation laws, held over the whole database, beside a running service.

One snapshot is read from the first order to the last, a part at a time, so memory does not grow with the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from expediter.backends.databases import Connection, Database
from expediter.errors import ConfigurationError
from expediter.orders.laws import Dossier, Verified, breaches
from expediter.orders.order import Order, PaymentStatus, RefundStatus, gateway_key, refund_key
from expediter.payments.simulated import Account, read_ledger
from expediter.store import audit
from expediter.store.installation import read_key_prefix

#: Keys of a deleted order that are known again: it was declined and charged anew less often than that.
GENERATIONS_MAX = 10


class Verifying:
    """Verifies a service's own database when asked, one look at a time. Use it from one event loop."""

    def __init__(self, database: Database) -> None:
        """Nothing is looked at yet."""
        self._database = database
        self._task: asyncio.Task[Verified] | None = None

    async def result(self, seconds: float) -> Verified | None:
        """Begin to look, unless a look is under way; return what it found, None if it takes longer than `seconds`.

        Whoever asks next gets the result of the same look.
        """
        if self._task is None:
            self._task = asyncio.create_task(verify(self._database, ledger=None, advance=lambda count: None))
        task = self._task
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            return None
        self._task = None
        return task.result()


async def verify(database: Database, *, ledger: Path | None, advance: Callable[[int], None]) -> Verified:
    """Hold everything that is stored against the laws; `advance` is told how many more orders were looked at.

    With `ledger`, the simulated gateway's file, its charges and refunds are compared with what the orders say.
    Raises DatabaseUnavailable, ConfigurationError.
    """
    verified = Verified()
    books = None if ledger is None else _Books(ledger, verified, await database.read(read_key_prefix))

    async def work(connection: Connection) -> None:
        await _orders(connection, verified, advance, books)
        position, newest = await audit.feed(connection)
        if newest > position:
            verified.add(None, f"the feed is at {position}, and an event has position {newest}")
        for table, ids in (await audit.orphans(connection)).items():
            for order_id in ids:
                verified.add(order_id, f"{table} has rows of it, and it is not there")
        after: str | None = ""
        while after is not None:
            wrong, after = await audit.kept_answers(connection, after)
            for key, order_id in wrong.items():
                verified.add(order_id, f"the answer kept under the key {key} names it, and it never was")
        if books is not None:
            gone = ""
            while ids := await audit.deleted(connection, gone):
                books.forget(ids)
                gone = ids[-1]

    await database.read(work, seconds=None)
    if books is not None:
        books.close()
    return verified


async def _orders(
    connection: Connection, verified: Verified, advance: Callable[[int], None], books: _Books | None
) -> None:
    real: dict[str, int] = {}
    last: str | None = ""
    while last is not None:
        part = await audit.orders(connection, last, real)
        last = part.after
        for order_id, error in part.unreadable.items():
            verified.add(order_id, f"it cannot be read: {error}")
        for order_id, positions in part.positions.items():
            if positions != sorted(set(positions)):
                verified.add(order_id, "its events do not follow one another in the feed")
        for dossier in part.dossiers:
            for law in breaches(dossier):
                verified.add(dossier.order.order_id, law)
            if books is not None:
                books.compare(dossier)
        looked = len(part.dossiers) + len(part.unreadable)
        verified.orders += looked
        advance(looked)
    counted = await audit.counters(connection)
    for name in sorted(counted.keys() | real.keys()):
        said, is_so = counted.get(name, 0), real.get(name, 0)
        if said != is_so:
            verified.add(None, f"the counter {name} is {said}, and the rows say {is_so}")


class _Books:
    """The gateway's books, as they were before the database was read and as they are after it.

    What one side saw later than the other is no breach: what the gateway did must have been intended before, and
    what the orders say must be in the books by the end.
    """

    def __init__(self, ledger: Path, verified: Verified, key_prefix: str) -> None:
        self._ledger = ledger
        self._key_prefix = key_prefix
        self._verified = verified
        self._before = self._read()
        self._unknown = set(self._before)
        #: What must be in the books by the end: payments, and refunds by the payment's key, and whose they are.
        self._charges: dict[str, str] = {}
        self._refunds: dict[tuple[str, str], str] = {}

    def _read(self) -> dict[str, Account]:
        try:
            return read_ledger(self._ledger)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigurationError(f"The ledger {self._ledger} cannot be read: {error}") from error

    def compare(self, dossier: Dossier) -> None:
        """Hold what the books had of an order against what it says."""
        order = dossier.order
        now = gateway_key(order.order_id, order.generation, self._key_prefix)
        for generation in range(1, order.generation + 1):
            key = gateway_key(order.order_id, generation, self._key_prefix)
            account = self._before.get(key)
            if account is None:
                continue
            self._unknown.discard(key)
            if (account.amount_minor, account.currency) != (order.total_minor, order.currency):
                self._add(order, "the gateway's charge is about another amount")
            if key != now and account.captured_minor:
                self._add(order, f"the gateway has a charge under {key}, which was declined")
        if any(attempt.error == "settled by hand" for attempt in dossier.attempts):
            return
        account = self._before.get(now)
        if order.captured_minor and (account is None or not account.captured_minor):
            self._charges[now] = order.order_id
        if account is not None and account.captured_minor and not (order.captured_minor or _may_be_charged(order)):
            self._add(order, f"it is {order.payment_status.value}, and the gateway has charged it under {now}")
        self._compare_refunds(dossier, now, account)

    def _compare_refunds(self, dossier: Dossier, now: str, account: Account | None) -> None:
        there = {} if account is None else account.refunds
        known: dict[str, int] = {}
        for refund in dossier.refunds:
            for generation in range(1, refund.generation + 1):
                known[refund_key(now, replace(refund, generation=generation))] = refund.amount_minor
            key = refund_key(now, refund)
            if refund.status is RefundStatus.SUCCEEDED and not refund.by_hand and key not in there:
                self._refunds[now, key] = dossier.order.order_id
        for key, amount in there.items():
            if known.get(key) != amount:
                self._add(
                    dossier.order, f"the gateway has refunded {amount} under {key}, which nobody has asked for"
                )

    def forget(self, order_ids: list[str]) -> None:
        """Take note that these orders are deleted: their charges are nobody's any more."""
        for order_id in order_ids:
            for generation in range(1, GENERATIONS_MAX + 1):
                self._unknown.discard(gateway_key(order_id, generation, self._key_prefix))

    def close(self) -> None:
        """Look once more, for what was not in the books before, and name what belongs to nobody."""
        after = self._read()
        for key, order_id in self._charges.items():
            if key not in after or not after[key].captured_minor:
                self._verified.add(order_id, f"it says that it has a charge; the gateway has none under {key}")
        for (key, of_refund), order_id in self._refunds.items():
            if key not in after or of_refund not in after[key].refunds:
                self._verified.add(
                    order_id, f"it says that it has a refund; the gateway has none under {of_refund}"
                )
        for key in sorted(self._unknown):
            self._verified.add(None, f"the gateway has a charge under {key}, and no order has that key")

    def _add(self, order: Order, law: str) -> None:
        self._verified.add(order.order_id, law)


def _may_be_charged(order: Order) -> bool:
    """Return whether the gateway may have the money without the order knowing it yet."""
    reserved = order.payment_status in (PaymentStatus.AUTHORIZED, PaymentStatus.ACTION_REQUIRED)
    return order.charging or reserved or order.payment_status is PaymentStatus.UNKNOWN
