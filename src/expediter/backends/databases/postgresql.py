"""PostgreSQL through asyncpg: a pool that heals, COPY for rows, collisions tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import asyncpg
import uuid_utils
from sqlalchemy import Column, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import URL
from sqlalchemy.sql import Executable

from expediter.backends.databases import READ_SECONDS_MAX, WRITE_SECONDS_MAX, Collision, Pool, Row, T, Transaction
from expediter.backends.databases.clock import ServerClock
from expediter.backends.databases.postgresql_bulk import (
    Pending,
    addition,
    appending,
    ask_settled,
    check,
    counts,
    insertion,
    named,
    removal,
    sequence_of,
    updating,
)
from expediter.backends.databases.server import LOCK_SECONDS_MAX, ROLL_BACK_SECONDS_MAX, ServerDatabase
from expediter.backends.databases.statements import Compiler
from expediter.backends.points import reach
from expediter.errors import CommitUncertain, ConstraintViolated, DatabaseUnavailable, ExpediterError, reason

#: Connections of one process, at most.
CONNECTIONS_MAX = 10
#: Seconds that connecting may take, and one statement where its transaction has no shorter time.
CONNECT_SECONDS_MAX = 4.0
STATEMENT_SECONDS_MAX = 60.0
#: How often, and after how many seconds again, it is asked whether a broken connection's process has ended.
ENDS_WITHIN_LOOKS = 50
LOOK_AGAIN_SECONDS = 0.02
#: From so many rows on, COPY: it has its own round trip, and costs less by the row.
COPY_ROWS_MIN = 1000

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
#: What tells of the server or of the session rather than of the statement: a session of a server that was demoted
#: or made read-only stays so when that is over. It is given up, and the next one is new.
_GONE_BAD = (
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InvalidTransactionStateError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.InternalServerError,
)
_END = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1"
_NOW = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"


class _Session(asyncpg.Connection):  # type: ignore[misc]
    """A connection that the server knows by a name of its own (`application_name`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = f"expediter {uuid_utils.uuid4().hex[:12]}"


class PostgresConnection:
    """See Connection."""

    def __init__(
        self,
        raw: Any,
        clock: ServerClock,
        *,
        is_open: bool = False,
        begun: Callable[[], None] | None = None,
        settled: int | None = None,
    ) -> None:
        """Wrap a connection of the pool, in a transaction already (`is_open`) or not; `begun`: see write.

        `settled` was asked for before its snapshot was taken.
        """
        #: Whether there is a transaction that has to be ended.
        self.is_open = is_open
        self._raw = raw
        self._clock = clock
        self._begun = begun
        #: Whether all of it sees one snapshot, and up to which number rows were settled before that was taken.
        self._snapshot = is_open
        self._settled = settled
        #: Changes that were asked for and not sent yet, each with its rows.
        self._changes: list[Pending] = []

    async def _begin(self) -> None:
        """Open the transaction with its first statement; one that has no other needs none."""
        if not self.is_open:
            self.is_open = True
            await self._raw.execute("BEGIN")
            if self._begun is not None:
                self._begun()

    async def fetch(self, statement: Executable, **values: Any) -> list[Row]:
        """See Connection."""
        await self._begin()
        await self.flush()
        text, arguments = _statements.bind(statement, values)
        rows: list[Row] = await self._raw.fetch(text, *arguments)
        return rows

    async def run(self, statement: Executable, **values: Any) -> int:
        """See Connection."""
        await self._begin()
        await self.flush()
        text, arguments = _statements.bind(statement, values)
        # The command's tag ends with the number of rows: "UPDATE 3".
        count = (await self._raw.execute(text, *arguments)).rpartition(" ")[2]
        return int(count) if count.isdigit() else 0

    async def insert(self, table: Table, rows: Sequence[Row]) -> None:
        """See Connection."""
        if len(rows) >= COPY_ROWS_MIN:
            await self._begin()
            await self.flush()
            names = [column.name for column in table.columns]
            await self._raw.copy_records_to_table(table.name, records=rows, columns=names)
        else:
            self._changes.append(Pending(table, insertion(table), rows))

    async def add(self, table: Table, rows: Sequence[Row]) -> None:
        """See Connection."""
        self._changes.append(Pending(table, addition(table), rows))

    async def update(self, table: Table, columns: Sequence[str], keys: Sequence[str], rows: Sequence[Row]) -> None:
        """See Connection."""
        self._changes.append(Pending(table, updating(table, tuple(columns), tuple(keys)), rows, exactly=True))

    async def remove(self, table: Table, ids: Sequence[str], *, exactly: bool = True) -> None:
        """See Connection."""
        self._changes.append(Pending(table, removal(table), [(each,) for each in ids], exactly=exactly))

    async def append(self, last: Column[int], table: Table, rows: Sequence[Row]) -> int:
        """See Connection."""
        # All in one statement with the changes before it; the numbers are taken last. Where nothing was read
        # before, that statement is the whole transaction, and commits by itself.
        pending, changes, values = self._kept_back()
        statement = appending(last, table)
        text = statement.text(changes, len(values) + 1)
        values += statement.rows.arrays(rows)
        if self.is_open:
            newest, *found = await self._raw.fetchrow(text, *values)
            check(pending, found)
            return int(newest)
        # Only what was read is changed: what is here inserts, and either does so or fails.
        assert not any(each.exactly for each in pending)
        if self._begun is not None:
            self._begun()
        with _uncertain(self._raw):
            return int(await self._raw.fetchval(text, *values))

    async def pass_over(self, last: Column[int]) -> None:
        """See Connection."""
        await self._begin()
        name = sequence_of(last)
        await self._raw.execute(f"SELECT nextval('{name}') FROM {name}_hold()")

    async def newest(self, last: Column[int]) -> int:
        """See Connection. A sequence is what it is, whatever the snapshot."""
        await self._begin()
        return int(await self._raw.fetchval(f"SELECT last_value FROM {sequence_of(last)}"))

    async def settled(self, last: Column[int]) -> int:
        """See Connection."""
        if self._settled is not None:
            return self._settled
        # It is enough to ask before where each statement sees what was committed before that statement.
        assert not self._snapshot
        await self._begin()
        return int(await self._raw.fetchval(ask_settled(last)))

    async def flush(self) -> None:
        """Carry out the changes that were asked for: in one statement, because each one is a round trip."""
        pending, changes, values = self._kept_back()
        if changes:
            await self._begin()
            found = ", ".join(counts(len(changes)))
            check(pending, await self._raw.fetchrow(f"WITH {named(changes)} SELECT {found}", *values))

    def _kept_back(self) -> tuple[list[Pending], list[str], list[Any]]:
        pending, self._changes = self._changes, []
        texts: list[str] = []
        values: list[Any] = []
        for each in pending:
            texts.append(f"{each.change.text(len(values) + 1)} RETURNING 1")
            values += each.change.arrays(each.rows)
        return pending, texts, values

    async def now(self) -> int:
        """See Connection."""
        return await self._clock.now(self._ask_the_time)

    async def _ask_the_time(self) -> int:
        return int(await self._raw.fetchval(_NOW))


@contextmanager
def _uncertain(raw: Any) -> Iterator[None]:
    """Around what commits: if the connection breaks in it, nobody knows whether it took place."""
    name = getattr(raw, "name", None)  # one that has broken already is the pool's again, and has none
    try:
        yield
    except (*_BROKEN, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError) as error:
        _terminate(raw)
        uncertain = CommitUncertain(f"The commit was sent, its outcome is not known: {reason(error)}")
        uncertain.session = name
        raise uncertain from error


def _terminate(raw: Any) -> None:
    with suppress(asyncpg.InterfaceError):  # it broke, and the pool has taken it back already
        raw.terminate()


async def _roll_back(raw: Any) -> None:
    try:
        await raw.execute("ROLLBACK", timeout=ROLL_BACK_SECONDS_MAX)
    except (*_BROKEN, asyncpg.PostgresError):
        # The connection broke in the middle of a statement; with it the server ends the transaction.
        _terminate(raw)


#: Every statement of the service goes by an index. Without this, PostgreSQL would plan them while the tables are
#: nearly empty, read these whole, and keep that plan while they grow, until it next gathers statistics
#: (docs/decisions/013-plans-on-postgresql.md). Compiling a statement costs more here than it can save.
_PLANNING = "; ".join(
    f"SET {name} = off"
    for name in ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "jit")
)
_ISOLATION = "SET default_transaction_isolation = 'read committed'"
#: Seconds after which a transaction whose client says nothing more is rolled back. A process asks for the next
#: statement at once, unless it is gone unheard or stands still, and others may wait for what it has locked.
IDLE_SECONDS_MAX = 3
_LIMITS = (
    f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS_MAX}s'; SET lock_timeout = '{LOCK_SECONDS_MAX}s'"
)


