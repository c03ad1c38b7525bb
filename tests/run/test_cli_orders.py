"""`expediter orders ...`: the same answers from a service at an address and from the settings' own database."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from auditing import order_ids, rows
from servers import RedisServer, free_port
from serving import Program, Serving, environment

#: Seconds that one command may take.
COMMAND_SECONDS_MAX = 60.0

DECLINED = ("--token", "tok_declined")


class Terminal:
    """A person at a terminal, in the service's folder."""

    def __init__(self, folder: Path, *options: str, **settings: str) -> None:
        self.folder, self.options, self.settings = folder, options, settings

    def run(self, *words: str, typed: str = "", says: int = 0) -> subprocess.CompletedProcess[str]:
        """Run `expediter orders ...` to its end, which has the exit status `says`."""
        ended = subprocess.run(
            [sys.executable, "-m", "expediter", "orders", *words, *self.options],
            cwd=self.folder,
            env=environment(self.folder, **self.settings),
            input=typed,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            check=False,
        )
        assert ended.returncode == says, (ended.stdout, ended.stderr)
        assert "Traceback" not in ended.stderr, ended.stderr
        return ended

    def lines(self, *words: str, typed: str = "", says: int = 0) -> list[str]:
        return self.run(*words, typed=typed, says=says).stdout.splitlines()


HERE, THERE = "the settings", "an address"


@pytest.fixture
def terminal(request: pytest.FixtureRequest, folder: Path) -> Iterator[Terminal]:
    """Somebody who asks beside a running service: its address, or its database."""
    with Serving(folder) as service:
        yield Terminal(folder, *(("--url", service.url) if request.param == THERE else ()))


@pytest.mark.parametrize("terminal", [HERE, THERE], indirect=True)
def test_a_person_s_day(terminal: Terminal) -> None:
    """Place, watch, list, show, explain, retry and cancel, in words."""
    placed = terminal.lines(
        "place", "--customer", "Alice", "--item", "2 x Pen @ 1.20", "--item", "Ink@3.50", "--id", "A1"
    )
    assert placed == ["Placed A1: 5.90 USD, pending"]
    watched = terminal.lines("watch", "A1")
    assert [line.split()[3] for line in watched][:2] == ["order.placed", "payment.started"]
    assert watched[-1].endswith("order.completed         status completed")

    terminal.run("place", "--customer", "Bob", "--item", "Cup @ 4.00", "--id", "A2", *DECLINED)
    failed = terminal.lines("watch", "A2", says=1)
    assert failed[-1].endswith("status payment_failed, payment status declined, The card was declined (simulated)")

    heading, *listed = terminal.lines("list")
    assert heading.split() == ["ORDER", "STATUS", "PAYMENT", "TOTAL", "PLACED"]
    assert [line.split()[:5] for line in listed] == [
        ["A2", "payment_failed", "declined", "4.00", "USD"],
        ["A1", "completed", "paid", "5.90", "USD"],
    ]
    assert len(terminal.lines("list", "--status", "payment_failed")) == 2
    assert len(terminal.lines("list", "--limit", "1")) == 2

    shown = terminal.lines("show", "A1")
    assert shown[0] == "A1  completed, payment paid"
    assert "  customer  Alice" in shown
    assert "  line 1    2 x Pen @ 1.20" in shown
    explained = terminal.lines("explain", "A2")
    why = "It is payment_failed; nothing more will happen to it unasked."
    assert explained[1] == f"  {why} POST to its /retry to try again, or to its /cancel."
    assert "charge 1: declined" in explained[-1]

    terminal.run("retry", "A2")
    terminal.run("watch", "A2", says=1)
    assert terminal.lines("cancel", "A2") == ["A2  cancelled, payment declined"]
    refused = terminal.run("cancel", "A1", says=1)
    assert refused.stderr.startswith("expediter: Order A1 is completed and cannot become cancelled")
    assert terminal.lines("refund", "A1", "--amount", "1.50") == ["refund 1: 1.50 USD, pending"]
    assert terminal.lines("refund", "A1", "--by-hand", "cash 7") == ["refund 2: 4.40 USD, succeeded"]
    assert len(terminal.lines("refund", "A1", "--list")) == 2
    refused = terminal.run("refund", "A1", says=1)
    assert "0.00 are left to refund" in refused.stderr


@pytest.mark.parametrize("terminal", [HERE], indirect=True)
def test_json_has_the_amounts_as_they_are(terminal: Terminal) -> None:
    """`--json` is the document of the interface, its amounts with all their digits."""
    order = '{"order_id": "A1", "customer_name": "Al ü", "items": [{"name": "Pen", "quantity": 2, "price": 1.10}]}'
    printed = terminal.run("place", "-", "--json", typed=order).stdout
    assert '"total_amount": 2.20' in printed
    assert json.loads(printed)["customer_name"] == "Al ü"
    events = [json.loads(line) for line in terminal.lines("watch", "A1", "--json")]
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    (line,) = terminal.lines("list", "--json")
    assert '"price":1.10' in line
    assert json.loads(terminal.run("show", "A1", "--json").stdout)["status"] == "completed"
    assert json.loads(terminal.run("explain", "A1", "--json").stdout)["at_rest"] is True


