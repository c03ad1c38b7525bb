"""The standing of the shared cache: whether what is cached may be believed, as the database says.

A writer that cannot retire entries in Redis suspends the cache here, waits until every reader has heard of it, and
only then changes orders; while it stays cut off, each of its transactions prolongs the suspension. Afterwards
nothing is believed that was cached before (docs/decisions/009-shared-cache.md).
"""

from __future__ import annotations

from sqlalchemy import bindparam, select, update

from expediter.backends.cache import Standing
from expediter.backends.databases import Connection
from expediter.store import schema

#: For how long the cache is suspended at a time, in seconds.
SUSPENDED_SECONDS = 5.0
#: A transaction that retires nothing needs a suspension which lasts that much longer, and may take that long.
SPARE_SECONDS = 2.0

_TABLE = schema.cache_standing
_READ = select(_TABLE.c.number, _TABLE.c.suspended_until)
_SUSPEND = update(_TABLE).values(number=_TABLE.c.number + 1, suspended_until=bindparam("until"))
_PROLONG = _SUSPEND.where(_TABLE.c.suspended_until >= bindparam("at_least"))


async def read_standing(connection: Connection) -> Standing:
    """Return it as it is now."""
    number, suspended_until = (await connection.fetch(_READ))[0]
    return Standing(number, suspended=suspended_until > await connection.now())


async def suspend(connection: Connection) -> None:
    """Let nobody believe the cache for SUSPENDED_SECONDS, nor ever what is in it now."""
    await connection.run(_SUSPEND, until=await connection.now() + int(SUSPENDED_SECONDS * 1_000_000))


async def prolong(connection: Connection) -> bool:
    """Suspend it from now on for SUSPENDED_SECONDS; False: it is not suspended for SPARE_SECONDS more."""
    now = await connection.now()
    until, at_least = now + int(SUSPENDED_SECONDS * 1_000_000), now + int(SPARE_SECONDS * 1_000_000)
    return await connection.run(_PROLONG, until=until, at_least=at_least) == 1
