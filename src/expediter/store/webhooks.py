"""Webhook endpoints as callers see and change them: who is told of events, and how far that has come."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Literal

import msgspec
import uuid_utils
from sqlalchemy import bindparam, func, select, update

from expediter.backends.databases import Connection, Database
from expediter.errors import Conflict, Fault, InvalidInput, WebhookNotFound
from expediter.orders.order import MICROSECONDS
from expediter.store import schema
from expediter.store.deliveries import WAITING, DeliveryPage, deliveries_page, read_delivery
from expediter.store.feed import Cursor, end_of_feed, position_at
from expediter.store.idempotency import keep_answers, kept_answer
from expediter.store.incarnation import read_incarnation
from expediter.store.statements import POSITION
from expediter.store.submissions import Answer, IdempotencyKey, Replayed

#: Endpoints of one database.
ENDPOINTS_MAX = 50
#: Bytes of a new secret; the specification asks for 24 to 64.
SECRET_BYTES = 32
#: Seconds for which the old secret signs beside a new one.
ROTATION_SECONDS = 24 * 3600
#: Deliveries that one call sends again, by their ids.
REDELIVERED_MAX = 100

ACTIVE, PAUSED = "active", "paused"

_table = schema.webhook_endpoints
_kept = schema.webhook_deliveries
_ALL = select(_table).order_by(_table.c.created_at, _table.c.endpoint_id)
_ONE = select(_table).where(_table.c.endpoint_id == bindparam("endpoint_id"))
_HOW_MANY = select(func.count()).select_from(_table)
#: Whoever makes an endpoint holds this one row, so that two at once do not make one too many.
_ONE_AT_A_TIME = select(schema.installation.c.installation_id).with_for_update()
#: What waits beyond the position is counted with what is behind it.
_WAITING_OF_EACH = (
    select(_kept.c.endpoint_id, func.count())
    .select_from(_kept.join(_table, _table.c.endpoint_id == _kept.c.endpoint_id))
    .where(_kept.c.status == WAITING, _kept.c.position <= _table.c.position)
    .group_by(_kept.c.endpoint_id)
)
_of_it = _kept.c.endpoint_id == bindparam("the_endpoint")
_TRY_NOW = (
    update(_kept)
    .where(_of_it, _kept.c.status == WAITING, _kept.c.next_try_at.is_not(None))
    .values(next_try_at=bindparam("now"))
)
_BY_NOTICE = select(_kept).where(_of_it, _kept.c.notice_id.in_(bindparam("ids", expanding=True)))
_SEND_AGAIN = (
    update(_kept)
    .where(_of_it, _kept.c.notice_id.in_(bindparam("ids", expanding=True)))
    .values(status=WAITING, tries=0, first_tried_at=None, next_try_at=bindparam("now"))
)
_REMOVE_KEPT = _kept.delete().where(_of_it)
_REMOVE = _table.delete().where(_table.c.endpoint_id == bindparam("the_endpoint"))
_CHANGES: dict[frozenset[str], Any] = {}


class Endpoint(msgspec.Struct, frozen=True):
    """A row of `webhook_endpoints`, its columns in their order; times are microseconds since 1970."""

    endpoint_id: str
    url: str
    types: tuple[str, ...]
    description: str
    status: str
    secret: str
    old_secret: str | None
    old_secret_until: int | None
    position: int
    last_success_at: int | None
    last_error: str | None
    failing_since: int | None
    wait_until: int | None
    created_at: int
    revision: int = 0
    holder: str | None = None
    lease_until: int = 0
    fence: int = 0

    def __repr__(self) -> str:
        """Leave out what signs: this may be logged."""
        return f"Endpoint({self.endpoint_id!r}, {self.url!r})"


class Standing(msgspec.Struct, frozen=True):
    """An endpoint, and how many events are behind its position or wait to be delivered."""

    endpoint: Endpoint
    behind: int


class Tried(msgspec.Struct, frozen=True):
    """What came of one try to deliver: `error` None: it was delivered. `answer` is how the body begins.

    `wait_seconds` is how long the receiver has asked to be left alone, `gone` that it wants no more of it.
    """

    error: str | None
    answer_status: int | None
    answer: str | None
    took_ms: int
    wait_seconds: float | None = None
    gone: bool = False


def read_endpoint(row: Sequence[Any]) -> Endpoint:
    """Return the endpoint that a row holds."""
    endpoint_id, url, types, *more = row
    return Endpoint(endpoint_id, url, tuple(msgspec.json.decode(types)), *more)


def endpoint_row(endpoint: Endpoint) -> Sequence[Any]:
    """Return the row of an endpoint."""
    endpoint_id, url, types, *more = msgspec.structs.astuple(endpoint)
    return (endpoint_id, url, msgspec.json.encode(types).decode(), *more)


def new_secret() -> str:
    """Return a secret as the specification has them: whsec_ and random bytes in base64."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


