"""The database's structure, step by step; `upgrade` takes a database to the newest step.

Alembic is imported only when there is something to do: most starts find the newest step in place.
"""

import fcntl
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection
from sqlalchemy.pool import NullPool

from expediter.dialects import database_path
from expediter.errors import ConfigurationError, DatabaseUnavailable

#: The newest step.
HEAD = "0001"


def current(url: str) -> str | None:
    """Return the step that the database is at; None for one that does not exist or is empty."""
    path = database_path(url)
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


def upgrade(url: str) -> bool:
    """Take the database to the newest step; return whether there was anything to do.

    Any number of processes may call it at once: the first does the work behind a file lock, the others find it
    done. Raises ConfigurationError where the database is newer than this program.
    """
    if current(url) == HEAD:
        return False
    path = database_path(url)
    if not path.parent.is_dir():
        raise ConfigurationError(f"The folder {path.parent} does not exist: create it, or change DATABASE_URL")
    lock = os.open(path.with_name(path.name + "-upgrade"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if current(url) == HEAD:
            return False
        _run(path)
        return True
    finally:
        os.close(lock)


def _run(path: Path) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

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

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigurationError(
            f"{path} was made by a newer version of expediter ({error}): upgrade the program"
        ) from error
    finally:
        engine.dispose()
