"""Back-off and the circuit breaker, with the clock and the dice in the test's hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expediter.orders.resilience import BACKOFF_BASE, BACKOFF_CAP, PROBE_LEASE, Breaker, backoff

THRESHOLD = 5
RECOVERY = 60_000_000
NOON = 1_767_268_800_000_000

dice = st.floats(min_value=0, max_value=1, exclude_max=True)
failures = st.integers(min_value=1, max_value=10_000)


def fail(breaker: Breaker, now: int = NOON, times: int = 1, *, probe: bool = False) -> Breaker:
    for _ in range(times):
        breaker = breaker.after_failure(now, threshold=THRESHOLD, recovery=RECOVERY, probe=probe)
    return breaker


OPEN = fail(Breaker(), times=THRESHOLD)


@given(failures=failures, random=dice)
def test_a_delay_is_between_nothing_and_the_cap(failures: int, random: float) -> None:
    """However many failures there were, the delay is whole microseconds from 0 to the cap."""
    delay = backoff(failures, random)

    assert type(delay) is int
    assert 0 <= delay <= BACKOFF_CAP


@given(failures=failures, random=dice)
def test_delays_grow_with_the_failures(failures: int, random: float) -> None:
    """With the same dice one failure more never makes the delay shorter."""
    assert backoff(failures, random) <= backoff(failures + 1, random)


@given(failures=failures, random=dice)
def test_the_dice_decide_over_the_whole_range(failures: int, random: float) -> None:
    """The jitter is full: a delay may be anything down to zero, in proportion to the dice."""
    assert backoff(failures, 0.0) == 0
    assert backoff(failures, random / 2) <= backoff(failures, random)


def test_delays_double_until_the_cap() -> None:
    """The longest delay is one second after the first failure, doubles with each, and stops at thirty."""
    longest = [round(backoff(failures, 0.999_999_999) / 1_000_000) for failures in range(1, 8)]

    assert longest == [1, 2, 4, 8, 16, 30, 30]
    assert BACKOFF_BASE == 1_000_000


@pytest.mark.parametrize("times", range(THRESHOLD))
def test_the_breaker_stays_closed_below_its_threshold(times: int) -> None:
    """Fewer consecutive failures than the threshold leave the breaker closed."""
    breaker = fail(Breaker(), times=times)

    assert breaker.state == "closed"
    assert not breaker.may_probe(NOON + 10 * RECOVERY)


def test_the_breaker_opens_at_its_threshold() -> None:
    """The fifth consecutive failure opens the breaker for the recovery time."""
    assert OPEN.state == "open"
    assert OPEN.open_until == NOON + RECOVERY


def test_a_success_starts_the_count_again() -> None:
    """Failures count only while they are consecutive."""
    breaker = fail(fail(Breaker(), times=THRESHOLD - 1).after_success(), times=THRESHOLD - 1)

    assert breaker.state == "closed"


def test_nobody_probes_before_the_recovery_time_is_over() -> None:
    """The first probe may be sent when the recovery time is over, and not a microsecond before."""
    assert not OPEN.may_probe(NOON + RECOVERY - 1)
    assert OPEN.may_probe(NOON + RECOVERY)


def test_a_half_open_breaker_lets_one_probe_through() -> None:
    """While a probe is out no other is sent."""
    now = NOON + RECOVERY
    breaker = OPEN.probing("worker-1", now)

    assert breaker.state == "half_open"
    assert not breaker.may_probe(now)
    assert not breaker.may_probe(now + PROBE_LEASE - 1)


def test_a_probe_that_never_comes_back_is_replaced() -> None:
    """When the lease of a probe is over, another may be sent."""
    breaker = OPEN.probing("worker-1", NOON + RECOVERY)

    assert breaker.may_probe(NOON + RECOVERY + PROBE_LEASE)


def test_a_successful_probe_closes_the_breaker() -> None:
    """After a successful probe the breaker is as new."""
    assert OPEN.probing("worker-1", NOON + RECOVERY).after_success() == Breaker()


def test_a_failed_probe_opens_the_breaker_anew() -> None:
    """After a failed probe the whole recovery time runs again, and then one probe is let through."""
    failed_at = NOON + RECOVERY + 3_000_000
    breaker = fail(OPEN.probing("worker-1", NOON + RECOVERY), failed_at, probe=True)

    assert breaker.state == "open"
    assert breaker.open_until == failed_at + RECOVERY
    assert not breaker.may_probe(failed_at + RECOVERY - 1)
    assert breaker.may_probe(failed_at + RECOVERY)


@given(times=st.integers(min_value=1, max_value=50), later=st.integers(min_value=0, max_value=10 * RECOVERY))
def test_late_failures_do_not_keep_the_breaker_open(times: int, later: int) -> None:
    """Calls that were under way when the breaker opened do not prolong it when they fail."""
    late = fail(OPEN, NOON + later, times)

    assert late.state == "open"
    assert late.open_until == OPEN.open_until


def test_a_late_failure_is_not_the_probe_s() -> None:
    """While a probe is out, an older call that fails neither ends the probe nor prolongs anything."""
    half_open = OPEN.probing("worker-1", NOON + RECOVERY)
    late = fail(half_open, NOON + RECOVERY + 1)

    assert late.state == "half_open"
    assert (late.open_until, late.probe_until) == (half_open.open_until, half_open.probe_until)


class SharedBreaker(RuleBasedStateMachine):
    """Many processes call, fail, succeed and probe while the clock goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOON
        self.breaker = Breaker()
        self.consecutive = 0
        self.probe_sent_at: int | None = None

    @rule(microseconds=st.integers(min_value=0, max_value=2 * RECOVERY))
    def time_passes(self, microseconds: int) -> None:
        self.now += microseconds

    @rule()
    def a_call_fails(self) -> None:
        self.breaker = fail(self.breaker, self.now)
        self.consecutive += 1

    @precondition(lambda self: self.probe_sent_at is not None)
    @rule()
    def the_probe_fails(self) -> None:
        self.breaker = fail(self.breaker, self.now, probe=True)
        self.consecutive += 1
        self.probe_sent_at = None

    @rule()
    def a_call_succeeds(self) -> None:
        self.breaker = self.breaker.after_success()
        self.consecutive = 0
        self.probe_sent_at = None

    @precondition(lambda self: self.breaker.may_probe(self.now))
    @rule(holder=st.sampled_from(["worker-1", "worker-2"]))
    def a_probe_is_sent(self, holder: str) -> None:
        if self.probe_sent_at is not None:
            assert self.now >= self.probe_sent_at + PROBE_LEASE
        self.breaker = self.breaker.probing(holder, self.now)
        self.probe_sent_at = self.now

    @invariant()
    def it_is_closed_exactly_below_the_threshold(self) -> None:
        assert (self.breaker.state == "closed") == (self.consecutive < THRESHOLD)

    @invariant()
    def it_is_half_open_exactly_while_a_probe_is_out(self) -> None:
        assert (self.breaker.state == "half_open") == (self.probe_sent_at is not None)

    @invariant()
    def it_always_lets_a_probe_through_in_the_end(self) -> None:
        if self.breaker.state != "closed":
            assert self.breaker.may_probe(self.now + RECOVERY + PROBE_LEASE)


TestSharedBreaker = SharedBreaker.TestCase
