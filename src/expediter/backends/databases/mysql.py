"""MariaDB and MySQL through asyncmy: a pool that heals, many rows a statement, collisions tried again."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncmy
from asyncmy import errors as mysql_errors
from sqlalchemy import Column, Table
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import URL
from sqlalchemy.sql import Executable

from expediter.backends.databases import READ_SECONDS_MAX, WRITE_SECONDS_MAX, Collision, Pool, Row, T, Transaction
from expediter.backends.databases.clock import ServerClock
from expediter.backends.databases.server import LOCK_SECONDS_MAX, ROLL_BACK_SECONDS_MAX, ServerDatabase
from expediter.backends.databases.statements import Compiler
from expediter.backends.points import reach
from expediter.errors import (
    CommitUncertain,
    ConfigurationError,
    ConstraintViolated,
    DatabaseUnavailable,
    ExpediterError,
    reason,
)

#: Connections of one process, at most.
CONNECTIONS_MAX = 10
#: Seconds that connecting may take.
CONNECT_SECONDS_MAX = 4.0
_SESSION = (
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED; "
    f"SET SESSION lock_wait_timeout = {LOCK_SECONDS_MAX}, innodb_lock_wait_timeout = {LOCK_SECONDS_MAX}"
)
#: Rows in one statement, at most.
ROWS_PER_STATEMENT_MAX = 50
#: Bytes of one statement of several rows, at most. A server with a smaller `max_allowed_packet` is refused at the
#: start: the largest order, 1 MiB as it comes in, is up to 2.5 MiB as a row's text.
STATEMENT_BYTES_MAX = 4 * 1024 * 1024

_statements = Compiler(mysql.dialect(paramstyle="pyformat"), lambda number: "%s")
_TLS_MODES = ("DISABLED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
#: Deadlock, lock wait timeout, record changed since it was read, duplicate key.
_COLLISIONS = frozenset({1213, 1205, 1020, 1062})
#: CHECK constraint (MariaDB, MySQL), SIGNAL of a trigger, null, out of range, too long, longer than a packet.
_REFUSALS = frozenset({4025, 3819, 1644, 1048, 1264, 1406, 1366, 1153})
#: What tells of the server or of the session rather than of the statement (read-only, shutting down, out of memory
#: or disk, not ready in its cluster): such a session may stay so. It is given up, and the next one is new.
_GONE_BAD = frozenset(
    {1290, 1792, 1836, 1053, 1021, 1037, 1041, 1047, 1077, 1079, 1153, 1158, 1159, 1160, 1161, 3159}
)
#: Without a detour by the server's own time zone, in which an hour comes twice a year.
_NOW = "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))"


class _Collided(Exception):
    """The driver's error says that the transaction collided with another one."""


