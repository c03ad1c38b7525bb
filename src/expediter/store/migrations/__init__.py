"""The database's structure, step by step; `upgrade` takes a database as far as processes of before can follow.

Versions run side by side while processes are renewed one by one. So steps come in two kinds: one that a process of
the version before does not mind, and one that may only be made when no such process is left. A start makes the
steps up to the newest of the first kind (BEFORE); what is behind waits for `expediter db upgrade --after`, or for
the next version. Each database says which step a program must know at least to work on it (`schema_needs`), so
a program knows a database of a newer version that it may go on with (docs/decisions/032-versions-side-by-side.md).

Alembic is imported only when there is something to do, and the drivers of database servers only for them: most
starts find the newest step in place.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import event, text
from sqlalchemy.engine import URL, Connection, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from expediter.backends.databases import parse_url
from expediter.backends.databases.sqlite import database_path
from expediter.errors import ConfigurationError, DatabaseUnavailable

#: The newest step, and the newest that processes of the version before do not mind: the same, where all are so.
HEAD = "0012"
BEFORE = HEAD
#: The oldest step that a program must know to work on a database at HEAD.
NEEDS = "0010"


class Standing(NamedTuple):
    """The step that a database is at (None: it has no table yet), and the oldest one that a program must know."""

    step: str | None
    needs: str

    @property
    def newer(self) -> bool:
        """Whether a newer version has made steps that this one does not know."""
        return self.step is not None and self.step > HEAD

    def lacks(self, wanted: str) -> bool:
        """Return whether steps up to `wanted` are missing. Raises ConfigurationError for too new a database."""
        if self.newer and self.needs > HEAD:
            raise ConfigurationError(
                f"The database was made by a newer version of expediter, and has changes (step {self.step}) that "
                f"this one cannot work beside (it needs step {self.needs} and knows {HEAD}): upgrade the program"
            )
        return self.step is None or self.step < wanted


def upgrade(address: str, *, after: bool = False) -> bool:
    """Make the steps that processes of before do not mind, or all (`after`); return whether any was to be made.

    Any number of processes may call it at once: the first does the work behind a lock, the others find it done.
    Raises ConfigurationError where the database is too new for this program, DatabaseUnavailable.
    """
    kind, url = parse_url(address)
    wanted = HEAD if after else BEFORE
    if kind == "sqlite":
        return _upgrade_file(database_path(url), wanted)
    from expediter.store.migrations.servers import upgrade_server

    return asyncio.run(upgrade_server(kind, url, wanted))


def standing(address: str) -> Standing:
    """Return where a database stands. Raises DatabaseUnavailable, ConfigurationError."""
    kind, url = parse_url(address)
    if kind == "sqlite":
        return _standing_of_file(database_path(url))
    from expediter.store.migrations.servers import standing_of_server

    return asyncio.run(standing_of_server(kind, url))


def is_begun(address: str) -> bool:
    """Return whether there may be something in the database; False: its file is not there."""
    kind, url = parse_url(address)
    return kind != "sqlite" or database_path(url).exists()


def _upgrade_file(path: Path, wanted: str) -> bool:
    if not _standing_of_file(path).lacks(wanted):
        return False
    if not path.parent.is_dir():
        raise ConfigurationError(f"The folder {path.parent} does not exist: create it, or change DATABASE_URL")
    with _file_lock(path.with_name(path.name + "-upgrade")):
        if not _standing_of_file(path).lacks(wanted):
            return False
        _run_on_file(path, wanted)
        return True


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"The database cannot be made beside {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _standing_of_file(path: Path) -> Standing:
    if not path.exists():
        return Standing(None, NEEDS)
    try:
        with closing(sqlite3.connect(path, timeout=5)) as raw:
            row = raw.execute("SELECT version_num FROM alembic_version").fetchone()
            step = str(row[0]) if row else None
            if step is None or step <= HEAD:
                return Standing(step, NEEDS)
            return Standing(step, str(raw.execute("SELECT step FROM schema_needs").fetchone()[0]))
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return Standing(None, NEEDS)
        raise DatabaseUnavailable(f"{path} cannot be opened: {error}") from error
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(f"{path} is not a SQLite database: {error}") from error


def _run_on_file(path: Path, wanted: str) -> None:
    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # pysqlite begins no transaction before CREATE TABLE; without one, half a step could stay behind.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    @event.listens_for(engine, "connect")
    def _connect(raw: sqlite3.Connection, _: object) -> None:
        raw.isolation_level = None
        raw.execute("PRAGMA journal_mode=WAL")
        raw.execute("PRAGMA synchronous=FULL")

    try:
        with engine.begin() as connection:
            run_steps(connection, wanted)
    except DBAPIError as error:
        raise DatabaseUnavailable(f"{path} cannot be upgraded: {error.orig}") from error
    finally:
        engine.dispose()


def run_steps(connection: Connection, wanted: str) -> None:
    """Make the steps up to `wanted`, in the transaction of `connection`, and say what they need."""
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    command.upgrade(config, wanted)
    needs = getattr(ScriptDirectory.from_config(config).get_revision(wanted).module, "needs", None)
    if needs is not None:
        connection.execute(text("UPDATE schema_needs SET step = :needs"), {"needs": needs})
