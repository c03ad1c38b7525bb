"""Accepted commands in Redis: kept before they are stored, settled then, and found when they are overdue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from expediter.backends.redis_client import RedisUnavailable
from expediter.errors import DuplicateOrder
from expediter.orders.commands import CancelOrder, DeleteOrder, PlaceOrder
from expediter.queued.message import QueuedCommand, pack, unpack
from expediter.queued.temporary import Accepted, Kept, Settled, Temporary, TemporaryOrders
from expediter.store.submissions import Answer, IdempotencyKey
from servers import RedisServer
from storing import place

DOCUMENT = b'{"order_id":"A1","metadata":{"incarnation":99}}'
ANSWER = Answer(202, {"location": "/orders/A1"}, "{}")


@pytest.fixture
def url(redis_server: RedisServer) -> str:
    return redis_server.new_database()


@pytest.fixture
async def orders(url: str) -> AsyncIterator[TemporaryOrders]:
    opened = TemporaryOrders(url, keep_seconds=60)
    yield opened
    await opened.close()


def placed(token: str, order_id: str = "A1", **fields: Any) -> Accepted:
    command = place(order_id).command
    assert isinstance(command, PlaceOrder)
    queued = QueuedCommand(token=token, command=command, **fields)
    return Accepted(queued, pack([queued]), DOCUMENT)


def keyed(token: str, order_id: str = "A1", **fields: Any) -> Accepted:
    return placed(token, order_id, key=IdempotencyKey("key", "print", 5_000_000), answer=ANSWER, **fields)


def change(token: str, kind: type[CancelOrder] | type[DeleteOrder] = CancelOrder, **fields: Any) -> Accepted:
    key = IdempotencyKey(f"queued:{token}", "", 60_000_000)
    queued = QueuedCommand(token=token, command=kind(order_id="A1"), key=key, **fields)
    return Accepted(queued, pack([queued]), None)


async def found(orders: TemporaryOrders, order_id: str = "A1") -> Temporary:
    temporary = (await orders.find(order_id)).temporary
    assert temporary is not None
    return temporary


async def test_a_new_order_is_kept_once(orders: TemporaryOrders) -> None:
    """A second new order by the same id is not kept, nor is its command."""
    assert await orders.put([placed("t1")]) == [None]
    before, none = await orders.put([placed("t2"), placed("t3", "A2")])
    assert (isinstance(before, DuplicateOrder), none) == (True, None)
    assert (await found(orders)).token == "t1"
    assert (await orders.waiting(["t1", "t2", "t3"]))[0] == [True, False, True]


async def test_a_stored_order_keeps_its_document_for_its_time(orders: TemporaryOrders) -> None:
    """Once stored an order stays readable as it was, however often that is said, until its time is over."""
    await orders.put([placed("t1")])
    assert (await orders.find("A1")).pending == DOCUMENT
    for _ in range(3):
        await orders.settle([Settled(placed("t1").command), Settled(placed("t9", "gone").command)])
        temporary = await found(orders)
        assert (temporary.state, temporary.token, bytes(temporary.order)) == ("stored", "t1", DOCUMENT)
        assert (await orders.find("A1")).pending is None
    assert (await orders.find("gone")).temporary is None
    assert (await orders.waiting(["t1"]))[0] == [False]


async def test_changes_wait_beside_their_order(orders: TemporaryOrders) -> None:
    """A change says by which key the database will know it, until it is settled; the order is not touched."""
    await orders.put([placed("t1"), change("t2"), change("t3")])
    assert (await orders.find("A1")).waiting == ("queued:t2", "queued:t3")
    await orders.settle([Settled(change("t2").command)])
    assert ((await found(orders)).state, (await orders.find("A1")).changes) == ("pending", ("queued:t3",))
    await orders.put([keyed("t4", "A2")])
    assert (await orders.find("A2")).waiting == ("key",)


async def test_a_deleted_order_is_shown_no_more(orders: TemporaryOrders) -> None:
    """A deletion that is stored removes what was shown, whoever placed it."""
    await orders.put([placed("t1"), change("t2", DeleteOrder)])
    await orders.settle([Settled(change("t2", DeleteOrder).command, "deleted")])
    assert (await orders.find("A1")).temporary is None


async def test_a_refusal_says_why_and_frees_the_id(orders: TemporaryOrders) -> None:
    """A refused command leaves its reason, and the id that belongs to no order can be placed."""
    await orders.put([placed("t1")])
    await orders.settle([Settled(placed("t1").command, error="no such luck")])
    temporary = await found(orders)
    assert (temporary.state, temporary.error, (await orders.find("A1")).pending) == (
        "refused",
        "no such luck",
        None,
    )
    assert await orders.put([placed("t2")]) == [None]


async def test_what_is_withdrawn_leaves_nothing(orders: TemporaryOrders) -> None:
    """A command that was not accepted after all leaves neither order nor answer; another's order stays."""
    await orders.put([keyed("t1")])
    await orders.settle([Settled(placed("t2").command, "gone")])
    assert (await found(orders)).token == "t1"
    await orders.settle([Settled(keyed("t1").command, "gone")])
    assert await orders.find("A1", "key") == (await orders.find("nobody"))


