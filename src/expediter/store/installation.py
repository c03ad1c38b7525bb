"""What a database is bound to for as long as it lives: the prefix in the names of its gateway keys.

A charge whose outcome is unknown is settled under the key that it was made with. With another prefix it would get
another key, and the customer would be charged twice; so the first start writes the prefix down.
"""

from __future__ import annotations

from sqlalchemy import bindparam, select, update

from expediter.backends.databases import Connection
from expediter.errors import ConfigurationError
from expediter.store import schema

_PREFIX = schema.installation.c.gateway_key_prefix
_READ = select(_PREFIX)
_BIND = update(schema.installation).where(_PREFIX.is_(None)).values(gateway_key_prefix=bindparam("prefix"))


async def read_key_prefix(connection: Connection) -> str:
    """Return the prefix; empty also where no process has started yet."""
    return (await connection.fetch(_READ))[0][0] or ""


async def is_bound_to(connection: Connection, prefix: str) -> bool:
    """Return whether the database is bound to this prefix; it takes no lock, as every start but the first."""
    return bool((await connection.fetch(_READ))[0][0] == prefix)


async def bind_key_prefix(connection: Connection, prefix: str) -> None:
    """Bind the database to a prefix. Raises ConfigurationError where it is bound to another one."""
    if (await connection.fetch(_READ))[0][0] is None:
        await connection.run(_BIND, prefix=prefix)
    bound = await read_key_prefix(connection)
    if bound != prefix:
        raise ConfigurationError(
            f"GATEWAY_KEY_PREFIX is {prefix!r}, and this database was begun with {bound!r}: set it to that. "
            "Another prefix is for another database; here it could charge an order twice"
        )
