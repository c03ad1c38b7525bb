"""The cache inside the process, for a database that can say at once whether somebody has written."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from expediter.backends.cache import Cache, Entry, LoadOrder, LoadPage

#: Documents kept in memory, at most; the least recently used one leaves first.
ENTRIES_MAX = 10_000
#: Bytes kept in memory, at most.
BYTES_MAX = 64 * 1024 * 1024


class MemoryCache(Cache):
    """A cache inside the process.

    It stays right beside other processes on the same database: before each use it compares the position of the
    newest event with the newest commit of its own; if somebody else has written, everything in it is dropped
    (docs/decisions/005-memory-cache.md). The same position tells when a commit of its own can be seen, which is a
    moment before this process has heard of it: what that commit changes is read from the store until then.
    """

    name = "memory"
    failing = None

    def __init__(self, *, ttl_seconds: float, position_now: Callable[[], int]) -> None:
        """Keep entries for `ttl_seconds`; `position_now` tells the newest committed position in the database."""
        self._ttl = ttl_seconds
        self._position_now = position_now
        self._position = 0
        self._trusted = False
        self._epoch = 0
        self._entries: OrderedDict[str, tuple[float, Entry]] = OrderedDict()
        self._pages: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._list_version = 0
        self._bytes = 0
        self._loading: dict[str, asyncio.Future[Entry | None]] = {}
        self._loading_pages: dict[str, asyncio.Future[tuple[bytes, bool]]] = {}
        #: What the commit under way changes, and the position from which on others can see it; 0: there is none.
        self._changing: frozenset[str] = frozenset()
        self._visible_from = 0
        #: At the last look: it can be seen, and `retire` has not been called for it.
        self._ahead = False
        self._hits = 0
        self._misses = 0

    async def expect_changes(self, changed: Sequence[tuple[str, int]]) -> bool:
        """See Cache."""
        self._changing = frozenset(order_id for order_id, _ in changed)
        return True

    def expect_commit(self, before: int, after: int) -> None:
        """See Cache. Called in the writer's thread, before the commit makes the position visible."""
        if before > self._position:
            self._trusted = False  # somebody else has written since the last look
        self._position = after
        self._visible_from = after if after > before else 0

    def forget_commit(self, *, final: bool) -> None:
        """See Cache. The expected position was never reached, or nobody knows: others may reach it now."""
        self._position = 0
        self._trusted = False
        if final:
            self._visible_from = 0

    async def retire(self, orders: Sequence[tuple[str, int]]) -> bool:
        """See Cache."""
        self._retire_lists()
        for order_id, version in orders:
            if order_id in self._loading:
                # The version stays behind without its document: the load that runs may bring an older one.
                self._store(order_id, Entry(version, None))
            else:
                self._drop(order_id)
        self._visible_from = 0
        return True

    def known(self, order_id: str) -> Entry | None:
        """See Cache."""
        self._notice_others()
        known = self._entries.get(order_id)
        if known is None or known[1].body is None or known[0] <= time.monotonic():
            return None
        if self._ahead and order_id in self._changing:
            return None
        self._hits += 1
        self._entries.move_to_end(order_id)
        return known[1]

    async def order(self, order_id: str, load: LoadOrder) -> Entry | None:
        """See Cache."""
        if (entry := self.known(order_id)) is not None:
            return entry
        known = self._entries.get(order_id)
        self._misses += 1
        if (known is not None and known[1].body is None) or (self._ahead and order_id in self._changing):
            # A load that began before the newest version was committed may still run: it is not for this reader.
            return await load()
        loading = self._loading.get(order_id)
        if loading is None:
            loading = asyncio.ensure_future(self._load(order_id, load))
            self._loading[order_id] = loading
        return await asyncio.shield(loading)

    async def _load(self, order_id: str, load: LoadOrder) -> Entry | None:
        epoch = self._epoch
        try:
            entry = await load()
        finally:
            # At once, before anyone else runs: whoever comes from now on must not join a load that is over.
            if self._loading.get(order_id) is asyncio.current_task():
                del self._loading[order_id]
        retired = order_id in self._entries and self._entries[order_id][1].body is None
        if entry is not None and epoch == self._epoch and not retired:
            self._store(order_id, entry)
        elif retired:
            self._drop(order_id)
        return entry

    async def page(self, key: str, load: LoadPage) -> bytes:
        """See Cache."""
        self._notice_others()
        if self._ahead:
            self._misses += 1
            return (await load())[0]
        key = f"{self._list_version}:{key}"
        known = self._pages.get(key)
        if known is not None and known[0] > time.monotonic():
            self._hits += 1
            self._pages.move_to_end(key)
            return known[1]
        self._misses += 1
        loading = self._loading_pages.get(key)
        if loading is None:
            loading = asyncio.ensure_future(load())
            self._loading_pages[key] = loading
            loading.add_done_callback(lambda _: self._loading_pages.pop(key, None))
        body, keep = await asyncio.shield(loading)
        if keep and key.startswith(f"{self._list_version}:") and key not in self._pages:
            self._pages[key] = (time.monotonic() + self._ttl, body)
            self._bytes += len(body)
            self._evict()
        return body

    async def reset(self) -> None:
        """See Cache. The position that the database moves on says the same to every process."""
        self._trusted = False

    @property
    def counts(self) -> dict[str, int]:
        """See Cache."""
        return {"hits": self._hits, "misses": self._misses}

    def _store(self, order_id: str, entry: Entry) -> None:
        self._drop(order_id)
        self._entries[order_id] = (time.monotonic() + self._ttl, entry)
        self._bytes += len(entry.body or b"")
        self._evict()

    def _drop(self, order_id: str) -> None:
        known = self._entries.pop(order_id, None)
        if known is not None:
            self._bytes -= len(known[1].body or b"")

    def _retire_lists(self) -> None:
        self._list_version += 1
        self._bytes -= sum(len(body) for _, body in self._pages.values())
        self._pages.clear()

    def _evict(self) -> None:
        while self._bytes > BYTES_MAX or len(self._entries) + len(self._pages) > ENTRIES_MAX:
            if self._pages:
                self._bytes -= len(self._pages.popitem(last=False)[1][1])
            else:
                self._drop(next(iter(self._entries)))

    def _notice_others(self) -> None:
        position = self._position_now()
        self._ahead = 0 < self._visible_from <= position
        if position > self._position or not self._trusted:
            self._trusted = True
            self._position = max(position, self._position)
            self._epoch += 1
            self._list_version += 1
            self._entries.clear()
            self._pages.clear()
            self._loading.clear()
            self._bytes = 0
