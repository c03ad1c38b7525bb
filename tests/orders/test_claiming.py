"""Claiming the job of an order, holding it under a fence, giving it back and setting it aside."""

import pytest

from expediter.errors import MoneyInFlight, StaleLease
from expediter.orders.commands import ClaimJob, FulfilmentOutcome
from expediter.orders.order import PaymentOutcome, PaymentStatus, gateway_key
from strategies import CLAIMS_MAX, LEASE, ORDER_ID, SECOND, Story


def test_the_intent_to_charge_is_stored_before_the_call() -> None:
    """Claiming a charge stores the attempt with its key and amount, and no outcome."""
    story = Story.of()
    story.claim()

    attempt = story.attempts[1]
    assert (attempt.action, attempt.amount_minor, attempt.currency) == ("charge", 2598, "EUR")
    assert attempt.gateway_key == gateway_key(ORDER_ID, 1)
    assert attempt.outcome is None
    assert story.order.charge_open


def test_an_order_that_kills_its_workers_is_parked() -> None:
    """After too many claims without an outcome the order is set aside, visibly, and no longer claimed."""
    story = Story.of()
    for _ in range(CLAIMS_MAX):
        story.crash()
    story.claim()

    assert story.job is not None
    assert story.job.dead_at == story.now
    assert story.order.last_error == f"gave up after {CLAIMS_MAX} claims without an outcome"
    assert story.order.payment_status is PaymentStatus.UNKNOWN
    assert not story.order.at_rest
    story.wait(10**15)
    with pytest.raises(StaleLease):
        story.give(ClaimJob(order_id=ORDER_ID, holder="worker", lease=LEASE, claims_max=CLAIMS_MAX))


def test_a_parked_charge_is_unknown() -> None:
    """An order that is parked in the middle of a charge cannot be cancelled before the charge is settled."""
    story = Story.of()
    story.claim()
    story.park()

    assert story.outcomes == ["unknown"]
    with pytest.raises(MoneyInFlight):
        story.cancel()


def test_a_job_that_was_given_back_unused_costs_nothing() -> None:
    """A charge that was never sent is recorded as such, spends no claim, and is charged later under its key."""
    story = Story.of()
    for _ in range(2 * CLAIMS_MAX):
        story.claim()
        story.release(SECOND)
    assert story.job is not None
    assert (story.job.claims, story.job.failures) == (0, 0)
    assert not story.order.charge_open

    story.pay()

    assert story.outcomes == ["not_sent"] * 2 * CLAIMS_MAX + ["succeeded"]
    assert len(set(story.keys)) == 1


def test_a_worker_that_was_paused_past_its_lease_commits_nothing() -> None:
    """A report after the end of the lease is refused even if nobody has taken over yet."""
    story = Story.of()
    story.claim()
    story.wait(LEASE)
    before = (story.order, story.job)

    with pytest.raises(StaleLease):
        story.payment(PaymentOutcome.SUCCEEDED)
    assert (story.order, story.job) == before


def test_a_worker_that_was_overtaken_commits_nothing() -> None:
    """A report under an older fence is refused."""
    story = Story.of()
    story.claim()
    fence = story.fence
    story.wait_until_due()
    story.claim()

    with pytest.raises(StaleLease):
        story.payment(PaymentOutcome.DECLINED, fence=fence)


def test_a_job_is_held_by_one_worker() -> None:
    """A second claim is refused while the first one's lease runs."""
    story = Story.of()
    story.claim()

    with pytest.raises(StaleLease):
        story.give(ClaimJob(order_id=ORDER_ID, holder="other", lease=LEASE, claims_max=CLAIMS_MAX))


def test_a_job_is_not_claimed_before_it_is_due() -> None:
    """Back-off is kept: the job is claimed at its time and not a microsecond before."""
    story = Story.of()
    story.claim()
    story.payment(PaymentOutcome.UNAVAILABLE)
    claim = ClaimJob(order_id=ORDER_ID, holder="worker", lease=LEASE, claims_max=CLAIMS_MAX)

    story.wait(SECOND - 1)
    with pytest.raises(StaleLease):
        story.give(claim)
    story.wait(1)
    story.give(claim)
    assert story.order.charge_open


@pytest.mark.parametrize("outcome", list(FulfilmentOutcome))
def test_a_job_is_reported_as_what_it_is(outcome: FulfilmentOutcome) -> None:
    """Whoever holds a charge cannot report a fulfilment."""
    story = Story.of()
    story.claim()

    with pytest.raises(StaleLease):
        story.fulfilment(outcome)
