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
from expediter.errors import (
    BrokerUnavailable,
    ConstraintViolated,
    DuplicateOrder,
    IdempotencyMismatch,
    NotYetApplied,
    OrderNotFound,
    Unavailable,
)
from expediter.orders.commands import PlaceOrder
from expediter.queued.message import QueuedCommand, unpack
from expediter.queued.temporary import Settled, TemporaryOrders
from expediter.store.committer import BATCH_REQUESTS_MAX, Committer
from expediter.store.submissions import Applied, Outcome, Replayed, Request

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
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Begin to take commands."""
        self._task = asyncio.create_task(self._run(), name="applier")

    def stop_taking(self) -> None:
        """Take no more; what was taken is applied."""
        self._stopping.set()

    async def stop(self, drain_seconds: float) -> None:
        """Take no more and apply what was taken within `drain_seconds`; the rest goes back to the broker."""
        self.stop_taking()
        if self._task is not None:
            await asyncio.wait([self._task])
        if under_way := self._rounds | self._waiting:
            await asyncio.wait(under_way, timeout=drain_seconds)
        if under_way := self._rounds | self._waiting:
            for task in under_way:
                task.cancel()
            await asyncio.wait(under_way)

    @property
    def alive(self) -> bool:
        """Whether it takes commands, or was told to stop."""
        return self._stopping.is_set() or (self._task is not None and not self._task.done())

    async def _run(self) -> None:
        pause = PAUSE_SECONDS_MIN
        while not self._stopping.is_set():
            if len(self._rounds) >= ROUNDS_MAX or len(self._waiting) >= WAITING_ROUNDS_MAX:
                full = self._rounds if len(self._rounds) >= ROUNDS_MAX else self._waiting
                # One that begins to wait makes room without ending.
                await asyncio.wait(full, timeout=LOOK_AGAIN_SECONDS_MAX, return_when=asyncio.FIRST_COMPLETED)
                continue
            try:
                deliveries = await self._broker.receive(
                    Topic.COMMANDS, limit=MESSAGES_PER_ROUND, wait_seconds=WAIT_SECONDS
                )
                pause = PAUSE_SECONDS_MIN
            except BrokerUnavailable:
                await self._rest(pause)
                pause = min(pause * 2, PAUSE_SECONDS_MAX)
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
        pause = PAUSE_SECONDS_MIN
        for tries_left in reversed(range(TRIES_ALONE)):
            await self._rest(pause)
            if self._stopping.is_set():
                return  # the broker keeps it
            pause *= 2
            try:
                await self._apply([delivery])
                return
            except Exception as error:
                log.exception("a message could not be applied", tries_left=tries_left)
                reason = f"{type(error).__name__}: {error}"
        await self._put_aside(delivery, reason)

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

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
        pause = LOOK_AGAIN_SECONDS
        while parts:
            self._wait_aside()
            await self._rest(pause)
            if self._stopping.is_set():
                return  # the broker keeps them
            pause = min(pause * 2, LOOK_AGAIN_SECONDS_MAX)
            parts = await self._round(parts, waits=asyncio.get_running_loop().time() < until)

    def _wait_aside(self) -> None:
        """Let others go on while this round waits for commands that another process may be at."""
        task = asyncio.current_task()
        if task in self._rounds:
            self._rounds.discard(task)
            self._waiting.add(task)

    async def _round(self, parts: _Parts, *, waits: bool) -> _Parts:
        """Settle what can be settled, acknowledge messages that are done, and return what is left."""
        settled, later = await self._settle([work for _, works in parts for work in works], waits=waits)
        try:
            await self._temporary.settle(settled)
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
        settled = []
        waiting: list[_Work] = []
        while work:
            requests = [each.command.request(waits=waits, again=each.again) for each in work]
            again: list[_Work] = []
            for each, outcome in zip(work, await self._carry_out(requests), strict=True):
                if isinstance(outcome, NotYetApplied):
                    waiting.append(each)
                elif isinstance(outcome, ConstraintViolated) and not each.again:
                    # Its id was thought to be new, and is in the database: then it comes a second time.
                    again.append(_Work(each.command, again=True))
                else:
                    settled.append(await self._settled(each.command, outcome))
            work = again
        return settled, waiting

    async def _settled(self, queued: QueuedCommand, outcome: Outcome) -> Settled:
        command = queued.command
        if isinstance(outcome, Replayed) and (other := queued.other_order(outcome.answer)):
            return Settled(command.order_id, queued.token, other, queued.key.key if queued.key else None)
        if isinstance(outcome, (Applied, Replayed)):
            return Settled(command.order_id, queued.token)
        if isinstance(outcome, DuplicateOrder) and isinstance(command, PlaceOrder) and command.fresh:
            return Settled(command.order_id, queued.token)  # its id is its own: it is the same order
        reason = str(outcome)
        log.warning("a queued command was refused", order_id=command.order_id, error=reason)
        if isinstance(outcome, IdempotencyMismatch):
            return Settled(command.order_id, queued.token, reason)
        (recorded,) = await self._carry_out([queued.refusal(reason)])
        if isinstance(recorded, OrderNotFound):
            return Settled(command.order_id, queued.token, reason)
        return Settled(command.order_id, queued.token)

    async def _carry_out(self, requests: Sequence[Request]) -> list[Outcome]:
        """Submit requests, waiting for the database for as long as it takes."""
        parts = [
            requests[start : start + BATCH_REQUESTS_MAX] for start in range(0, len(requests), BATCH_REQUESTS_MAX)
        ]
        return [outcome for part in await asyncio.gather(*map(self._submit, parts)) for outcome in part]

    async def _submit(self, requests: Sequence[Request]) -> list[Outcome]:
        pause = PAUSE_SECONDS_MIN
        while True:
            try:
                return await self._committer.submit_patiently(requests)
            except Unavailable as error:
                log.info("queued commands wait for the database", count=len(requests), error=str(error))
                # Until the drain is over: then the task is cancelled and the broker keeps them.
                await asyncio.sleep(pause)
                pause = min(pause * 2, PAUSE_SECONDS_MAX)
            except ConstraintViolated as error:
                return [error for _ in requests]
