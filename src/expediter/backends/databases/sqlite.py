"""SQLite: one file, one writer thread.

A transaction runs to its end inside the writer's thread without ever being suspended, so that a batch costs two
thread switches and not two per statement (docs/decisions/002-sqlite-writer-thread.md).
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Column, Table
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.engine import URL
from sqlalchemy.sql import Executable

from expediter.backends.databases import Collision, Pool, Row, T
from expediter.backends.databases.statements import Compiler
from expediter.backends.points import reach
from expediter.errors import (
    CommitUncertain,
    ConfigurationError,
    ConstraintViolated,
    DatabaseUnavailable,
    ExpediterError,
)

#: How long a writer waits for another process's write to end, in seconds.
LOCK_WAIT_SECONDS = 3.0
#: Most values in one statement; SQLite allows 32,766 by default.
VALUES_PER_STATEMENT_MAX = 30_000
#: Threads that read; SQLite readers never wait for the writer, nor it for them.
READERS = 2
#: Bytes of log after which whoever commits folds it into the database.
LOG_BYTES = 16_000_000
#: Bytes of log from which on its readers are waited for, so that it begins anew; how long and how often (seconds).
LOG_BYTES_MAX = 4 * LOG_BYTES
RESTART_WAIT_SECONDS = 0.1
RESTART_EVERY_SECONDS = 1.0

_statements = Compiler(sqlite_dialect.dialect(paramstyle="pyformat"), lambda number: "?")


def database_path(url: URL) -> Path:
    """Return the file that `sqlite:///file.db` names (four slashes: an absolute path).

    Raises ConfigurationError for an address with options, or of a database that would live in memory only.
    """
    if not url.database or ":memory:" in url.database or url.query:
        raise ConfigurationError(
            "DATABASE_URL must name a SQLite file and nothing else; a database in memory would lose orders"
        )
    return Path(url.database)


class SqliteConnection:
    """See Connection. Its methods are async but never suspend."""

    def __init__(self, raw: sqlite3.Connection) -> None:
        """Wrap an open driver connection."""
        self._raw = raw

    async def fetch(self, statement: Executable, **values: Any) -> list[Row]:
        """See Connection."""
        text, arguments = _statements.bind(statement, values)
        return self._raw.execute(text, arguments).fetchall()

    async def run(self, statement: Executable, **values: Any) -> int:
        """See Connection."""
        text, arguments = _statements.bind(statement, values)
        return self._raw.execute(text, arguments).rowcount

    async def insert(self, table: Table, rows: Sequence[Row]) -> None:
        """See Connection."""
        self._insert(table, rows)

    def _insert(self, table: Table, rows: Sequence[Row], upsert: str = "") -> None:
        width = len(rows[0])
        step = VALUES_PER_STATEMENT_MAX // width
        row_marks = f"({','.join('?' * width)})"
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            marks = ",".join([row_marks] * len(part))
            text = f"INSERT INTO {table.name} VALUES {marks} {upsert}"
            self._raw.execute(text, list(chain.from_iterable(part)))

    async def add(self, table: Table, rows: Sequence[Row]) -> None:
        """See Connection."""
        *key, value = (column.name for column in table.columns)
        upsert = f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {value} = {table.name}.{value} + excluded.{value}"
        self._insert(table, rows, upsert)

    async def update(self, table: Table, columns: Sequence[str], keys: Sequence[str], rows: Sequence[Row]) -> None:
        """See Connection."""
        changes = ", ".join(f"{column} = ?" for column in columns)
        where = " AND ".join(f"{key} = ?" for key in keys)
        found = self._raw.executemany(f"UPDATE {table.name} SET {changes} WHERE {where}", rows).rowcount
        if found != len(rows):
            raise Collision(table, found, len(rows))

    async def remove(self, table: Table, ids: Sequence[str], *, exactly: bool = True) -> None:
        """See Connection."""
        column, *_ = table.columns
        text = f"DELETE FROM {table.name} WHERE {column.name} = ?"
        found = self._raw.executemany(text, [(each,) for each in ids]).rowcount
        if exactly and found != len(ids):
            raise Collision(table, found, len(ids))

    async def append(self, last: Column[int], table: Table, rows: Sequence[Row]) -> int:
        """See Connection. Two statements for the number: RETURNING came with SQLite 3.35."""
        name, source = last.name, last.table.name
        self._raw.execute(f"UPDATE {source} SET {name} = {name} + ?", (len(rows),))
        newest = int(self._raw.execute(f"SELECT {name} FROM {source}").fetchone()[0])
        if rows:
            first = newest - len(rows) + 1
            self._insert(table, [(first + index, *row) for index, row in enumerate(rows)])
        return newest

    async def pass_over(self, last: Column[int]) -> None:
        """See Connection."""
        self._raw.execute(f"UPDATE {last.table.name} SET {last.name} = {last.name} + 1")

    async def newest(self, last: Column[int]) -> int:
        """See Connection."""
        return int(self._raw.execute(f"SELECT {last.name} FROM {last.table.name}").fetchone()[0])

    async def settled(self, last: Column[int]) -> int:
        """See Connection. Only one transaction writes at a time."""
        return await self.newest(last)

    async def now(self) -> int:
        """See Connection. SQLite has no clock of its own: this machine's."""
        return time.time_ns() // 1_000


