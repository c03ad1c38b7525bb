"""What each command changes: the roads of an order, told step by step."""

from collections.abc import Callable
from random import Random

import msgspec
import pytest

from expediter.errors import (
    Conflict,
    DuplicateOrder,
    ExpediterError,
    IllegalTransition,
    MoneyInFlight,
    OrderNotFound,
    PreconditionFailed,
    StaleLease,
)
from expediter.orders.by_hand import legal_moves
from expediter.orders.commands import (
    CancelOrder,
    ChangeStatus,
    ClaimJob,
    Command,
    DeleteOrder,
    FailJob,
    FulfilmentOutcome,
    ParkJob,
    PlaceOrder,
    RecordFulfilment,
    RecordPayment,
    RecordRefund,
    ReleaseJob,
    RetryOrder,
    WorkerCommand,
)
from expediter.orders.decisions import decide
from expediter.orders.draft import Decision
from expediter.orders.events import Changes, Event, Placed, replay
from expediter.orders.order import (
    NEVER,
    TRANSITIONS,
    Attempt,
    Job,
    JobKind,
    Order,
    PaymentOutcome,
    PaymentStatus,
    Stages,
    Status,
    gateway_key,
)
from strategies import CLAIMS_MAX, FAILURES_MAX, LEASE, NOON, ORDER_ID, SECOND, Story, place_order


def paid(stages: Stages = Stages.PAYMENT_FULFILMENT) -> Story:
    story = Story.of(stages)
    story.pay()
    return story


def declined() -> Story:
    story = Story.of()
    story.claim()
    story.payment(PaymentOutcome.DECLINED)
    return story


def unknown() -> Story:
    """An order whose charge has no known outcome, while a new worker is about to ask the gateway."""
    story = Story.of()
    story.crash()
    story.claim()
    return story


def in_fulfilment(stages: Stages = Stages.FULFILMENT) -> Story:
    story = Story.of(stages)
    story.claim()
    return story


def failed() -> Story:
    story = paid()
    story.claim()
    story.fulfilment(FulfilmentOutcome.REFUSED)
    return story


def cancelled_after_payment() -> Story:
    story = paid()
    story.cancel()
    return story


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


def test_the_intent_to_charge_is_stored_before_the_call() -> None:
    """Claiming a charge stores the attempt with its key and amount, and no outcome."""
    story = Story.of()
    story.claim()

    attempt = story.attempts[1]
    assert (attempt.action, attempt.amount_minor, attempt.currency) == ("charge", 2598, "EUR")
    assert attempt.gateway_key == gateway_key(ORDER_ID, 1)
    assert attempt.outcome is None
    assert story.order.money_in_flight


def test_an_id_is_placed_once() -> None:
    """Placing an order whose id is taken is refused."""
    story = Story.of()

    with pytest.raises(DuplicateOrder):
        story.give(place_order())


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


def test_payment_that_is_asked_for_again_by_status_is_pending() -> None:
    """Setting a declined order to payment_processing is a retry: its payment is pending, no longer declined."""
    story = declined()
    story.change(Status.PAYMENT_PROCESSING)

    assert story.order.payment_status is PaymentStatus.PENDING


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
    assert story.order.money_in_flight
    assert story.order.last_error == "KeyError"

    story.claim()

    assert story.order.payment_status is PaymentStatus.UNKNOWN
    assert len(story.attempts) == 1


@pytest.mark.parametrize("action", [Story.cancel, Story.delete])
def test_nothing_is_cancelled_or_deleted_while_money_is_in_flight(action: Callable[..., None]) -> None:
    """An order is neither cancelled nor deleted while a charge is open or unknown."""
    open_charge = Story.of()
    open_charge.claim()
    for story in (open_charge, unknown()):
        with pytest.raises(MoneyInFlight):
            action(story)


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


def test_a_parked_fulfilment_is_cancelled_with_a_refund() -> None:
    """A paid order whose fulfilment is parked can be cancelled; the money goes back."""
    story = paid()
    story.claim()
    story.park()
    story.cancel()
    story.give_back()

    assert (story.order.status, story.order.payment_status) == (Status.CANCELLED, PaymentStatus.REFUNDED)


