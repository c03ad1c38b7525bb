"""Temporary orders in Redis: kept before they are stored, and marked when they are."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from expediter.queued.temporary import Kept, Settled, Temporary, TemporaryOrders
from servers import RedisServer


@pytest.fixture
def url(redis_server: RedisServer) -> str:
    return redis_server.new_database()


@pytest.fixture
async def orders(url: str) -> AsyncIterator[TemporaryOrders]:
    opened = TemporaryOrders(url, keep_seconds=60)
    yield opened
    await opened.close()


def pending(token: str, version: int = 1) -> Temporary:
    return Temporary(state="pending", token=token, version=version, order=msgspec.Raw(b'{"order_id":"A1"}'))


async def found(orders: TemporaryOrders, order_id: str = "A1") -> Temporary:
    temporary = (await orders.find(order_id)).temporary
    assert temporary is not None
    return temporary


async def test_a_new_order_is_kept_once(orders: TemporaryOrders) -> None:
    """A second new order by the same id is not kept; a change of it is."""
    assert await orders.put([("A1", pending("t1"), True)]) == [True]
    assert await orders.put([("A1", pending("t2"), True), ("A2", pending("t3"), True)]) == [False, True]
    assert (await found(orders)).token == "t1"
    assert await orders.put([("A1", pending("t4", 2), False)]) == [True]
    assert (await found(orders)).version == 2


async def test_a_stored_order_keeps_its_document_for_its_time(orders: TemporaryOrders, url: str) -> None:
    """Once stored an order stays readable as it was, however often that is said, until its time is over."""
    await orders.put([("A1", pending("t1"), True)])
    for _ in range(3):
        await orders.settle([Settled("A1", "t1"), Settled("gone", "t9")])
        temporary = await found(orders)
        assert (temporary.state, temporary.token, temporary.version) == ("stored", "t1", 1)
        assert temporary.document == b'{"order_id":"A1"}'
    assert (await orders.find("gone")).temporary is None


async def test_an_older_command_does_not_settle_a_newer_one(orders: TemporaryOrders) -> None:
    """That a first command is stored says nothing of the second, which still waits."""
    await orders.put([("A1", pending("t1"), True)])
    await orders.put([("A1", pending("t2", 2), False)])
    await orders.settle([Settled("A1", "t1")])
    assert (await found(orders)).state == "pending"
    await orders.settle([Settled("A1", "t2")])
    assert (await found(orders)).state == "stored"


async def test_a_refusal_says_why(orders: TemporaryOrders) -> None:
    """A refused command leaves its reason."""
    await orders.put([("A1", pending("t1"), True)])
    await orders.settle([Settled("A1", "t1", "no such luck")])
    temporary = await found(orders)
    assert (temporary.state, temporary.error, temporary.document) == ("refused", "no such luck", None)


async def test_the_times_are_bounded(orders: TemporaryOrders, redis_server: RedisServer, url: str) -> None:
    """Whatever is kept ends some day: a pending order after a week, a stored one after its time."""
    database = url.rpartition("/")[2]
    await orders.put([("A1", pending("t1"), True)])
    assert int(redis_server.query(database, "TTL temp_order:A1")) > 6 * 86_400
    await orders.settle([Settled("A1", "t1")])
    assert 0 < int(redis_server.query(database, "TTL temp_order:A1")) <= 60
    await orders.begin("key", Kept(fingerprint="f", order_id="A1"), 5_000)
    assert 0 < int(redis_server.query(database, "TTL idempotency:key")) <= 5
    assert 0 < int(redis_server.query(database, "TTL idempotency:key:busy")) <= 15


async def test_a_redis_that_was_flushed_is_not_believed(
    orders: TemporaryOrders, redis_server: RedisServer, url: str
) -> None:
    """One that has just begun to remember, or has lost what it knew, is not certain of what it does not know."""
    database = url.rpartition("/")[2]
    assert not (await orders.find("A1")).certain
    run = str(redis_server.query(database, "GET temp_orders:since")).partition(":")[0]
    redis_server.query(database, f"SET temp_orders:since {run}:1000")
    assert (await orders.find("A1")).certain
    redis_server.query(database, "FLUSHDB")
    assert not (await orders.find("A1")).certain
    redis_server.query(database, "SET temp_orders:since another:1000")
    assert not (await orders.find("A1")).certain


async def test_a_key_is_one_caller_s_at_a_time(orders: TemporaryOrders) -> None:
    """While a request with a key is under way others wait; whoever comes after it learns what it kept."""
    mine, other = Kept(fingerprint="f", order_id="A1"), Kept(fingerprint="f", order_id="A2")
    assert await orders.begin("key", mine, 60_000) == (mine, True)
    assert await orders.begin("key", other, 60_000) == (mine, False)
    done = Kept(fingerprint="f", order_id="A1", answer="202")
    await orders.finish("key", done, 60_000)
    assert await orders.begin("key", other, 60_000) == (done, True)
    await orders.give_up("key", forget=True)
    assert await orders.begin("key", other, 60_000) == (other, True)
