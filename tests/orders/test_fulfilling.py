"""What becomes of an order by what the fulfiller says."""

from expediter.orders.commands import FulfilmentOutcome
from expediter.orders.order import PaymentStatus, Status
from strategies import FAILURES_MAX, failed, in_fulfilment


def test_a_refused_fulfilment_fails_the_order_until_it_is_retried() -> None:
    """A failed order rests, still paid; a retry takes the fulfilment up again and charges nothing."""
    story = failed()
    assert (story.order.status, story.order.payment_status) == (Status.FAILED, PaymentStatus.PAID)
    assert story.order.last_error == "the kitchen: refused"
    assert story.job is None

    story.retry()
    story.fulfil()

    assert story.statuses[-3:] == ["failed", "processing", "completed"]
    assert story.outcomes == ["succeeded"]


def test_an_unavailable_fulfiller_is_tried_again_and_then_fails_the_order() -> None:
    """Fulfilment is tried as often as allowed; then the order has failed."""
    story = in_fulfilment()
    for _ in range(FAILURES_MAX - 1):
        story.fulfilment(FulfilmentOutcome.UNAVAILABLE)
        assert story.order.status is Status.PROCESSING
        story.claim()
    story.fulfilment(FulfilmentOutcome.UNAVAILABLE)

    assert story.order.status is Status.FAILED
