"""A broker on RabbitMQ: a quorum queue of commands, a short-lived queue of hints, and a quorum queue of the dead.

Whoever publishes has a connection of its own, because a RabbitMQ that is short of memory or disk stops reading
from it: on a common one it would never see the acknowledgements that free it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.connection import make_url
from aio_pika.exceptions import (
    AMQPError,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    PublishError,
)

from expediter.backends.brokers import PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN, Delivery, Depth, Reach, Topic
from expediter.backends.tasks import Pauses
from expediter.errors import BrokerUnavailable, ConfigurationError

#: Seconds that connecting and declaring may take.
CONNECT_SECONDS_MAX = 5.0
#: Seconds that the publishing of a message may take, reconnecting included.
PUBLISH_SECONDS_MAX = {Topic.COMMANDS: 2.5, Topic.HINTS: 0.25}
#: Seconds that any other answer may take.
ANSWER_SECONDS_MAX = 5.0
#: Seconds that one `receive` waits for a message, at most.
WAIT_SECONDS_MAX = 2.0
#: Seconds that closing may take.
CLOSE_SECONDS_MAX = 5.0
#: Seconds between heartbeats; a connection that is silent for about three times as long is given up.
HEARTBEAT_SECONDS = 10
#: Seconds of silence after which a receiver begins anew, lest it listen to a queue that is gone.
WATCH_SECONDS = 2.0
#: Messages of a topic that a process holds unacknowledged, at most.
PREFETCH = 50
#: Times that a command comes again before RabbitMQ itself puts it among the dead.
DELIVERIES_MAX = 20
#: Hints that are kept, and for how long; the oldest leave first.
HINTS_MAX, HINT_MILLISECONDS = 10_000, 60_000

#: What the client library raises when a connection or a channel cannot be used.
_TROUBLES = (AMQPError, ChannelInvalidStateError, OSError, EOFError)


class _Queues(NamedTuple):
    """The names of everything that is declared; the dead have an exchange and a queue of the same name."""

    commands: str
    hints: str
    dead: str

    def of(self, topic: Topic) -> str:
        return self.commands if topic is Topic.COMMANDS else self.hints

    async def declare(self, channel: AbstractChannel) -> None:
        """Make what is missing; what is there in another form is an error (PRECONDITION_FAILED)."""
        quorum = dict[str, Any]({"x-queue-type": "quorum"})
        dead = await channel.declare_exchange(self.dead, aio_pika.ExchangeType.FANOUT, durable=True)
        limits = {"x-delivery-limit": DELIVERIES_MAX, "x-dead-letter-exchange": self.dead}
        await channel.declare_queue(self.commands, durable=True, arguments=quorum | limits)
        await (await channel.declare_queue(self.dead, durable=True, arguments=quorum)).bind(dead)
        kept = dict[str, Any](
            {"x-max-length": HINTS_MAX, "x-message-ttl": HINT_MILLISECONDS, "x-overflow": "drop-head"}
        )
        await channel.declare_queue(self.hints, durable=True, arguments=kept)


class _Link:
    """One connection with one channel: opened when somebody needs it, and again whenever it was lost."""

    def __init__(self, url: str, queues: _Queues) -> None:
        beats = "" if "heartbeat" in parse_qs(urlsplit(url).query) else str(HEARTBEAT_SECONDS)
        self._url = make_url(url, heartbeat=beats) if beats else make_url(url)
        self._queues = queues
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
        await self._queues.declare(fresh)
        self._channel = fresh
        await channel.close()
        return fresh

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
                await self._queues.declare(channel)
        except BaseException:
            self._abandon(connection)
            raise
        self._connection, self._channel = connection, channel
        return channel

    def _opened(self, opening: asyncio.Task[AbstractChannel]) -> None:
        self._opening = None
        error = None if opening.cancelled() else opening.exception()
        self._trouble = explained(error) if error else ""
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
        with suppress(TimeoutError, *_TROUBLES):
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await connection.close()

    async def close(self) -> None:
        """End the attempt under way and close the connection; RabbitMQ takes back what is unacknowledged."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        self.drop()
        if self._closing:
            await asyncio.wait(self._closing)


