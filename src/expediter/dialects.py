"""All that differs between databases: addresses, connections, transactions, bulk statements, foreign errors.

A transaction is an async function over a `Connection`. On SQLite it runs to its end inside one thread without
ever being suspended, so that a batch costs two thread switches and not two per statement
(docs/decisions/002-sqlite-writer-thread.md).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Table
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.sql import Executable

from expediter.errors import CommitUncertain, ConfigurationError, ConstraintViolated, DatabaseUnavailable

T = TypeVar("T")
Row = Sequence[Any]

#: How long a writer waits for another process's write to end, in seconds.
LOCK_WAIT_SECONDS = 5.0
#: Most values in one statement; SQLite allows 32,766 by default.
VALUES_PER_STATEMENT_MAX = 30_000
#: Threads that read; SQLite readers never wait for the writer, nor it for them.
READERS = 2
#: How many commits pass before a process asks again whether it may be the one that checkpoints.
CHECKPOINTER_ASKS_EVERY_COMMITS = 256
#: Pages of log (4 KiB each) after which the log is folded into the database.
CHECKPOINT_PAGES = 4_000

_DIALECT = sqlite_dialect.dialect(paramstyle="qmark")


def database_path(url: str) -> Path:
    """Return the file that a `sqlite:///file.db` address names (four slashes: an absolute path).

    Raises ConfigurationError for an address of another kind or with options, or of a database that would live in
    memory only.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigurationError(f"DATABASE_URL cannot be read: {error}") from error
    if parsed.get_backend_name() != "sqlite":
        raise ConfigurationError(
            f"DATABASE_URL names a {parsed.get_backend_name()} database; "
            "this version stores orders in SQLite: sqlite:///expediter.db"
        )
    if not parsed.database or ":memory:" in parsed.database or parsed.query:
        raise ConfigurationError(
            "DATABASE_URL must name a SQLite file and nothing else; a database in memory would lose orders"
        )
    return Path(parsed.database)


class Connection:
    """One connection inside one transaction. Its methods are async but never suspend on SQLite."""

    def __init__(self, raw: sqlite3.Connection) -> None:
        """Wrap an open driver connection."""
        self._raw = raw

    async def fetch(self, statement: Executable, **values: Any) -> list[Row]:
        """Return the rows of a Core statement; a list value fills an expanding `IN`."""
        text, arguments = _bind(statement, values)
        return self._raw.execute(text, arguments).fetchall()

    async def run(self, statement: Executable, **values: Any) -> int:
        """Carry out a Core statement and return how many rows it changed."""
        text, arguments = _bind(statement, values)
        return self._raw.execute(text, arguments).rowcount

    async def insert(self, table: Table, rows: Sequence[Row], *, upsert: str = "") -> None:
        """Insert rows (each as wide as the table), many in one statement; `upsert` is appended to it."""
        width = len(table.columns)
        step = VALUES_PER_STATEMENT_MAX // width
        row_marks = f"({','.join('?' * width)})"
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            marks = ",".join([row_marks] * len(part))
            text = f"INSERT INTO {table.name} VALUES {marks} {upsert}"
            self._raw.execute(text, [value for row in part for value in row])

    async def add(self, table: Table, rows: Sequence[Row]) -> None:
        """Insert rows whose last column is a sum; where the key exists, add to it instead."""
        *key, value = (column.name for column in table.columns)
        upsert = f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {value} = {table.name}.{value} + excluded.{value}"
        await self.insert(table, rows, upsert=upsert)

    async def update(self, table: Table, columns: Sequence[str], keys: Sequence[str], rows: Sequence[Row]) -> None:
        """Set `columns` of the rows that `keys` find; each row: the columns' values, then the keys'."""
        changes = ", ".join(f"{column} = ?" for column in columns)
        where = " AND ".join(f"{key} = ?" for key in keys)
        self._raw.executemany(f"UPDATE {table.name} SET {changes} WHERE {where}", rows)

    async def now(self) -> int:
        """Return the database's time in microseconds (SQLite has none of its own: this machine's)."""
        return time.time_ns() // 1_000


#: (text with one mark per expanding list, names of the values in order, defaults), by statement.
_Compiled = tuple[str, list[str], dict[str, Any]]
_compiled: dict[int, tuple[Executable, _Compiled]] = {}


def _compile(statement: Executable) -> _Compiled:
    # The statement is kept beside its text: an id is only unique while the object lives.
    known = _compiled.get(id(statement))
    if known is None:
        compiled = statement.compile(dialect=_DIALECT)  # type: ignore[attr-defined]
        known = (statement, (str(compiled), list(compiled.positiontup or ()), dict(compiled.params)))
        if len(_compiled) < 512:
            _compiled[id(statement)] = known
    return known[1]


