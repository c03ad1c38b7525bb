"""The cache in Redis between two processes, and when Redis is flushed, frozen, killed or out of one's reach."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trustme

from expediter.backends.cache import Entry, Standing
from expediter.backends.cache.belief import BELIEVED_SECONDS
from expediter.backends.cache.redis import CALL_SECONDS_MAX, RedisCache
from servers import RedisServer

PATIENCE_SECONDS = 120.0


class Store:
    """Stands for the database, which both processes read."""

    def __init__(self) -> None:
        self.version = 1
        self.loads = 0
        self.standing = Standing(0, suspended=False)

    async def look_at_standing(self) -> Standing:
        return self.standing

    async def load(self) -> Entry | None:
        self.loads += 1
        return Entry(self.version, b'"version %d"' % self.version)

    async def load_page(self) -> tuple[bytes, bool]:
        self.loads += 1
        return b"page %d" % self.version, True


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def server(tmp_path: Path) -> RedisServer:
    """A Redis of the test's own, which it may kill."""
    server = RedisServer(tmp_path)
    yield server
    server.process.send_signal(signal.SIGCONT)
    server.stop()


Open = Callable[[str], Awaitable[RedisCache]]


@pytest.fixture
async def open_shared(store: Store) -> AsyncIterator[Open]:
    opened: list[RedisCache] = []

    async def open_one(url: str) -> RedisCache:
        cache = RedisCache(url, ttl_seconds=30, standing=store.look_at_standing)
        await cache.start()
        opened.append(cache)
        return cache

    yield open_one
    for cache in opened:
        await cache.close()


def address(server: RedisServer) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


async def until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not fact():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.01)


async def read(cache: RedisCache, store: Store) -> int:
    """Return the version that a reader is shown, once it is kept."""
    found = await cache.order("A1", store.load)
    assert found is not None
    await cache.settle()
    assert found.body == b'"version %d"' % found.version
    return found.version


async def change(cache: RedisCache, store: Store) -> bool:
    """Commit the next version of the order; return whether the cache has told its readers."""
    told = await cache.expect_changes([("A1", store.version + 1)])
    store.version += 1
    return await cache.retire([("A1", store.version)]) and told


async def test_a_change_at_one_process_is_read_at_the_other(
    redis_server: RedisServer, open_shared: Open, store: Store
) -> None:
    """What one process commits the other reads at once, the order as well as the list."""
    url = redis_server.new_database()
    one, two = await open_shared(url), await open_shared(url)
    for _ in range(200):
        await change(one, store)
        assert await read(two, store) == store.version
        assert await two.page("50:0", store.load_page) == b"page %d" % store.version
        one, two = two, one
    loads = store.loads
    assert await read(one, store) == await read(two, store) == store.version
    assert store.loads == loads


async def test_a_slow_reader_does_not_put_an_older_version_back(
    redis_server: RedisServer, open_shared: Open, store: Store
) -> None:
    """A process that loaded before the other's commit cannot store what it loaded after it."""
    url = redis_server.new_database()
    one, two = await open_shared(url), await open_shared(url)
    gate = asyncio.Event()

    async def slow() -> Entry | None:
        entry = await store.load()
        await gate.wait()
        return entry

    reading = asyncio.create_task(two.order("A1", slow))
    await until(lambda: store.loads == 1)
    await change(one, store)
    gate.set()
    await reading
    await two.settle()
    assert await read(two, store) == await read(one, store) == 2


