"""The worker: claims due jobs, runs their stages side by side, hands in what came of them.

Losing a hint costs latency and nothing else: the worker also looks by itself, and finds whatever was left behind,
because a lease that has run out is a job that is due.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from time import monotonic

import structlog

from expediter.backends.points import reach
from expediter.backends.tasks import Background, Pauses
from expediter.errors import ExpediterError, StaleLease, Unavailable
from expediter.orders.commands import (
    FailJob,
    RecordCall,
    RecordPayment,
    RecordRefund,
    RecordReserved,
    ReleaseJob,
    WorkerCommand,
)
from expediter.orders.order import MICROSECONDS, JobKind, Order, PaymentOutcome
from expediter.orders.resilience import (
    GATEWAY_KINDS,
    POSTPONED_MAX,
    POSTPONED_MIN,
    Breaker,
    CallWatch,
    RetryBudget,
    backoff,
)
from expediter.store.committer import Committer
from expediter.store.submissions import Applied, Asked, ClaimDue, Claimed, Claims, ReportBreaker, Request
from expediter.telemetry.meters import Family
from expediter.work.measured import Work
from expediter.work.stages import Tools, run

#: Jobs in one claim, at most.
CLAIM_MAX = 50
#: A job that was claimed this often without an outcome is parked.
CLAIMS_MAX = 5
#: The idle worker looks for due jobs by itself; the pause grows from one to the other, in seconds.
POLL_SECONDS_MIN = 0.02
POLL_SECONDS_MAX = 0.5
#: How long a stopping worker takes to give back what it could not finish, in seconds.
GIVE_BACK_SECONDS_MAX = 2.0
#: Pause before an outcome is handed in again after the database refused it, in seconds.
HAND_IN_AGAIN_SECONDS = 0.2

log = structlog.get_logger(__name__)


class Worker:
    """Works off jobs, `concurrency` of them at once. Use it from one event loop."""

    def __init__(
        self,
        committer: Committer,
        tools: Tools,
        *,
        holder: str,
        concurrency: int,
        breaker_threshold: int,
        breaker_recovery: int,
    ) -> None:
        """`holder` names this process in leases; `breaker_recovery` is in microseconds."""
        self._committer = committer
        self._tools = tools
        self._holder = holder
        self._concurrency = concurrency
        self._threshold = breaker_threshold
        self._recovery = breaker_recovery
        self._wake = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self.background = Background("worker", self._run)
        self._give_up = False
        self._breaker = Breaker()
        self._watch = CallWatch(breaker_threshold)
        self._budget = RetryBudget()
        #: Whether it was said that outcomes wait for the database.
        self._away = False
        self._measured = Work()

    @property
    def busy(self) -> int:
        """How many jobs run now."""
        return len(self._running)

    def families(self) -> list[Family]:
        """Return what this process has measured of its jobs."""
        return self._measured.families(self.busy, self._concurrency)

    def start(self) -> None:
        """Begin to claim."""
        self._committer.on_commit(self._notice)
        self.background.start()

    def stop_claiming(self) -> None:
        """Claim no more; what runs goes on."""
        self.background.stop_soon()
        self._wake.set()

    async def stop(self, drain_seconds: float) -> None:
        """Claim no more, let what runs end within `drain_seconds`, then give the rest back."""
        self.stop_claiming()
        until = asyncio.get_running_loop().time() + drain_seconds
        await self.background.stop(drain_seconds)
        if self._running:
            await asyncio.wait(self._running, timeout=max(0.0, until - asyncio.get_running_loop().time()))
        self._give_up = True
        for task in self._running:
            task.cancel()
        if self._running:
            # What cannot be handed in now is found again when its lease ends.
            await asyncio.wait(self._running, timeout=GIVE_BACK_SECONDS_MAX)

    def wake(self) -> None:
        """Look for due jobs now."""
        self._wake.set()

    def _notice(self, changes: Sequence[Applied]) -> None:
        for change in changes:
            if change.job is not None and change.job.holder is None:
                self.wake()
                return

    async def _run(self) -> None:
        pauses = Pauses(POLL_SECONDS_MIN, POLL_SECONDS_MAX)
        while not self.background.stopping:
            self._wake.clear()
            free = min(self._concurrency - len(self._running), CLAIM_MAX)
            claims = await self._claim(free) if free > 0 else None
            if claims is not None and claims.claimed:
                pauses.reset()
                reach("claimed")
                for claimed in claims.claimed:
                    self._spawn(claimed)
            if claims is not None and len(claims.changed) >= max(free, 1):
                continue  # there may be more, also where the claim itself was all that had to be done
            await self._rest(pauses.next(), claims)

    async def _rest(self, pause: float, claims: Claims | None) -> None:
        if claims is not None and claims.next_due_at is not None:
            pause = min(pause, max(0.0, (claims.next_due_at - claims.now) / MICROSECONDS))
        try:
            async with asyncio.timeout(pause):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _claim(self, limit: int) -> Claims | None:
        tools = self._tools
        asked = ClaimDue(self._holder, limit, tools.lease, CLAIMS_MAX, tools.key_prefix, tools.kinds)
        began = monotonic()
        try:
            claims = (await self._committer.submit_patiently([asked]))[0]
        except ExpediterError as error:
            log.warning("jobs cannot be claimed now", error=str(error))
            return None
        assert isinstance(claims, Claims)
        self._measured.claimed(len(claims.claimed), monotonic() - began)
        self._hear(claims.breaker)
        return claims

    def _hear(self, breaker: Breaker) -> None:
        if self._breaker.open_until is not None and breaker.open_until is None:
            self._budget.forget()
        self._breaker = breaker

    def _spawn(self, claimed: Claimed) -> None:
        task = asyncio.create_task(self._work(claimed))
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()):
            log.error("a job ended with an error of the worker's own", often=True, exc_info=error)

    async def _work(self, claimed: Claimed) -> None:
        next_step: Claimed | None = claimed
        while next_step is not None:
            until = asyncio.get_running_loop().time() + self._tools.lease / MICROSECONDS
            kind = next_step.job.kind
            calls = kind in GATEWAY_KINDS
            under_way = self._watch.begin() if calls else 0
            began = monotonic()
            command, told = await self._attempt(next_step)
            if told:
                self._measured.called(kind, command, monotonic() - began)
            report = self._breaker_report(next_step, command, under_way, told=told) if calls else None
            reach("called")
            next_step = await self._hand_in(command, report, until)
            self._measured.ended(kind, monotonic() - began)
            reach("handed in")

    async def _attempt(self, claimed: Claimed) -> tuple[WorkerCommand, bool]:
        """Return what came of the job, and whether that tells anything about the other side."""
        order, fence = claimed.order, claimed.job.fence
        if claimed.job.kind in GATEWAY_KINDS and not claimed.probe:
            if self._breaker.open_until is not None:
                return ReleaseJob(order_id=order.order_id, fence=fence), False
            if not claimed.job.failures:
                self._budget.first()
            elif not self._budget.take(asyncio.get_running_loop().time()):
                later = random.randint(POSTPONED_MIN, POSTPONED_MAX)
                return ReleaseJob(order_id=order.order_id, fence=fence, retry_in=later), False
        try:
            return await run(claimed, self._tools, claimed.job.due_at - self._tools.lease), True
        except asyncio.CancelledError:
            # The drain's time is up. The call may have gone out: whoever comes next settles it first.
            return _interrupted(claimed, order), False
        except Exception as error:
            # A stage failed in a way that nobody foresaw: the claim stays counted, so it cannot go on for ever.
            log.exception("a stage failed", often=True, order_id=order.order_id, kind=claimed.job.kind)
            retry_in = backoff(claimed.job.failures + 1, random.random())
            return FailJob(order_id=order.order_id, fence=fence, error=_short(error), retry_in=retry_in), False

    def _breaker_report(
        self, claimed: Claimed, command: WorkerCommand, under_way: int, *, told: bool
    ) -> ReportBreaker | None:
        """Return what the breaker must hear of a call that has ended: nothing while all is well."""
        if not told or not isinstance(command, RecordCall):
            self._watch.end(under_way, failed=None)
            return None
        away = command.outcome in (PaymentOutcome.UNAVAILABLE, PaymentOutcome.UNKNOWN)
        self._budget.end(failed=away)
        down = self._watch.end(under_way, failed=away)
        if not (down or claimed.probe or (not away and self._breaker.open_until is not None)):
            return None
        return ReportBreaker(
            not away,
            self._threshold,
            self._recovery,
            claimed.probe,
            claimed.order.order_id,
            failures=max(1, self._watch.failures),
        )

    async def _hand_in(self, command: WorkerCommand, report: ReportBreaker | None, until: float) -> Claimed | None:
        """Store the outcome; return the next step if the job was kept for it."""
        asked: list[Asked] = [Request(command)]
        if report is not None:
            asked.append(report)
        while True:
            try:
                outcomes = await self._committer.submit_patiently(asked)
                break
            except Unavailable as error:
                if self._give_up or asyncio.get_running_loop().time() > until:
                    log.warning(
                        "an outcome could not be stored; the job is found again", order_id=command.order_id
                    )
                    return None
                if not self._away:
                    log.warning(
                        "outcomes wait for the database", often=True, order_id=command.order_id, error=str(error)
                    )
                self._away = True
                await asyncio.sleep(HAND_IN_AGAIN_SECONDS)
        self._away = False
        for outcome in outcomes:
            if isinstance(outcome, Breaker):
                self._hear(outcome)
                if outcome.open_until is not None:
                    self._watch.forget()  # all know it now
        first = outcomes[0]
        if isinstance(first, StaleLease):
            log.info("a lease was lost; its outcome is dropped", order_id=command.order_id)
            self._watch.forget()  # its calls failed because this process slept
        elif isinstance(first, ExpediterError):
            log.error("an outcome was refused", often=True, order_id=command.order_id, error=str(first))
        elif isinstance(first, Applied) and first.job is not None and first.job.holder == self._holder:
            return Claimed(first.order, first.job)
        return None


def _interrupted(claimed: Claimed, order: Order) -> WorkerCommand:
    order_id, fence, unknown = order.order_id, claimed.job.fence, PaymentOutcome.UNKNOWN
    error = "the service stopped during the call to the gateway"
    if claimed.job.kind is JobKind.CHARGE:
        return RecordPayment(order_id=order_id, fence=fence, outcome=unknown, error=error, counts=False)
    if claimed.refund is not None:
        number = claimed.refund.number
        return RecordRefund(order_id=order_id, fence=fence, refund=number, outcome=unknown, error=error)
    if claimed.job.kind in (JobKind.CAPTURE, JobKind.VOID):
        return RecordReserved(order_id=order_id, fence=fence, outcome=unknown, error=error)
    return ReleaseJob(order_id=order_id, fence=fence)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
