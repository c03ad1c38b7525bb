"""What a job does with the gateway: one key per charge, and nothing new while an outcome is unknown."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from expediter.errors import PaymentConflict, PaymentDeclined, PaymentUnavailable, PaymentUnknown
from expediter.fulfilment.simulated import SimulatedFulfiller
from expediter.orders.commands import ParkJob, RecordPayment, RecordRefund
from expediter.orders.order import JobKind, Line, PaymentOutcome, Stages, Status
from expediter.orders.refunds import first_pending
from expediter.payments import Action, Payment, PaymentState, Refund, Refunded, RefundState
from expediter.store.submissions import Claimed
from expediter.testing import ScriptedGateway
from expediter.work.stages import ERROR_CHARACTERS_MAX, REFERENCE_CHARACTERS_MAX, Tools, run
from strategies import LEASE, NOON, SECOND, Story, place_order

HOUR = 3600 * SECOND


def tools(gateway: ScriptedGateway, *, capture_later: bool = False) -> Tools:
    async def no_lines(order_id: str) -> Sequence[Line]:
        return ()

    return Tools(
        gateway=gateway,
        fulfiller=SimulatedFulfiller(),
        payment_attempts_max=3,
        lease=LEASE,
        random=lambda: 0.5,
        lines=no_lines,
        capture_later=capture_later,
    )


async def work(story: Story, gateway: ScriptedGateway, *, capture_later: bool = False) -> object:
    """Let a worker claim the job, run its stage and hand in what came of it."""
    story.claim()
    assert story.job is not None
    refund = first_pending(story.refunds.values()) if story.job.kind is JobKind.REFUND else None
    claimed = Claimed(story.order, story.job, refund=refund)
    command = await run(claimed, tools(gateway, capture_later=capture_later), story.now)
    story.give(command)
    return command


async def test_a_charge_is_sent_once_under_the_stored_key() -> None:
    """The gateway sees one charge, under the key that was stored before the call."""
    story, gateway = Story.of(), ScriptedGateway()
    await work(story, gateway)
    assert [call.what for call in gateway.calls] == ["charge"]
    assert [call.idempotency_key for call in gateway.calls] == story.keys
    assert story.order.payment_status == "paid"


async def test_a_lost_answer_is_looked_up() -> None:
    """After a charge without an answer the gateway is asked for it, and not charged again."""
    story, gateway = Story.of(), ScriptedGateway([PaymentUnknown("lost"), "ch_1"])
    await work(story, gateway)
    assert story.order.payment_status == "unknown"
    await work(story, gateway)
    assert [call.what for call in gateway.calls] == ["charge", "find"]
    assert story.order.payment_status == "paid"


async def test_a_charge_that_never_arrived_is_sent_again_under_its_key() -> None:
    """When the gateway knows nothing of a charge, the same key is used again."""
    story, gateway = Story.of(), ScriptedGateway([PaymentUnknown("lost"), None, "ch_1"])
    await work(story, gateway)
    await work(story, gateway)
    assert [call.what for call in gateway.calls] == ["charge", "find", "charge"]
    assert len({call.idempotency_key for call in gateway.calls}) == 1


async def test_an_unreachable_gateway_settles_nothing() -> None:
    """While the gateway cannot be asked, an unknown charge stays unknown and nothing new is sent."""
    away = PaymentUnavailable("away")
    story, gateway = Story.of(), ScriptedGateway([PaymentUnknown("lost"), away, away, away, "ch_1"])
    for _ in range(5):
        await work(story, gateway)
    assert [call.what for call in gateway.calls] == ["charge", "find", "find", "find", "find"]
    assert story.order.payment_status == "paid"


async def test_a_key_that_the_gateway_has_forgotten_is_not_sent_again() -> None:
    """After an outage longer than the gateway's key window an unknown charge is parked, again after each retry."""
    story, gateway = Story.of(), ScriptedGateway([None], key_window_seconds=24 * 3600)
    story.crash()
    story.wait(48 * HOUR)
    assert isinstance(await work(story, gateway), ParkJob)
    story.retry()
    assert isinstance(await work(story, gateway), ParkJob)
    assert gateway.calls == []


async def test_what_a_person_found_settles_a_parked_charge() -> None:
    """A parked charge of unknown outcome becomes paid or failed by a change of status, and then goes its way."""
    for found, payment_status, keys in ((Status.CONFIRMED, "paid", 1), (Status.PAYMENT_FAILED, "declined", 2)):
        story, gateway = Story.of(), ScriptedGateway(key_window_seconds=24 * 3600)
        story.crash()
        story.wait(48 * HOUR)
        await work(story, gateway)
        story.change(found)
        assert story.order.payment_status == payment_status
        if found is Status.PAYMENT_FAILED:
            story.retry()
            await work(story, gateway)
            assert story.order.payment_status == "paid"
        assert len(set(story.keys)) == keys


