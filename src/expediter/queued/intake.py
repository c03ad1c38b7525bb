"""Queued intake: a command is accepted once the broker has it, and stored later by the workers.

What the database can say to be impossible is refused at once. What is accepted is kept in Redis before it is
published; where the broker or Redis cannot take it, it is stored directly; where the database cannot either,
nothing is accepted.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import structlog
import uuid_utils
from msgspec.structs import replace

from expediter.backends.batching import Gatherer
from expediter.backends.brokers import Broker, Topic
from expediter.backends.databases import Connection, Database
from expediter.backends.points import reach
from expediter.backends.redis_client import RedisUnavailable
from expediter.backends.tasks import Background, within
from expediter.errors import (
    BrokerUnavailable,
    CommitUncertain,
    DuplicateOrder,
    ExpediterError,
    NotYetApplied,
    OrderNotFound,
    Overloaded,
    Unavailable,
)
from expediter.orders.commands import Command, PlaceOrder
from expediter.orders.decisions import decide
from expediter.orders.documents import order_document
from expediter.orders.order import MICROSECONDS
from expediter.queued.message import QueuedCommand, messages, pack
from expediter.queued.temporary import Accepted, Found, Kept, Settled, TemporaryOrders
from expediter.store import lookups
from expediter.store.committer import Committer
from expediter.store.idempotency import kept_answer, replay_answer
from expediter.store.incarnation import read_incarnation
from expediter.store.queries import Queries
from expediter.store.submissions import Answer, Applied, IdempotencyKey, Outcome, Queued, Replayed, Request

#: Commands in one message, at most.
COMMANDS_PER_MESSAGE = 100
#: Commands that may wait for their message, and the bytes of the bodies of all that are being accepted; one more
#: is refused with Overloaded.
WAITING_MAX = 10_000
WAITING_BYTES_MAX = 64 * 1024 * 1024
#: Changes of one order that may wait to be applied; one more is refused with Overloaded.
CHANGES_MAX = 100
#: Seconds that the database may take to say what it knows of an order; beyond that it is accepted unjudged.
JUDGE_SECONDS = 2.0
#: How long a command of no caller's key is known by its token, in microseconds.
TOKEN_KEEP = 86_400 * MICROSECONDS
#: Accepted commands that a process remembers until they are settled, and their bytes; Redis and the broker alone
#: have older ones.
REMEMBERED_MAX = 20_000
REMEMBERED_BYTES_MAX = 64 * 1024 * 1024
#: Seconds between two looks whether Redis has forgotten them, and commands that are looked for at once.
LOOK_SECONDS = 1.0
LOOKS_PER_ROUND = 500

#: Words the answer to a queued command: the order's document, if it is known, and how many changes of it wait.
Word = Callable[[bytes | None, int], Answer]

log = structlog.get_logger(__name__)


class QueuedIntake:
    """Accepts commands into the broker. Use it from one event loop."""

    def __init__(
        self,
        database: Database,
        committer: Committer,
        queries: Queries,
        broker: Broker,
        temporary: TemporaryOrders,
    ) -> None:
        """Publish to `broker`, keep what is not stored in `temporary`, and fall back to `committer`."""
        self._database = database
        self._committer = committer
        self._queries = queries
        self._broker = broker
        self._temporary = temporary
        self._messages: Gatherer[Accepted, Kept | str | None] = Gatherer(
            self._send, items_max=COMMANDS_PER_MESSAGE, rounds_max=2
        )
        self._accepting_bytes = 0
        self._remembered: OrderedDict[str, Accepted] = OrderedDict()
        self._remembered_bytes = 0
        self._since = b""
        self._begun = False
        self.background = Background("intake", self._look_after)
        #: Why commands are stored directly now; None while the broker takes them.
        self.failing: str | None = None

    def start(self) -> None:
        """Begin to look after what was accepted."""
        self.background.start()

    async def stop(self) -> None:
        """Send what was asked for, then stop."""
        await self._messages.finish()
        await self.background.stop(grace_seconds=0)

    async def submit(self, request: Request, word: Word, body_bytes: int = 0) -> Outcome | Queued:
        """Accept a request, which came in so many bytes, and return its answer as `word` has it.

        Returns what the committer returned where the request had to be stored directly. Raises the refusal, and
        Unavailable when neither broker nor database can take it.
        """
        if self._messages.waiting >= WAITING_MAX:
            raise Overloaded(f"{self._messages.waiting} commands wait for the broker; try again")
        if self._accepting_bytes + body_bytes > WAITING_BYTES_MAX:
            raise Overloaded(f"{self._accepting_bytes} bytes of commands wait for the broker; try again")
        self._accepting_bytes += body_bytes
        try:
            return await self._accept_or_store(request, word, body_bytes)
        finally:
            self._accepting_bytes -= body_bytes

    async def _accept_or_store(self, request: Request, word: Word, body_bytes: int) -> Outcome | Queued:
        now = time.time_ns() // 1000
        if isinstance(request.command, PlaceOrder):
            request = replace(request, command=replace(request.command, placed_at=now))
        try:
            return await self._accept(request, word, now, body_bytes)
        except RedisUnavailable as error:
            return await self._store(request, error, None, body_bytes)

    async def _accept(self, request: Request, word: Word, now: int, body_bytes: int) -> Outcome | Queued:
        command, key = request.command, request.key
        if not self._begun:
            await self._look_at_incarnation()
        found = Found()
        fresh = isinstance(command, PlaceOrder) and command.fresh
        if key is not None or not fresh:
            found = await self._temporary.find(command.order_id, key.key if key else "")
        if key is not None and (known := await self._answered(key, found.kept)):
            return known
        if isinstance(command, PlaceOrder):
            new: bytes | None = await self._judge_new(command, found, now)
            answer = word(new, 0)
        else:
            new = None
            answer = word(await self._judge(command, found, now), len(found.changes) + 1)
        token = uuid_utils.uuid7().hex
        send = QueuedCommand(
            token=token,
            command=command,  # type: ignore[arg-type]
            accepted_at=now,
            key=key or (None if fresh else IdempotencyKey(f"queued:{token}", "", TOKEN_KEEP)),
            answer=answer if key else None,
            behind=() if new else found.waiting,
            placed=not new and found.pending is not None,
            incarnation=self._temporary.incarnation,
        )
        try:
            in_the_way = await self._messages.ask(Accepted(send, pack([send]), new))
        except (RedisUnavailable, BrokerUnavailable) as error:
            return await self._store(request, error, send, body_bytes)
        if isinstance(in_the_way, Kept) and key is not None:
            return self._replay(key, in_the_way)
        if in_the_way is not None:
            raise DuplicateOrder(command.order_id)
        self.failing = None
        return Queued(answer)

    async def _answered(self, key: IdempotencyKey, kept: Kept | None) -> Replayed | None:
        """Return what a request with this key was answered. Raises IdempotencyMismatch.

        What Redis keeps counts while the command waits. After that the database has the answer: one that it has
        not (any more) is of a command that was refused, or restored away.
        """
        if kept is not None and any((await self._temporary.waiting([kept.token]))[0]):
            return self._replay(key, kept)

        async def work(connection: Connection) -> tuple[Replayed | None]:
            return (await kept_answer(connection, key, await connection.now()),)

        looked = await within(self._database.read(work), JUDGE_SECONDS)
        if looked is None:  # the database is away
            return None if kept is None else self._replay(key, kept)
        if looked[0] is None and kept is not None:
            await self._temporary.forget(key.key)
        return looked[0]

    @staticmethod
    def _replay(key: IdempotencyKey, kept: Kept) -> Replayed:
        return replay_answer(key, (kept.fingerprint, kept.answer))

    async def _judge_new(self, command: PlaceOrder, found: Found, now: int) -> bytes:
        """Return the document of a new order. Raises DuplicateOrder."""
        if not command.fresh:
            looked = await within(self._look_up(command.order_id), JUDGE_SECONDS)
            if found.pending is not None or (looked is not None and looked[0] is not None):
                raise DuplicateOrder(command.order_id)
        order = decide(None, None, command, now).order
        assert order is not None  # it is placed
        return order_document(order, command.lines)

    async def _judge(self, command: Command, found: Found, now: int) -> bytes | None:
        """Return the document of the order as it is now; None: nobody knows. Raises what `decide` raises.

        A change is judged where the database has the order and nothing waits; else what waits comes first.
        """
        if len(found.changes) >= CHANGES_MAX:
            raise Overloaded(f"{len(found.changes)} changes of order {command.order_id} wait; try again")
        try:
            looked = await within(self._look_up(command.order_id), JUDGE_SECONDS)
        except DuplicateOrder:  # it is deleted, and Redis has not heard of it yet
            raise OrderNotFound(command.order_id) from None
        if looked is not None and looked[0] is not None:
            order, job, lines = looked[0]
            if found.pending is None and not found.changes:
                decide(order, job, command, max(now, order.updated_at))
            return order_document(order, lines)
        if looked is None:
            return None  # it may be stored, and have gone on
        if found.pending is not None:
            return found.pending
        # Raises, unless it was accepted all the same and Redis had forgotten that.
        return (await self._queries.order(command.order_id)).body

    async def _look_up(self, order_id: str) -> tuple[lookups.Whole | None]:
        """Return what the database has of an order. Raises DuplicateOrder for one that is deleted."""
        look = partial(lookups.order_job_and_lines, order_id=order_id, placing=True)
        return (await self._database.read(look),)

    async def _store(
        self, request: Request, error: Unavailable, sent: QueuedCommand | None, body_bytes: int
    ) -> Outcome:
        """Store a request directly, because broker or Redis cannot take it.

        What was `sent` may be there all the same: it is stored under the same key, so that it is not stored twice.
        """
        if self.failing is None:
            log.warning("commands are stored directly: broker or Redis cannot take them", error=str(error))
        self.failing = str(error)
        direct = request
        if sent is not None:
            direct = replace(sent.request(waits=True), with_lines=request.with_lines, incarnation=None)
            direct = replace(direct, answer=request.answer or direct.answer)
        try:
            outcome = await self._committer.submit(direct, body_bytes)
        except Unavailable as away:
            if sent is None:
                raise
            if request.key is None:  # with a key, what others were answered counts
                await self._withdraw(Settled(sent, "gone"))
            both = f"{away} The broker cannot take it either, or did not say so; it may yet be stored."
            raise CommitUncertain(both) from away
        if sent is not None:
            await self._withdraw(Settled(sent, "gone" if isinstance(outcome, ExpediterError) else "stored"))
        if isinstance(outcome, OrderNotFound):
            await self._queries.order(outcome.order_id)  # raises unless it was accepted and is not stored
        if isinstance(outcome, (NotYetApplied, OrderNotFound)):
            raise Unavailable(f"What was accepted before about this order is not stored yet; try again. {error}")
        if isinstance(outcome, Applied) and request.key is None:
            return replace(outcome, answer=None)
        return outcome

    async def _withdraw(self, settled: Settled) -> None:
        self._forget(settled.command.token)
        try:
            await self._temporary.settle([settled])
        except RedisUnavailable:
            log.warning("a command that was stored directly stays visible: Redis cannot be reached")

    async def _send(self, accepted: Sequence[Accepted]) -> list[Kept | str | None]:
        """Keep commands for readers and publish them; return what was in the way of each."""
        in_the_way = await self._temporary.put(accepted)
        sending = [each for each, found in zip(accepted, in_the_way, strict=True) if found is None]
        self._remember(sending)
        reach("kept")
        for body in messages([each.packed for each in sending]):
            await self._broker.publish(Topic.COMMANDS, body)
        reach("sent")
        return list(in_the_way)

    def _remember(self, accepted: Sequence[Accepted]) -> None:
        for each in accepted:
            self._remembered[each.command.token] = each
            self._remembered_bytes += _size(each)
        while len(self._remembered) > REMEMBERED_MAX or self._remembered_bytes > REMEMBERED_BYTES_MAX:
            self._forget(next(iter(self._remembered)))

    def _forget(self, token: str) -> None:
        if (forgotten := self._remembered.pop(token, None)) is not None:
            self._remembered_bytes -= _size(forgotten)

    async def _look_after(self) -> None:
        while not self.background.stopping:
            try:
                await self._look_at_incarnation()
                await self._put_back()
                if self.failing is not None:
                    await self._broker.depth(Topic.COMMANDS)
                    log.info("commands are queued again")
                    self.failing = None
            except (RedisUnavailable, BrokerUnavailable) as error:
                self.failing = self.failing and str(error)
            await self.background.rest(LOOK_SECONDS)

    async def _look_at_incarnation(self) -> None:
        """Accept nothing under an older one. Raises RedisUnavailable, also while none was ever known."""
        number = await within(self._database.read(read_incarnation), JUDGE_SECONDS)
        if number is None and not self._begun:
            raise RedisUnavailable("nothing can be queued before the database was read for the first time")
        await self._temporary.tell_incarnation(number or 0)
        self._begun = True

    async def _put_back(self) -> None:
        """Forget what has left the set; put everything back that is missing after Redis itself has forgotten.

        What was settled meanwhile is put back, too: whoever looks after it then finds it stored.
        """
        tokens = list(self._remembered) or [""]
        since = self._since
        for start in range(0, len(tokens), LOOKS_PER_ROUND):
            part = tokens[start : start + LOOKS_PER_ROUND]
            waiting, since = await self._temporary.waiting(part)
            gone = [each for each, waits in zip(part, waiting, strict=True) if not waits]
            missing = [self._remembered[token] for token in gone if token in self._remembered]
            if missing and self._since not in (b"", since):
                log.warning("Redis has forgotten accepted commands; putting them back", count=len(missing))
                await self._temporary.put(missing)
            else:
                for each in missing:
                    self._forget(each.command.token)
        self._since = since


def _size(accepted: Accepted) -> int:
    return len(accepted.packed) + len(accepted.order or b"")
