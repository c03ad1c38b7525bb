"""The first start on a server that is not made for it: a sentence that says what to do, and then it works."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from auditing import wait_until
from expediter.backends.databases import parse_url
from expediter.errors import ConfigurationError, DatabaseUnavailable
from expediter.store.migrations import HEAD, upgrade
from expediter.store.migrations.servers import upgrade_server
from servers import MariadbServer, PostgresServer, Server, in_thread


def test_an_ordinary_role_on_postgresql_is_told_what_it_lacks(postgresql: PostgresServer) -> None:
    """From PostgreSQL 15 on a role may make no tables in a database of somebody else's until it is granted."""
    address = postgresql.new_database()
    name = address.rpartition("/")[2]
    postgresql.query("postgres", f"CREATE ROLE shop_{name} LOGIN")
    ordinary = address.replace("postgres@", f"shop_{name}@")
    with pytest.raises(ConfigurationError, match="GRANT CREATE ON SCHEMA public"):
        upgrade(ordinary)
    postgresql.query(name, f"GRANT CREATE ON SCHEMA public TO shop_{name}")
    assert upgrade(ordinary)


def test_another_encoding_than_utf_8_is_refused_by_name(postgresql: PostgresServer) -> None:
    """PostgreSQL can keep databases in which most texts cannot be stored."""
    postgresql.query("postgres", "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    with pytest.raises(ConfigurationError, match=r"encoded in LATIN1.*ENCODING 'UTF8'"):
        upgrade(postgresql.new_database().rpartition("/")[0] + "/latin")


def test_a_mariadb_user_is_told_what_it_lacks(mariadb: MariadbServer) -> None:
    """A user that may only read is told which grant it needs."""
    address = mariadb.new_database()
    name = address.rpartition("/")[2]
    mariadb.query("root", f"CREATE USER shop_{name}@'127.0.0.1'")
    mariadb.query("root", f"GRANT SELECT ON {name}.* TO shop_{name}@'127.0.0.1'")
    ordinary = address.replace("root@", f"shop_{name}@")
    with pytest.raises(ConfigurationError, match="GRANT ALL ON"):
        upgrade(ordinary)
    mariadb.query("root", f"GRANT ALL ON {name}.* TO shop_{name}@'127.0.0.1'")
    assert upgrade(ordinary)


#: How each server takes the upgrade's lock for a while, and says that somebody has it.
HELD = {
    "postgresql": (
        "SELECT pg_advisory_lock(6720412), pg_sleep(6)",
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted",
    ),
    "mariadb": (
        "SELECT GET_LOCK('expediter-upgrade', 1), SLEEP(6)",
        "SELECT IS_USED_LOCK('expediter-upgrade') IS NOT NULL",
    ),
}


@pytest.mark.parametrize("kind", sorted(HELD))
def test_an_upgrade_that_does_not_end_is_not_waited_for_for_ever(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """Who starts while another process upgrades says so after a time, and goes on once that is over."""
    server: Server = request.getfixturevalue(kind)
    address = server.new_database()
    name = address.rpartition("/")[2]
    backend, url = parse_url(address)
    take, look = HELD[kind]
    with ThreadPoolExecutor(1) as other:
        holding = other.submit(server.query, name, take)
        wait_until(lambda: server.query(name, look)[0][0] == 1)
        with pytest.raises(DatabaseUnavailable):
            in_thread(lambda: upgrade_server(backend, url, HEAD, lock_seconds=1))
        holding.result()
    assert in_thread(lambda: upgrade_server(backend, url, HEAD))
