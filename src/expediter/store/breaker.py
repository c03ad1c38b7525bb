"""The circuit breaker as a row that all processes share: read once a transaction, changed by compare-and-set."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from sqlalchemy import bindparam, select, update

from expediter.backends.databases import Connection
from expediter.orders.resilience import PAYMENT_BREAKER, Breaker
from expediter.store import schema
from expediter.store.rows import read_breaker
from expediter.store.submissions import ReportBreaker

_LOAD = select(schema.circuit_breakers).where(schema.circuit_breakers.c.name == bindparam("breaker"))
_SAVE = (
    update(schema.circuit_breakers)
    .where(
        schema.circuit_breakers.c.name == bindparam("breaker"),
        schema.circuit_breakers.c.version == bindparam("known"),
    )
    .values(
        failures=bindparam("new_failures"),
        open_until=bindparam("new_open_until"),
        probe_holder=bindparam("new_probe_holder"),
        probe_until=bindparam("new_probe_until"),
        version=schema.circuit_breakers.c.version + 1,
    )
)


class SharedBreaker:
    """The payment gateway's breaker, as one transaction sees and changes it."""

    def __init__(self, connection: Connection) -> None:
        """Nothing is read before it is needed."""
        self._connection = connection
        self._known: tuple[Breaker, int] | None = None

    async def read(self) -> Breaker:
        """Return the breaker."""
        return (await self._load())[0]

    async def report(self, asked: ReportBreaker, now: int) -> Breaker:
        """Take note of how a call went; return the breaker after it."""

        def change(breaker: Breaker) -> Breaker:
            if asked.succeeded:
                return breaker.after_success()
            return breaker.after_failure(
                now,
                threshold=asked.threshold,
                recovery=asked.recovery,
                probe=asked.probe,
                times=asked.failures,
            )

        return await self._change(change) or Breaker()

    async def take_probe(self, holder: str, now: int) -> bool:
        """Return whether `holder` may send the one call that the open breaker lets through."""

        def change(breaker: Breaker) -> Breaker | None:
            return breaker.probing(holder, now) if breaker.may_probe(now) else None

        return await self._change(change) is not None

    async def _load(self) -> tuple[Breaker, int]:
        if self._known is None:
            row = (await self._connection.fetch(_LOAD, breaker=PAYMENT_BREAKER))[0]
            self._known = (read_breaker(row), row[5])
        return self._known

    async def _change(self, change: Callable[[Breaker], Breaker | None]) -> Breaker | None:
        """Change the breaker as it is now, whoever else changes it; None where `change` says so of what it is."""
        while True:
            known, version = await self._load()
            wanted = change(known)
            if wanted is None or wanted == known:
                return wanted
            values = {f"new_{name}": value for name, value in msgspec.structs.asdict(wanted).items()}
            if await self._connection.run(_SAVE, breaker=PAYMENT_BREAKER, known=version, **values):
                self._known = (wanted, version + 1)
                return wanted
            self._known = None  # another process was first: look again
