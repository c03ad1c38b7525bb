"""A copy of a SQLite database, made while others write."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from expediter.errors import ConfigurationError, DatabaseUnavailable


def copy_database(source: Path, target: Path) -> int:
    """Copy a database as it is at one moment, and return the bytes of the copy.

    Others write meanwhile; the log of the source grows until the copy is made. The copy is one file that only its
    owner may read. It is read through once before it gets its name, and it outlives a power cut from then on.
    Raises ConfigurationError for a target that exists or cannot be made, DatabaseUnavailable.
    """
    if not source.exists():
        raise ConfigurationError(f"There is no database at {source}: look at DATABASE_URL")
    if target.exists():
        raise ConfigurationError(f"{target} exists already: a backup never replaces one, choose another name")
    part = target.with_name(f"{target.name}.part")
    with _claimed(part):
        try:
            _copy(source, part)
        except sqlite3.Error as error:
            raise DatabaseUnavailable(f"{source} cannot be copied to {target}: {error}") from error
        size = part.stat().st_size
        part.rename(target)
    _sync(target.parent)
    return size


@contextmanager
def _claimed(part: Path) -> Iterator[None]:
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError as error:
        raise ConfigurationError(
            f"{part} exists: another backup is being made, or one was cut off; remove it then"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"{part} cannot be made: {error.strerror}") from error
    try:
        yield
    finally:
        for end in ("", "-journal"):
            with suppress(FileNotFoundError):
                part.with_name(part.name + end).unlink()


def _copy(source: Path, part: Path) -> None:
    with (
        closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True, timeout=5)) as old,
        closing(sqlite3.connect(part)) as new,
    ):
        # In one step, which is one read transaction: a copy in several begins anew with every commit of another.
        old.backup(new)
        new.execute("PRAGMA journal_mode=DELETE")
        (found,) = new.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"the copy is damaged, so the database may be: {found}")
    _sync(part)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
