"""Gathering: while one round of calls is under way, the next one gathers; no timer, no added delay."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Gatherer(Generic[T, R]):
    """Carries out many small calls in few rounds. Use it from one event loop."""

    def __init__(
        self,
        work: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]],
        *,
        items_max: int,
        rounds_max: int = 1,
        size: Callable[[T], int] | None = None,
        size_max: int = 0,
    ) -> None:
        """`work` answers up to `items_max` items, in their order; `rounds_max` calls may run side by side.

        Where items have a `size`, those of one call are `size_max` together at most, or one that is larger.

        An answer that is an exception is raised to whoever asked for that item, and to nobody else.
        """
        self._work = work
        self._items_max = items_max
        self._rounds_max = rounds_max
        self._size = size
        self._size_max = size_max
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._rounds: set[asyncio.Task[None]] = set()
        self._running = 0

    @property
    def waiting(self) -> int:
        """How many items wait for their round."""
        return len(self._waiting)

    def ask(self, item: T) -> asyncio.Future[R]:
        """Put an item into the next round; the future has its answer, or what `work` raised."""
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._running < self._rounds_max:
            self._running += 1
            round = asyncio.create_task(self._run())
            self._rounds.add(round)
            round.add_done_callback(self._rounds.discard)
        return answer

    async def _run(self) -> None:
        try:
            await self._rounds_of_calls()
        finally:
            # In the same step as the last look: whoever asks from now on begins a round of their own.
            self._running -= 1

    async def _rounds_of_calls(self) -> None:
        while self._waiting:
            count = self._fitting()
            taken, self._waiting = self._waiting[:count], self._waiting[count:]
            try:
                answers = await self._work([item for item, _ in taken])
            except BaseException as error:
                for _, answer in taken:
                    if not answer.done():
                        answer.set_exception(error)
                        answer.exception()  # whoever asked may be gone, and then nobody looks at it
                if not isinstance(error, Exception):
                    raise
                continue
            for (_, answer), value in zip(taken, answers, strict=True):
                if answer.done():
                    continue
                if isinstance(value, Exception):
                    answer.set_exception(value)
                else:
                    answer.set_result(value)

    def _fitting(self) -> int:
        """Return how many of the items that wait go into the next call."""
        size = 0
        if self._size is not None:
            for count, (item, _) in enumerate(self._waiting[: self._items_max]):
                size += self._size(item)
                if count and size > self._size_max:
                    return count
        return self._items_max

    async def finish(self) -> None:
        """Wait until everything that was asked for is answered."""
        while self._rounds:
            await asyncio.wait(self._rounds)
