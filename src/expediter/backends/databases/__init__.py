"""All that differs between databases: addresses, connections, transactions, bulk statements, foreign errors.

A transaction is an async function over a `Connection`. It is begun, committed and, where the database says that
it collided with another one, tried again in one place per database; what it does is written once, in
`store/transaction.py` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from sqlalchemy import Column, Table
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.sql import Executable

from expediter.errors import CommitUncertain, ConfigurationError

T = TypeVar("T")
#: A row as the drivers give and take it: whole numbers, text and None, in the order of the table's columns.
Row = Sequence[Any]


class Connection(Protocol):
    """One connection inside one transaction.

    Changes may reach the database later than they are asked for, several in one statement, but before the next
    `fetch` or `run` and before the commit. So between two of those no two changes may be about the same row.
    """

    async def fetch(self, statement: Executable, **values: Any) -> list[Row]:
        """Return the rows of a Core statement; a list value fills an expanding `IN`."""

    async def run(self, statement: Executable, **values: Any) -> int:
        """Carry out a Core statement and return how many rows it changed."""

    async def insert(self, table: Table, rows: Sequence[Row]) -> None:
        """Insert rows, each as wide as the table, with as few statements as the database allows."""

    async def add(self, table: Table, rows: Sequence[Row]) -> None:
        """Insert rows whose last column is a sum; where the key exists, add to it instead."""

    async def update(self, table: Table, columns: Sequence[str], keys: Sequence[str], rows: Sequence[Row]) -> None:
        """Set `columns` of the rows that `keys` find; each row: the columns' values, then the keys'.

        Each must find one row: another number is a Collision, and the transaction begins anew.
        """

    async def remove(self, table: Table, ids: Sequence[str], *, exactly: bool = True) -> None:
        """Delete the rows whose first column is one of these; `exactly` one for each, else it is a Collision."""

    async def append(self, last: Column[int], table: Table, rows: Sequence[Row]) -> int:
        """Insert rows without their first column, which goes on from the number `last`; return the newest.

        `last` is the column of a table of one row, which stays locked until the transaction ends; on PostgreSQL a
        sequence of that name (`feed_position`), for which nobody waits: see `settled`. Nothing may be asked for
        after it: it may commit by itself, and then raises CommitUncertain as a commit does.
        """

    async def pass_over(self, last: Column[int]) -> None:
        """Move the number `last` on by one without a row."""

    async def newest(self, last: Column[int]) -> int:
        """Return the number `last`, up to which numbers were given out; rows may be missing yet."""

    async def settled(self, last: Column[int]) -> int:
        """Return the number up to which no row can appear any more that this transaction does not see.

        Reading asks for it by `read(settled=...)`, because it must be known before the snapshot is taken. It may
        be lower than it was a moment ago, by as long as a transaction takes.
        """

    async def now(self) -> int:
        """Return the database's time in microseconds since 1970: one clock for all processes.

        It may be behind by what the database took to tell it (ServerClock), and is never ahead.
        """


class Collision(Exception):
    """The transaction met what another one has changed meanwhile, and has to begin anew."""

    def __init__(self, table: Table, found: int, meant: int) -> None:
        """Say how many rows a change found, and how many it was about."""
        super().__init__(f"a change of {meant} rows of {table.name} found {found}")


#: Seconds that a database server may take for one transaction: two of them, of which the second waits for the
#: first, are over before a client that waits for ten is gone.
WRITE_SECONDS_MAX = 4.5
READ_SECONDS_MAX = 8.0
#: The same for upkeep, which may look at many rows at once.
UPKEEP_SECONDS_MAX = 60.0

Transaction = Callable[[Connection], Coroutine[Any, Any, T]]


class Pool(NamedTuple):
    """The connections to a database: those in use, those that are open, and how many there may be."""

    used: int
    open: int
    most: int


class Database(Protocol):
    """A database, and the connections to it."""

    #: What an answered order survives when the settings are as they are in `power_safe`.
    durability: str
    #: The settings, by name, that make a commit survive a power cut.
    power_safe: Mapping[str, str]

    def describe(self) -> str:
        """Return the database in a few words, for people; never its password."""

    def position_reader(self) -> Callable[[], int] | None:
        """Return what tells the position of the newest event at once, or None where that is a round trip."""

    async def write(
        self,
        work: Transaction[T],
        *,
        begun: Callable[[], None] | None = None,
        seconds: float | None = WRITE_SECONDS_MAX,
    ) -> T:
        """Run `work` in a transaction and commit it; a collision with another transaction runs it again.

        A server has `seconds` for all of it but the commit (None: no limit), a file as long as it takes.

        `begun` is called on the event loop as soon as `work` has the database at work, so that what it sets off
        runs meanwhile; where the transaction has a thread of its own, at once.

        Raises what `work` raises (nothing is stored then), DatabaseUnavailable (nothing is stored),
        ConstraintViolated (nothing is stored) or CommitUncertain. Cancelling the caller does not stop it.
        """

    async def rule_out(self, uncertain: CommitUncertain) -> None:
        """Return once a transaction of unknown outcome has ended: what it did not store it never will.

        Raises DatabaseUnavailable while that cannot be said.
        """

    async def read(
        self,
        work: Transaction[T],
        *,
        seconds: float | None = READ_SECONDS_MAX,
        settled: Column[int] | None = None,
    ) -> T:
        """Run `work` on one snapshot, for which a server has `seconds`. Raises DatabaseUnavailable.

        `settled` is the number that `work` wants to know to be settled: see Connection.
        """

    def pool(self) -> Pool:
        """Return how many connections this process has."""

    async def durability_settings(self) -> dict[str, str]:
        """Return what the database says of the settings that decide on durability, by their names."""

    async def close(self) -> None:
        """Finish what runs, then close every connection."""


#: Every spelling that is understood, and the database that it means.
_KINDS = {
    "sqlite": "sqlite",
    "postgres": "postgresql",
    "postgresql": "postgresql",
    "mysql": "mysql",
    "mariadb": "mysql",
}


def parse_url(address: str) -> tuple[str, URL]:
    """Return which database an address means (`sqlite`, `postgresql`, `mysql`) and its parts.

    A driver in the address (`postgresql+psycopg://`) is passed over: Expediter brings its own. Raises
    ConfigurationError.
    """
    try:
        url = make_url(address)
    except (ArgumentError, ValueError) as error:
        raise ConfigurationError(f"DATABASE_URL cannot be read: {error}") from error
    kind = _KINDS.get(url.drivername.partition("+")[0])
    if kind is None:
        raise ConfigurationError(
            f"DATABASE_URL begins with {url.drivername}://; it can begin with sqlite:///, postgresql:// or mysql://"
        )
    return kind, url


def open_database(address: str) -> Database:
    """Return the database that `address` names; nothing is opened yet. Raises ConfigurationError."""
    kind, url = parse_url(address)
    if kind == "postgresql":
        from expediter.backends.databases.postgresql import PostgresDatabase

        return PostgresDatabase(url)
    if kind == "mysql":
        from expediter.backends.databases.mysql import MysqlDatabase

        return MysqlDatabase(url)
    from expediter.backends.databases.sqlite import SqliteDatabase, database_path

    path = database_path(url)
    if not path.parent.is_dir():
        raise ConfigurationError(
            f"The folder of the database, {path.parent}, does not exist: create it, or change DATABASE_URL"
        )
    return SqliteDatabase(path)