def test_a_parked_refund_is_revived_by_a_retry() -> None:
    """A refund that was set aside is taken up again by a retry of the cancelled order."""
    story = cancelled_after_payment()
    story.claim()
    story.park()
    assert not story.order.at_rest

    story.retry()
    story.give_back()

    assert (story.order.payment_status, story.job) == (PaymentStatus.REFUNDED, None)


def test_a_job_that_was_given_back_unused_costs_nothing() -> None:
    """A charge that was never sent is recorded as such, spends no claim, and is charged later under its key."""
    story = Story.of()
    for _ in range(2 * CLAIMS_MAX):
        story.claim()
        story.release(SECOND)
    assert story.job is not None
    assert (story.job.claims, story.job.failures) == (0, 0)
    assert not story.order.money_in_flight

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
    assert story.order.money_in_flight


def test_a_clock_that_steps_back_leaves_history_in_order() -> None:
    """Times in an order's history never decrease, even if the clock does."""
    story = Story.of()
    story.claim()
    story.wait(-3600 * SECOND)
    story.payment(PaymentOutcome.SUCCEEDED)

    assert [event.at for event in story.events] == [NOON] * len(story.events)
    assert story.order.updated_at == NOON


@pytest.mark.parametrize("outcome", list(FulfilmentOutcome))
def test_a_job_is_reported_as_what_it_is(outcome: FulfilmentOutcome) -> None:
    """Whoever holds a charge cannot report a fulfilment."""
    story = Story.of()
    story.claim()

    with pytest.raises(StaleLease):
        story.fulfilment(outcome)


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


def test_only_failed_and_parked_orders_are_retried() -> None:
    """A retry of an order that is on its way, or at its end, is refused."""
    done = paid()
    done.fulfil()
    for story in (Story.of(), paid(), in_fulfilment(), done, cancelled_after_payment()):
        with pytest.raises(Conflict, match="only a failed or parked order can be retried"):
            story.retry()


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


@pytest.mark.parametrize("action", [Story.cancel, Story.retry, Story.delete])
def test_a_change_that_names_another_version_is_refused(action: Callable[..., None]) -> None:
    """Whoever asks for a change of a version that the order no longer has is refused, and told the version."""
    story = declined()

    with pytest.raises(PreconditionFailed) as refused:
        action(story, story.order.version - 1)
    assert refused.value.version == story.order.version
    action(story, story.order.version)


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


#: What may become of an attempt that was recorded so before; an outcome that is definite never changes.
SETTLED_BY = {
    None: set(PaymentOutcome),
    PaymentOutcome.UNKNOWN: {PaymentOutcome.UNKNOWN, PaymentOutcome.SUCCEEDED, PaymentOutcome.DECLINED},
}

#: After a charge with one of these no other may be sent.
OPEN_OR_DONE = {None, PaymentOutcome.UNKNOWN, PaymentOutcome.SUCCEEDED}

#: Walks of one test, and commands of one walk.
WALKS = 250
STEPS = 60


