"""Accepted commands that are not seen in the database yet: whoever accepted them sees to it that they get there.

The broker holds them durably, and may be wiped all the same. So each is remembered until it is found in the
database; what is in neither is sent again, and stored directly while the broker is away.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import structlog
from msgspec.structs import replace

from expediter.backends.brokers import Broker, Topic
from expediter.backends.databases import Database
from expediter.backends.redis_client import RedisUnavailable
from expediter.errors import (
    BrokerUnavailable,
    ExpediterError,
    NotYetApplied,
)
from expediter.queued.message import QueuedCommand, pack
from expediter.queued.outcome import settled
from expediter.queued.temporary import Settled, Temporary, TemporaryOrders
from expediter.store import lookups
from expediter.store.committer import Committer

#: The bytes at which a message is full.
MESSAGE_BYTES = 512 * 1024
#: Commands that are remembered until they are seen in the database; beyond that the broker alone has the oldest.
REMEMBERED_MAX = 20_000
#: A command is looked for in the database after so many seconds, and sent again after so many more.
LOOK_SECONDS = 2.0
AGAIN_SECONDS = 5.0
#: The same while the queue is not empty: it may just be waiting its turn.
AGAIN_BUSY_SECONDS = 30.0
#: How often a command is sent again, each time after twice the pause: for 85 minutes, or 8 hours in a busy queue.
AGAIN_MAX = 10
#: Commands that are looked for at once.
LOOKS_PER_ROUND = 500

log = structlog.get_logger(__name__)


class Accepted(NamedTuple):
    """A command on its way to the broker, and what its readers are shown (`new`: only if there is nothing yet)."""

    command: QueuedCommand
    temporary: Temporary
    new: bool
    #: What was kept of the order before: it is put back if the broker does not take the command.
    before: Temporary | None = None


class _Remembered(msgspec.Struct):
    accepted: Accepted
    sent_at: float
    times: int = 0


class Unstored:
    """Remembers accepted commands until they are in the database. Use it from one event loop."""

    def __init__(
        self, database: Database, committer: Committer, broker: Broker, temporary: TemporaryOrders
    ) -> None:
        """Look into `database`, publish to `broker` and show in `temporary` again, or hand to `committer`."""
        self._database = database
        self._committer = committer
        self._broker = broker
        self._temporary = temporary
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()

    def remember(self, accepted: Sequence[Accepted]) -> None:
        """Remember commands that the broker has; beyond REMEMBERED_MAX it alone has the oldest."""
        now = time.monotonic()
        for each in accepted:
            self._remembered[each.command.token] = _Remembered(each, now)
        while len(self._remembered) > REMEMBERED_MAX:
            self._remembered.popitem(last=False)

    async def look_after(self) -> None:
        """See that everything accepted reaches the database, whatever becomes of the broker and of Redis."""
        now = time.monotonic()
        waiting = [each for each in self._remembered.values() if now - each.sent_at >= LOOK_SECONDS]
        for start in range(0, len(waiting), LOOKS_PER_ROUND):
            try:
                await self._look(waiting[start : start + LOOKS_PER_ROUND])
            except ExpediterError as error:
                log.info("what was accepted cannot be looked after now", error=str(error))
                break

    async def _look(self, waiting: Sequence[_Remembered]) -> None:
        missing = await self._missing(waiting)
        try:
            busy = (await self._broker.depth(Topic.COMMANDS)).waiting > 0
        except BrokerUnavailable:
            # Nobody gets them from a broker that is away: the database does, and what comes later changes nothing.
            await self._store_directly(missing)
            return
        now = time.monotonic()
        patience = AGAIN_BUSY_SECONDS if busy else AGAIN_SECONDS
        again = [each for each in missing if now - each.sent_at >= patience * 2**each.times]
        for each in list(again):
            command = each.accepted.command
            if await self._temporary.refused(command.command.order_id, command.token):
                self._remembered.pop(command.token, None)
                again.remove(each)
        if not again:
            return
        log.warning("accepted commands are neither stored nor in the broker; sending them again", count=len(again))
        try:
            await self._show_again(again)
        except RedisUnavailable as error:
            log.warning("accepted orders cannot be shown before they are stored", error=str(error))
        await publish(
            self._broker,
            [each.accepted._replace(command=replace(each.accepted.command, again=True)) for each in again],
        )
        for each in again:
            each.sent_at = now
            each.times += 1
            if each.times >= AGAIN_MAX:
                log.error(
                    "a command was sent again and again and is not stored", token=each.accepted.command.token
                )
                self._remembered.pop(each.accepted.command.token, None)

    async def _show_again(self, again: Sequence[_Remembered]) -> None:
        """Where Redis has forgotten orders, put back the newest that is known of each."""
        wanted = {each.accepted.command.command.order_id for each in again}
        newest = {
            each.accepted.command.command.order_id: each.accepted.temporary
            for each in self._remembered.values()
            if each.accepted.command.command.order_id in wanted
        }
        await self._temporary.put([(order_id, temporary, True) for order_id, temporary in newest.items()])

    async def _missing(self, waiting: Sequence[_Remembered]) -> list[_Remembered]:
        """Return the commands that are not in the database, and forget the others."""
        by_order = [
            each.accepted.command.command.order_id for each in waiting if each.accepted.command.key is None
        ]
        by_key = [each.accepted.command.key.key for each in waiting if each.accepted.command.key is not None]
        stored = await self._database.read(partial(lookups.which_are_stored, order_ids=by_order, keys=by_key))
        missing = []
        done = []
        for each in waiting:
            command = each.accepted.command
            if (command.key.key if command.key else command.command.order_id) in stored:
                self._remembered.pop(command.token, None)
                done.append(Settled(command.command.order_id, command.token))
            else:
                missing.append(each)
        await self._temporary.settle_if_possible(done)
        return missing

    async def _store_directly(self, missing: Sequence[_Remembered]) -> None:
        if not missing:
            return
        now = time.monotonic()
        # What another process accepted before may be stored by that one only: then it waits.
        requests = [
            each.accepted.command.request(waits=now - each.sent_at < AGAIN_BUSY_SECONDS, again=True)
            for each in missing
        ]
        outcomes = await self._committer.submit_patiently(requests)
        done = []
        for each, outcome in zip(missing, outcomes, strict=True):
            if not isinstance(outcome, NotYetApplied):
                done.append(await settled(each.accepted.command, outcome, self._committer.submit_patiently))
                self._remembered.pop(each.accepted.command.token, None)
        await self._temporary.settle_if_possible(done)


async def publish(broker: Broker, accepted: Sequence[Accepted]) -> None:
    """Publish commands, in as few messages as their size allows. Raises BrokerUnavailable."""
    part: list[QueuedCommand] = []
    size = 0
    for each in accepted:
        # A line's text is most of what makes a message long; the document has it too.
        bytes_more = len(bytes(each.temporary.order))
        if part and size + bytes_more > MESSAGE_BYTES:
            await broker.publish(Topic.COMMANDS, pack(part))
            part, size = [], 0
        part.append(each.command)
        size += bytes_more
    if part:
        await broker.publish(Topic.COMMANDS, pack(part))
