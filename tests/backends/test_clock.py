"""A server's clock, followed: never ahead, never back, seldom asked."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from expediter.backends.databases.clock import ANSWER_TAKES_MAX, GOOD_FOR, ServerClock


class Server:
    """A server and a machine whose clocks run alike, and a line between them that takes its time."""

    def __init__(self) -> None:
        self.here = 7
        self.ahead = 1_700_000_000_000_000
        self.asked = 0
        self.way = (100, 100)

    @property
    def time(self) -> int:
        return self.here + self.ahead

    async def ask(self) -> int:
        there, back = self.way
        self.asked += 1
        self.here += there
        told = self.time
        self.here += back
        return told


def look(clock: ServerClock, server: Server) -> int:
    """Return by how much the clock is behind its server, in microseconds."""
    told = asyncio.run(clock.now(server.ask))
    return server.time - told


#: What passes before a look, and how long the line takes there and back, in microseconds.
looks = st.lists(st.tuples(st.integers(0, 400_000), st.integers(0, 80_000), st.integers(0, 80_000)), max_size=50)


@given(looks)
def test_it_is_never_ahead_and_never_goes_back(times: list[tuple[int, int, int]]) -> None:
    """Whatever the line takes, a look tells no time that has not come, none before the last, none long past."""

    async def look_often() -> None:
        server = Server()
        clock = ServerClock(lambda: server.here)
        last = 0
        for passed, there, back in times:
            server.here += passed
            server.way = (there, back)
            asked = server.asked
            told = await clock.now(server.ask)
            assert last <= told <= server.time
            if server.asked == asked:
                assert server.time - told <= ANSWER_TAKES_MAX
            last = told

    asyncio.run(look_often())


def test_it_asks_twice_a_second() -> None:
    """Ten seconds of looks, a thousand a second, ask the server twenty times."""
    server = Server()
    clock = ServerClock(lambda: server.here)

    async def look_often() -> None:
        for _ in range(10_000):
            server.here += 1_000
            await clock.now(server.ask)

    asyncio.run(look_often())
    assert 10_000_000 / GOOD_FOR - 1 <= server.asked <= 10_000_000 / GOOD_FOR + 1


def test_an_answer_that_took_long_is_not_kept() -> None:
    """After a pause amid the question, of the process or of the server, the next look asks again."""
    server = Server()
    clock = ServerClock(lambda: server.here)
    server.way = (100, 60_000_000)
    assert look(clock, server) == 60_000_000
    server.way = (100, 100)
    assert look(clock, server) == 100
    assert server.asked == 2


def test_a_clock_that_is_set_is_followed() -> None:
    """An hour back or forth at the server is told after half a second at the latest."""
    server = Server()
    clock = ServerClock(lambda: server.here)
    asyncio.run(clock.now(server.ask))
    for set_by in (-3_600_000_000, 3_600_000_000):
        server.ahead += set_by
        server.here += GOOD_FOR
        assert look(clock, server) == 100


def test_two_who_ask_at_once_keep_the_better_answer() -> None:
    """Of two questions on their way together the answer that was faster counts, whichever comes last."""
    server = Server()
    clock = ServerClock(lambda: server.here)

    async def both() -> None:
        slow_may_end = asyncio.Event()

        async def slow() -> int:
            told = server.time
            await slow_may_end.wait()
            return told

        first = asyncio.create_task(clock.now(slow))
        await asyncio.sleep(0)
        server.here += 10_000
        await clock.now(server.ask)
        slow_may_end.set()
        await first

    asyncio.run(both())
    assert look(clock, server) == 100
    assert server.asked == 1
