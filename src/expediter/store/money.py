"""What a batch knows and writes of money: calls to the gateway, and refunds."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from expediter.backends.databases import Connection
from expediter.orders.draft import Decision
from expediter.orders.order import Attempt, AttemptResult, Order, OrderRefund
from expediter.store import schema
from expediter.store.rows import attempt_row, read_refund, refund_row
from expediter.store.statements import OPEN_REFUNDS


class Money:
    """The refunds that are open as they are now, and everything about money that is to be written."""

    def __init__(self, connection: Connection) -> None:
        """Nothing is loaded."""
        self._connection = connection
        #: Whether there is anything to write.
        self.changed = False
        self._attempts: list[Attempt] = []
        self._attempt_results: list[AttemptResult] = []
        self._refunds: dict[str, dict[int, OrderRefund]] = {}
        self._stored: set[tuple[str, int]] = set()
        self._changed: dict[tuple[str, int], OrderRefund] = {}

    async def load(self, orders: Iterable[Order | None]) -> None:
        """Load the open refunds of those of these orders that have any: few do."""
        ids = [
            order.order_id
            for order in orders
            if order is not None and order.refunding_minor and order.order_id not in self._refunds
        ]
        if not ids:
            return
        self._refunds.update((order_id, {}) for order_id in ids)
        for row in await self._connection.fetch(OPEN_REFUNDS, ids=ids):
            refund = read_refund(row)
            self._refunds[refund.order_id][refund.number] = refund
            self._stored.add((refund.order_id, refund.number))

    def refunds(self, order_id: str) -> Collection[OrderRefund]:
        """Return the refunds of an order that are open, or that this batch has settled."""
        found = self._refunds.get(order_id)
        return () if found is None else found.values()

    def record(self, order_id: str, decision: Decision) -> None:
        """Take note of what was decided."""
        self.changed = True
        for attempt in decision.attempts:
            if isinstance(attempt, Attempt):
                self._attempts.append(attempt)
            else:
                self._attempt_results.append(attempt)
        for refund in decision.refunds:
            self._refunds.setdefault(order_id, {})[refund.number] = refund
            self._changed[order_id, refund.number] = refund

    async def write(self) -> None:
        """Write what has changed."""
        if self._attempts:
            rows = [attempt_row(attempt) for attempt in self._attempts]
            await self._connection.insert(schema.payment_attempts, rows)
        if self._attempt_results:
            # An outcome comes after the commit of its intent: the call itself lies between.
            assert not {(each.order_id, each.number) for each in self._attempts} & {
                (each.order_id, each.number) for each in self._attempt_results
            }
            rows = [
                (end.finished_at, end.outcome.value, end.reference, end.error, end.order_id, end.number)
                for end in self._attempt_results
            ]
            columns = ("finished_at", "outcome", "reference", "error")
            await self._connection.update(schema.payment_attempts, columns, ("order_id", "number"), rows)
        if self._changed:
            await self._write_refunds()

    async def _write_refunds(self) -> None:
        new, changed = [], []
        for known, refund in self._changed.items():
            if known in self._stored:
                row = (refund.status.value, refund.generation, refund.reference, refund.error, refund.settled_at)
                changed.append((*row, *known))
            else:
                new.append(refund_row(refund))
        if new:
            await self._connection.insert(schema.refunds, new)
        if changed:
            columns = ("status", "generation", "reference", "error", "settled_at")
            await self._connection.update(schema.refunds, columns, ("order_id", "number"), changed)
