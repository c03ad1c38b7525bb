"""What a process measures of its work: claims, stages, calls to the outside, and webhooks."""

from __future__ import annotations

from expediter.orders.commands import FulfilmentOutcome, RecordCall, RecordFulfilment, WorkerCommand
from expediter.orders.order import JobKind
from expediter.orders.resilience import GATEWAY_KINDS
from expediter.store.webhooks import Tried
from expediter.telemetry.meters import Bounded, Counts, Family, Histogram, Histograms, counter, gauge, histogram

#: A call to the gateway or the fulfiller that ended in a job set aside.
PARKED = "parked"
#: What becomes of one try to deliver a webhook.
DELIVERED, REFUSED, UNANSWERED = "delivered", "refused", "unanswered"


class Work:
    """Claims, stages, and calls to the gateway and the fulfiller. Use it from one event loop."""

    def __init__(self) -> None:
        """Nothing was done yet."""
        self._claims = Histogram()
        self._claimed = 0
        self._stages = Histograms("stage")
        self._gateway = Histograms("call", "outcome")
        self._fulfiller = Histograms("outcome")

    def claimed(self, jobs: int, seconds: float) -> None:
        """Take note of a claim that brought so many jobs."""
        self._claims.observe(seconds)
        self._claimed += jobs

    def called(self, kind: JobKind, command: WorkerCommand, seconds: float) -> None:
        """Take note of what came of a call to the outside, and how long that took."""
        if kind in GATEWAY_KINDS:
            outcome = command.outcome.value if isinstance(command, RecordCall) else PARKED
            self._gateway.observe(seconds, kind.value, outcome)
        elif kind is JobKind.FULFIL:
            done = command.outcome if isinstance(command, RecordFulfilment) else FulfilmentOutcome.UNAVAILABLE
            self._fulfiller.observe(seconds, done.value)

    def ended(self, kind: JobKind, seconds: float) -> None:
        """Take note of a stage that is over, its outcome stored."""
        self._stages.observe(seconds, kind.value)

    def families(self, running: int, concurrency: int) -> list[Family]:
        """Return what was measured, and how many jobs of how many run now."""
        return [
            histogram(
                "claim_duration_seconds",
                "Seconds of a claim, also of one that found no job.",
                self._claims.samples(),
            ),
            counter("claimed_jobs", "Jobs that claims have brought.", self._claimed),
            histogram(
                "stage_duration_seconds",
                "Seconds of a stage, from its claim until its outcome was stored.",
                self._stages.samples(),
            ),
            histogram(
                "gateway_call_duration_seconds",
                "Seconds of a call to the payment gateway; a look before a charge belongs to it.",
                self._gateway.samples(),
            ),
            histogram(
                "fulfiller_call_duration_seconds", "Seconds of a call to the fulfiller.", self._fulfiller.samples()
            ),
            gauge("jobs_running", "Jobs that run in this process.", running),
            gauge("jobs_running_max", "Jobs that this process runs at once, at most.", concurrency),
        ]


class Deliveries:
    """Tries to deliver webhooks. Use it from one event loop."""

    def __init__(self) -> None:
        """Nothing was sent yet."""
        self._endpoint = Bounded()
        self._tries = Counts("endpoint", "outcome")
        self._seconds = Histograms("outcome")

    def tried(self, endpoint_id: str, tried: Tried) -> None:
        """Take note of a try."""
        outcome = DELIVERED if tried.error is None else UNANSWERED if tried.answer_status is None else REFUSED
        self._tries.add(self._endpoint(endpoint_id), outcome)
        self._seconds.observe(tried.took_ms / 1000, outcome)

    def families(self) -> list[Family]:
        """Return what was measured."""
        return [
            counter("webhook_deliveries", "Tries to deliver an event.", self._tries.samples()),
            histogram(
                "webhook_delivery_duration_seconds", "Seconds of a try to deliver.", self._seconds.samples()
            ),
        ]
