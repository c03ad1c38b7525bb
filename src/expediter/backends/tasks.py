"""What runs in the background of a process, begun and ended in one way; and waiting with a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import structlog

from expediter.errors import Unavailable

#: Seconds before work that failed for an unforeseen reason begins again: doubled from the first to the last.
AGAIN_SECONDS_MIN, AGAIN_SECONDS_MAX = 0.1, 30.0
#: Seconds after which work counts as well, and its next pause is the short one again.
WELL_SECONDS = 10.0
#: Seconds after which a task that was cancelled and goes on is cancelled again.
CANCEL_AGAIN_SECONDS = 0.1

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Pauses:
    """Pauses between two tries: each is twice as long as the one before, from the first to the last (seconds)."""

    def __init__(self, first: float, last: float) -> None:
        """The next one is `first`."""
        self._first = first
        self._last = last
        self._next = first

    def next(self) -> float:
        """Return how long to wait now."""
        pause, self._next = self._next, min(2 * self._next, self._last)
        return pause

    def reset(self) -> None:
        """It went well: begin with the first again."""
        self._next = self._first


class Background:
    """One task of a part. The work returns when it is done, or soon after `stopping` turns true.

    If it fails for a reason that nobody foresaw, the log shows the whole error, and the work begins again after a
    pause. Use it from one event loop.
    """

    def __init__(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """`name` is for the log and for `/healthz`."""
        self.name = name
        self._work = work
        self._told = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._task is not None and not self._task.done()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._told.is_set()

    @property
    def ended(self) -> bool:
        """Whether it was started and has ended without being told to: nobody does its work any more."""
        return self._task is not None and self._task.done() and not self.stopping

    def start(self) -> None:
        """Begin; nothing happens while it runs."""
        if not self.running:
            self._told.clear()
            self._task = asyncio.create_task(self._run(), name=self.name)

    def stop_soon(self) -> None:
        """Tell the work to stop, and wake it where it rests."""
        self._told.set()

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Tell the work to stop and wait for its end; after `grace_seconds` (None: never) it is cancelled.

        It may be called before the start, and again.
        """
        self.stop_soon()
        if self._task is None:
            return
        await asyncio.wait([self._task], timeout=grace_seconds)
        await end_tasks([self._task])

    async def rest(self, seconds: float) -> None:
        """Wait so long, or until told to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self._told.wait()
        except TimeoutError:
            pass

    async def _run(self) -> None:
        pauses = Pauses(AGAIN_SECONDS_MIN, AGAIN_SECONDS_MAX)
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                return await self._work()
            except Exception:
                if loop.time() - began >= WELL_SECONDS:
                    pauses.reset()
                pause = pauses.next()
                log.exception("background work failed and begins again", work=self.name, pause_seconds=pause)
            await self.rest(pause)
            if self.stopping:
                return


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until each has ended.

    More than once, if need be: `asyncio.wait_for`, which database drivers use, loses a cancellation that comes in
    the moment in which what it waits for is there (Python 3.11; https://github.com/python/cpython/issues/86296).
    """
    waiting = {task for task in tasks if not task.done()}
    while waiting:
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=CANCEL_AGAIN_SECONDS)


async def within(reading: Awaitable[T], seconds: float) -> T | None:
    """Return what was read, None if it takes longer or cannot be read now; the reading itself goes on."""
    task = asyncio.ensure_future(reading)
    # Nobody may be there any more to look at its error.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait([task], timeout=seconds)
    return None if not task.done() or isinstance(task.exception(), Unavailable) else task.result()
