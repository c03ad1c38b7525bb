"""The database's structure, step by step; `upgrade` takes a database to the newest step.

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

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from expediter.backends.databases import parse_url
from expediter.backends.databases.sqlite import database_path
from expediter.errors import ConfigurationError, DatabaseUnavailable

#: The newest step.
HEAD = "0011"


def upgrade(address: str) -> bool:
    """Take the database to the newest step; return whether there was anything to do.

    Any number of processes may call it at once: the first does the work behind a lock, the others find it done.
    Raises ConfigurationError where the database is newer than this program, DatabaseUnavailable.
    """
    kind, url = parse_url(address)
    if kind == "sqlite":
        return _upgrade_file(database_path(url))
    from expediter.store.migrations.servers import upgrade_server

    return asyncio.run(upgrade_server(kind, url))


def is_begun(address: str) -> bool:
    """Return whether there may be something in the database; False: its file is not there."""
    kind, url = parse_url(address)
    return kind != "sqlite" or database_path(url).exists()


def _upgrade_file(path: Path) -> bool:
    if _step_of_file(path) == HEAD:
        return False
    if not path.parent.is_dir():
        raise ConfigurationError(f"The folder {path.parent} does not exist: create it, or change DATABASE_URL")
    with _file_lock(path.with_name(path.name + "-upgrade")):
        if _step_of_file(path) == HEAD:
            return False
        _run_on_file(path)
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


def _step_of_file(path: Path) -> str | None:
    """Return the step that a SQLite file is at; None for one that does not exist or is empty."""
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path, timeout=5)) as raw:
            row = raw.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return None
        raise DatabaseUnavailable(f"{path} cannot be opened: {error}") from error
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(f"{path} is not a SQLite database: {error}") from error
    return str(row[0]) if row else None


def _run_on_file(path: Path) -> None:
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
            run_steps(connection)
    except DBAPIError as error:
        raise DatabaseUnavailable(f"{path} cannot be upgraded: {error.orig}") from error
    finally:
        engine.dispose()


def run_steps(connection: Connection) -> None:
    """Carry out the steps that are missing, in the transaction of `connection`. Raises ConfigurationError."""
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigurationError(
            f"The database was made by a newer version of expediter ({error}): upgrade the program"
        ) from error
