"""The cache that every process shares, in Redis.

    orders:epoch                               everything cached under another epoch is void
    orders:detail:{order_id}                   {"version":3,"epoch":"...:0","order":{...}}; order null: out of date
    orders:list:version                        the token of the current lists; every commit sets another one
    orders:list:{version}:{limit}:{offset}     a page
    orders:cache:stats                         hits and misses of all processes (a hash)

Each after REDIS_PREFIX.

A change retires the entry before its commit, so a reader who loaded the older version cannot store it any more:
entries are replaced by newer ones only. Where that fails, the database says to all readers that the cache is not
to be believed, before the change is committed: each of them asks it for the cache's standing once a second. The
epoch names the run of the Redis server: one that comes back with an older snapshot of its memory serves nothing of
it; and entries and lists carry the number of the standing that they were cached under.
(docs/decisions/009-shared-cache.md)
"""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import structlog

from expediter.backends.batching import Gatherer
from expediter.backends.cache import Cache, Entry, LoadOrder, LoadPage, ReadStanding
from expediter.backends.cache.belief import Belief
from expediter.backends.cache.scripts import READ_PAGES, RETIRE_LISTS, RETIRE_ORDERS, STORE_ORDER, prefixed
from expediter.backends.redis_client import RedisUnavailable, Run, connect, deadline, place_of, unlink_all
from expediter.backends.tasks import Background, Pauses

#: Seconds that one call may take; after that the database answers.
CALL_SECONDS_MAX = 0.05
#: The same for what writers have to say: without it the cache has to be suspended for everybody.
RETIRE_SECONDS_MAX = 0.25
#: The same for opening the connections, which happens apart from the calls.
CONNECT_SECONDS_MAX = 2.0
#: Seconds that it may take to answer somebody who asks whether it is there.
LOOK_SECONDS_MAX = 1.0
#: Connections that are opened together, and the pauses between two tries, in seconds, from the first to the last.
CONNECTIONS = 4
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.25, 4.0
#: Seconds after which Redis counts as well, and the next pause is the short one again.
WELL_SECONDS = 30.0
#: Orders that one call looks up, at most.
LOOKUPS_PER_CALL = 100
#: Seconds between two additions to the shared statistics.
STATS_SECONDS = 1.0
#: Entries that are being stored at once, at most; what is beyond is stored by a later reader.
STORING_MAX = 256
#: Bytes of these entries, at most.
STORING_BYTES_MAX = 16 * 1024 * 1024
#: A page or order larger than this is not kept, in bytes.
VALUE_BYTES_MAX = 1024 * 1024

EPOCH = "orders:epoch"
LIST_VERSION = "orders:list:version"
STATS = "orders:cache:stats"
#: What comes before an order's id, and before the version of a page.
DETAIL, LIST = "orders:detail:", "orders:list:"

_VALUE = re.compile(rb'\{"version":(\d+),"epoch":"([^":]*):(\d+)","order":')

log = structlog.get_logger(__name__)


