"""API keys: who may call, and what; and the snapshot of them that each process asks.

A key is shown once, when it is made. The database has its SHA-256 alone: of 256 random bits nobody finds the key
by trying, so a slow hash would only cost every request.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import structlog
import uuid_utils
from sqlalchemy import bindparam, delete, or_, select, update

from expediter.backends.databases import Connection, Database
from expediter.backends.tasks import Background
from expediter.errors import Conflict, ExpediterError, Fault, InvalidInput, KeyNotFound, Unavailable
from expediter.orders.order import MICROSECONDS
from expediter.store import schema
from expediter.store.idempotency import keep_answers, kept_answer
from expediter.store.scopes import Scope
from expediter.store.submissions import Answer, IdempotencyKey, Replayed

#: What every key begins with, so that people and scanners of secrets know one when they see it.
PREFIX = "exp_"
#: Random bytes of a key.
KEY_BYTES = 32
#: Keys of one database, with those that are revoked: of these the oldest make room.
KEYS_MAX = 1_000
#: Seconds between two looks of a process for keys that were made or revoked.
LOOK_SECONDS = 0.3
#: Seconds that a database server may take to tell them.
LOOK_SECONDS_MAX = 2.0
#: Seconds between two notes of when a key was used last.
NOTE_SECONDS = 60
#: Seconds between two looks for keys whose use is to be noted.
NOTE_LOOK_SECONDS = 1.0


_table = schema.api_keys
_MARK = schema.installation.c.api_keys_mark
_READ_MARK = select(_MARK)
#: Whoever changes keys holds this one row, so that two at once do not make one too many.
_HOLD_MARK = _READ_MARK.with_for_update()
_SET_MARK = update(schema.installation).values(api_keys_mark=bindparam("mark"))
_ALL = select(_table).order_by(_table.c.created_at, _table.c.key_id).limit(KEYS_MAX)
_NAMED = select(_table).where(or_(_table.c.key_id == bindparam("named"), _table.c.name == bindparam("named")))
_REVOKE = (
    update(_table)
    .where(_table.c.key_id == bindparam("the_key"), _table.c.revoked_at.is_(None))
    .values(revoked_at=bindparam("now"))
)
_REMOVE = delete(_table).where(_table.c.key_id == bindparam("the_key"))
_NOTE = (
    update(_table)
    .where(
        _table.c.key_id.in_(bindparam("ids", expanding=True)),
        or_(_table.c.last_used_at.is_(None), _table.c.last_used_at <= bindparam("before")),
    )
    .values(last_used_at=bindparam("now"))
)

log = structlog.get_logger(__name__)


class ApiKey(msgspec.Struct, frozen=True, repr_omit_defaults=True):
    """A row of `api_keys`, its columns in their order; times are microseconds since 1970."""

    key_id: str
    name: str
    digest: str
    scopes: tuple[Scope, ...]
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used_at: int | None = None

    def __repr__(self) -> str:
        """Leave out the digest: this may be logged."""
        return f"ApiKey({self.key_id!r}, {self.name!r})"


class MadeKey(msgspec.Struct, frozen=True):
    """A new key, and the secret that is shown once."""

    key: ApiKey
    secret: str

    def __repr__(self) -> str:
        """Leave out the secret: this may be logged."""
        return f"MadeKey({self.key.key_id!r}, {self.key.name!r})"


def digest_of(secret: bytes) -> str:
    """Return what the database has of a key."""
    return hashlib.sha256(secret).hexdigest()


def read_key(row: Sequence[Any]) -> ApiKey:
    """Return the key that a row holds. A scope that only a newer version knows is left out."""
    key_id, name, digest, words, *times = row
    known = frozenset(Scope)
    return ApiKey(key_id, name, digest, tuple(Scope(word) for word in words.split() if word in known), *times)


def _row(key: ApiKey) -> Sequence[Any]:
    key_id, name, digest, scopes, *times = msgspec.structs.astuple(key)
    return (key_id, name, digest, " ".join(scopes), *times)


class Keys:
    """The keys of a database. Use it from one event loop."""

    def __init__(self, database: Database) -> None:
        """Nothing is read until somebody asks."""
        self._database = database

    async def create(
        self,
        name: str,
        scopes: Sequence[Scope],
        expires_at: int | None = None,
        *,
        key: IdempotencyKey | None = None,
        word: Callable[[ApiKey], Answer] | None = None,
    ) -> MadeKey | Replayed:
        """Make a key. Under the Idempotency-Key `key` is kept what `word` says, which never has the secret.

        Raises Conflict where a key of this name counts already, and beyond KEYS_MAX; InvalidInput for an end that
        is over; Unavailable.
        """
        secret = PREFIX + secrets.token_hex(KEY_BYTES)
        key_id = f"key_{uuid_utils.uuid7().hex}"

        async def make(connection: Connection) -> MadeKey | Replayed:
            await connection.fetch(_HOLD_MARK)
            now = await connection.now()
            if key is not None and (known := await kept_answer(connection, key, now)):
                return known
            if expires_at is not None and expires_at <= now:
                raise InvalidInput([Fault("/expires_at", "must be in the future")])
            there = [read_key(row) for row in await connection.fetch(_ALL)]
            if any(each.name == name and each.revoked_at is None for each in there):
                raise Conflict(f"There is a key named {name!r} already: revoke it first, or choose another name")
            if len(there) >= KEYS_MAX:
                await _make_room(connection, there)
            made = ApiKey(key_id, name, digest_of(secret.encode()), tuple(dict.fromkeys(scopes)), now, expires_at)
            await connection.insert(_table, [_row(made)])
            await _mark(connection)
            if key is not None and word is not None:
                await keep_answers(connection, [(key, word(made))], now)
            return MadeKey(made, secret)

        return await self._database.write(make)

    async def all(self) -> list[ApiKey]:
        """Return every key, the oldest first, also those that are revoked. Raises Unavailable."""

        async def look(connection: Connection) -> list[ApiKey]:
            return [read_key(row) for row in await connection.fetch(_ALL)]

        return await self._database.read(look)

    async def revoke(
        self,
        named: str,
        *,
        key: IdempotencyKey | None = None,
        word: Callable[[ApiKey], Answer] | None = None,
    ) -> ApiKey | Replayed:
        """Revoke the key of this id or name, for good; one that is revoked stays as it is.

        Raises KeyNotFound, Unavailable.
        """

        async def revoke(connection: Connection) -> ApiKey | Replayed:
            await connection.fetch(_HOLD_MARK)
            now = await connection.now()
            if key is not None and (known := await kept_answer(connection, key, now)):
                return known
            key_id = (await _named(connection, named)).key_id
            if await connection.run(_REVOKE, the_key=key_id, now=now):
                await _mark(connection)
            revoked = await _named(connection, key_id)
            if key is not None and word is not None:
                await keep_answers(connection, [(key, word(revoked))], now)
            return revoked

        return await self._database.write(revoke)


async def _named(connection: Connection, named: str) -> ApiKey:
    """Return the key of this id; else of this name: the one that counts, or the last. Raises KeyNotFound."""
    found = [read_key(row) for row in await connection.fetch(_NAMED, named=named)]
    if not found:
        raise KeyNotFound("There is no API key of this id or name")
    return max(found, key=lambda each: (each.key_id == named, each.revoked_at is None, each.created_at))


async def _make_room(connection: Connection, there: Sequence[ApiKey]) -> None:
    revoked = [each for each in there if each.revoked_at is not None]
    if not revoked:
        raise Conflict(f"There are {KEYS_MAX} API keys already: revoke one first")
    await connection.run(_REMOVE, the_key=min(revoked, key=lambda each: each.revoked_at or 0).key_id)


async def _mark(connection: Connection) -> None:
    """Let every process see that there is something new. Chance, so that no restored backup brings a mark back."""
    await connection.run(_SET_MARK, mark=secrets.token_hex(16))


async def any_key(connection: Connection) -> bool:
    """Return whether a key exists that is not revoked."""
    return any(read_key(row).revoked_at is None for row in await connection.fetch(_ALL))


class Holder(msgspec.Struct, frozen=True):
    """Whoever has a key that counts: what it is for, and until when, on this process's monotonic clock."""

    key_id: str
    digest: bytes
    scopes: frozenset[Scope]
    until: float

    def __repr__(self) -> str:
        """Leave out the digest: this may be logged."""
        return f"Holder({self.key_id!r})"