Word = Callable[[Standing], Answer]


class Webhooks:
    """The endpoints of a database. Use it from one event loop."""

    def __init__(self, database: Database) -> None:
        """Nothing is read until somebody asks."""
        self._database = database
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` when this process has changed an endpoint."""
        self._listeners.append(listener)

    async def create(
        self,
        url: str,
        types: Sequence[str],
        description: str,
        begin: Cursor | Literal["now", "beginning"],
        *,
        key: IdempotencyKey | None = None,
        word: Word | None = None,
    ) -> Standing | Replayed:
        """Make an endpoint that begins there. Raises Conflict beyond ENDPOINTS_MAX, InvalidInput for a cursor."""

        async def make(connection: Connection) -> Standing:
            await connection.fetch(_ONE_AT_A_TIME)
            if (await connection.fetch(_HOW_MANY))[0][0] >= ENDPOINTS_MAX:
                raise Conflict(f"There are {ENDPOINTS_MAX} webhook endpoints already: delete one first")
            position = await _begin(connection, begin)
            endpoint = Endpoint(
                endpoint_id=f"wh_{uuid_utils.uuid7().hex}",
                url=url,
                types=tuple(types),
                description=description,
                status=ACTIVE,
                secret=new_secret(),
                old_secret=None,
                old_secret_until=None,
                position=position,
                last_success_at=None,
                last_error=None,
                failing_since=None,
                wait_until=None,
                created_at=await connection.now(),
            )
            await connection.insert(_table, [endpoint_row(endpoint)])
            return await _standing(connection, endpoint.endpoint_id)

        return await self._once(make, key, word)

    async def all(self) -> list[Standing]:
        """Return every endpoint, the oldest first."""
        return await self._database.read(_standings)

    async def one(self, endpoint_id: str) -> Standing:
        """Return an endpoint. Raises WebhookNotFound."""
        return await self._database.read(partial(_standing, endpoint_id=endpoint_id))

    async def with_time(self, endpoint_id: str) -> tuple[Endpoint, int]:
        """Return an endpoint, and the database's time (microseconds). Raises WebhookNotFound."""

        async def look(connection: Connection) -> tuple[Endpoint, int]:
            return (await _standing(connection, endpoint_id)).endpoint, await connection.now()

        return await self._database.read(look)

    async def known(self, key: IdempotencyKey) -> Replayed | None:
        """Return the answer that is kept under a key. Raises IdempotencyMismatch."""
        return await self._database.read(partial(_known, key=key))

    async def keep(self, key: IdempotencyKey, answer: Answer) -> None:
        """Keep an answer, unless another call with this key was faster."""

        async def keep(connection: Connection) -> None:
            if await _known(connection, key) is None:
                await keep_answers(connection, [(key, answer)], await connection.now())

        await self._database.write(keep)

    async def change(
        self,
        endpoint_id: str,
        changes: dict[str, Any],
        *,
        key: IdempotencyKey | None = None,
        word: Word | None = None,
    ) -> Standing | Replayed:
        """Set `url`, `types`, `description` or `status`; one that becomes active is tried at once.

        Raises WebhookNotFound.
        """
        values = dict(changes)
        if "types" in values:
            values["types"] = msgspec.json.encode(values["types"]).decode()
        resumed = values.get("status") == ACTIVE or "url" in values
        if resumed:
            values |= {"failing_since": None, "wait_until": None, "last_error": None}

        async def set_them(connection: Connection) -> Standing:
            await _change(connection, endpoint_id, values)
            if resumed:
                await connection.run(_TRY_NOW, the_endpoint=endpoint_id, now=await connection.now())
            return await _standing(connection, endpoint_id)

        return await self._once(set_them, key, word)

    async def rotate(
        self, endpoint_id: str, *, key: IdempotencyKey | None = None, word: Word | None = None
    ) -> Standing | Replayed:
        """Give an endpoint a new secret; the old one signs, too, for ROTATION_SECONDS. Raises WebhookNotFound."""

        async def rotate(connection: Connection) -> Standing:
            old = (await _standing(connection, endpoint_id)).endpoint
            until = await connection.now() + ROTATION_SECONDS * MICROSECONDS
            values = {"secret": new_secret(), "old_secret": old.secret, "old_secret_until": until}
            await _change(connection, endpoint_id, values)
            return await _standing(connection, endpoint_id)

        return await self._once(rotate, key, word)

    async def remove(
        self, endpoint_id: str, *, key: IdempotencyKey | None = None, word: Word | None = None
    ) -> Standing | Replayed:
        """Remove an endpoint and what is kept of its deliveries; return it as it was. Raises WebhookNotFound."""

        async def remove(connection: Connection) -> Standing:
            there = await _standing(connection, endpoint_id)
            await connection.run(_REMOVE, the_endpoint=endpoint_id)
            await connection.run(_REMOVE_KEPT, the_endpoint=endpoint_id)
            return there

        return await self._once(remove, key, word)

    async def deliveries(
        self, endpoint_id: str, *, status: str | None, order_id: str | None, before: int | None, limit: int
    ) -> DeliveryPage:
        """Return what is kept of an endpoint's deliveries, the newest event first. Raises WebhookNotFound."""

        async def look(connection: Connection) -> DeliveryPage:
            await _standing(connection, endpoint_id)
            return await deliveries_page(
                connection, endpoint_id, status=status, order_id=order_id, before=before, limit=limit
            )

        return await self._database.read(look)

    async def redeliver(
        self,
        endpoint_id: str,
        *,
        since: int | None,
        ids: Sequence[str],
        key: IdempotencyKey | None = None,
        word: Word | None = None,
    ) -> Standing | Replayed:
        """Send these again, or every event since a moment (microseconds). Raises WebhookNotFound, InvalidInput."""

        async def again(connection: Connection) -> Standing:
            await _standing(connection, endpoint_id)
            if since is not None:
                await _change(connection, endpoint_id, {"position": await position_at(connection, since)})
            else:
                rows = await connection.fetch(_BY_NOTICE, the_endpoint=endpoint_id, ids=list(ids))
                known = {read_delivery(row).notice_id for row in rows}
                faults = [
                    Fault(f"/delivery_ids/{index}", "is no delivery that is kept")
                    for index, each in enumerate(ids)
                    if each not in known
                ]
                if faults:
                    raise InvalidInput(faults)
                await connection.run(
                    _SEND_AGAIN, the_endpoint=endpoint_id, ids=list(ids), now=await connection.now()
                )
                await _change(connection, endpoint_id, {})
            return await _standing(connection, endpoint_id)

        return await self._once(again, key, word)

    async def _once(
        self,
        work: Callable[[Connection], Awaitable[Standing]],
        key: IdempotencyKey | None,
        word: Word | None,
    ) -> Standing | Replayed:
        """Do it in one transaction, and keep under `key` what `word` says of it; or return what is kept."""

        async def run(connection: Connection) -> Standing | Replayed:
            if key is not None and (known := await _known(connection, key)):
                return known
            made = await work(connection)
            if key is not None and word is not None:
                await keep_answers(connection, [(key, word(made))], await connection.now())
            return made

        made = await self._database.write(run)
        for listener in self._listeners:
            listener()
        return made


async def _known(connection: Connection, key: IdempotencyKey) -> Replayed | None:
    return await kept_answer(connection, key, await connection.now())


async def _begin(connection: Connection, begin: Cursor | Literal["now", "beginning"]) -> int:
    if begin == "beginning":
        return 0
    end = await end_of_feed(connection)
    if begin == "now":
        return end.position
    if begin.incarnation != await read_incarnation(connection) or begin.position > end.position:
        raise InvalidInput([Fault("/from", "is a cursor of before the orders were cleared or restored")])
    return begin.position


async def _change(connection: Connection, endpoint_id: str, values: dict[str, Any]) -> None:
    """Set these columns, and let the reader notice. Raises WebhookNotFound."""
    names = frozenset(values)
    if names not in _CHANGES:
        _CHANGES[names] = (
            update(_table)
            .where(_table.c.endpoint_id == bindparam("the_endpoint"))
            .values(revision=_table.c.revision + 1, **{name: bindparam(f"new_{name}") for name in sorted(names)})
        )
    given = {f"new_{name}": value for name, value in values.items()}
    if not await connection.run(_CHANGES[names], the_endpoint=endpoint_id, **given):
        raise WebhookNotFound


async def _standing(connection: Connection, endpoint_id: str) -> Standing:
    rows = await connection.fetch(_ONE, endpoint_id=endpoint_id)
    if not rows:
        raise WebhookNotFound
    return (await _with_distance(connection, rows))[0]


async def _standings(connection: Connection) -> list[Standing]:
    return await _with_distance(connection, await connection.fetch(_ALL))


async def _with_distance(connection: Connection, rows: Sequence[Sequence[Any]]) -> list[Standing]:
    newest = await connection.newest(POSITION)
    waiting = {row[0]: row[1] for row in await connection.fetch(_WAITING_OF_EACH)}
    endpoints = [read_endpoint(row) for row in rows]
    return [
        Standing(each, max(0, newest - each.position) + waiting.get(each.endpoint_id, 0)) for each in endpoints
    ]
