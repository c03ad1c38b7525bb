"""Random walks: whatever is asked of an order, when and by whom, its money and its history stay sound."""

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
from expediter.orders.commands import (
    CancelOrder,
    Change,
    ChangeStatus,
    ClaimJob,
    Command,
    DeleteOrder,
    FailJob,
    FulfilmentOutcome,
    HearGateway,
    ParkJob,
    PlaceOrder,
    RecordFulfilment,
    RecordPayment,
    RecordRefund,
    RecordReserved,
    RefundOrder,
    ReleaseJob,
    ReportFulfilment,
    RetryOrder,
    WorkerCommand,
)
from expediter.orders.decisions import decide
from expediter.orders.documents import event_document
from expediter.orders.draft import Decision
from expediter.orders.events import EVENTS, replay, without_secrets
from expediter.orders.laws import breaches
from expediter.orders.order import (
    NEVER,
    TRANSITIONS,
    Attempt,
    JobKind,
    Order,
    PaymentOutcome,
    PaymentStatus,
    Stages,
    Status,
    gateway_key,
)
from expediter.orders.resilience import GATEWAY_KINDS
from strategies import LEASE, ORDER_ID, SECOND, Story, place_order

_OUTCOMES = set(PaymentOutcome)
#: What may become of an attempt that was recorded so before; an outcome that is definite never changes, unless the
#: gateway itself says later that it is otherwise.
SETTLED_BY = {
    None: _OUTCOMES,
    PaymentOutcome.UNKNOWN: _OUTCOMES - {PaymentOutcome.NOT_SENT, PaymentOutcome.UNAVAILABLE},
    PaymentOutcome.ACTION_REQUIRED: {
        PaymentOutcome.SUCCEEDED,
        PaymentOutcome.AUTHORIZED,
        PaymentOutcome.DECLINED,
        PaymentOutcome.VOIDED,
    },
}

