"""Placing an order, and the road that it takes from there, stage by stage."""

import pytest

from expediter.errors import DuplicateOrder
from expediter.orders.order import PaymentStatus, Stages
from strategies import NOON, SECOND, Story, place_order


def test_the_whole_road() -> None:
    """An order is charged, confirmed, fulfilled and completed."""
    story = Story.of(Stages.PAYMENT_FULFILMENT)
    story.wait(SECOND)
    story.pay()
    story.wait(SECOND)
    story.fulfil()

    assert story.statuses == ["pending", "payment_processing", "confirmed", "processing", "completed"]
    assert story.order.payment_status is PaymentStatus.PAID
    assert story.outcomes == ["succeeded"]
    assert story.attempts[1].reference == "ch_1"
    assert (story.order.processing_started_at, story.order.completed_at) == (NOON + SECOND, NOON + 2 * SECOND)
    assert story.job is None


def test_the_payment_road_ends_when_the_order_is_confirmed() -> None:
    """On the payment road a paid order is complete: it has its end time and no further job."""
    story = Story.of(Stages.PAYMENT)
    story.wait(SECOND)
    story.pay()

    assert story.statuses == ["pending", "payment_processing", "confirmed"]
    assert story.order.completed_at == NOON + SECOND
    assert story.order.at_rest
    assert story.job is None


@pytest.mark.parametrize("total_minor", [0, 2598])
def test_the_fulfilment_road_never_meets_the_gateway(total_minor: int) -> None:
    """On the fulfilment road no payment is due, whatever the order is worth."""
    story = Story.of(Stages.FULFILMENT, total_minor)
    story.fulfil()

    assert story.statuses == ["pending", "processing", "completed"]
    assert story.order.payment_status is PaymentStatus.NOT_REQUIRED
    assert story.attempts == {}
    assert story.job is None


@pytest.mark.parametrize("priced", [True, False])
def test_an_order_without_a_total_skips_payment(priced: bool) -> None:
    """Where there is nothing to pay, the whole road leads straight to fulfilment."""
    story = Story.of(Stages.PAYMENT_FULFILMENT, 0, priced)
    story.fulfil()

    assert story.statuses == ["pending", "processing", "completed"]
    assert story.order.payment_status is PaymentStatus.NOT_REQUIRED
    assert story.attempts == {}


@pytest.mark.parametrize("priced", [True, False])
def test_an_order_without_a_total_is_confirmed_on_the_payment_road(priced: bool) -> None:
    """Where there is nothing to pay, the payment road confirms the order without calling the gateway."""
    story = Story.of(Stages.PAYMENT, 0, priced)
    story.claim()

    assert story.statuses == ["pending", "payment_processing", "confirmed"]
    assert story.order.payment_status is PaymentStatus.NOT_REQUIRED
    assert story.order.completed_at == NOON
    assert story.attempts == {}
    assert story.job is None


def test_an_id_is_placed_once() -> None:
    """Placing an order whose id is taken is refused."""
    story = Story.of()

    with pytest.raises(DuplicateOrder):
        story.give(place_order())
