"""Waiting for orders to change: one look at the feed of events serves everybody in the process who waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

from sqlalchemy import bindparam, select

from expediter.backends.databases import Connection, Database
from expediter.errors import DatabaseUnavailable, ExpediterError
from expediter.store import schema
from expediter.store.statements import POSITION
from expediter.store.submissions import Applied

#: Seconds between two looks: another process may have made the change.
LOOK_SECONDS = 0.25
#: Events that one look reads; where more have come meanwhile, everybody looks for their own order.
EVENTS_PER_LOOK = 5_000
#: Orders whose readers may wait at once; a reader of one more is answered at once.
WAITING_ORDERS_MAX = 10_000

_SINCE = (
    select(schema.events.c.order_id, schema.events.c.number)
    .where(schema.events.c.position > bindparam("after"), schema.events.c.position <= bindparam("until"))
    .order_by(schema.events.c.position)
    .limit(bindparam("limit"))
)


class Seen(NamedTuple):
    """What one look has found: how far the feed is settled, and the order and number of each new event.

    `events` None: these are not all that has changed.
    """

    position: int
    events: Sequence[tuple[str, int]] | None


async def look(connection: Connection, after: int | None) -> Seen:
    """Return the settled events that are newer than the position `after` (None: none of them)."""
    position = await connection.settled(POSITION)
    if after is None:
        return Seen(position, ())
    if position <= after:
        # It may be what it was lately. After a restored backup it is lower, and so is what was given out.
        gone = position < after and await connection.newest(POSITION) < after
        return Seen(position, None) if gone else Seen(after, ())
    rows = await connection.fetch(_SINCE, after=after, until=position, limit=EVENTS_PER_LOOK)
    # A position has no event where orders were cleared, a cache was reset, or a transaction was given up.
    return Seen(position, [(row[0], row[1]) for row in rows] if len(rows) == position - after else None)


class Watch:
    """Tells readers of changes: of this process at once, of other processes after the next look.

    It looks only while somebody waits. Use it from one event loop.
    """

    def __init__(self, database: Database, pending: Callable[[Sequence[str]], Awaitable[set[str]]]) -> None:
        """`pending` says which orders are accepted and not stored: these may come to an end without an event."""
        self._database = database
        self._pending = pending
        self._waiting: dict[str, set[asyncio.Future[int]]] = {}
        #: Orders of `_waiting` that were not in the database when their reader looked.
        self._unstored: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._begun: asyncio.Future[None] | None = None

    @property
    def full(self) -> bool:
        """Whether more orders are waited for than may be."""
        return len(self._waiting) > WAITING_ORDERS_MAX

    def expect(self, order_id: str) -> asyncio.Future[int]:
        """Return what will have the next version of an order, or 0 when its reader should look again."""
        changed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(order_id, set()).add(changed)
        return changed

    def forget(self, order_id: str, changed: asyncio.Future[int]) -> None:
        """Its reader does not wait any more."""
        waiters = self._waiting[order_id]
        waiters.discard(changed)
        if not waiters:
            del self._waiting[order_id]
            self._unstored.discard(order_id)

    def not_stored(self, order_id: str) -> None:
        """Say that an order for which a reader waits is accepted, and not in the database yet."""
        self._unstored.add(order_id)

    async def begin(self) -> None:
        """Look from now on: what changes after this is told. Raises Unavailable where the database cannot say."""
        if self._task is None or self._task.done() or self._begun is None:
            self._begun = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(self._begun), name="watch")
        await asyncio.shield(self._begun)

    def notice(self, changes: Sequence[Applied]) -> None:
        """Tell of changes that this process has committed."""
        if self._waiting:
            for change in changes:
                self._tell(change.order.order_id, change.order.version)

    def tell_all(self) -> None:
        """Let everybody look for themselves."""
        for order_id in self._waiting:
            self._tell(order_id, 0)

    def _tell(self, order_id: str, version: int) -> None:
        for changed in self._waiting.get(order_id, ()):
            if not changed.done():
                changed.set_result(version)

    async def _run(self, begun: asyncio.Future[None]) -> None:
        try:
            position = (await self._database.read(partial(look, after=None), settled=POSITION)).position
            begun.set_result(None)
        except ExpediterError as error:
            begun.set_exception(error)
            return
        finally:
            if not begun.done():  # a bug, and nobody may wait for it for ever
                begun.set_exception(DatabaseUnavailable("The database cannot be looked at now"))
            begun.exception()  # whoever asked may be gone, and then nobody looks at it
        try:
            while self._waiting:
                await asyncio.sleep(LOOK_SECONDS)
                if self._waiting:
                    position = await self._look(position)
        finally:
            self.tell_all()  # whoever still waits after a bug begins again

    async def _look(self, position: int) -> int:
        """Look once, and tell who waits; return the position that has been looked at."""
        try:
            seen = await self._database.read(partial(look, after=position), settled=POSITION)
        except ExpediterError:
            self.tell_all()  # each finds out what the matter is, and says so
            return position
        if seen.events is None:
            self.tell_all()
        else:
            for order_id, number in seen.events:
                self._tell(order_id, number)
        if self._unstored:
            asked = list(self._unstored)
            for order_id in set(asked) - await self._pending(asked):
                self._tell(order_id, 0)
        return seen.position
