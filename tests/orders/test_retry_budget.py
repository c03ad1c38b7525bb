"""How many calls are made again while the gateway fails, and that none is held back once it is well."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expediter.orders.resilience import RETRIES_PER_CALL, RETRY_BURST, RETRY_SECONDS, WELL_CALLS, RetryBudget

STEPS = st.lists(st.sampled_from(["first", "retry", "second"]), max_size=2_000)


def failing() -> RetryBudget:
    """Return the budget of a process whose last calls all failed."""
    budget = RetryBudget()
    for _ in range(WELL_CALLS):
        budget.end(failed=True)
    return budget


@given(STEPS)
def test_a_failing_gateway_gets_no_more_than_the_burst_and_a_tenth(steps: list[str]) -> None:
    """Whatever comes when, and one in each second."""
    budget, now, calls, retries = failing(), 0.0, 0, 0
    for step in steps:
        if step == "first":
            budget.first()
            calls += 1
        elif step == "second":
            now += 1.0
        else:
            retries += budget.take(now)
    assert retries <= RETRY_BURST + calls * RETRIES_PER_CALL + now / RETRY_SECONDS + 1


def test_every_order_gets_its_turn() -> None:
    """With nothing left one call goes out a second; so a quiet shop's orders are not forgotten."""
    budget = failing()
    assert sum(budget.take(0.0) for _ in range(1_000)) == RETRY_BURST
    assert [budget.take(second / 2) for second in range(6)] == [False, False, True, False, True, False]


def test_a_gateway_that_is_well_again_gets_all_of_them() -> None:
    """Nothing is held back after the breaker's probe, nor after enough calls that went well."""
    budget = failing()
    assert not all(budget.take(0.0) for _ in range(1_000))
    budget.forget()
    assert all(budget.take(0.0) for _ in range(1_000))
    budget = failing()
    for _ in range(WELL_CALLS):
        budget.end(failed=False)
    assert all(budget.take(0.0) for _ in range(1_000))