class MysqlConnection:
    """See Connection."""

    def __init__(self, cursor: Any, clock: ServerClock) -> None:
        """Wrap a cursor of a connection of the pool."""
        self._cursor = cursor
        self._clock = clock

    async def fetch(self, statement: Executable, **values: Any) -> list[Row]:
        """See Connection."""
        text, arguments = _statements.bind(statement, values)
        await self._cursor.execute(text, arguments)
        return list(await self._cursor.fetchall())

    async def run(self, statement: Executable, **values: Any) -> int:
        """See Connection."""
        text, arguments = _statements.bind(statement, values)
        return int(await self._cursor.execute(text, arguments))

    async def insert(self, table: Table, rows: Sequence[Row]) -> None:
        """See Connection."""
        await self._insert(table, rows)

    async def _insert(self, table: Table, rows: Sequence[Row], upsert: str = "") -> None:
        marks = f"({', '.join(['%s'] * len(table.columns))})"
        await self._of_rows(rows, lambda n: f"INSERT INTO {table.name} VALUES {', '.join([marks] * n)} {upsert}")

    async def _of_rows(self, rows: Sequence[Row], text_of: Callable[[int], str]) -> int:
        """Carry out statements of many rows, none too long for the server; return how many rows they found.

        `text_of` makes the statement for so many rows.
        """
        found = 0
        for start in range(0, len(rows), ROWS_PER_STATEMENT_MAX):
            part = rows[start : start + ROWS_PER_STATEMENT_MAX]
            text = self._cursor.mogrify(text_of(len(part)), [value for row in part for value in row])
            # A character has four bytes at most.
            if len(part) > 1 and len(text) > STATEMENT_BYTES_MAX // 4 and len(text.encode()) > STATEMENT_BYTES_MAX:
                middle = len(part) // 2
                found += await self._of_rows(part[:middle], text_of)
                found += await self._of_rows(part[middle:], text_of)
            else:
                found += await self._cursor.execute(text)
        return found

    async def add(self, table: Table, rows: Sequence[Row]) -> None:
        """See Connection."""
        value = list(table.columns)[-1].name
        await self._insert(table, rows, f"ON DUPLICATE KEY UPDATE {value} = {value} + VALUES({value})")

    async def update(self, table: Table, columns: Sequence[str], keys: Sequence[str], rows: Sequence[Row]) -> None:
        """See Connection. There is no UPDATE of many rows from values here, so it joins with a made-up table."""
        names = [*columns, *keys]
        first = ", ".join(f"%s AS c{number}" for number in range(len(names)))
        other = ", ".join(["%s"] * len(names))
        changes = ", ".join(f"t.{name} = v.c{number}" for number, name in enumerate(columns))
        on = " AND ".join(f"t.{name} = v.c{number}" for number, name in enumerate(keys, len(columns)))

        def text_of(number: int) -> str:
            made_up = " UNION ALL ".join([f"SELECT {first}"] + [f"SELECT {other}"] * (number - 1))
            return f"UPDATE {table.name} t JOIN ({made_up}) v ON {on} SET {changes}"

        found = await self._of_rows(rows, text_of)
        if found != len(rows):
            raise Collision(table, found, len(rows))

    async def remove(self, table: Table, ids: Sequence[str], *, exactly: bool = True) -> None:
        """See Connection."""
        column, *_ = table.columns
        marks = ", ".join(["%s"] * len(ids))
        found = await self._cursor.execute(f"DELETE FROM {table.name} WHERE {column.name} IN ({marks})", list(ids))
        if exactly and found != len(ids):
            raise Collision(table, found, len(ids))

    async def append(self, last: Column[int], table: Table, rows: Sequence[Row]) -> int:
        """See Connection. There is no RETURNING here: LAST_INSERT_ID(x) comes back with the statement's answer."""
        name = last.name
        text = f"UPDATE {last.table.name} SET {name} = LAST_INSERT_ID({name} + %s)"
        await self._cursor.execute(text, [len(rows)])
        newest = int(self._cursor.lastrowid)
        first = newest - len(rows) + 1
        await self._insert(table, [(first + index, *row) for index, row in enumerate(rows)])
        return newest

    async def pass_over(self, last: Column[int]) -> None:
        """See Connection."""
        await self._cursor.execute(f"UPDATE {last.table.name} SET {last.name} = {last.name} + 1")

    async def newest(self, last: Column[int]) -> int:
        """See Connection."""
        await self._cursor.execute(f"SELECT {last.name} FROM {last.table.name}")
        return int((await self._cursor.fetchone())[0])

    async def settled(self, last: Column[int]) -> int:
        """See Connection. Its row is locked until what was given a number has ended."""
        return await self.newest(last)

    async def now(self) -> int:
        """See Connection."""
        return await self._clock.now(self._ask_the_time)

    async def _ask_the_time(self) -> int:
        await self._cursor.execute(_NOW)
        return int((await self._cursor.fetchone())[0])


async def _roll_back(raw: Any) -> None:
    """End a transaction without its changes; where the server does not answer, by ending the connection."""
    if not raw.connected:
        return
    try:
        async with asyncio.timeout(ROLL_BACK_SECONDS_MAX):
            await raw.rollback()
    except (mysql_errors.MySQLError, OSError, TimeoutError):
        raw.close()


def tls_of(url: URL) -> ssl.SSLContext | None:
    """Return how `?ssl_mode=` and `?ssl_ca=` ask for TLS; None: not at all.

    REQUIRED encrypts, VERIFY_CA checks the certificate, VERIFY_IDENTITY (what `ssl_ca` alone asks for) the name in
    it, too. Raises ConfigurationError.
    """
    unknown = sorted(url.query.keys() - {"ssl_mode", "ssl_ca"})
    authorities = url.query.get("ssl_ca")
    mode = url.query.get("ssl_mode") or ("VERIFY_IDENTITY" if authorities else "DISABLED")
    if unknown or mode not in _TLS_MODES or isinstance(authorities, tuple):
        raise ConfigurationError(
            f"DATABASE_URL: {', '.join(unknown) or 'ssl_mode'} is not understood; for MariaDB and MySQL there are "
            f"ssl_ca (a file) and ssl_mode ({', '.join(_TLS_MODES)})"
        )
    if mode == "DISABLED":
        return None
    try:
        context = ssl.create_default_context(cafile=authorities)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"DATABASE_URL: ssl_ca={authorities} cannot be read: {error}") from error
    context.check_hostname = mode == "VERIFY_IDENTITY"
    if mode == "REQUIRED":
        context.verify_mode = ssl.CERT_NONE
    return context


