"""Cancelling an order, and giving back what it has paid."""

from collections.abc import Callable

import pytest

from expediter.errors import MoneyInFlight, StaleLease
from expediter.orders.commands import FulfilmentOutcome
from expediter.orders.order import JobKind, PaymentOutcome, PaymentStatus, Stages, Status
from strategies import FAILURES_MAX, NOON, SECOND, Story, cancelled_after_payment, failed, paid, unknown


@pytest.mark.parametrize("action", [Story.cancel, Story.delete])
def test_nothing_is_cancelled_or_deleted_while_money_is_in_flight(action: Callable[..., None]) -> None:
    """An order is neither cancelled nor deleted while a charge is open or unknown."""
    open_charge = Story.of()
    open_charge.claim()
    for story in (open_charge, unknown()):
        with pytest.raises(MoneyInFlight):
            action(story)


def test_a_parked_fulfilment_is_cancelled_with_a_refund() -> None:
    """A paid order whose fulfilment is parked can be cancelled; the money goes back."""
    story = paid()
    story.claim()
    story.park()
    story.cancel()
    story.give_back()

    assert (story.order.status, story.order.payment_status) == (Status.CANCELLED, PaymentStatus.REFUNDED)


def test_an_unpaid_order_is_cancelled_at_once() -> None:
    """Cancelling before any charge leaves nothing to do."""
    story = Story.of()
    story.wait(SECOND)
    story.cancel()

    assert story.order.status is Status.CANCELLED
    assert story.order.cancelled_at == NOON + SECOND
    assert story.job is None


@pytest.mark.parametrize(
    "make", [paid, failed, lambda: paid(Stages.PAYMENT)], ids=["confirmed", "failed", "payment"]
)
def test_a_paid_order_is_cancelled_with_a_refund(make: Callable[[], Story]) -> None:
    """Cancelling a paid order asks the gateway for the money back; until then it is refund_pending."""
    story = make()
    story.cancel()
    assert (story.order.status, story.order.payment_status) == (Status.CANCELLED, PaymentStatus.REFUND_PENDING)
    assert story.order.completed_at is None
    assert story.job is not None
    assert story.job.kind is JobKind.REFUND

    story.give_back()

    assert story.order.payment_status is PaymentStatus.REFUNDED
    assert [attempt.action for attempt in story.attempts.values()] == ["charge", "refund"]
    assert story.attempts[2].amount_minor == 2598
    assert story.job is None


@pytest.mark.parametrize("outcome", [PaymentOutcome.UNAVAILABLE, PaymentOutcome.UNKNOWN])
def test_a_refund_is_tried_until_it_is_answered(outcome: PaymentOutcome) -> None:
    """A refund that the gateway did not take or did not answer is asked for again, however often."""
    story = cancelled_after_payment()
    for _ in range(2 * FAILURES_MAX):
        story.claim()
        story.refund(outcome)
        assert story.order.payment_status is PaymentStatus.REFUND_PENDING
    story.give_back()

    assert story.order.payment_status is PaymentStatus.REFUNDED


def test_a_worker_whose_order_was_cancelled_commits_nothing() -> None:
    """Cancelling an order takes its job away from the worker that holds it."""
    story = paid()
    story.claim()
    fence = story.fence
    story.cancel()

    with pytest.raises(StaleLease):
        story.fulfilment(FulfilmentOutcome.DONE, fence=fence)
    assert story.order.status is Status.CANCELLED