async def test_a_declined_charge_is_not_repeated() -> None:
    """A definite decline fails the payment at the first try."""
    story, gateway = Story.of(), ScriptedGateway([PaymentDeclined("no funds")])
    command = await work(story, gateway)
    assert isinstance(command, RecordPayment)
    assert command.outcome is PaymentOutcome.DECLINED
    assert story.order.status is Status.PAYMENT_FAILED
    assert story.order.last_error == "no funds"


async def test_a_refund_is_tried_until_it_is_done() -> None:
    """A refund that the gateway does not take is asked for again under the charge's key."""
    story, gateway = Story.of(), ScriptedGateway(["ch_1", PaymentUnavailable("away"), "re_1"])
    await work(story, gateway)
    story.cancel()
    assert isinstance(await work(story, gateway), RecordRefund)
    await work(story, gateway)
    assert story.order.payment_status == "refunded"
    assert len({call.idempotency_key for call in gateway.calls}) == 1


def paying(state: PaymentState, story: Story, **changes: object) -> Payment:
    """A payment of the order, as a gateway tells of it."""
    made = Payment(
        reference="ch_1", state=state, amount_minor=story.order.total_minor, currency=story.order.currency
    )
    return replace(made, **changes)


async def test_a_payment_that_is_not_made_yet_is_looked_up_until_it_is() -> None:
    """Whatever the gateway says but a clear yes or no leaves the outcome open; nothing is sent again."""
    story = Story.of()
    open_states = (PaymentState.PROCESSING, PaymentState.PROCESSING)
    gateway = ScriptedGateway([paying(state, story) for state in (*open_states, PaymentState.SUCCEEDED)])
    for _ in open_states:
        await work(story, gateway)
        assert story.order.payment_status == "unknown"
    await work(story, gateway)
    assert story.order.payment_status == "paid"
    assert [call.what for call in gateway.calls] == ["charge", "find", "find"]


async def test_a_customer_who_must_act_is_waited_for() -> None:
    """The order says what is to be done; the gateway is asked until it is, and nothing is charged again."""
    story = Story.of()
    action = Action(type="redirect", url="https://bank.example/1")
    waits = paying(PaymentState.ACTION_REQUIRED, story, action=action)
    gateway = ScriptedGateway([waits, waits, paying(PaymentState.SUCCEEDED, story)])
    await work(story, gateway)
    assert (story.order.status, story.order.payment_status) == ("payment_processing", "action_required")
    assert story.order.payment_action == '{"type":"redirect","url":"https://bank.example/1"}'
    assert story.order.action_expires_at == story.now + 900 * SECOND
    version = story.order.version
    await work(story, gateway)
    assert story.order.version == version
    await work(story, gateway)
    assert (story.order.status, story.order.payment_status) == ("processing", "paid")
    assert story.order.payment_action is None
    assert [call.what for call in gateway.calls] == ["charge", "find", "find"]


async def test_a_customer_who_does_not_act_in_time_finds_the_order_cancelled() -> None:
    """The payment is voided at the gateway first, and the order says why it is cancelled."""
    story = Story.of()
    waits = paying(PaymentState.ACTION_REQUIRED, story, action=Action(type="redirect", url="https://b.example"))
    gateway = ScriptedGateway([waits, waits, paying(PaymentState.VOIDED, story)])
    await work(story, gateway)
    story.wait(900 * SECOND)
    await work(story, gateway)
    assert [call.what for call in gateway.calls] == ["charge", "find", "void"]
    assert (story.order.status, story.order.payment_status) == ("cancelled", "voided")
    assert story.order.last_error == "the customer did not confirm the payment in time"


async def test_a_customer_who_acts_in_the_last_moment_has_paid() -> None:
    """The void comes too late, and the gateway says so: nothing is cancelled."""
    story = Story.of()
    waits = paying(PaymentState.ACTION_REQUIRED, story, action=Action(type="redirect", url="https://b.example"))
    gateway = ScriptedGateway([waits, waits, paying(PaymentState.SUCCEEDED, story)])
    await work(story, gateway)
    story.wait(900 * SECOND)
    await work(story, gateway)
    assert (story.order.status, story.order.payment_status) == ("processing", "paid")


async def test_money_is_reserved_and_captured_when_the_order_is_completed() -> None:
    """The charge only authorizes; what is captured is the whole."""
    story, gateway = Story.of(), ScriptedGateway()
    await work(story, gateway, capture_later=True)
    assert (story.order.status, story.order.payment_status) == ("processing", "authorized")
    assert (story.order.authorized_minor, story.order.captured_minor) == (2598, 0)
    story.fulfil()
    assert (story.order.status, story.order.at_rest) == ("completed", False)
    gateway = ScriptedGateway([paying(PaymentState.SUCCEEDED, story)])
    await work(story, gateway)
    assert [call.what for call in gateway.calls] == ["capture"]
    assert (story.order.payment_status, story.order.captured_minor) == ("paid", 2598)
    assert story.order.at_rest


async def test_reserved_money_is_let_go_of_when_the_order_is_cancelled() -> None:
    """Nothing was captured, so nothing is refunded."""
    story, gateway = Story.of(), ScriptedGateway()
    await work(story, gateway, capture_later=True)
    story.cancel()
    assert (story.order.payment_status, story.order.at_rest) == ("authorized", False)
    gateway = ScriptedGateway([paying(PaymentState.VOIDED, story)])
    await work(story, gateway)
    assert [call.what for call in gateway.calls] == ["void"]
    assert (story.order.payment_status, story.order.at_rest) == ("voided", True)


