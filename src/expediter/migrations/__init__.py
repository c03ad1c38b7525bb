"""The database's structure, step by step; `upgrade` takes a database to the newest step.

Alembic is imported only when there is something to do: most starts find the newest step in place.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.engine import URL, Connection, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from expediter.dialects import parse_url
from expediter.dialects.mysql import tls_of
from expediter.dialects.postgresql import dsn_of
from expediter.dialects.sqlite import database_path
from expediter.errors import ConfigurationError, DatabaseUnavailable

#: The newest step.
HEAD = "0001"
#: Seconds that connecting to a database server may take.
CONNECT_SECONDS_MAX = 5.0
#: The name of the lock that one upgrade at a time holds on a database server.
_LOCK_NAME = "expediter-upgrade"
_LOCK_NUMBER = 6_720_412


def upgrade(address: str) -> bool:
    """Take the database to the newest step; return whether there was anything to do.

    Any number of processes may call it at once: the first does the work behind a lock, the others find it done.
    Raises ConfigurationError where the database is newer than this program, DatabaseUnavailable.
    """
    kind, url = parse_url(address)
    if kind == "sqlite":
        return _upgrade_file(database_path(url))
    driver = "asyncpg" if kind == "postgresql" else "asyncmy"
    return asyncio.run(_upgrade_server(url.set(drivername=f"{kind}+{driver}")))


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
            _run_steps(connection)
    except DBAPIError as error:
        raise DatabaseUnavailable(f"{path} cannot be upgraded: {error.orig}") from error
    finally:
        engine.dispose()


async def _upgrade_server(url: URL) -> bool:
    engine = _engine(url)
    try:
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            connection = await engine.connect()
    except (DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        await engine.dispose()
        cause = getattr(error, "orig", None) or error
        where = f"{url.host}:{url.port}" if url.port else url.host
        raise DatabaseUnavailable(f"The database at {where} cannot be reached: {cause}") from error
    try:
        if await connection.run_sync(_step_of_server) == HEAD:
            return False
        await _lock_server(connection, url.get_backend_name())
        if await connection.run_sync(_step_of_server) == HEAD:
            return False
        if url.get_backend_name() != "postgresql":
            await _check_triggers(connection)
        await connection.run_sync(_run_steps)
        await connection.commit()
        return True
    finally:
        await connection.close()
        await engine.dispose()


def _engine(url: URL) -> AsyncEngine:
    """Return an engine that connects as the service itself does, with the same TLS."""
    if url.get_backend_name() == "postgresql":
        return create_async_engine(
            url.set(query={}), poolclass=NullPool, async_creator=lambda: asyncpg.connect(dsn_of(url))
        )
    context = tls_of(url)
    arguments = {} if context is None else {"ssl": context}
    return create_async_engine(url.set(query={}), poolclass=NullPool, connect_args=arguments)


async def _check_triggers(connection: AsyncConnection) -> None:
    """Raise ConfigurationError where MariaDB or MySQL would refuse a trigger in the midst of the upgrade."""
    row = (
        await connection.execute(text("SELECT @@GLOBAL.log_bin, @@GLOBAL.log_bin_trust_function_creators"))
    ).one()
    grants = [str(grant[0]) for grant in await connection.execute(text("SHOW GRANTS"))]
    await connection.rollback()
    may = any("ALL PRIVILEGES ON *.*" in grant or "SUPER" in grant for grant in grants)
    if row[0] and not row[1] and not may:
        raise ConfigurationError(
            "The database keeps a binary log and lets only administrators make triggers: set "
            "log_bin_trust_function_creators=1 there, or run `expediter db upgrade` once as an administrator"
        )


async def _lock_server(connection: AsyncConnection, kind: str) -> None:
    """Take the upgrade's lock; it goes with the connection."""
    if kind == "postgresql":
        await connection.execute(text(f"SELECT pg_advisory_lock({_LOCK_NUMBER})"))
    else:
        await connection.execute(text(f"SELECT GET_LOCK('{_LOCK_NAME}', 600)"))
    await connection.commit()


def _step_of_server(connection: Connection) -> str | None:
    if not connection.dialect.has_table(connection, "alembic_version"):
        connection.rollback()
        return None
    row = connection.execute(text("SELECT version_num FROM alembic_version")).fetchone()
    connection.rollback()
    return str(row[0]) if row else None


def _run_steps(connection: Connection) -> None:
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
