"""Deleting an order: what is gone then, and which orders have to stay."""

from collections.abc import Callable

import pytest

from expediter.errors import MoneyInFlight, OrderNotFound, StaleLease
from expediter.orders.commands import FulfilmentOutcome
from expediter.orders.events import replay
from expediter.orders.order import Stages
from strategies import Story, cancelled_after_payment, declined, failed, in_fulfilment, paid


def test_a_deleted_order_is_gone() -> None:
    """After its deletion an order is not found, and its worker commits nothing."""
    story = in_fulfilment()
    fence = story.fence
    story.delete()

    assert (story.current, story.job) == (None, None)
    assert replay(story.events) is None
    with pytest.raises(StaleLease):
        story.fulfilment(FulfilmentOutcome.DONE, fence=fence)
    with pytest.raises(OrderNotFound):
        story.cancel()


@pytest.mark.parametrize("make", [paid, failed], ids=["confirmed", "failed"])
def test_a_paid_order_is_not_deleted_before_its_end(make: Callable[[], Story]) -> None:
    """Deleting an order that was paid for and not delivered would lose the money's trace."""
    with pytest.raises(MoneyInFlight, match="cancel it before deleting it"):
        make().delete()


def test_an_order_at_its_end_is_deleted() -> None:
    """A completed order, on either road that charges, and a refunded one may be deleted."""
    completed, refunded = paid(), cancelled_after_payment()
    completed.fulfil()
    refunded.give_back()
    for story in (completed, refunded, paid(Stages.PAYMENT), declined()):
        story.delete()
        assert story.current is None