class _Consumer:
    """What one channel receives of one queue. It ends with the channel; what it held then comes again."""

    def __init__(self, channel: AbstractChannel, queue: str) -> None:
        self.channel = channel
        self._queue = queue
        self._buffer: deque[Delivery] = deque()
        self._arrived = asyncio.Event()
        self._silent_at = 0.0
        #: The marks of every message that is not acknowledged, those in the buffer among them.
        self.held: set[int] = set()
        #: Whether another one is to take its place.
        self.retired = False

    async def begin(self) -> None:
        """Let RabbitMQ send messages, up to PREFETCH ahead."""
        self.channel.close_callbacks.add(lambda *_: self._arrived.set())
        queue = await self.channel.get_queue(self._queue, ensure=False)
        await queue.consume(self._keep)
        self._silent_at = time.monotonic() + WATCH_SECONDS

    async def _keep(self, message: AbstractIncomingMessage) -> None:
        assert message.delivery_tag is not None
        self.held.add(message.delivery_tag)
        token = _Token(self, message.delivery_tag)
        self._buffer.append(Delivery(token, message.body, redelivered=bool(message.redelivered)))
        self._silent_at = time.monotonic() + WATCH_SECONDS
        self._arrived.set()

    def silent(self) -> bool:
        """Tell whether nothing has come for so long that RabbitMQ may have forgotten this consumer."""
        return not self.held and time.monotonic() >= self._silent_at

    def take(self, limit: int) -> list[Delivery]:
        """Return up to `limit` messages that have arrived."""
        return [self._buffer.popleft() for _ in range(min(limit, len(self._buffer)))]

    async def wait(self, ends: float) -> None:
        """Wait for a message, the channel's end or the time `ends`."""
        self._arrived.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                await self._arrived.wait()

    async def acknowledge(self, marks: set[int]) -> None:
        """Acknowledge what is still held; all at once where that includes nothing else."""
        marks = marks & self.held
        if not marks or self.channel.is_closed:
            return
        self.held -= marks
        newest = max(marks)
        channel = await self.channel.get_underlay_channel()
        if all(mark > newest for mark in self.held):
            await channel.basic_ack(newest, multiple=True)
        else:
            for mark in sorted(marks):
                await channel.basic_ack(mark)


class _Token(NamedTuple):
    """Where a message came from, and its mark there: a mark means nothing on another channel."""

    consumer: _Consumer
    mark: int


