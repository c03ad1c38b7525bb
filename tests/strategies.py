"""Commands for one order, and what becomes of it: shared by the tests of the core."""

from msgspec.structs import replace

from expediter.orders.commands import (
    CancelOrder,
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
    RetryOrder,
)
from expediter.orders.decisions import decide
from expediter.orders.draft import Decision
from expediter.orders.events import Event, Placed
from expediter.orders.laws import Dossier
from expediter.orders.order import (
    Attempt,
    AttemptResult,
    Job,
    Line,
    Order,
    OrderRefund,
    PaymentOutcome,
    Stages,
    Status,
    gateway_key,
)

SECOND = 1_000_000
#: 2026-01-01 12:00:00 UTC, in microseconds.
NOON = 1_767_268_800 * SECOND
LEASE = 30 * SECOND
CLAIMS_MAX = 5
FAILURES_MAX = 3
ORDER_ID = "ORD-1"


def place_order(
    stages: Stages = Stages.PAYMENT_FULFILMENT, total_minor: int = 2598, priced: bool = True
) -> PlaceOrder:
    """Return the command that places an order of one line."""
    return PlaceOrder(
        order_id=ORDER_ID,
        fresh=True,
        customer_id="customer_123",
        customer_name=None,
        currency="EUR",
        total_minor=total_minor,
        priced=priced,
        lines=(Line(1, "item_001", "Burger", 1, total_minor if priced else None),),
        metadata="{}",
        payment_token=None,
        stages=stages,
    )


