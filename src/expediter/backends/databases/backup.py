"""A backup of the database: a copy of the file on SQLite; for a server, the command of its own tool."""

from __future__ import annotations

import shlex
from pathlib import Path

from sqlalchemy.engine import URL

from expediter.backends.databases import parse_url
from expediter.backends.databases.sqlite import database_path
from expediter.backends.databases.sqlite_copy import copy_database


def back_up(address: str, target: Path) -> int | str:
    """Copy the database at `address` to a new file, and return its bytes; for a server, the command that does it.

    The command has no password: the tools ask for it, or take it from ~/.pgpass and ~/.my.cnf. Raises
    ConfigurationError, DatabaseUnavailable.
    """
    kind, url = parse_url(address)
    if kind == "sqlite":
        return copy_database(database_path(url), target)
    words = _pg_dump(url, target) if kind == "postgresql" else _mariadb_dump(url, target)
    return shlex.join(words)


def _pg_dump(url: URL, target: Path) -> list[str]:
    place = url.set(drivername="postgresql")._replace(password=None).render_as_string(hide_password=False)
    return ["pg_dump", "--format=custom", f"--file={target}", place]


def _mariadb_dump(url: URL, target: Path) -> list[str]:
    place = [f"--host={url.host or 'localhost'}", f"--port={url.port or 3306}", f"--user={url.username or 'root'}"]
    if url.password:
        place.append("--password")
    if authorities := url.query.get("ssl_ca"):
        place.append(f"--ssl-ca={authorities}")
    return ["mariadb-dump", "--single-transaction", *place, f"--result-file={target}", url.database or ""]