async def test_an_operator_sees_keys_times_hits_and_misses(
    redis_server: RedisServer, open_shared: Open, store: Store
) -> None:
    """The keys have the names of the contract, end with their time, and the hits are counted in Redis too."""
    url = redis_server.new_database()
    database = url.rpartition("/")[2]
    cache = await open_shared(url)
    for _ in range(3):
        await read(cache, store)
        await cache.page("50:0", store.load_page)
        await cache.settle()
    version = redis_server.query(database, "GET orders:list:version")
    assert set(redis_server.query(database, "KEYS orders:*")) == {
        "orders:epoch",
        "orders:list:version",
        f"orders:list:{version}:50:0",
        "orders:detail:A1",
    }
    assert redis_server.query(database, f"GET orders:list:{version}:50:0") == "page 1"
    for key in ("orders:detail:A1", f"orders:list:{version}:50:0"):
        assert 0 < int(redis_server.query(database, f"TTL {key}")) <= 30
    await until(
        lambda: (
            redis_server.query(database, "HGETALL orders:cache:stats") in ({"hits": "4", "misses": "2"},)
            or redis_server.query(database, "HMGET orders:cache:stats hits misses") == ["4", "2"]
        )
    )


async def test_a_flush_costs_a_load(redis_server: RedisServer, open_shared: Open, store: Store) -> None:
    """After FLUSHDB, and after single keys were evicted, readers never see what was there before."""
    url = redis_server.new_database()
    database = url.rpartition("/")[2]
    one, two = await open_shared(url), await open_shared(url)
    for command in ("FLUSHDB", "DEL orders:epoch", "DEL orders:list:version", "DEL orders:detail:A1"):
        await change(one, store)
        assert await read(two, store) == store.version
        redis_server.query(database, command)
        assert await read(two, store) == store.version
        assert await two.page("50:0", store.load_page) == b"page %d" % store.version
        await change(two, store)
        assert await read(one, store) == store.version
        assert await one.page("50:0", store.load_page) == b"page %d" % store.version
    assert one.failing is None and two.failing is None


async def test_a_killed_redis_costs_latency_only(server: RedisServer, open_shared: Open, store: Store) -> None:
    """With Redis gone every read is answered by the database; when it is back it is used again."""
    one, two = await open_shared(address(server)), await open_shared(address(server))
    await read(one, store)
    server.kill()
    for _ in range(20):
        await change(one, store)
        assert await read(two, store) == store.version
        assert await two.page("50:0", store.load_page) == b"page %d" % store.version
    assert one.failing is not None and "the database answers" in one.failing
    server.restart()
    await until(lambda: one.failing is None and two.failing is None)
    await change(one, store)
    assert await read(two, store) == store.version
    loads = store.loads
    assert await read(one, store) == store.version
    assert store.loads == loads


async def test_a_snapshot_that_comes_back_is_not_read(
    server: RedisServer, open_shared: Open, store: Store
) -> None:
    """A Redis that restarts with an older state of its memory serves none of it."""
    one, two = await open_shared(address(server)), await open_shared(address(server))
    await read(two, store)
    await one.page("50:0", store.load_page)
    await one.settle()
    server.query("0", "SAVE")
    await change(one, store)
    server.kill()
    server.restart()
    assert server.query("0", "EXISTS orders:detail:A1") == 1
    await until(lambda: one.failing is None and two.failing is None)
    assert await read(one, store) == await read(two, store) == 2
    assert await two.page("50:0", store.load_page) == b"page 2"


async def test_a_frozen_redis_is_waited_for_briefly(server: RedisServer, open_shared: Open, store: Store) -> None:
    """With Redis stopped a first read waits for its deadline, later ones not at all; then it is used again."""
    cache = await open_shared(address(server))
    await read(cache, store)
    with server.frozen():
        started = time.monotonic()
        for _ in range(50):
            await change(cache, store)
            assert await read(cache, store) == store.version
        assert time.monotonic() - started < CALL_SECONDS_MAX * 20
    store.standing = Standing(1, suspended=False)  # as the committer sees to, before it commits
    await until(lambda: cache.failing is None)
    heard = time.monotonic() + BELIEVED_SECONDS
    while await read(cache, store) != store.version:
        assert time.monotonic() < heard


