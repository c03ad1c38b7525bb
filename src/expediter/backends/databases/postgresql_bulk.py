"""Changes of many rows on PostgreSQL, as text: one statement each, around lists of values, one list a column.

Several go in one statement, because each would be a round trip (docs/decisions/013-plans-on-postgresql.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import BigInteger, Column, Integer, SmallInteger, String, Table

from expediter.backends.databases import Collision, Row
from expediter.backends.databases.statements import insert_into

#: What the values of a column are sent as; the first kind that fits.
_TYPES = ((SmallInteger, "smallint"), (BigInteger, "bigint"), (Integer, "integer"), (String, "text"))
#: Whole numbers and null are written alike in JSON and in PostgreSQL's arrays.
_to_json = msgspec.json.Encoder().encode


class Change(NamedTuple):
    """A statement about many rows, around the lists of their values: one list a column, of these types."""

    before: str
    types: tuple[str, ...]
    after: str

    def text(self, first: int) -> str:
        """Return the statement; its values are numbered from `first` on."""
        lists = ", ".join([f"${number}::text::{kind}[]" for number, kind in enumerate(self.types, first)])
        return f"{self.before}{lists}{self.after}"

    def arrays(self, rows: Sequence[Row]) -> list[str]:
        """Return the values of the statement for these rows."""
        if not rows:
            return ["{}"] * len(self.types)
        return [_array(kind, values) for kind, values in zip(self.types, zip(*rows, strict=True), strict=True)]


class Pending(NamedTuple):
    """A change that was asked for; with `exactly` it must find one row for each of these."""

    table: Table
    change: Change
    rows: Sequence[Row]
    exactly: bool = False


def check(pending: Sequence[Pending], found: Sequence[int]) -> None:
    """Raise Collision where a change found another number of rows than it was about."""
    for each, count in zip(pending, found, strict=True):
        if each.exactly and count != len(each.rows):
            raise Collision(each.table, count, len(each.rows))


def _array(kind: str, values: Sequence[Any]) -> str:
    """Return values as PostgreSQL writes an array; the driver's own way with lists takes twice the time.

    https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
    """
    if kind != "text":
        return f"{{{_to_json(values)[1:-1].decode()}}}"
    quoted = [
        "NULL" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for value in values
    ]
    return f"{{{','.join(quoted)}}}"


@cache
def insertion(table: Table) -> Change:
    """Return the change that inserts rows as wide as the table."""
    return Change(f"{insert_into(table)} SELECT * FROM unnest(", _types(table.columns), ")")


@cache
def addition(table: Table) -> Change:
    """Return the change that adds the last column of rows to what is there, or inserts them."""
    *key, value = (column.name for column in table.columns)
    more = f"{value} = {table.name}.{value} + excluded.{value}"
    before, types, after = insertion(table)
    return Change(before, types, f"{after} ON CONFLICT ({', '.join(key)}) DO UPDATE SET {more}")


@cache
def updating(table: Table, columns: tuple[str, ...], keys: tuple[str, ...]) -> Change:
    """Return the change that sets `columns` of the rows that `keys` find."""
    names = (*columns, *keys)
    changes = ", ".join(f"{name} = v.{name}" for name in columns)
    where = " AND ".join(f"t.{name} = v.{name}" for name in keys)
    types = _types([table.columns[name] for name in names])
    before = f"UPDATE {table.name} t SET {changes} FROM unnest("
    return Change(before, types, f") AS v({', '.join(names)}) WHERE {where}")


@cache
def removal(table: Table) -> Change:
    """Return the change that deletes rows by their first column."""
    column, *_ = table.columns
    return Change(f"DELETE FROM {table.name} WHERE {column.name} = ANY(", _types([column]), ")")


def counts(changes: int) -> list[str]:
    """Return texts that count what so many changes have returned."""
    return [f"(SELECT count(*) FROM c{number})" for number in range(changes)]


def named(changes: Sequence[str]) -> str:
    """Return the changes as the parts of a WITH: c0, c1 and so on."""
    return ", ".join([f"c{number} AS ({change})" for number, change in enumerate(changes)])


class _Appending(NamedTuple):
    """A statement that makes changes, then takes numbers from a sequence and inserts a row for each."""

    sequence: str
    number: str
    into: str
    names: str
    rows: Change

    def text(self, changes: Sequence[str], first: int) -> str:
        """Return the statement after `changes`; its own values are the rows, from `first` on."""
        # Readers wait for whoever holds the sequence, so that comes last. Left to itself PostgreSQL would begin
        # with it; a condition that counts what the changes return has it done after them. It also has numbers
        # follow the order of commits where that matters: whatever row this waited for is its own by now.
        found = counts(len(changes))
        made = " + ".join(found)
        parts = [named(changes)] if changes else []
        parts += [
            f"held AS (SELECT {self.sequence}_hold() AS newest{f' WHERE {made} >= 0' if made else ''})",
            f"appended AS ({self.into} SELECT nextval('{self.sequence}'), {self.names} "
            f"FROM held, {self.rows.text(first)} RETURNING {self.number})",
        ]
        newest = f"greatest(newest, (SELECT max({self.number}) FROM appended))"
        return f"WITH {', '.join(parts)} SELECT {', '.join([newest, *found])} FROM held"


@cache
def appending(last: Column[int], table: Table) -> _Appending:
    """Return the statement that numbers rows by the sequence that takes the place of `last`."""
    number, *columns = table.columns
    names = ", ".join(column.name for column in columns)
    rows = Change("unnest(", _types(columns), f") AS v({names})")
    return _Appending(sequence_of(last), number.name, insert_into(table), names, rows)


def sequence_of(last: Column[int]) -> str:
    """Return the sequence that takes a column's place here."""
    return f"{last.table.name}_{last.name}"


def ask_settled(last: Column[int]) -> str:
    """Return the question up to which number nothing can appear any more."""
    return f"SELECT {sequence_of(last)}_settled()"


def _types(columns: Iterable[Column[Any]]) -> tuple[str, ...]:
    return tuple(next(name for kind, name in _TYPES if isinstance(column.type, kind)) for column in columns)
