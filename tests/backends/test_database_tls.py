"""Databases by TLS: what the address asks for holds for the upgrade and for the service."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from expediter.errors import ConfigurationError, DatabaseUnavailable
from expediter.store.migrations import upgrade
from servers import MariadbServer, PostgresServer, Server
from storing import Place, applied, open_committer, place, rows


def make_certificates(folder: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
    (folder / "key.pem").chmod(0o600)
    trustme.CA().cert_pem.write_to_path(str(folder / "stranger.pem"))


@pytest.fixture(scope="module", params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that speaks TLS, and has one user who must."""
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    if request.param == "postgresql":
        running: Server = TlsPostgresServer(folder)
    else:
        running = TlsMariadbServer(folder)
        running.query("root", "CREATE USER careful@'127.0.0.1' IDENTIFIED BY 'x' REQUIRE SSL")
        running.query("root", "GRANT ALL ON *.* TO careful@'127.0.0.1'")
    yield running
    running.stop()


class TlsPostgresServer(PostgresServer):
    def more_options(self) -> list[str]:
        for name in ("cert.pem", "key.pem"):
            if shutil.which("chown") and (self.folder / name).stat().st_uid != self.folder.stat().st_uid:
                shutil.chown(self.folder / name, "postgres", "postgres")
        files = [f"-cssl_cert_file={self.folder}/cert.pem", f"-cssl_key_file={self.folder}/key.pem"]
        return ["-cssl=on", *files]


class TlsMariadbServer(MariadbServer):
    def more_options(self) -> list[str]:
        files = {"ca": "ca.pem", "cert": "cert.pem", "key": "key.pem"}
        return ["--log-bin", *(f"--ssl-{name}={self.folder / file}" for name, file in files.items())]


def address(server: Server, *, authority: str) -> str:
    """Return an address that asks for TLS with a server that `authority` vouches for."""
    plain = server.new_database()
    if server.scheme == "postgresql":
        return f"{plain}?sslmode=verify-full&sslrootcert={server.folder}/{authority}"
    return f"{plain.replace('root@', 'careful:x@')}?ssl_ca={server.folder}/{authority}"


async def test_a_verified_server_is_used(server: Server) -> None:
    """With the right authority the upgrade and the service connect, by TLS."""
    at = Place(address(server, authority="ca.pem"), server)
    async with open_committer(at) as committer:
        await applied(committer, place("A1"))
        if server.scheme == "postgresql":
            used = server.query("postgres", "SELECT count(*) FROM pg_stat_ssl WHERE ssl")
            assert used[0][0] >= 1
    name = at.address.partition("?")[0]
    assert rows(Place(name, server), "SELECT order_id FROM orders") == [("A1",)]


def test_a_stranger_is_not_talked_to(server: Server) -> None:
    """With another authority not even the upgrade connects."""
    with pytest.raises(DatabaseUnavailable, match="cannot be reached"):
        upgrade(address(server, authority="stranger.pem"))


def test_an_option_that_is_not_understood_is_named() -> None:
    """A misspelt option is an error, not a connection without TLS."""
    with pytest.raises(ConfigurationError, match="sslmode"):
        upgrade("mysql://root@127.0.0.1:1/orders?sslmode=require")
    with pytest.raises(ConfigurationError, match="ssl_ca=/nowhere"):
        upgrade("mysql://root@127.0.0.1:1/orders?ssl_ca=/nowhere")


def test_a_binary_log_without_trust_is_said_before_anything_is_made(server: Server) -> None:
    """Where the user may not make triggers the upgrade says what to set, and makes nothing."""
    if server.scheme == "postgresql":
        assert upgrade(server.new_database())  # only MariaDB and MySQL mistrust triggers
        return
    database = server.new_database()
    name = database.rpartition("/")[2]
    server.query("root", "CREATE USER plain@'127.0.0.1' IDENTIFIED BY 'x'")
    server.query("root", f"GRANT ALL ON {name}.* TO plain@'127.0.0.1'")
    own = database.replace("root@", "plain:x@")
    with pytest.raises(ConfigurationError, match="log_bin_trust_function_creators"):
        upgrade(own)
    assert server.query(name, "SHOW TABLES") == []
    server.query("root", "SET GLOBAL log_bin_trust_function_creators = 1")
    assert upgrade(own)