@pytest.mark.parametrize("terminal", [THERE], indirect=True)
def test_what_is_wrong_is_said(terminal: Terminal) -> None:
    """A refusal has its reason and every fault, and is exit status 1; a wrong call is 2."""
    assert terminal.run("show", "nobody", says=1).stderr == "expediter: Order not found\n"
    assert "No order can have the id" in terminal.run("show", "metrics", says=1).stderr
    order = '{"items": [{"quantity": 0, "name": "Pen"}, {"name": "Ink", "quantity": -1}], "customer_name": "A"}'
    said = terminal.run("place", "-", typed=order, says=1).stderr.splitlines()
    assert [line.strip().split()[0] for line in said[1:]] == ["/items/0/quantity:", "/items/1/quantity:"]
    assert "name a file" in " ".join(terminal.run("place", says=2).stderr.split())
    assert "there.json cannot be read" in terminal.run("place", "there.json", says=2).stderr
    assert order_ids(terminal.folder) == set()


@pytest.mark.parametrize("terminal", [THERE], indirect=True)
def test_a_key_makes_a_change_happen_once(terminal: Terminal) -> None:
    """The same command with the same `--key` again gives the same order, and places no second one."""
    words = ("place", "--customer", "Al", "--item", "Pen @ 1", "--key", "mine", "--json")
    one, two = (json.loads(terminal.run(*words).stdout)["order_id"] for _ in range(2))
    assert one == two
    assert order_ids(terminal.folder) == {one}


def test_all_are_listed_page_by_page(folder: Path) -> None:
    """`list --all` goes on over all pages, each order once; whoever stops reading early hears no complaint."""
    terminal = Terminal(folder)
    subprocess.run(
        [sys.executable, "-m", "expediter", "seed", "--count", "450"],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        check=True,
        timeout=COMMAND_SECONDS_MAX,
    )
    listed = [json.loads(line)["order_id"] for line in terminal.lines("list", "--all", "--json")]
    assert len(listed) == 450
    assert set(listed) == order_ids(folder)
    ended = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -m expediter orders list --all | head -1', sys.executable],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS_MAX,
        check=False,
    )
    assert ended.stdout.startswith("ORDER")
    assert ended.stderr == ""


def test_orders_wait_for_a_service_that_is_not_there(folder: Path) -> None:
    """Without a running service an order is placed all the same, and is worked off as soon as there is one."""
    terminal = Terminal(folder)
    terminal.run("place", "--customer", "Al", "--item", "Pen @ 1", "--id", "A1")
    assert terminal.lines("show", "A1")[0] == "A1  pending, payment pending"
    with Serving(folder):
        terminal.run("watch", "A1")
    assert terminal.lines("show", "A1")[0] == "A1  completed, payment paid"


@pytest.mark.parametrize("compat", ["delivery", "streams"])
def test_the_terminal_speaks_no_dialect(folder: Path, compat: str) -> None:
    """Where the service speaks another's dialect, the terminal shows what is stored."""
    terminal = Terminal(folder, COMPAT=compat)
    terminal.run("place", "--customer", "Al", "--item", "Pen @ 1", "--id", "A1")
    assert terminal.lines("show", "A1")[0].startswith("A1  pending, payment ")


def test_queued_changes_go_through_the_broker(folder: Path, redis_server: RedisServer) -> None:
    """With INTAKE=queued an order is placed with the broker, shown while it waits there, and then worked off."""
    url = redis_server.new_database()
    settings = {"INTAKE": "queued", "BROKER_URL": url, "REDIS_URL": url}
    terminal = Terminal(folder, **settings)
    terminal.run("place", "--customer", "Al", "--item", "Pen @ 1", "--id", "A1")
    assert rows(folder, "SELECT count(*) FROM orders") == [(0,)]
    assert terminal.lines("show", "A1")[0] == "A1  pending, payment pending"
    worker = Program(folder, "work", **settings)
    try:
        worker.wait_for("works off")
        terminal.run("watch", "A1")
    finally:
        worker.stop()


@contextmanager
def scripted(*statuses: int) -> Iterator[tuple[str, list[str]]]:
    """The address of a service that answers with these statuses in turn, and the keys that it was sent."""
    keys: list[str] = []
    left = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            keys.append(self.headers["Idempotency-Key"])
            status = left.pop(0)
            if status:
                body = b'{"order_id": "A1", "status": "pending", "error": "not now"}'
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", keys
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_change_is_sent_again_with_the_same_key(folder: Path) -> None:
    """No answer and 503 are borne with, three times; every time it is the same change."""
    with scripted(503, 0, 503, 201) as (url, keys):
        terminal = Terminal(folder, "--url", url)
        assert terminal.lines("place", "--customer", "Al", "--item", "Pen @ 1") == ["Placed A1, pending"]
        assert len(keys) == 4
        assert len(set(keys)) == 1
    with scripted(503, 503, 503, 503) as (url, keys):
        assert Terminal(folder, "--url", url).run("cancel", "A1", says=1).stderr == "expediter: not now\n"


def test_a_change_without_an_answer_names_its_key(folder: Path) -> None:
    """Where nobody answers, the message says so, and how to find out whether the change was made."""
    terminal = Terminal(folder, "--url", f"http://127.0.0.1:{free_port()}")
    said = terminal.run("cancel", "A1", says=1).stderr
    assert "Connection refused" in said
    assert "--key cli-" in said
    assert "Nobody answers" in terminal.run("list", says=1).stderr
    assert "is no address" in Terminal(folder, "--url", "ftp://shop").run("list", says=2).stderr
