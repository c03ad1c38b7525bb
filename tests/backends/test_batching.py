"""Gathering: many small calls in few rounds, and nobody is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from expediter.backends.batching import Gatherer
from serving import PATIENCE_SECONDS


async def doubled(items: Sequence[int]) -> list[int]:
    return [2 * item for item in items]


async def test_what_is_asked_during_a_round_makes_the_next() -> None:
    """Everyone gets the answer to their own item, and those who ask meanwhile share a round."""
    gate = asyncio.Event()
    rounds: list[list[int]] = []

    async def work(items: Sequence[int]) -> list[int]:
        rounds.append(list(items))
        await gate.wait()
        return await doubled(items)

    gatherer = Gatherer(work, items_max=3)
    first = gatherer.ask(1)
    await asyncio.sleep(0)
    later = [gatherer.ask(item) for item in (2, 3, 4, 5)]
    gate.set()
    assert await asyncio.gather(first, *later) == [2, 4, 6, 8, 10]
    assert rounds == [[1], [2, 3, 4], [5]]


async def test_what_is_large_together_is_not_asked_for_together() -> None:
    """A round takes as many as fit by their size, in their order; one that is too large has a round to itself."""
    rounds: list[list[int]] = []

    async def work(items: Sequence[int]) -> list[int]:
        rounds.append(list(items))
        return await doubled(items)

    gatherer = Gatherer(work, items_max=4, size=lambda item: item, size_max=10)
    items = (4, 6, 1, 25, 3, 1, 1, 1, 1)
    assert await asyncio.gather(*map(gatherer.ask, items)) == [2 * item for item in items]
    assert rounds == [[4, 6], [1], [25], [3, 1, 1, 1], [1]]


async def test_whoever_asks_as_a_round_ends_is_answered() -> None:
    """A call that comes in the very moment in which the last round is over begins another one."""
    gatherer = Gatherer(doubled, items_max=10)
    answers: list[int] = []

    async def ask(depth: int) -> None:
        for number in range(200):
            for _ in range(depth):
                await asyncio.sleep(0)
            async with asyncio.timeout(PATIENCE_SECONDS):
                answers.append(await gatherer.ask(number))

    for depth in range(6):
        await asyncio.gather(*(ask(steps) for steps in range(depth + 1)))
    assert len(answers) == 200 * (1 + 2 + 3 + 4 + 5 + 6)

    done = gatherer.ask(1)
    late: list[asyncio.Future[int]] = []
    done.add_done_callback(lambda _: asyncio.get_running_loop().call_soon(lambda: late.append(gatherer.ask(2))))
    await done
    while not late:
        await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await late[0] == 4


async def test_a_round_that_fails_fails_for_those_in_it_only() -> None:
    """Who shared the failed round hears why; the next round works."""

    async def work(items: Sequence[int]) -> list[int]:
        if 0 in items:
            raise ValueError("nought")
        return await doubled(items)

    gatherer = Gatherer(work, items_max=2)
    first, second, third = gatherer.ask(0), gatherer.ask(1), gatherer.ask(2)
    for failed in (first, second):
        with pytest.raises(ValueError, match="nought"):
            await failed
    assert await third == 4
    await gatherer.finish()


async def test_a_caller_who_goes_away_takes_nobody_along() -> None:
    """A cancelled call leaves its neighbours' answers alone."""
    gatherer = Gatherer(doubled, items_max=2)
    first, second = gatherer.ask(1), gatherer.ask(2)
    first.cancel()
    assert await second == 4
