"""Connections to RabbitMQ, and the queues that are declared on them.

Each topic has connections of its own, and whoever publishes has another one than whoever receives: a RabbitMQ that
is short of memory or disk stops reading from those that publish, and on a common one it would never see the
acknowledgements that free it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel
from aio_pika.connection import make_url
from aio_pika.exceptions import (
    AMQPError,
    ChannelInvalidStateError,
    ChannelPreconditionFailed,
    DeliveryError,
    PublishError,
)

from expediter.backends.brokers import PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN, Topic
from expediter.backends.tasks import Pauses, end_tasks
from expediter.errors import BrokerUnavailable, reason

#: Seconds that connecting and declaring may take.
CONNECT_SECONDS_MAX = 5.0
#: Seconds that closing may take.
CLOSE_SECONDS_MAX = 5.0
#: Seconds between heartbeats; a connection that is silent for about three times as long is given up.
HEARTBEAT_SECONDS = 10
#: Messages of a topic that a process holds unacknowledged, at most.
PREFETCH = 50
#: Times that a command comes again before RabbitMQ itself puts it among the dead.
DELIVERIES_MAX = 20
#: Hints that are kept, and for how long; the oldest leave first.
HINTS_MAX, HINT_MILLISECONDS = 10_000, 60_000

#: What the client library raises when a connection or a channel cannot be used.
TROUBLES = (AMQPError, ChannelInvalidStateError, OSError, EOFError)

_QUORUM = dict[str, Any]({"x-queue-type": "quorum"})


class Queues(NamedTuple):
    """The names of everything that is declared; the dead have an exchange and a queue of the same name.

    All are quorum queues: a classic one is on one node, and away for as long as that is.
    """

    commands: str
    hints: str
    dead: str

    @classmethod
    def named(cls, name: str) -> Queues:
        """Return what stands beside the queue of this name.

        Not `.hints`: earlier versions had a classic queue there, and a queue never changes its kind.
        """
        return cls(name, f"{name}.due", f"{name}.dead")

    def of(self, topic: Topic) -> str:
        """Return the queue of a topic."""
        return self.commands if topic is Topic.COMMANDS else self.hints

    async def declare(self, channel: AbstractChannel, topic: Topic) -> None:
        """Make what is missing; what is there in another form is an error (PRECONDITION_FAILED)."""
        if topic is Topic.HINTS:
            # What a quorum queue can do of it: a length from whose head it drops, and since 3.10 a time to live.
            kept = {"x-max-length": HINTS_MAX, "x-message-ttl": HINT_MILLISECONDS, "x-overflow": "drop-head"}
            await channel.declare_queue(self.hints, durable=True, arguments=_QUORUM | kept)
            return
        dead = await channel.declare_exchange(self.dead, aio_pika.ExchangeType.FANOUT, durable=True)
        limits = {"x-delivery-limit": DELIVERIES_MAX, "x-dead-letter-exchange": self.dead}
        await channel.declare_queue(self.commands, durable=True, arguments=_QUORUM | limits)
        await (await channel.declare_queue(self.dead, durable=True, arguments=_QUORUM)).bind(dead)


class Link:
    """One connection with one channel, for one topic: opened when somebody needs it, and again after a loss.

    Nothing but the queues of its topic is declared here: one that cannot be used spoils no other topic.
    """

    def __init__(self, url: str, queues: Queues, topic: Topic) -> None:
        """Remember the address; nothing is opened yet. Raises ValueError where it cannot be read."""
        beats = "" if "heartbeat" in parse_qs(urlsplit(url).query) else str(HEARTBEAT_SECONDS)
        self._url = make_url(url, heartbeat=beats) if beats else make_url(url)
        self._queues, self._topic = queues, topic
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._opening: asyncio.Task[AbstractChannel] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._trouble = ""
        self._pauses = Pauses(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)
        self._open_at = 0.0

    async def channel(self, *, patient: bool) -> AbstractChannel:
        """Return the open channel; between two attempts the patient wait for the next, others hear of the last.

        The attempt is shared and outlives whoever waits for it: a short deadline does not keep it from succeeding.
        """
        while True:
            if self._channel is not None:
                if not self._channel.is_closed:
                    return self._channel
                self.drop()
            if self._opening is None:
                pause = self._open_at - time.monotonic()
                if pause > 0 and not patient:
                    raise BrokerUnavailable(self._trouble)
                if pause > 0:
                    await asyncio.sleep(pause)
                    continue
                self._opening = asyncio.create_task(self._open())
                self._opening.add_done_callback(self._opened)
            return await asyncio.shield(self._opening)

    async def renew(self, channel: AbstractChannel) -> AbstractChannel:
        """Return a new channel on the same connection, in place of this one, which is closed."""
        assert self._connection is not None
        fresh = await self._connection.channel()
        await fresh.set_qos(PREFETCH)
        await self.declare(fresh)
        self._channel = fresh
        await channel.close()
        return fresh

    async def declare(self, channel: AbstractChannel) -> None:
        """Make what is missing of the topic's queues."""
        await self._queues.declare(channel, self._topic)

    async def blocked(self) -> bool:
        """Tell whether RabbitMQ takes no messages now, by its own word."""
        with suppress(TimeoutError):
            # It waits while the connection is blocked, and returns at once otherwise.
            async with asyncio.timeout(0):
                await self.unblocked()
            return False
        return True

    async def unblocked(self) -> None:
        """Wait until RabbitMQ takes messages."""
        transport = self._connection.transport if self._connection is not None else None
        if transport is not None:
            await transport.ready()

    async def _open(self) -> AbstractChannel:
        connection = aio_pika.Connection(self._url, client_properties={"connection_name": "expediter"})
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                await connection.connect()
                channel = await connection.channel(on_return_raises=True)
                await channel.set_qos(PREFETCH)
                await self.declare(channel)
        except BaseException:
            self._abandon(connection)
            raise
        self._connection, self._channel = connection, channel
        return channel

    def _opened(self, opening: asyncio.Task[AbstractChannel]) -> None:
        self._opening = None
        error = None if opening.cancelled() else opening.exception()
        self._trouble = explained(error, self._topic) if error else ""
        if error:
            self._open_at = time.monotonic() + self._pauses.next()
        else:
            self._pauses.reset()

    def drop(self) -> None:
        """Use this connection no more: after a call that was broken off its channel may never answer again."""
        if self._connection is not None:
            self._abandon(self._connection)
        self._connection = self._channel = None

    def _abandon(self, connection: aio_pika.abc.AbstractConnection) -> None:
        """Close a connection that is of no more use, without making anybody wait for it."""
        closing = asyncio.create_task(self._end(connection))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _end(self, connection: aio_pika.abc.AbstractConnection) -> None:
        with suppress(TimeoutError, *TROUBLES):
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await connection.close()

    async def close(self) -> None:
        """End the attempt under way and close the connection; RabbitMQ takes back what is unacknowledged."""
        if self._opening is not None:
            await end_tasks([self._opening])
        self.drop()
        if self._closing:
            await asyncio.wait(self._closing)


def explained(error: BaseException, topic: Topic) -> str:
    """Return what an error of the client library means, and what to do where somebody can do something."""
    if isinstance(error, TimeoutError):
        return f"RabbitMQ did not answer within {CONNECT_SECONDS_MAX * 1000:g} ms"
    if isinstance(error, ChannelPreconditionFailed):
        if topic is Topic.HINTS:
            return f"the queue of hints is there in another form: delete it, no order is in it ({error})"
        return (
            f"a queue is there in another form: delete it, or set another RABBITMQ_QUEUE_NAME ({error}); "
            "commands in it must be worked off first"
        )
    if isinstance(error, DeliveryError) and not isinstance(error, PublishError):
        return "RabbitMQ turns messages away: the queue is full by a policy, or has no leader now"
    return f"RabbitMQ cannot be used now: {reason(error)}"
