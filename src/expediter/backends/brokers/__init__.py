"""Brokers: what carries hints and queued commands between processes.

A hint says that jobs are due; losing every hint costs latency and nothing else. A command is an order or a change
that was accepted before it is in the database: it is published with the broker's own confirmation, and
acknowledged only after the transaction that applied it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import msgspec
import structlog

from expediter.errors import BrokerUnavailable, ConfigurationError

#: Seconds between two tries to reach a broker that is away: doubled from the first to the last.
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 2.0
#: Seconds for which what works in one way does not yet mean that another way works again.
REFUSAL_SECONDS = 10.0

log = structlog.get_logger(__name__)


class Topic(StrEnum):
    """What a message is about; each topic is a queue of its own."""

    HINTS = "hints"
    COMMANDS = "commands"


class Way(StrEnum):
    """What a broker is used for. Each may fail while the others work."""

    PUBLISHING = "publishing"
    RECEIVING = "receiving"
    ASKING = "asking"


class Delivery(msgspec.Struct, frozen=True):
    """One message. `token` is the broker's own mark, by which the message is acknowledged.

    `redelivered` says that it may have been received before.
    """

    token: object
    body: bytes
    redelivered: bool = False


class Depth(msgspec.Struct, frozen=True):
    """Messages that wait or are being worked on, and messages that were put aside as unusable (dead)."""

    waiting: int
    dead: int


class Broker(Protocol):
    """A queue of messages for each topic; every message goes to one receiver, first in, first out.

    Each method raises BrokerUnavailable when the broker cannot be used now; it reconnects by itself, for ever,
    with bounded waits. Queues, streams and groups that vanished are made again.
    """

    #: What it is, for people: "Redis Streams at 127.0.0.1:6379/0". Never with a password.
    name: str

    @property
    def failing(self) -> str | None:
        """Why it cannot be used for commands; None while it can."""

    @property
    def hints_failing(self) -> str | None:
        """Why hints cannot be given or taken; None while they can. It says nothing about commands."""

    async def publish(self, topic: Topic, body: bytes) -> None:
        """Hand over a message. A command is stored by the broker, durably and confirmed, when this returns.

        Raises BrokerUnavailable, also where it is not known whether the message was stored.
        """

    async def receive(self, topic: Topic, *, limit: int, wait_seconds: float) -> list[Delivery]:
        """Return up to `limit` messages, or none after `wait_seconds` (2 at most) without one."""

    async def acknowledge(self, topic: Topic, deliveries: Sequence[Delivery]) -> None:
        """Remove messages for good; what is not acknowledged comes again, to somebody else if need be."""

    async def reject(self, topic: Topic, delivery: Delivery, reason: str) -> None:
        """Put a message aside among the dead, where a person can look at it: it can never be used."""

    async def put_aside(self, body: bytes, reason: str) -> None:
        """Put a command among the dead that came in a message with others."""

    async def depth(self, topic: Topic) -> Depth:
        """Return how many messages there are."""

    async def durability(self) -> list[tuple[str, bool, str]]:
        """Return what decides whether a confirmed command survives a power cut: (what, whether, what to do)."""

    async def close(self) -> None:
        """Give back what was received and not acknowledged, and close every connection."""


class Reach:
    """Whether something can be used: the log says once that it is away, and once that it is back.

    One that is full takes nothing and still hands out what it has; one that may not be read takes everything. So
    after a message that was refused, or could not be received, only the same way tells for REFUSAL_SECONDS that it
    works.
    """

    def __init__(self, name: str, *, what: str = "the broker") -> None:
        """`name` is the broker's, for people; `what` of it is meant. It is believed to work."""
        self._name = name
        self._what = what
        self._way = Way.ASKING
        self._refused_until = 0.0
        self.closed = False
        #: Why it cannot be used; None while it works.
        self.failing: str | None = None

    def check_open(self) -> None:
        """Raise BrokerUnavailable after `closed` was set."""
        if self.closed:
            raise BrokerUnavailable(f"{self._name} was closed")

    def away(self, reason: str, way: Way) -> BrokerUnavailable:
        """Take note of a failure, and return the error to raise."""
        if self.closed:
            return BrokerUnavailable(f"{self._name} was closed")
        if self.failing is None:
            log.warning(f"{self._what} cannot be used", broker=self._name, reason=reason)
        self.failing, self._way = reason, way
        self._refused_until = 0.0 if way is Way.ASKING else time.monotonic() + REFUSAL_SECONDS
        return BrokerUnavailable(reason)

    def back(self, way: Way) -> None:
        """Take note of a call that worked."""
        if self.failing is not None and (way is self._way or time.monotonic() >= self._refused_until):
            self.failing = None
            log.info(f"{self._what} can be used again", broker=self._name)


def open_broker(url: str, *, queue_name: str, redis_prefix: str = "") -> Broker | None:
    """Return the broker at `url`, without connecting yet; None for an empty url: the database is the queue.

    In RabbitMQ the queues are named after `queue_name`; in Redis all names begin with `redis_prefix`.

    Raises ConfigurationError.
    """
    scheme = url.partition(":")[0]
    if not url:
        return None
    if scheme in ("redis", "rediss", "unix"):
        from expediter.backends.brokers.redis import RedisBroker

        return RedisBroker(url, prefix=redis_prefix)
    if scheme in ("amqp", "amqps"):
        from expediter.backends.brokers.rabbitmq import RabbitBroker

        return RabbitBroker(url, queue_name=queue_name)
    raise ConfigurationError("BROKER_URL must begin with redis://, rediss://, amqp:// or amqps://")