class MysqlDatabase(ServerDatabase):
    """A MariaDB or MySQL database (InnoDB)."""

    kind = "MariaDB/MySQL"
    collisions = (Collision, _Collided)
    power_safe: Mapping[str, str] = {"innodb_flush_log_at_trx_commit": "1", "innodb_doublewrite": "1"}

    def __init__(self, url: URL) -> None:
        """Remember the address; nothing is opened yet. Raises ConfigurationError."""
        tls_of(url)
        super().__init__(url)

    async def _transaction(
        self, raw: Any, work: Transaction[T], begun: Callable[[], None] | None, ends: float | None
    ) -> T:
        try:
            async with asyncio.timeout_at(ends):
                await raw.begin()
                if begun is not None:
                    begun()
                async with raw.cursor() as cursor:
                    result = await work(MysqlConnection(cursor, self._clock))
        except TimeoutError:
            raw.close()
            raise
        except BaseException:
            await _roll_back(raw)
            raise
        try:
            async with asyncio.timeout(WRITE_SECONDS_MAX):
                await raw.commit()
        except (mysql_errors.OperationalError, mysql_errors.InterfaceError, OSError, TimeoutError) as error:
            raise CommitUncertain(f"The commit was sent, its outcome is not known: {reason(error)}") from error
        reach("visible")
        return result

    async def rule_out(self, uncertain: CommitUncertain) -> None:
        """See Database. It holds the lock on the feed until it has ended, and whoever looks waits for that."""

    async def read(
        self,
        work: Transaction[T],
        *,
        seconds: float | None = READ_SECONDS_MAX,
        settled: Column[int] | None = None,
    ) -> T:
        """See Database."""
        async with self._connection() as raw:
            try:
                async with asyncio.timeout(seconds), raw.cursor() as cursor:
                    await cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                    await cursor.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
                    return await work(MysqlConnection(cursor, self._clock))
            except TimeoutError:
                raw.close()
                raise
            finally:
                await _roll_back(raw)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        try:
            raw, pool = await self._acquire()
            try:
                yield raw
            except mysql_errors.MySQLError as error:
                if error.args and error.args[0] in _GONE_BAD:
                    raw.close()
                raise
            finally:
                pool.release(raw)
        except (ExpediterError, Collision):
            raise
        except (mysql_errors.MySQLError, OSError, TimeoutError) as error:
            code = error.args[0] if error.args else 0
            if code in _COLLISIONS:
                raise _Collided(str(error)) from error
            if code in _REFUSALS:
                raise ConstraintViolated(str(error)) from error
            raise DatabaseUnavailable(f"The database cannot be used now: {reason(error)}") from error

    async def _acquire(self) -> tuple[Any, Any]:
        try:
            pool = await self._open()
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                return await pool.acquire(), pool
        except RuntimeError as error:
            # So the driver calls a connection that the server closed at once; it does as it ends or begins.
            raise DatabaseUnavailable(f"The database cannot be used now: {error}") from error

    async def _connect(self) -> Any:
        return await asyncmy.create_pool(
            host=self._url.host or "localhost",
            port=self._url.port or 3306,
            user=self._url.username or "root",
            password=self._url.password or "",
            db=self._url.database,
            ssl=tls_of(self._url),
            charset="utf8mb4",
            minsize=1,
            maxsize=CONNECTIONS_MAX,
            connect_timeout=CONNECT_SECONDS_MAX,
            autocommit=False,
            # Affected rows are those found, not those changed: compare-and-set counts on it.
            client_flag=2,
            init_command=_SESSION,
        )

    def pool(self) -> Pool:
        """See Database."""
        if self._pool is None:
            return Pool(0, 0, CONNECTIONS_MAX)
        return Pool(self._pool.size - self._pool.freesize, self._pool.size, CONNECTIONS_MAX)

    async def durability_settings(self) -> dict[str, str]:
        """See Database."""
        found = {}
        async with self._connection() as raw, raw.cursor() as cursor:
            for name in self.power_safe:
                await cursor.execute(f"SELECT @@GLOBAL.{name}")
                told = str((await cursor.fetchone())[0])
                # Some versions say ON where others say 1.
                found[name] = {"ON": "1", "OFF": "0"}.get(told, told)
            await raw.rollback()
        return found

    async def close(self) -> None:
        """See Database."""
        if self._pool is not None:
            self._pool.close()
            # A connection that was never given back must not keep the process from its end.
            with suppress(TimeoutError):
                async with asyncio.timeout(CONNECT_SECONDS_MAX):
                    await self._pool.wait_closed()
