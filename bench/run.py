"""Measure the service against its baselines, print the table, and keep it in bench/results.

make bench            every row that the installed servers allow
make bench-quick      rows 1, 2, 3 and 5, in about two minutes
python bench/run.py --rows 2,7 --pairs 3 --seconds 2

What cannot be measured here, for want of a program, has a line that says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from programs import BASELINE_BIN, Site  # noqa: E402
from results import Plan, Result, not_measured  # noqa: E402
from rows import ROWS, WITH  # noqa: E402

FULL = Plan(pairs=5, seconds=4, orders=20_000, celery_orders=1_000, grown=1_000_000)
QUICK = Plan(pairs=5, seconds=1, orders=6_000, celery_orders=300, grown=100_000)
QUICK_ROWS = ("1", "2", "3", "5")
#: Rows, by what they need beside the service itself.
NEEDS = {
    "postgres": ("1", "4", "5", "7", "9", "12", "13", "14"),
    "redis-server": ("1", "3", "4", "5"),
    "wrk": ("1", "2", "3", "4", "9", "13", "14"),
}
RESULTS = HERE / "results"
#: Between these the README has the figures.
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def header() -> dict[str, str]:
    """Return what was measured on."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ":?")
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} x {model.partition(':')[2].strip()}, {platform.system()}",
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
    }
    for name, command in (
        ("PostgreSQL", [_postgres(), "--version"]),
        ("Redis", ["redis-server", "--version"]),
        ("Go", ["go", "version"]),
        ("Node", ["node", "--version"]),
    ):
        if command[0] and shutil.which(command[0]):
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name] = next(iter(re.findall(r"\d+\.[\d.]+", said)), said.strip())
    return found


def _postgres() -> str:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return shutil.which("postgres") or (str(found[-1]) if found else "")


def missing_for(row: str) -> list[str]:
    """Return the programs that a row needs and that are not installed."""
    return [
        program
        for program, needed_by in NEEDS.items()
        if row in needed_by and not (_postgres() if program == "postgres" else shutil.which(program))
    ]


def measured(row: str, plan: Plan) -> list[Result]:
    """Measure a row, or say what it lacks."""
    if lacks := missing_for(row):
        also = "".join(f" and {other}" for other, with_it in WITH.items() if with_it == row)
        are = "is" if len(lacks) == 1 else "are"
        return [not_measured(row, f"row {row}{also}", f"{' and '.join(lacks)} {are} not installed")]
    with ExitStack() as stack:
        return ROWS[row](Site(stack), plan)


def place(row: str) -> tuple[int, str]:
    """Return where a row stands: 1, 1b, 2."""
    number = row.rstrip("b")
    return int(number), row.removeprefix(number)


def shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "x":
        return f"{value:.2f} x" if value >= 1 else f"{value:.1%}"
    return f"{value:,.1f} {unit}".strip()


def cost(line: dict[str, Any]) -> str:
    """Return the microseconds of CPU for an order, serving + working + database; then the baseline's."""
    told = []
    for name, parts in (("", line["cpu"]), (line["baseline"], line["cpu_against"])):
        if parts is not None:
            told.append(f"{name} {' + '.join(f'{microseconds:,.0f}' for microseconds in parts.values())}".strip())
    return "; ".join(told)


COLUMNS = ("#", "what", "measured", "against", "ratio", "target", "", "µs of CPU an order")


def cells(line: dict[str, Any]) -> list[str]:
    """Return what the table has of one line, column by column."""
    return [
        line["row"],
        line["name"],
        line["measured"],
        f"{line['baseline']} {line['against']}".strip() if line["baseline"] else "",
        shown(line["ratio"], line["unit"]),
        "" if line["target"] is None else f"{line['bound']} {shown(line['target'], line['unit'])}",
        {True: "holds", False: "**missed**", None: ""}[line["holds"]],
        cost(line),
    ]


def table(lines: list[dict[str, Any]]) -> Table:
    drawn = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        drawn.add_column(name, justify="right" if name in ("ratio", "target") else "left")
    for line in lines:
        drawn.add_row(*(cell.strip("*") for cell in cells(line)))
    return drawn


def keep(lines: list[dict[str, Any]], about: dict[str, str]) -> None:
    """Write the figures in place of those that were measured before, and draw the plot.

    What could not be measured this time takes no earlier figure away.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "latest.json"
    before = json.loads(path.read_text()) if path.exists() else []
    earlier = {name_of(line): line for line in before if line["ratio"] is not None}
    measured = {line["row"] for line in lines if line["ratio"] is not None}
    known = {line["row"] for line in before}
    new = [line for line in lines if line["row"] in measured or line["row"] not in known]
    if not new:
        return
    new = [earlier.get(name_of(line), line) if line["ratio"] is None else line for line in new]
    rows = {line["row"] for line in new}
    kept = [line for line in before if line["row"] not in rows] + new
    kept.sort(key=lambda line: place(line["row"]))
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    tell(kept, about)
    (RESULTS / "machine.json").write_text(json.dumps(about, indent=1) + "\n")
    subprocess.run([str(BASELINE_BIN / "python"), str(HERE / "plot.py"), str(path)], check=True)


def name_of(line: dict[str, Any]) -> tuple[str, str, str | None]:
    return line["row"], line["name"], line["baseline"]


def tell(lines: list[dict[str, Any]], about: dict[str, str]) -> None:
    """Put the figures into the README, between its two marks."""
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = [f"| {' | '.join((*COLUMNS, 'on'))} |", "| --- | --- | --- | --- | ---: | ---: | --- | --- | --- |"]
    rows += [f"| {' | '.join((*cells(line), line['on']))} |" for line in lines]
    on = ", ".join(f"{name} {value}" for name, value in about.items() if name not in ("date", "machine"))
    head = f"{about['machine']}, {on}."
    readme.write_text(f"{before}{BEGIN}\n{head}\n\n" + "\n".join(rows) + f"\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--seconds", type=int)
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    plan = plan._replace(pairs=options.pairs or plan.pairs, seconds=options.seconds or plan.seconds)
    wanted = options.rows or (QUICK_ROWS if options.quick else tuple(ROWS))
    wanted = tuple(dict.fromkeys(WITH.get(row, row) for row in wanted))
    if unknown := [row for row in wanted if row not in ROWS]:
        parser.error(f"there is no row {unknown[0]}; there are {', '.join(sorted({*ROWS, *WITH}, key=place))}")
    console = Console(width=240)
    about = header()
    console.print("  ".join(f"{name}: {value}" for name, value in about.items()))
    everything: list[dict[str, Any]] = []
    for row in wanted:
        started = time.monotonic()
        lines = [result.line(about["date"]) for result in measured(row, plan)]
        everything += lines
        console.print(table(lines))
        console.print(f"[dim]{time.monotonic() - started:.0f} s[/dim]")
        keep(lines, about)
    console.rule()
    console.print(table(everything))


main()
