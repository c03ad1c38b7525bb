"""Sessions that went bad with their server: they leave the pool, and the service goes on without a restart."""

from __future__ import annotations

import pytest

from expediter.backends.databases import open_database
from expediter.errors import DatabaseUnavailable
from servers import Server
from storing import Place, applied, open_committer, place, rows

#: How a server makes new sessions read-only, and how it makes them writable again; those that are open stay so.
READ_ONLY = {
    "postgresql": (
        'ALTER DATABASE "{name}" SET default_transaction_read_only = on',
        'ALTER DATABASE "{name}" RESET default_transaction_read_only',
    ),
    "mariadb": ("SET GLOBAL tx_read_only = 1", "SET GLOBAL tx_read_only = 0"),
}
#: A database that is there already, and stays writable.
DOOR = {"postgresql": "postgres", "mariadb": "mysql"}


@pytest.mark.parametrize("kind", sorted(READ_ONLY))
async def test_a_server_that_was_read_only_is_written_to_again_without_a_restart(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """A session that says read-only is given up, so that the next request meets a new one."""
    server: Server = request.getfixturevalue(kind)
    at = Place(server.new_database(), server)
    async with open_committer(at) as committer:
        await applied(committer, place("A1"))
    read_only, writable = (each.format(name=at.address.rpartition("/")[2]) for each in READ_ONLY[kind])
    server.query(DOOR[kind], read_only)
    try:
        # All its sessions are opened while the server lets none write.
        async with open_committer(at, database=open_database(at.address)) as committer:
            for _ in range(2):
                with pytest.raises(DatabaseUnavailable, match=r"read-only|READ ONLY"):
                    await applied(committer, place("A2"))
            server.query(DOOR[kind], writable)
            await applied(committer, place("A3"))
    finally:
        server.query(DOOR[kind], writable)
    assert rows(at, "SELECT order_id FROM orders ORDER BY order_id") == [("A1",), ("A3",)]