class Walk:
    """One order under random commands, in any order, early, late, repeated and from strangers."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.story = Story()
        self.trail: list[tuple[int, Command]] = []
        self.fences: list[int] = [0]
        #: Nobody ends the order by hand before it has so many events, so that some orders live long.
        self.life = self.random.choice((0, 5, 10, 20))

    def run(self) -> None:
        """Place an order, then give commands until it is deleted or has had enough of them."""
        self.give(place_order(self.random.choice(list(Stages)), self.random.choice((2598, 2598, 0))))
        for _ in range(STEPS):
            if self.story.current is None:
                break
            self.step()
        self.give(CancelOrder(order_id=ORDER_ID))

    def step(self) -> None:
        """Let somebody do something: the holder of the job, if there is one, more often than anybody else."""
        actions = {self.claim: 4, self.somebody_reports: 1, self.change: 1, self.retry: 1, self.move_clock: 1}
        if self.story.job is not None and self.story.job.holder is not None:
            actions |= {self.report: 6, self.give_back: 2}
        if len(self.story.events) >= self.life:
            actions |= {self.cancel: 1, self.delete: 0.2}
        if self.story.job is not None and self.story.job.dead_at is not None:
            actions |= {self.retry: 6}
        [action] = self.random.choices(list(actions), list(actions.values()))
        action()

    def claim(self) -> None:
        job = self.story.job
        if job is not None and job.dead_at is None and self.random.random() < 0.7:
            self.story.wait_until_due()
        holder, claims_max = self.random.choice(("worker-1", "worker-2")), self.random.randint(1, 4)
        self.give(ClaimJob(order_id=ORDER_ID, holder=holder, lease=LEASE, claims_max=claims_max))

    def report(self) -> None:
        assert self.story.job is not None
        self.give(self.result(self.story.job.kind, self.story.fence))

    def give_back(self) -> None:
        self.give(self.surrender(self.story.fence))

    def somebody_reports(self) -> None:
        fence = self.random.choice([*self.fences, self.fences[-1] + 1])
        surrender = self.random.random() < 0.3
        self.give(self.surrender(fence) if surrender else self.result(self.random.choice(list(JobKind)), fence))

    def change(self) -> None:
        status = self.random.choice(list(Status))
        if status not in (Status.CANCELLED, Status.COMPLETED) or len(self.story.events) >= self.life:
            self.give(ChangeStatus(order_id=ORDER_ID, status=status, if_version=self.version()))

    def retry(self) -> None:
        self.give(RetryOrder(order_id=ORDER_ID, if_version=self.version()))

    def cancel(self) -> None:
        self.give(CancelOrder(order_id=ORDER_ID, if_version=self.version()))

    def delete(self) -> None:
        self.give(DeleteOrder(order_id=ORDER_ID, if_version=self.version()))

    def move_clock(self) -> None:
        self.story.wait(self.random.choice((1, SECOND, LEASE, -1, -LEASE, -3600 * SECOND)))
        self.give(place_order())

    def result(self, kind: JobKind, fence: int) -> WorkerCommand:
        """Return what the holder of a job of this kind may report."""
        outcome, retry_in = self.random.choice(list(PaymentOutcome)), self.random.choice((0, SECOND, 2 * LEASE))
        error, failures_max = self.random.choice((None, "it broke")), self.random.randint(1, 3)
        if kind is JobKind.REFUND:
            return RecordRefund(order_id=ORDER_ID, fence=fence, outcome=outcome, error=error, retry_in=retry_in)
        if kind is JobKind.FULFIL:
            return RecordFulfilment(
                order_id=ORDER_ID,
                fence=fence,
                outcome=self.random.choice(list(FulfilmentOutcome)),
                error=error,
                retry_in=retry_in,
                failures_max=failures_max,
            )
        return RecordPayment(
            order_id=ORDER_ID,
            fence=fence,
            outcome=outcome,
            error=error,
            retry_in=retry_in,
            counts=self.random.random() < 0.7,
            failures_max=failures_max,
            lease=self.random.choice((0, LEASE)),
        )

    def surrender(self, fence: int) -> WorkerCommand:
        """Return how a holder may give up a job of any kind."""
        retry_in = self.random.choice((0, SECOND, 2 * LEASE))
        return self.random.choice(
            (
                ReleaseJob(order_id=ORDER_ID, fence=fence, retry_in=retry_in),
                FailJob(order_id=ORDER_ID, fence=fence, error="a bug", retry_in=retry_in),
                ParkJob(order_id=ORDER_ID, fence=fence, error="look at this"),
            )
        )

    def version(self) -> int | None:
        """Return no version, the order's, or another."""
        current = self.story.order.version
        return self.random.choice((None, None, current, current - 1))

    # What holds for every command.

    def give(self, command: Command) -> None:
        story = self.story
        order, job, now = story.current, story.job, story.now
        seen, attempts = len(story.events), dict(story.attempts)
        reason = refusal(story, command)
        self.trail.append((now, command))
        before = (order, job, replay(story.events))
        decision = judge(order, job, command, now)
        assert judge(order, job, command, now) == decision
        assert (order, job, replay(story.events)) == before
        if not isinstance(decision, Decision):
            assert issubclass(decision[0], reason or Conflict)
            return
        assert reason is None
        assert story.give(command) == decision
        if isinstance(command, (PlaceOrder, ClaimJob, WorkerCommand)) and story.current is not None:
            with pytest.raises((DuplicateOrder, StaleLease)):
                decide(story.current, story.job, command, now)
        self.check_moves(seen)
        for number, attempt in story.attempts.items():
            if number not in attempts:
                self.check_new_attempt(attempt, [story.attempts[earlier] for earlier in attempts])
            elif attempt != attempts[number]:
                assert attempt.outcome in SETTLED_BY[attempts[number].outcome]
        if story.current is not None and story.job is not None:
            self.check_fence(isinstance(command, ClaimJob))
        self.check_history()
        if story.current is not None:
            self.check_rest(story.current)
            self.check_money(story.current)
            self.check_road(story.current)
            self.check_times(story.current)
            self.check_end(story.current)

    def check_moves(self, seen: int) -> None:
        """Every move is in the table, work starts once, and what is unknown is settled by the gateway alone."""
        order = replay(self.story.events[:seen])
        for event in self.story.events[seen:]:
            after = replay(self.story.events[: event.number])
            if order is not None and after is not None:
                assert after.status == order.status or after.status in TRANSITIONS[order.status]
                assert order.processing_started_at in (None, after.processing_started_at)
                assert order.payment_status is not PaymentStatus.UNKNOWN or after.payment_status in (
                    PaymentStatus.UNKNOWN,
                    PaymentStatus.PAID,
                    PaymentStatus.DECLINED,
                )
            order = after

    def check_new_attempt(self, attempt: Attempt, earlier: list[Attempt]) -> None:
        """Nothing is sent while a charge is open; a new key follows a definite decline and nothing else."""
        assert attempt.number == len(earlier) + 1
        charges = [other for other in earlier if other.action == "charge"]
        assert None not in {other.outcome for other in earlier}
        if attempt.action == "refund":
            assert PaymentOutcome.SUCCEEDED in {charge.outcome for charge in charges}
            return
        assert attempt.action == "charge"
        assert {charge.outcome for charge in charges}.isdisjoint(OPEN_OR_DONE)
        declines = sum(charge.outcome is PaymentOutcome.DECLINED for charge in charges)
        assert attempt.gateway_key == gateway_key(ORDER_ID, declines + 1)

    def check_fence(self, claimed: bool) -> None:
        """The fence never decreases, from job to job, and every claim has one that nobody had before."""
        fence = self.story.fence
        assert fence >= max(self.fences)
        assert not claimed or fence not in self.fences
        self.fences.append(fence)

    # What holds at any time.

    def check_history(self) -> None:
        """Events are numbered from 1 without gaps, their times never decrease, and they add up to the order."""
        events, order = self.story.events, self.story.current
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert [event.at for event in events] == sorted(event.at for event in events)
        assert replay(events) == order
        assert order is None or (order.version, order.updated_at) == (len(events), events[-1].at)

    def check_rest(self, order: Order) -> None:
        """An order has a job of the kind that its state asks for, perhaps parked, exactly if it is not at rest."""
        job = self.story.job
        assert (job is None) == order.at_rest
        assert job is not None or not order.money_in_flight
        if job is not None:
            assert (job.kind is JobKind.REFUND) == (order.payment_status is PaymentStatus.REFUND_PENDING)
            assert order.payment_status is not PaymentStatus.UNKNOWN or job.kind is JobKind.CHARGE
            assert not order.charging or job.kind is not JobKind.FULFIL
            assert job.claims >= (job.holder is not None)
            assert (job.dead_at is None) == (job.due_at != NEVER)
            assert job.dead_at is None or job.holder is None

    def check_money(self, order: Order) -> None:
        """At most one charge succeeds; what it took is paid or refund_pending until it is given back."""
        done = [attempt for attempt in self.story.attempts.values() if attempt.outcome is PaymentOutcome.SUCCEEDED]
        assert [attempt.action for attempt in done] in ([], ["charge"], ["charge", "refund"])
        kept = order.payment_status in (PaymentStatus.PAID, PaymentStatus.REFUND_PENDING)
        assert kept == (len(done) == 1)
        assert (order.payment_status is PaymentStatus.REFUNDED) == (len(done) == 2)
        if order.money_in_flight:
            commands = [CancelOrder(order_id=ORDER_ID), DeleteOrder(order_id=ORDER_ID)]
            commands += [ChangeStatus(order_id=ORDER_ID, status=status) for status in Status]
            job = self.story.job
            parked = job is not None and job.dead_at is not None
            by_hand = (Status.CONFIRMED, Status.PAYMENT_FAILED)
            for command in commands:
                if parked and isinstance(command, ChangeStatus) and command.status in by_hand:
                    continue  # a person has looked the charge up, and says what they found
                refused = judge(order, job, command, self.story.now)
                assert not isinstance(refused, Decision)
                assert issubclass(refused[0], (MoneyInFlight, IllegalTransition))

    def check_road(self, order: Order) -> None:
        """No road leads to a stage that it does not have."""
        job = self.story.job
        if order.stages is Stages.FULFILMENT or not order.total_minor:
            assert order.payment_status is PaymentStatus.NOT_REQUIRED
            assert not self.story.attempts
        if order.stages is Stages.FULFILMENT:
            assert job is None or job.kind is JobKind.FULFIL
        if order.stages is Stages.PAYMENT:
            assert order.status not in (Status.PROCESSING, Status.COMPLETED, Status.FAILED)
            assert job is None or job.kind is not JobKind.FULFIL

    def check_times(self, order: Order) -> None:
        """The times of an order are whole, not before its placing, and there exactly when its status says so."""
        assert (order.completed_at is not None) == (order.status is order.stages.end)
        assert (order.cancelled_at is not None) == (order.status is Status.CANCELLED)
        assert order.processing_started_at is not None or order.status in (Status.PENDING, Status.CANCELLED)
        times = [order.processing_started_at, order.completed_at, order.cancelled_at, order.updated_at]
        assert all(type(time) is int and time >= order.created_at for time in times if time is not None)

    def check_end(self, order: Order) -> None:
        """A retry if it is parked, and success for whoever claims it, bring the order to rest from here."""
        story = Story()
        story.now, story.current, story.job = self.story.now, order, self.story.job
        story.attempts = dict(self.story.attempts)
        if story.job is not None and story.job.dead_at is not None:
            story.retry()
        for _ in ("charge", "fulfil"):
            carry_out(story)
        assert story.order.at_rest


