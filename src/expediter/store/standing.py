"""The standing of the shared cache: whether what is cached may be believed, as the database says.

A writer that cannot retire entries in Redis suspends the cache here, waits until every reader has heard of it, and
only then changes orders; while it stays cut off, each of its transactions prolongs the suspension. Afterwards
nothing is believed that was cached before (docs/decisions/009-shared-cache.md).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog
from sqlalchemy import bindparam, select, update

from expediter.backends.cache import Cache, Standing
from expediter.backends.databases import WRITE_SECONDS_MAX, Connection, Database
from expediter.backends.tasks import Background
from expediter.errors import ExpediterError, Unavailable
from expediter.store import schema

#: For how long the cache is suspended at a time, in seconds.
SUSPENDED_SECONDS = 5.0
#: A transaction that retires nothing needs a suspension which lasts that much longer, and may take that long.
SPARE_SECONDS = 2.0
#: Seconds that readers are given to hear of it: for which they believe what they were told, and a little more.
HEARD_SECONDS = 1.1
#: How often it is prolonged while no transaction of this process does that, in seconds.
PROLONG_SECONDS = 1.0
#: Pause between two tries to suspend it, in seconds.
AGAIN_SECONDS = 0.2

log = structlog.get_logger(__name__)

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


class Suspension:
    """Suspends the cache for a writer that cannot tell its readers, for as long as that is so."""

    def __init__(self, database: Database, cache: Cache) -> None:
        """`cache` says whether the writer is cut off from it."""
        self._database = database
        self._cache = cache
        self._background = Background("the suspended cache", self._prolong)

    async def begin(self) -> None:
        """Return when no process believes the cache any more. Raises Unavailable."""
        log.warning("readers cannot be told of changes; the cache is suspended", cache=self._cache.name)
        deadline = asyncio.get_running_loop().time() + WRITE_SECONDS_MAX
        while True:
            try:
                await self._database.write(suspend)
                break
            except Unavailable:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(AGAIN_SECONDS)
        await asyncio.sleep(HEARD_SECONDS)
        self._background.start()

    async def stop(self) -> None:
        """Prolong it no more."""
        await self._background.stop(grace_seconds=0)

    async def _prolong(self) -> None:
        """Spare the next change the wait."""
        while self._cache.cut_off and not self._background.stopping:
            with suppress(ExpediterError):
                if not await self._database.write(prolong):
                    return
            await self._background.rest(PROLONG_SECONDS)
