"""The database's incarnation: a number that rises when what was accepted before must not come back.

It rises when every order is removed, and when somebody says that the database was restored. What waits in a queue
carries the number that it was accepted under, and is dropped where the database has a higher one.
"""

from __future__ import annotations

from sqlalchemy import bindparam, case, select, update

from expediter.backends.databases import Connection
from expediter.store import schema

_NUMBER = schema.incarnation.c.number
READ = select(_NUMBER)
#: Whoever moves it waits for the transactions that have read it like this, and they for it.
READ_AND_HOLD = READ.with_for_update(read=True)
_MOVE = update(schema.incarnation).values(
    number=case((bindparam("now") <= _NUMBER, _NUMBER + 1), else_=bindparam("now"))
)


async def read_incarnation(connection: Connection) -> int:
    """Return the number."""
    return int((await connection.fetch(READ))[0][0])


async def move_incarnation(connection: Connection) -> int:
    """Raise the number to the time in microseconds, or by one where it is ahead of that; return it."""
    await connection.run(_MOVE, now=await connection.now())
    return await read_incarnation(connection)
