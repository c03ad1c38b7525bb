"""When a process takes the gateway to be down: in a row as the calls end, judged by as many as are under way."""

from __future__ import annotations

import heapq
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expediter.orders.resilience import CallWatch

THRESHOLD = 5
HOUR = 3600.0


def openings(rng: Random, *, at_once: int, failing: float, seconds: float, latency: tuple[float, float]) -> int:
    """How often a gateway that fails independently is taken to be down, with so many calls always under way."""
    watch = CallWatch(THRESHOLD)
    under_way = [(rng.uniform(*latency), watch.begin()) for _ in range(at_once)]
    heapq.heapify(under_way)
    found = 0
    while under_way[0][0] < seconds:
        ended, known = under_way[0]
        if watch.end(known, failed=rng.random() < failing):
            found += 1
            watch.forget()
        heapq.heapreplace(under_way, (ended + rng.uniform(*latency), watch.begin()))
    return found


@pytest.mark.parametrize("failing", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("at_once", [25, 400])
def test_many_calls_that_fail_now_and_then_never_open_it(at_once: int, failing: float) -> None:
    """An hour of independent failures, of up to one call in five, is never taken for a gateway that is down."""
    # As many calls as an hour of the simulated gateway's own times (50 to 200 ms) brings, at 400 a tenth of them.
    seconds = HOUR if at_once == 25 else HOUR / 10
    rng = Random(f"{at_once} {failing}")
    assert openings(rng, at_once=at_once, failing=failing, seconds=seconds, latency=(0.05, 0.2)) == 0


@pytest.mark.parametrize("failing", [0.2, 0.5])
def test_a_lone_caller_has_exactly_five_in_a_row(failing: float) -> None:
    """With one call at a time it opens whenever five failures have come in a row, and only then."""
    watch, rng, row = CallWatch(THRESHOLD), Random(1), 0
    for _ in range(20_000):
        failed = rng.random() < failing
        row = row + 1 if failed else 0
        assert watch.end(watch.begin(), failed=failed) == (row >= THRESHOLD)


@given(at_once=st.integers(1, 500), healthy=st.integers(0, 2000))
def test_a_gateway_that_goes_down_is_noticed_by_those_under_way(at_once: int, healthy: int) -> None:
    """After any number of successes, at most five calls end, or as many as were under way, until it is known."""
    watch = CallWatch(THRESHOLD)
    known = [watch.begin() for _ in range(at_once)]
    for _ in range(healthy):
        assert not watch.end(known.pop(0), failed=False)
        known.append(watch.begin())
    ended = 0
    while not watch.end(known.pop(0), failed=True):
        ended += 1
        known.append(watch.begin())
        assert ended < max(THRESHOLD, at_once)


def test_a_success_between_them_starts_the_count_again() -> None:
    """Four failures, a success and four failures are no five in a row; what tells nothing counts as neither."""
    watch = CallWatch(THRESHOLD)
    for failed in [True] * 4 + [False] + [True] * 2 + [None] + [True] * 2:
        assert not watch.end(watch.begin(), failed=failed)
    assert watch.end(watch.begin(), failed=True)
