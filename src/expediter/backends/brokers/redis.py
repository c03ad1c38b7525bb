"""A broker on Redis Streams: one stream per topic, read by one group of consumers.

An acknowledged entry is deleted: a stream holds what waits or is being worked on and nothing else. The group
begins at the stream's first entry: one that is made again loses nothing that is still there.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis.exceptions import ResponseError

from expediter.backends.brokers import PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN, Delivery, Depth, Reach, Topic, Way
from expediter.backends.redis_client import RedisUnavailable, Run, connect, deadline, forget_idle, place_of
from expediter.backends.tasks import Pauses
from expediter.errors import BrokerUnavailable

#: Where the messages of a topic are.
STREAMS = {Topic.COMMANDS: "orders:commands", Topic.HINTS: "orders:hints"}
#: Where unusable commands are put aside, each with its reason.
DEAD = "orders:commands:dead"
#: The group of consumers that share each stream.
GROUP = "workers"

#: Hints that are kept, about; the oldest leave first.
HINTS_MAX = 10_000
#: Seconds that the publishing of a message may take.
PUBLISH_SECONDS_MAX = {Topic.COMMANDS: 2.5, Topic.HINTS: 0.25}
#: Seconds that any other answer may take, beyond the wait that was asked for.
ANSWER_SECONDS_MAX = 5.0
#: Seconds that one read waits for a message, at most.
WAIT_SECONDS_MAX = 2.0
#: Seconds that giving back may take at the end.
CLOSE_SECONDS_MAX = 2.0
#: Seconds between two looks for what a dead consumer left.
CLAIM_EVERY_SECONDS = 3.0
#: Entries that a consumer gives back at once.
PAGE = 1000
#: The age, in milliseconds, of what was given back: anybody's look for the work of dead consumers finds it.
GIVEN_BACK_MS = 86_400_000
#: Connections beside those of the readers.
CONNECTIONS_MAX = 16

#: One script, because a consumer that received between the look and its removal would take its entries along.
FORGET_CONSUMERS = """
-- KEYS[1]: a stream. ARGV: its group; milliseconds of idleness; the one consumer that is meant, or nothing.
-- Removes consumers that hold nothing and have not read for so long; returns how many.
local removed = 0
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
    local facts = {}
    for i = 1, #consumer, 2 do facts[consumer[i]] = consumer[i + 1] end
    local meant = ARGV[3] == '' or facts.name == ARGV[3]
    if meant and facts.pending == 0 and facts.idle >= tonumber(ARGV[2]) then
        redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], facts.name)
        removed = removed + 1
    end
end
return removed
"""

#: An entry of a stream: its id, and its fields; None where it was deleted.
_Entry = tuple[bytes, dict[bytes, bytes] | None]


async def _run(client: Any, *words: Any) -> Any:
    return await client.execute_command(*words)


class _Reading:
    """How far this consumer has read one stream."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        #: One reader at a time, so that nobody takes an answer under way for one that was lost.
        self.lock = asyncio.Lock()
        #: What was handed out and is neither acknowledged nor rejected.
        self.held: set[bytes] = set()
        #: Whether a read was broken off: Redis may have given this consumer entries that nobody saw.
        self.unsure = False
        self.claim_at = 0.0
        self.claim_from: bytes | str = "0-0"
        self.tidy_at = 0.0


