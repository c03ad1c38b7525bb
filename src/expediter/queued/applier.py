"""The applier: takes queued commands from the broker into the database, and looks after those that are overdue.

A message is acknowledged when each of its commands is settled, or left to the sweep. The sweep finds in the set of
accepted commands what is there for too long: its message or its broker is lost, it waits for another, or it is
stored and Redis could not be told. Carrying it out again settles each of these, and changes nothing twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

import structlog

from expediter.backends.brokers import Broker, Delivery, Topic
from expediter.backends.redis_client import RedisUnavailable
from expediter.backends.tasks import Background, Pauses, end_tasks
from expediter.errors import BrokerUnavailable
from expediter.orders.order import MICROSECONDS
from expediter.queued.message import QueuedCommand, unpack
from expediter.queued.settling import PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN, Settler
from expediter.queued.temporary import TemporaryOrders

#: Messages taken at once, and rounds of them under way.
MESSAGES_PER_ROUND = 20
ROUNDS_MAX = 2
#: Seconds that one look for messages waits.
WAIT_SECONDS = 1.0
#: Seconds between two looks of the sweep, commands that one takes, and how long it has them to itself.
SWEEP_SECONDS = 0.5
COMMANDS_PER_SWEEP = 200
HELD_SECONDS = 15.0
#: Seconds for which a command may just be waiting its turn in a queue that is not empty. No longer than a lease:
#: the messages of a worker that has died count as waiting, too.
BUSY_SECONDS = 30.0

log = structlog.get_logger(__name__)


class Applier:
    """Applies queued commands. Use it from one event loop."""

    def __init__(
        self, broker: Broker, temporary: TemporaryOrders, settler: Settler, lease_seconds: float = BUSY_SECONDS
    ) -> None:
        """Take from `broker`, sweep the set in `temporary`, and have `settler` carry out what there is.

        What a worker that has died took along waits for `lease_seconds`, and for BUSY_SECONDS at most.
        """
        self._busy_seconds = min(BUSY_SECONDS, lease_seconds)
        self._broker = broker
        self._temporary = temporary
        self._settler = settler
        self._rounds: set[asyncio.Task[None]] = set()
        self.background = Background("applier", self._run)
        self.sweep = Background("sweep", self._sweep)

    def start(self) -> None:
        """Begin to take commands."""
        self.background.start()
        self.sweep.start()

    def stop_taking(self) -> None:
        """Take no more; what was taken is applied."""
        self.background.stop_soon()
        self.sweep.stop_soon()

    async def stop(self, drain_seconds: float) -> None:
        """Take no more and apply what was taken within `drain_seconds`; the rest goes back to the broker."""
        until = asyncio.get_running_loop().time() + drain_seconds
        await asyncio.gather(self.background.stop(drain_seconds), self.sweep.stop(drain_seconds))
        if self._rounds:
            await asyncio.wait(self._rounds, timeout=max(0.0, until - asyncio.get_running_loop().time()))
        await end_tasks(self._rounds)

    async def _run(self) -> None:
        pauses = Pauses(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)
        while not self.background.stopping:
            if len(self._rounds) >= ROUNDS_MAX:
                await asyncio.wait(self._rounds, return_when=asyncio.FIRST_COMPLETED)
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

    async def _take(self, deliveries: Sequence[Delivery]) -> None:
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
        pauses = Pauses(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)
        again = any(delivery.redelivered for delivery in taken)
        while commands and not await self._settler.carry_out(commands, again=again):
            again = True
            await self.background.rest(pauses.next())
            if self.background.stopping:
                return  # the broker keeps them
        with suppress(BrokerUnavailable):  # then they come again
            await self._broker.acknowledge(Topic.COMMANDS, taken)

    async def _sweep(self) -> None:
        while not self.sweep.stopping:
            found: list[bytes] = []
            with suppress(RedisUnavailable):
                found = await self._temporary.overdue(limit=COMMANDS_PER_SWEEP, for_seconds=HELD_SECONDS)
            if commands := [command for packed in found for command in _readable(packed)]:
                old = (time.time() - (self._busy_seconds if await self._busy() else 0)) * MICROSECONDS
                due = [command for command in commands if command.left or command.accepted_at <= old]
                await self._settler.carry_out(due, again=True)
            if len(found) < COMMANDS_PER_SWEEP:
                await self.sweep.rest(SWEEP_SECONDS)

    async def _busy(self) -> bool:
        try:
            return (await self._broker.depth(Topic.COMMANDS)).waiting > 0
        except BrokerUnavailable:
            return False  # nobody gets anything from it


def _readable(packed: bytes) -> list[QueuedCommand]:
    try:
        return unpack(packed)
    except ValueError as error:
        log.warning("an accepted command cannot be read: it is left to a newer version", reason=str(error))
        return []