class RedisCache(Cache):
    """See Cache. Use it from one event loop; `expect_changes` may be awaited in the writer's thread."""

    def __init__(
        self, url: str, *, prefix: str = "", ttl_seconds: float, standing: ReadStanding, reading: bool = True
    ) -> None:
        """Keep entries for `ttl_seconds` in the Redis at `url`, under names that begin with `prefix`.

        Not `reading`: tell it of changes only. Raises ConfigurationError.
        """
        place = place_of(url, prefix)
        self.name = f"Redis at {place}" if reading else f"off; Redis at {place} hears of changes"
        self._epoch_key, self._version_key, self._stats_key = (
            prefix + name for name in (EPOCH, LIST_VERSION, STATS)
        )
        self._detail, self._list = prefix + DETAIL, prefix + LIST
        self._reading = reading
        self._ttl_seconds = ttl_seconds
        self._ttl_ms = str(max(1, int(ttl_seconds * 1000)))
        self._run = Run()
        self._client = connect(url, "REDIS_URL", connections=CONNECTIONS, run=self._run)
        self._belief = Belief(standing)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._lookups: Gatherer[str, tuple[bytes, bytes | None]] = Gatherer(
            self._look_up, items_max=LOOKUPS_PER_CALL, rounds_max=2
        )
        self._page_lookups: Gatherer[str, tuple[bytes, bytes | None]] = Gatherer(
            self._look_up_pages, items_max=LOOKUPS_PER_CALL, rounds_max=2
        )
        self._loading_pages: dict[tuple[bytes, str], asyncio.Task[tuple[bytes, bool]]] = {}
        self._retire_orders, self._store_order, self._retire_lists, self._read_pages = (
            self._client.register_script(prefixed(script, prefix))
            for script in (RETIRE_ORDERS, STORE_ORDER, RETIRE_LISTS, READ_PAGES)
        )
        self._background: set[asyncio.Task[Any]] = set()
        self._storing: set[asyncio.Task[bool]] = set()
        self._storing_bytes = 0
        self._hits = self._misses = 0
        self._told = (0, 0)
        self._telling = False
        self._usable = False
        self._well_since = 0.0
        self._pauses = Pauses(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)
        self._way_back = Background("the way back to Redis", self._return)
        #: The epoch in which the orders of the next commit were retired; empty: none were.
        self._retired_in = b""
        self._closing = False
        self._error: str | None = "Redis was not reached yet"

    @property
    def failing(self) -> str | None:
        """See Cache."""
        if not self._usable:
            return f"{self._error}; the database answers"
        if self._belief.suspended:
            return "a process that changes orders could not write to it a moment ago; the database answers"
        return None

    @property
    def cut_off(self) -> bool:
        """See Cache."""
        return not self._usable

    async def start(self) -> None:
        """Connect; if that fails it goes on in the background, and meanwhile the database answers."""
        try:
            await self._come_back()
        except RedisUnavailable as error:
            self._error = ""
            self._fail(error)

    async def expect_changes(self, changed: Sequence[tuple[str, int]]) -> bool:
        """See Cache."""
        self._retired_in = b""
        if not self._usable or not changed:
            return self._usable
        if threading.get_ident() == self._thread:
            return await self._expect(changed)
        # The writer's thread of SQLite, which must not suspend: it waits, and the loop does the work.
        waiting = asyncio.run_coroutine_threadsafe(self._expect(changed), self._loop)
        try:
            return waiting.result(CONNECT_SECONDS_MAX)
        except TimeoutError:
            return False

    async def _expect(self, changed: Sequence[tuple[str, int]]) -> bool:
        keys = [f"{self._detail}{order_id}" for order_id, _ in changed]
        versions = [str(version) for _, version in changed]

        async def retire() -> None:
            self._retired_in = await self._retire_orders(keys, [*self._epoch(), self._ttl_ms, *versions])

        return await self._try(retire, RETIRE_SECONDS_MAX)

    async def retire(self, orders: Sequence[tuple[str, int]]) -> bool:
        """See Cache. The orders themselves were retired before their commit."""
        epoch = b""

        async def retire() -> None:
            nonlocal epoch
            epoch = await self._retire_lists((), self._list_version())

        if not await self._try(retire, RETIRE_SECONDS_MAX):
            return False
        # Another one: Redis has forgotten what was retired, and may have been told the old version since.
        return self._retired_in in (b"", epoch)

    async def order(self, order_id: str, load: LoadOrder) -> Entry | None:
        """See Cache."""
        epoch = b""
        number = await self._belief.least_number() if self._reading and self._usable else None
        if number is not None:
            try:
                epoch, value = await self._lookups.ask(order_id)
            except RedisUnavailable as error:
                self._fail(error)
            else:
                entry = self._read(value, epoch, number)
                if entry is not None:
                    self._count(hit=True)
                    return entry
        self._count(hit=False)
        started = time.monotonic()
        entry = await load()
        # One that took longer than a retired entry is kept could be older than what has since been retired.
        if epoch and entry is not None and time.monotonic() - started < self._ttl_seconds / 2:
            self._keep(order_id, entry, epoch, number or 0)
        return entry

    async def _look_up(self, order_ids: Sequence[str]) -> list[tuple[bytes, bytes | None]]:
        """Return for each order the valid epoch (empty: there is none yet) and what is kept under its id."""
        async with deadline(CALL_SECONDS_MAX):
            found: list[Any] = await self._client.mget(
                [self._epoch_key, *(f"{self._detail}{each}" for each in order_ids)]
            )
            epoch, values = found[0], found[1:]
            if not epoch or not epoch.startswith(self._run.id.encode()):
                epoch = await self._retire_lists((), self._list_version())
                values = [None] * len(order_ids)
        return [(epoch, value) for value in values]

    def _read(self, value: bytes | None, epoch: bytes, number: int) -> Entry | None:
        head = _VALUE.match(value) if value else None
        if value is None or head is None or head[2] != epoch or int(head[3]) < number:
            return None
        if value[head.end() :] == b"null}":
            return None
        return Entry(int(head[1]), value[head.end() : -1])

    def _keep(self, order_id: str, entry: Entry, epoch: bytes, number: int) -> None:
        if entry.body is None or not self._has_room(len(entry.body)):
            return
        value = b'{"version":%d,"epoch":"%s:%d","order":%s}' % (entry.version, epoch, number, entry.body)
        arguments: list[str | bytes] = [
            *self._epoch(),
            self._ttl_ms,
            epoch,
            str(number),
            str(entry.version),
            value,
        ]
        self._store(lambda: self._store_order([f"{self._detail}{order_id}"], arguments), len(value))

    async def page(self, key: str, load: LoadPage) -> bytes:
        """See Cache."""
        version = b""
        if self._reading and self._usable and await self._belief.least_number() is not None:
            try:
                version, found = await self._page_lookups.ask(key)
            except RedisUnavailable as error:
                self._fail(error)
            else:
                if found is not None:
                    self._count(hit=True)
                    return found
        self._count(hit=False)
        if not version:
            return (await load())[0]
        # Who finds this version current may have what was loaded under it, whether it is kept yet or not.
        loading = self._loading_pages.get((version, key))
        if loading is None:
            loading = asyncio.ensure_future(self._load_page(version, key, load))
            self._loading_pages[version, key] = loading
            loading.add_done_callback(lambda _: self._loading_pages.pop((version, key), None))
        return (await asyncio.shield(loading))[0]

    async def _load_page(self, version: bytes, key: str, load: LoadPage) -> tuple[bytes, bool]:
        body, keep = await load()
        if keep and self._has_room(len(body)):
            name = f"{self._list}{version.decode()}:{key}"
            self._store(lambda: self._client.set(name, body, px=int(self._ttl_ms)), len(body))
        return body, keep

    async def _look_up_pages(self, keys: Sequence[str]) -> list[tuple[bytes, bytes | None]]:
        """Return for each page the current version of the lists, and what is kept under it."""
        different = list(dict.fromkeys(keys))
        async with deadline(CALL_SECONDS_MAX):
            version, *bodies = await self._read_pages((), [*self._list_version(), *different])
        found = dict(zip(different, bodies, strict=True))
        return [(version, found[key]) for key in keys]

    async def reset(self) -> None:
        """See Cache: another epoch at once, then the keys are removed, some at a time."""
        async with deadline(CONNECT_SECONDS_MAX):
            await self._new_epoch()
        await unlink_all(self._client, f"{self._detail}*", f"{self._list}*:*")

    @property
    def counts(self) -> dict[str, int]:
        """See Cache."""
        return {"hits": self._hits, "misses": self._misses}

    async def look(self) -> None:
        """See Cache."""
        await self._try(self._client.ping, LOOK_SECONDS_MAX)

    async def settle(self) -> None:
        """Wait until what readers have loaded is kept."""
        while self._storing:
            await asyncio.wait(set(self._storing))

    async def close(self) -> None:
        """See Cache."""
        await self._lookups.finish()
        await self._page_lookups.finish()
        await self._belief.close()
        await self._tell()
        self._closing = True
        await self._way_back.stop()
        await self.settle()
        while self._background:
            await asyncio.wait(set(self._background))
        await self._client.aclose()

    def _epoch(self) -> tuple[str, str]:
        """Return this server's run and an epoch to begin if the present one is not of it."""
        return self._run.id, f"{self._run.id}-{secrets.token_hex(6)}"

    def _list_version(self) -> tuple[str, str, str, str]:
        """Return the same, and the end of a new list version."""
        return *self._epoch(), secrets.token_hex(8), str(self._belief.number)

    async def _new_epoch(self) -> None:
        _, epoch = self._epoch()
        async with self._client.pipeline(transaction=True) as together:
            together.set(self._epoch_key, epoch)
            together.set(self._version_key, f"{epoch}.{self._belief.number}.{secrets.token_hex(8)}")
            await together.execute()

    async def _try(self, call: Callable[[], Awaitable[Any]], seconds: float = CALL_SECONDS_MAX) -> bool:
        """Return whether the call worked; after one that did not Redis is left alone until it can be written."""
        if not self._usable:
            return False
        try:
            async with deadline(seconds):
                await call()
        except RedisUnavailable as error:
            self._fail(error)
            return False
        return True

    def _fail(self, error: RedisUnavailable) -> None:
        if self._usable or not self._error:
            log.warning("the cache cannot be used; the database answers", cache=self.name, error=str(error))
        self._error = str(error)
        if not self._way_back.running and not self._closing:
            self._usable = False
            self._way_back.start()

    async def _return(self) -> None:
        # One that works for a moment only, such as a server that is full now and then, is not tried all the time.
        if time.monotonic() - self._well_since > WELL_SECONDS:
            self._pauses.reset()
        while not self._way_back.stopping:
            await self._way_back.rest(self._pauses.next())
            try:
                await self._come_back()
                log.info("the cache works again", cache=self.name)
                return
            except RedisUnavailable as error:
                self._error = str(error)

    async def _come_back(self) -> None:
        """Open the connections, and see whether it can be written. Raises RedisUnavailable."""
        async with deadline(CONNECT_SECONDS_MAX):
            await asyncio.gather(*(self._client.ping() for _ in range(CONNECTIONS)))
            await self._retire_lists((), self._list_version())
        self._well_since = time.monotonic()
        self._error = None
        self._usable = True

    def _count(self, *, hit: bool) -> None:
        if hit:
            self._hits += 1
        else:
            self._misses += 1
        if not self._telling and not self._closing:
            self._telling = True
            self._loop.call_later(STATS_SECONDS, lambda: self._later(self._tell()))

    async def _tell(self) -> None:
        """Add this process's hits and misses to those of all."""
        self._telling = False
        hits, misses = self._hits - self._told[0], self._misses - self._told[1]

        async def add() -> None:
            async with self._client.pipeline(transaction=True) as together:
                together.hincrby(self._stats_key, "hits", hits)
                together.hincrby(self._stats_key, "misses", misses)
                await together.execute()
            self._told = (self._told[0] + hits, self._told[1] + misses)

        if hits or misses:
            await self._try(add)

    def _has_room(self, size: int) -> bool:
        fits = self._storing_bytes + size <= STORING_BYTES_MAX and len(self._storing) < STORING_MAX
        return fits and size <= VALUE_BYTES_MAX

    def _store(self, call: Callable[[], Awaitable[Any]], size: int) -> None:
        def stored(task: asyncio.Task[bool]) -> None:
            self._storing.discard(task)
            self._storing_bytes -= size

        task = asyncio.create_task(self._try(call))
        self._storing.add(task)
        self._storing_bytes += size
        task.add_done_callback(stored)

    def _later(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
