"""The example that places a month of a real shop's orders, run on a service of its own."""

from __future__ import annotations

import csv
import gzip
import re
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pytest

from auditing import assert_sound, charges, gateway_with_ledger, jobs_left, rows
from serving import Serving, environment

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "online_retail.py"
DATA = ROOT / "examples" / "data" / "online-retail-2010-12.csv.gz"
#: Seconds that one run of the example may take.
RUN_SECONDS_MAX = 150.0


class State(NamedTuple):
    """What is stored and charged."""

    metrics: dict[str, object]
    charged: list[tuple[str, int]]
    position: int


class Runs(NamedTuple):
    """Two runs of the example, and what the service held after each."""

    folder: Path
    first: subprocess.CompletedProcess[str]
    after_first: State
    second: subprocess.CompletedProcess[str]
    after_second: State


def run_example(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
        check=False,
    )


def state(service: Serving, folder: Path) -> State:
    position = rows(folder, "SELECT position FROM feed")[0][0]
    return State(service.client.get("/orders/metrics").json(), charges(folder), position)


def figures(output: str) -> dict[str, str]:
    """Return the report's lines by their first word."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in output.splitlines()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Two runs, one after the other, on a service that held two other orders before."""
    folder = tmp_path_factory.mktemp("retail")
    with Serving(folder, PAYMENT_GATEWAY=gateway_with_ledger(folder)) as service:
        for quantity in (1, 2):
            order = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": quantity, "price": "1.20"}]}
            service.until_rest(service.client.post("/orders", json=order).json()["order_id"])
        first = run_example(folder, "--url", service.url)
        after_first = state(service, folder)
        second = run_example(folder, "--url", service.url)
        yield Runs(folder, first, after_first, second, state(service, folder))


def test_the_first_run_agrees_with_the_file(runs: Runs) -> None:
    """Of 2,025 invoices 1,629 are accepted, worth GBP 823,746.14, and 396 are refused."""
    assert runs.first.returncode == 0, runs.first.stdout + runs.first.stderr
    report = figures(runs.first.stdout)
    assert report["2,025"] == "invoices, 1,629 of them valid orders worth GBP 823,746.14"
    assert report["accepted"] == "1,629 worth GBP 823,746.14"
    assert report["duplicates"].startswith("0 ")
    assert report["refused"].startswith("396 ")
    assert report["at"] == "rest 1,629 worth GBP 823,746.14:"
    assert "NO" not in report


def test_the_report_names_the_lines_at_fault(runs: Runs) -> None:
    """For some of the refused orders the report names the line that the problem document points at."""
    named = re.findall(r"^  (\S+): /items/\d+/quantity .*\(item \S+, .*: -\d+\)$", runs.first.stdout, re.M)
    assert len(named) == 5


def test_the_service_counts_what_was_accepted(runs: Runs) -> None:
    """/orders/metrics grows by 1,629, and says so in the report."""
    metrics = runs.after_first.metrics
    assert metrics["total_orders"] == 2 + 1_629
    assert metrics["order_status_counts"]["completed"] == 2 + 1_629
    assert re.search(r"^  total_orders +2 +1,631 +\+1,629$", runs.first.stdout, re.M)
    assert rows(runs.folder, "SELECT count(*) FROM orders") == [(2 + 1_629,)]
    assert jobs_left(runs.folder) == 0


def test_every_order_that_costs_something_is_charged_once(runs: Runs) -> None:
    """The gateway charges 1,559 orders once each, GBP 823,746.14 in all, and the 70 free ones never."""
    with gzip.open(DATA, "rt", newline="") as file:
        invoices: dict[str, list[dict[str, str]]] = {}
        for row in csv.DictReader(file):
            invoices.setdefault(row["InvoiceNo"], []).append(row)
    expected = {
        order_id: int(sum(int(row["Quantity"]) * Decimal(row["UnitPrice"]) for row in lines) * 100)
        for order_id, lines in invoices.items()
        if all(int(row["Quantity"]) >= 1 for row in lines)
    }
    free = {order_id for order_id, minor in expected.items() if minor == 0}
    assert len(free) == 70
    order_of = dict(rows(runs.folder, "SELECT gateway_key, order_id FROM payment_attempts"))
    made = [(order_of[key], minor) for key, minor in runs.after_first.charged]
    retail = {order_id: minor for order_id, minor in made if order_id in expected}
    assert len(made) == len(retail) + 2
    assert retail == {order_id: minor for order_id, minor in expected.items() if order_id not in free}
    assert sum(retail.values()) == 82_374_614
    statuses = "SELECT count(*) FROM orders WHERE total_minor = 0 AND payment_status = 'not_required'"
    assert rows(runs.folder, statuses) == [(70,)]
    assert_sound(runs.folder)


def test_the_orders_are_stored_as_the_file_has_them(runs: Runs) -> None:
    """Every line of a valid invoice is stored, the longest has 675, and 229 orders have no customer number."""
    with gzip.open(DATA, "rt", newline="") as file:
        in_file = [row for row in csv.DictReader(file) if row["InvoiceNo"] == "537434"]
    query = "SELECT item_id, name, quantity, price_minor FROM order_lines WHERE order_id = ? ORDER BY line"
    assert rows(runs.folder, query, "537434") == [
        (row["StockCode"], row["Description"] or None, int(row["Quantity"]), int(Decimal(row["UnitPrice"]) * 100))
        for row in in_file
    ]
    assert len(in_file) == 675
    guests = "SELECT count(*) FROM orders WHERE customer_id IS NULL AND customer_name = 'guest'"
    assert rows(runs.folder, guests) == [(229,)]


def test_the_second_run_changes_nothing(runs: Runs) -> None:
    """Run again, every valid order is refused as a duplicate; nothing is stored, changed or charged."""
    assert runs.second.returncode == 0, runs.second.stdout + runs.second.stderr
    report = figures(runs.second.stdout)
    assert report["accepted"] == "0 worth GBP 0.00"
    assert report["duplicates"].startswith("1,629 ")
    assert report["refused"].startswith("396 ")
    assert report["at"] == "rest 1,629 worth GBP 823,746.14:"
    assert runs.after_second == runs.after_first


def test_figures_that_disagree_are_an_exit_status(folder: Path) -> None:
    """Where the service holds another order under an invoice's number, the example says so and exits 1."""
    with gzip.open(DATA, "rt", newline="") as file, gzip.open(folder / "two.csv.gz", "wt") as few:
        few.writelines(line for line in file if line.startswith(("InvoiceNo", "536365", "536366")))
    with Serving(folder) as service:
        other = {"order_id": "536365", "customer_name": "Ann", "items": [{"name": "Pen", "quantity": 1}]}
        assert service.client.post("/orders", json=other).status_code == 201
        ended = run_example(folder, "two.csv.gz", "--url", service.url)
    assert ended.returncode == 1
    assert "NO  every valid order is stored, with its value" in ended.stdout


def test_without_a_service_the_example_says_how_to_start_one(folder: Path) -> None:
    """Where nothing listens the example exits 1 with one line on stderr."""
    ended = run_example(folder, "--url", "http://127.0.0.1:9")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "start one with `make run`" in ended.stderr
    assert "Traceback" not in ended.stderr
