"""Core statements as text with positional values: compiled once, then only filled."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from sqlalchemy import Table
from sqlalchemy.engine import Dialect
from sqlalchemy.sql import Executable

#: Statements that are kept compiled, at most.
STATEMENTS_MAX = 512

_MARK = re.compile(r"%\((\w+)\)s|__\[POSTCOMPILE_(\w+)\]")

#: The text cut at its values, and the values' names (a list's name is in the second set) and defaults.
_Compiled = tuple[list[str], list[str], frozenset[str], dict[str, Any]]


class Compiler:
    """Turns statements into text for one database; `mark(n)` is how it writes its nth value (from 1)."""

    def __init__(self, dialect: Dialect, mark: Callable[[int], str]) -> None:
        """`dialect` must name its values as %(name)s (paramstyle pyformat)."""
        self._dialect = dialect
        self._mark = mark
        self._known: dict[int, tuple[Executable, _Compiled]] = {}

    def bind(self, statement: Executable, values: dict[str, Any]) -> tuple[str, list[Any]]:
        """Return the text of `statement`, and its values in order.

        A list is padded to a power of two with its last value: few texts, so few are prepared anew.
        """
        pieces, names, lists, defaults = self._compile(statement)
        text = [pieces[0]]
        arguments: list[Any] = []
        for name, piece in zip(names, pieces[1:], strict=True):
            value = values[name] if name in values else defaults[name]
            if name in lists:
                size = 1 << (len(value) - 1).bit_length()
                first = len(arguments) + 1
                text.append(",".join([self._mark(first + index) for index in range(size)]))
                arguments += value + value[-1:] * (size - len(value))
            else:
                arguments.append(value)
                text.append(self._mark(len(arguments)))
            text.append(piece)
        return "".join(text), arguments

    def _compile(self, statement: Executable) -> _Compiled:
        # The statement is kept beside its text: an id is only unique while the object lives.
        known = self._known.get(id(statement))
        if known is None:
            compiled = statement.compile(dialect=self._dialect)  # type: ignore[attr-defined]
            found = _MARK.split(str(compiled))
            names = [one or other for one, other in zip(found[1::3], found[2::3], strict=True)]
            lists = frozenset(name for name in found[2::3] if name)
            known = (statement, (found[0::3], names, lists, dict(compiled.params)))
            if len(self._known) < STATEMENTS_MAX:
                self._known[id(statement)] = known
        return known[1]


@cache
def insert_into(table: Table, quote: str = '"') -> str:
    """Return the beginning of a statement that inserts rows as wide as the table is here.

    It names the columns: a newer version may have given the table others.
    """
    names = ", ".join(f"{quote}{column.name}{quote}" for column in table.columns)
    return f"INSERT INTO {table.name} ({names})"