async def _prepare(raw: Any) -> None:
    await raw.execute(f"SET application_name = '{raw.name}'; {_PLANNING}; {_ISOLATION}; {_LIMITS}")


async def _leave_as_it_is(raw: Any) -> None:
    """Reset nothing between two uses, which is a round trip: nothing here outlives a transaction."""


def dsn_of(url: URL) -> str:
    """Return the address as the driver reads it, with sslmode, sslrootcert and whatever else libpq knows."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


class PostgresDatabase(ServerDatabase):
    """A PostgreSQL database."""

    kind = "PostgreSQL"
    collisions = (Collision, *_COLLISIONS)
    power_safe: Mapping[str, str] = {"synchronous_commit": "on", "fsync": "on", "full_page_writes": "on"}

    async def _transaction(
        self, raw: Any, work: Transaction[T], begun: Callable[[], None] | None, ends: float | None
    ) -> T:
        connection = PostgresConnection(raw, self._clock, begun=begun)
        try:
            async with asyncio.timeout_at(ends):
                result = await work(connection)
                await connection.flush()
        except TimeoutError:
            _terminate(raw)
            raise
        except BaseException:
            if connection.is_open:
                await _roll_back(raw)
            raise
        if connection.is_open:
            with _uncertain(raw):
                await raw.execute("COMMIT", timeout=WRITE_SECONDS_MAX)
        reach("visible")
        return result

    async def rule_out(self, uncertain: CommitUncertain) -> None:
        """See Database.

        A server that lost its client goes on with the statement that it has, or that lies in its socket yet, and
        commits it. So its process is ended, which one's own role may do.
        """
        for _ in range(ENDS_WITHIN_LOOKS):
            async with self._connection() as raw:
                if not await raw.fetchval(_END, uncertain.session):
                    return
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
        raise DatabaseUnavailable("The database is still at work on a transaction whose connection broke")

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
                async with asyncio.timeout(seconds):
                    known = None if settled is None else int(await raw.fetchval(ask_settled(settled)))
                    async with raw.transaction(isolation="repeatable_read", readonly=True):
                        return await work(PostgresConnection(raw, self._clock, is_open=True, settled=known))
            except TimeoutError:
                _terminate(raw)
                raise

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        try:
            pool = await self._open()
            async with pool.acquire(timeout=CONNECT_SECONDS_MAX) as raw:
                try:
                    yield raw
                except _GONE_BAD:
                    _terminate(raw)
                    await pool.expire_connections()  # the others have come from the same server
                    raise
        except (ExpediterError, Collision, *_COLLISIONS):
            raise
        except _REFUSALS as error:
            raise ConstraintViolated(str(error)) from error
        except (*_BROKEN, asyncpg.PostgresError) as error:
            raise DatabaseUnavailable(f"The database cannot be used now: {reason(error)}") from error

    async def _connect(self) -> Any:
        return await asyncpg.create_pool(
            dsn_of(self._url),
            min_size=1,
            max_size=CONNECTIONS_MAX,
            timeout=CONNECT_SECONDS_MAX,
            command_timeout=STATEMENT_SECONDS_MAX,
            statement_cache_size=512,
            connection_class=_Session,
            init=_prepare,
            reset=_leave_as_it_is,
        )

    def pool(self) -> Pool:
        """See Database."""
        if self._pool is None:
            return Pool(0, 0, CONNECTIONS_MAX)
        size = self._pool.get_size()
        return Pool(size - self._pool.get_idle_size(), size, CONNECTIONS_MAX)

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