#: After a charge with one of these no other may be sent.
OPEN_OR_DONE = {None, PaymentOutcome.UNKNOWN, PaymentOutcome.SUCCEEDED, PaymentOutcome.ACTION_REQUIRED}

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
        if self.story.job is not None and self.story.job.kind in (JobKind.FULFIL, JobKind.REPORT):
            actions |= {self.handed: 1}
        if self.story.order.attempts:
            actions |= {self.hear: 1}
        if self.story.order.captured_minor:
            actions |= {self.give_money_back: 1.5}
        if len(self.story.events) >= self.life:
            actions |= {self.cancel: 1, self.delete: 0.2}
        if self.story.job is not None and self.story.job.dead_at is not None:
            actions |= {self.retry: 6}
        [action] = self.random.choices(list(actions), list(actions.values()))
        action()

    def claim(self) -> None:
        job = self.story.job
        if job is not None and job.due_at != NEVER and self.random.random() < 0.7:
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
            through = self.random.random() < 0.3
            self.give(ChangeStatus(order_id=ORDER_ID, status=status, through=through, if_version=self.version()))

    def retry(self) -> None:
        self.give(RetryOrder(order_id=ORDER_ID, if_version=self.version()))

    def handed(self) -> None:
        done, reference = self.random.random() < 0.7, self.random.choice((None, "K-17"))
        self.give(ReportFulfilment(order_id=ORDER_ID, done=done, reference=reference, if_version=self.version()))

    def hear(self) -> None:
        order = self.story.order
        outcome = self.random.choice(list(PaymentOutcome))
        taken = outcome is PaymentOutcome.SUCCEEDED
        generation = self.random.choice([order.generation] * 4 + list(range(1, order.generation + 1)))
        self.give(
            HearGateway(
                order_id=ORDER_ID,
                key=gateway_key(ORDER_ID, generation),
                key_prefix="",
                outcome=outcome,
                amount_minor=order.total_minor,
                currency=order.currency,
                captured_minor=order.total_minor if taken else 0,
                refunded_minor=self.random.choice((0, 0, order.refunded_minor, order.captured_minor)),
                action='{"type":"client_secret","client_secret":"s3cret"}',
                action_until=self.story.now + LEASE,
            )
        )

    def give_money_back(self) -> None:
        amount = self.random.choice((None, "1.00", "5.99", "25.98"))
        by_hand = self.random.random() < 0.3
        self.give(RefundOrder(order_id=ORDER_ID, amount=amount, by_hand=by_hand, if_version=self.version()))

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
            return RecordRefund(
                order_id=ORDER_ID,
                fence=fence,
                refund=self.story.calling,
                outcome=outcome,
                error=error,
                retry_in=retry_in,
            )
        if kind in (JobKind.CAPTURE, JobKind.VOID):
            return RecordReserved(order_id=ORDER_ID, fence=fence, outcome=outcome, error=error, retry_in=retry_in)
        if kind is JobKind.FULFIL:
            return RecordFulfilment(
                order_id=ORDER_ID,
                fence=fence,
                outcome=self.random.choice(list(FulfilmentOutcome)),
                error=error,
                retry_in=retry_in,
                failures_max=failures_max,
                report_in=self.random.choice((None, SECOND, LEASE)),
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
            action='{"type":"redirect","url":"https://bank.example/1"}',
            action_until=self.story.now + LEASE,
        )

    def surrender(self, fence: int) -> WorkerCommand:
        """Return how a holder may give up a job of any kind."""
        retry_in = self.random.choice((0, SECOND, 2 * LEASE))
        return self.random.choice(
            (
                ReleaseJob(order_id=ORDER_ID, fence=fence, retry_in=retry_in),
                FailJob(order_id=ORDER_ID, fence=fence, error="a bug", retry_in=retry_in),
                ParkJob(order_id=ORDER_ID, fence=fence, error="look at this"),
                ParkJob(
                    order_id=ORDER_ID,
                    fence=fence,
                    error="refused",
                    outcome=PaymentOutcome.DECLINED,
                    refund=self.story.calling if self.is_refunding else None,
                ),
            )
        )

    @property
    def is_refunding(self) -> bool:
        job = self.story.job
        return job is not None and job.kind is JobKind.REFUND and self.story.order.charging

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
        decision = judge(story, command)
        assert judge(story, command) == decision
        assert (order, job, replay(story.events)) == before
        if not isinstance(decision, Decision):
            assert issubclass(decision[0], reason or Conflict)
            return
        assert reason is None
        assert story.give(command) == decision
        another = story.job is not None and story.job.holder is None and story.job.due_at <= story.now
        if isinstance(command, ClaimJob) and another:
            pass  # it parked one refund, and the next one can be claimed
        elif isinstance(command, (PlaceOrder, ClaimJob, WorkerCommand)) and story.current is not None:
            with pytest.raises((DuplicateOrder, StaleLease)):
                decide(story.current, story.job, command, now, story.open_refunds)
        self.check_moves(seen)
        for number, attempt in story.attempts.items():
            if number not in attempts:
                self.check_new_attempt(attempt, [story.attempts[earlier] for earlier in attempts])
            elif attempt != attempts[number] and not isinstance(command, HearGateway):
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
                    PaymentStatus.ACTION_REQUIRED,
                    PaymentStatus.AUTHORIZED,
                    PaymentStatus.PAID,
                    PaymentStatus.DECLINED,
                    PaymentStatus.VOIDED,
                )
            order = after

    def check_new_attempt(self, attempt: Attempt, earlier: list[Attempt]) -> None:
        """Nothing is sent while a charge is open; a new key follows a definite decline and nothing else."""
        assert attempt.number == len(earlier) + 1
        charges = [other for other in earlier if other.action == "charge"]
        assert None not in {other.outcome for other in earlier}
        if attempt.action == "refund":
            assert PaymentOutcome.SUCCEEDED in {other.outcome for other in earlier}
            return
        assert PaymentOutcome.SUCCEEDED not in {other.outcome for other in earlier}
        if attempt.action in ("capture", "void"):
            return
        assert attempt.action == "charge"
        of_key = {charge.outcome for charge in charges if charge.gateway_key == attempt.gateway_key}
        assert {charge.outcome for charge in charges}.isdisjoint(OPEN_OR_DONE)
        assert of_key.isdisjoint({PaymentOutcome.DECLINED, PaymentOutcome.AUTHORIZED, PaymentOutcome.VOIDED})
        assert attempt.gateway_key == gateway_key(ORDER_ID, self.story.order.generation)

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
        assert replay(events) == (None if order is None else without_secrets(order))
        assert order is None or (order.version, order.updated_at) == (len(events), events[-1].at)
        if events:
            last = events[-1]
            shown = event_document(last.number, last.at, last.type, msgspec.json.encode(last.data).decode()).data
            assert set(msgspec.json.decode(msgspec.json.encode(shown))) <= set(EVENTS[last.type].data), last.type

    def check_rest(self, order: Order) -> None:
        """An order has a job of the kind that its state asks for, perhaps parked, exactly if it is not at rest."""
        job = self.story.job
        assert (job is None) == order.at_rest
        if job is not None:
            assert job.kind is not JobKind.REFUND or order.refunding_minor
            assert order.payment_status is not PaymentStatus.UNKNOWN or job.kind is JobKind.CHARGE
            assert not order.charging or job.kind in GATEWAY_KINDS
            assert job.then_kind is None or job.kind in (JobKind.REFUND, JobKind.CHARGE)
            assert job.claims >= (job.holder is not None)
            assert (job.dead_at is None) == (job.due_at != NEVER) or job.kind is JobKind.REPORT
            assert job.kind is not JobKind.REPORT or order.status is Status.PROCESSING
            assert job.dead_at is None or job.holder is None

    def check_money(self, order: Order) -> None:
        """The laws hold; and nobody moves an order on whose charge is open, or gives its money back."""
        assert list(breaches(self.story.dossier)) == []
        if order.charge_open and not order.charged_late:
            commands = [CancelOrder(order_id=ORDER_ID), DeleteOrder(order_id=ORDER_ID)]
            others = [status for status in Status if status is not order.status]
            commands += [ChangeStatus(order_id=ORDER_ID, status=status, through=True) for status in others]
            commands += [ChangeStatus(order_id=ORDER_ID, status=status) for status in others]
            commands += [RefundOrder(order_id=ORDER_ID)]
            job = self.story.job
            parked = job is not None and job.dead_at is not None
            by_hand = (Status.CONFIRMED, Status.PAYMENT_FAILED)
            for command in commands:
                if parked and isinstance(command, ChangeStatus) and command.status in by_hand:
                    continue  # a person has looked the charge up, and says what they found
                refused = judge(self.story, command)
                assert not isinstance(refused, Decision)
                assert issubclass(refused[0], (MoneyInFlight, IllegalTransition))

    def check_road(self, order: Order) -> None:
        """No road leads to a stage that it does not have."""
        job = self.story.job
        if order.stages is Stages.FULFILMENT or not order.total_minor:
            assert order.payment_status is PaymentStatus.NOT_REQUIRED
            assert not self.story.attempts
        if order.stages is Stages.FULFILMENT:
            assert job is None or job.kind in (JobKind.FULFIL, JobKind.REPORT)
        if order.stages is Stages.PAYMENT:
            assert order.status not in (Status.PROCESSING, Status.COMPLETED, Status.FAILED)
            assert job is None or job.kind not in (JobKind.FULFIL, JobKind.REPORT)

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
        story.attempts, story.refunds = dict(self.story.attempts), dict(self.story.refunds)
        for _ in range(5 + len(story.refunds)):
            if story.job is not None and story.job.dead_at is not None:
                story.retry()
            carry_out(story)
        assert story.order.at_rest


