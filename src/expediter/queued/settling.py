"""Carrying out what was accepted: it is stored, found stored, or refused with the reason on its order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog

from expediter.backends.brokers import Broker
from expediter.backends.points import reach
from expediter.backends.redis_client import RedisUnavailable
from expediter.backends.tasks import Pauses
from expediter.errors import (
    BrokerUnavailable,
    ClearedAway,
    ConstraintViolated,
    DuplicateOrder,
    ExpediterError,
    IdempotencyMismatch,
    NotYetApplied,
    OrderNotFound,
    OrderUnreadable,
    RequestFailed,
    Unavailable,
)
from expediter.orders.commands import DeleteOrder, PlaceOrder
from expediter.orders.order import MICROSECONDS
from expediter.queued.message import QueuedCommand, pack
from expediter.queued.temporary import Settled, TemporaryOrders
from expediter.store.committer import Committer
from expediter.store.gathering import BATCH_REQUESTS_MAX
from expediter.store.submissions import Outcome, Replayed, Request

#: Pause after the database was not there, in seconds: it grows from one to the other.
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 2.0
#: Seconds after its acceptance for which a command waits for those before it: a broker may leave them to a worker
#: that died for a minute.
PREDECESSOR_SECONDS = 75.0
#: Seconds for which a command that meets a bug is tried again before it is put aside.
FAILING_SECONDS = 6.0
#: How often one alone may fail while the database does everything else.
FAILING_TIMES = 3
#: Seconds after which a command is looked at again that waits, or that failed.
AGAIN_SECONDS = 0.5

log = structlog.get_logger(__name__)


class Settler:
    """Carries out accepted commands by a committer, and says in Redis what became of them."""

    def __init__(self, committer: Committer, temporary: TemporaryOrders, broker: Broker) -> None:
        """Store by `committer`, settle what `temporary` shows, and put aside at `broker` what always fails."""
        self._committer = committer
        self._temporary = temporary
        self._broker = broker
        #: Commands that met a bug here, and when they first did.
        self._failing: dict[str, float] = {}
        #: Whether it was said that the database is away.
        self._away = False

    async def carry_out(self, commands: Sequence[QueuedCommand], *, again: bool) -> bool:
        """Carry out commands, waiting for the database for as long as it takes; `again`: some may be stored.

        What must wait for another, or failed, is left to the sweep. Returns whether that could be told: if not,
        these commands must come again.
        """
        now = time.time() * MICROSECONDS
        done: list[Settled] = []
        left, refused = list(commands), True
        while left and refused:  # what one was refused for is noted by now, and the one behind it waits no longer
            requests = [
                each.request(waits=now - each.accepted_at < PREDECESSOR_SECONDS * MICROSECONDS, again=again)
                for each in left
            ]
            asked, left, refused = left, [], False
            for command, outcome in zip(asked, await self._submit(requests), strict=True):
                settled = await self._settled(command, outcome, again)
                if settled is None:
                    left.append(command)
                else:
                    done.append(settled)
                    refused = refused or isinstance(outcome, ExpediterError)
                    self._failing.pop(command.token, None)
        reach("applied")
        try:
            await self._temporary.settle(done)
            await self._temporary.look_again(left, seconds=AGAIN_SECONDS)
        except RedisUnavailable as error:
            # What is stored stays in the set, and the sweep looks at it once Redis is back.
            log.warning(
                "stored orders stay marked as waiting: Redis cannot be reached", often=True, error=str(error)
            )
            return not left
        return True

    async def _settled(self, command: QueuedCommand, outcome: Outcome, again: bool) -> Settled | None:
        """Return what became of a command; None: it must be looked at again."""
        if isinstance(outcome, (RequestFailed, OrderUnreadable)):
            return await self._put_aside(command, str(outcome))
        twice = isinstance(outcome, ConstraintViolated) and not again  # what was thought to be new may be stored
        if twice or isinstance(outcome, (NotYetApplied, Unavailable)):
            return None
        if isinstance(outcome, ClearedAway):
            log.info("a queued command is dropped", reason=str(outcome))
            return Settled(command, "gone")
        if isinstance(outcome, Replayed) and (other := command.other_order(outcome.answer)):
            return Settled(command, error=other)
        # A fresh id is its own: whatever order has it is the same one, stored before.
        fresh = isinstance(command.command, PlaceOrder) and command.command.fresh
        if not isinstance(outcome, ExpediterError) or (fresh and isinstance(outcome, DuplicateOrder)):
            return Settled(command, "deleted" if isinstance(command.command, DeleteOrder) else "stored")
        reason = str(outcome)
        log.warning("a queued command was refused", often=True, order_id=command.order_id, error=reason)
        # The key of a mismatch is another request's, and could keep nothing.
        if not isinstance(outcome, (IdempotencyMismatch, OrderNotFound)):
            (outcome,) = await self._submit([command.refusal(reason)])
        if isinstance(outcome, (Unavailable, RequestFailed)):
            return None  # the refusal itself could not be noted now
        return Settled(command, error=reason if isinstance(outcome, ExpediterError) else None)

    async def _put_aside(self, command: QueuedCommand, reason: str) -> Settled | None:
        """Put a command among the dead that meets a bug again and again."""
        now = time.monotonic()
        if now - self._failing.setdefault(command.token, now) < FAILING_SECONDS:
            return None
        log.error("a command is put aside among the dead", often=True, order_id=command.order_id, reason=reason)
        try:
            await self._broker.put_aside(pack([command]), reason)
        except BrokerUnavailable:
            return None
        return Settled(command, error=f"It is put aside: {reason}")

    async def _submit(self, requests: Sequence[Request]) -> list[Outcome]:
        parts = [
            requests[start : start + BATCH_REQUESTS_MAX] for start in range(0, len(requests), BATCH_REQUESTS_MAX)
        ]
        return [outcome for part in await asyncio.gather(*map(self._store, parts)) for outcome in part]

    async def _store(self, requests: Sequence[Request], pause: float = PAUSE_SECONDS_MIN) -> list[Outcome]:
        pauses = Pauses(pause, PAUSE_SECONDS_MAX)
        failed, suspect = 0, False
        while True:
            try:
                # What fails while the database works may only have had a neighbour that does: then by itself.
                outcomes = await self._committer.submit_patiently(requests, alone=suspect)
                self._away = False
                return outcomes
            except Unavailable as error:
                if not self._away:
                    log.info("queued commands wait for the database", error=str(error))
                self._away = True
                # Until the drain is over: then the task is cancelled and the broker keeps them.
                await asyncio.sleep(pauses.next())
                if len(requests) > 1:
                    # One of them may be what the database cannot do.
                    middle = len(requests) // 2
                    parts = (self._store(part, pauses.next()) for part in (requests[:middle], requests[middle:]))
                    return [outcome for stored in await asyncio.gather(*parts) for outcome in stored]
                works = await self._committer.trouble() is None
                failed += suspect and works
                suspect = works
                if failed >= FAILING_TIMES:
                    return [RequestFailed(f"the database fails at it, and at nothing else: {error}")]
            except ConstraintViolated as error:
                return [error for _ in requests]
            except Exception as error:
                log.exception("queued commands could not be applied", count=len(requests))
                return [RequestFailed(f"{type(error).__name__}: {error}") for _ in requests]