async def test_what_cannot_be_told_is_said(server: RedisServer, open_shared: Open, store: Store) -> None:
    """A writer hears that readers were not told: cut off, or a Redis that is full, read-only or has forgotten."""
    server.query("0", "ACL SETUSER writer on nopass ~* +@all")
    reader = await open_shared(address(server))
    writer = await open_shared(address(server).replace("//", "//writer:x@"))
    for fault, mended in (
        (("ACL SETUSER writer off", "CLIENT KILL USER writer"), "ACL SETUSER writer on"),
        (("CONFIG SET maxmemory 1",), "CONFIG SET maxmemory 0"),
        (("REPLICAOF 127.0.0.1 1",), "REPLICAOF NO ONE"),
    ):
        assert await change(writer, store)
        assert await read(reader, store) == store.version
        for command in fault:
            server.query("0", command)
        assert not await change(writer, store)
        assert writer.cut_off and writer.failing is not None
        server.query("0", mended)
        await until(lambda: not writer.cut_off and not reader.cut_off)
    assert await writer.expect_changes([("A1", store.version + 1)])
    server.query("0", "FLUSHALL")
    assert not await writer.retire([("A1", store.version + 1)])


async def test_nothing_is_believed_that_was_cached_before_a_suspension(
    redis_server: RedisServer, open_shared: Open, store: Store
) -> None:
    """While the database suspends the cache it answers itself; afterwards order and page are read anew."""
    cache = await open_shared(redis_server.new_database())

    async def until_a_read(hits: bool) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        before = dict(cache.counts)
        while (cache.counts["hits"] > before["hits"]) != hits or cache.counts == before:
            assert time.monotonic() < deadline
            before = dict(cache.counts)
            await read(cache, store)

    for number in (1, 2, 3):
        await until_a_read(hits=True)
        await cache.page("50:0", store.load_page)
        await cache.settle()
        store.version += 1
        store.standing = Standing(number, suspended=True)
        await until_a_read(hits=False)
        assert cache.failing is not None and "could not write" in cache.failing
        assert await read(cache, store) == store.version
        assert await cache.page("50:0", store.load_page) == b"page %d" % store.version
        store.standing = Standing(number, suspended=False)
        store.version += 1
        await until_a_read(hits=True)
        assert cache.failing is None
        assert await read(cache, store) == store.version
        assert await cache.page("50:0", store.load_page) == b"page %d" % store.version


async def test_a_redis_that_was_away_at_the_start_is_used_later(
    server: RedisServer, open_shared: Open, store: Store
) -> None:
    """A process that starts without its Redis answers from the database, and finds it by itself."""
    server.kill()
    cache = await open_shared(address(server))
    assert cache.failing is not None
    assert await read(cache, store) == 1
    server.restart()
    await until(lambda: cache.failing is None)
    await read(cache, store)
    assert await read(cache, store) == 1
    assert cache.counts["hits"] == 1


async def test_redis_by_tls(tmp_path: Path, open_shared: Open, store: Store) -> None:
    """`rediss://` talks TLS and checks the server's certificate."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    for name, blob in (
        ("ca.pem", authority.cert_pem),
        ("cert.pem", certificate.cert_chain_pems[0]),
        ("key.pem", certificate.private_key_pem),
    ):
        blob.write_to_path(str(tmp_path / name))
    server = TlsRedisServer(tmp_path)
    try:
        cache = await open_shared(f"rediss://127.0.0.1:{server.tls_port}/0?ssl_ca_certs={tmp_path}/ca.pem")
        assert cache.failing is None
        await read(cache, store)
        await read(cache, store)
        assert cache.counts == {"hits": 1, "misses": 1}
        stranger = await open_shared(f"rediss://127.0.0.1:{server.tls_port}/0")
        assert stranger.failing is not None and "certificate" in stranger.failing.lower()
    finally:
        server.stop()


class TlsRedisServer(RedisServer):
    """A Redis that also listens for TLS, with the certificates in its folder."""

    def __init__(self, folder: Path) -> None:
        from servers import free_port

        self.tls_port = free_port()
        self.options = (
            *RedisServer.options,
            *("--tls-port", str(self.tls_port), "--tls-auth-clients", "no"),
            *("--tls-cert-file", f"{folder}/cert.pem", "--tls-key-file", f"{folder}/key.pem"),
            *("--tls-ca-cert-file", f"{folder}/ca.pem"),
        )
        super().__init__(folder)
