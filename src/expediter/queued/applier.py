"""The applier: takes queued commands from the broker into the database.

A message is acknowledged when all of its commands are settled: stored, found stored already, or refused, with the
reason in the order's history. Whatever is in between when a process dies comes again, and changes nothing twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from expediter.backends.brokers import Broker, Delivery, Topic
from expediter.backends.redis_client import RedisUnavailable
from expediter.backends.tasks import Background, Pauses
from expediter.errors import (
    BrokerUnavailable,
    ConstraintViolated,
    NotYetApplied,
    RequestFailed,
    Unavailable,
)
from expediter.queued.message import QueuedCommand, unpack
from expediter.queued.outcome import settled
from expediter.queued.temporary import Settled, TemporaryOrders
from expediter.store.committer import BATCH_REQUESTS_MAX, Committer
from expediter.store.submissions import Outcome, Request

#: Messages taken at once, and rounds of them under way.
MESSAGES_PER_ROUND = 20
ROUNDS_MAX = 2
#: Seconds that one look for messages waits.
WAIT_SECONDS = 1.0
#: Seconds for which a command waits for the one before it: as long as Redis leaves it to a worker that died.
PREDECESSOR_SECONDS = 75.0
#: Seconds between two looks for it: doubled from the first to the last.
LOOK_AGAIN_SECONDS, LOOK_AGAIN_SECONDS_MAX = 0.02, 0.5
#: Rounds that only wait for such predecessors; others go on meanwhile.
WAITING_ROUNDS_MAX = 20
#: Pause after broker or database were not there, in seconds: it grows from one to the other.
PAUSE_SECONDS_MIN = 0.1
PAUSE_SECONDS_MAX = 2.0
#: How often a message that failed in an unforeseen way is tried by itself before it is put aside: over 6 seconds.
TRIES_ALONE = 6
PAUSE_ALONE_SECONDS_MAX = 3.2

log = structlog.get_logger(__name__)


class _Work(NamedTuple):
    command: QueuedCommand
    again: bool


#: Messages, each with what of it is not settled yet.
_Parts = list[tuple[Delivery, list[_Work]]]


class Applier:
    """Applies queued commands. Use it from one event loop."""

    def __init__(self, committer: Committer, broker: Broker, temporary: TemporaryOrders) -> None:
        """Take from `broker`, store by `committer`, and settle what `temporary` shows."""
        self._committer = committer
        self._broker = broker
        self._temporary = temporary
        self._rounds: set[asyncio.Task[None]] = set()
        self._waiting: set[asyncio.Task[None]] = set()
        self.background = Background("applier", self._run)

    def start(self) -> None:
        """Begin to take commands."""
        self.background.start()

    def stop_taking(self) -> None:
        """Take no more; what was taken is applied."""
        self.background.stop_soon()

    async def stop(self, drain_seconds: float) -> None:
        """Take no more and apply what was taken within `drain_seconds`; the rest goes back to the broker."""
        until = asyncio.get_running_loop().time() + drain_seconds
        await self.background.stop(drain_seconds)
        if under_way := self._rounds | self._waiting:
            await asyncio.wait(under_way, timeout=max(0.0, until - asyncio.get_running_loop().time()))
        if under_way := self._rounds | self._waiting:
            for task in under_way:
                task.cancel()
            await asyncio.wait(under_way)

    async def _run(self) -> None:
        pauses = Pauses(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)
        while not self.background.stopping:
            if len(self._rounds) >= ROUNDS_MAX or len(self._waiting) >= WAITING_ROUNDS_MAX:
                full = self._rounds if len(self._rounds) >= ROUNDS_MAX else self._waiting
                # One that begins to wait makes room without ending.
                await asyncio.wait(full, timeout=LOOK_AGAIN_SECONDS_MAX, return_when=asyncio.FIRST_COMPLETED)
                continue
            try:
                deliveries = await self._broker.receive(
                    Topic.COMMANDS, limit=MESSAGES_PER_ROUND, wait_seconds=WAIT_SECONDS
                )
                pauses.reset()
            except BrokerUnavailable:
                await self.background.rest(pauses.next())
                continue
            if deliveries:
                task = asyncio.create_task(self._take(deliveries))
                self._rounds.add(task)
                task.add_done_callback(self._rounds.discard)
                task.add_done_callback(self._waiting.discard)

    async def _take(self, deliveries: Sequence[Delivery]) -> None:
        """Apply messages; where that fails in a way that nobody foresaw, each by itself."""
        try:
            await self._apply(deliveries)
        except Exception:
            log.exception("queued commands could not be applied", messages=len(deliveries))
            for delivery in deliveries:
                await self._take_alone(delivery)

    async def _take_alone(self, delivery: Delivery) -> None:
        """Apply one message: what was of the moment passes, and only what fails again and again is put aside."""
        self._wait_aside()
        pauses = Pauses(PAUSE_SECONDS_MIN, PAUSE_ALONE_SECONDS_MAX)
        for tries_left in reversed(range(TRIES_ALONE)):
            await self.background.rest(pauses.next())
            if self.background.stopping:
                return  # the broker keeps it
            try:
                await self._apply([delivery])
                return
            except Exception as error:
                log.exception("a message could not be applied", tries_left=tries_left)
                reason = f"{type(error).__name__}: {error}"
        await self._put_aside(delivery, reason)

    async def _apply(self, deliveries: Sequence[Delivery]) -> None:
        parts: _Parts = []
        for delivery in deliveries:
            try:
                commands = unpack(delivery.body)
            except ValueError as error:  # msgspec's errors are of this kind, too
                await self._put_aside(delivery, f"it holds no commands: {error}")
                continue
            parts.append((delivery, [_Work(command, delivery.redelivered) for command in commands]))
        parts = await self._round(parts, waits=True)
        until = asyncio.get_running_loop().time() + PREDECESSOR_SECONDS
        pauses = Pauses(LOOK_AGAIN_SECONDS, LOOK_AGAIN_SECONDS_MAX)
        while parts:
            self._wait_aside()
            await self.background.rest(pauses.next())
            if self.background.stopping:
                return  # the broker keeps them
            parts = await self._round(parts, waits=asyncio.get_running_loop().time() < until)

    def _wait_aside(self) -> None:
        """Let others go on while this round waits for commands that another process may be at."""
        task = asyncio.current_task()
        if task in self._rounds:
            self._rounds.discard(task)
            self._waiting.add(task)

    async def _round(self, parts: _Parts, *, waits: bool) -> _Parts:
        """Settle what can be settled, acknowledge messages that are done, and return what is left."""
        done, later = await self._settle([work for _, works in parts for work in works], waits=waits)
        try:
            await self._temporary.settle(done)
        except RedisUnavailable as error:
            # Readers find the orders in the database, which is asked where Redis knows nothing newer.
            log.warning("stored orders stay marked as waiting: Redis cannot be reached", error=str(error))
        tokens = {work.command.token for work in later}
        left = [(delivery, [work for work in works if work.command.token in tokens]) for delivery, works in parts]
        try:
            await self._broker.acknowledge(Topic.COMMANDS, [delivery for delivery, works in left if not works])
        except BrokerUnavailable as error:
            log.info("applied commands come again: the broker is away", error=str(error))
        return [part for part in left if part[1]]

    async def _put_aside(self, delivery: Delivery, reason: str) -> None:
        log.error("a message is put aside among the dead", reason=reason)
        try:
            await self._broker.reject(Topic.COMMANDS, delivery, reason)
        except BrokerUnavailable as error:
            log.info("an unusable message comes again: the broker is away", error=str(error))

    async def _settle(self, work: Sequence[_Work], *, waits: bool) -> tuple[list[Settled], list[_Work]]:
        """Carry out commands; return what became of them, and which must wait for their predecessors."""
        done = []
        waiting: list[_Work] = []
        while work:
            requests = [each.command.request(waits=waits, again=each.again) for each in work]
            again: list[_Work] = []
            for each, outcome in zip(work, await self._carry_out(requests), strict=True):
                if isinstance(outcome, RequestFailed):
                    raise outcome  # a bug is no refusal: the message is tried again by itself
                if isinstance(outcome, NotYetApplied):
                    waiting.append(each)
                elif isinstance(outcome, ConstraintViolated) and not each.again:
                    # Its id was thought to be new, and is in the database: then it comes a second time.
                    again.append(_Work(each.command, again=True))
                else:
                    done.append(await settled(each.command, outcome, self._carry_out))
            work = again
        return done, waiting

    async def _carry_out(self, requests: Sequence[Request]) -> list[Outcome]:
        """Submit requests, waiting for the database for as long as it takes."""
        parts = [
            requests[start : start + BATCH_REQUESTS_MAX] for start in range(0, len(requests), BATCH_REQUESTS_MAX)
        ]
        return [outcome for part in await asyncio.gather(*map(self._submit, parts)) for outcome in part]

    async def _submit(self, requests: Sequence[Request]) -> list[Outcome]:
        pauses = Pauses(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)
        while True:
            try:
                return await self._committer.submit_patiently(requests)
            except Unavailable as error:
                log.info("queued commands wait for the database", count=len(requests), error=str(error))
                # Until the drain is over: then the task is cancelled and the broker keeps them.
                await asyncio.sleep(pauses.next())
            except ConstraintViolated as error:
                return [error for _ in requests]
