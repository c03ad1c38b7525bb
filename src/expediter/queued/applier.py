"""The applier: brings queued commands into the database, from the broker and from the set of what was accepted.

A command is stored, found stored, or refused with the reason on its order. A message is acknowledged when each of
its commands is settled, or left to the sweep. The sweep finds in the set what is there for too long: its message
or its broker is lost, it waits for another, or it is stored and Redis could not be told. Carrying it out again
settles it, and changes nothing twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

import structlog
from msgspec.structs import replace

from expediter.backends.brokers import Broker, Topic
from expediter.backends.points import reach
from expediter.backends.redis_client import RedisUnavailable
from expediter.backends.tasks import Background, Pauses
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
from expediter.queued.message import QueuedCommand, own_key, pack, unpack
from expediter.queued.temporary import Settled, TemporaryOrders
from expediter.store.committer import Committer
from expediter.store.gathering import BATCH_REQUESTS_MAX
from expediter.store.submissions import Outcome, Replayed, Request

#: Messages taken at once, and how many take them side by side: one round is stored while the next one is read.
MESSAGES_PER_ROUND = 20
TAKERS = 2
#: Seconds that one look for messages waits.
WAIT_SECONDS = 1.0
#: Seconds between two looks of the sweep, also at one command that waits or failed; commands that one look takes,
#: and how long it has them to itself.
SWEEP_SECONDS = 0.5
COMMANDS_PER_SWEEP = 200
HELD_SECONDS = 15.0
#: Seconds for which a command may just be waiting its turn in a queue that is not empty. No longer than a lease:
#: the messages of a worker that has died count as waiting, too.
BUSY_SECONDS = 30.0
#: Pause after something was not there, in seconds: it grows from one to the other.
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 2.0
#: Seconds after its acceptance for which a command waits for those before it: a broker may leave them to a worker
#: that died for a minute.
PREDECESSOR_SECONDS = 75.0
#: Seconds for which a command that meets a bug is tried again before it is put aside.
FAILING_SECONDS = 6.0

log = structlog.get_logger(__name__)


class Applier:
    """Applies queued commands. Use it from one event loop."""

    def __init__(
        self, broker: Broker, temporary: TemporaryOrders, committer: Committer, lease_seconds: float = BUSY_SECONDS
    ) -> None:
        """Take from `broker`, sweep the set in `temporary`, and store by `committer`.

        What a worker that has died took along waits for `lease_seconds`, and for BUSY_SECONDS at most.
        """
        self._busy_seconds = min(BUSY_SECONDS, lease_seconds)
        self._broker = broker
        self._temporary = temporary
        self._committer = committer
        #: Commands that met a bug here, and when they first did.
        self._failing: dict[str, float] = {}
        self._sweeping = Background("sweep", self._sweep)
        #: What runs in the background. All are told together when to stop, so that each may ask any of them.
        self.works = (self._sweeping, *(Background("applier", self._take) for _ in range(TAKERS)))

    def start(self) -> None:
        """Begin to take commands."""
        for work in self.works:
            work.start()

    def stop_taking(self) -> None:
        """Take no more; what was taken is applied."""
        for work in self.works:
            work.stop_soon()

    async def stop(self, drain_seconds: float) -> None:
        """Take no more and apply what was taken within `drain_seconds`; the rest goes back to the broker."""
        await asyncio.gather(*(work.stop(drain_seconds) for work in self.works))

    async def _take(self) -> None:
        while not self._sweeping.stopping:
            try:
                deliveries = await self._broker.receive(
                    Topic.COMMANDS, limit=MESSAGES_PER_ROUND, wait_seconds=WAIT_SECONDS
                )
            except BrokerUnavailable:
                await self._sweeping.rest(PAUSE_SECONDS_MIN)  # between two tries the broker waits by itself
                continue
            commands: list[QueuedCommand] = []
            taken = []
            for delivery in deliveries:
                try:
                    commands += unpack(delivery.body)
                    taken.append(delivery)
                except ValueError as error:
                    log.warning("a message is put aside among the dead: it holds no commands", reason=str(error))
                    with suppress(BrokerUnavailable):  # then it comes again
                        await self._broker.reject(Topic.COMMANDS, delivery, f"it holds no commands: {error}")
            if taken and await self._carry_out(commands, again=any(each.redelivered for each in taken)):
                with suppress(BrokerUnavailable):  # then they come again
                    await self._broker.acknowledge(Topic.COMMANDS, taken)

    async def _sweep(self) -> None:
        while not self._sweeping.stopping:
            found: list[QueuedCommand] = []
            with suppress(RedisUnavailable):
                found = await self._temporary.overdue(limit=COMMANDS_PER_SWEEP, for_seconds=HELD_SECONDS)
            if found:
                busy = False
                with suppress(BrokerUnavailable):  # then nobody gets anything from it
                    busy = (await self._broker.depth(Topic.COMMANDS)).waiting > 0
                old = (time.time() - (self._busy_seconds if busy else 0)) * MICROSECONDS
                due = [command for command in found if command.left or command.accepted_at <= old]
                await self._carry_out(due, again=True)
            if len(found) < COMMANDS_PER_SWEEP:
                await self._sweeping.rest(SWEEP_SECONDS)

    async def _carry_out(self, commands: Sequence[QueuedCommand], *, again: bool) -> bool:
        """Carry out commands, waiting for the database for as long as it takes; `again`: some may be stored.

        What must wait for another, or failed, is left to the sweep. Returns whether all is settled or left; not so
        if this is to stop while Redis cannot be told: then the commands must come again.
        """
        done: list[Settled] = []
        left = list(commands)
        pauses = Pauses(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)
        while True:
            since = (time.time() - PREDECESSOR_SECONDS) * MICROSECONDS
            requests = [each.request(waits=each.accepted_at > since, again=again) for each in left]
            asked, left, refused = left, [], False
            for command, outcome in zip(asked, await self._submit(requests), strict=True):
                settled = await self._settled(command, outcome, again)
                if settled is None:
                    left.append(command)
                else:
                    done.append(settled)
                    refused = refused or isinstance(outcome, ExpediterError)
                    self._failing.pop(command.token, None)
            if left and refused:
                continue  # what one was refused for is noted by now, and the one behind it waits no longer
            reach("applied")
            try:
                await self._temporary.settle(done)
                await self._temporary.look_again(left, seconds=SWEEP_SECONDS)
                return True
            except RedisUnavailable as error:
                # What is stored stays in the set, and the sweep looks at it once Redis is back.
                log.warning(
                    "stored orders stay marked as waiting: Redis cannot be reached", often=True, error=str(error)
                )
            if not left:
                return True
            done, again = [], True
            await self._sweeping.rest(pauses.next())
            if self._sweeping.stopping:
                return False

    async def _submit(self, requests: Sequence[Request]) -> list[Outcome]:
        """Store requests, for as long as the database is away; one at which it alone fails has failed."""
        outcomes: dict[int, Outcome] = {}
        waiting, failed = list(range(len(requests))), False
        pauses, doubts = Pauses(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX), 0
        while waiting:
            # What fails may only have had a neighbour that does: then by itself, and in the end all alone.
            size, alone = 1 if failed else BATCH_REQUESTS_MAX, doubts > 1
            parts = [waiting[start : start + size] for start in range(0, len(waiting), size)]
            asking = ([requests[each] for each in part] for part in parts)
            submitting = (self._committer.submit_patiently(asked, alone=alone) for asked in asking)
            answers = await asyncio.gather(*submitting, return_exceptions=True)
            away: dict[int, Unavailable] = {}
            for part, answer in zip(parts, answers, strict=True):
                if isinstance(answer, Unavailable):
                    away |= dict.fromkeys(part, answer)
                elif isinstance(answer, BaseException):
                    outcomes |= dict.fromkeys(part, _failure(answer))
                else:
                    outcomes |= zip(part, answer, strict=True)
            if away:
                if not failed:
                    log.info("queued commands wait for the database", error=str(next(iter(away.values()))))
                # Until the drain is over: then the task is cancelled and the broker keeps them.
                await asyncio.sleep(pauses.next())
                doubts = doubts + 1 if await self._committer.trouble() is None else 0
                if alone and doubts:
                    why = "the database fails at it, and at nothing else:"
                    outcomes |= {each: RequestFailed(f"{why} {error}") for each, error in away.items()}
            waiting, failed = [each for each in away if each not in outcomes], True
        return [outcomes[each] for each in range(len(requests))]

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
        if isinstance(outcome, Replayed) and isinstance(command.command, PlaceOrder):
            # Redis may forget a key between two requests with it, before the first of them is stored.
            made = outcome.answer.headers.get("location", "")  # a key of the command's own has none
            if made and made.rpartition("/")[2] != command.order_id:
                return Settled(command, error=f"This Idempotency-Key made another order before: {made}")
        if isinstance(outcome, IdempotencyMismatch) and isinstance(command.command, PlaceOrder):
            # Another request with its key was stored directly while Redis could not say that this one waits. This
            # was accepted all the same, and is stored without that key.
            (outcome,) = await self._submit([replace(command.request(waits=False), key=own_key(command.token))])
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


def _failure(error: BaseException) -> ExpediterError:
    if isinstance(error, ExpediterError):
        return error
    log.error("a queued command could not be applied", often=True, exc_info=error)
    return RequestFailed(f"{type(error).__name__}: {error}")