class KeyRing:
    """The keys that count, as this process knows them: what every request asks, without waiting.

    While the database is away, the keys that were known last go on counting. Use it from one event loop.
    """

    def __init__(self, database: Database | None = None) -> None:
        """Without a database there are no keys, and nobody is asked for one."""
        self._database = database
        #: Whether callers are asked for a key.
        self.asks = False
        #: Whether they are asked even where no key is left: others than this machine reach the service.
        self._always = False
        #: How many keys are not revoked, and whether one of them is for admin calls.
        self.count = 0
        self.has_admin = False
        self._mark: str | None = None
        self._holders: dict[bytes, Holder] = {}
        self._by_id: dict[str, Holder] = {}
        #: Keys that were used and whose use is not noted, and when a use was noted last (monotonic seconds).
        self._used: set[str] = set()
        self._noted: dict[str, float] = {}
        self._waiting: dict[asyncio.Future[None], tuple[str, Scope]] = {}
        self.looking = Background("keys", self._look_on)
        self.noting = Background("uses of keys", self._note_on)

    async def start(self) -> None:
        """Read the keys, and follow them from here on. Raises Unavailable."""
        await self.look()
        self.looking.start()
        self.noting.start()

    async def stop(self) -> None:
        """Follow them no more."""
        await self.looking.stop(grace_seconds=0)
        await self.noting.stop(grace_seconds=0)

    def always_ask(self) -> None:
        """Ask for a key also where there is none, so that nobody gets in once the last one is revoked."""
        self._always = self.asks = True

    def holder(self, secret: bytes) -> Holder | None:
        """Return who holds this key; None: it is none, or counts no more. One hash, and one look into a dict."""
        digest = hashlib.sha256(secret).digest()
        found = self._holders.get(digest)
        if found is None or not hmac.compare_digest(found.digest, digest) or found.until <= time.monotonic():
            return None
        self._used.add(found.key_id)
        return found

    def lets(self, key_id: str, scope: Scope) -> bool:
        """Return whether a caller with this key ('' for none) may still do something."""
        if not self.asks:
            return True
        found = self._by_id.get(key_id)
        if found is None or found.until <= time.monotonic():
            return False
        return scope in found.scopes or Scope.ADMIN in found.scopes

    async def until_refused(self, key_id: str, scope: Scope) -> None:
        """Return once a caller may not do something any more, which it may now."""
        refused = asyncio.get_running_loop().create_future()
        self._waiting[refused] = key_id, scope
        try:
            if self.lets(key_id, scope):
                await refused
        finally:
            del self._waiting[refused]

    async def look(self) -> None:
        """Read the keys, if they have changed. Raises Unavailable."""
        if self._database is None:
            return
        asked = time.monotonic()
        found = await self._database.read(partial(_look, mark=self._mark), seconds=LOOK_SECONDS_MAX)
        if found is not None:
            mark, keys, now = found
            self._take(mark, keys, lambda at: math.inf if at is None else asked + (at - now) / MICROSECONDS)
        self._refuse()

    async def look_now(self) -> None:
        """Read the keys that this process has changed itself; where that cannot be now, a moment later."""
        with suppress(Unavailable):
            await self.look()

    def _take(self, mark: str | None, keys: Sequence[ApiKey], moment: Callable[[int | None], float]) -> None:
        counting = [each for each in keys if each.revoked_at is None]
        holders = [
            Holder(each.key_id, bytes.fromhex(each.digest), frozenset(each.scopes), moment(each.expires_at))
            for each in counting
        ]
        self._holders = {each.digest: each for each in holders}
        self._by_id = {each.key_id: each for each in holders}
        self.count = len(counting)
        self.has_admin = any(Scope.ADMIN in each.scopes for each in counting)
        self.asks = self._always or bool(counting)
        self._mark = mark

    def _refuse(self) -> None:
        """Wake those who may no more what they are doing."""
        for refused, (key_id, scope) in self._waiting.items():
            if not refused.done() and not self.lets(key_id, scope):
                refused.set_result(None)

    async def _look_on(self) -> None:
        while not self.looking.stopping:
            await self.looking.rest(LOOK_SECONDS)
            try:
                await self.look()
            except Unavailable:
                self._refuse()  # time goes on, and what is known goes on counting

    async def _note_on(self) -> None:
        while not self.noting.stopping:
            await self.noting.rest(NOTE_LOOK_SECONDS)
            await self._note()

    async def _note(self) -> None:
        """Note the last use of each key, if that was not done a moment ago."""
        moment = time.monotonic()
        due = [each for each in self._used if moment - self._noted.get(each, -math.inf) >= NOTE_SECONDS]
        if not due or self._database is None:
            return
        self._used.difference_update(due)
        self._noted = {each: at for each, at in self._noted.items() if moment - at < NOTE_SECONDS}
        self._noted |= dict.fromkeys(due, moment)
        # Where it cannot be written now, the next use after a minute tells.
        with suppress(ExpediterError):
            await self._database.write(partial(_note_uses, ids=due))


async def _look(connection: Connection, mark: str | None) -> tuple[str | None, list[ApiKey], int] | None:
    """Return the keys, their mark, and the database's time; None: `mark` is still theirs."""
    found: str | None = (await connection.fetch(_READ_MARK))[0][0]
    if found == mark:
        return None
    return found, [read_key(row) for row in await connection.fetch(_ALL)], await connection.now()


async def _note_uses(connection: Connection, ids: Sequence[str]) -> None:
    now = await connection.now()
    await connection.run(_NOTE, ids=list(ids), now=now, before=now - NOTE_SECONDS * MICROSECONDS)
