"""What readers are shown of an order that was accepted into the broker and may not be in the database yet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from expediter.backends.brokers import Broker, Topic
from expediter.backends.cache import Entry
from expediter.backends.redis_client import RedisUnavailable
from expediter.backends.tasks import within
from expediter.errors import BrokerUnavailable, CommandRefused, Unavailable
from expediter.queued.temporary import Found, TemporaryOrders

#: Seconds that the database may take to show what it has; beyond that what was accepted is shown.
STORED_SECONDS = 3.0
#: Seconds after which an order is looked for again that Redis may have forgotten: a worker may be storing it.
LOOK_AGAIN_SECONDS = 0.15
#: Seconds that a reader of what only the database has may be kept waiting until the order is there.
STORED_SECONDS_MAX = 5.0
STORED_AGAIN_SECONDS = 0.05

#: Reads an order that is stored; None: there is none.
Stored = Callable[[], Awaitable[Entry | None]]


class AcceptedOrders:
    """Reads through what is not stored yet. An order that was accepted is never said not to exist."""

    def __init__(
        self,
        temporary: TemporaryOrders,
        broker: Broker,
        deleted: Callable[[str], Awaitable[bool]],
        *,
        taking: bool,
    ) -> None:
        """`temporary` has what is not stored; where it has forgotten, `broker` says whether anything waits.

        `deleted` tells whether the database had an order once. Not `taking`: orders are stored before they are
        answered, and at most some accepted earlier still wait.
        """
        self._temporary = temporary
        self._broker = broker
        self._deleted = deleted
        self._taking = taking

    async def pending(self, order_ids: Sequence[str]) -> set[str]:
        """Return which of these are known to be accepted and not known to be stored."""
        found = await asyncio.gather(*map(self._find, order_ids))
        return {each for each, known in zip(order_ids, found, strict=True) if known.pending is not None}

    async def _find(self, order_id: str) -> Found:
        """Return what Redis knows of an order; where it cannot be asked, it is as if it had lost everything."""
        try:
            return await self._temporary.find(order_id)
        except RedisUnavailable:
            return Found(certain=False, lost=True)

    async def order(self, order_id: str, stored: Stored) -> Entry | None:
        """Return an order as it is `stored`, or else as it was accepted; None: there is none.

        Raises CommandRefused for one that could not be stored, Unavailable when it cannot be said now.
        """
        if not self._taking and (entry := await stored()) is not None:
            return entry
        found = await self._find(order_id)
        if (document := found.pending) is not None:
            entry, deleted = await within(self._look(order_id, stored), STORED_SECONDS) or (None, False)
            if entry is None and not deleted:
                entry = Entry(1, document)
        elif (entry := await stored()) is None:
            if found.temporary is not None and found.temporary.error:
                raise CommandRefused(found.temporary.error)
            if self._taking and not found.certain:
                entry = await self._look_again(found, stored)
        return Entry(entry.version, entry.body, len(found.changes)) if entry and found.changes else entry

    async def _look(self, order_id: str, stored: Stored) -> tuple[Entry | None, bool]:
        entry = await stored()
        return entry, entry is None and await self._deleted(order_id)

    async def _look_again(self, found: Found, stored: Stored) -> Entry | None:
        """Look for an order that Redis may have forgotten: in the broker, or in the hands of a worker."""
        try:
            waiting = (await self._broker.depth(Topic.COMMANDS)).waiting
        except BrokerUnavailable as error:
            raise Unavailable(f"It cannot be said now whether there is such an order: {error}") from error
        await asyncio.sleep(LOOK_AGAIN_SECONDS)
        entry = await stored()
        if entry is None and (waiting or found.lost):
            raise Unavailable("It cannot be said yet whether there is such an order: accepted ones may still wait")
        return entry

    async def until_stored(self, order_id: str) -> None:
        """Return when an accepted order is stored, or if it is not an accepted one.

        Raises Unavailable after STORED_SECONDS_MAX.
        """
        deadline = asyncio.get_running_loop().time() + STORED_SECONDS_MAX
        while self._taking and await self.pending([order_id]):
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable("The order was accepted and is not stored yet; try again")
            await asyncio.sleep(STORED_AGAIN_SECONDS)
