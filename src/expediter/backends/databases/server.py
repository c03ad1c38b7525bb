"""What databases have in common that are servers: a pool that is opened once, a clock, and collisions."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar

from sqlalchemy.engine import URL

from expediter.backends.databases import WRITE_SECONDS_MAX, T, Transaction
from expediter.backends.databases.clock import ServerClock
from expediter.errors import ConstraintViolated, DatabaseUnavailable

#: How often a transaction may collide with others (a deadlock, the same id placed twice) before it is given up.
COLLISIONS_MAX = 10
#: Seconds that a transaction may take to be given up.
ROLL_BACK_SECONDS_MAX = 1.0
#: Seconds that the server lets a statement wait for what others have locked: rows, or whole tables (a backup).
LOCK_SECONDS_MAX = 4
#: The longest pause before the next try, in seconds.
PAUSE_SECONDS_MAX = 0.1


class ServerDatabase(ABC):
    """See Database. READ COMMITTED, with explicit locks and compare-and-set."""

    durability = "power-safe"
    #: Collision, and what else is raised where a transaction collided with another one.
    collisions: ClassVar[tuple[type[Exception], ...]]
    kind: ClassVar[str]

    def __init__(self, url: URL) -> None:
        """Remember the address; nothing is opened yet."""
        self._url = url
        self._pool: Any = None
        self._opening = asyncio.Lock()
        self._clock = ServerClock()

    def describe(self) -> str:
        """See Database."""
        host = self._url.host or "localhost"
        return f"{self.kind}, {host}{f':{self._url.port}' if self._url.port else ''}/{self._url.database or ''}"

    def position_reader(self) -> Callable[[], int] | None:
        """See Database: here it would be a round trip."""
        return None

    async def write(
        self,
        work: Transaction[T],
        *,
        begun: Callable[[], None] | None = None,
        seconds: float | None = WRITE_SECONDS_MAX,
    ) -> T:
        """See Database. What always collides is a row that can never be stored: ConstraintViolated."""
        collided = 0
        loop = asyncio.get_running_loop()
        ends = None if seconds is None else loop.time() + seconds
        while True:
            try:
                async with self._connection() as raw:
                    return await self._transaction(raw, work, begun, ends)
            except self.collisions as error:
                collided += 1
                if ends is not None and loop.time() > ends:
                    raise DatabaseUnavailable(f"Others hold what is to be changed: {error}") from error
                if collided >= COLLISIONS_MAX:
                    raise ConstraintViolated(str(error)) from error
            await asyncio.sleep(min(PAUSE_SECONDS_MAX, 0.002 * 2**collided) * random.random())

    @abstractmethod
    async def _transaction(
        self, raw: Any, work: Transaction[T], begun: Callable[[], None] | None, ends: float | None
    ) -> T:
        """Run `work` on a connection of the pool's until `ends` (of the loop's time), and commit."""

    @abstractmethod
    def _connection(self) -> AbstractAsyncContextManager[Any]:
        """Lend a connection of the pool's, and translate the driver's errors."""

    @abstractmethod
    async def _connect(self) -> Any:
        """Return a new pool."""

    async def _open(self) -> Any:
        if self._pool is None:
            async with self._opening:
                if self._pool is None:
                    self._pool = await self._connect()
        return self._pool