def _bind(statement: Executable, values: dict[str, Any]) -> tuple[str, list[Any]]:
    text, names, defaults = _compile(statement)
    arguments: list[Any] = []
    for name in names:
        value = values[name] if name in values else defaults[name]
        if isinstance(value, list):
            # Lists are padded to a power of two with their last value: few texts, so few are prepared anew.
            size = 1 << (len(value) - 1).bit_length()
            text = text.replace(f"__[POSTCOMPILE_{name}]", ",".join("?" * size))
            arguments += value + value[-1:] * (size - len(value))
        else:
            arguments.append(value)
    return text, arguments


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
    except sqlite3.IntegrityError as error:
        raise ConstraintViolated(str(error)) from error
    except sqlite3.OperationalError as error:
        raise DatabaseUnavailable(f"The database cannot be used now: {error}") from error
    except sqlite3.DatabaseError as error:
        raise DatabaseUnavailable(f"The database is damaged or not a database: {error}") from error


class SqliteDatabase:
    """A SQLite file: one writer thread, a few reader threads, WAL with synchronous=FULL."""

    durability = "power-safe"

    def __init__(self, path: Path, *, lock_wait_seconds: float = LOCK_WAIT_SECONDS) -> None:
        """Name the file; nothing is opened yet. Another process's write is waited for `lock_wait_seconds`."""
        self.path = path
        self._lock_wait_seconds = lock_wait_seconds
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sqlite-writer")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="sqlite-reader")
        self._local = threading.local()
        self._open: list[sqlite3.Connection] = []
        self._write_connection: sqlite3.Connection | None = None
        self._watch: sqlite3.Connection | None = None
        self._checkpointer = _CheckpointerLock(path.with_name(path.name + "-checkpointer"))
        self._commits = 0

    def describe(self) -> str:
        """Return the database in a few words, for people."""
        return f"SQLite {sqlite3.sqlite_version}, {self.path}"

    async def write(self, work: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        """Run `work` in a transaction that holds the write lock from its start, and commit it.

        Raises what `work` raises (nothing is stored then), DatabaseUnavailable (nothing is stored),
        ConstraintViolated (nothing is stored) or CommitUncertain. Cancelling the caller does not stop it.
        """
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._write, work)

    async def read(self, work: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        """Run `work` on one consistent snapshot. Raises DatabaseUnavailable."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    def position_now(self) -> int:
        """Return the position of the newest event that any process committed; takes some microseconds.

        Called on the event loop's own thread: a WAL reader never waits for a writer.
        """
        with _translated():
            if self._watch is None:
                self._watch = self._connect(read_only=True)
            row = self._watch.execute("SELECT position FROM feed").fetchone()
        return int(row[0]) if row else 0

    def _write(self, work: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        with _translated():
            raw = self._write_connection
            if raw is None:
                raw = self._write_connection = self._connect(read_only=False)
            if self._commits % CHECKPOINTER_ASKS_EVERY_COMMITS == 0 and self._checkpointer.acquire():
                raw.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
            self._commits += 1
            raw.execute("BEGIN IMMEDIATE")
            try:
                result = _drive(work(Connection(raw)))
            except BaseException:
                raw.rollback()
                raise
            self._commit(raw)
            return result

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

    def _read(self, work: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        with _translated():
            raw: sqlite3.Connection | None = getattr(self._local, "connection", None)
            if raw is None:
                raw = self._local.connection = self._connect(read_only=True)
            raw.execute("BEGIN")
            try:
                return _drive(work(Connection(raw)))
            finally:
                raw.rollback()

    def _connect(self, *, read_only: bool) -> sqlite3.Connection:
        raw = sqlite3.connect(
            self.path,
            timeout=self._lock_wait_seconds,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=512,
        )
        raw.execute("PRAGMA journal_mode=WAL")
        raw.execute("PRAGMA synchronous=FULL")
        # Below SQLite 3.51.3 two connections that checkpoint at once can damage the file: only the writer of
        # one process does, the one that holds the checkpointer's lock.
        raw.execute("PRAGMA wal_autocheckpoint=0")
        raw.execute(f"PRAGMA query_only={int(read_only)}")
        self._open.append(raw)
        return raw

    async def durability_settings(self) -> dict[str, str]:
        """Return what the open database says of the settings that decide on durability."""

        async def work(connection: Connection) -> dict[str, str]:
            raw = connection._raw
            return {
                "journal_mode": str(raw.execute("PRAGMA journal_mode").fetchone()[0]),
                "synchronous": str(raw.execute("PRAGMA synchronous").fetchone()[0]),
            }

        return await self.write(work)

    async def close(self) -> None:
        """Finish what runs, then close every connection."""
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        self._writer.shutdown()
        self._readers.shutdown()
        for raw in self._open:
            raw.close()
        self._checkpointer.release()


class _CheckpointerLock:
    """A file lock (flock) that one process holds for as long as it lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def acquire(self) -> bool:
        """Return True when this call took the lock, False when it is held already, here or elsewhere."""
        if self._descriptor >= 0:
            return False
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


Transaction = Callable[[Connection], Awaitable[T]]


def open_database(url: str) -> SqliteDatabase:
    """Return the database that `url` names; nothing is opened yet. Raises ConfigurationError."""
    path = database_path(url)
    if not path.parent.is_dir():
        raise ConfigurationError(
            f"The folder of the database, {path.parent}, does not exist: create it, or change DATABASE_URL"
        )
    return SqliteDatabase(path)
