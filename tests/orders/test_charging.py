"""What becomes of an order by what the gateway says to its charge, or does not say."""

import pytest

from expediter.errors import MoneyInFlight, StaleLease
from expediter.orders.commands import FulfilmentOutcome
from expediter.orders.order import JobKind, PaymentOutcome, PaymentStatus, Status, gateway_key
from strategies import FAILURES_MAX, LEASE, NOON, ORDER_ID, SECOND, Story, unknown


def test_the_worker_that_charged_may_fulfil_at_once() -> None:
    """A worker that asks for it keeps the order after the charge, under a new fence."""
    story = Story.of()
    story.claim()
    fence = story.fence
    story.payment(PaymentOutcome.SUCCEEDED, lease=LEASE)

    assert story.order.status is Status.PROCESSING
    assert story.job is not None
    assert (story.job.kind, story.job.holder, story.job.due_at) == (JobKind.FULFIL, "worker", NOON + LEASE)
    with pytest.raises(StaleLease):
        story.fulfilment(FulfilmentOutcome.DONE, fence=fence)
    story.fulfilment(FulfilmentOutcome.DONE)
    assert story.statuses == ["pending", "payment_processing", "confirmed", "processing", "completed"]


def test_an_unavailable_gateway_is_tried_again_under_the_same_key() -> None:
    """Mere unavailability costs time: the same key is used until an answer is definite."""
    story = Story.of()
    for _ in range(FAILURES_MAX - 1):
        story.claim()
        story.payment(PaymentOutcome.UNAVAILABLE)
    assert story.job is not None
    assert story.job.due_at == story.now + SECOND
    story.pay()

    assert story.outcomes == ["unavailable", "unavailable", "succeeded"]
    assert len(set(story.keys)) == 1


def test_exhausted_attempts_fail_the_payment_and_keep_the_key() -> None:
    """After the last attempt the order is payment_failed; a retry begins anew under the same key."""
    story = Story.of()
    for _ in range(FAILURES_MAX):
        story.claim()
        story.payment(PaymentOutcome.UNAVAILABLE)
    assert story.order.status is Status.PAYMENT_FAILED
    assert story.job is None

    story.retry()
    story.claim()
    story.payment(PaymentOutcome.UNAVAILABLE)
    assert story.order.status is Status.PAYMENT_PROCESSING
    story.pay()

    assert len(set(story.keys)) == 1


def test_a_probe_of_an_open_breaker_spends_no_attempt() -> None:
    """However many probes fail, the order has all its attempts left."""
    story = Story.of()
    for _ in range(5 * FAILURES_MAX):
        story.claim()
        story.payment(PaymentOutcome.UNAVAILABLE, counts=False)
    assert story.job is not None
    assert story.job.failures == 0

    for _ in range(FAILURES_MAX - 1):
        story.claim()
        story.payment(PaymentOutcome.UNAVAILABLE)
    assert story.order.status is Status.PAYMENT_PROCESSING


def test_a_crash_during_the_charge_is_unknown_until_it_is_settled() -> None:
    """Whoever takes the order over finds the open intent, sends nothing new, and settles the same attempt."""
    story = unknown()
    assert story.order.payment_status is PaymentStatus.UNKNOWN
    assert story.outcomes == ["unknown"]

    story.payment(PaymentOutcome.SUCCEEDED)

    assert (story.order.status, story.order.payment_status) == (Status.CONFIRMED, PaymentStatus.PAID)
    assert story.outcomes == ["succeeded"]


def test_an_unknown_charge_may_turn_out_declined() -> None:
    """An unknown outcome that the gateway calls declined fails the payment, and the retry has a new key."""
    story = unknown()
    story.payment(PaymentOutcome.DECLINED)
    story.retry()
    story.claim()

    assert story.outcomes == ["declined", None]
    assert story.keys == [gateway_key(ORDER_ID, 1), gateway_key(ORDER_ID, 2)]


def test_an_unknown_charge_is_asked_about_for_as_long_as_it_takes() -> None:
    """Attempts do not run out while the outcome is unknown; nothing new is sent meanwhile."""
    story = unknown()
    for _ in range(3 * FAILURES_MAX):
        story.payment(PaymentOutcome.UNKNOWN)
        story.claim()

    assert (story.order.status, story.order.payment_status) == (Status.PAYMENT_PROCESSING, PaymentStatus.UNKNOWN)
    assert len(story.attempts) == 1


@pytest.mark.parametrize("times", [1, FAILURES_MAX])
@pytest.mark.parametrize("counts", [True, False])
def test_an_unknown_charge_stays_unknown_while_the_gateway_is_away(times: int, counts: bool) -> None:
    """That the gateway cannot be asked says nothing about the charge: it is still unknown, and not cancellable."""
    story = unknown()
    for _ in range(times):
        story.payment(PaymentOutcome.UNAVAILABLE, counts=counts)
        assert story.order.payment_status is PaymentStatus.UNKNOWN
        story.claim()

    assert story.order.status is Status.PAYMENT_PROCESSING
    with pytest.raises(MoneyInFlight):
        story.cancel()


def test_an_unforeseen_error_during_the_charge_is_unknown() -> None:
    """A charge whose worker gave up with an error may have gone out, so the next worker settles it first."""
    story = Story.of()
    story.claim()
    story.fail("KeyError")
    assert story.order.charge_open
    assert story.order.last_error == "KeyError"

    story.claim()

    assert story.order.payment_status is PaymentStatus.UNKNOWN
    assert len(story.attempts) == 1
