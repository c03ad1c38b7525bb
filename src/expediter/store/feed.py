"""The feed: every change of every order, in the order of commits, read on from a cursor.

A reader sees each event once, whoever writes: it reads as far as positions are settled, which is as far as no
transaction is under way that may bring an event yet (docs/decisions/028-nobody-waits-for-the-feed.md).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from sqlalchemy import bindparam, select, update

from expediter.backends.databases import Connection, Database
from expediter.errors import ExpediterError
from expediter.store import schema
from expediter.store.incarnation import read_incarnation
from expediter.store.statements import POSITION
from expediter.store.watching import LOOK_SECONDS

#: Positions that one read goes over, at most: with a filter it may find little in them.
POSITIONS_PER_READ = 20_000
#: Bytes of the data of one page, at most; the next one goes on from there.
PAGE_BYTES_MAX = 4 * 1024 * 1024
#: The least pause between two looks at the position, in seconds: commits may come one after the other.
LOOK_SECONDS_MIN = 0.02

#: Microseconds by which an event may be older than one before it.
_SPREAD = 10_000_000

_ARCHIVED_UNTIL = select(schema.feed.c.archived)
_PART = (
    select(schema.events)
    .where(
        schema.events.c.position > bindparam("after"),
        schema.events.c.position <= bindparam("until"),
    )
    .order_by(schema.events.c.position)
    .limit(bindparam("limit"))
)
_PART_OF_TYPES = _PART.where(schema.events.c.type.in_(bindparam("ids", expanding=True)))
_BEHIND = (
    select(schema.events.c.position, schema.events.c.at)
    .where(schema.events.c.position > bindparam("after"))
    .order_by(schema.events.c.position)
    .limit(1)
)
_ARCHIVED = (
    update(schema.feed).values(archived=bindparam("until")).where(schema.feed.c.archived < bindparam("until"))
)


class Cursor(NamedTuple):
    """Where a reader is: behind the event at `position`, in this `incarnation` of the database."""

    incarnation: int
    position: int

    def __str__(self) -> str:
        return base64.urlsafe_b64encode(f"{self.incarnation}.{self.position}".encode()).decode().rstrip("=")

    @classmethod
    def read(cls, text: str) -> Cursor | None:
        """Return the cursor that was handed out as this text; None: none was."""
        try:
            plain = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii")
            incarnation, _, position = plain.partition(".")
            if not (incarnation.isdigit() and position.isdigit() and len(plain) < 40):
                return None
            return cls(int(incarnation), int(position))
        except (binascii.Error, ValueError):
            return None


class CursorGone(ExpediterError):
    """What comes after this cursor cannot be read any more; `begin` is where reading is possible."""

    def __init__(self, message: str, begin: Cursor) -> None:
        super().__init__(message)
        self.begin = begin


class FeedEvent(NamedTuple):
    """One event as it is stored; `data` is JSON text."""

    position: int
    order_id: str
    number: int
    at: int
    type: str
    data: str


class FeedPage(NamedTuple):
    """Events, the cursor behind them, and whether others are there already."""

    events: list[FeedEvent]
    cursor: Cursor
    more: bool


async def read_feed(
    connection: Connection, *, after: Cursor | None, types: Sequence[str] | None, limit: int
) -> FeedPage:
    """Return up to `limit` events behind the cursor `after` (None: from the first), of these types (None: all).

    With types it may be fewer, and none, although more follow. Raises CursorGone.
    """
    incarnation = await read_incarnation(connection)
    archived = (await connection.fetch(_ARCHIVED_UNTIL))[0][0]
    settled = await connection.settled(POSITION)
    begin = Cursor(incarnation, archived)
    position = 0 if after is None else after.position
    if after is not None and (
        after.incarnation != incarnation or (position > settled and position > await connection.newest(POSITION))
    ):
        raise CursorGone("Orders were cleared or the database was restored since: begin anew", begin)
    if position < archived:
        raise CursorGone("Some of what comes after this cursor was moved to the archive", begin)
    events, reached = await _read(connection, position, settled, types, limit)
    return FeedPage(events, Cursor(incarnation, reached), reached < settled)


class FeedPart(NamedTuple):
    """Events up to the position `reached`, whether there are more, and up to which one the archive may have some.

    `gone`: the position that was asked for is none of this database's, which is older than that.
    """

    events: list[FeedEvent]
    reached: int
    more: bool
    archived: int
    gone: bool


async def read_part(connection: Connection, *, position: int, types: Sequence[str] | None, limit: int) -> FeedPart:
    """Return up to `limit` events behind `position` that are there, of these types (None: all)."""
    archived = (await connection.fetch(_ARCHIVED_UNTIL))[0][0]
    settled = await connection.settled(POSITION)
    gone = position > settled and position > await connection.newest(POSITION)
    events, reached = await _read(connection, position, settled, types, limit)
    return FeedPart(events, reached, reached < settled, archived, gone)


async def _read(
    connection: Connection, position: int, settled: int, types: Sequence[str] | None, limit: int
) -> tuple[list[FeedEvent], int]:
    """Return events behind `position`, and how far they go."""
    until = min(settled, position + POSITIONS_PER_READ)
    if until <= position:
        return [], position
    if types is None:
        rows = await connection.fetch(_PART, after=position, until=until, limit=limit)
    else:
        rows = await connection.fetch(_PART_OF_TYPES, after=position, until=until, limit=limit, ids=list(types))
    events: list[FeedEvent] = []
    size = 0
    for row in rows:
        event = FeedEvent(*row)
        size += len(event.data)
        if events and size > PAGE_BYTES_MAX:
            break
        events.append(event)
    cut = len(events) < len(rows) or len(rows) == limit
    return events, events[-1].position if cut and events else until


async def end_of_feed(connection: Connection) -> Cursor:
    """Return the cursor behind everything that is there."""
    incarnation = await read_incarnation(connection)
    return Cursor(incarnation, await connection.settled(POSITION))


async def _reached(connection: Connection) -> tuple[int, int]:
    return await connection.settled(POSITION), await connection.newest(POSITION)


async def position_at(connection: Connection, at: int) -> int:
    """Return a position before every event that happened `at` (microseconds) or later.

    Times follow positions but for the time that a transaction takes: whoever reads on from there may see some that
    are a little older.
    """
    low, high = 0, await connection.settled(POSITION)
    at -= _SPREAD
    while low < high:
        middle = (low + high) // 2
        rows = await connection.fetch(_BEHIND, after=middle)
        if not rows or rows[0][1] >= at:
            high = middle
        else:
            low = rows[0][0]
    return int(min(low, high))


async def note_archived(connection: Connection, until: int) -> None:
    """Say that events up to this position are leaving."""
    await connection.run(_ARCHIVED, until=until)


class Feed:
    """Reads the feed, and tells readers when there is more. Use it from one event loop."""

    def __init__(self, database: Database) -> None:
        """Nothing is read until somebody asks."""
        self._database = database
        #: How many wait.
        self.waiting = 0
        self._stopping = False
        self._wake = asyncio.Event()
        self._moved: asyncio.Future[None] | None = None
        #: How far positions are known to be settled, and given out; neither is known before the first look.
        self._settled = self._newest = -1
        #: Whether the last look failed.
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    async def read(self, after: Cursor | None, types: Sequence[str] | None, limit: int) -> FeedPage:
        """See read_feed. Raises CursorGone, Unavailable."""
        reading = partial(read_feed, after=after, types=types, limit=limit)
        page = await self._database.read(reading, settled=POSITION)
        self.note(page.cursor.position)
        return page

    async def end(self) -> Cursor:
        """Return the cursor behind everything that is there. Raises Unavailable."""
        return await self._database.read(end_of_feed, settled=POSITION)

    def note(self, position: int) -> None:
        """Take note that a reader has come so far: who goes on from there waits for more than that."""
        self._settled = max(self._settled, position)
        self._newest = max(self._newest, position)

    async def wait(self, cursor: Cursor, seconds: float, left: asyncio.Future[None] | None = None) -> None:
        """Return when there may be something behind `cursor`, at the stop of the process, or after `seconds`.

        `left` is done once the reader has left; nobody waits for it then.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        self.waiting += 1
        try:
            while not self._stopping:
                if self._task is None or self._task.done():
                    self._settled = self._newest = -1
                    self._failing = False
                    self._task = asyncio.create_task(self._look_on(), name="feed")
                if self._moved is None or self._moved.done():
                    self._moved = asyncio.get_running_loop().create_future()
                if self._failing or self._settled > cursor.position:
                    return
                if -1 < self._newest < cursor.position:
                    return  # an older database came back, and the reader must hear of it
                rest = deadline - asyncio.get_running_loop().time()
                if rest <= 0 or (left is not None and left.done()):
                    return
                awaited = [self._moved, self._task] if left is None else [self._moved, self._task, left]
                await asyncio.wait(awaited, timeout=rest, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.waiting -= 1

    def look_now(self) -> None:
        """Look without waiting: this process has committed something."""
        self._wake.set()

    def stop(self) -> None:
        """Let everybody go who waits: the process is about to stop."""
        self._stopping = True
        self._tell()

    def _tell(self) -> None:
        if self._moved is not None and not self._moved.done():
            self._moved.set_result(None)

    async def _look_on(self) -> None:
        """Look at the position again and again while somebody waits."""
        while self.waiting and not self._stopping:
            self._wake.clear()
            try:
                settled, newest = await self._database.read(_reached, settled=POSITION)
            except ExpediterError:
                self._failing = True  # whoever waits reads, and says what the matter is
                self._tell()
            else:
                self._failing = False
                if newest < self._newest:
                    self._settled = -1
                if settled > self._settled or newest < self._newest:
                    self._settled = max(settled, self._settled)
                    self._newest = newest
                    self._tell()
            await asyncio.sleep(LOOK_SECONDS_MIN)
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