def judge(order: Order | None, job: Job | None, command: Command, now: int) -> Decision | tuple[type, str]:
    """Return what `decide` says: the decision, or the type and text of its refusal."""
    try:
        return decide(order, job, command, now)
    except ExpediterError as refused:
        return type(refused), str(refused)


def refusal(story: Story, command: Command) -> type[ExpediterError] | None:
    """Return what a command must be refused with for reasons of lease, version or existence, if for any."""
    order, job = story.current, story.job
    if isinstance(command, PlaceOrder):
        return DuplicateOrder if order is not None else None
    if isinstance(command, ClaimJob):
        free = job is not None and job.dead_at is None and job.due_at <= story.now
        return None if free else StaleLease
    if isinstance(command, WorkerCommand):
        kinds = {RecordPayment: JobKind.CHARGE, RecordFulfilment: JobKind.FULFIL, RecordRefund: JobKind.REFUND}
        held = (
            order is not None
            and job is not None
            and job.holder is not None
            and job.fence == command.fence
            and job.due_at > max(story.now, order.updated_at)
            and kinds.get(type(command), job.kind) is job.kind
        )
        return None if held else StaleLease
    if order is None:
        return OrderNotFound
    assert isinstance(command, (ChangeStatus, CancelOrder, RetryOrder, DeleteOrder))
    return PreconditionFailed if command.if_version not in (None, order.version) else None


def carry_out(story: Story) -> None:
    """Claim the job and have its call succeed."""
    if story.job is None:
        return
    story.claim(claims_max=10**6)
    match story.job and story.job.kind:
        case JobKind.CHARGE:
            story.payment(PaymentOutcome.SUCCEEDED)
        case JobKind.FULFIL:
            story.fulfilment(FulfilmentOutcome.DONE)
        case JobKind.REFUND:
            story.refund(PaymentOutcome.SUCCEEDED)


@pytest.mark.parametrize("first", range(0, 4 * WALKS, WALKS))
def test_every_order_is_safe_under_any_commands(first: int) -> None:
    """Whatever is asked of an order, when and by whom, what `Walk` checks holds after every single command."""
    for seed in range(first, first + WALKS):
        walk = Walk(seed)
        try:
            walk.run()
        except Exception as error:
            error.add_note(f"Walk({seed}).run() went:\n" + "\n".join(f"{now}: {step}" for now, step in walk.trail))
            raise
