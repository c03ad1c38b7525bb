"""Whether one process may believe the shared cache now."""

from __future__ import annotations

import asyncio
import time

from expediter.backends.cache import ReadStanding, Standing
from expediter.errors import Unavailable

#: Seconds for which the standing is believed that the database was asked for, and after which it is asked again.
BELIEVED_SECONDS = 1.0
ASK_AGAIN_SECONDS = 0.4
#: For how many seconds it is told that the cache was suspended when the database was last asked.
TOLD_SECONDS = 5.0


class Belief:
    """Asks the database for the standing of the cache, as long as somebody reads. Use it from one event loop."""

    def __init__(self, read_standing: ReadStanding) -> None:
        """Nothing is believed until `read_standing` has answered."""
        self._read_standing = read_standing
        self._standing = Standing(0, suspended=False)
        self._asked_at = -BELIEVED_SECONDS
        self._asking: asyncio.Task[None] | None = None

    @property
    def number(self) -> int:
        """The number of the standing, as far as this process knows."""
        return self._standing.number

    @property
    def suspended(self) -> bool:
        """Whether the cache was suspended when somebody read a moment ago."""
        return self._standing.suspended and time.monotonic() - self._asked_at < TOLD_SECONDS

    async def least_number(self) -> int | None:
        """Return from which number on an entry may be believed; None: nothing may be now.

        What the database said counts for BELIEVED_SECONDS from when it was asked: so long a writer waits before it
        commits what it cannot retire.
        """
        age = time.monotonic() - self._asked_at
        if age >= ASK_AGAIN_SECONDS:
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask())
            if age >= BELIEVED_SECONDS:
                await asyncio.wait([self._asking])
                age = time.monotonic() - self._asked_at
        return None if self._standing.suspended or age >= BELIEVED_SECONDS else self._standing.number

    async def close(self) -> None:
        """Wait for the answer of the database, if it was asked."""
        if self._asking is not None:
            await asyncio.wait([self._asking])

    async def _ask(self) -> None:
        began = time.monotonic()
        try:
            self._standing = await self._read_standing()
            self._asked_at = began
        except Unavailable:
            pass  # nothing is believed then, and whoever reads hears from the database itself
        finally:
            self._asking = None
