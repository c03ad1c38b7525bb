"""A broker on RabbitMQ: quorum queues of commands, of hints and of the dead.

Hints have connections of their own (see links.py): where their queue cannot be used there are no hints, the
workers find what is due in the database by themselves, and commands go on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple
from urllib.parse import urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import ChannelNotFoundEntity, DeliveryError, PublishError

from expediter.backends.brokers import Delivery, Depth, Reach, Topic, Way
from expediter.backends.brokers.links import CONNECT_SECONDS_MAX, TROUBLES, Link, Queues, explained
from expediter.errors import BrokerUnavailable, ConfigurationError

#: Seconds that the publishing of a message may take, reconnecting included.
PUBLISH_SECONDS_MAX = {Topic.COMMANDS: 2.5, Topic.HINTS: 0.25}
#: Seconds until a message that RabbitMQ turned away is sent again; after the last it is refused.
NACK_PAUSES = (0.02, 0.05, 0.1)
#: Seconds that any other answer may take.
ANSWER_SECONDS_MAX = 5.0
#: Seconds that one `receive` waits for a message, at most.
WAIT_SECONDS_MAX = 2.0
#: Seconds of silence after which a receiver begins anew, lest it listen to a queue that is gone.
WATCH_SECONDS = 2.0


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
            self._queues = Queues.named(queue_name)
            self._publishing = {topic: Link(url, self._queues, topic) for topic in Topic}
            self._receiving = {topic: Link(url, self._queues, topic) for topic in Topic}
        except ValueError:
            # The error itself would quote the address, with its password.
            raise ConfigurationError("BROKER_URL cannot be read: percent-encode user and password") from None
        self.name = f"RabbitMQ at {place.hostname or 'localhost'}:{port}, queue {queue_name}"
        self._reach = {Topic.COMMANDS: Reach(self.name), Topic.HINTS: Reach(self.name, what="hints")}
        self._consumers: dict[Topic, _Consumer] = {}
        self._beginning = {topic: asyncio.Lock() for topic in Topic}
        for library in ("aio_pika", "aiormq"):
            # They report every attempt; what matters of it is in `failing` and in this module's own log.
            logging.getLogger(library).setLevel(logging.CRITICAL)

    @property
    def failing(self) -> str | None:
        """See Broker."""
        return self._reach[Topic.COMMANDS].failing

    @property
    def hints_failing(self) -> str | None:
        """See Broker."""
        return self._reach[Topic.HINTS].failing

    async def publish(self, topic: Topic, body: bytes) -> None:
        """See Broker. A command is on the disks of most of the queue's members when this returns."""
        async with self._bounded(topic, PUBLISH_SECONDS_MAX[topic], Way.PUBLISHING):
            await self._publish(self._publishing[topic], "", self._queues.of(topic), _message(body))

    async def _publish(self, link: Link, exchange: str, queue: str, message: aio_pika.Message) -> None:
        """Publish; where the queue is gone it is made, and the message sent again: nobody had it.

        So is one that RabbitMQ turns away (a nack), as it does for a moment where a queue has just been made or
        has no leader. Should a part of the queue's members have kept it, it comes twice, like all redelivered.
        """
        pauses = iter(NACK_PAUSES)
        made = False
        while True:
            channel = await link.channel(patient=False)
            await link.unblocked()
            place = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
            try:
                await place.publish(message, queue, mandatory=True)
                return
            except (PublishError, ChannelNotFoundEntity):
                if made:
                    raise
                made = True
            except DeliveryError:
                pause = next(pauses, None)
                if pause is None:
                    raise
                await asyncio.sleep(pause)
                continue
            try:
                if not channel.is_closed:  # else the next one declares
                    await link.declare(channel)
            except BaseException:
                link.drop()
                raise

    async def receive(self, topic: Topic, *, limit: int, wait_seconds: float) -> list[Delivery]:
        """See Broker. Between two attempts to connect it waits, so that a caller may simply call again."""
        ends = time.monotonic() + min(wait_seconds, WAIT_SECONDS_MAX)
        while True:
            async with self._bounded(topic, CONNECT_SECONDS_MAX, Way.RECEIVING):
                consumer = await self._consume(topic)
            found = consumer.take(limit)
            if found or time.monotonic() >= ends:
                return found
            await consumer.wait(ends)
            if consumer.channel.is_closed and not consumer.retired:
                raise self._reach[topic].away("RabbitMQ has ended the connection", Way.RECEIVING)

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
        async with self._bounded(topic, ANSWER_SECONDS_MAX, Way.RECEIVING):
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
        topic = Topic.COMMANDS
        async with self._bounded(topic, PUBLISH_SECONDS_MAX[topic], Way.PUBLISHING):
            await self._publish(self._publishing[topic], self._queues.dead, "", _message(body, reason=reason))

    async def depth(self, topic: Topic) -> Depth:
        """See Broker. RabbitMQ does not say how many messages other processes hold: those are missing here."""
        dead = 0
        async with self._bounded(topic, ANSWER_SECONDS_MAX, Way.ASKING):
            link = self._receiving[topic]
            channel = await link.channel(patient=False)
            try:
                await link.declare(channel)
                waiting = await _messages(channel, self._queues.of(topic))
                if topic is Topic.COMMANDS:
                    dead = await _messages(channel, self._queues.dead)
            except BaseException:
                link.drop()
                raise
        consumer = self._consumers.get(topic)
        held = len(consumer.held) if consumer is not None and not consumer.channel.is_closed else 0
        return Depth(waiting + held, dead)

    async def durability(self) -> list[tuple[str, bool, str]]:
        """See Broker. A queue of another kind under this name would be an error."""
        async with self._bounded(Topic.COMMANDS, ANSWER_SECONDS_MAX, Way.ASKING):
            await self._receiving[Topic.COMMANDS].channel(patient=False)
        return [(f"quorum queue {self._queues.commands}, confirmed when on disk", True, "")]

    async def close(self) -> None:
        """See Broker."""
        for reach in self._reach.values():
            reach.closed = True
        links = (*self._publishing.values(), *self._receiving.values())
        await asyncio.gather(*(link.close() for link in links))

    @asynccontextmanager
    async def _bounded(self, topic: Topic, seconds: float, way: Way) -> AsyncIterator[None]:
        """Bound what is inside by `seconds`, and keep to the truth what is said of the topic."""
        reach = self._reach[topic]
        reach.check_open()
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            sentence = f"RabbitMQ did not answer within {seconds * 1000:g} ms"
            if way is Way.PUBLISHING and await self._publishing[topic].blocked():
                sentence = "RabbitMQ takes no messages now: it is short of memory or disk"
            raise reach.away(sentence, way) from error
        except BrokerUnavailable as error:
            raise reach.away(str(error), way) from error
        except TROUBLES as error:
            raise reach.away(explained(error, topic), way) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this caller: the library cancels what waits on a connection that ends.
            raise reach.away("RabbitMQ has ended the connection", way) from error
        reach.back(way)


async def _messages(channel: AbstractChannel, queue: str) -> int:
    """Return how many messages wait in a queue that is there."""
    return (await channel.declare_queue(queue, passive=True)).declaration_result.message_count or 0


def _message(body: bytes, **headers: str) -> aio_pika.Message:
    return aio_pika.Message(body, headers=dict(headers), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
