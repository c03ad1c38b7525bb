"""The cache that every process shares, in Redis.

    orders:epoch                               everything cached under another epoch is void
    orders:detail:{order_id}                   {"version":3,"epoch":"...","order":{...}}; order null: out of date
    orders:list:version                        the token of the current lists; every commit sets another one
    orders:list:{version}:{limit}:{offset}     a page
    orders:cache:stats                         hits and misses of all processes (a hash)

A change retires the entry before its commit, so a reader who loaded the older version cannot store it any more:
entries are replaced by newer ones only. Where that fails, the epoch is changed as soon as Redis can be reached; in
between other processes may read an entry until its time is over, and `failing` says so. The epoch names the run of
the Redis server: one that comes back with an older snapshot of its memory serves nothing of it.
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
from expediter.backends.cache import Cache, Entry, LoadOrder, LoadPage
from expediter.backends.redis_client import RedisUnavailable, Run, connect, deadline, place_of, unlink_all
from expediter.backends.tasks import Background

#: Seconds that one call may take; after that the database answers.
CALL_SECONDS_MAX = 0.05
#: The same for opening the connections, which happens apart from the calls.
CONNECT_SECONDS_MAX = 2.0
#: Connections that are opened together, and the pause between two tries, in seconds.
CONNECTIONS = 4
PAUSE_SECONDS = 0.25
#: Orders that one call looks up, at most.
LOOKUPS_PER_CALL = 100
#: Seconds between two additions to the shared statistics.
STATS_SECONDS = 1.0
#: Entries that are being stored at once, at most; what is beyond is stored by a later reader.
STORING_MAX = 256
#: A page or order larger than this is not kept, in bytes.
VALUE_BYTES_MAX = 1024 * 1024

EPOCH = "orders:epoch"
LIST_VERSION = "orders:list:version"
STATS = "orders:cache:stats"

# Each script begins by making sure of the epoch: ARGV[1] is this server's run, ARGV[2] an epoch to set if there is
# none or if it comes from an earlier run.
_EPOCH_FIRST = """
local epoch = redis.call('GET', 'orders:epoch')
if not epoch or string.sub(epoch, 1, #ARGV[1]) ~= ARGV[1] then
  epoch = ARGV[2]
  redis.call('SET', 'orders:epoch', epoch)
end
"""
# KEYS: details. ARGV[3]: milliseconds to keep; ARGV[3 + n]: the version that KEYS[n] is about to have.
_RETIRE_ORDERS = (
    _EPOCH_FIRST
    + """
for index, key in ipairs(KEYS) do
  local version = ARGV[3 + index]
  local held_version, held_epoch = string.match(
    redis.call('GETRANGE', key, 0, 127), '^{"version":(%d+),"epoch":"([^"]*)"')
  if held_epoch ~= epoch or tonumber(held_version) < tonumber(version) then
    redis.call('SET', key, '{"version":' .. version .. ',"epoch":"' .. epoch .. '","order":null}', 'PX', ARGV[3])
  end
end
return epoch
"""
)
# KEYS[1]: a detail. ARGV[3]: milliseconds; ARGV[4]: the epoch it was read in; ARGV[5]: version; ARGV[6]: value.
_STORE_ORDER = (
    _EPOCH_FIRST
    + """
if epoch ~= ARGV[4] then return 0 end
local version, held_epoch, order = string.match(
  redis.call('GETRANGE', KEYS[1], 0, 127), '^{"version":(%d+),"epoch":"([^"]*)","order":(.)')
if held_epoch == epoch then
  local newer = tonumber(ARGV[5]) - tonumber(version)
  if newer < 0 or (newer == 0 and order ~= 'n') then return 0 end
end
redis.call('SET', KEYS[1], ARGV[6], 'PX', ARGV[3])
return 1
"""
)
# ARGV[3]: the random end of a new list version.
_RETIRE_LISTS = (
    _EPOCH_FIRST
    + """
redis.call('SET', 'orders:list:version', epoch .. '.' .. ARGV[3])
return epoch
"""
)
# ARGV[3]: the random end of a new list version, should there be none; from ARGV[4] on: limit and offset of pages.
_READ_PAGES = (
    _EPOCH_FIRST
    + """
local version = redis.call('GET', 'orders:list:version')
if not version or string.sub(version, 1, #epoch) ~= epoch then
  version = epoch .. '.' .. ARGV[3]
  redis.call('SET', 'orders:list:version', version)
end
local found = {version}
for index = 4, #ARGV do
  found[index - 2] = redis.call('GET', 'orders:list:' .. version .. ':' .. ARGV[index])
end
return found
"""
)

_VALUE = re.compile(rb'\{"version":(\d+),"epoch":"([^"]*)","order":')

log = structlog.get_logger(__name__)


class RedisCache(Cache):
    """See Cache. Use it from one event loop; `expect_changes` may be awaited in the writer's thread."""

    def __init__(self, url: str, *, ttl_seconds: float, reading: bool = True) -> None:
        """Keep entries for `ttl_seconds` in the Redis at `url`; not `reading`: tell it of changes only.

        Raises ConfigurationError.
        """
        self.name = f"Redis at {place_of(url)}" if reading else f"off; Redis at {place_of(url)} hears of changes"
        self._reading = reading
        self._ttl_seconds = ttl_seconds
        self._ttl_ms = str(max(1, int(ttl_seconds * 1000)))
        self._run = Run()
        self._client = connect(url, "REDIS_URL", connections=CONNECTIONS, run=self._run)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._lookups: Gatherer[str, tuple[bytes, bytes | None]] = Gatherer(
            self._look_up, items_max=LOOKUPS_PER_CALL, rounds_max=2
        )
        self._page_lookups: Gatherer[str, tuple[bytes, bytes | None]] = Gatherer(
            self._look_up_pages, items_max=LOOKUPS_PER_CALL, rounds_max=2
        )
        self._loading_pages: dict[tuple[bytes, str], asyncio.Task[tuple[bytes, bool]]] = {}
        self._retire_orders = self._client.register_script(_RETIRE_ORDERS)
        self._store_order = self._client.register_script(_STORE_ORDER)
        self._retire_lists = self._client.register_script(_RETIRE_LISTS)
        self._read_pages = self._client.register_script(_READ_PAGES)
        self._background: set[asyncio.Task[Any]] = set()
        self._storing: set[asyncio.Task[bool]] = set()
        self._hits = self._misses = 0
        self._told = (0, 0)
        self._telling = False
        self._usable = False
        self._way_back = Background("the way back to Redis", self._return)
        self._unretired = False
        self._owed = 0
        self._paid = 0
        self._closing = False
        self._error: str | None = "Redis was not reached yet"

    @property
    def failing(self) -> str | None:
        """See Cache."""
        if self._usable:
            return None
        if self._owed > self._paid:
            return (
                f"{self._error}; the database answers this process, but others that still reach the cache may "
                f"read what is up to {self._ttl_seconds:g} s old"
            )
        return f"{self._error}; the database answers"

    async def start(self) -> None:
        """Connect; if that fails it goes on in the background, and meanwhile the database answers."""
        try:
            await self._come_back()
        except RedisUnavailable as error:
            self._error = ""
            self._fail(error)

    async def expect_changes(self, changed: Sequence[tuple[str, int]]) -> None:
        """See Cache."""
        if not changed:
            return
        if threading.get_ident() == self._thread:
            await self._expect(changed)
            return
        # The writer's thread of SQLite, which must not suspend: it waits, and the loop does the work.
        waiting = asyncio.run_coroutine_threadsafe(self._expect(changed), self._loop)
        try:
            waiting.result(CONNECT_SECONDS_MAX)
        except TimeoutError:
            self._unretired = True

    async def _expect(self, changed: Sequence[tuple[str, int]]) -> None:
        keys = [f"orders:detail:{order_id}" for order_id, _ in changed]
        versions = [str(version) for _, version in changed]
        if not await self._try(lambda: self._retire_orders(keys, [*self._epoch(), self._ttl_ms, *versions])):
            self._unretired = True

    def forget_commit(self, *, final: bool) -> None:
        """See Cache. What was retired for nothing is read anew."""
        if final and self._unretired:
            self._owe()

    async def retire(self, orders: Sequence[tuple[str, int]]) -> None:
        """See Cache. The orders themselves were retired before their commit."""
        listed = await self._try(lambda: self._retire_lists((), [*self._epoch(), secrets.token_hex(8)]))
        if self._unretired or not listed:
            self._owe()

    async def order(self, order_id: str, load: LoadOrder) -> Entry | None:
        """See Cache."""
        epoch = b""
        if self._reading and self._usable:
            try:
                epoch, value = await self._lookups.ask(order_id)
            except RedisUnavailable as error:
                self._fail(error)
            else:
                entry = self._read(value, epoch)
                if entry is not None:
                    self._count(hit=True)
                    return entry
        self._count(hit=False)
        started = time.monotonic()
        entry = await load()
        # One that took longer than a retired entry is kept could be older than what has since been retired.
        if epoch and entry is not None and time.monotonic() - started < self._ttl_seconds / 2:
            self._keep(order_id, entry, epoch)
        return entry

    async def _look_up(self, order_ids: Sequence[str]) -> list[tuple[bytes, bytes | None]]:
        """Return for each order the valid epoch (empty: there is none yet) and what is kept under its id."""
        async with deadline(CALL_SECONDS_MAX):
            found: list[Any] = await self._client.mget([EPOCH, *(f"orders:detail:{each}" for each in order_ids)])
            epoch, values = found[0], found[1:]
            if not epoch or not epoch.startswith(self._run.id.encode()):
                epoch = await self._retire_lists((), [*self._epoch(), secrets.token_hex(8)])
                values = [None] * len(order_ids)
        return [(epoch, value) for value in values]

    def _read(self, value: bytes | None, epoch: bytes) -> Entry | None:
        head = _VALUE.match(value) if value else None
        if value is None or head is None or head[2] != epoch or value[head.end() :] == b"null}":
            return None
        return Entry(int(head[1]), value[head.end() : -1])

    def _keep(self, order_id: str, entry: Entry, epoch: bytes) -> None:
        if entry.body is None or len(entry.body) > VALUE_BYTES_MAX or len(self._storing) >= STORING_MAX:
            return
        value = b'{"version":%d,"epoch":"%s","order":%s}' % (entry.version, epoch, entry.body)
        arguments: list[str | bytes] = [*self._epoch(), self._ttl_ms, epoch, str(entry.version), value]
        self._store(lambda: self._store_order([f"orders:detail:{order_id}"], arguments))

    async def page(self, key: str, load: LoadPage) -> bytes:
        """See Cache."""
        version = b""
        if self._reading and self._usable:
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
        if keep and len(body) <= VALUE_BYTES_MAX and len(self._storing) < STORING_MAX:
            name = f"orders:list:{version.decode()}:{key}"
            self._store(lambda: self._client.set(name, body, px=int(self._ttl_ms)))
        return body, keep

    async def _look_up_pages(self, keys: Sequence[str]) -> list[tuple[bytes, bytes | None]]:
        """Return for each page the current version of the lists, and what is kept under it."""
        different = list(dict.fromkeys(keys))
        async with deadline(CALL_SECONDS_MAX):
            version, *bodies = await self._read_pages((), [*self._epoch(), secrets.token_hex(8), *different])
        found = dict(zip(different, bodies, strict=True))
        return [(version, found[key]) for key in keys]

    async def reset(self) -> None:
        """See Cache: another epoch at once, then the keys are removed, some at a time."""
        async with deadline(CONNECT_SECONDS_MAX):
            await self._new_epoch()
        await unlink_all(self._client, "orders:detail:*", "orders:list:*:*")

    @property
    def counts(self) -> dict[str, int]:
        """See Cache."""
        return {"hits": self._hits, "misses": self._misses}

    async def settle(self) -> None:
        """Wait until what readers have loaded is kept."""
        while self._storing:
            await asyncio.wait(set(self._storing))

    async def close(self) -> None:
        """See Cache."""
        await self._lookups.finish()
        await self._page_lookups.finish()
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

    async def _new_epoch(self) -> None:
        _, epoch = self._epoch()
        async with self._client.pipeline(transaction=True) as together:
            together.set(EPOCH, epoch)
            together.set(LIST_VERSION, f"{epoch}.{secrets.token_hex(8)}")
            await together.execute()

    async def _try(self, call: Callable[[], Awaitable[Any]]) -> bool:
        """Return whether the call worked; after one that did not Redis is left alone until it answers again."""
        if not self._usable:
            return False
        try:
            async with deadline(CALL_SECONDS_MAX):
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

    def _owe(self) -> None:
        """A change could not be retired: everything cached must be void before this process uses it again."""
        self._unretired = False
        self._owed += 1
        self._fail(RedisUnavailable(self._error or "Redis did not answer in time"))

    async def _return(self) -> None:
        while not self._way_back.stopping:
            try:
                await self._come_back()
                log.info("the cache works again", cache=self.name)
                return
            except RedisUnavailable as error:
                self._error = str(error)
                await self._way_back.rest(PAUSE_SECONDS)

    async def _come_back(self) -> None:
        """Open the connections and void what may be out of date. Raises RedisUnavailable."""
        async with deadline(CONNECT_SECONDS_MAX):
            await asyncio.gather(*(self._client.ping() for _ in range(CONNECTIONS)))
        # Whoever is between its failed call and its commit adds to what is owed: then once more.
        while self._owed > self._paid or self._unretired:
            owed = self._owed
            async with deadline(CONNECT_SECONDS_MAX):
                await self._new_epoch()
            self._paid = owed
            if self._unretired:
                await asyncio.sleep(PAUSE_SECONDS)
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
                together.hincrby(STATS, "hits", hits)
                together.hincrby(STATS, "misses", misses)
                await together.execute()
            self._told = (self._told[0] + hits, self._told[1] + misses)

        if hits or misses:
            await self._try(add)

    def _store(self, call: Callable[[], Awaitable[Any]]) -> None:
        task = asyncio.create_task(self._try(call))
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)

    def _later(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
