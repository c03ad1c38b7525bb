"""Queued intake: a command is accepted once the broker has it, and stored later by the workers.

What the database can say to be impossible is refused at once. What is accepted is kept in Redis before it is
published; where the broker or Redis cannot take it, it is stored directly; where the database cannot either,
nothing is accepted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog
import uuid_utils
from msgspec.structs import replace

from expediter.backends.batching import Gatherer
from expediter.backends.bounded import Bounded
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
from expediter.queued.message import QueuedCommand, join, named_by_key, own_key, pack
from expediter.queued.temporary import Accepted, Found, Kept, Settled, TemporaryOrders
from expediter.store import lookups
from expediter.store.committer import Committer
from expediter.store.idempotency import find_answer, load_answers, names_of, replay_answer
from expediter.store.incarnation import read_incarnation
from expediter.store.queries import Queries
from expediter.store.submissions import Answer, Applied, IdempotencyKey, Outcome, Queued, Replayed, Request

#: Commands in one message, and their bytes, at most; one that is larger has a message to itself.
COMMANDS_PER_MESSAGE = 100
MESSAGE_BYTES = 512 * 1024
#: Commands that may wait for their message, and the bytes of the bodies of all that are being accepted; one more
#: is refused with Overloaded.
WAITING_MAX = 10_000
WAITING_BYTES_MAX = 64 * 1024 * 1024
#: Changes of one order that may wait to be applied; one more is refused with Overloaded.
CHANGES_MAX = 100
#: Seconds that the database may take to say what it knows of an order; beyond that it is accepted unjudged.
JUDGE_SECONDS = 2.0
#: Bytes of accepted commands that a process remembers until they are settled, and what each costs beside its text,
#: about; Redis and the broker alone have older ones.
REMEMBERED_BYTES_MAX = 64 * 1024 * 1024
REMEMBERED_BYTES = 1024
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
        self._messages: Gatherer[Accepted, Kept | None] = Gatherer(
            self._send,
            items_max=COMMANDS_PER_MESSAGE,
            rounds_max=2,
            size=lambda each: len(each.packed),
            size_max=MESSAGE_BYTES,
        )
        self._accepting_bytes = 0
        self._remembered: Bounded[str, Accepted] = Bounded(
            REMEMBERED_BYTES_MAX, lambda each: len(each.packed) + len(each.order or b"") + REMEMBERED_BYTES
        )
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
        waiting = self._messages.waiting
        if waiting >= WAITING_MAX or self._accepting_bytes + body_bytes > WAITING_BYTES_MAX:
            raise Overloaded(f"{waiting} commands ({self._accepting_bytes} bytes) wait for the broker; try again")
        self._accepting_bytes += body_bytes
        try:
            return await self._accept(request, word, body_bytes)
        finally:
            self._accepting_bytes -= body_bytes

    async def _accept(self, request: Request, word: Word, body_bytes: int) -> Outcome | Queued:
        now = time.time_ns() // 1000
        command, key = request.command, request.key
        placing = isinstance(command, PlaceOrder)
        if isinstance(command, PlaceOrder):
            command = replace(command, placed_at=now)
            request = replace(request, command=command)
        fresh = isinstance(command, PlaceOrder) and command.fresh
        sent = None
        try:
            if not self._begun:
                await self._look_at_incarnation()
            found = Found()
            if key is not None or not fresh:
                found = await self._temporary.find(command.order_id, key.key if key else "")
            if key is not None and (known := await self._answered(key, found.kept)):
                return known
            command = named_by_key(command, key, self._temporary.incarnation)
            try:
                document = await self._judge(command, found, now)
            except DuplicateOrder:
                if command is request.command:
                    raise
                command = request.command  # made under this key when it was kept before
                document = await self._judge(command, found, now)
            answer = word(document, 0 if placing else len(found.changes) + 1)
            token = uuid_utils.uuid7().hex
            sent = QueuedCommand(
                token=token,
                command=command,  # type: ignore[arg-type]
                accepted_at=now,
                key=key or (None if fresh else own_key(token)),
                answer=answer if key else None,
                behind=() if placing else found.waiting,
                placed=not placing and found.pending is not None,
                incarnation=self._temporary.incarnation,
            )
            in_the_way = await self._messages.ask(Accepted(sent, pack([sent]), document if placing else None))
        except (RedisUnavailable, BrokerUnavailable) as error:
            return await self._store(request, error, sent, body_bytes)
        if in_the_way is not None and key is not None:
            return replay_answer(key, (in_the_way.fingerprint, in_the_way.answer))
        self.failing = None
        return Queued(answer)

    async def _answered(self, key: IdempotencyKey, kept: Kept | None) -> Replayed | None:
        """Return what a request with this key was answered. Raises IdempotencyMismatch.

        The database has the answer once the command is stored; until then, and while it is away, Redis has it.
        """

        async def work(connection: Connection) -> dict[str, tuple[str, Answer]]:
            return await load_answers(connection, list(names_of(key)), await connection.now())

        known = await within(self._database.read(work), JUDGE_SECONDS) or {}
        if kept is not None:
            known.setdefault(key.key, (kept.fingerprint, kept.answer))
        return find_answer(key, known)

    async def _judge(self, command: Command, found: Found, now: int) -> bytes | None:
        """Return the document of the order: a new one, or as it is now; None: nobody knows. Raises the refusal.

        A change is judged where the database has the order and nothing waits; else what waits comes first.
        """
        if isinstance(command, PlaceOrder):
            looked = None if command.fresh else await self._look_up(command.order_id)
            if found.pending is not None or (looked is not None and looked[0] is not None):
                raise DuplicateOrder(command.order_id)
            placed = decide(None, None, command, now).order
            assert placed is not None
            return order_document(placed, command.lines)
        if len(found.changes) >= CHANGES_MAX:
            raise Overloaded(f"{len(found.changes)} changes of order {command.order_id} wait; try again")
        try:
            looked = await self._look_up(command.order_id)
        except DuplicateOrder:  # it is deleted, and Redis has not heard of it yet
            raise OrderNotFound(command.order_id) from None
        if looked is None:
            return None  # it may be stored, and have gone on
        if looked[0] is not None:
            order, job, lines = looked[0]
            if found.pending is None and not found.changes:
                decide(order, job, command, max(now, order.updated_at))
            return order_document(order, lines)
        # Where nothing waits this raises, unless it was accepted all the same and Redis had forgotten that.
        return found.pending or (await self._queries.order(command.order_id)).body

    async def _look_up(self, order_id: str) -> tuple[lookups.Whole | None] | None:
        """Return what the database has of an order; None: it does not say. Raises DuplicateOrder if it is gone."""

        async def work(connection: Connection) -> tuple[lookups.Whole | None]:
            return (await lookups.order_job_and_lines(connection, order_id, placing=True),)

        return await within(self._database.read(work), JUDGE_SECONDS)

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
        if sent is None:
            named = named_by_key(request.command, request.key, self._temporary.incarnation)
            direct = replace(request, command=named)
        else:
            direct = replace(sent.request(waits=True), with_lines=request.with_lines, incarnation=None)
            direct = replace(direct, answer=request.answer or direct.answer)
        try:
            outcome = await self._committer.submit(direct, body_bytes)
            if isinstance(outcome, DuplicateOrder) and direct.command.order_id != request.command.order_id:
                # It was made under this key when it was kept before.
                outcome = await self._committer.submit(replace(direct, command=request.command), body_bytes)
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
        self._remembered.forget(settled.command.token)
        try:
            await self._temporary.settle([settled])
        except RedisUnavailable:
            log.warning("a command that was stored directly stays visible: Redis cannot be reached")

    async def _send(self, accepted: Sequence[Accepted]) -> list[Kept | DuplicateOrder | None]:
        """Keep commands for readers and publish them; return what was in the way of each."""
        in_the_way = await self._temporary.put(accepted)
        sending = [each for each, found in zip(accepted, in_the_way, strict=True) if found is None]
        for each in sending:
            self._remembered.keep(each.command.token, each)
        reach("kept")
        if sending:
            await self._broker.publish(Topic.COMMANDS, join([each.packed for each in sending]))
        reach("sent")
        return in_the_way

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
        tokens = list(self._remembered.kept) or [""]
        kept, since = self._remembered.kept, self._since
        for start in range(0, len(tokens), LOOKS_PER_ROUND):
            part = tokens[start : start + LOOKS_PER_ROUND]
            waiting, since = await self._temporary.waiting(part)
            gone = (token for token, waits in zip(part, waiting, strict=True) if not waits)
            missing = [kept[token] for token in gone if token in kept]
            if missing and self._since not in (b"", since):
                log.warning("Redis has forgotten accepted commands; putting them back", count=len(missing))
                await self._temporary.put(missing)
            else:
                for each in missing:
                    self._remembered.forget(each.command.token)
        self._since = since
