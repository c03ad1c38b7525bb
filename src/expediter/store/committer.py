"""The group commit: the one road on which every write reaches the database.

While one transaction runs, the next batch gathers; there is no timer and no added delay. Whoever asks waits until
the transaction that carries the request has been committed, and learns its own outcome only.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog

from expediter.backends.cache import Cache
from expediter.backends.databases import UPKEEP_SECONDS_MAX, WRITE_SECONDS_MAX, Connection, Database
from expediter.backends.points import reach
from expediter.backends.tasks import Background
from expediter.errors import (
    CommitUncertain,
    ConstraintViolated,
    DatabaseUnavailable,
    ExpediterError,
    RequestFailed,
    Unavailable,
)
from expediter.store import emptying
from expediter.store.gathering import ADMIT_SECONDS_MAX, Gathering, Group
from expediter.store.incarnation import move_incarnation
from expediter.store.lookups import was_committed
from expediter.store.maintenance import remove_expired_keys, retire_caches, write_nothing, write_the_same
from expediter.store.measured import Commits
from expediter.store.standing import SPARE_SECONDS, Suspension, prolong
from expediter.store.submissions import Answer, Applied, Asked, Claims, IdempotencyKey, Outcome, Replayed, Request
from expediter.store.transaction import Batch, apply
from expediter.telemetry.meters import Family

#: Seconds that a commit of unknown outcome is looked up for, and the pause between two looks.
SETTLE_SECONDS_MAX = WRITE_SECONDS_MAX
SETTLE_AGAIN_SECONDS = 0.2
#: Seconds that the answers of a committed batch may wait for the next one to be under way.
TELL_SECONDS_MAX = 0.002
#: After so many requests in a row that met a bug it is no longer theirs: nothing can be stored.
BUGS_IN_A_ROW = 5
#: How often that is tried for one batch.
SUSPENSIONS_MAX = 3
#: Seconds for which what became of the last batch is what the health says; then an empty change is tried.
KNOWN_SECONDS = 1.0
#: Pause between two rounds of housekeeping, in seconds.
HOUSEKEEPING_SECONDS = 60.0

_LATE = f"It waited {ADMIT_SECONDS_MAX:g} s for the database, which is too slow now"

log = structlog.get_logger(__name__)


class _ReadersNotTold(Exception):
    """Readers may believe what is cached of orders that are about to change; nothing was stored."""


class Committer:
    """Gathers requests into transactions. Use one per process, from one event loop."""

    def __init__(self, database: Database, cache: Cache, *, slot: int) -> None:
        """`slot` (0-63) is the process's own row of each counter."""
        self._database = database
        self._cache = cache
        self._slot = slot
        self._gathering = Gathering()
        self._measured = Commits()
        self._wake = asyncio.Event()
        self.background = Background("committer", self._run)
        self._listeners: list[Callable[[list[Applied]], None]] = []
        self._in_doubt: Batch | None = None
        self._suspension = Suspension(database, cache)
        #: When the suspension may end that the batch under way relies on; None: it relies on none.
        self._suspended_until: float | None = None
        #: What is committed, and not told yet to those who asked for it.
        self._committed: list[tuple[list[Group], list[Outcome]]] = []
        #: When the batch under way was begun, and when one was stored or failed, on the monotonic clock.
        self._begun_at = math.inf
        self._known_at = -math.inf
        #: Requests in a row that met a bug.
        self._bugs = 0
        self._late: asyncio.TimerHandle | None = None
        #: Why the last transaction was not stored; None when it was.
        self.failing: str | None = None
        self.commits = 0
        self.requests = 0

    def on_commit(self, listener: Callable[[list[Applied]], None]) -> None:
        """Call `listener` with the applied changes after each commit, on the event loop."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Begin to commit."""
        self.background.start()

    async def stop(self) -> None:
        """Commit what was asked for so far, then stop."""
        self.background.stop_soon()
        self._wake.set()
        await self.background.stop()
        await self._suspension.stop()

    async def submit(self, request: Request, body_bytes: int = 0) -> Outcome:
        """Carry out one request, which came in so many bytes; see `submit_all`."""
        return (await self.submit_all((request,), body_bytes))[0]

    async def submit_all(self, asked: Sequence[Asked], body_bytes: int = 0) -> list[Outcome]:
        """Carry out the requests in one transaction and return their outcomes, refusals included.

        Raises Overloaded when the queue is full or too slow, and what the transaction raised (Unavailable). A
        caller that goes away changes nothing: what it asked for is carried out all the same.
        """
        now = time.monotonic()
        self._gathering.admit(now)
        done = self._gathering.put(asked, now, now + ADMIT_SECONDS_MAX, body_bytes)
        self._wake.set()
        return await done

    def admit(self) -> None:
        """Raise Overloaded while `submit` would: before anything is done for a request that comes to nothing."""
        self._gathering.admit(time.monotonic())

    async def submit_patiently(
        self, asked: Sequence[Asked], body_bytes: int = 0, *, alone: bool = False
    ) -> list[Outcome]:
        """Like `submit_all`, but wait for room: for work that was accepted before, and so cannot be refused.

        `alone`: it shares its transaction with nobody.
        """
        await self._gathering.room(len(asked), body_bytes)
        done = self._gathering.put(asked, time.monotonic(), math.inf, body_bytes, alone=alone)
        self._wake.set()
        return await done

    async def _run(self) -> None:
        while self._gathering.groups or not self.background.stopping:
            await self._wake.wait()
            self._wake.clear()
            while self._gathering.groups:
                self._begun_at = time.monotonic()
                groups, late = self._gathering.take(self._begun_at)
                if late:
                    _fail(late, DatabaseUnavailable(_LATE))
                self._measured.begin(groups, self._begun_at)
                try:
                    if groups:
                        await self._commit(groups)
                        self._gathering.stored(time.monotonic())
                except Exception as error:
                    # Whatever it is: everyone in the batch must hear of it, and the next must be carried out.
                    self._give_up(groups, error)
                    log.exception("a batch failed", often=True)
                finally:
                    self._begun_at = math.inf
            if self.background.stopping:
                self._wake.set()

    async def _commit(self, groups: list[Group], *, again: bool = False) -> None:
        """Carry out a batch; `again`: its commit has failed once, and it is known that nothing was stored."""
        asked = [request for group in groups for request in group.asked]
        began = time.monotonic()
        try:
            outcomes = await self._write(asked)
        except CommitUncertain as error:
            self._cache.forget_commit(final=False)
            await self._settle(groups, error, again=again)
        except Unavailable as error:
            self._give_up(groups, error)
        except Exception as error:
            # The database refused a row, or one request meets a bug: nothing is stored, and the others go on.
            self._cache.forget_commit(final=True)
            await self._divide(groups, error)
        else:
            self._measured.end(len(outcomes), began)
            await self._succeed(groups, outcomes)

    def _give_up(self, groups: list[Group], error: Exception) -> None:
        self._tell()
        self._measured.fail()
        self._cache.forget_commit(final=True)
        self.failing = str(error)
        self._known_at = time.monotonic()
        self._gathering.fewer()
        _fail(groups, error)

    async def _succeed(self, groups: list[Group], outcomes: list[Outcome]) -> None:
        reach("committed")
        self.failing = None
        self._known_at = time.monotonic()
        self._bugs = 0
        self.commits += 1
        self.requests += len(outcomes)
        if self._gathering.halvings:
            self._gathering.more()
        told = await self._publish(outcomes)
        until, self._suspended_until = self._suspended_until, None
        if not (told if until is None else time.monotonic() <= until):
            try:
                await self._suspension.begin()
            except ExpediterError as error:
                self._tell()
                self.failing = str(error)
                _fail(groups, CommitUncertain(f"It is stored, but readers may not be shown it yet: {error}"))
                return
        self._committed.append((groups, outcomes))
        if not self._gathering.groups:
            self._tell()
        elif self._late is None:
            self._late = asyncio.get_running_loop().call_later(TELL_SECONDS_MAX, self._tell)

    def _tell(self) -> None:
        """Answer whoever is in a committed batch.

        Where another batch waits, only once that one has begun: encoding and sending the answers is work for the
        time in which the database is at work (docs/decisions/015-answers-while-the-next-commits.md).
        """
        if self._late is not None:
            self._late.cancel()
            self._late = None
        for groups, outcomes in self._committed:
            start = 0
            for group in groups:
                end = start + len(group.asked)
                if not group.done.done():
                    group.done.set_result(outcomes[start:end])
                start = end
        if self._committed:
            self._committed.clear()
            reach("told")

    async def _write(self, asked: Sequence[Asked]) -> list[Outcome]:
        """Carry out a batch; where readers cannot be told of it, only once none of them believes the cache."""
        for _ in range(SUSPENSIONS_MAX):
            try:
                return await self._database.write(partial(self._apply, asked), begun=self._tell)
            except _ReadersNotTold:
                self._cache.forget_commit(final=True)
                await self._suspension.begin()
        raise DatabaseUnavailable(
            "The cache cannot be reached, and the database is too slow to tell its readers so"
        )

    async def _apply(self, asked: Sequence[Asked], connection: Connection) -> list[Outcome]:
        self._suspended_until = None
        began = time.monotonic()

        async def announce(batch: Batch) -> None:
            self._in_doubt = batch
            if not await self._cache.expect_changes(batch.changed):
                if not await prolong(connection):
                    raise _ReadersNotTold
                self._suspended_until = began + SPARE_SECONDS

        after = await apply(connection, asked, slot=self._slot, announce=announce)
        batch = self._in_doubt
        assert batch is not None  # it was announced
        # Where others are told by the position, inside the transaction: from its commit on, readers compare it.
        self._cache.expect_commit(after - batch.events, after)
        return batch.outcomes

    async def _settle(self, groups: list[Group], uncertain: CommitUncertain, *, again: bool) -> None:
        """Find out whether a commit that was never answered took place; if not, the batch is carried out again."""
        batch = self._in_doubt
        assert batch is not None  # it was announced before its commit was sent
        log.warning("the outcome of a commit is not known; looking it up", often=True, error=str(uncertain))
        deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS_MAX
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._database.rule_out(uncertain)
                    committed = await self._database.write(partial(was_committed, event=batch.last))
                break
            except (Unavailable, TimeoutError):
                if asyncio.get_running_loop().time() > deadline:
                    self._give_up(groups, uncertain)
                    return
                await asyncio.sleep(SETTLE_AGAIN_SECONDS)
        if committed:
            await self._succeed(groups, batch.outcomes)
        elif again:
            self._give_up(groups, DatabaseUnavailable(f"Nothing was stored, twice: {uncertain}"))
        else:
            await self._commit(groups, again=True)

    @property
    def under_way_seconds(self) -> float:
        """For how long the transaction under way has been; 0 where there is none."""
        return max(0.0, time.monotonic() - self._begun_at)

    def families(self) -> list[Family]:
        """Return what this process has measured of its writing."""
        return self._measured.families(self._gathering, self.under_way_seconds)

    async def trouble(self) -> str | None:
        """Return why nothing can be stored; None: something was lately, or an empty transaction can be written."""
        # Also after a failure: a small change may succeed where an order does not, on a disk that is all but full.
        lately = time.monotonic() - self._known_at < KNOWN_SECONDS
        if not lately and self._bugs < BUGS_IN_A_ROW:
            try:
                # A change of no row finds a lock, or a server that is read-only; only one of a row a full disk.
                await self._database.write(write_nothing if self.failing is None else write_the_same)
                self.failing = None
            except ExpediterError as error:
                self.failing = str(error)
            self._known_at = time.monotonic()
        return self.failing

    async def keep_house(self) -> None:
        """Remove what has expired, now and then, for ever."""
        while True:
            try:
                removed = await self.housekeep()
            except ExpediterError as error:
                log.warning("expired idempotency keys could not be removed", error=str(error))
                removed = 0
            await asyncio.sleep(0 if removed else HOUSEKEEPING_SECONDS)

    async def housekeep(self) -> int:
        """Remove some expired idempotency keys; return how many."""
        return await self._database.write(remove_expired_keys, seconds=UPKEEP_SECONDS_MAX)

    async def clear(
        self,
        key: IdempotencyKey | None = None,
        word: Callable[[int], Answer] | None = None,
        *,
        moved: Callable[[int], Awaitable[None]] | None = None,
    ) -> int | Replayed:
        """Remove every order placed until now; return how many, or the answer that the key has.

        `word` makes of the number the answer that is kept. `moved` is told the new incarnation before anything is
        removed; what it raises ends this.
        """
        if key is not None and (known := await self._database.write(partial(emptying.replayed, key=key))):
            return known
        number = await self._database.write(move_incarnation)
        if moved is not None:
            await moved(number)
        before = await self._database.write(lambda connection: connection.now())
        removed = 0
        upkeep = partial(self._database.write, seconds=UPKEEP_SECONDS_MAX)
        while some := await upkeep(partial(emptying.remove_some, before=before, slot=self._slot)):
            removed += some
        after: str | None = ""
        while after is not None:
            after = await upkeep(partial(emptying.remove_answers, after=after))
        finish = partial(emptying.finish, before=before, removed=removed, key=key, word=word)
        faster = await upkeep(finish)
        await self._reset_cache()
        return faster or removed

    async def begin_anew(self, moved: Callable[[int], Awaitable[None]] | None) -> None:
        """Drop what was accepted before and is not stored, and what is cached; `moved` is told the incarnation."""
        number = await self._database.write(move_incarnation)
        if moved is not None:
            await moved(number)
        await self.retire_caches()

    async def retire_caches(self) -> None:
        """Make every process on this database drop what it has cached."""
        await self._database.write(retire_caches)
        await self._reset_cache()

    async def _reset_cache(self) -> None:
        try:
            await self._cache.reset()
        except Unavailable:
            await self._suspension.begin()

    async def _divide(self, groups: list[Group], error: Exception) -> None:
        """Find the request that cannot be carried out, and spare the others."""
        if len(groups) > 1:
            middle = len(groups) // 2
            await self._commit(groups[:middle])
            await self._commit(groups[middle:])
        elif len(groups[0].asked) > 1:
            await self._divide_group(groups[0])
        else:
            if isinstance(error, ConstraintViolated):
                log.error("the database refused a request", often=True, error=str(error))
            else:
                self._bugs += 1
                if self._bugs >= BUGS_IN_A_ROW:
                    self.failing = str(error)
            self._tell()
            _fail(groups, error)

    async def _divide_group(self, group: Group) -> None:
        loop = asyncio.get_running_loop()
        parts = [Group((request,), loop.create_future()) for request in group.asked]
        outcomes: list[Outcome] = []
        for part in parts:
            await self._commit([part])
            self._tell()
            error = part.done.exception()
            if error is None:
                outcomes += part.done.result()
            elif isinstance(error, ExpediterError):
                outcomes.append(error)
            else:
                log.error("a request failed for a reason that nobody foresaw", often=True, exc_info=error)
                outcomes.append(RequestFailed(f"{type(error).__name__}: {error}"))
        if not group.done.done():
            group.done.set_result(outcomes)

    async def _publish(self, outcomes: Sequence[Outcome]) -> bool:
        """Tell everybody of a commit; return whether no reader can be shown what was before it."""
        changes = [outcome for outcome in outcomes if isinstance(outcome, Applied)]
        for outcome in outcomes:
            if isinstance(outcome, Claims):
                changes += [Applied(order) for order in outcome.changed]
        if not changes:
            return True
        told = False
        try:
            told = await self._cache.retire([(change.order.order_id, change.order.version) for change in changes])
            for listener in self._listeners:
                listener(changes)
        except Exception:
            # It is stored all the same: whoever asked hears so, and the others of the batch, too.
            log.exception("a commit could not be told to everybody in this process", often=True)
        return told


def _fail(groups: list[Group], error: Exception) -> None:
    for group in groups:
        group.fail(error)
