"""Changing the status of an order by hand: which moves are legal, and what each does to its payment."""

import pytest

from expediter.errors import IllegalTransition, MoneyInFlight
from expediter.orders.by_hand import legal_moves
from expediter.orders.order import JobKind, PaymentStatus, Stages, Status
from strategies import NOON, Story, cancelled_after_payment, declined, paid, unknown


def test_payment_that_is_asked_for_again_by_status_is_pending() -> None:
    """Setting a declined order to payment_processing is a retry: its payment is pending, no longer declined."""
    story = declined()
    story.change(Status.PAYMENT_PROCESSING)

    assert story.order.payment_status is PaymentStatus.PENDING


def test_an_illegal_move_names_the_legal_ones() -> None:
    """A refused move says where the order is and where it may go."""
    story = Story.of()

    with pytest.raises(IllegalTransition) as refused:
        story.change(Status.COMPLETED)
    assert str(refused.value) == (
        "Order ORD-1 is pending and cannot become completed; it can become: payment_processing, cancelled"
    )


@pytest.mark.parametrize(
    ("story", "moves"),
    [
        (Story.of(), {"payment_processing", "cancelled"}),
        (Story.of(total_minor=0), {"processing", "cancelled"}),
        (Story.of(Stages.FULFILMENT), {"processing", "cancelled"}),
        (Story.of(Stages.PAYMENT), {"payment_processing", "cancelled"}),
        (Story.of(Stages.PAYMENT, 0), {"cancelled"}),
        (paid(), {"processing", "cancelled"}),
        (paid(Stages.PAYMENT), {"cancelled"}),
        (cancelled_after_payment(), set()),
    ],
    ids=["due", "free", "fulfilment", "payment", "free payment", "paid", "paid payment", "cancelled"],
)
def test_the_legal_moves_depend_on_road_and_payment(story: Story, moves: set[str]) -> None:
    """What is to be paid cannot be processed unpaid, and the payment road ends at confirmed."""
    assert {str(move) for move in legal_moves(story.order)} == moves


def test_an_order_paid_by_other_means_is_confirmed_by_hand() -> None:
    """Confirming by hand waives the charge: the gateway is never called, and a cancellation refunds nothing."""
    story = Story.of()
    story.change(Status.PAYMENT_PROCESSING)
    story.change(Status.CONFIRMED)
    assert story.order.payment_status is PaymentStatus.NOT_REQUIRED
    assert story.job is not None
    assert story.job.kind is JobKind.FULFIL

    story.cancel()

    assert (story.order.status, story.job) == (Status.CANCELLED, None)
    assert story.attempts == {}


def test_nothing_is_confirmed_by_hand_while_its_charge_is_open() -> None:
    """A charge that is under way or unknown may still succeed, so no hand may confirm or fail the payment."""
    open_charge = Story.of()
    open_charge.claim()
    for story in (open_charge, unknown()):
        for status in (Status.CONFIRMED, Status.PAYMENT_FAILED, Status.CANCELLED):
            with pytest.raises(MoneyInFlight):
                story.change(status)


def test_an_order_walks_the_whole_road_by_hand() -> None:
    """A person may move an order through every status of its road."""
    story = Story.of()
    road = [Status.PAYMENT_PROCESSING, Status.PAYMENT_FAILED, Status.PAYMENT_PROCESSING, Status.CONFIRMED]
    road += [Status.PROCESSING, Status.FAILED, Status.PROCESSING, Status.COMPLETED]
    for status in road:
        story.change(status)

    assert story.statuses == ["pending", *map(str, road)]
    assert story.order.completed_at == NOON
    assert story.job is None