class RabbitBroker:
    """See Broker. A process holds up to PREFETCH unacknowledged messages of a topic, from the first `receive`."""

    def __init__(self, url: str, *, queue_name: str) -> None:
        """Remember the address; nothing is opened yet. Raises ConfigurationError."""
        try:
            place = urlsplit(url)
            port = place.port or (5671 if place.scheme == "amqps" else 5672)
            self._queues = _Queues(queue_name, f"{queue_name}.hints", f"{queue_name}.dead")
            self._publishing = _Link(url, self._queues)
            self._receiving = {topic: _Link(url, self._queues) for topic in Topic}
        except ValueError:
            # The error itself would quote the address, with its password.
            raise ConfigurationError("BROKER_URL cannot be read: percent-encode user and password") from None
        self.name = f"RabbitMQ at {place.hostname or 'localhost'}:{port}, queue {queue_name}"
        self._reach = Reach(self.name)
        self._consumers: dict[Topic, _Consumer] = {}
        self._beginning = {topic: asyncio.Lock() for topic in Topic}
        for library in ("aio_pika", "aiormq"):
            # They report every attempt; what matters of it is in `failing` and in this module's own log.
            logging.getLogger(library).setLevel(logging.CRITICAL)

    @property
    def failing(self) -> str | None:
        """See Broker."""
        return self._reach.failing

    async def publish(self, topic: Topic, body: bytes) -> None:
        """See Broker. A command is on the disks of most of the queue's members when this returns."""
        async with self._bounded(PUBLISH_SECONDS_MAX[topic], publishing=True):
            await self._publish("", self._queues.of(topic), _message(body))

    async def _publish(self, exchange: str, queue: str, message: aio_pika.Message) -> None:
        """Publish; where the queue is gone it is made, and the message sent again: nobody had it."""
        for last in (False, True):
            channel = await self._publishing.channel(patient=False)
            await self._publishing.unblocked()
            place = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
            try:
                await place.publish(message, queue, mandatory=True)
                return
            except (PublishError, ChannelNotFoundEntity):
                if last:
                    raise
            try:
                if not channel.is_closed:  # else the next one declares
                    await self._queues.declare(channel)
            except BaseException:
                self._publishing.drop()
                raise

    async def receive(self, topic: Topic, *, limit: int, wait_seconds: float) -> list[Delivery]:
        """See Broker. Between two attempts to connect it waits, so that a caller may simply call again."""
        ends = time.monotonic() + min(wait_seconds, WAIT_SECONDS_MAX)
        while True:
            async with self._bounded(CONNECT_SECONDS_MAX):
                consumer = await self._consume(topic)
            found = consumer.take(limit)
            if found or time.monotonic() >= ends:
                return found
            await consumer.wait(ends)
            if consumer.channel.is_closed and not consumer.retired:
                raise self._reach.away("RabbitMQ has ended the connection")

    async def _consume(self, topic: Topic) -> _Consumer:
        """Return what receives the topic; one that has been silent is replaced, lest it listen to nothing.

        When a quorum queue is deleted RabbitMQ 3.10 does not tell its consumers, and sends nothing to that channel
        from the queue that takes its place: only a new channel helps.
        """
        link = self._receiving[topic]
        async with self._beginning[topic]:
            channel = await link.channel(patient=True)
            before = self._consumers.get(topic)
            known = before is not None and before.channel is channel
            if before is not None and known and not before.silent():
                return before
            try:
                if before is not None and known:
                    before.retired = True
                    channel = await link.renew(channel)
                consumer = self._consumers[topic] = _Consumer(channel, self._queues.of(topic))
                await consumer.begin()
            except BaseException:
                link.drop()
                raise
            return consumer

    async def acknowledge(self, topic: Topic, deliveries: Sequence[Delivery]) -> None:
        """See Broker. What came by a connection that was lost is left alone: it comes again anyway."""
        marks: dict[_Consumer, set[int]] = {}
        for delivery in deliveries:
            assert isinstance(delivery.token, _Token)
            marks.setdefault(delivery.token.consumer, set()).add(delivery.token.mark)
        async with self._bounded(ANSWER_SECONDS_MAX):
            await self._receiving[topic].channel(patient=False)
            for consumer, its in marks.items():
                await consumer.acknowledge(its)

    async def reject(self, topic: Topic, delivery: Delivery, reason: str) -> None:
        """See Broker. A hint is dropped: nobody would ever look at it."""
        if topic is Topic.COMMANDS:
            await self.put_aside(delivery.body, reason)
        await self.acknowledge(topic, [delivery])

    async def put_aside(self, body: bytes, reason: str) -> None:
        """See Broker."""
        async with self._bounded(PUBLISH_SECONDS_MAX[Topic.COMMANDS], publishing=True):
            await self._publish(self._queues.dead, "", _message(body, reason=reason))

    async def depth(self, topic: Topic) -> Depth:
        """See Broker. RabbitMQ does not say how many messages other processes hold: those are missing here."""
        async with self._bounded(ANSWER_SECONDS_MAX):
            link = self._receiving[topic]
            channel = await link.channel(patient=False)
            try:
                await self._queues.declare(channel)
                waiting = await channel.declare_queue(self._queues.of(topic), passive=True)
                dead = await channel.declare_queue(self._queues.dead, passive=True)
            except BaseException:
                link.drop()
                raise
        consumer = self._consumers.get(topic)
        held = len(consumer.held) if consumer is not None and not consumer.channel.is_closed else 0
        return Depth(
            (waiting.declaration_result.message_count or 0) + held,
            (dead.declaration_result.message_count or 0) if topic is Topic.COMMANDS else 0,
        )

    async def durability(self) -> list[tuple[str, bool, str]]:
        """See Broker. A queue of another kind under this name would be an error."""
        async with self._bounded(ANSWER_SECONDS_MAX):
            await self._receiving[Topic.COMMANDS].channel(patient=False)
        return [(f"quorum queue {self._queues.commands}, confirmed when on disk", True, "")]

    async def close(self) -> None:
        """See Broker."""
        self._reach.closed = True
        await asyncio.gather(*(link.close() for link in (self._publishing, *self._receiving.values())))

    @asynccontextmanager
    async def _bounded(self, seconds: float, *, publishing: bool = False) -> AsyncIterator[None]:
        """Bound what is inside by `seconds`, and keep `failing` true to what comes of it."""
        self._reach.check_open()
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            sentence = f"RabbitMQ did not answer within {seconds * 1000:g} ms"
            if publishing and await self._publishing.blocked():
                sentence = "RabbitMQ takes no messages now: it is short of memory or disk"
            raise self._reach.away(sentence, publishing=publishing) from error
        except BrokerUnavailable as error:
            raise self._reach.away(str(error), publishing=publishing) from error
        except _TROUBLES as error:
            raise self._reach.away(explained(error), publishing=publishing) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this caller: the library cancels what waits on a connection that ends.
            raise self._reach.away("RabbitMQ has ended the connection", publishing=publishing) from error
        self._reach.back(publishing=publishing)


def _message(body: bytes, **headers: str) -> aio_pika.Message:
    return aio_pika.Message(body, headers=dict(headers), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)


def explained(error: BaseException) -> str:
    """Return what an error of the client library means, and what to do where somebody can do something."""
    if isinstance(error, TimeoutError):
        return f"RabbitMQ did not answer within {CONNECT_SECONDS_MAX * 1000:g} ms"
    if isinstance(error, ChannelPreconditionFailed):
        return (
            f"a queue is there in another form: delete it, or set another RABBITMQ_QUEUE_NAME ({error}); "
            "commands in it must be worked off first"
        )
    return f"RabbitMQ cannot be used now: {str(error) or type(error).__name__}"
