"""Growth: what a million orders would cost. Every query has its index; what is done with leaves, history stays."""

from __future__ import annotations

import asyncio
import importlib.util
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from expediter.backends.cache import NoCache
from expediter.backends.databases import Connection, Database, T, open_database
from expediter.backends.databases.postgresql import _statements
from expediter.orders.commands import CancelOrder, DeleteOrder, FulfilmentOutcome, RecordFulfilment, RecordPayment
from expediter.orders.events import Changes, Event, Placed, replay
from expediter.orders.order import PaymentOutcome, Status
from expediter.store import schema
from expediter.store.committer import Committer
from expediter.store.incarnation import move_incarnation
from expediter.store.jobs import FIND_DUE
from expediter.store.lookups import is_deleted, order_job_and_lines, was_committed
from expediter.store.maintenance import EXPIRED_KEYS_PER_BATCH
from expediter.store.queries import NothingAccepted, Queries
from expediter.store.rows import count_order, read_order
from expediter.store.statements import POSITION
from expediter.store.submissions import Answer, Applied, IdempotencyKey, PageQuery, Request
from expediter.store.watching import look
from servers import Server, in_thread
from serving import PATIENCE_SECONDS
from storing import Place, ask, claim, claimed, open_committer, place, position, rows

_FILLER = Path(__file__).resolve().parents[2] / "bench" / "fill.py"
_spec = importlib.util.spec_from_file_location("fill", _FILLER)
assert _spec is not None and _spec.loader is not None
filler = importlib.util.module_from_spec(_spec)
# A dataclass looks its module up by name.
sys.modules["fill"] = filler
_spec.loader.exec_module(filler)
fill: Callable[..., None] = filler.fill

HOUR = 3_600_000_000


class Recorder:
    """A driver's connection or cursor that notes the statements it is given, each with its first values."""

    def __init__(self, real: Any, sent: dict[str, Sequence[Any]]) -> None:
        self._real = real
        self._sent = sent

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)
        if name not in ("execute", "executemany", "fetch", "fetchval"):
            return method

        def noted(text: str, *values: Any) -> Any:
            given = values[0] if len(values) == 1 and isinstance(values[0], (list, tuple)) else values
            self._sent.setdefault(text, given[0] if name == "executemany" else given)
            return method(text, *values)

        return noted


