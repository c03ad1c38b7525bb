"""What the gateway says by itself: only what is about the order's current key moves it."""

from __future__ import annotations

import pytest

from expediter.errors import UnknownPayment
from expediter.orders.order import PaymentOutcome, PaymentStatus, Status
from strategies import declined, paid


@pytest.mark.parametrize("outcome", [PaymentOutcome.SUCCEEDED, PaymentOutcome.AUTHORIZED])
def test_money_taken_under_a_key_that_was_declined_is_shown_and_moves_nothing(outcome: PaymentOutcome) -> None:
    """A person has to look: the order may be charged under its next key. Said again, nothing is added."""
    story = declined()
    story.hear(outcome, generation=1)
    assert (story.order.status, story.order.payment_status) == (Status.PAYMENT_FAILED, PaymentStatus.DECLINED)
    assert story.events[-1].type == "payment.contradicted"
    assert story.order.last_error is not None and "look it up there" in story.order.last_error
    version = story.order.version
    story.hear(outcome, generation=1)
    assert story.order.version == version


def test_a_late_decline_of_an_old_key_changes_nothing() -> None:
    """The order is charged under a new key by then."""
    story = declined()
    story.retry()
    story.claim()
    version = story.order.version
    story.hear(PaymentOutcome.DECLINED, generation=1)
    assert story.order.version == version
    story.payment(PaymentOutcome.SUCCEEDED)
    assert story.order.payment_status is PaymentStatus.PAID


def test_a_key_of_nobody_is_unknown() -> None:
    """No order has asked for it."""
    with pytest.raises(UnknownPayment):
        paid().hear(PaymentOutcome.SUCCEEDED, generation=7)
