"""The group commit: who waits, who is refused, and what is stored when something goes wrong."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from expediter.backends.databases.sqlite import SqliteDatabase
from expediter.errors import (
    CommitUncertain,
    ConstraintViolated,
    DatabaseUnavailable,
    DuplicateOrder,
    OrderNotFound,
    Overloaded,
)
from expediter.orders.commands import CancelOrder
from expediter.store.committer import BUGS_IN_A_ROW
from expediter.store.gathering import (
    BATCH_REQUESTS_MAX,
    BURST_SECONDS_MAX,
    CALM_SECONDS,
    QUEUE_BYTES_MAX,
    QUEUE_REQUESTS_MAX,
    Gathering,
)
from expediter.store.submissions import Answer, Applied, IdempotencyKey, Outcome, Replayed, Request
from storing import Place, applied, ask, open_committer, place, rows


def answer(applied: Applied) -> Answer:
    return Answer(201, {"etag": f'"{applied.order.version}"'}, applied.order.order_id)


async def test_requests_that_come_together_share_commits(at: Place) -> None:
    """A thousand orders that arrive at once take far fewer than a thousand commits."""
    async with open_committer(at) as committer:
        await asyncio.gather(*(committer.submit(place(f"A{number}")) for number in range(1000)))
        assert committer.commits <= 1000 // BATCH_REQUESTS_MAX + 2
    assert rows(at, "SELECT count(*) FROM orders") == [(1000,)]


async def test_everything_of_an_order_is_stored_together(at: Place) -> None:
    """An order comes with its lines, its event, its job and its counter."""
    async with open_committer(at) as committer:
        await applied(committer, place("A1"))
    assert rows(at, "SELECT status, total_minor FROM orders") == [("pending", 2997)]
    assert rows(at, "SELECT line, quantity, price_minor FROM order_lines") == [(1, 2, 1299), (2, 1, 399)]
    assert rows(at, "SELECT position, number, type FROM events") == [(1, 1, "order.placed")]
    assert rows(at, "SELECT order_id, kind FROM jobs") == [("A1", "charge")]
    assert rows(at, "SELECT name, value FROM counters ORDER BY name") == [("jobs", 1), ("status:pending", 1)]


async def test_a_refusal_touches_nobody_else(at: Place) -> None:
    """In one transaction a refused request changes nothing and the others are stored."""
    async with open_committer(at) as committer:
        await applied(committer, place("A1"))
        outcomes = await ask(
            committer, place("A2"), place("A1"), Request(CancelOrder(order_id="gone")), place("A3")
        )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [Applied, DuplicateOrder, OrderNotFound, Applied]
    assert rows(at, "SELECT order_id FROM orders ORDER BY order_id") == [("A1",), ("A2",), ("A3",)]


async def test_the_database_holds_the_total_against_the_lines(at: Place) -> None:
    """An order whose total is not the sum of its lines is refused by the database, alone in its batch."""
    async with open_committer(at) as committer:
        outcomes = await asyncio.gather(
            *(
                committer.submit(place(f"A{number}", total_minor=2998 if number == 3 else 2997))
                for number in range(8)
            ),
            return_exceptions=True,
        )
    assert [type(outcome) for outcome in outcomes].count(Applied) == 7
    assert isinstance(outcomes[3], ConstraintViolated)
    assert rows(at, "SELECT count(*) FROM orders WHERE order_id = 'A3'") == [(0,)]
    ((newest, count),) = rows(at, "SELECT max(position), count(*) FROM events")
    assert count == 7
    # What was undone has taken numbers from a sequence along.
    assert newest == 7 or (newest > 7 and at.address.startswith("postgresql"))


async def test_a_group_learns_which_of_its_requests_the_database_refused(at: Place) -> None:
    """When one request of a group is refused by the database, the others of the group are stored."""
    async with open_committer(at) as committer:
        outcomes = await ask(committer, place("A1"), place("A2", total_minor=1), place("A3"))
    assert [type(outcome) for outcome in outcomes] == [Applied, ConstraintViolated, Applied]
    assert rows(at, "SELECT order_id FROM orders ORDER BY order_id") == [("A1",), ("A3",)]


async def test_a_full_queue_refuses_and_keeps_what_it_has(folder: Path) -> None:
    """Beyond its limit the queue refuses at once, and everything that it took is stored."""
    async with open_committer(folder) as committer:
        waiting = [
            asyncio.create_task(committer.submit(place(f"A{number}"))) for number in range(QUEUE_REQUESTS_MAX)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await committer.submit(place("late"))
        outcomes = await asyncio.gather(*waiting)
        assert all(isinstance(outcome, Applied) for outcome in outcomes)
        await applied(committer, place("later"))
    assert rows(folder, "SELECT count(*) FROM orders") == [(QUEUE_REQUESTS_MAX + 1,)]


async def test_a_queue_of_large_orders_is_full_by_their_bytes(folder: Path) -> None:
    """Orders of a mebibyte each fill the queue by their bytes, long before their number does."""
    size = 1024 * 1024
    fitting = QUEUE_BYTES_MAX // size
    async with open_committer(folder) as committer:
        waiting = [asyncio.create_task(committer.submit(place(f"A{number}"), size)) for number in range(fitting)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="bytes"):
            await committer.submit(place("late"), size)
        patient = asyncio.create_task(committer.submit_patiently([place("patient")], size))
        small = asyncio.create_task(committer.submit(place("small")))
        outcomes = await asyncio.gather(*waiting, small)
        assert all(isinstance(outcome, Applied) for outcome in [*outcomes, *await patient])
        # No transaction had more than sixteen of them.
        assert committer.commits >= (fitting + 1) // 16
        assert isinstance(await committer.submit(place("later"), size), Applied)
    assert rows(folder, "SELECT count(*) FROM orders") == [(fitting + 3,)]


def waiting(queue: Gathering, number: int) -> None:
    for _ in range(number):
        queue.put([place("A")], math.inf, 0)


async def test_a_standing_queue_refuses_and_a_burst_does_not() -> None:
    """Many that come at once are let in; where more keep coming than can be stored newcomers are refused.

    The clock is the test's: a batch of 256 takes 0.2 s.
    """
    queue, now, batch = Gathering(), 1000.0, 0.2
    waiting(queue, BATCH_REQUESTS_MAX)
    queue.take(now)
    queue.stored(now + batch)
    waiting(queue, 1200)  # which take most of a second
    queue.admit(now + batch)
    queue.admit(now + batch + BURST_SECONDS_MAX - 0.01)
    now += batch + BURST_SECONDS_MAX
    with pytest.raises(Overloaded, match="1200 requests wait to be stored, for 0"):
        queue.admit(now)
    for number in range(3):
        queue.take(now + number * batch)
        queue.stored(now + (number + 1) * batch)
    queue.admit(now + 1.0)  # two batches always may wait
    waiting(queue, BATCH_REQUESTS_MAX)
    with pytest.raises(Overloaded):  # it has just been too much: no burst is let in
        queue.admit(now + 1.1)
    later = now + 1.1 + CALM_SECONDS
    queue.take(later)
    queue.stored(later + batch)
    queue.admit(later + batch)
    waiting(queue, BATCH_REQUESTS_MAX)
    queue.admit(later + batch)  # it was calm for long enough


async def test_a_burst_that_would_wait_too_long_is_cut() -> None:
    """However suddenly it comes, nobody is let in to wait for longer than ADMIT_SECONDS_MAX."""
    queue, now = Gathering(), 1000.0
    waiting(queue, BATCH_REQUESTS_MAX)
    queue.take(now)
    queue.stored(now + 0.1)
    waiting(queue, 8 * BATCH_REQUESTS_MAX)
    queue.admit(now + 60.0)  # the time in which nothing was under way does not count
    queue.take(now + 60.0)
    queue.admit(now + 60.1)
    with pytest.raises(Overloaded):  # the batch under way takes far longer than the last one did
        queue.admit(now + 61.6)
    with pytest.raises(Overloaded):
        queue.admit(now + 60.1)


async def test_work_that_was_accepted_waits_for_room(folder: Path) -> None:
    """What cannot be refused waits until the full queue has room again."""
    async with open_committer(folder) as committer:
        waiting = [
            asyncio.create_task(committer.submit(place(f"A{number}"))) for number in range(QUEUE_REQUESTS_MAX)
        ]
        await asyncio.sleep(0)
        (outcome,) = await committer.submit_patiently([place("patient")])
        assert isinstance(outcome, Applied)
        await asyncio.gather(*waiting)


async def test_a_caller_that_goes_away_changes_nothing(at: Place) -> None:
    """A request whose caller is cancelled is stored all the same, and so are those beside it."""
    async with open_committer(at) as committer:
        first = asyncio.create_task(committer.submit(place("A1")))
        second = asyncio.create_task(committer.submit(place("A2")))
        await asyncio.sleep(0)
        first.cancel()
        assert isinstance(await second, Applied)
    assert rows(at, "SELECT order_id FROM orders ORDER BY order_id") == [("A1",), ("A2",)]


async def test_a_stop_stores_what_was_asked_before(at: Place) -> None:
    """A committer that is stopped first commits everything that it was asked for."""
    async with open_committer(at) as committer:
        waiting = [asyncio.create_task(committer.submit(place(f"A{number}"))) for number in range(600)]
        await asyncio.sleep(0)
    assert all(isinstance(task.result(), Applied) for task in waiting)
    assert rows(at, "SELECT count(*) FROM orders") == [(600,)]


async def test_a_locked_database_refuses_and_recovers_by_itself(folder: Path) -> None:
    """While another program holds the write lock requests are refused as unavailable, afterwards they work."""
    path = folder / "orders.db"
    async with open_committer(folder, database=SqliteDatabase(path, lock_wait_seconds=0.05)) as committer:
        await applied(committer, place("A1"))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(DatabaseUnavailable):
                await committer.submit(place("A2"))
            other.execute("ROLLBACK")
        await applied(committer, place("A2"))
    assert rows(folder, "SELECT count(*) FROM orders") == [(2,)]


class UncertainDatabase(SqliteDatabase):
    """A database whose first commits are never answered, whether they took place or not."""

    unanswered = 1
    takes_place = True

    def _commit(self, raw: sqlite3.Connection) -> None:
        if not self.unanswered:
            super()._commit(raw)
            return
        self.unanswered -= 1
        if self.takes_place:
            super()._commit(raw)
        else:
            raw.rollback()
        raise CommitUncertain("the answer was lost")


@pytest.mark.parametrize("takes_place", [True, False])
async def test_a_commit_of_unknown_outcome_is_looked_up(folder: Path, takes_place: bool) -> None:
    """When the answer to a commit is lost the order is stored once all the same, and its caller hears of it."""
    database = UncertainDatabase(folder / "orders.db")
    database.takes_place = takes_place
    async with open_committer(folder, database=database) as committer:
        outcomes = await ask(committer, place("A1"), place("A2"), Request(CancelOrder(order_id="A2")))
    assert [type(outcome) for outcome in outcomes] == [Applied, Applied, Applied]
    assert rows(folder, "SELECT order_id, status FROM orders ORDER BY 1") == [
        ("A1", "pending"),
        ("A2", "cancelled"),
    ]
    assert rows(folder, "SELECT count(*), max(position) FROM events") == [(3, 3)]


class OnceBrokenDatabase(SqliteDatabase):
    """A database whose first write fails in a way that nobody foresaw."""

    broken = True

    async def write(self, work: Any, **begun: Any) -> Any:
        if self.broken:
            self.broken = False
            raise RuntimeError("a bug")
        return await super().write(work, **begun)


async def test_an_unforeseen_error_fails_its_request_and_no_other(folder: Path) -> None:
    """Whoever meets a bug hears of it, the service does not call itself sick, and what follows is stored."""
    async with open_committer(folder, database=OnceBrokenDatabase(folder / "orders.db")) as committer:
        with pytest.raises(RuntimeError):
            await committer.submit(place("A1"))
        assert committer.failing is None
        await applied(committer, place("A2"))
        assert committer.failing is None
    assert rows(folder, "SELECT order_id FROM orders") == [("A2",)]


async def test_a_bug_that_nobody_escapes_makes_the_service_say_that_it_is_sick(folder: Path) -> None:
    """Where request after request fails for an unforeseen reason, nothing can be stored, and /health says so."""

    class Broken(SqliteDatabase):
        async def write(self, work: Any, **begun: Any) -> Any:
            raise RuntimeError("a bug")

    async with open_committer(folder, database=Broken(folder / "orders.db")) as committer:
        for number in range(BUGS_IN_A_ROW):
            assert committer.failing is None
            with pytest.raises(RuntimeError):
                await committer.submit(place(f"A{number}"))
        assert committer.failing == "a bug"


async def test_an_error_while_a_commit_is_looked_up_ends_nothing(folder: Path) -> None:
    """If looking a lost commit up fails in turn, its callers hear of it and the next batch is stored."""

    class Doubly(UncertainDatabase):
        lookups = 0

        async def write(self, work: Any, **begun: Any) -> Any:
            self.lookups += 1
            if self.lookups == 2:
                raise RuntimeError("a bug")
            return await super().write(work, **begun)

    async with open_committer(folder, database=Doubly(folder / "orders.db")) as committer:
        with pytest.raises(RuntimeError):
            await committer.submit(place("A1"))
        await applied(committer, place("A2"))


class ObservedDatabase(SqliteDatabase):
    """A database that lets a test look on when a transaction is asked for, and when it has begun."""

    async def asked(self) -> None: ...

    async def begun(self) -> None: ...

    async def write(self, work: Any, *, begun: Any = None) -> Any:
        await self.asked()
        begun()
        await self.begun()
        return await super().write(work)


async def test_answers_are_given_while_the_next_batch_is_under_way(folder: Path) -> None:
    """Where another batch waits, a committed one is answered once that has begun, and before it is committed."""
    answered: list[tuple[str, int]] = []

    class Observed(ObservedDatabase):
        async def asked(self) -> None:
            answered.append(("asked", sum(task.done() for task in tasks)))

        async def begun(self) -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            answered.append(("begun", sum(task.done() for task in tasks)))

    tasks: list[asyncio.Task[list[Outcome]]] = []
    async with open_committer(folder, database=Observed(folder / "orders.db")) as committer:
        tasks += [asyncio.create_task(ask(committer, *full_batch(number))) for number in range(3)]
        await asyncio.wait(tasks)
    assert answered == [("asked", 0), ("begun", 0), ("asked", 0), ("begun", 1), ("asked", 1), ("begun", 2)]


async def test_a_committed_batch_does_not_wait_for_a_database_that_hangs(folder: Path) -> None:
    """If the next batch cannot begin, the one before it is answered all the same."""
    hangs = asyncio.Event()

    class Hanging(ObservedDatabase):
        batches = 0

        async def asked(self) -> None:
            self.batches += 1
            if self.batches == 2:
                await hangs.wait()

    async with open_committer(folder, database=Hanging(folder / "orders.db")) as committer:
        first = asyncio.create_task(ask(committer, *full_batch(1)))
        second = asyncio.create_task(ask(committer, *full_batch(2)))
        assert len(await first) == BATCH_REQUESTS_MAX
        assert not second.done()
        hangs.set()
        assert len(await second) == BATCH_REQUESTS_MAX


def full_batch(number: int) -> list[Request]:
    """Return as many orders as go into one transaction."""
    return [place(f"A{number}-{each}") for each in range(BATCH_REQUESTS_MAX)]


async def test_a_key_used_twice_at_once_places_one_order(at: Place) -> None:
    """Of two requests with one key in the same transaction the second gets the first one's answer."""
    key = IdempotencyKey("k1", "print", 10**12)
    async with open_committer(at) as committer:
        first, second = await ask(
            committer,
            Request(place("A1").command, key, answer),
            Request(place("A2").command, key, answer),
        )
    assert isinstance(first, Applied)
    assert second == Replayed(Answer(201, {"etag": '"1"'}, "A1"))
    assert rows(at, "SELECT order_id FROM orders") == [("A1",)]


async def test_an_expired_key_is_forgotten(at: Place) -> None:
    """Once its time is over a key is removed, and may be used for something else."""
    async with open_committer(at) as committer:
        await committer.submit(Request(place("A1").command, IdempotencyKey("k1", "print", 0), answer))
        outcome = await committer.submit(Request(place("A2").command, IdempotencyKey("k1", "other", 0), answer))
        assert isinstance(outcome, Applied)
        assert await committer.housekeep() == 1
    assert rows(at, "SELECT count(*) FROM idempotency_keys") == [(0,)]
