"""The cache contract: never an older version, one load for many readers, and nothing that outlives its time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from expediter.backends.cache import Cache, Entry, NoCache, Standing, open_cache
from expediter.backends.cache.memory import ENTRIES_MAX, MemoryCache
from expediter.backends.cache.redis import RedisCache
from servers import RedisServer

Load = Callable[[], Awaitable[Entry | None]]


class Store:
    """Stands for the database: what a load finds, and how often it was asked."""

    def __init__(self) -> None:
        self.version = 1
        self.position = 0
        self.loads = 0
        self.whole = True
        self.gate = asyncio.Event()
        self.gate.set()

    async def load(self) -> Entry | None:
        self.loads += 1
        entry = Entry(self.version, b'"version %d"' % self.version)
        await self.gate.wait()
        return entry

    async def load_page(self) -> tuple[bytes, bool]:
        self.loads += 1
        return b"page %d" % self.version, self.whole


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture(params=["memory", "redis"])
async def cache(request: pytest.FixtureRequest, store: Store) -> AsyncIterator[Cache]:
    """Each kind of cache in turn."""
    url = ""
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        url = server.new_database()
    opened = await open_cache(
        url=url, disabled=False, ttl_seconds=30, position_now=lambda: store.position, standing=undisturbed
    )
    yield opened
    await opened.close()


async def undisturbed() -> Standing:
    return Standing(0, suspended=False)


async def expect(cache: Cache, before: int, after: int, changed: list[tuple[str, int]]) -> None:
    """Announce a commit as the committer does."""
    await cache.expect_changes(changed)
    cache.expect_commit(before, after)


async def settle(cache: Cache) -> None:
    """Wait until what a miss has loaded is kept: Redis is told after the reader has been answered."""
    if isinstance(cache, RedisCache):
        await cache.settle()


def memory(store: Store, ttl_seconds: float = 30) -> MemoryCache:
    return MemoryCache(ttl_seconds=ttl_seconds, position_now=lambda: store.position)


async def test_a_second_read_does_not_reach_the_store(cache: Cache, store: Store) -> None:
    """What was read once is answered from memory, and both are counted."""
    first = await cache.order("A1", store.load)
    await settle(cache)
    assert await cache.order("A1", store.load) == first
    assert store.loads == 1
    assert cache.counts == {"hits": 1, "misses": 1}


async def test_a_change_retires_the_entry(cache: Cache, store: Store) -> None:
    """After a commit of this process the next read sees the new version."""
    await cache.order("A1", store.load)
    store.version, store.position = 2, 1
    await expect(cache, 0, 1, [("A1", 2)])
    await cache.retire([("A1", 2)])
    found = await cache.order("A1", store.load)
    assert found is not None and found.version == 2


async def test_a_load_that_began_before_a_change_is_not_kept(cache: Cache, store: Store) -> None:
    """A reader that was under way during a commit cannot put the older version back."""
    store.gate.clear()
    slow = asyncio.create_task(cache.order("A1", store.load))
    while not store.loads:
        await asyncio.sleep(0)
    store.version, store.position = 2, 1
    await expect(cache, 0, 1, [("A1", 2)])
    await cache.retire([("A1", 2)])
    during = asyncio.create_task(cache.order("A1", store.load))
    while store.loads < 2:
        await asyncio.sleep(0)
    store.gate.set()
    await slow
    await during
    await settle(cache)
    for found in (await during, await cache.order("A1", store.load)):
        assert found is not None and found.version == 2


async def test_another_process_s_change_empties_the_cache(store: Store) -> None:
    """When somebody else has written, nothing that was cached before is answered again."""
    cache = memory(store)
    await cache.order("A1", store.load)
    await cache.page("50:0", store.load_page)
    store.version, store.position = 2, 9
    found = await cache.order("A1", store.load)
    assert found is not None and found.version == 2
    assert await cache.page("50:0", store.load_page) == b"page 2"


async def test_another_process_s_change_between_two_of_ours_is_noticed(store: Store) -> None:
    """A foreign commit is noticed even if this process commits again before anyone reads."""
    cache = memory(store)
    await cache.order("A1", store.load)
    await expect(cache, 0, 1, [("A1", 2)])
    store.version = 2
    await expect(cache, 5, 6, [("A1", 2)])
    store.position = 6
    found = await cache.order("A1", store.load)
    assert found is not None and found.version == 2


async def test_a_failed_commit_is_not_trusted(store: Store) -> None:
    """After a commit that failed the cache does not mistake a foreign position for its own."""
    cache = memory(store)
    await cache.order("A1", store.load)
    await expect(cache, 0, 3, [("A1", 2)])
    cache.forget_commit(final=True)
    store.version, store.position = 2, 3
    found = await cache.order("A1", store.load)
    assert found is not None and found.version == 2


async def test_a_position_that_a_failed_commit_expected_hides_nobody(store: Store) -> None:
    """Others who reach the positions that a failed commit of ours had expected are noticed at each of them."""
    cache = memory(store)
    await cache.order("A1", store.load)
    await expect(cache, 0, 5, [("A1", 2)])
    cache.forget_commit(final=True)
    await cache.order("A1", store.load)
    for position in (1, 2, 3):
        store.version, store.position = position + 1, position
        found = await cache.order("A1", store.load)
        assert found is not None and found.version == position + 1


async def test_a_reader_after_another_process_s_change_joins_no_older_load(store: Store) -> None:
    """Who asks after a foreign commit is not given what a load found that began before it."""
    cache = memory(store)
    await cache.order("other", store.load)
    store.gate.clear()
    before = asyncio.create_task(cache.order("A1", store.load))
    while store.loads < 2:
        await asyncio.sleep(0)
    store.version, store.position = 2, 9
    after = asyncio.create_task(cache.order("A1", store.load))
    while store.loads < 3:
        await asyncio.sleep(0)
    store.gate.set()
    await before
    for found in (await after, await cache.order("A1", store.load)):
        assert found is not None and found.version == 2


async def test_readers_that_miss_together_load_once(store: Store) -> None:
    """A hundred readers of one missing order cost one read of the store."""
    cache = memory(store)
    await asyncio.gather(*(cache.order("A1", store.load) for _ in range(100)))
    assert store.loads == 1


async def test_a_reader_that_goes_away_does_not_take_the_others_with_it(store: Store) -> None:
    """The reader who started a load may be cancelled; those who joined it still get their answer."""
    cache = memory(store)
    store.gate.clear()
    first = asyncio.create_task(cache.order("A1", store.load))
    second = asyncio.create_task(cache.order("A1", store.load))
    while not store.loads:
        await asyncio.sleep(0)
    first.cancel()
    store.gate.set()
    assert await second == Entry(1, b'"version 1"')


async def test_an_entry_ends_with_its_time(store: Store) -> None:
    """An entry older than the TTL is loaded again."""
    cache = memory(store, ttl_seconds=0)
    await cache.order("A1", store.load)
    await cache.order("A1", store.load)
    assert store.loads == 2


async def test_a_missing_order_is_not_remembered(cache: Cache, store: Store) -> None:
    """That there is no such order is asked of the store every time."""
    loads = 0

    async def nothing() -> Entry | None:
        nonlocal loads
        loads += 1
        return None

    assert await cache.order("A1", nothing) is None
    assert await cache.order("A1", nothing) is None
    assert loads == 2


async def test_every_write_retires_the_lists(cache: Cache, store: Store) -> None:
    """A page is answered from memory until any order changes."""
    await cache.page("50:0", store.load_page)
    await settle(cache)
    assert await cache.page("50:0", store.load_page) == b"page 1"
    store.version, store.position = 2, 1
    await expect(cache, 0, 1, [("A1", 2)])
    await cache.retire([("another", 1)])
    assert await cache.page("50:0", store.load_page) == b"page 2"
    assert store.loads == 2


async def test_between_a_commit_and_its_telling_nobody_is_shown_what_was_before(store: Store) -> None:
    """What others can read already is not hidden by what is kept; until then it is answered from memory."""
    cache = memory(store)
    await cache.order("A1", store.load)
    await cache.order("A2", store.load)
    await cache.page("50:0", store.load_page)
    await expect(cache, 0, 1, [("A1", 2)])
    assert cache.known("A1") is not None
    assert await cache.page("50:0", store.load_page) == b"page 1"
    assert store.loads == 3
    store.version, store.position = 2, 1
    assert cache.known("A1") is None
    found = await cache.order("A1", store.load)
    assert found is not None and found.version == 2
    assert await cache.page("50:0", store.load_page) == b"page 2"
    assert cache.known("A2") is not None
    await cache.retire([("A1", 2)])
    assert (await cache.order("A1", store.load)) is not None
    assert cache.known("A1") is not None


async def test_memory_is_bounded(store: Store) -> None:
    """Beyond its limit the cache drops the entry that was used least recently."""
    cache = memory(store)
    for number in range(ENTRIES_MAX + 1):
        await cache.order(f"A{number}", store.load)
    loads = store.loads
    await cache.order(f"A{ENTRIES_MAX}", store.load)
    assert store.loads == loads
    await cache.order("A0", store.load)
    assert store.loads == loads + 1


async def test_without_a_cache_every_read_reaches_the_store(store: Store) -> None:
    """With the cache switched off each read is a load."""
    cache = NoCache()
    await cache.order("A1", store.load)
    await cache.order("A1", store.load)
    await cache.page("50:0", store.load_page)
    assert store.loads == 3
    assert cache.counts == {"hits": 0, "misses": 3}


async def test_a_page_that_was_cut_short_is_not_kept(cache: Cache, store: Store) -> None:
    """A page that its reader may not keep is loaded again for the next one."""
    store.whole = False
    await cache.page("50:0", store.load_page)
    await settle(cache)
    await cache.page("50:0", store.load_page)
    assert store.loads == 2


async def test_a_reset_forgets_everything(cache: Cache, store: Store) -> None:
    """After a reset, which also moves the position, orders and pages are loaded again."""
    await cache.order("A1", store.load)
    await cache.page("50:0", store.load_page)
    await settle(cache)
    store.position = 1
    await cache.reset()
    await cache.order("A1", store.load)
    await cache.page("50:0", store.load_page)
    assert store.loads == 4


async def test_a_failed_commit_leaves_the_order_readable(cache: Cache, store: Store) -> None:
    """An order that was retired for a commit that failed is loaded again, and kept again once it has changed."""
    await cache.order("A1", store.load)
    await settle(cache)
    await expect(cache, 0, 1, [("A1", 2)])
    cache.forget_commit(final=True)
    assert (found := await cache.order("A1", store.load)) is not None and found.version == 1
    await expect(cache, 0, 1, [("A1", 2)])
    store.version, store.position = 2, 1
    await cache.retire([("A1", 2)])
    await cache.order("A1", store.load)
    await settle(cache)
    loads = store.loads
    assert (found := await cache.order("A1", store.load)) is not None and found.version == 2
    assert store.loads == loads
