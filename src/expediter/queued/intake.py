"""Queued intake: a command is accepted once the broker has it, and stored later by the workers.

On its way it passes the same `decide` as in the database, on what is known of the order, so that most of what
would be refused is refused at once. Where the broker or Redis cannot take it, it is stored directly; where the
database cannot either, nothing is accepted. What the broker holds is remembered here until it is seen in the
database: a broker that was wiped is given it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import structlog
import uuid_utils
from msgspec.structs import replace

from expediter.backends.batching import Gatherer
from expediter.backends.brokers import Broker, Topic
from expediter.backends.databases import Connection, Database
from expediter.backends.redis_client import RedisUnavailable
from expediter.backends.tasks import Background, within
from expediter.errors import (
    BrokerUnavailable,
    CommitUncertain,
    Conflict,
    DuplicateOrder,
    ExpediterError,
    IdempotencyMismatch,
    NotYetApplied,
    OrderNotFound,
    Overloaded,
    Unavailable,
)
from expediter.orders.commands import Command, PlaceOrder
from expediter.orders.decisions import decide
from expediter.orders.documents import order_document
from expediter.orders.order import MICROSECONDS, Job, Line, Order
from expediter.queued.message import queued
from expediter.queued.temporary import Kept, Prediction, Temporary, TemporaryOrders
from expediter.queued.watcher import LOOK_SECONDS, Accepted, Unstored, publish
from expediter.store import lookups
from expediter.store.committer import Committer
from expediter.store.idempotency import load_answers, replay_answer
from expediter.store.queries import Queries
from expediter.store.submissions import Answer, Applied, IdempotencyKey, Outcome, Queued, Replayed, Request

#: Commands in one message, at most.
COMMANDS_PER_MESSAGE = 100
#: Commands that may wait for their message; one more is refused with Overloaded.
WAITING_MAX = 10_000
#: Seconds that the database may take to say what it knows of an order; beyond that it is accepted unjudged.
JUDGE_SECONDS = 0.5
#: How long a command of no caller's key is known by its token, in microseconds.
TOKEN_KEEP = 86_400 * MICROSECONDS

#: Words the answer to a queued command: the order as it will be (None: gone or not known), its lines, its id.
Word = Callable[[Order | None, tuple[Line, ...], str], Answer]

_Known = tuple[Order, Job | None, tuple[Line, ...]]

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
        self._messages: Gatherer[Accepted, bool] = Gatherer(
            self._send, items_max=COMMANDS_PER_MESSAGE, rounds_max=2
        )
        self._unstored = Unstored(database, committer, broker, temporary)
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

    async def submit(self, request: Request, word: Word) -> Outcome | Queued:
        """Accept a request, and return its answer as `word` has it.

        Returns what the committer returned where the request had to be stored directly. Raises what `decide`
        raises, Overloaded, and Unavailable when neither broker nor database can take it.
        """
        if self._messages.waiting >= WAITING_MAX:
            raise Overloaded(f"{self._messages.waiting} commands wait for the broker; try again")
        now = time.time_ns() // 1000
        command = request.command
        if isinstance(command, PlaceOrder):
            command = replace(command, placed_at=now)
        if request.key is None:
            return await self._queue(request, command, word, now)
        return await self._once(request.key, request, command, word, now)

    async def _once(
        self, key: IdempotencyKey, request: Request, command: Command, word: Word, now: int
    ) -> Outcome | Queued:
        """Accept a request with an Idempotency-Key, unless it was accepted before."""
        try:
            mine = Kept(fingerprint=key.fingerprint, order_id=command.order_id)
            kept, free = await self._temporary.begin(key.key, mine, key.keep // 1000)
        except RedisUnavailable as error:
            return await self._store(replace(request, command=command), error)
        if kept.fingerprint != key.fingerprint:
            if free:
                await self._give_up(key, forget=False)
            raise IdempotencyMismatch("This Idempotency-Key was used before with another request")
        if kept.answer is not None:
            if free:
                await self._give_up(key, forget=False)
            return Replayed(msgspec.json.decode(kept.answer, type=Answer))
        if not free:
            raise Conflict("A request with this Idempotency-Key is under way; try again")
        # Whoever tried before and did not come to an end had an id for the order: the same one again.
        command = replace(command, order_id=kept.order_id)
        request = replace(request, command=command)
        try:
            # Redis may have forgotten what the database knows.
            outcome = await self._stored_answer(key) or await self._queue(request, command, word, now)
        except Conflict as refused:
            again = await self._tried_before(key, request)
            await self._give_up(key, forget=True)
            if again is None or isinstance(again, ExpediterError):
                raise refused from None
            return again
        except ExpediterError as error:
            uncertain = isinstance(error, Unavailable)
            await self._give_up(key, forget=not uncertain)
            raise
        if isinstance(outcome, Queued):
            answer = msgspec.json.encode(outcome.answer).decode()
            try:
                await self._temporary.finish(key.key, replace(kept, answer=answer), key.keep // 1000)
            except RedisUnavailable:
                log.warning("an Idempotency-Key could not be kept in Redis; the database will know it")
        else:
            # It was stored directly, or refused: the database has the last word.
            await self._give_up(key, forget=True)
        return outcome

    async def _tried_before(self, key: IdempotencyKey, request: Request) -> Outcome | None:
        """Return what became of this very request, if that is what stands in its way."""
        if isinstance(request.command, PlaceOrder) and request.command.fresh:
            # Nobody else has this id: it waits in the broker, and whoever stores it first decides nothing else.
            return await self._committer.submit(request)
        return await self._stored_answer(key)

    async def _stored_answer(self, key: IdempotencyKey) -> Replayed | None:
        """Return the answer that the database has kept under this key. Raises IdempotencyMismatch."""

        async def work(connection: Connection) -> Replayed | None:
            known = await load_answers(connection, [key.key], await connection.now())
            return replay_answer(key, known[key.key]) if key.key in known else None

        return await within(self._database.read(work), JUDGE_SECONDS)

    async def _give_up(self, key: IdempotencyKey, *, forget: bool) -> None:
        try:
            await self._temporary.give_up(key.key, forget=forget)
        except RedisUnavailable:
            log.warning("an Idempotency-Key stays taken for a moment: Redis cannot be reached")

    async def _queue(self, request: Request, command: Command, word: Word, now: int) -> Outcome | Queued:
        accepted, answer = await self._judge(request, command, word, now)
        try:
            taken = await self._messages.ask(accepted)
        except (RedisUnavailable, BrokerUnavailable) as error:
            return await self._store(accepted.command.request(waits=True), error, request)
        if not taken:
            raise DuplicateOrder(command.order_id)
        self.failing = None
        return Queued(answer)

    async def _judge(self, request: Request, command: Command, word: Word, now: int) -> tuple[Accepted, Answer]:
        """Decide on what is known of the order; return what to send, and the answer. Raises the refusal."""
        before, known = await self._known(command)
        token = uuid_utils.uuid7().hex
        fresh = isinstance(command, PlaceOrder) and command.fresh
        key = request.key or (None if fresh else IdempotencyKey(f"queued:{token}", "", TOKEN_KEEP))
        kept_by = key.key if key else None
        base_version = 0
        prediction = None
        if known is None and not isinstance(command, PlaceOrder):
            temporary = Temporary(state="pending", token=token, version=0, key=kept_by)
        else:
            order, job, lines = known or (None, None, ())
            decision = decide(order, job, command, now)
            base_version = order.version if order else 0
            lines = command.lines if isinstance(command, PlaceOrder) else lines
            deleted = decision.order is None
            shown = decision.order or order
            assert shown is not None  # a command about no order was refused
            if not deleted:
                prediction = Prediction(replace(shown, payment_token=None), decision.job, lines)
            temporary = Temporary(
                state="pending",
                token=token,
                version=base_version + len(decision.events),
                key=kept_by,
                order=msgspec.Raw(b"null" if deleted else order_document(shown, lines)),
                prediction=prediction,
                deleted=deleted,
            )
        answer = word(
            prediction.order if prediction else None, prediction.lines if prediction else (), command.order_id
        )
        send = queued(
            command,
            token=token,
            key=key,
            answer=None if key is None else answer if request.key else Answer(answer.status_code, {}, ""),
            base_version=base_version,
            after=before.key if before is not None and before.state == "pending" else None,
        )
        return Accepted(send, temporary, isinstance(command, PlaceOrder), before), answer

    async def _known(self, command: Command) -> tuple[Temporary | None, _Known | None]:
        """Return what is kept in Redis, and the order as it is or will be; None: nobody knows now.

        Raises OrderNotFound, DuplicateOrder.
        """
        placing = isinstance(command, PlaceOrder)
        if isinstance(command, PlaceOrder) and command.fresh:
            return None, None
        try:
            temporary = (await self._temporary.find(command.order_id)).temporary
        except RedisUnavailable:
            temporary = None
        if temporary is not None and temporary.state == "pending":
            if placing:
                raise DuplicateOrder(command.order_id)
            if temporary.deleted:
                raise OrderNotFound(command.order_id)
            if temporary.prediction is not None:
                predicted = temporary.prediction
                return temporary, (predicted.order, predicted.job, predicted.lines)
        looked = await within(self._look_up(command.order_id, placing=placing), JUDGE_SECONDS)
        if looked is None:
            return temporary, None
        (stored,) = looked
        if placing and stored is not None:
            raise DuplicateOrder(command.order_id)
        if not placing and stored is None:
            # What Redis has forgotten may still be on its way.
            await self._queries.order(command.order_id)
            (stored,) = await self._look_up(command.order_id)
        if placing and temporary is not None and temporary.state == "refused":
            # A change of an order that did not exist was refused: the id is free all the same.
            await self._temporary.remove([command.order_id])
        return temporary, stored

    async def _look_up(self, order_id: str, *, placing: bool = False) -> tuple[_Known | None]:
        look = partial(lookups.order_job_and_lines, order_id=order_id, placing=placing)
        return (await self._database.read(look),)

    async def _store(self, direct: Request, error: Unavailable, asked: Request | None = None) -> Outcome:
        """Store a request directly, because broker or Redis cannot take it."""
        if self.failing is None:
            log.warning("commands are stored directly: broker or Redis cannot take them", error=str(error))
        self.failing = str(error)
        asked = asked or direct
        request = replace(direct, with_lines=asked.with_lines, answer=asked.answer if asked.key else direct.answer)
        try:
            outcome = await self._committer.submit(request)
        except Unavailable as away:
            if not isinstance(error, BrokerUnavailable):
                raise
            # It may have reached the broker all the same: sent again without a key it could be done twice.
            both = f"{away} The broker cannot take it either, or did not say so; it may yet be stored."
            raise CommitUncertain(both) from away
        if isinstance(outcome, OrderNotFound):
            await self._queries.order(outcome.order_id)  # raises unless it was accepted and is not stored
        if isinstance(outcome, (NotYetApplied, OrderNotFound)):
            raise Unavailable(f"What was accepted before about this order is not stored yet; try again. {error}")
        if isinstance(outcome, Applied) and asked.key is None:
            return replace(outcome, answer=None)
        return outcome

    async def _send(self, accepted: Sequence[Accepted]) -> list[bool]:
        """Keep commands for readers and publish them; return which were new where they had to be."""
        kept = await self._temporary.put(
            [(each.command.command.order_id, each.temporary, each.new) for each in accepted]
        )
        sending = [each for each, taken in zip(accepted, kept, strict=True) if taken]
        try:
            await publish(self._broker, sending)
        except BrokerUnavailable:
            await self._temporary.put_back(
                {each.command.command.order_id: each.before for each in reversed(sending)}
            )
            raise
        self._unstored.remember(sending)
        return kept

    async def _look_after(self) -> None:
        while not self.background.stopping:
            await self.background.rest(LOOK_SECONDS / 2)
            await self._look_whether_it_works()
            await self._unstored.look_after()

    async def _look_whether_it_works(self) -> None:
        if self.failing is None:
            return
        try:
            await self._temporary.check()
            await self._broker.depth(Topic.COMMANDS)
        except (RedisUnavailable, BrokerUnavailable) as error:
            self.failing = str(error)
        else:
            log.info("commands are queued again")
            self.failing = None
