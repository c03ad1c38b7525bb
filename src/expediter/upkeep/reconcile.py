"""`expediter reconcile`: what the payment gateway has of a span of time against what the orders say.

Both sides are read beside a running service, so they are never of one moment. What seems to differ is looked at
once more on both sides before it is said; what is under way is counted, and is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from expediter.backends.databases import Database
from expediter.errors import ConfigurationError
from expediter.orders.order import Order, OrderRefund, PaymentStatus, RefundStatus, gateway_key
from expediter.payments import Payment, PaymentGateway, PaymentLister
from expediter.store import audit
from expediter.store.installation import read_key_prefix

#: Differences that are named, at most; all are counted.
DIFFERENCES_NAMED_MAX = 1_000


class Difference(msgspec.Struct, frozen=True):
    """One payment that is not the same on both sides; `order_id` None: the gateway names none."""

    order_id: str | None
    key: str | None
    what: str


class Reconciled(msgspec.Struct):
    """What was compared and what was found; `open` is under way and not compared."""

    payments: int = 0
    orders: int = 0
    open: int = 0
    found: int = 0
    differences: list[Difference] = []

    def add(self, difference: Difference) -> None:
        """Take note of a difference."""
        self.found += 1
        if len(self.differences) < DIFFERENCES_NAMED_MAX:
            self.differences.append(difference)


async def reconcile(
    database: Database, gateway: PaymentGateway, *, since: int, until: int, advance: Callable[[int], None]
) -> Reconciled:
    """Compare every payment made in [since, until) (microseconds since 1970); `advance` is told how many more.

    Raises ConfigurationError for a gateway that cannot list its payments; DatabaseUnavailable, PaymentError.
    """
    if not isinstance(gateway, PaymentLister):
        raise ConfigurationError(
            f"The gateway ({gateway.name}) cannot list its payments: reconcile works with https://... and with "
            "stripe:, and with a class that has `async def payments`; for the simulated one there is "
            "`verify --ledger`"
        )
    return await _Reconciling(database, gateway, gateway).run(since, until, advance)


class _Reconciling:
    def __init__(self, database: Database, gateway: PaymentGateway, lister: PaymentLister) -> None:
        self._database = database
        self._gateway = gateway
        self._lister = lister
        self._prefix = ""
        self._result = Reconciled()
        #: The keys of payments that were compared; and orders that are under way.
        self._seen: set[str] = set()
        self._open: set[str] = set()

    async def run(self, since: int, until: int, advance: Callable[[int], None]) -> Reconciled:
        self._prefix = await self._database.read(read_key_prefix) or ""
        cursor: str | None = None
        while True:
            page = await self._lister.payments(since, until, cursor)
            await self._there(page.payments)
            advance(len(page.payments))
            cursor = page.next_cursor
            if cursor is None:
                break
        after: str | None = ""
        while after is not None:
            ids, after = await self._database.read(
                partial(audit.charged_between, after=after, since=since, until=until)
            )
            await self._here(ids)
            advance(len(ids))
        self._result.open = len(self._open)
        return self._result

    async def _read(self, ids: Sequence[str]) -> dict[str, tuple[Order, list[OrderRefund]]]:
        return await self._database.read(partial(audit.orders_and_refunds, ids=ids)) if ids else {}

    async def _there(self, payments: Sequence[Payment]) -> None:
        """Compare what the gateway has. One without a key is none of ours: the account may have others."""
        ours = [payment for payment in payments if payment.key is not None]
        self._result.payments += len(ours)
        found = await self._read(list({payment.order_id for payment in ours if payment.order_id is not None}))
        for payment in ours:
            assert payment.key is not None
            self._seen.add(payment.key)
            if self._differs(payment, found.get(payment.order_id or "")) is not None:
                await self._look_again(payment.key, payment.order_id)

    async def _here(self, ids: Sequence[str]) -> None:
        """Look for what the orders say and the gateway has not."""
        found = await self._read(ids)
        self._result.orders += len(found)
        for order_id, (order, _) in found.items():
            key = gateway_key(order_id, order.generation, self._prefix)
            if key not in self._seen and (order.captured_minor or _is_open(order)):
                await self._look_again(key, order_id)

    async def _look_again(self, key: str, order_id: str | None) -> None:
        """Ask both sides once more about a payment that seems to differ: one may have been a moment behind."""
        before = (await self._read([order_id]) if order_id else {}).get(order_id or "")
        payment = await self._gateway.find(key)
        known = (await self._read([order_id]) if order_id else {}).get(order_id or "")
        if known is not None and (before is None or before[0].version != known[0].version or _is_open(known[0])):
            self._open.add(known[0].order_id)
            return
        if payment is None:
            if known is not None and known[0].captured_minor:
                self._result.add(
                    Difference(order_id, key, "charged here, and the gateway knows of no such payment")
                )
            return
        if order_id is not None and known is None and await self._was_settled(order_id, key, payment):
            return
        what = self._differs(payment, known)
        if what is not None:
            self._result.add(Difference(order_id, key, what))

    async def _was_settled(self, order_id: str, key: str, payment: Payment) -> bool:
        """Return whether the payment is that of a deleted order, which knew of it."""
        calls = await self._database.read(partial(audit.calls_of_deleted, order_id=order_id))
        taken = any(call.gateway_key == key and call.outcome is not None for call in calls)
        return taken and payment.amount_minor == calls[0].amount_minor

    def _differs(self, payment: Payment, known: tuple[Order, list[OrderRefund]] | None) -> str | None:
        """Return how a payment at the gateway differs from what its order says; None: it does not."""
        captured, back = payment.captured_minor, payment.refunded_minor
        if known is None:
            return f"charged there ({captured} {payment.currency}), and no order is here" if captured else None
        order, refunds = known
        if (payment.amount_minor, payment.currency.upper()) != (order.total_minor, order.currency):
            amount = f"{payment.amount_minor} {payment.currency}"
            return f"another amount: {order.total_minor} {order.currency} here, {amount} there"
        current = payment.key == gateway_key(order.order_id, order.generation, self._prefix)
        if not current:
            return (
                f"charged there ({captured} {payment.currency}) under a key that is done with"
                if captured
                else None
            )
        if captured != order.captured_minor:
            return f"captured: {order.captured_minor} here, {captured} there (minor units of {order.currency})"
        by_hand = sum(
            refund.amount_minor for refund in refunds if refund.by_hand and refund.status is RefundStatus.SUCCEEDED
        )
        if not order.refunded_minor - by_hand <= back <= order.refunded_minor:
            return f"refunded: {order.refunded_minor} here, {back} there (minor units of {order.currency})"
        return None


def _is_open(order: Order) -> bool:
    """Return whether the order's money is on its way."""
    waits = (PaymentStatus.UNKNOWN, PaymentStatus.ACTION_REQUIRED)
    return order.charging or order.refunding_minor > 0 or order.payment_status in waits