class Story:
    """One order from its placing on: gives commands to `decide`, keeps all events, attempts and statuses."""

    def __init__(self) -> None:
        """Begin at noon, with no order yet."""
        self.now = NOON
        self.current: Order | None = None
        self.job: Job | None = None
        self.events: list[Event] = []
        self.attempts: dict[int, Attempt] = {}
        self.refunds: dict[int, OrderRefund] = {}

    @classmethod
    def of(
        cls, stages: Stages = Stages.PAYMENT_FULFILMENT, total_minor: int = 2598, priced: bool = True
    ) -> "Story":
        """Place an order and return its story."""
        story = cls()
        story.give(place_order(stages, total_minor, priced))
        return story

    @property
    def order(self) -> Order:
        """The order as it is now; it must exist."""
        assert self.current is not None
        return self.current

    @property
    def fence(self) -> int:
        """The fence in force; there must be a job."""
        assert self.job is not None
        return self.job.fence

    @property
    def statuses(self) -> list[str]:
        """Every status that the order has been in, by the events."""
        seen: list[str] = []
        for event in self.events:
            status = event.data.order.status if isinstance(event.data, Placed) else event.data.status
            if isinstance(status, Status) and seen[-1:] != [str(status)]:
                seen.append(str(status))
        return seen

    @property
    def outcomes(self) -> list[str | None]:
        """What became of each call to the gateway, in order."""
        return [attempt.outcome and str(attempt.outcome) for attempt in self.attempts.values()]

    @property
    def keys(self) -> list[str]:
        """The gateway key of each call, in order."""
        return [attempt.gateway_key for attempt in self.attempts.values()]

    def give(self, command: Command) -> Decision:
        """Carry out one command."""
        decision = decide(self.current, self.job, command, self.now, self.open_refunds)
        self.current, self.job = decision.order, decision.job
        self.events += decision.events
        for attempt in decision.attempts:
            if isinstance(attempt, AttemptResult):
                self.attempts[attempt.number] = finished(self.attempts[attempt.number], attempt)
            else:
                self.attempts[attempt.number] = attempt
        self.refunds |= {refund.number: refund for refund in decision.refunds}
        return decision

    @property
    def open_refunds(self) -> list[OrderRefund]:
        """The refunds that are not settled."""
        return [refund for refund in self.refunds.values() if refund.open]

    @property
    def dossier(self) -> Dossier:
        """All that is stored about the order."""
        lines = self.events[0].data.lines if isinstance(self.events[0].data, Placed) else ()
        refunds = [self.refunds[number] for number in sorted(self.refunds)]
        return Dossier(self.order, self.job, lines, self.events, list(self.attempts.values()), refunds)

    def ask_refund(
        self, amount: str | None = None, *, by_hand: bool = False, reference: str | None = None
    ) -> None:
        """Ask for money back."""
        self.give(RefundOrder(order_id=ORDER_ID, amount=amount, by_hand=by_hand, reference=reference))

    def reserved(self, outcome: PaymentOutcome) -> None:
        """Report what became of reserved money that was to be captured or let go of."""
        self.give(RecordReserved(order_id=ORDER_ID, fence=self.fence, outcome=outcome, retry_in=SECOND))

    def hear(self, outcome: PaymentOutcome, *, generation: int | None = None, refunded_minor: int = 0) -> None:
        """Let the gateway say by itself what became of the payment."""
        order = self.order
        taken = outcome is PaymentOutcome.SUCCEEDED
        self.give(
            HearGateway(
                order_id=ORDER_ID,
                key=gateway_key(ORDER_ID, generation or order.generation),
                key_prefix="",
                outcome=outcome,
                amount_minor=order.total_minor,
                currency=order.currency,
                captured_minor=order.total_minor if taken else 0,
                refunded_minor=refunded_minor,
                reference="pay_1",
                action='{"type":"redirect","url":"https://bank.example/1"}',
                action_until=self.now + 900 * SECOND,
            )
        )

    def wait(self, microseconds: int) -> None:
        """Let time pass."""
        self.now += microseconds

    def wait_until_due(self) -> None:
        """Let time pass until the job can be claimed."""
        assert self.job is not None
        self.now = max(self.now, self.job.due_at)

    def claim(self, claims_max: int = CLAIMS_MAX) -> None:
        """Let a worker claim the job when it is due."""
        self.wait_until_due()
        self.give(ClaimJob(order_id=ORDER_ID, holder="worker", lease=LEASE, claims_max=claims_max))

    def crash(self) -> None:
        """Let a worker claim the job and never come back."""
        self.claim()
        self.wait_until_due()

    def payment(
        self,
        outcome: PaymentOutcome,
        *,
        retry_in: int = SECOND,
        counts: bool = True,
        lease: int = 0,
        fence: int | None = None,
    ) -> None:
        """Report what the gateway said to the charge, under the fence in force or another."""
        self.give(
            RecordPayment(
                order_id=ORDER_ID,
                fence=self.fence if fence is None else fence,
                outcome=outcome,
                reference="ch_1" if outcome is PaymentOutcome.SUCCEEDED else None,
                error=None if outcome is PaymentOutcome.SUCCEEDED else f"the gateway: {outcome}",
                retry_in=retry_in,
                counts=counts,
                failures_max=FAILURES_MAX,
                lease=lease,
            )
        )

    def fulfilment(self, outcome: FulfilmentOutcome, *, fence: int | None = None) -> None:
        """Report what the fulfiller said."""
        self.give(
            RecordFulfilment(
                order_id=ORDER_ID,
                fence=self.fence if fence is None else fence,
                outcome=outcome,
                error=None if outcome is FulfilmentOutcome.DONE else f"the kitchen: {outcome}",
                retry_in=SECOND,
                failures_max=FAILURES_MAX,
            )
        )

    def refund(self, outcome: PaymentOutcome) -> None:
        """Report what the gateway said to the refund."""
        number = self.calling
        self.give(
            RecordRefund(order_id=ORDER_ID, fence=self.fence, refund=number, outcome=outcome, retry_in=SECOND)
        )

    @property
    def calling(self) -> int:
        """The number of the refund that was asked for last at the gateway."""
        started = [event.data.refund for event in self.events if event.type == "refund.started"]  # type: ignore[union-attr]
        return int(started[-1]) if started else 1  # type: ignore[arg-type]

    def release(self, retry_in: int = 0) -> None:
        """Give the job back unused."""
        self.give(ReleaseJob(order_id=ORDER_ID, fence=self.fence, retry_in=retry_in))

    def fail(self, error: str = "a bug") -> None:
        """Give the job back after an error that nobody foresaw."""
        self.give(FailJob(order_id=ORDER_ID, fence=self.fence, error=error, retry_in=SECOND))

    def park(self, error: str = "look at this") -> None:
        """Set the job aside."""
        self.give(ParkJob(order_id=ORDER_ID, fence=self.fence, error=error))

    def change(self, status: Status, if_version: int | None = None) -> None:
        """Move the order by hand."""
        self.give(ChangeStatus(order_id=ORDER_ID, status=status, if_version=if_version))

    def cancel(self, if_version: int | None = None) -> None:
        """Cancel the order."""
        self.give(CancelOrder(order_id=ORDER_ID, if_version=if_version))

    def retry(self, if_version: int | None = None) -> None:
        """Ask for what failed to be tried again."""
        self.give(RetryOrder(order_id=ORDER_ID, if_version=if_version))

    def delete(self, if_version: int | None = None) -> None:
        """Delete the order."""
        self.give(DeleteOrder(order_id=ORDER_ID, if_version=if_version))

    def pay(self) -> None:
        """Claim the charge and have it succeed."""
        self.claim()
        self.payment(PaymentOutcome.SUCCEEDED)

    def fulfil(self) -> None:
        """Claim the fulfilment and have it done."""
        self.claim()
        self.fulfilment(FulfilmentOutcome.DONE)

    def give_back(self) -> None:
        """Claim the refund and have it succeed."""
        self.claim()
        self.refund(PaymentOutcome.SUCCEEDED)


def finished(attempt: Attempt, result: AttemptResult) -> Attempt:
    """Return the attempt with its result, as its row holds it."""
    return replace(
        attempt,
        finished_at=result.finished_at,
        outcome=result.outcome,
        reference=result.reference,
        error=result.error,
    )


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
