"""What readers are shown of an order that was accepted into the broker and may not be in the database yet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from expediter.backends.brokers import Broker, Topic
from expediter.backends.cache import Entry
from expediter.backends.redis_client import RedisUnavailable
from expediter.backends.tasks import within
from expediter.errors import BrokerUnavailable, CommandRefused, OrderNotFound, Unavailable
from expediter.queued.temporary import LOSS_SECONDS, Found, TemporaryOrders

#: Seconds that the database may take to show something newer; beyond that what was accepted is shown.
NEWER_SECONDS_MAX = 0.5
#: Seconds for which an order is looked for that Redis may have forgotten, and between two looks.
LOOK_SECONDS_MAX = 2.0
LOOK_AGAIN_SECONDS = 0.15
#: Looks without a trace of the order, while nothing waits in the broker, after which there is none.
LOOKS_WITHOUT_TRACE = 2
#: Seconds that a reader of what only the database has may be kept waiting until the order is there.
STORED_SECONDS_MAX = 5.0
STORED_AGAIN_SECONDS = 0.05


class AcceptedOrders:
    """Reads through what is not stored yet. An order that was accepted is never said not to exist."""

    def __init__(self, temporary: TemporaryOrders, broker: Broker, *, taking: bool) -> None:
        """`temporary` has what is not stored; where it has forgotten, `broker` says whether anything waits.

        Not `taking`: orders are stored before they are answered, and at most some accepted earlier still wait.
        """
        self._temporary = temporary
        self._broker = broker
        self._taking = taking
        self._away_since: float | None = None

    async def find(self, order_id: str) -> Found | None:
        """Return what Redis knows of an order; None: it cannot be asked now."""
        now = asyncio.get_running_loop().time()
        try:
            found = await self._temporary.find(order_id)
        except RedisUnavailable:
            self._away_since = self._away_since or now
            return None
        self._away_since = None
        return found

    async def pending(self, order_ids: Sequence[str]) -> set[str]:
        """Return which of these are known to be accepted and not known to be stored."""
        found = await asyncio.gather(*map(self.find, order_ids))
        return {
            order_id
            for order_id, known in zip(order_ids, found, strict=True)
            if known is not None and known.temporary is not None and known.temporary.state == "pending"
        }

    async def order(self, order_id: str, stored: Callable[[], Awaitable[Entry | None]]) -> Entry | None:
        """Return an order as it is `stored`, or as it was accepted if that is newer; None: there is none.

        Raises OrderNotFound for one whose deletion was accepted, CommandRefused for one that could not be stored,
        Unavailable when it cannot be said now.
        """
        if not self._taking and (entry := await stored()) is not None:
            return entry
        found = await self.find(order_id)
        temporary = found.temporary if found else None
        if temporary is None or temporary.state == "stored":
            entry = await stored()
            if not self._taking or (temporary is not None and temporary.deleted):
                return entry
            if entry is None and (found is None or not found.certain):
                return await self._look_again(order_id, stored)
            return entry
        entry = await within(stored(), NEWER_SECONDS_MAX)
        newer = entry is not None and (entry.version > temporary.version or temporary.document is None)
        if newer and not temporary.deleted:
            return entry
        if temporary.state == "refused":
            raise CommandRefused(temporary.error or "it was refused")
        if temporary.deleted:
            raise OrderNotFound(order_id)
        if temporary.document is None:
            raise Unavailable("A change of this order was accepted, and the database that has the order is away")
        return Entry(temporary.version, temporary.document)

    async def _look_again(self, order_id: str, stored: Callable[[], Awaitable[Entry | None]]) -> Entry | None:
        """Look for an order that Redis may have forgotten and that may still wait in the broker."""
        deadline = asyncio.get_running_loop().time() + LOOK_SECONDS_MAX
        without_trace = 0
        while asyncio.get_running_loop().time() < deadline:
            try:
                waiting = (await self._broker.depth(Topic.COMMANDS)).waiting
            except BrokerUnavailable as error:
                raise Unavailable(f"It cannot be said now whether there is such an order: {error}") from error
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            found = await self.find(order_id)
            temporary = found.temporary if found else None
            if temporary is not None and temporary.state == "pending" and temporary.document is not None:
                return Entry(temporary.version, temporary.document)
            entry = await stored()
            if entry is not None:
                return entry
            without_trace = 0 if waiting else without_trace + 1
            if without_trace >= LOOKS_WITHOUT_TRACE:
                if not self._forgotten_lately(found):
                    return None
                break
        raise Unavailable("It cannot be said yet whether there is such an order: accepted ones still wait")

    def _forgotten_lately(self, found: Found | None) -> bool:
        """Return whether the process that accepted an order may be about to put it back."""
        if found is not None:
            return found.lost
        away = asyncio.get_running_loop().time() - (self._away_since or 0.0)
        return self._away_since is not None and away < LOSS_SECONDS

    async def until_stored(self, order_id: str) -> None:
        """Return when an accepted order is stored, or if it is not an accepted one.

        Raises Unavailable after STORED_SECONDS_MAX, and OrderNotFound for one whose deletion was accepted.
        """
        deadline = asyncio.get_running_loop().time() + STORED_SECONDS_MAX
        while self._taking:
            found = await self.find(order_id)
            if found is None or found.temporary is None or found.temporary.state != "pending":
                return
            if found.temporary.deleted:
                raise OrderNotFound(order_id)
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable("The order was accepted and is not stored yet; try again")
            await asyncio.sleep(STORED_AGAIN_SECONDS)