def judge(story: Story, command: Command) -> Decision | tuple[type, str]:
    """Return what `decide` says: the decision, or the type and text of its refusal."""
    try:
        return decide(story.current, story.job, command, story.now, story.open_refunds)
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
        kinds = {
            RecordPayment: {JobKind.CHARGE},
            RecordFulfilment: {JobKind.FULFIL},
            RecordRefund: {JobKind.REFUND},
            RecordReserved: {JobKind.CAPTURE, JobKind.VOID},
        }
        held = (
            order is not None
            and job is not None
            and job.holder is not None
            and job.fence == command.fence
            and job.due_at > max(story.now, order.updated_at)
            and job.kind in kinds.get(type(command), {job.kind})
        )
        return None if held else StaleLease
    if order is None:
        return OrderNotFound
    if isinstance(command, HearGateway):
        return None
    assert isinstance(command, Change)
    return PreconditionFailed if command.if_version not in (None, order.version) else None


def carry_out(story: Story) -> None:
    """Claim the job and have its call succeed."""
    if story.job is None:
        return
    if story.job.kind is JobKind.REPORT:
        story.give(ReportFulfilment(order_id=ORDER_ID, done=True))
        return
    story.claim(claims_max=10**6)
    match story.job and story.job.kind:
        case JobKind.CHARGE:
            story.payment(PaymentOutcome.SUCCEEDED)
        case JobKind.FULFIL:
            story.fulfilment(FulfilmentOutcome.DONE)
        case JobKind.REFUND:
            story.refund(PaymentOutcome.SUCCEEDED)
        case JobKind.CAPTURE:
            story.reserved(PaymentOutcome.SUCCEEDED)
        case JobKind.VOID:
            story.reserved(PaymentOutcome.VOIDED)


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
