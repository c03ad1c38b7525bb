"""Writes into guarantees.md how often each fault was brought about, and what was found: `make test-faults`.

It reads what the suite has written down. A cell that it says nothing about stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from enduring import DATABASES  # noqa: E402 - it lies where the tests are
from known import FAULTS  # noqa: E402

DOCUMENT = ROOT / "docs" / "guarantees.md"
BEGIN = "<!-- faults: written by `make test-faults` -->\n"
END = "<!-- end of faults -->\n"
TITLES = dict(zip(DATABASES, ("SQLite", "PostgreSQL", "MariaDB"), strict=True))
#: What a cell says of a fault that cannot happen there, and of one that was not brought about yet.
NEVER, NOT_YET = "–", "not yet"

Cells = dict[tuple[str, str], str]


def read_cells(text: str) -> Cells:
    """Return the cells of the table in a document, by fault and database."""
    table = text.partition(BEGIN)[2].partition(END)[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return {(row[0], database): cell for row in rows for database, cell in zip(DATABASES, row[1:], strict=True)}


def read_tally(path: Path) -> Cells:
    """Return what the suite has written down, as cells."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        counts.setdefault((entry.pop("fault"), entry.pop("database")), Counter()).update(entry)
    return {place: "{times}×: {accepted} / {found} / {charged}".format(**said) for place, said in counts.items()}


def table(cells: Cells) -> str:
    """Return the table, with a row for each fault that the suite knows."""
    lines = [f"| fault | {' | '.join(TITLES.values())} |", "| --- |" + " --- |" * len(TITLES)]
    for fault in FAULTS:
        said = [cells.get((fault.name, each), NOT_YET) if each in fault.on else NEVER for each in DATABASES]
        lines.append(f"| {fault.name} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def written(text: str, tally: Cells) -> str:
    """Return a document with its table as it should be."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(read_cells(text) | tally) + END + rest.partition(END)[2]


if __name__ == "__main__":
    found = written(DOCUMENT.read_text(encoding="utf-8"), read_tally(Path(sys.argv[1])))
    DOCUMENT.write_text(found, encoding="utf-8")
