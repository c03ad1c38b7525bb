"""What the reader of a webhook endpoint asks of the database: its lease, and what it has done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import msgspec
from sqlalchemy import bindparam, case, select, update

from expediter.backends.databases import Connection, Database
from expediter.orders.order import MICROSECONDS
from expediter.store import schema
from expediter.store.deliveries import (
    Delivery,
    History,
    histories,
    keep_deliveries,
    trim_deliveries,
    waiting_deliveries,
)
from expediter.store.feed import FeedPart, read_part
from expediter.store.statements import POSITION
from expediter.store.webhooks import ACTIVE, Endpoint, read_endpoint

#: Seconds that a process may send for an endpoint without saying that it is still there.
LEASE_SECONDS = 5

_table = schema.webhook_endpoints
_FREE = (
    select(_table.c.endpoint_id)
    .where(_table.c.status == ACTIVE, _table.c.lease_until <= bindparam("now"))
    .order_by(_table.c.lease_until)
)
_ANY = select(_table.c.endpoint_id).limit(1)
_CLAIM = (
    update(_table)
    .where(
        _table.c.endpoint_id == bindparam("the_endpoint"),
        _table.c.status == ACTIVE,
        _table.c.lease_until <= bindparam("now"),
    )
    .values(holder=bindparam("by"), lease_until=bindparam("until"), fence=_table.c.fence + 1)
)
_ONE = select(_table).where(_table.c.endpoint_id == bindparam("endpoint_id"))
#: What a caller has changed since the reader looked is the caller's to say.
_unchanged = _table.c.revision == bindparam("seen")
_MOVE = (
    update(_table)
    .where(_table.c.endpoint_id == bindparam("the_endpoint"), _table.c.fence == bindparam("held"))
    .values(
        # Whoever has set it back meanwhile wants it there.
        position=case((_table.c.position == bindparam("was"), bindparam("reached")), else_=_table.c.position),
        last_success_at=bindparam("succeeded_at"),
        last_error=case((_unchanged, bindparam("said")), else_=_table.c.last_error),
        failing_since=case((_unchanged, bindparam("failing")), else_=_table.c.failing_since),
        wait_until=case((_unchanged, bindparam("waits")), else_=_table.c.wait_until),
        status=case((_unchanged, bindparam("stands")), else_=_table.c.status),
        lease_until=bindparam("until"),
    )
)


class Taken(NamedTuple):
    """An endpoint whose events are this process's to send, what waits there, and the database's time."""

    endpoint: Endpoint
    waiting: list[Delivery]
    now: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader has done since it said so last, from the position `was` on.

    `gone` has the positions of deliveries whose orders are no more. `release`: it goes, and another may take its
    place at once.
    """

    endpoint: Endpoint
    was: int
    reached: int
    last_success_at: int | None
    last_error: str | None
    failing_since: int | None
    wait_until: int | None
    deliveries: Sequence[Delivery]
    gone: Sequence[int] = ()
    status: str = ACTIVE
    release: bool = False
    trim: bool = False


async def take_endpoints(connection: Connection, *, holder: str) -> list[Taken]:
    """Take half of the endpoints that nobody reads for, so that other processes find some, too."""
    now = await connection.now()
    rows = await connection.fetch(_FREE, now=now)
    taken: list[Taken] = []
    for (endpoint_id,) in rows[: (len(rows) + 1) // 2]:
        until = now + LEASE_SECONDS * MICROSECONDS
        if await connection.run(_CLAIM, the_endpoint=endpoint_id, now=now, by=holder, until=until):
            endpoint = read_endpoint((await connection.fetch(_ONE, endpoint_id=endpoint_id))[0])
            taken.append(Taken(endpoint, await waiting_deliveries(connection, endpoint_id), now))
    return taken


async def any_free(connection: Connection) -> tuple[bool, bool]:
    """Return whether an endpoint may be free for the taking, and whether there are any at all."""
    free = await connection.fetch(_FREE, now=await connection.now())
    return bool(free), bool(free) or bool(await connection.fetch(_ANY))


async def store_progress(connection: Connection, progress: Progress) -> tuple[Endpoint, int] | None:
    """Store what a reader has done, and prolong its lease; return the endpoint, and the database's time.

    None: the lease is another's, and nothing is stored.
    """
    now = await connection.now()
    found = await connection.run(
        _MOVE,
        the_endpoint=progress.endpoint.endpoint_id,
        held=progress.endpoint.fence,
        seen=progress.endpoint.revision,
        was=progress.was,
        reached=progress.reached,
        succeeded_at=progress.last_success_at,
        said=progress.last_error,
        failing=progress.failing_since,
        waits=progress.wait_until,
        stands=progress.status,
        until=0 if progress.release else now + LEASE_SECONDS * MICROSECONDS,
    )
    if not found:
        return None
    rows = await connection.fetch(_ONE, endpoint_id=progress.endpoint.endpoint_id)
    if progress.trim:
        await trim_deliveries(connection, progress.endpoint.endpoint_id)
    if progress.deliveries or progress.gone:
        await keep_deliveries(connection, progress.endpoint.endpoint_id, progress.deliveries, progress.gone)
    return read_endpoint(rows[0]), now


class Readings:
    """What readers of endpoints ask of the database. Each call raises Unavailable."""

    def __init__(self, database: Database) -> None:
        """Nothing is asked yet."""
        self._database = database

    async def any_free(self) -> tuple[bool, bool]:
        """Return whether an endpoint may be free for the taking, and whether there are any at all."""
        return await self._database.read(any_free)

    async def take(self, holder: str) -> list[Taken]:
        """Take some of the endpoints that nobody reads for."""
        return await self._database.write(partial(take_endpoints, holder=holder))

    async def part(self, position: int, types: Sequence[str] | None, limit: int) -> FeedPart:
        """Return events behind a position."""
        reading = partial(read_part, position=position, types=types, limit=limit)
        return await self._database.read(reading, settled=POSITION)

    async def histories(self, order_ids: Sequence[str]) -> list[History | None]:
        """Return the histories of these orders; None for an order that has none here."""
        found = await self._database.read(partial(histories, order_ids=list(dict.fromkeys(order_ids))))
        return [found.get(order_id) for order_id in order_ids]

    async def store(self, progress: Progress) -> tuple[Endpoint, int] | None:
        """Store what a reader has done: see store_progress."""
        return await self._database.write(partial(store_progress, progress=progress))