class WatchedDatabase:
    """A database that remembers in `sent` every statement that reaches its driver."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.sent: dict[str, Sequence[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    async def read(self, work: Callable[[Connection], Coroutine[Any, Any, T]], **more: Any) -> T:
        return await self._database.read(lambda connection: work(self._watched(connection)), **more)

    async def write(self, work: Callable[[Connection], Coroutine[Any, Any, T]], **more: Any) -> T:
        return await self._database.write(lambda connection: work(self._watched(connection)), **more)

    def _watched(self, connection: Any) -> Any:
        name = "_cursor" if hasattr(connection, "_cursor") else "_raw"
        setattr(connection, name, Recorder(getattr(connection, name), self.sent))
        return connection


def answer(applied: Applied) -> Answer:
    return Answer(201, {}, applied.order.order_id)


async def use_everything(at: Place, database: Database) -> None:
    """Do once whatever the service does with its database, short of emptying it."""
    newest = rows(at, "SELECT created_at, order_id, customer_id FROM orders ORDER BY created_at DESC LIMIT 900")
    at_rest = rows(at, "SELECT order_id FROM orders WHERE status = 'completed' LIMIT 9")
    created_at, order_id, customer_id = newest[-1]
    queries = Queries(database, NoCache(), NothingAccepted())
    for status, customer, after, since, until in product(
        # A rare one first, for its values are explained: of a status that most orders have, PostgreSQL rightly
        # finds a page by walking back through all orders.
        (None, Status.CANCELLED, Status.COMPLETED, Status.PENDING),
        (None, customer_id),
        (None, (created_at, order_id)),
        (None, created_at - 24 * HOUR),
        (None, created_at + HOUR),
    ):
        query = PageQuery(
            limit=50, status=status, customer_id=customer, after=after, created_after=since, created_before=until
        )
        await queries.page(query)
    await queries.order(order_id)
    await queries.wait(order_id, beyond=0, seconds=0)
    await queries.wait(order_id, beyond=99, seconds=0.01)
    looking = partial(look, after=position(at) - 9)
    assert len((await database.read(looking, settled=POSITION)).events or ()) == 9
    await queries.inspect(order_id)
    await queries.attempts([order_id, "no"])
    await queries.history(order_id)
    await queries.counters()
    await queries.ids(list(Status), 1_000)
    await queries.queue(list(Status), 1_000)
    await queries.breaker()
    await database.read(lambda connection: is_deleted(connection, "no"))
    await database.write(move_incarnation)
    await database.read(lambda connection: order_job_and_lines(connection, "no", placing=True))
    last = Event(order_id, 1, created_at, "order.placed", Changes())
    await database.write(partial(was_committed, event=last))
    committer = Committer(database, NoCache(), slot=7)
    committer.start()
    try:
        claims = await claimed(committer, claim(limit=50))
        assert len(claims.claimed) == 50
        outcome = PaymentOutcome.SUCCEEDED
        await ask(
            committer,
            *(
                Request(
                    RecordPayment(order_id=each.order.order_id, fence=each.job.fence, outcome=outcome, lease=99)
                )
                for each in claims.claimed
            ),
        )
        key = IdempotencyKey("key_new", "print", HOUR)
        await ask(committer, Request(place("A1").command, key, answer), place("A2", fresh=True), place("A3"))
        pending = [each for (_, each, _) in newest[:9]]
        await ask(
            committer,
            *(Request(CancelOrder(order_id=each), with_lines=True) for each in pending),
            *(Request(DeleteOrder(order_id=each)) for (each,) in at_rest),
        )
        assert await committer.housekeep() == EXPIRED_KEYS_PER_BATCH
    finally:
        await committer.stop()


#: The tables that grow with every order, with every order under way, or with every key.
GROWING = ("orders", "order_lines", "events", "payment_attempts", "jobs", "idempotency_keys", "deleted_orders")
#: Those that only ever grow: a plan that scans one of them is wrong however few rows a test has.
HISTORY = ("orders", "order_lines", "events", "payment_attempts")
#: What may sort: each sorts a bounded number of rows, whatever the size of its table.
BOUNDED_SORTS = {
    "ORDER BY orders.order_id || ''": "the orders of one batch, so that they are locked in the same order",
    "ORDER BY concat(orders.order_id, '')": "the same on MariaDB",
    "GROUP BY jobs.dead_at IS NOT NULL": "the jobs that wait, never the orders at rest",
}


def plans(at: Place, sent: dict[str, Sequence[Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yield every statement that searches, and what is wrong with the way in which the database would do it."""
    reading = {text: values for text, values in sent.items() if text.split()[0] in ("SELECT", "UPDATE", "DELETE")}
    if at.server is None:
        with closing(sqlite3.connect(at.address.removeprefix("sqlite:///"))) as raw:
            for text, values in reading.items():
                plan = [row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {text}", list(values))]
                yield text, _sqlite_faults(text, plan)
    elif at.server.scheme == "postgresql":
        for text, discouraged, plan in in_thread(partial(_postgresql_plans, at.address, reading)):
            yield text, _postgresql_faults(text, discouraged, plan)
    else:
        for text, values in reading.items():
            filled = text % tuple("NULL" if value is None else repr(value) for value in values)
            yield text, _mariadb_faults(text, rows(at, f"EXPLAIN {filled}"))


def _sorts(text: str) -> bool:
    return not any(allowed in " ".join(text.split()) for allowed in BOUNDED_SORTS)


def _is_whole_page(text: str) -> bool:
    """Whether it is the page of all orders: there is nothing to search for, and the limit ends the walk."""
    return "WHERE" not in text and "LIMIT" in text


def _sqlite_faults(text: str, plan: list[str]) -> list[str]:
    scanned = {f"SCAN {table}" for table in GROWING}
    return [
        step
        for step in plan
        if ("TEMP B-TREE" in step and _sorts(text))
        or (" ".join(step.split()[:2]) in scanned and not ("orders_by_age" in step and _is_whole_page(text)))
    ]


async def _postgresql_plans(address: str, sent: dict[str, Sequence[Any]]) -> list[tuple[str, bool, list[str]]]:
    """Return the plan for known values and the one for any values: the driver's prepared statements get both."""
    found = []
    raw = await asyncpg.connect(address)
    for mode, seqscan, (text, values) in product(("custom", "generic"), ("on", "off"), sent.items()):
        await raw.execute(f"SET plan_cache_mode = force_{mode}_plan")
        await raw.execute(f"SET enable_seqscan = {seqscan}")
        await raw.execute(f"PREPARE sent AS {text}")
        literals = ", ".join("NULL" if value is None else f"'{value}'" for value in values)
        plan = await raw.fetch(f"EXPLAIN EXECUTE sent{f'({literals})' if literals else ''}")
        found.append((text, seqscan == "off", [row[0].strip() for row in plan]))
        await raw.execute("DEALLOCATE sent")
    await raw.close()
    return found


def _postgresql_faults(text: str, discouraged: bool, plan: list[str]) -> list[str]:
    # Of a small table the planner rightly reads all; where it does so even if it should not, an index is missing.
    tables = GROWING if discouraged else HISTORY
    faults = [step for step in plan if any(f"Seq Scan on {table} " in step for table in tables)]
    if _sorts(text):
        faults += [step for step in plan if "Sort" in step]
    for step, condition in pairwise(plan):
        if "Index" in step and "Scan" in step and "Cond" not in condition and not _is_whole_page(text):
            faults += [step for table in HISTORY if f" on {table} " in step]
    return faults


async def test_a_claim_reads_only_what_it_takes(postgresql: Server) -> None:
    """Also where the statistics were gathered while hardly any job was due: PostgreSQL would sort all that are."""
    at = Place(postgresql.new_database(), postgresql)
    database = open_database(at.address)
    async with open_committer(at, database=database) as committer:
        await ask(committer, *(place(f"A{number}", fresh=True) for number in range(1_000)))
        for _ in range(20):
            claims = await claimed(committer, claim(limit=50))
            paid = [
                RecordPayment(
                    order_id=each.order.order_id,
                    fence=each.job.fence,
                    outcome=PaymentOutcome.SUCCEEDED,
                    lease=HOUR,
                )
                for each in claims.claimed
            ]
            await ask(committer, *map(Request, paid))
        await ask(committer, *(place(f"C{number}", fresh=True) for number in range(90)))
        at.change("ANALYZE")
        await ask(committer, *(place(f"B{number}", fresh=True) for number in range(300)))

        async def plan(connection: Any) -> list[str]:
            text, values = _statements.bind(
                FIND_DUE, {"kind": "charge", "now": await connection.now(), "limit": 9}
            )
            await connection._raw.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            explained = await connection._raw.fetch(f"EXPLAIN (ANALYZE, TIMING OFF) {text}", *values)
            return [row[0].strip() for row in explained]

        steps = await database.write(plan)
    reads = [step for step in steps if "on jobs" in step or "on orders" in step]
    assert [step for step in reads if " rows=9 loops=1)" in step or " rows=1 loops=9)" in step] == reads, steps
    assert len(reads) == 2


def _mariadb_faults(text: str, plan: Sequence[Any]) -> list[str]:
    faults = []
    for _, _, table, access, _, key, *_, extra in plan:
        grows = table in (*GROWING, "t")  # the alias of a table that is updated
        whole = access == "ALL" or (access == "index" and not (key == "orders_by_age" and _is_whole_page(text)))
        sorts = extra and ("filesort" in extra or "temporary" in extra) and _sorts(text)
        if grows and (whole or sorts):
            faults.append(f"{table}: {access} {key} {extra}")
    return faults


STATISTICS = {"sqlite": "ANALYZE", "postgresql": "VACUUM ANALYZE", "mysql": f"ANALYZE TABLE {', '.join(GROWING)}"}


async def keep_keys(connection: Connection, now: int) -> None:
    """Keep 4,000 idempotency keys, of which 1,200 have expired."""
    kept = [
        (f"key_{number}", "print", 201, "{}", "body", now + (number - 1_200) * HOUR + HOUR // 2)
        for number in range(4_000)
    ]
    await connection.insert(schema.idempotency_keys, kept)


async def filled(at: Place, count: int, waiting: int) -> WatchedDatabase:
    """Fill the database, with idempotency keys besides, and open it."""
    await asyncio.to_thread(fill, at.address, count, waiting=waiting)
    database = WatchedDatabase(open_database(at.address))
    now = await database.read(lambda connection: connection.now())
    await database.write(lambda connection: keep_keys(connection, now))
    database.sent.clear()
    return database


async def test_every_query_has_its_index(at: Place) -> None:
    """Nothing the service asks reads a whole table or sorts all that matches, without statistics nor with them.

    Only a page by a large `offset` walks: as far along its index as the offset says, at most 1,000,000 entries.
    """
    database = await filled(at, 4_000, waiting=1_000)
    if at.server is not None:
        at.change(STATISTICS[at.server.scheme])  # a server keeps them fresh by itself
    await use_everything(at, database)  # type: ignore[arg-type]
    await database.close()
    assert len(database.sent) > 50
    assert [(text, wrong) for text, wrong in plans(at, database.sent) if wrong] == []
    if at.server is None:
        at.change(STATISTICS["sqlite"])
        assert [(text, wrong) for text, wrong in plans(at, database.sent) if wrong] == []


DEPTHS = [
    pytest.param({}, id="all"),
    pytest.param({"status": Status.COMPLETED}, id="status"),
    pytest.param({"created_after": 1}, id="since"),
    pytest.param({"created_before": 1 << 60}, id="until"),
    pytest.param({"status": Status.COMPLETED, "created_before": 1 << 60}, id="status-until"),
]


@pytest.mark.parametrize("filters", DEPTHS)
async def test_a_page_by_cursor_costs_the_same_at_any_depth(folder: Path, filters: dict[str, Any]) -> None:
    """SQLite takes as many steps for a page behind 3,500 orders as for the first one."""
    at = Place(f"sqlite:///{folder}/orders.db")
    database = await filled(at, 4_000, waiting=0)
    try:
        newest = rows(at, "SELECT created_at, order_id FROM orders ORDER BY created_at DESC LIMIT 3501")
        first = await steps_of(at, database, PageQuery(limit=50, **filters))
        deep = await steps_of(at, database, PageQuery(limit=50, after=newest[-1], **filters))
    finally:
        await database.close()
    assert 1_000 < deep < 1.5 * first


async def test_a_customers_orders_in_a_status_are_looked_for_among_the_customers(folder: Path) -> None:
    """A customer has few orders, a status may have nearly all: both asked for, the customer's are read."""
    at = Place(f"sqlite:///{folder}/orders.db")
    database = await filled(at, 4_000, waiting=0)
    try:
        (customer_id,) = rows(at, "SELECT customer_id FROM orders LIMIT 1")[0]
        of_customer = await steps_of(at, database, PageQuery(limit=50, customer_id=customer_id))
        both = PageQuery(limit=50, customer_id=customer_id, status=Status.COMPLETED)
        assert await steps_of(at, database, both) < 1.5 * of_customer
    finally:
        await database.close()


async def steps_of(at: Place, database: WatchedDatabase, query: PageQuery) -> int:
    """Return how many steps of its machine SQLite takes to find a page's orders, in tens."""
    database.sent.clear()
    await Queries(database, NoCache(), NothingAccepted()).page(query)  # type: ignore[arg-type]
    text, values = next(iter(database.sent.items()))
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 10
        return 0

    with closing(sqlite3.connect(at.address.removeprefix("sqlite:///"))) as raw:
        raw.set_progress_handler(count, 10)
        raw.execute(text, list(values)).fetchall()
    return steps


def assert_sound(at: Place) -> None:
    """Assert that the counters equal the rows, that history has no gap, and that it adds up to the orders."""
    orders = {row[0]: read_order(row) for row in rows(at, "SELECT * FROM orders")}
    counted = rows(at, "SELECT name, sum(value) FROM counters GROUP BY name HAVING sum(value) <> 0")
    real: Counter[str] = Counter()
    for order in orders.values():
        count_order(real, order, 1)
    [(real["jobs"], real["jobs:dead"])] = rows(at, "SELECT count(*), count(dead_at) FROM jobs")
    assert {name: int(value) for name, value in counted} == +real
    told: dict[str, list[Event]] = {order_id: [] for order_id in orders}
    events = rows(at, "SELECT position, order_id, number, at, type, data FROM events ORDER BY position")
    for _, order_id, number, moment, type, data in events:
        kind = Placed if type == "order.placed" else Changes
        told[order_id].append(Event(order_id, number, moment, type, msgspec.json.decode(data, type=kind)))
    assert [row[0] for row in events] == list(range(1, len(events) + 1))
    assert position(at) == len(events)
    for order_id, order in orders.items():
        assert [event.number for event in told[order_id]] == list(range(1, order.version + 1))
        assert replay(told[order_id]) == msgspec.structs.replace(order, payment_token=None)
    totals = "SELECT order_id, sum(quantity * price_minor), count(*) FROM order_lines GROUP BY order_id"
    lines = {order_id: (int(total), count) for order_id, total, count in rows(at, totals)}
    assert lines == {order_id: (order.total_minor, 2) for order_id, order in orders.items()}
    jobs = {order_id for (order_id,) in rows(at, "SELECT order_id FROM jobs")}
    assert {order_id for order_id, order in orders.items() if not order.at_rest} == jobs


def test_what_the_filler_makes_is_what_the_service_makes(at: Place) -> None:
    """Filled twice, a database is sound: counters, history, versions, lines, attempts, and times in order."""
    fill(at.address, 1_500)
    told: list[int] = []
    fill(at.address, 500, told.append, waiting=20)
    assert told == [500]
    assert_sound(at)
    found = dict(rows(at, "SELECT status, count(*) FROM orders GROUP BY status"))
    assert found["pending"] == 20
    assert found["completed"] > 1_700 > 200 > found["cancelled"] > 20 < found["payment_failed"]
    charged = "SELECT o.order_id FROM orders o JOIN payment_attempts a ON a.order_id = o.order_id"
    paid = (
        f"{charged} WHERE o.payment_status = 'paid' AND a.outcome = 'succeeded' AND a.amount_minor = o.total_minor"
    )
    assert len(rows(at, paid)) == found["completed"]
    assert len(rows(at, f"{charged} WHERE a.outcome = 'declined'")) == found["cancelled"] + found["payment_failed"]
    assert rows(at, f"{charged} WHERE a.number > o.attempts") == []
    placed = rows(at, "SELECT at FROM events WHERE number = 1 ORDER BY position")
    assert placed == sorted(placed)


async def test_the_service_goes_on_with_what_was_filled(at: Place) -> None:
    """Pages lead through every order once, an order is read with its history, and what waits is worked off."""
    await asyncio.to_thread(fill, at.address, 1_000, waiting=20)
    database = open_database(at.address)
    async with open_committer(at, database=database) as committer:
        queries = Queries(database, NoCache(), NothingAccepted())
        seen, after = [], None
        while not seen or after is not None:
            page = await queries.page(PageQuery(limit=200, after=after))
            assert page.total == 1_000
            seen += [msgspec.json.decode(document) for document in page.documents]
            after = page.after
        assert len({order["order_id"] for order in seen}) == len(seen) == 1_000
        order_id = seen[-1]["order_id"]
        entry = await queries.order(order_id)
        assert msgspec.json.decode(entry.body) == seen[-1]
        assert len(await queries.history(order_id)) == entry.version
        assert (await queries.queue()).backlog.ready == 20
        await work_off(committer)
    assert_sound(at)
    assert rows(at, "SELECT count(*) FROM orders WHERE status = 'completed' AND version = 5")[0][0] > 900


async def work_off(committer: Committer) -> None:
    """Charge and fulfil whatever is due, as a worker would."""
    claims = await claimed(committer)
    about = [(each.order.order_id, each.job.fence) for each in claims.claimed]
    success = PaymentOutcome.SUCCEEDED
    charged = await ask(
        committer,
        *(Request(RecordPayment(order_id=id, fence=fence, outcome=success, lease=HOUR)) for id, fence in about),
    )
    held = [(each.order.order_id, each.job.fence) for each in charged if isinstance(each, Applied) and each.job]
    done = FulfilmentOutcome.DONE
    await ask(
        committer, *(Request(RecordFulfilment(order_id=id, fence=fence, outcome=done)) for id, fence in held)
    )


async def test_what_is_done_with_leaves(at: Place) -> None:
    """A finished order has no job, a deleted one no lines; the counters have a row a name and process, no more."""
    await asyncio.to_thread(fill, at.address, 40, waiting=20)
    async with open_committer(at) as committer:
        await work_off(committer)
        assert rows(at, "SELECT count(*) FROM jobs") == [(0,)]
        everyone = [order_id for (order_id,) in rows(at, "SELECT order_id FROM orders")]
        await ask(committer, *(Request(DeleteOrder(order_id=order_id)) for order_id in everyone))
    assert rows(at, "SELECT count(*) FROM order_lines") == rows(at, "SELECT count(*) FROM orders") == [(0,)]
    assert rows(at, "SELECT count(*) FROM deleted_orders") == [(40,)]
    # Two slots here, the filler's and the committer's: each status, and the three sums of what is completed.
    assert rows(at, "SELECT count(*) FROM counters")[0][0] <= 2 * (len(Status) + 3)


async def test_expired_keys_leave_in_small_batches(at: Place) -> None:
    """One transaction removes at most 500 expired keys; there is no pause until a round finds none."""
    database = open_database(at.address)
    async with open_committer(at, database=database) as committer:
        now = await database.read(lambda connection: connection.now())
        await database.write(lambda connection: keep_keys(connection, now))
        assert await committer.housekeep() == EXPIRED_KEYS_PER_BATCH
        assert rows(at, "SELECT count(*) FROM idempotency_keys") == [(3_500,)]
        async with asyncio.timeout(PATIENCE_SECONDS):  # a pause takes a minute
            house = asyncio.create_task(committer.keep_house())
            while rows(at, "SELECT count(*) FROM idempotency_keys") != [(2_800,)]:
                await asyncio.sleep(0)
        house.cancel()
