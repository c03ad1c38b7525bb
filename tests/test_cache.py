"""The cache contract: never an older version, one load for many readers, and nothing that outlives its time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from expediter.cache import ENTRIES_MAX, Entry, MemoryCache, NoCache

Load = Callable[[], Awaitable[Entry | None]]


class Store:
    """Stands for the database: what a load finds, and how often it was asked."""

    def __init__(self) -> None:
        self.version = 1
        self.position = 0
        self.loads = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def load(self) -> Entry | None:
        self.loads += 1
        entry = Entry(self.version, b"version %d" % self.version)
        await self.gate.wait()
        return entry

    async def load_page(self) -> bytes:
        self.loads += 1
        return b"page %d" % self.version


@pytest.fixture
def store() -> Store:
    return Store()


def memory(store: Store, ttl_seconds: float = 30) -> MemoryCache:
    return MemoryCache(ttl_seconds=ttl_seconds, position_now=lambda: store.position)


async def test_a_second_read_does_not_reach_the_store(store: Store) -> None:
    """What was read once is answered from memory, and both are counted."""
    cache = memory(store)
    first = await cache.order("A1", store.load)
    assert await cache.order("A1", store.load) == first
    assert store.loads == 1
    assert cache.counts() == {"hits": 1, "misses": 1}


async def test_a_change_retires_the_entry(store: Store) -> None:
    """After a commit of this process the next read sees the new version."""
    cache = memory(store)
    await cache.order("A1", store.load)
    store.version, store.position = 2, 1
    cache.expect_commit(0, 1)
    cache.retire([("A1", 2)])
    found = await cache.order("A1", store.load)
    assert found is not None and found.version == 2


async def test_a_load_that_began_before_a_change_is_not_kept(store: Store) -> None:
    """A reader that was under way during a commit cannot put the older version back."""
    cache = memory(store)
    store.gate.clear()
    slow = asyncio.create_task(cache.order("A1", store.load))
    while not store.loads:
        await asyncio.sleep(0)
    store.version, store.position = 2, 1
    cache.expect_commit(0, 1)
    cache.retire([("A1", 2)])
    during = asyncio.create_task(cache.order("A1", store.load))
    while store.loads < 2:
        await asyncio.sleep(0)
    store.gate.set()
    await slow
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
    cache.expect_commit(0, 1)
    store.version = 2
    cache.expect_commit(5, 6)
    store.position = 6
    found = await cache.order("A1", store.load)
    assert found is not None and found.version == 2


async def test_a_failed_commit_is_not_trusted(store: Store) -> None:
    """After a commit that failed the cache does not mistake a foreign position for its own."""
    cache = memory(store)
    await cache.order("A1", store.load)
    cache.expect_commit(0, 3)
    cache.forget_commit()
    store.version, store.position = 2, 3
    found = await cache.order("A1", store.load)
    assert found is not None and found.version == 2


async def test_a_position_that_a_failed_commit_expected_hides_nobody(store: Store) -> None:
    """Others who reach the positions that a failed commit of ours had expected are noticed at each of them."""
    cache = memory(store)
    await cache.order("A1", store.load)
    cache.expect_commit(0, 5)
    cache.forget_commit()
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
    assert await second == Entry(1, b"version 1")


async def test_an_entry_ends_with_its_time(store: Store) -> None:
    """An entry older than the TTL is loaded again."""
    cache = memory(store, ttl_seconds=0)
    await cache.order("A1", store.load)
    await cache.order("A1", store.load)
    assert store.loads == 2


async def test_a_missing_order_is_not_remembered(store: Store) -> None:
    """That there is no such order is asked of the store every time."""
    cache = memory(store)
    loads = 0

    async def nothing() -> Entry | None:
        nonlocal loads
        loads += 1
        return None

    assert await cache.order("A1", nothing) is None
    assert await cache.order("A1", nothing) is None
    assert loads == 2


async def test_every_write_retires_the_lists(store: Store) -> None:
    """A page is answered from memory until any order changes."""
    cache = memory(store)
    await cache.page("50:0", store.load_page)
    assert await cache.page("50:0", store.load_page) == b"page 1"
    store.version, store.position = 2, 1
    cache.expect_commit(0, 1)
    cache.retire([("another", 1)])
    assert await cache.page("50:0", store.load_page) == b"page 2"
    assert store.loads == 2


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
    assert cache.counts() == {"hits": 0, "misses": 3}
