"""Measure the service against its baselines, print the table, and keep it in bench/results.

make bench            every row that the installed servers allow
make bench-quick      rows 1, 2, 3 and 5, in about two minutes
python bench/run.py --rows 2,7 --pairs 3 --seconds 2
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
from rows import RATE, ROWS, WITH, Plan, Result  # noqa: E402

FULL = Plan(pairs=5, seconds=4, orders=20_000, celery_orders=1_000, grown=1_000_000)
QUICK = Plan(pairs=5, seconds=1, orders=6_000, celery_orders=300, grown=100_000)
QUICK_ROWS = (1, 2, 3, 5)
#: Rows, by what they need beside the service itself.
NEEDS = {"postgres": (1, 4, 5, 7, 9, 12, 13), "redis-server": (1, 3, 4, 5), "wrk": (1, 2, 3, 4, 9, 13)}
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
    for name, command in (("PostgreSQL", [_postgres(), "--version"]), ("Redis", ["redis-server", "--version"])):
        if command[0] and shutil.which(command[0]):
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name] = next(iter(re.findall(r"\d+\.[\d.]+", said)), said.strip())
    return found


def _postgres() -> str:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return shutil.which("postgres") or (str(found[-1]) if found else "")


def possible(wanted: tuple[int, ...]) -> list[int]:
    """Return the rows that the installed programs allow, and say of the others why not."""
    rows = list(wanted)
    for program, needed_by in NEEDS.items():
        if not (_postgres() if program == "postgres" else shutil.which(program)):
            for row in [row for row in rows if row in needed_by]:
                print(f"row {row} is left out: {program} is not installed", file=sys.stderr)
                rows.remove(row)
    return rows


def shown(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.2f} x" if value >= 1.5 else f"{value:.1%}"
    return f"{value:,.1f} {unit}".strip()


def table(results: list[Result]) -> Table:
    drawn = Table(box=None, pad_edge=False)
    for name in ("#", "what", "measured", "against", "ratio", "target", ""):
        drawn.add_column(name, justify="right" if name in ("ratio", "target") else "left")
    for each in results:
        bound = "≥" if (each.baseline and each.row != 10) or each.unit == RATE else "<"
        drawn.add_row(
            str(each.row),
            each.name,
            each.measured,
            f"{each.baseline} {each.against}" if each.baseline else "",
            shown(each.ratio, each.unit),
            f"{bound} {shown(each.target, each.unit)}",
            "holds" if each.holds else "missed",
        )
    return drawn


def keep(results: list[Result], about: dict[str, str]) -> None:
    """Write the results, in place of the rows that were measured again, and draw the plot."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "latest.json"
    rows = {result.row for result in results}
    before = json.loads(path.read_text()) if path.exists() else []
    new = [{**result._asdict(), "ratio": round(result.ratio, 4), "on": about["date"]} for result in results]
    kept = [line for line in before if line["row"] not in rows] + new
    lines = sorted(kept, key=lambda line: line["row"])
    path.write_text(json.dumps(lines, indent=1) + "\n")
    tell(lines, about)
    (RESULTS / "machine.json").write_text(json.dumps(about, indent=1) + "\n")
    subprocess.run([str(BASELINE_BIN / "python"), str(HERE / "plot.py"), str(path)], check=True)


def tell(lines: list[dict[str, Any]], about: dict[str, str]) -> None:
    """Put the figures into the README, between its two marks."""
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = [
        "| # | what | measured | against | ratio | target | |",
        "| --- | --- | --- | --- | ---: | ---: | --- |",
    ]
    for line in lines:
        bound = "≥" if (line["baseline"] and line["row"] != 10) or line["unit"] == RATE else "<"
        cells = [
            str(line["row"]),
            line["name"],
            line["measured"],
            f"{line['baseline']} {line['against']}" if line["baseline"] else "",
            shown(line["ratio"], line["unit"]),
            f"{bound} {shown(line['target'], line['unit'])}",
            "holds" if line["holds"] else "**missed**",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    on = ", ".join(f"{name} {value}" for name, value in about.items() if name not in ("date", "machine"))
    head = f"{about['date']}, {about['machine']}, {on}."
    readme.write_text(f"{before}{BEGIN}\n{head}\n\n" + "\n".join(rows) + f"\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=lambda text: tuple(int(part) for part in text.split(",")))
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--seconds", type=int)
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    plan = plan._replace(pairs=options.pairs or plan.pairs, seconds=options.seconds or plan.seconds)
    wanted = options.rows or (QUICK_ROWS if options.quick else tuple(ROWS))
    wanted = tuple(dict.fromkeys(WITH.get(row, row) for row in wanted))
    console = Console(width=200)
    about = header()
    console.print("  ".join(f"{name}: {value}" for name, value in about.items()))
    results: list[Result] = []
    for row in possible(wanted):
        started = time.monotonic()
        with ExitStack() as stack:
            found = ROWS[row](Site(stack), plan)
        results += found
        console.print(table(found))
        console.print(f"[dim]{time.monotonic() - started:.0f} s[/dim]")
        keep(found, about)
    console.rule()
    console.print(table(results))


main()
