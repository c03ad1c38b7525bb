"""Retrying an order that was declined, has failed or is parked."""

import pytest

from expediter.errors import Conflict
from expediter.orders.order import PaymentStatus, Status, gateway_key
from strategies import CLAIMS_MAX, ORDER_ID, Story, cancelled_after_payment, declined, in_fulfilment, paid


def test_a_declined_order_rests_until_it_is_retried_under_a_new_key() -> None:
    """A definite decline uses the key up; the retry charges under the next one."""
    story = declined()
    assert (story.order.status, story.order.payment_status) == (Status.PAYMENT_FAILED, PaymentStatus.DECLINED)
    assert story.order.last_error == "the gateway: declined"
    assert story.job is None

    story.retry()
    assert (story.order.status, story.order.payment_status) == (Status.PAYMENT_PROCESSING, PaymentStatus.PENDING)
    story.pay()

    assert story.order.payment_status is PaymentStatus.PAID
    assert story.keys == [gateway_key(ORDER_ID, 1), gateway_key(ORDER_ID, 2)]
    assert story.order.last_error is None


def test_a_parked_order_is_revived_by_a_retry() -> None:
    """One retry makes a parked job due again with all its claims, and the road goes on to its end."""
    story = Story.of()
    for _ in range(CLAIMS_MAX):
        story.crash()
    story.claim()
    story.retry()
    assert story.job is not None
    assert (story.job.dead_at, story.job.due_at, story.job.claims) == (None, story.now, 0)

    story.pay()
    story.fulfil()

    assert story.order.status is Status.COMPLETED
    assert story.outcomes == ["succeeded"]


def test_a_parked_refund_is_revived_by_a_retry() -> None:
    """A refund that was set aside is taken up again by a retry of the cancelled order."""
    story = cancelled_after_payment()
    story.claim()
    story.park()
    assert not story.order.at_rest

    story.retry()
    story.give_back()

    assert (story.order.payment_status, story.job) == (PaymentStatus.REFUNDED, None)


def test_only_failed_and_parked_orders_are_retried() -> None:
    """A retry of an order that is on its way, or at its end, is refused."""
    done = paid()
    done.fulfil()
    for story in (Story.of(), paid(), in_fulfilment(), done, cancelled_after_payment()):
        with pytest.raises(Conflict, match="only a failed or parked order can be retried"):
            story.retry()