def _drive(transaction: Coroutine[Any, Any, T]) -> T:
    try:
        transaction.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    transaction.close()
    raise RuntimeError("a SQLite transaction waited for something outside the database")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _translation(error) from error


def _translation(error: sqlite3.DatabaseError) -> ExpediterError:
    if isinstance(error, sqlite3.IntegrityError):
        return ConstraintViolated(str(error))
    if isinstance(error, sqlite3.OperationalError):
        return DatabaseUnavailable(f"The database cannot be used now: {error}")
    return DatabaseUnavailable(f"The database is damaged or not a database: {error}")


class SqliteDatabase:
    """A SQLite file: one writer thread, a few reader threads, WAL with synchronous=FULL."""

    durability = "power-safe"
    power_safe: Mapping[str, str] = {"journal_mode": "wal", "synchronous": "2"}

    def __init__(self, path: Path, *, lock_wait_seconds: float = LOCK_WAIT_SECONDS) -> None:
        """Name the file; nothing is opened yet. Another process's write is waited for `lock_wait_seconds`."""
        self.path = path
        self._lock_wait_seconds = lock_wait_seconds
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sqlite-writer")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="sqlite-reader")
        self._local = threading.local()
        self._open: list[sqlite3.Connection] = []
        #: Transactions that are under way, or wait for their thread.
        self._used = 0
        self._write_connection: sqlite3.Connection | None = None
        self._watch: sqlite3.Connection | None = None
        self._log = _Log(path)
        self._file: tuple[int, int] | None = None

    def describe(self) -> str:
        """See Database."""
        return f"SQLite {sqlite3.sqlite_version}, {self.path}"

    async def write(
        self,
        work: Callable[[SqliteConnection], Coroutine[Any, Any, T]],
        *,
        begun: Callable[[], None] | None = None,
        seconds: float | None = None,
    ) -> T:
        """See Database. The transaction holds the write lock from its start, so it never collides."""
        written = asyncio.get_running_loop().run_in_executor(self._writer, self._write, work)
        self._used += 1
        try:
            if begun is not None:
                begun()
            return await written
        finally:
            self._used -= 1

    async def rule_out(self, uncertain: CommitUncertain) -> None:
        """See Database. It ended in the writer's thread, before it was reported."""

    async def read(
        self,
        work: Callable[[SqliteConnection], Coroutine[Any, Any, T]],
        *,
        seconds: float | None = None,
        settled: Column[int] | None = None,
    ) -> T:
        """See Database."""
        self._used += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)
        finally:
            self._used -= 1

    def pool(self) -> Pool:
        """See Database: one that writes, and those that read."""
        return Pool(min(self._used, READERS + 1), len(self._open), READERS + 1)

    def position_reader(self) -> Callable[[], int] | None:
        """See Database."""
        return self._position_now

    def _position_now(self) -> int:
        # On the event loop's own thread: a WAL reader never waits for a writer, and takes some microseconds.
        try:
            watch = self._watch or self._open_watch()
            row = watch.execute("SELECT position FROM feed").fetchone()
        except sqlite3.DatabaseError as error:
            raise _translation(error) from error
        return int(row[0]) if row else 0

    def _open_watch(self) -> sqlite3.Connection:
        self._watch = self._connect(read_only=True)
        return self._watch

    def _write(self, work: Callable[[SqliteConnection], Coroutine[Any, Any, T]]) -> T:
        with _translated():
            raw = self._write_connection
            if raw is None:
                raw = self._write_connection = self._connect(read_only=False)
            self._check_file(raw)
            turn = self._log.take_turn()
            try:
                raw.execute("BEGIN IMMEDIATE")
                changes = raw.total_changes
                try:
                    result = _drive(work(SqliteConnection(raw)))
                except BaseException:
                    raw.rollback()
                    raise
                self._commit(raw)
                reach("visible")
                if turn >= 0 and raw.total_changes > changes:
                    self._log.fold(raw)
            finally:
                if turn >= 0:
                    os.close(turn)
            return result

    def _check_file(self, raw: sqlite3.Connection) -> None:
        """Raise DatabaseUnavailable when the open file is no longer the one at its path."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise DatabaseUnavailable(f"{self.path} is gone ({error.strerror}): restore it and restart") from error
        if self._file is None:
            self._file = (found.st_dev, found.st_ino)
        elif self._file != (found.st_dev, found.st_ino):
            raise DatabaseUnavailable(f"{self.path} was replaced by another file: restart the service")

    def _commit(self, raw: sqlite3.Connection) -> None:
        try:
            raw.execute("COMMIT")
        except sqlite3.OperationalError as error:
            # A full disk leaves no commit record behind; after a failed flush nobody can know.
            certain = error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY)
            if raw.in_transaction:
                raw.rollback()
            if certain:
                raise
            raise CommitUncertain(f"The commit was sent, its outcome is not known: {error}") from error

    def _read(self, work: Callable[[SqliteConnection], Coroutine[Any, Any, T]]) -> T:
        with _translated():
            raw: sqlite3.Connection | None = getattr(self._local, "connection", None)
            if raw is None:
                raw = self._local.connection = self._connect(read_only=True)
            raw.execute("BEGIN")
            try:
                return _drive(work(SqliteConnection(raw)))
            finally:
                raw.rollback()

    def _connect(self, *, read_only: bool) -> sqlite3.Connection:
        # mode=rw: a file that is gone is an error, never made anew without its orders.
        raw = sqlite3.connect(
            f"file:{quote(str(self.path))}?mode=rw",
            uri=True,
            timeout=self._lock_wait_seconds,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=512,
        )
        raw.execute("PRAGMA journal_mode=WAL")
        raw.execute("PRAGMA synchronous=FULL")
        raw.execute("PRAGMA wal_autocheckpoint=0")
        # What is longer was needed once, and is cut off when the log begins anew.
        raw.execute(f"PRAGMA journal_size_limit={LOG_BYTES}")
        raw.execute(f"PRAGMA query_only={int(read_only)}")
        self._open.append(raw)
        return raw

    async def durability_settings(self) -> dict[str, str]:
        """See Database."""

        async def work(connection: SqliteConnection) -> dict[str, str]:
            raw = connection._raw
            return {
                "journal_mode": str(raw.execute("PRAGMA journal_mode").fetchone()[0]),
                "synchronous": str(raw.execute("PRAGMA synchronous").fetchone()[0]),
            }

        return await self.write(work)

    async def close(self) -> None:
        """See Database."""
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        self._writer.shutdown()
        self._readers.shutdown()
        for raw in self._open:
            raw.close()


class _Log:
    """The write-ahead log, folded into the database by whoever commits while it is long.

    Before SQLite 3.51.3 a checkpoint of a log that is folded already, beside a commit that begins it anew, can
    lose what that commit wrote (https://sqlite.org/wal.html#walresetbug). So one process at a time has its turn,
    from before its transaction to the end of the checkpoint behind it: what it has just committed nobody else has
    folded, and until that is done no other commit can begin the log anew. Nobody keeps the turn for longer: an
    idle process would leave the others' log to grow.
    """

    def __init__(self, path: Path) -> None:
        self._path = f"{path}-wal"
        self._lock = f"{path}-checkpointer"
        self._restarted_at = -math.inf
        self._size = 0

    def take_turn(self) -> int:
        """Return the descriptor that holds the turn; -1: the log is short, or somebody else has it."""
        try:
            self._size = os.stat(self._path).st_size
            if self._size <= LOG_BYTES:
                return -1
            turn = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return -1
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(turn)
            return -1
        return turn

    def fold(self, raw: sqlite3.Connection) -> None:
        """Fold the log, right after a commit that has written; what fails is left to the next."""
        with suppress(sqlite3.OperationalError):
            now = time.monotonic()
            if self._size <= LOG_BYTES_MAX or now - self._restarted_at <= RESTART_EVERY_SECONDS:
                # Nobody waits for anybody; but while a reader still reads from it the log does not begin anew.
                raw.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                return
            self._restarted_at = now
            (wait,) = raw.execute("PRAGMA busy_timeout").fetchone()
            raw.execute(f"PRAGMA busy_timeout={int(RESTART_WAIT_SECONDS * 1000)}")
            try:
                raw.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            finally:
                raw.execute(f"PRAGMA busy_timeout={wait}")
