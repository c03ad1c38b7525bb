"""Cached reads: one order, a page, the summary, and waiting for a change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

import msgspec

from expediter.backends.batching import Gatherer
from expediter.backends.cache import Cache, Entry
from expediter.backends.databases import Connection, Database
from expediter.errors import OrderNotFound, OrderUnreadable
from expediter.orders.documents import order_document
from expediter.orders.order import Attempt, Job, Order, OrderRefund, Status
from expediter.orders.resilience import Breaker
from expediter.store import lookups
from expediter.store.feed import Feed
from expediter.store.jobs import Backlog, backlog
from expediter.store.lookups import HistoryRow
from expediter.store.overview import Overview, read_overview
from expediter.store.rows import count_of
from expediter.store.submissions import Applied, PageQuery
from expediter.store.watching import Watch
from expediter.store.worded import Worded

#: Bytes of the documents of one page, at most; the next page goes on from there.
PAGE_BYTES_MAX = 4 * 1024 * 1024
#: Orders whose lines are read at once: each may have 2,000.
ORDERS_PER_LOOK = 25
#: Such reads under way at once.
LOOKS_AT_ONCE = 4


_to_json = msgspec.json.Encoder().encode


class Page(msgspec.Struct, frozen=True):
    """One page: the documents, how many there are in all (None: not counted), and where the next page begins."""

    documents: list[msgspec.Raw]
    total: int | None
    after: tuple[int, str] | None


class Queue(msgspec.Struct, frozen=True):
    """The jobs, all counters, and the ids that were asked for, as they were at one moment."""

    backlog: Backlog
    counters: dict[str, int]
    ids: dict[Status, list[str]]


class Accepted(Protocol):
    """What was accepted and may not be stored yet."""

    async def order(self, order_id: str, stored: Callable[[], Awaitable[Entry | None]]) -> Entry | None:
        """Return an order as it is `stored`, or as it was accepted if that is newer; None: there is none."""

    async def pending(self, order_ids: Sequence[str]) -> set[str]:
        """Return which of these are known to be accepted and not known to be stored."""

    async def until_stored(self, order_id: str) -> None:
        """Return when an accepted order is stored, or if it is not an accepted one."""


class NothingAccepted:
    """Every order is stored before it is answered."""

    async def order(self, order_id: str, stored: Callable[[], Awaitable[Entry | None]]) -> Entry | None:
        """Return the order as it is stored."""
        return await stored()

    async def pending(self, order_ids: Sequence[str]) -> set[str]:
        """No order waits."""
        return set()

    async def until_stored(self, order_id: str) -> None:
        """Every order is stored."""


class Queries:
    """Reads for the web; never older than what this process has seen committed."""

    def __init__(self, database: Database, cache: Cache, accepted: Accepted) -> None:
        """Read from `database`, through `cache`; `accepted` knows what is not stored yet."""
        self._database = database
        self._cache = cache
        self._accepted = accepted
        self._all_stored = isinstance(accepted, NothingAccepted)
        self._details: Gatherer[str, Entry | None] = Gatherer(
            self._load_all, items_max=ORDERS_PER_LOOK, rounds_max=LOOKS_AT_ONCE
        )
        self._watch = Watch(database, accepted.pending)
        #: Every change of every order, for readers who follow them all.
        self.feed = Feed(database)
        self._worded = Worded()
        self._stopping = False

    async def waiting(self, order_ids: Sequence[str]) -> set[str]:
        """Return which of these were accepted into the queue and are not stored yet."""
        return await self._accepted.pending(order_ids)

    async def order(self, order_id: str, *, min_version: int = 0) -> Entry:
        """Return the document of an order, at `min_version` or newer if the store has it. Raises OrderNotFound."""
        stored = partial(self._cache.order, order_id, partial(self._load, order_id))
        entry = await self._accepted.order(order_id, stored)
        if entry is not None and entry.version < min_version:
            entry = await self._load(order_id) or entry
        if entry is None:
            raise OrderNotFound(order_id)
        return entry

    def known(self, order_id: str) -> Entry | None:
        """Return the document of an order if it can be said without waiting; None says nothing."""
        return self._cache.known(order_id) if self._all_stored else None

    async def _load(self, order_id: str) -> Entry | None:
        """Read an order from the database, in one transaction with what others ask for at the same time."""
        return await self._details.ask(order_id)

    async def _load_all(self, order_ids: Sequence[str]) -> list[Entry | None | OrderUnreadable]:
        found = await self._database.read(partial(lookups.orders_with_lines, ids=list(dict.fromkeys(order_ids))))
        entries = {
            order.order_id: order
            if isinstance(order, OrderUnreadable)
            else Entry(order.version, order_document(order, lines))
            for order, lines in found
        }
        return [entries.get(order_id) for order_id in order_ids]

    async def wait(
        self, order_id: str, *, beyond: int, seconds: float, left: asyncio.Future[None] | None = None
    ) -> Entry:
        """Return the order once its version is above `beyond` or it has ended, or after `seconds` as it is then.

        `left` is done once the reader has left; the order is returned as it is then, too.
        Raises OrderNotFound, also when the order is deleted meanwhile.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        version = 0
        while True:
            changed = self._watch.expect(order_id)
            try:
                if not self._stopping:
                    await self._watch.begin()
                entry = await self.order(order_id, min_version=version)
                rest = deadline - loop.time()
                over = rest <= 0 or self._stopping or (left is not None and left.done())
                if entry.version > beyond or over or await self._ended(order_id):
                    return entry
                awaited: list[asyncio.Future[Any]] = [changed] if left is None else [changed, left]
                await asyncio.wait(awaited, timeout=rest, return_when=asyncio.FIRST_COMPLETED)
                version = changed.result() if changed.done() else version
            finally:
                self._watch.forget(order_id, changed)

    async def _ended(self, order_id: str) -> bool:
        if self._watch.full:
            return True
        found = await self._database.read(partial(lookups.order_and_job, order_id=order_id))
        if found is not None:
            return found[0].at_rest
        if not await self._accepted.pending([order_id]):
            if await self._load(order_id) is None:
                raise OrderNotFound(order_id)  # it was deleted since it was read
            return True
        self._watch.not_stored(order_id)
        return False

    def stop_waiting(self) -> None:
        """Answer whoever waits with what there is: the process is about to stop."""
        self._stopping = True
        self._watch.tell_all()
        self.feed.stop()

    def notice(self, changes: Sequence[Applied]) -> None:
        """Wake whoever waits for one of these orders."""
        self._watch.notice(changes)
        if self.feed.waiting:
            self.feed.look_now()

    async def page(self, query: PageQuery) -> Page:
        """Return a page of orders, newest first, and the exact total where the counters know it."""

        async def work(connection: Connection) -> Page:
            orders = await lookups.page(connection, msgspec.structs.replace(query, limit=query.limit + 1))
            if query.filtered:
                total = await lookups.count(connection, query)
            else:
                total = _total(await lookups.counters(connection), query.status)
            documents = await _documents(connection, orders[: query.limit], self._worded)
            more = len(orders) > len(documents)
            last = orders[len(documents) - 1] if more else None
            return Page(documents, total, (last.created_at, last.order_id) if last else None)

        return await self._database.read(work)

    async def count(self, query: PageQuery, most: int) -> int:
        """Return how many orders the filters of a page let through in all; `most` where there are more."""
        found = await self._database.read(partial(lookups.count, query=query, most=most))
        return most if found is None else found

    async def attempts(self, order_ids: list[str]) -> dict[str, list[Attempt]]:
        """Return every call to the gateway about these orders, oldest first, by order id."""
        if not order_ids:
            return {}
        return await self._database.read(partial(lookups.attempts_of_all, ids=order_ids))

    async def cached_page(self, query: PageQuery, word: Callable[[Page], bytes]) -> bytes:
        """Return the answer that `word(page)` makes of an unfiltered page, from the cache where it is there."""

        async def load() -> tuple[bytes, bool]:
            page = await self.page(query)
            whole = page.after is None or len(page.documents) == query.limit
            return word(page), whole

        return await self._cache.page(f"{query.limit}:{query.offset}", load)

    async def counters(self) -> dict[str, int]:
        """Return the exact counters."""
        return await self._database.read(lookups.counters)

    async def ids(self, statuses: list[Status], limit: int) -> dict[Status, list[str]]:
        """Return up to `limit` newest ids in each status."""
        return await self._database.read(partial(lookups.ids_by_status, statuses=statuses, limit=limit))

    async def history(self, order_id: str) -> list[HistoryRow]:
        """Return the events of an order. Raises OrderNotFound."""
        await self._accepted.until_stored(order_id)
        rows = await self._database.read(partial(lookups.history, order_id=order_id))
        if rows is None:
            raise OrderNotFound(order_id)
        return rows

    async def inspect(self, order_id: str) -> tuple[Order, Job | None, tuple[Attempt, ...], int]:
        """Return an order, its job, its payment attempts and the database's time. Raises OrderNotFound."""
        await self._accepted.until_stored(order_id)
        found = await self._database.read(partial(lookups.order_and_job, order_id=order_id))
        if found is None:
            raise OrderNotFound(order_id)
        return found

    async def refunds(self, order_id: str) -> tuple[Order, list[OrderRefund]]:
        """Return an order and its refunds, the oldest first. Raises OrderNotFound."""
        await self._accepted.until_stored(order_id)
        found = await self._database.read(partial(lookups.order_and_refunds, order_id=order_id))
        if found is None:
            raise OrderNotFound(order_id)
        return found

    async def breaker(self) -> Breaker:
        """Return the payment gateway's circuit breaker."""
        return await self._database.read(lookups.breaker)

    async def overview(self) -> Overview:
        """Return how the whole system stands."""
        return await self._database.read(read_overview)

    async def queue(self, statuses: Sequence[Status] = (), limit: int = 0) -> Queue:
        """Return the queue's state, with up to `limit` newest ids in each of these statuses."""

        async def work(connection: Connection) -> Queue:
            counters = await lookups.counters(connection)
            return Queue(
                backlog=await backlog(connection, counters),
                counters=counters,
                ids=await lookups.ids_by_status(connection, statuses, limit),
            )

        return await self._database.read(work)


async def _documents(
    connection: Connection, orders: Sequence[Order | OrderUnreadable], worded: Worded
) -> list[msgspec.Raw]:
    """Return the documents of these orders, up to PAGE_BYTES_MAX but always one; an unreadable one says so."""
    documents: list[msgspec.Raw] = []
    size = 0
    for start in range(0, len(orders), ORDERS_PER_LOOK):
        part = orders[start : start + ORDERS_PER_LOOK]
        known = worded.find([order for order in part if isinstance(order, Order)])
        unknown = [order.order_id for order in part if order.order_id not in known]
        lines = await lookups.lines_of(connection, unknown) if unknown else {}
        for order in part:
            if isinstance(order, OrderUnreadable):
                document = _to_json({"order_id": order.order_id, "error": str(order)})
            elif order.order_id in known:
                document = known[order.order_id]
            else:
                document = order_document(order, lines[order.order_id])
                worded.keep(order, document)
            size += len(document)
            if documents and size > PAGE_BYTES_MAX:
                return documents
            documents.append(msgspec.Raw(document))
    return documents


def _total(counters: dict[str, int], status: Status | None) -> int:
    if status is not None:
        return count_of(counters, status)
    return count_of(counters, *Status)