class RedisBroker:
    """See Broker. Reads have a client of their own, so that waiting ones never keep a publisher waiting.

    What a consumer holds for longer than `claim_idle_seconds` is given to whoever looks first, itself included.
    """

    def __init__(self, url: str, *, prefix: str = "", claim_idle_seconds: float = 60.0) -> None:
        """Remember the address; nothing is opened yet. Raises ConfigurationError.

        The names of all streams begin with `prefix`.
        """
        self.name = f"Redis Streams at {place_of(url, prefix)}"
        self._streams = {topic: prefix + name for topic, name in STREAMS.items()}
        self._dead = prefix + DEAD
        self._reach = Reach(self.name)
        self._publishing = connect(url, "BROKER_URL", connections=CONNECTIONS_MAX, run=Run())
        self._receiving = connect(url, "BROKER_URL", connections=len(Topic), run=Run())
        self._consumer = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._claim_idle_ms = int(claim_idle_seconds * 1000)
        self._claim_every = min(CLAIM_EVERY_SECONDS, claim_idle_seconds / 4)
        self._readings = {topic: _Reading(stream) for topic, stream in self._streams.items()}
        self._pauses = Pauses(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)
        self._receive_at = 0.0

    @property
    def failing(self) -> str | None:
        """See Broker."""
        return self._reach.failing

    @property
    def hints_failing(self) -> str | None:
        """See Broker. Hints and commands are in one Redis: they fail together."""
        return self._reach.failing

    async def publish(self, topic: Topic, body: bytes) -> None:
        """See Broker. It is sent once: an answer that was lost leaves it open whether the message is there."""
        bound = ("MAXLEN", "~", HINTS_MAX) if topic is Topic.HINTS else ()
        async with self._bounded(PUBLISH_SECONDS_MAX[topic], Way.PUBLISHING):
            await _run(self._publishing, "XADD", self._streams[topic], *bound, "*", "body", body)

    async def receive(self, topic: Topic, *, limit: int, wait_seconds: float) -> list[Delivery]:
        """See Broker. After a failure it pauses first, so that a caller may simply call again."""
        wait_seconds = min(wait_seconds, WAIT_SECONDS_MAX)
        ends = time.monotonic() + wait_seconds
        pause = self._receive_at - time.monotonic()
        if pause > 0:
            await asyncio.sleep(min(pause, wait_seconds))
        reading = self._readings[topic]
        try:
            async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                await reading.lock.acquire()
        except TimeoutError:
            return []
        try:
            async with self._bounded(wait_seconds + ANSWER_SECONDS_MAX, Way.RECEIVING):
                return await self._next(reading, limit, ends)
        except BrokerUnavailable:
            self._receive_at = time.monotonic() + self._pauses.next()
            raise
        finally:
            reading.lock.release()

    async def _next(self, reading: _Reading, limit: int, ends: float) -> list[Delivery]:
        """Return the oldest entries that this consumer may have."""
        lost, reading.unsure = reading.unsure, True
        await self._tidy(reading)
        entries = await self._own(reading, limit) if lost else []
        found = bool(entries)
        if not entries and (time.monotonic() >= reading.claim_at or reading.claim_from != "0-0"):
            entries = await self._claim(reading, limit)
        redelivered = bool(entries)
        if not entries:
            entries = await self._read(reading, ">", limit, ends)
        # From here on nothing waits: a caller who is cancelled has either nothing or all of it.
        reading.unsure = found
        reading.held.update(entry_id for entry_id, _ in entries)
        self._pauses.reset()
        return [
            Delivery(entry_id, (fields or {}).get(b"body", b""), redelivered=redelivered)
            for entry_id, fields in entries
        ]

    async def _own(self, reading: _Reading, limit: int) -> list[_Entry]:
        """Return what Redis gave this consumer in an answer that never arrived."""
        found: list[_Entry] = []
        since: bytes | str = "0-0"
        while len(found) < limit:
            page = await self._read(reading, since, limit)
            if not page:
                break
            since = page[-1][0]
            found += [entry for entry in page if entry[1] is not None and entry[0] not in reading.held]
        return found[:limit]

    async def _claim(self, reading: _Reading, limit: int) -> list[_Entry]:
        """Take over what another consumer has held for too long, as a dead one does."""
        reading.claim_from, entries, *_ = await self._grouped(
            reading,
            lambda: (
                *("XAUTOCLAIM", reading.stream, GROUP, self._consumer, self._claim_idle_ms),
                *(reading.claim_from, "COUNT", limit),
            ),
        )
        if reading.claim_from == b"0-0":
            reading.claim_from = "0-0"
            # With entries in hand there may be more where they came from: the next call looks again.
            reading.claim_at = 0.0 if entries else time.monotonic() + self._claim_every
        return [entry for entry in entries if entry[1] is not None]

    async def _read(self, reading: _Reading, since: bytes | str, limit: int, ends: float = 0.0) -> list[_Entry]:
        """Read new entries (`since` is ">"), for which it waits until `ends`, or this consumer's own."""

        def words() -> Iterator[Any]:
            yield from ("XREADGROUP", "GROUP", GROUP, self._consumer, "COUNT", limit)
            wait_ms = int((ends - time.monotonic()) * 1000)
            if wait_ms > 0:
                yield from ("BLOCK", wait_ms)
            yield from ("STREAMS", reading.stream, since)

        answer = await self._grouped(reading, words)
        entries: list[_Entry] = answer[0][1] if answer else []
        return entries

    async def _grouped(self, reading: _Reading, words: Callable[[], Any]) -> Any:
        """Run a command on a group; a group or stream that vanished is made again from its first entry."""
        try:
            return await _run(self._receiving, *words())
        except ResponseError as error:
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
        try:
            await _run(self._receiving, "XGROUP", "CREATE", reading.stream, GROUP, "0", "MKSTREAM")
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        reading.held.clear()
        return await _run(self._receiving, *words())

    async def _tidy(self, reading: _Reading) -> None:
        """Now and then remove consumers that are long gone and hold nothing."""
        if time.monotonic() < reading.tidy_at:
            return
        reading.tidy_at = time.monotonic() + self._claim_idle_ms / 1000
        # Where scripts are forbidden, or the group is not there yet, names of the dead stay: they hold nothing.
        with suppress(ResponseError):
            await self._receiving.eval(FORGET_CONSUMERS, 1, reading.stream, GROUP, 10 * self._claim_idle_ms, "")

    async def acknowledge(self, topic: Topic, deliveries: Sequence[Delivery]) -> None:
        """See Broker."""
        if deliveries:
            await self._remove(self._readings[topic], [delivery.token for delivery in deliveries])

    async def reject(self, topic: Topic, delivery: Delivery, reason: str) -> None:
        """See Broker. A hint is dropped: nobody would ever look at it."""
        aside = (self._dead, "*", "body", delivery.body, "reason", reason) if topic is Topic.COMMANDS else ()
        await self._remove(self._readings[topic], [delivery.token], aside)

    async def put_aside(self, body: bytes, reason: str) -> None:
        """See Broker."""
        async with self._bounded(ANSWER_SECONDS_MAX, Way.ASKING):
            await self._publishing.xadd(self._dead, {"body": body, "reason": reason})

    async def _remove(self, reading: _Reading, tokens: list[Any], aside: Sequence[Any] = ()) -> None:
        """Delete and acknowledge. If Redis dies in between, the entry is gone, and its mark when it is claimed.

        Only what is put aside needs a transaction: a Redis out of memory refuses those, and must still be emptied.
        """
        pipeline = self._publishing.pipeline(transaction=bool(aside))
        async with self._bounded(ANSWER_SECONDS_MAX, Way.ASKING), pipeline:
            if aside:
                pipeline.execute_command("XADD", *aside)
            pipeline.execute_command("XDEL", reading.stream, *tokens)
            pipeline.execute_command("XACK", reading.stream, GROUP, *tokens)
            await pipeline.execute()
        reading.held.difference_update(tokens)

    async def depth(self, topic: Topic) -> Depth:
        """See Broker."""
        async with self._bounded(ANSWER_SECONDS_MAX, Way.ASKING):
            waiting = await self._publishing.xlen(self._streams[topic])
            dead = await self._publishing.xlen(self._dead) if topic is Topic.COMMANDS else 0
        return Depth(waiting, dead)

    async def durability(self) -> list[tuple[str, bool, str]]:
        """See Broker."""
        async with self._bounded(ANSWER_SECONDS_MAX, Way.ASKING):
            settings = await self._settings("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")
        if not settings:
            ask = "Redis does not let itself be asked: see to it that appendonly is yes and appendfsync is always"
            return [("CONFIG GET is forbidden", False, ask)]
        append, sync = settings.get("appendonly", ""), settings.get("appendfsync", "")
        policy = settings.get("maxmemory-policy", "noeviction")
        on, always = append == "yes", sync == "always"
        verdicts = [
            (
                f"appendonly {append}",
                on,
                "" if on else "whatever ends Redis loses every waiting command: set appendonly yes",
            ),
            (
                f"appendfsync {sync}",
                always,
                "" if always else "a power cut loses the newest commands, of a second or more: set always",
            ),
        ]
        if settings.get("maxmemory", "0") != "0" and policy.startswith("allkeys"):
            verdicts.append((f"maxmemory-policy {policy}", False, "a full Redis evicts commands: set noeviction"))
        return verdicts

    async def _settings(self, *names: str) -> dict[str, str]:
        """Return settings of the server's; none where asking is forbidden, as it is at many hosted ones."""
        found: dict[str, str] = {}
        with suppress(ResponseError):
            for name in names:
                answer = await _run(self._publishing, "CONFIG", "GET", name)
                found |= {key.decode(): value.decode() for key, value in answer.items()}
        return found

    async def close(self) -> None:
        """See Broker. What is given back needs no waiting: the next look of another consumer finds it."""
        if self._reach.closed:
            return
        self._reach.closed = True
        await self._receiving.aclose()
        await self._forget_idle()
        try:
            with suppress(RedisUnavailable):
                async with deadline(CLOSE_SECONDS_MAX):
                    for reading in self._readings.values():
                        # A stream that vanished has nothing to give back.
                        with suppress(ResponseError):
                            await self._give_back(reading)
        finally:
            await self._publishing.aclose()

    async def _give_back(self, reading: _Reading) -> None:
        client, stream, mine = self._publishing, reading.stream, self._consumer
        since = "-"
        while page := await client.xpending_range(stream, GROUP, since, "+", PAGE, mine):
            ids: list[Any] = [entry["message_id"] for entry in page]
            await client.xclaim(stream, GROUP, mine, 0, ids, idle=GIVEN_BACK_MS, justid=True)
            since = f"({ids[-1].decode()}"
        await self._publishing.eval(FORGET_CONSUMERS, 1, reading.stream, GROUP, 0, self._consumer)

    async def _forget_idle(self) -> None:
        for client in (self._publishing, self._receiving):
            await forget_idle(client)

    @asynccontextmanager
    async def _bounded(self, seconds: float, way: Way) -> AsyncIterator[None]:
        """Bound what is inside by `seconds`, and keep `failing` true to what comes of it."""
        self._reach.check_open()
        try:
            async with deadline(seconds):
                yield
        except RedisUnavailable as error:
            away = self._reach.away(str(error), way)
            if not self._reach.closed:
                await self._forget_idle()
            raise away from error
        self._reach.back(way)
