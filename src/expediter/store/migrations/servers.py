"""The upgrade of a database on a server; `upgrade` imports it only where there is one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from sqlalchemy import text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from expediter.backends.databases.mysql import STATEMENT_BYTES_MAX, tls_of
from expediter.backends.databases.postgresql import dsn_of
from expediter.errors import ConfigurationError, DatabaseUnavailable, reason
from expediter.store.migrations import HEAD, NEEDS, Standing, run_steps

#: Seconds that connecting to a database server may take.
CONNECT_SECONDS_MAX = 5.0
#: Seconds that a start waits for another process's upgrade.
LOCK_SECONDS_MAX = 600
#: How servers say that a role may not do something, and what an administrator gives it.
_MAY_NOT = ("permission denied", "must be owner", "command denied", "access denied")
_GRANTS = {
    "postgresql": "As an administrator: GRANT CREATE ON SCHEMA public TO the role (from PostgreSQL 15 on only the "
    "owner of the database has it), or ALTER DATABASE ... OWNER TO the role",
    "mysql": "As an administrator: GRANT ALL ON the database's name.* TO the user",
}
#: The name of the lock that one upgrade at a time holds on a database server.
_LOCK_NAME = "expediter-upgrade"
_LOCK_NUMBER = 6_720_412


async def upgrade_server(kind: str, url: URL, wanted: str, *, lock_seconds: int = LOCK_SECONDS_MAX) -> bool:
    """Take the database at `url` to the step `wanted`; see `upgrade`. `kind`: postgresql or mysql."""
    async with _connected(kind, url) as connection:
        return await _upgrade(connection, kind, wanted, lock_seconds)


async def standing_of_server(kind: str, url: URL) -> Standing:
    """Return where the database at `url` stands. `kind`: postgresql or mysql."""
    async with _connected(kind, url) as connection:
        return await connection.run_sync(_standing)


@asynccontextmanager
async def _connected(kind: str, url: URL) -> AsyncIterator[AsyncConnection]:
    url = url.set(drivername=f"{kind}+asyncpg" if kind == "postgresql" else f"{kind}+asyncmy")
    engine = _engine(url)
    try:
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            connection = await engine.connect()
    except (
        DBAPIError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        OSError,
        TimeoutError,
        RuntimeError,  # what MariaDB's driver raises where the server closes the connection at once
    ) as error:
        await engine.dispose()
        cause = getattr(error, "orig", None) or error
        where = f"{url.host}:{url.port}" if url.port else url.host
        raise DatabaseUnavailable(f"The database at {where} cannot be reached: {reason(cause)}") from error
    try:
        yield connection
    except DBAPIError as error:
        cause = error.orig or error
        if any(words in str(cause).lower() for words in _MAY_NOT):
            advice = _GRANTS[url.get_backend_name()]
            raise ConfigurationError(
                f"The database does not let {url.username} make the tables: {cause}. {advice}"
            ) from error
        raise DatabaseUnavailable(f"The tables cannot be made or changed now: {reason(cause)}") from error
    finally:
        await connection.close()
        await engine.dispose()


async def _upgrade(connection: AsyncConnection, kind: str, wanted: str, lock_seconds: int) -> bool:
    if kind == "postgresql":
        await _check_encoding(connection)
    else:
        await _check_packets(connection)
    if not (await connection.run_sync(_standing)).lacks(wanted):
        return False
    await _lock_server(connection, kind, lock_seconds)
    if not (await connection.run_sync(_standing)).lacks(wanted):
        return False
    if kind != "postgresql":
        await _check_triggers(connection)
    await connection.run_sync(run_steps, wanted)
    await connection.commit()
    return True


def _engine(url: URL) -> AsyncEngine:
    """Return an engine that connects as the service itself does, with the same TLS."""
    if url.get_backend_name() == "postgresql":
        return create_async_engine(
            url.set(query={}), poolclass=NullPool, async_creator=lambda: asyncpg.connect(dsn_of(url))
        )
    context = tls_of(url)
    arguments = {} if context is None else {"ssl": context}
    return create_async_engine(url.set(query={}), poolclass=NullPool, connect_args=arguments)


async def _check_encoding(connection: AsyncConnection) -> None:
    """Raise ConfigurationError for a database that cannot hold every text."""
    encoding = (await connection.execute(text("SHOW server_encoding"))).scalar_one()
    await connection.rollback()
    if encoding != "UTF8":
        raise ConfigurationError(
            f"The database is encoded in {encoding}, which cannot hold every text: make one with "
            "CREATE DATABASE orders ENCODING 'UTF8' TEMPLATE template0, and name that in DATABASE_URL"
        )


async def _check_packets(connection: AsyncConnection) -> None:
    """Raise ConfigurationError for a server that would refuse the largest orders."""
    packet = (await connection.execute(text("SELECT @@GLOBAL.max_allowed_packet"))).scalar_one()
    await connection.rollback()
    if packet < STATEMENT_BYTES_MAX:
        raise ConfigurationError(
            f"The database takes statements of up to max_allowed_packet={packet} bytes, too little for the "
            f"largest orders: set max_allowed_packet=16M in its configuration (at least {STATEMENT_BYTES_MAX})"
        )


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


async def _lock_server(connection: AsyncConnection, kind: str, seconds: int) -> None:
    """Take the upgrade's lock; it goes with the connection. Raises DatabaseUnavailable, or the driver's error."""
    if kind == "postgresql":
        await connection.execute(text(f"SET LOCAL lock_timeout = '{seconds}s'"))
        await connection.execute(text(f"SELECT pg_advisory_lock({_LOCK_NUMBER})"))
    else:
        answer = await connection.execute(text(f"SELECT GET_LOCK('{_LOCK_NAME}', {seconds})"))
        if answer.scalar_one() != 1:
            raise DatabaseUnavailable(
                f"Another process upgrades the database, and was not done after {seconds} s; start again later"
            )
    await connection.commit()


def _standing(connection: Connection) -> Standing:
    step, needs = None, NEEDS
    if connection.dialect.has_table(connection, "alembic_version"):
        row = connection.execute(text("SELECT version_num FROM alembic_version")).fetchone()
        step = str(row[0]) if row else None
        if step is not None and step > HEAD:
            needs = str(connection.execute(text("SELECT step FROM schema_needs")).scalar_one())
    connection.rollback()
    return Standing(step, needs)
