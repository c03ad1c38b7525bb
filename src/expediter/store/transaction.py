"""Transactions on many orders at once: the only place that writes orders.

`apply` takes a batch of requests inside one transaction: it loads what they are about, lets `decide` judge each in
turn, and writes everything that came of it with a handful of statements, whatever the batch's size.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from typing import NamedTuple

import msgspec

from expediter.backends.databases import Connection, Row
from expediter.backends.points import reach
from expediter.errors import (
    ClearedAway,
    DuplicateOrder,
    ExpediterError,
    NotYetApplied,
    OrderUnreadable,
    StaleLease,
)
from expediter.orders.commands import ClaimJob, Command, PlaceOrder, WorkerCommand
from expediter.orders.decisions import decide
from expediter.orders.draft import Decision
from expediter.orders.events import Event
from expediter.orders.order import NEVER, Job, JobKind, Line, Order
from expediter.orders.refunds import first_pending
from expediter.orders.resilience import GATEWAY_KINDS, Breaker
from expediter.store import schema
from expediter.store.breaker import SharedBreaker
from expediter.store.idempotency import Kept, find_answer, keep_answers, load_answers, names_of
from expediter.store.incarnation import READ_AND_HOLD
from expediter.store.jobs import FIND_DUE, FIRST_DUE, KINDS, NEXT_DUE, set_aside
from expediter.store.money import Money
from expediter.store.rows import (
    ORDER_CHANGES,
    changed_order_row,
    count_job,
    count_order,
    job_row,
    line_row,
    lines_by_order,
    order_row,
    read_job,
    read_order,
    read_order_and_job,
)
from expediter.store.statements import (
    DELETED_ORDERS,
    JOBS,
    LINES,
    LOCK_ORDERS,
    LOCK_ORDERS_AND_JOBS,
    POSITION,
)
from expediter.store.submissions import (
    Answer,
    Applied,
    Asked,
    ClaimDue,
    Claimed,
    Claims,
    IdempotencyKey,
    Outcome,
    ReportBreaker,
    Request,
)

_to_json = msgspec.json.Encoder().encode


class Batch(NamedTuple):
    """What a batch comes to, before it is written.

    An outcome per request; the orders that were there before, with their versions now (NEVER: they are deleted);
    the number of its events, and the last of them (None: it has none), which tells later whether it was committed.
    """

    outcomes: list[Outcome]
    changed: list[tuple[str, int]]
    events: int
    last: Event | None


async def apply(
    connection: Connection, asked: Sequence[Asked], *, slot: int, announce: Callable[[Batch], Awaitable[None]]
) -> int:
    """Carry out a batch of requests; return the position of its newest event.

    A refused request is an ExpediterError in its place and changes nothing; the others are not affected.
    `announce` is told what is about to be written, and committed.
    """
    batch = _Batch(connection, await connection.now(), slot)
    await batch.load(asked)
    reach("loaded")
    outcomes = [await batch.carry_out(request) for request in asked]
    await batch.add_lines(asked, outcomes)
    reach("decided")
    # Before positions are taken: it takes a moment, and others, or readers, wait for who has some.
    last = batch.events[-1] if batch.events else None
    await announce(Batch(outcomes, batch.changed, len(batch.events), last))
    reach("announced")
    return await batch.write()


class _Batch:
    """The state of one transaction: orders as they were, as they are now, and what is to be written."""

    def __init__(self, connection: Connection, now: int, slot: int) -> None:
        self._connection = connection
        self._now = now
        self._slot = slot
        self._before: dict[str, tuple[Order | None, Job | None]] = {}
        self._after: dict[str, tuple[Order | None, Job | None]] = {}
        self._lines: dict[str, tuple[Line, ...]] = {}
        self._deleted: set[str] = set()
        self._unreadable: dict[str, OrderUnreadable] = {}
        self._answers: dict[str, Kept] = {}
        self._new_answers: list[tuple[IdempotencyKey, Answer]] = []
        self._money = Money(connection)
        self.events: list[Event] = []
        self._breaker = SharedBreaker(connection)
        self._lost: set[str] = set()
        self._incarnation = 0
        #: What is new, changed and gone, once everything is carried out.
        self._sorts: tuple[list[Order], list[Order], list[str]] | None = None

    async def load(self, asked: Sequence[Asked]) -> None:
        requests = [request for request in asked if isinstance(request, Request)]
        placing, other, used = [], [], []
        reports, queued = True, False
        for request in requests:
            command = request.command
            queued = queued or request.incarnation is not None
            if request.placed:
                used.append(command.order_id)
            if not isinstance(command, PlaceOrder):
                other.append(command.order_id)
                reports = reports and isinstance(command, WorkerCommand)
            elif not command.fresh:
                placing.append(command.order_id)
        if queued:
            self._incarnation = int((await self._connection.fetch(READ_AND_HOLD))[0][0])
        if reports and not placing:
            await self._load_held(other)
        else:
            await self._load_orders([*placing, *other])
        if self._before:
            await self._money.load(order for order, _ in self._before.values())
        if used := placing + used:
            rows = await self._connection.fetch(DELETED_ORDERS, ids=used)
            self._deleted.update(row[0] for row in rows)
        keys = [name for request in requests if request.key for name in names_of(request.key)]
        keys += [key for request in requests for key in request.behind]
        if keys:
            self._answers = await load_answers(self._connection, keys, self._now)

    async def _load_held(self, ids: list[str]) -> None:
        """Load what workers report on: an order beside the job that it has, or had, in one statement.

        Only where nothing else is loaded: two statements that lock, each in the order of the ids, could deadlock.
        """
        if not ids:
            return
        rows = await self._connection.fetch(LOCK_ORDERS_AND_JOBS, ids=ids)
        self._know(await self._readable(rows, park=False))
        missing = [order_id for order_id in dict.fromkeys(ids) if order_id not in self._before]
        await self._load_orders(missing)

    async def _load_orders(self, ids: list[str]) -> None:
        if not ids:
            return
        rows = await self._connection.fetch(LOCK_ORDERS, ids=ids)
        if rows:
            jobs = {row[0]: row for row in await self._connection.fetch(JOBS, ids=[row[0] for row in rows])}
            self._know(self._read(rows, jobs))

    def _read(self, rows: Sequence[Row], jobs: Mapping[str, Row]) -> list[tuple[Order, Job | None]]:
        """Return what can be read; what cannot is refused to whoever asks for it, and to nobody else."""
        found = []
        for row in rows:
            try:
                job = jobs.get(row[0])
                found.append((read_order(row), None if job is None else read_job(job)))
            except OrderUnreadable as unreadable:
                self._unreadable[row[0]] = unreadable
        return found

    def _know(self, found: Sequence[tuple[Order, Job | None]]) -> None:
        """Take note of loaded orders, unless this batch has them already."""
        for order, job in found:
            if order.order_id not in self._before:
                self._before[order.order_id] = self._after[order.order_id] = (order, job)

    async def carry_out(self, asked: Asked) -> Outcome:
        if isinstance(asked, ClaimDue):
            return await self._claim(asked)
        if isinstance(asked, ReportBreaker):
            if asked.order_id in self._lost:
                return await self._breaker.read()
            return await self._breaker.report(asked, self._now)
        try:
            if asked.incarnation is not None or asked.placed or asked.behind:
                self._check_queued(asked)
            if asked.key and (known := find_answer(asked.key, self._answers)):
                return known
            outcome = self._decide(asked.command)
        except ExpediterError as refused:
            if isinstance(refused, StaleLease):
                self._lost.add(asked.command.order_id)
            return refused
        if asked.key and asked.answer:
            if asked.with_lines:
                await self._load_lines([outcome.order.order_id])
            return self._keep(asked, outcome)
        return outcome

    def _check_queued(self, asked: Request) -> None:
        order_id = asked.command.order_id
        if asked.incarnation is not None and asked.incarnation < self._incarnation:
            raise ClearedAway(f"order {order_id}: this was accepted before the database was cleared")
        there = order_id in self._deleted or self._after.get(order_id, (None, None))[0] is not None
        if (asked.placed and not there) or any(key not in self._answers for key in asked.behind):
            raise NotYetApplied(f"order {order_id}: what was accepted before is not stored yet")

    def _decide(self, command: Command) -> Applied:
        order_id = command.order_id
        if order_id in self._unreadable:
            raise self._unreadable[order_id]
        order, job = self._after.get(order_id, (None, None))
        if order_id in self._deleted and isinstance(command, PlaceOrder):
            raise DuplicateOrder(order_id, deleted=True)
        # A process's look at the clock may be a little behind another's that changed the order before.
        now = self._now if order is None else max(self._now, order.updated_at)
        refunding = order is not None and order.refunding_minor
        decision = decide(order, job, command, now, self._money.refunds(order_id) if refunding else ())
        self._record(order_id, decision)
        if isinstance(command, PlaceOrder):
            self._lines[order_id] = decision.lines
        shown = decision.order or order
        assert shown is not None  # decide refuses a command about an order that is not there
        return Applied(shown, decision.job, self._lines.get(order_id, ()), refunds=decision.refunds)

    def _record(self, order_id: str, decision: Decision) -> None:
        self._before.setdefault(order_id, (None, None))
        self._after[order_id] = (decision.order, decision.job)
        self.events += decision.events
        if decision.order is None:
            self._deleted.add(order_id)
        if decision.attempts or decision.refunds:
            self._money.record(order_id, decision)

    def _keep(self, asked: Request, applied: Applied) -> Applied:
        assert asked.key is not None and asked.answer is not None
        applied = msgspec.structs.replace(applied, lines=self._lines.get(applied.order.order_id, ()))
        answer = asked.answer(applied)
        self._answers[asked.key.key] = (asked.key.fingerprint, answer)
        self._new_answers.append((asked.key, answer))
        return msgspec.structs.replace(applied, answer=answer)

    async def add_lines(self, asked: Sequence[Asked], outcomes: list[Outcome]) -> None:
        """Add the lines to the outcomes of those who asked for them."""
        wanted = [
            (index, outcome)
            for index, (request, outcome) in enumerate(zip(asked, outcomes, strict=True))
            if isinstance(request, Request) and request.with_lines and isinstance(outcome, Applied)
        ]
        await self._load_lines([outcome.order.order_id for _, outcome in wanted])
        for index, outcome in wanted:
            outcomes[index] = msgspec.structs.replace(outcome, lines=self._lines[outcome.order.order_id])

    async def _load_lines(self, ids: list[str]) -> None:
        missing = [order_id for order_id in ids if order_id not in self._lines]
        if missing:
            found = lines_by_order(await self._connection.fetch(LINES, ids=missing), missing)
            self._lines.update((order_id, tuple(lines)) for order_id, lines in found.items())

    async def _claim(self, asked: ClaimDue) -> Claims:
        breaker = await self._breaker.read()
        claimed: list[Claimed] = []
        changed: list[Order] = []
        first_due = (await self._connection.fetch(FIRST_DUE))[0]
        for kind, due_at in zip(KINDS, first_due, strict=True):
            if due_at is None or due_at > self._now or kind not in asked.kinds:
                continue
            limit = asked.limit - len(claimed)
            probe = False
            if kind in GATEWAY_KINDS and breaker.open_until is not None:
                probe = breaker.may_probe(self._now)
                limit = min(limit, int(probe))
            if limit > 0:
                claimed += await self._claim_kind(asked, kind, limit, probe, changed)
        breaker = await self._breaker.read()
        # Whoever got as many as it asked for asks again at once, and need not know when the next is due.
        next_due = self._now if len(changed) >= asked.limit else await self._next_due(breaker, asked.kinds)
        return Claims(tuple(claimed), tuple(changed), breaker, next_due, self._now)

    async def _claim_kind(
        self, asked: ClaimDue, kind: JobKind, limit: int, probe: bool, changed: list[Order]
    ) -> list[Claimed]:
        rows = await self._connection.fetch(FIND_DUE, kind=kind.value, now=self._now, limit=limit)
        found = await self._readable(rows)
        if probe and found and not await self._breaker.take_probe(asked.holder, self._now):
            return []
        claimed = []
        self._know(found)
        await self._money.load(order for order, _ in found)
        for order, _ in found:
            command = ClaimJob(
                order_id=order.order_id,
                holder=asked.holder,
                lease=asked.lease,
                claims_max=asked.claims_max,
                key_prefix=asked.key_prefix,
            )
            try:
                applied = self._decide(command)
            except StaleLease:
                continue  # another request of this batch has already taken or finished it
            changed.append(applied.order)
            if applied.job is not None and applied.job.holder == asked.holder:
                refund = first_pending(self._money.refunds(order.order_id)) if kind is JobKind.REFUND else None
                claimed.append(Claimed(applied.order, applied.job, probe, refund))
        return claimed

    async def _readable(self, rows: list[Row], *, park: bool = True) -> list[tuple[Order, Job | None]]:
        """Return what can be read; what cannot is set aside (`park`), so that it holds up nobody."""
        readable, broken = [], []
        for row in rows:
            try:
                readable.append(read_order_and_job(row))
            except OrderUnreadable:
                broken.append(row[0])
        if broken and park:
            await set_aside(self._connection, broken, self._now, self._slot)
        return readable

    async def _next_due(self, breaker: Breaker, kinds: Set[JobKind]) -> int | None:
        (row,) = await self._connection.fetch(NEXT_DUE, now=self._now)
        due = [due_at for kind, due_at in zip(KINDS, row, strict=True) if due_at is not None and kind in kinds]
        if breaker.open_until is not None:
            due.append(max(breaker.open_until, breaker.probe_until or 0))
        return min(due, default=None)

    async def write(self) -> int:
        """Write what the batch came to; return the position of its newest event."""
        if not self.events and not self._new_answers and self._after == self._before:
            return await self._connection.newest(POSITION)
        connection = self._connection
        new, changed, gone = self._sorted()
        lines = [line_row(order.order_id, line) for order in new for line in self._lines[order.order_id]]
        if lines:
            # Before the orders: their trigger sums these up.
            await connection.insert(schema.order_lines, lines)
        if new:
            await connection.insert(schema.orders, [order_row(order) for order in new])
        if changed:
            rows = [changed_order_row(order) for order in changed]
            await connection.update(schema.orders, ORDER_CHANGES, ("order_id",), rows)
        if gone:
            await connection.remove(schema.orders, gone)
            await connection.remove(schema.order_lines, gone, exactly=False)
            await connection.insert(schema.deleted_orders, [(order_id, self._now) for order_id in gone])
        await self._write_jobs()
        if self._money.changed:
            await self._money.write()
        if self._new_answers:
            await keep_answers(self._connection, self._new_answers, self._now)
        counters = [(name, self._slot, value) for name, value in sorted(self._counted().items()) if value]
        if counters:
            await connection.add(schema.counters, counters)
        return await self._write_events()

    @property
    def changed(self) -> list[tuple[str, int]]:
        """The orders that were there before, with their versions now (NEVER: they are deleted)."""
        _, changed, gone = self._sorted()
        return [(order.order_id, order.version) for order in changed] + [(order_id, NEVER) for order_id in gone]

    def _sorted(self) -> tuple[list[Order], list[Order], list[str]]:
        if self._sorts is not None:
            return self._sorts
        new, changed, gone = [], [], []
        for order_id, (order, _) in self._after.items():
            was = self._before[order_id][0]
            if order is None:
                gone.append(order_id)
            elif was is None:
                new.append(order)
            elif order is not was:
                changed.append(order)
        self._sorts = (new, changed, gone)
        return self._sorts

    async def _write_jobs(self) -> None:
        new, changed, gone = [], [], []
        for order_id, (_, job) in self._after.items():
            was = self._before[order_id][1]
            if job is was:
                continue
            if job is None:
                gone.append(order_id)
            elif was is None:
                new.append(job_row(order_id, job))
            else:
                changed.append((*job_row(order_id, job)[1:], order_id))
        if new:
            await self._connection.insert(schema.jobs, new)
        if changed:
            await self._connection.update(schema.jobs, _JOB_CHANGES, ("order_id",), changed)
        if gone:
            await self._connection.remove(schema.jobs, gone)

    def _counted(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for order_id, after in self._after.items():
            before = self._before[order_id]
            if after is before:
                continue
            for sign, (order, job) in ((-1, before), (1, after)):
                if order is not None:
                    count_order(total, order, sign)
                if job is not None:
                    count_job(total, job, sign)
        return total

    async def _write_events(self) -> int:
        # Last: whatever this batch waited for, its events come after those. And others, or readers, wait for it.
        rows = [
            (event.order_id, event.number, event.at, event.type, _to_json(event.data).decode())
            for event in self.events
        ]
        return await self._connection.append(POSITION, schema.events, rows)


_JOB_CHANGES = tuple(column.name for column in schema.jobs.columns if column.name != "order_id")