async def test_a_key_is_kept_with_its_answer(orders: TemporaryOrders) -> None:
    """Whoever comes second with a key is told what it was answered, and adds nothing."""
    assert await orders.put([keyed("t1"), keyed("t2", "A2")]) == [None, Kept("print", "t1", 0, ANSWER)]
    assert (await orders.find("nobody", "key")).kept == Kept("print", "t1", 0, ANSWER)
    assert (await orders.find("A2")).temporary is None
    await orders.settle([Settled(keyed("t1").command)])
    assert (await orders.find("A1", "key")).kept is not None
    await orders.settle([Settled(keyed("t1").command, error="no such luck")])
    assert await orders.put([keyed("t3", "A3")]) == [None]


async def test_what_is_overdue_is_found_by_one_at_a_time(orders: TemporaryOrders) -> None:
    """A command is due after its time, then held by whoever found it, and due again if it was left to others."""
    await orders.put([placed("t1")])
    assert await orders.overdue(limit=10, for_seconds=60) == []
    await orders.put([placed("t2", "A2"), change("t3")])
    await orders.look_again([placed("t2", "A2").command, change("t3").command], seconds=-1)
    assert sorted(each.token for each in await orders.overdue(limit=10, for_seconds=60)) == ["t2", "t3"]
    assert await orders.overdue(limit=10, for_seconds=60) == []
    forgotten = placed("t4", "A4").command
    await orders.look_again([change("t3").command, forgotten], seconds=-1)
    again = await orders.overdue(limit=10, for_seconds=60)
    assert sorted((command.token, command.left) for command in again) == [("t3", True), ("t4", True)]


async def test_what_was_accepted_before_the_database_was_cleared_counts_no_more(
    orders: TemporaryOrders, url: str
) -> None:
    """Orders, changes and answers of an older incarnation are shown to nobody and stand in nobody's way."""
    await orders.put([keyed("t1"), change("t2")])
    other = TemporaryOrders(url, keep_seconds=60)
    await other.tell_incarnation(7)
    assert (await orders.find("A1", "key"))[:3] == (None, (), None)
    assert orders.incarnation == 7
    assert await orders.put([keyed("t3", incarnation=7)]) == [None]
    await other.tell_incarnation(8)
    orders.incarnation = 7
    with pytest.raises(RedisUnavailable, match="cleared"):
        await orders.put([placed("t4", "A4", incarnation=7)])
    assert (orders.incarnation, (await orders.find("A4")).temporary) == (8, None)
    await other.tell_incarnation(3)
    assert other.incarnation == 8
    await other.close()


async def test_the_times_are_bounded(orders: TemporaryOrders, redis_server: RedisServer, url: str) -> None:
    """Whatever is kept ends some day: a pending order after a week, a stored one after its time."""
    database = url.rpartition("/")[2]
    await orders.put([keyed("t1"), change("t2")])
    for name in ("temp_order:A1", "temp_changes:A1"):
        assert int(redis_server.query(database, f"TTL {name}")) > 6 * 86_400
    assert 0 < int(redis_server.query(database, "TTL idempotency:key")) <= 5
    await orders.settle([Settled(keyed("t1").command)])
    assert 0 < int(redis_server.query(database, "TTL temp_order:A1")) <= 60


async def test_a_redis_that_is_full_is_still_emptied(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is stored leaves the set also while Redis takes nothing new."""
    server = RedisServer(tmp_path_factory.mktemp("full"))
    orders = TemporaryOrders(server.new_database(), keep_seconds=60)
    try:
        await orders.find("A1")
        await orders.put([placed("t1"), change("t2")])
        server.query("0", "CONFIG SET maxmemory 1")
        with pytest.raises(RedisUnavailable):
            await orders.put([placed("t3", "A3")])
        await orders.settle([Settled(placed("t1").command), Settled(change("t2").command)])
        assert (await orders.waiting(["t1", "t2", "t3"]))[0] == [False, False, False]
        assert (await orders.find("A1")).pending is None
    finally:
        await orders.close()
        server.stop()


async def test_a_redis_that_was_flushed_is_not_believed(
    orders: TemporaryOrders, redis_server: RedisServer, url: str
) -> None:
    """One that has just begun to remember, or has lost what it knew, is not certain of what it does not know."""
    database = url.rpartition("/")[2]
    assert not (await orders.find("A1")).certain
    run = str(redis_server.query(database, "GET temp_orders:since")).partition(":")[0]
    redis_server.query(database, f"SET temp_orders:since {run}:1000")
    assert (await orders.find("A1")).certain
    _, since = await orders.waiting(["t1"])
    redis_server.query(database, "FLUSHDB")
    assert (await orders.waiting(["t1"]))[1] != since
    found = await orders.find("A1")
    assert (found.certain, found.lost) == (False, True)
    redis_server.query(database, "SET temp_orders:since another:1000")
    assert not (await orders.find("A1")).certain


def test_a_message_says_which_command_it_is() -> None:
    """A command of another kind is no queued command."""
    assert unpack(pack([change("t2").command, placed("t1").command]))[1] == placed("t1").command
    with pytest.raises(msgspec.ValidationError):
        unpack(b'[{"token":"t1","command":{"type":"ClaimJob","order_id":"A1"}}]')
