"""Counting how often somebody comes, in one process or across several."""

from __future__ import annotations

import time
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import structlog

from expediter.backends.redis_client import RedisUnavailable, Run, connect, deadline, forget_idle, place_of

# The library is imported where it is used: a service without a rate limit starts in less time and memory.
if TYPE_CHECKING:
    from limits.aio.storage import RedisStorage

#: Whom a process counts at once; beyond them it forgets whoever has been away longest.
COUNTED_MAX = 50_000
#: Seconds that a call to Redis may take; then this process counts alone.
CALL_SECONDS_MAX = 0.05
#: Seconds for which Redis is left alone after a call that failed.
PAUSE_SECONDS = 1.0
#: Connections to Redis that count.
CONNECTIONS_MAX = 8

log = structlog.get_logger(__name__)


class Window(NamedTuple):
    """A span of time in which is counted: its number, and how many seconds are left of it, rounded up."""

    number: int
    seconds_left: int


def window_of(name: str, seconds: int, now: float) -> Window:
    """Return the window that counts now; `now` is the time of day, so that all processes agree.

    Each name has windows that begin at a moment of its own: otherwise all who wait would come back together.
    """
    number, passed = divmod(now + zlib.crc32(name.encode()) % seconds, seconds)
    return Window(int(number), max(1, int(seconds - passed + 0.999)))


class Tally:
    """Counts in this process. It is bounded, however many names there are."""

    def __init__(self, counted_max: int = COUNTED_MAX) -> None:
        """Nobody has come."""
        self._counted_max = counted_max
        #: The window and the count of each name, who came last at the end.
        self._counts: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def add(self, name: str, window: int) -> int:
        """Count once more; return how often this name has come in this window."""
        counts = self._counts
        known, count = counts.get(name, (window, 0))
        count = count + 1 if known == window else 1
        counts[name] = (window, count)
        counts.move_to_end(name)
        if len(counts) > self._counted_max:
            counts.popitem(last=False)
        return count

    def count(self, name: str, window: int) -> int:
        """Return how often this name has come in this window."""
        known, count = self._counts.get(name, (window, 0))
        return count if known == window else 0

    def __len__(self) -> int:
        return len(self._counts)


class SharedTally:
    """Counts in a Redis that several processes share."""

    def __init__(self, url: str, *, prefix: str = "") -> None:
        """Connect to the Redis at `url`; the names of all keys begin with `prefix`. Raises ConfigurationError."""
        from limits.aio.storage import RedisStorage

        self._client = connect(url, "REDIS_URL", connections=CONNECTIONS_MAX, run=Run())
        self._storage: RedisStorage = RedisStorage(
            "redis://",  # where it connects to is up to the pool
            implementation="redispy",
            key_prefix=f"{prefix}rate",
            connection_pool=self._client.connection_pool,  # type: ignore[arg-type]
        )
        self._place = place_of(url, prefix)
        self._away = False
        self._again_at = 0.0

    async def add(self, name: str, window: int, seconds: int) -> int | None:
        """Count once more; return how often this name has come in this window. None: Redis cannot say it now."""
        now = time.monotonic()
        if now < self._again_at:
            return None
        try:
            async with deadline(CALL_SECONDS_MAX):
                count = await self._storage.incr(f"{name}:{window}", seconds)
        except RedisUnavailable as error:
            self._again_at = time.monotonic() + PAUSE_SECONDS
            if not self._away:
                log.warning("rates are counted in each process alone", redis=self._place, error=str(error))
            self._away = True
            await forget_idle(self._client)
            return None
        if self._away:
            log.warning("rates are counted across processes again", redis=self._place)
            self._away = False
        return count

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()


def open_tally(url: str, *, prefix: str = "") -> SharedTally | None:
    """Return what counts across processes in the Redis at `url`; None without one. Raises ConfigurationError."""
    return SharedTally(url, prefix=prefix) if url else None
