"""Cached reads: documents of orders by version, and pages under a list version that every write retires."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A cached document of one order. `body` None says: known to be out of date.

    `pending_changes` were accepted and are not applied yet; what is cached has none.
    """

    version: int
    body: bytes | None
    pending_changes: int = 0


class Standing(msgspec.Struct, frozen=True, gc=False):
    """Whether what is cached may be believed: nothing while `suspended`, and nothing of an older `number` ever."""

    number: int
    suspended: bool


#: Asks the database for the standing of the shared cache. Raises Unavailable.
ReadStanding = Callable[[], Awaitable[Standing]]
#: Reads an order from the store; None: there is no such order.
LoadOrder = Callable[[], Awaitable[Entry | None]]
#: Reads a page from the store, and says whether it may be kept.
LoadPage = Callable[[], Awaitable[tuple[bytes, bool]]]


class Cache(Protocol):
    """Where read documents are kept. Losing everything in it costs time and nothing else.

    What a cache does not say differently needs nothing to be done.
    """

    #: What it is, for people.
    name: str

    @property
    def failing(self) -> str | None:
        """Why it cannot be used now, and what that means for readers; None while it works."""

    @property
    def cut_off(self) -> bool:
        """Whether this process cannot tell readers of its changes now."""
        return False

    async def expect_changes(self, changed: Sequence[tuple[str, int]]) -> bool:
        """Say that a commit of this process is about to give these orders these versions.

        False: readers could not be told, and it must not commit while any of them believes the cache. On SQLite it
        is awaited in the writer's thread.
        """
        return True

    def expect_commit(self, before: int, after: int) -> None:
        """Say that this commit is about to move the newest event from `before` to `after`."""
        return None

    def forget_commit(self, *, final: bool) -> None:
        """Say that the expected commit failed, or that nobody knows; not `final`: it is being looked up."""
        return None

    async def retire(self, orders: Sequence[tuple[str, int]]) -> bool:
        """Say that these orders now have these versions: older entries and all lists are out of date.

        False: readers could not be told.
        """
        return True

    def known(self, order_id: str) -> Entry | None:
        """Return the entry of an order if it is in this process and may be shown; None: ask for the `order`."""
        return None

    async def order(self, order_id: str, load: LoadOrder) -> Entry | None:
        """Return the entry of an order, from `load` if need be."""

    async def page(self, key: str, load: LoadPage) -> bytes:
        """Return a page of the list, from `load` if need be; `key` is its limit and offset, as in `50:0`."""

    async def reset(self) -> None:
        """Forget everything, in every process. Raises Unavailable."""
        return None

    @property
    def counts(self) -> dict[str, int]:
        """How often the cache answered (`hits`) and did not (`misses`), in this process."""

    async def look(self) -> None:
        """See whether it can be reached, where it is elsewhere: `failing` says it then. Within a second or two."""
        return None

    async def close(self) -> None:
        """Close every connection."""
        return None


class NoCache(Cache):
    """Every read goes to the store."""

    name = "off"
    failing = None

    def __init__(self) -> None:
        """Nothing is kept."""
        self._loads = 0

    async def order(self, order_id: str, load: LoadOrder) -> Entry | None:
        """Return what `load` finds."""
        self._loads += 1
        return await load()

    async def page(self, key: str, load: LoadPage) -> bytes:
        """Return what `load` finds."""
        self._loads += 1
        return (await load())[0]

    @property
    def counts(self) -> dict[str, int]:
        """Every read is a miss."""
        return {"hits": 0, "misses": self._loads}


async def open_cache(
    *,
    url: str,
    prefix: str = "",
    disabled: bool,
    ttl_seconds: float,
    position_now: Callable[[], int] | None,
    standing: ReadStanding,
) -> Cache:
    """Return the cache that the settings ask for: Redis at `url`, reachable or not, or in memory.

    The names of all keys in Redis begin with `prefix`. In memory only where it can tell that others have written;
    the one in Redis asks the database for its `standing`. Raises ConfigurationError for a wrong `url`.
    """
    if url:
        from expediter.backends.cache.redis import RedisCache

        # Also while it is disabled here: other processes must hear of what this one changes.
        shared = RedisCache(url, prefix=prefix, ttl_seconds=ttl_seconds, standing=standing, reading=not disabled)
        await shared.start()
        return shared
    if disabled or position_now is None:
        return NoCache()
    from expediter.backends.cache.memory import MemoryCache

    return MemoryCache(ttl_seconds=ttl_seconds, position_now=position_now)
