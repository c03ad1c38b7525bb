"""What holds for every command: that it is one, that the version it names counts, that history stays in order."""

from collections.abc import Callable

import msgspec
import pytest

from expediter.errors import PreconditionFailed
from expediter.orders.commands import Command
from expediter.orders.decisions import decide
from expediter.orders.events import Changes, Event, Placed, replay
from expediter.orders.order import PaymentOutcome
from strategies import NOON, ORDER_ID, SECOND, Story, declined


@pytest.mark.parametrize("action", [Story.cancel, Story.retry, Story.delete])
def test_a_change_that_names_another_version_is_refused(action: Callable[..., None]) -> None:
    """Whoever asks for a change of a version that the order no longer has is refused, and told the version."""
    story = declined()

    with pytest.raises(PreconditionFailed) as refused:
        action(story, story.order.version - 1)
    assert refused.value.version == story.order.version
    action(story, story.order.version)


def test_a_clock_that_steps_back_leaves_history_in_order() -> None:
    """Times in an order's history never decrease, even if the clock does."""
    story = Story.of()
    story.claim()
    story.wait(-3600 * SECOND)
    story.payment(PaymentOutcome.SUCCEEDED)

    assert [event.at for event in story.events] == [NOON] * len(story.events)
    assert story.order.updated_at == NOON


def test_history_is_kept_as_json_and_adds_up_to_the_order() -> None:
    """Events that were written as JSON and read again add up to the very order."""
    story = declined()
    story.retry()
    story.pay()
    story.cancel()
    story.give_back()
    stored = [(event, msgspec.json.encode(event.data)) for event in story.events]
    read = [
        Event(event.order_id, event.number, event.at, event.type, msgspec.json.decode(data, type=type(event.data)))
        for event, data in stored
    ]

    assert read == story.events
    assert replay(read) == story.order
    assert [type(event.data) for event in read] == [Placed] + [Changes] * (len(read) - 1)


def test_what_is_no_command_is_a_mistake_of_the_caller() -> None:
    """Only commands can be decided on."""
    story = Story.of()

    with pytest.raises(TypeError, match="not a command"):
        decide(story.order, story.job, Command(order_id=ORDER_ID), NOON)
