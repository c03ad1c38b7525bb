"""Background work: it begins again after a failure, ends when told, and says when it has ended by itself."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from expediter.backends.tasks import Background, Pauses, within
from expediter.errors import DatabaseUnavailable
from serving import PATIENCE_SECONDS


async def test_work_that_fails_begins_again_and_the_log_shows_the_whole_error() -> None:
    """An error that nobody foresaw is logged with its traceback, and the work goes on."""
    begun = 0
    again = asyncio.Event()

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise KeyError("unforeseen")
        again.set()
        await background.rest(60)

    background = Background("test work", work)
    with capture_logs() as logs:
        background.start()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await again.wait()
        assert not background.ended
        await background.stop()
    assert [(entry["work"], entry["exc_info"]) for entry in logs] == [("test work", True)] * 2
    assert begun == 3
    assert not background.ended, "it was told to stop"


async def test_work_that_returns_by_itself_has_ended() -> None:
    """Nobody told it to stop, and nobody does the work any more."""

    async def work() -> None:
        pass

    background = Background("test work", work)
    assert not background.ended, "it was never started"
    background.start()
    while background.running:
        await asyncio.sleep(0)
    assert background.ended


async def test_a_stop_before_the_start_and_a_second_stop_are_fine() -> None:
    """Stopping is always safe, and a stopped work can be started anew."""
    rested = 0

    async def work() -> None:
        nonlocal rested
        await background.rest(60)
        rested += 1

    background = Background("test work", work)
    await background.stop()
    for _ in range(2):
        background.start()
        background.start()
        await asyncio.sleep(0)
        await background.stop()
        await background.stop(grace_seconds=0)
    assert rested == 2


async def test_work_that_does_not_listen_is_cancelled_after_its_grace() -> None:
    """A stop takes no longer than its grace."""
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    background = Background("test work", work)
    background.start()
    await asyncio.sleep(0)
    await background.stop(grace_seconds=0.01)
    assert cancelled.is_set()
    assert not background.running


def test_pauses_double_up_to_the_last_and_begin_anew() -> None:
    """Each pause is twice the one before, and never above the last."""
    pauses = Pauses(0.1, 0.5)
    assert [pauses.next() for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    pauses.reset()
    assert pauses.next() == 0.1


async def test_a_reading_within_a_time() -> None:
    """What comes in time is returned, what is late or away is None, and a bug is raised."""

    async def read(error: Exception | None = None) -> str:
        if error is not None:
            raise error
        return "read"

    assert await within(read(), 30) == "read"
    assert await within(asyncio.get_running_loop().create_future(), 0.01) is None
    assert await within(read(DatabaseUnavailable("away")), 30) is None
    with pytest.raises(KeyError):
        await within(read(KeyError("a bug")), 30)


async def test_a_cancellation_that_is_lost_does_not_keep_a_stop_from_its_end() -> None:
    """A library in the work took the cancellation for its own: the work goes on, and is cancelled again."""
    went_on = False

    async def work() -> None:
        nonlocal went_on
        with suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        went_on = True
        await asyncio.get_running_loop().create_future()

    background = Background("test work", work)
    background.start()
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await background.stop(grace_seconds=0)
    assert went_on
    assert not background.running
