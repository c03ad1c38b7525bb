"""PostgreSQL through asyncpg: a pool that heals, COPY for rows, collisions tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import Column, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import URL
from sqlalchemy.sql import Executable

from expediter.dialects import Row, T, Transaction, server_name
from expediter.dialects.collisions import until_it_does_not_collide
from expediter.dialects.statements import Compiler
from expediter.errors import CommitUncertain, ConstraintViolated, DatabaseUnavailable, ExpediterError

#: Connections of one process, at most.
CONNECTIONS_MAX = 10
#: Seconds that connecting, and one statement, may take.
CONNECT_SECONDS_MAX = 5.0
STATEMENT_SECONDS_MAX = 30.0
#: From so many rows on, COPY costs less than it saves.
COPY_ROWS_MIN = 8

_statements = Compiler(postgresql.dialect(paramstyle="pyformat"), lambda number: f"${number}")  # type: ignore[no-untyped-call]
_COLLISIONS = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    # Two processes placed the same id or used the same key: the second try finds what the other one stored.
    asyncpg.UniqueViolationError,
)
_REFUSALS = (asyncpg.IntegrityConstraintViolationError, asyncpg.RaiseError, asyncpg.DataError)
#: What a connection raises that broke while it was used.
_BROKEN = (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
_NOW = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"


class PostgresConnection:
    """See Connection."""

    def __init__(self, raw: Any) -> None:
        """Wrap a connection of the pool."""
        self._raw = raw

    async def fetch(self, statement: Executable, **values: Any) -> list[Row]:
        """See Connection."""
        text, arguments = _statements.bind(statement, values)
        rows: list[Row] = await self._raw.fetch(text, *arguments)
        return rows

    async def run(self, statement: Executable, **values: Any) -> int:
        """See Connection."""
        text, arguments = _statements.bind(statement, values)
        # The command's tag ends with the number of rows: "UPDATE 3".
        count = (await self._raw.execute(text, *arguments)).rpartition(" ")[2]
        return int(count) if count.isdigit() else 0

    async def insert(self, table: Table, rows: Sequence[Row]) -> None:
        """See Connection."""
        names = [column.name for column in table.columns]
        if len(rows) >= COPY_ROWS_MIN:
            await self._raw.copy_records_to_table(table.name, records=rows, columns=names)
        else:
            await self._raw.executemany(f"INSERT INTO {table.name} VALUES ({_marks(len(names))})", rows)

    async def add(self, table: Table, rows: Sequence[Row]) -> None:
        """See Connection."""
        *key, value = (column.name for column in table.columns)
        text = (
            f"INSERT INTO {table.name} VALUES ({_marks(len(key) + 1)}) ON CONFLICT ({', '.join(key)})"
            f" DO UPDATE SET {value} = {table.name}.{value} + excluded.{value}"
        )
        await self._raw.executemany(text, rows)

    async def update(self, table: Table, columns: Sequence[str], keys: Sequence[str], rows: Sequence[Row]) -> None:
        """See Connection."""
        changes = ", ".join(f"{column} = ${number}" for number, column in enumerate(columns, 1))
        where = " AND ".join(f"{key} = ${number}" for number, key in enumerate(keys, len(columns) + 1))
        await self._raw.executemany(f"UPDATE {table.name} SET {changes} WHERE {where}", rows)

    async def advance(self, column: Column[int], by: int) -> int:
        """See Connection."""
        text = f"UPDATE {column.table.name} SET {column.name} = {column.name} + $1 RETURNING {column.name}"
        return int(await self._raw.fetchval(text, by))

    async def now(self) -> int:
        """See Connection."""
        return int(await self._raw.fetchval(_NOW))


def _marks(count: int) -> str:
    return ", ".join(f"${number}" for number in range(1, count + 1))


async def _roll_back(raw: Any) -> None:
    try:
        await raw.execute("ROLLBACK")
    except (*_BROKEN, asyncpg.PostgresError):
        # The connection broke in the middle of a statement; with it the server ends the transaction.
        raw.terminate()


async def _leave_as_it_is(raw: Any) -> None:
    """Reset nothing between two uses: nothing is set, listened to or locked beyond a transaction here.

    The driver's own reset is one more round trip before each answer.
    """


def dsn_of(url: URL) -> str:
    """Return the address as the driver reads it, with sslmode, sslrootcert and whatever else libpq knows."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


class PostgresDatabase:
    """A PostgreSQL database; READ COMMITTED, with explicit locks and compare-and-set."""

    durability = "power-safe"
    power_safe: Mapping[str, str] = {"synchronous_commit": "on", "fsync": "on", "full_page_writes": "on"}

    def __init__(self, url: URL) -> None:
        """Remember the address; nothing is opened yet."""
        self._url = url
        self._pool: Any = None
        self._opening = asyncio.Lock()

    def describe(self) -> str:
        """See Database."""
        return f"PostgreSQL, {server_name(self._url)}/{self._url.database or ''}"

    def position_reader(self) -> Callable[[], int] | None:
        """See Database: here it would be a round trip."""
        return None

    async def write(self, work: Transaction[T]) -> T:
        """See Database."""

        async def once() -> T:
            async with self._connection() as raw:
                return await self._transaction(raw, work)

        return await until_it_does_not_collide(once, _COLLISIONS)

    async def _transaction(self, raw: Any, work: Transaction[T]) -> T:
        try:
            await raw.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
            result = await work(PostgresConnection(raw))
        except BaseException:
            await _roll_back(raw)
            raise
        try:
            await raw.execute("COMMIT")
        except (*_BROKEN, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError) as error:
            raw.terminate()
            raise CommitUncertain(f"The commit was sent, its outcome is not known: {error}") from error
        return result

    async def read(self, work: Transaction[T]) -> T:
        """See Database."""
        async with self._connection() as raw, raw.transaction(isolation="repeatable_read", readonly=True):
            return await work(PostgresConnection(raw))

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        try:
            pool = await self._open()
            async with pool.acquire(timeout=CONNECT_SECONDS_MAX) as raw:
                yield raw
        except (ExpediterError, *_COLLISIONS):
            raise
        except _REFUSALS as error:
            raise ConstraintViolated(str(error)) from error
        except (*_BROKEN, asyncpg.PostgresError) as error:
            text = str(error) or type(error).__name__
            raise DatabaseUnavailable(f"The database cannot be used now: {text}") from error

    async def _open(self) -> Any:
        if self._pool is None:
            async with self._opening:
                if self._pool is None:
                    self._pool = await asyncpg.create_pool(
                        dsn_of(self._url),
                        min_size=1,
                        max_size=CONNECTIONS_MAX,
                        timeout=CONNECT_SECONDS_MAX,
                        command_timeout=STATEMENT_SECONDS_MAX,
                        statement_cache_size=512,
                        server_settings={"application_name": "expediter"},
                        reset=_leave_as_it_is,
                    )
        return self._pool

    async def durability_settings(self) -> dict[str, str]:
        """See Database."""
        found = {}
        async with self._connection() as raw:
            for name in ("synchronous_commit", "fsync", "full_page_writes"):
                found[name] = str(await raw.fetchval(f"SHOW {name}"))
        return found

    async def close(self) -> None:
        """See Database."""
        if self._pool is not None:
            await self._pool.close()
