"""The jobs as a whole: when the next one is due, and how many there are in each state, however long the queue."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from sqlalchemy import ColumnElement, ScalarSelect, bindparam, func, select

from expediter.backends.databases import Connection
from expediter.orders.order import NEVER, JobKind
from expediter.store import schema
from expediter.store.rows import DEAD_JOBS, HANDED_OVER, JOBS


class Backlog(msgspec.Struct, frozen=True):
    """The jobs, counted at `now`; `oldest_due_at` is when the one that has waited longest came due.

    `first_due` is when the first job of each kind is or was due, of those kinds that have one.
    Orders that were `handed_over` wait for a report, and for no worker.
    """

    now: int
    ready: int
    scheduled: int
    leased: int
    dead: int
    handed_over: int
    oldest_due_at: int | None
    first_due: Mapping[JobKind, int]


def _first_due(kind: JobKind, *condition: ColumnElement[bool]) -> ScalarSelect[int]:
    jobs = schema.jobs.c
    return select(func.min(jobs.due_at)).where(jobs.kind == kind._value_, *condition).scalar_subquery()


#: What is furthest along goes first, so that a flood of new orders does not hold up those under way.
KINDS = (
    JobKind.FULFIL,
    JobKind.CAPTURE,
    JobKind.VOID,
    JobKind.REFUND,
    JobKind.CONFIRM,
    JobKind.CHARGE,
    JobKind.REPORT,
)
#: Of each kind, when its first job is or was due: each is one look into an index.
FIRST_DUE = select(*(_first_due(kind) for kind in KINDS))
#: The same of what is not due yet.
NEXT_DUE = select(*(_first_due(kind, schema.jobs.c.due_at > bindparam("now")) for kind in KINDS))
#: Due jobs of one kind, each beside its order, both locked.
FIND_DUE = (
    select(schema.orders, schema.jobs)
    .select_from(schema.jobs.join(schema.orders, schema.jobs.c.order_id == schema.orders.c.order_id))
    .where(schema.jobs.c.kind == bindparam("kind"), schema.jobs.c.due_at <= bindparam("now"))
    .order_by(schema.jobs.c.due_at)
    .limit(bindparam("limit"))
    # What another transaction is at is not waited for: its job is about to change.
    .with_for_update(of=(schema.jobs, schema.orders), skip_locked=True)
)
#: What is not due: held by a worker, or tried and to be tried again. Those that wait are never read.
_LATER = select(func.count(), func.count(schema.jobs.c.holder)).where(
    schema.jobs.c.kind.in_([kind._value_ for kind in KINDS if kind is not JobKind.REPORT]),
    schema.jobs.c.due_at > bindparam("now"),
    schema.jobs.c.due_at < NEVER,
)


async def backlog(connection: Connection, counters: Mapping[str, int]) -> Backlog:
    """Count the jobs; `counters` were read in the same transaction.

    What waits is what is left of the counters, so the time that this takes does not grow with the queue.
    """
    now = await connection.now()
    rows = await connection.fetch(FIRST_DUE)
    first_due = {kind: due_at for kind, due_at in zip(KINDS, rows[0], strict=True) if due_at is not None}
    later, leased = (await connection.fetch(_LATER, now=now))[0]
    dead, handed_over = counters.get(DEAD_JOBS, 0), counters.get(HANDED_OVER, 0)
    oldest = min(first_due.values(), default=NEVER)
    return Backlog(
        now=now,
        # On a server the counters and the rows may be a batch apart.
        ready=max(0, counters.get(JOBS, 0) - dead - handed_over - later),
        scheduled=later - leased,
        leased=leased,
        dead=dead,
        handed_over=handed_over,
        oldest_due_at=oldest if oldest <= now else None,
        first_due=first_due,
    )
