"""Hints: what is due is told to a worker elsewhere, and nothing depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from expediter.backends.brokers import Broker, Topic, open_broker
from expediter.work.hints import Hints
from servers import RedisServer, free_port
from serving import PATIENCE_SECONDS
from storing import ask, claimed, open_committer, place


@pytest.fixture
async def broker(redis_server: RedisServer) -> AsyncIterator[Broker]:
    opened = open_broker(redis_server.new_database(), queue_name="orders")
    assert opened is not None
    yield opened
    await opened.close()


async def test_a_batch_is_one_hint(folder: Path, broker: Broker) -> None:
    """Orders that are placed together are told of in one message, and a claimed job in none."""
    hints = Hints(broker)
    async with open_committer(folder) as committer:
        committer.on_commit(hints.notice)
        await ask(committer, *(place(f"A{number}") for number in range(20)))
        await claimed(committer)
        await hints.stop()
    found = await broker.receive(Topic.HINTS, limit=10, wait_seconds=1)
    assert [msgspec.json.decode(each.body) for each in found] == [[f"A{number}" for number in range(20)]]


async def test_a_hint_wakes_one_listener(broker: Broker, folder: Path) -> None:
    """Whoever listens is woken after a commit of somebody else's, and the hint is used up."""
    telling, listening = Hints(broker), Hints(broker)
    woken = asyncio.Event()
    listening.listen(woken.set)
    async with open_committer(folder) as committer:
        committer.on_commit(telling.notice)
        await ask(committer, place("A1"))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await woken.wait()
            while (await broker.depth(Topic.HINTS)).waiting:
                await asyncio.sleep(0)
    await telling.stop()
    await listening.stop()


async def test_without_its_broker_a_hint_costs_nothing(folder: Path) -> None:
    """With the broker away orders are stored as ever, and the process stops in time."""
    away = open_broker(f"redis://127.0.0.1:{free_port()}/0", queue_name="orders")
    assert away is not None
    hints = Hints(away)
    hints.listen(lambda: None)
    async with open_committer(folder) as committer, asyncio.timeout(PATIENCE_SECONDS):
        committer.on_commit(hints.notice)
        for number in range(50):
            await ask(committer, place(f"A{number}"))
        await hints.stop()
    assert away.failing is not None
    await away.close()