async def test_a_reservation_that_has_expired_is_charged_anew_by_a_retry() -> None:
    """The order is completed and not paid: it is parked and says so; the retry uses a new key."""
    story, gateway = Story.of(), ScriptedGateway()
    await work(story, gateway, capture_later=True)
    story.fulfil()
    await work(story, ScriptedGateway([paying(PaymentState.VOIDED, story)]))
    assert (story.order.status, story.order.payment_status) == ("completed", "voided")
    assert story.order.last_error is not None and "expired" in story.order.last_error
    assert story.job is not None and story.job.dead_at is not None
    story.retry()
    gateway = ScriptedGateway()
    await work(story, gateway, capture_later=True)
    assert (story.order.status, story.order.payment_status) == ("completed", "paid")
    assert len(set(story.keys)) == 2
    assert story.order.at_rest


async def test_a_payment_that_is_found_declined_or_voided_failed() -> None:
    """What was lost and turns out to be a no is a no: the next try has a key of its own."""
    for state in (PaymentState.DECLINED, PaymentState.VOIDED):
        story = Story.of()
        gateway = ScriptedGateway([PaymentUnknown("lost"), paying(state, story)])
        await work(story, gateway)
        await work(story, gateway)
        assert story.order.payment_status == "declined"
        story.retry()
        await work(story, gateway)
        assert len(set(story.keys)) == 2


async def test_a_key_that_belongs_to_something_else_is_parked() -> None:
    """Another amount or currency under the order's key is nobody's to decide but a person's."""
    story = Story.of()
    for said in (
        PaymentConflict("another amount"),
        paying(PaymentState.SUCCEEDED, story, amount_minor=1),
        paying(PaymentState.SUCCEEDED, story, currency="JPY"),
    ):
        story, gateway = Story.of(), ScriptedGateway([said])
        assert isinstance(await work(story, gateway), ParkJob)
        assert story.order.payment_status == "unknown"
        assert "look it up there" in (story.order.last_error or "")


async def test_a_refund_that_is_pending_is_asked_for_until_it_is_made() -> None:
    """The same refund again and again, under its own key, until the gateway says that it is made."""
    story, gateway = Story.of(), PendingRefunds(["ch_1"])
    await work(story, gateway)
    story.cancel()
    for _ in range(3):
        await work(story, gateway)
        assert story.order.payment_status == "refund_pending"
    gateway.state = RefundState.SUCCEEDED
    await work(story, gateway)
    assert story.order.payment_status == "refunded"
    assert len({refund.key for refund in gateway.refunds}) == 1
    assert gateway.refunds[0].amount_minor == story.order.total_minor


class PendingRefunds(ScriptedGateway):
    """A gateway whose refunds take their time."""

    state = RefundState.PENDING

    def __init__(self, script: list[str]) -> None:
        super().__init__(script)
        self.refunds: list[Refund] = []

    async def refund(self, refund: Refund) -> Refunded:
        self.refunds.append(refund)
        return Refunded(reference="re_1", state=self.state)


async def test_a_gateway_that_says_when_to_come_back_is_asked_then() -> None:
    """Retry-After is the least that is waited, up to an hour."""
    for asked, waited in ((30.0, 30 * SECOND), (1e9, HOUR), (-5.0, 0)):
        story, gateway = Story.of(), ScriptedGateway([PaymentUnavailable("busy", asked)])
        command = await work(story, gateway)
        assert isinstance(command, RecordPayment)
        assert command.retry_in >= waited
        assert command.retry_in <= max(waited, SECOND)


async def test_what_a_gateway_says_is_cut_to_size() -> None:
    """What is stored of a gateway's words fits every database, and has no payment token in it."""
    words = f"card tok_secret refused\x00\n\ud800{'x' * 2000}"
    story, gateway = Story(), ScriptedGateway([PaymentDeclined(words)])
    story.give(replace(place_order(Stages.PAYMENT, 100, True), payment_token="tok_secret"))
    await work(story, gateway)
    said = story.order.last_error or ""
    assert said.startswith("card *** refused  ?xxx")
    assert len(said) == ERROR_CHARACTERS_MAX
    story, gateway = Story.of(), ScriptedGateway(["r" * 500])
    command = await work(story, gateway)
    assert isinstance(command, RecordPayment)
    assert len(command.reference or "") == REFERENCE_CHARACTERS_MAX


async def test_a_refused_refund_is_parked_for_a_person() -> None:
    """A refund that the gateway refuses is set aside with the gateway's words."""
    story, gateway = Story.of(), ScriptedGateway(["ch_1", PaymentDeclined("too late")])
    await work(story, gateway)
    story.cancel()
    assert isinstance(await work(story, gateway), ParkJob)
    assert "too late" in (story.order.last_error or "")
    assert story.now >= NOON
