"""Fill a database with orders at rest, as the service would have left them: for measuring growth.

    python bench/fill.py DATABASE_URL [COUNT]

The real core decides a few dozen orders from their placing to their end. Every other order is one of these with an
id, a customer and times of its own, and goes in by the product's own bulk path, thousands in a transaction.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import NamedTuple

import msgspec
import uuid_utils
from sqlalchemy import func, select

from expediter.backends.databases import Connection, Row, open_database
from expediter.orders.commands import (
    CancelOrder,
    ClaimJob,
    Command,
    FulfilmentOutcome,
    PlaceOrder,
    RecordFulfilment,
    RecordPayment,
)
from expediter.orders.decisions import decide
from expediter.orders.events import Event
from expediter.orders.order import (
    MICROSECONDS,
    Attempt,
    Job,
    Line,
    Order,
    PaymentOutcome,
    Stages,
    gateway_key,
)
from expediter.payments.simulated import TOKEN_DECLINED
from expediter.store import schema
from expediter.store.migrations import upgrade
from expediter.store.rows import count_job, count_order, job_row, line_row, order_row

#: Orders in one transaction.
ORDERS_PER_TRANSACTION = 4_000
#: Customers who share the orders.
CUSTOMERS = 5_000
#: How far back the first order of an empty database goes.
SPAN = 180 * 24 * 3600 * MICROSECONDS
#: The youngest order is this old, so that its end, too, is in the past.
REST = 60 * MICROSECONDS
#: The row of each counter that is added to: one that the service's own processes (0 to 63) do not lock.
SLOT = 64
#: Baskets of each ending.
BASKETS = 12

#: When the example of a shape is placed: no other number in a row is as large, so times are known by their size.
_EPOCH = 1_000_000_000_000_000
_LEASE = 30 * MICROSECONDS
_ORDER_ID = "@order"
_CUSTOMER_ID = "@customer"

_MENU = (
    ("item_001", "Burger", 1299),
    ("item_002", "Fries", 349),
    ("item_003", "Lemonade", 275),
    ("item_004", "Salad", 890),
    ("item_005", "Pizza Margherita", 1050),
    ("item_006", "Espresso", 240),
)

_NEWEST = select(func.max(schema.orders.c.created_at))
_to_json = msgspec.json.Encoder().encode


def _claim(order_id: str, fence: int) -> Command:
    return ClaimJob(order_id=order_id, holder="filler", lease=_LEASE, claims_max=5)


def _pay(order_id: str, fence: int) -> Command:
    # The key follows the prefix once the order has its own id.
    success = PaymentOutcome.SUCCEEDED
    return RecordPayment(order_id=order_id, fence=fence, outcome=success, reference="ch_", lease=_LEASE)


def _decline(order_id: str, fence: int) -> Command:
    error = "the gateway declined the charge"
    return RecordPayment(order_id=order_id, fence=fence, outcome=PaymentOutcome.DECLINED, error=error)


def _fulfil(order_id: str, fence: int) -> Command:
    return RecordFulfilment(order_id=order_id, fence=fence, outcome=FulfilmentOutcome.DONE)


def _cancel(order_id: str, fence: int) -> Command:
    return CancelOrder(order_id=order_id)


class Ending(NamedTuple):
    """What happens to an order, how many in a hundred end like that, and the payment token that leads there."""

    share: int
    steps: tuple[Callable[[str, int], Command], ...]
    token: str | None = None


COMPLETED = Ending(92, (_claim, _pay, _fulfil))
PAYMENT_FAILED = Ending(4, (_claim, _decline), TOKEN_DECLINED)
CANCELLED = Ending(4, (_claim, _decline, _cancel), TOKEN_DECLINED)
WAITING = Ending(0, ())


@dataclass
class Rows:
    """What one transaction inserts; the events without their positions."""

    lines: list[Row] = field(default_factory=list)
    orders: list[Row] = field(default_factory=list)
    jobs: list[Row] = field(default_factory=list)
    attempts: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, eq=False)
class Shape:
    """The rows of one example order, ready to be made out to another id, customer and time."""

    order: Row
    order_times: tuple[int, ...]
    lines: tuple[Row, ...]
    job: Row | None
    attempts: tuple[Row, ...]
    #: Number, microseconds since the placing, type, and the data as a pattern for `%`.
    events: tuple[tuple[int, int, str, str], ...]
    counters: dict[str, int]

    def add(self, rows: Rows, order_id: str, customer_id: str, at: int) -> None:
        """Add the rows of an order like this one, placed `at`."""
        order = list(self.order)
        order[0], order[4] = order_id, customer_id
        for column in self.order_times:
            order[column] += at
        rows.orders.append(order)
        rows.lines += [(order_id, *line) for line in self.lines]
        if self.job is not None:
            kind, due_at, created_at, *rest = self.job
            rows.jobs.append((order_id, kind, at + due_at, at + created_at, *rest))
        for number, action, amount, currency, *moments, outcome, reference, error in self.attempts:
            # Every attempt here is its order's first, under the key of the first generation.
            key = gateway_key(order_id, 1)
            times = [at + moment for moment in moments]
            reference = reference and f"{reference}{key}"
            rows.attempts.append(
                (order_id, number, action, key, amount, currency, *times, outcome, reference, error)
            )
        # The times of an order are those of its events.
        values = {str(since): at + since for _, since, _, _ in self.events}
        values |= {"order_id": order_id, "customer_id": customer_id}
        rows.events += [
            (order_id, number, at + since, type, data % values) for number, since, type, data in self.events
        ]


def make_shape(ending: Ending, random: Random) -> Shape:
    """Return the shape of an order of two random lines that the core brings to `ending`."""
    place = _place(ending, random)
    decision = decide(None, None, place, _EPOCH)
    order, job, events = decision.order, decision.job, list(decision.events)
    attempts: dict[int, Attempt] = {}
    now = _EPOCH
    for step in ending.steps:
        now += random.randint(20_000, 400_000)
        decision = decide(order, job, step(_ORDER_ID, job.fence if job else 0), now)
        order, job = decision.order, decision.job
        events += decision.events
        for attempt in decision.attempts:
            if not isinstance(attempt, Attempt):
                attempt = msgspec.structs.replace(attempts[attempt.number], **msgspec.structs.asdict(attempt))
            attempts[attempt.number] = attempt
    assert order is not None  # nothing deletes it
    return _shape(order, place.lines, job, attempts.values(), events)


def _place(ending: Ending, random: Random) -> PlaceOrder:
    lines = tuple(
        Line(number, item_id, name, random.randint(1, 3), price)
        for number, (item_id, name, price) in enumerate(random.sample(_MENU, 2), 1)
    )
    return PlaceOrder(
        order_id=_ORDER_ID,
        fresh=True,
        customer_id=_CUSTOMER_ID,
        customer_name=None,
        currency="USD",
        total_minor=sum(line.quantity * (line.price_minor or 0) for line in lines),
        priced=True,
        lines=lines,
        metadata="{}",
        payment_token=ending.token,
        stages=Stages.PAYMENT_FULFILMENT,
    )


def _shape(
    order: Order, lines: Sequence[Line], job: Job | None, attempts: Sequence[Attempt], events: Sequence[Event]
) -> Shape:
    whole = order_row(order)
    counters: dict[str, int] = {}
    count_order(counters, order, 1)
    if job is not None:
        count_job(counters, job, 1)
    times = tuple(column for column, value in enumerate(whole) if isinstance(value, int) and value >= _EPOCH)
    return Shape(
        order=[value - _EPOCH if column in times else value for column, value in enumerate(whole)],
        order_times=times,
        lines=tuple(line_row(_ORDER_ID, line)[1:] for line in lines),
        job=_since(job_row(_ORDER_ID, job)[1:]) if job else None,
        # Without the gateway's key, which is made of the order's id.
        attempts=tuple(
            (each.number, each.action, *_since(msgspec.structs.astuple(each)[4:])) for each in attempts
        ),
        events=tuple((each.number, each.at - _EPOCH, each.type, _pattern(each)) for each in events),
        counters=counters,
    )


def _since(row: Row) -> Row:
    """Return a row with its times as microseconds since the placing."""
    return tuple(value - _EPOCH if isinstance(value, int) and value >= _EPOCH else value for value in row)


def _pattern(event: Event) -> str:
    """Return the data of an event with places for ids and times; a time is named by how long after the placing."""
    text = _to_json(event.data).decode().replace("%", "%%")
    text = re.sub(r"\b1\d{15}\b", lambda found: f"%({int(found[0]) - _EPOCH})d", text)
    return text.replace(_ORDER_ID, "%(order_id)s").replace(_CUSTOMER_ID, "%(customer_id)s")


def make_rows(shapes: Sequence[Shape], times: Sequence[int], random: Random) -> Rows:
    """Return the rows of one order per shape, placed at these times."""
    rows = Rows()
    for shape, at in zip(shapes, times, strict=True):
        order_id = f"ORD-{uuid_utils.uuid7(nanoseconds=at * 1000).hex}"
        shape.add(rows, order_id, f"customer_{random.randrange(CUSTOMERS)}", at)
    for shape, used in Counter(shapes).items():
        for name, value in shape.counters.items():
            rows.counters[name] += value * used
    return rows


async def _store(connection: Connection, rows: Rows) -> None:
    # As the store does it: the lines first, since a trigger sums them up; the feed last, since all wait for it.
    for table, new in (
        (schema.order_lines, rows.lines),
        (schema.orders, rows.orders),
        (schema.jobs, rows.jobs),
        (schema.payment_attempts, rows.attempts),
    ):
        if new:
            await connection.insert(table, new)
    await connection.add(schema.counters, [(name, SLOT, value) for name, value in sorted(rows.counters.items())])
    await connection.append(schema.feed.c.position, schema.events, rows.events)


def fill(address: str, count: int, progress: Callable[[int], None] | None = None, *, waiting: int = 0) -> None:
    """Add `count` orders to the database at `address`, which is made or upgraded first.

    The youngest `waiting` of them have a charge that is due; all others are at rest. They are younger than any
    that is there already. `progress` is told after each transaction how many are stored.
    """
    upgrade(address)
    asyncio.run(_fill(address, count, progress, waiting))


async def _fill(address: str, count: int, progress: Callable[[int], None] | None, waiting: int) -> None:
    database = open_database(address)
    try:
        now, newest = await database.read(_span)
        start = max(newest, now - SPAN)
        # One microsecond for each at least, so that they have an order of their own.
        end = max(now - REST, start + count)
        random = Random(newest)
        stored = 0
        for shapes in _parts(count, waiting, random):
            ordinals = range(stored + 1, stored + 1 + len(shapes))
            times = [start + (end - start) * ordinal // count for ordinal in ordinals]
            await database.write(partial(_store, rows=make_rows(shapes, times, random)))
            stored += len(shapes)
            if progress is not None:
                progress(stored)
    finally:
        await database.close()


async def _span(connection: Connection) -> tuple[int, int]:
    return await connection.now(), int((await connection.fetch(_NEWEST))[0][0] or 0)


def _parts(count: int, waiting: int, random: Random) -> Iterator[list[Shape]]:
    """Yield the shapes of each transaction's orders; those that wait come last."""
    endings = (COMPLETED, PAYMENT_FAILED, CANCELLED)
    at_rest = [make_shape(ending, random) for ending in endings for _ in range(BASKETS)]
    shares = [ending.share for ending in endings for _ in range(BASKETS)]
    not_begun = [make_shape(WAITING, random) for _ in range(BASKETS)]
    for start in range(0, count, ORDERS_PER_TRANSACTION):
        size = min(ORDERS_PER_TRANSACTION, count - start)
        done = max(0, min(size, count - waiting - start))
        yield random.choices(at_rest, shares, k=done) + random.choices(not_begun, k=size - done)


def some_ids(address: str, count: int) -> list[str]:
    """Return the ids of some orders, by chance."""

    async def look() -> list[str]:
        database = open_database(address)
        statement = select(schema.orders.c.order_id).order_by(func.random()).limit(count)
        try:
            return [row[0] for row in await database.read(lambda connection: connection.fetch(statement))]
        finally:
            await database.close()

    return asyncio.run(look())


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill a database with orders at rest.")
    parser.add_argument("database_url")
    parser.add_argument("count", type=int, nargs="?", default=1_000_000)
    options = parser.parse_args()
    started = time.perf_counter()

    def progress(stored: int) -> None:
        speed = stored / (time.perf_counter() - started)
        print(f"\r{stored:,} of {options.count:,} orders, {speed:,.0f}/s", end="", file=sys.stderr, flush=True)

    fill(options.database_url, options.count, progress)
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
