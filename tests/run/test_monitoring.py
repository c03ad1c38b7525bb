"""deploy/ under the real Prometheus: what is scraped, asked for, and rung the bell for."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import httpx2
import psutil
import pytest

from auditing import wait_until
from monitoring import DEPLOYED, ROOT, Prometheus, always, faster, panels, prometheus, promtool
from receiving import Receiver
from servers import RedisServer, Server, free_port
from serving import PATIENCE_SECONDS, Program, attending

TEXT = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
PRICED = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 2, "price": "1.20"}]}
FREE = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 2}]}
#: Seconds within which a scrape is answered; then Prometheus, asking every two seconds, would give it up.
SCRAPE_SECONDS_MAX = 2.0


class Watched(NamedTuple):
    """Two serving processes and a worker, and the Prometheus that scrapes them."""

    client: httpx2.Client
    prometheus: Prometheus
    worker: psutil.Process
    database: Server

    def place(self, order: dict[str, object]) -> str:
        placed = self.client.post("/orders", json=order)
        assert placed.status_code == 201, placed.text
        return str(placed.json()["order_id"])

    def scrape(self) -> str:
        """Scrape once; it is answered in time, whatever hangs."""
        began = time.monotonic()
        answer = self.client.get("/metrics")
        assert time.monotonic() - began < SCRAPE_SECONDS_MAX
        return answer.text

    def status(self, order_id: str) -> str:
        return str(self.client.get(f"/orders/{order_id}").json()["status"])


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, postgresql: Server, redis_server: RedisServer
) -> Iterator[Watched]:
    """Nobody listens where their gateway should be; one webhook is delivered to a receiver."""
    folder = tmp_path_factory.mktemp("watched")
    settings = {
        "DATABASE_URL": postgresql.made_database(),
        "REDIS_URL": redis_server.new_database(),
        "BROKER_URL": redis_server.new_database(),
        "DRAIN_SECONDS": "1",
        "API_WORKERS": "2",
        "WORKER_COUNT": "1",
        "PAYMENT_GATEWAY": f"http://127.0.0.1:{free_port()}/",
        "PAYMENT_RETRY_DELAY": "0.01",
        "PAYMENT_RETRY_ATTEMPTS": "100",
    }
    with ExitStack() as stack:
        stack.enter_context(attending(folder, settings))
        program = Program(folder, "up", "--foreground", **settings)
        stack.callback(program.stop)
        url = program.wait_for(r"listens on (http://[^\s]+)")[1]
        client = stack.enter_context(httpx2.Client(base_url=url, timeout=PATIENCE_SECONDS))
        configuration = faster(folder, url.removeprefix("http://"))
        found = stack.enter_context(prometheus(folder, configuration, free_port()))
        receiver = stack.enter_context(Receiver())
        receiver.subscribe(client)
        worker = psutil.Process(int((folder / "run" / "worker-1.pid").read_text()))
        yield Watched(client, found, worker, postgresql)


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading of the page, without the marks around code."""
    part = TEXT.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_files_are_what_promtool_takes() -> None:
    """The configuration and its rules are right, and every rule has a name of its own."""
    checked = promtool("check", "config", "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert len(re.findall(r"SUCCESS: \d+ rules found", checked.stdout)) == 2, checked.stdout


def test_every_expression_gives_data_after_load(watched: Watched) -> None:
    """Prometheus scrapes the service; each rule and each panel has numbers, once orders have come through."""
    done = [watched.place(FREE) for _ in range(20)]
    waiting = [watched.place(PRICED) for _ in range(8)]
    wait_until(lambda: all(watched.status(each) == "completed" for each in done))
    assert watched.client.get("/nowhere").status_code == 404
    assert set(watched.prometheus.targets().values()) <= {"up", "unknown"}

    asked = {rule.name: always(rule.query) for rule in watched.prometheus.rules()} | dict(panels())
    asked |= {f"{title}: {query}": query for title, query in panels()}
    assert len(asked) > 60
    silent = dict(asked)

    def all_speak() -> bool:
        for name, query in list(silent.items()):
            if watched.prometheus.value(query):
                del silent[name]
        return not silent

    try:
        wait_until(all_speak, 30)
    finally:
        assert not silent, silent
    assert [rule for rule in watched.prometheus.rules() if rule.health == "err"] == []
    assert watched.prometheus.value("sum(expediter_process_up)") == {"{}": 3}
    assert watched.prometheus.value("sum(expediter_orders)") == {"{}": len(done) + len(waiting)}


def test_what_is_scraped_is_what_promtool_takes(watched: Watched) -> None:
    """The names and units are by the conventions of Prometheus."""
    checked = promtool("check", "metrics", given=watched.client.get("/metrics").text)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_page_has_every_number_that_is_told(watched: Watched) -> None:
    """Each name is in one of the two tables, with its kind and its labels; and nothing else is there."""
    told = watched.scrape()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", told, re.M))
    own, system = rows("### Of each process"), rows("### Of the whole system")
    assert {name: kind for name, kind, *_ in own + system} == kinds
    for name, kind, labels, _ in own + system:
        bucket = "_bucket" if kind == "histogram" else ""
        found = re.search(rf"^{name}{bucket}(?:{{(.*)}})? \S+$", told, re.M)
        assert found is not None, name
        shown = set(re.findall(r'(\w+)="', found[1] or "")) - {"le"}
        more = {"process"} if any(name == each[0] for each in own) else set()
        assert shown == more | set(filter(None, labels.split(", "))), name


def test_the_page_has_every_alert(watched: Watched) -> None:
    """The table has the alerts that there are, in their order, and how urgent they are."""
    text = (DEPLOYED / "alerts.yml").read_text(encoding="utf-8")
    alerts = re.findall(r"- alert: (\w+)\n(?:.*\n)*?\s+labels: {severity: (\w+)}", text)
    assert [tuple(row[:2]) for row in rows("## Alerts")] == alerts
    assert {name for name, _ in alerts} <= {rule.name for rule in watched.prometheus.rules()}


def test_the_commands_of_the_page_work(watched: Watched) -> None:
    """What is to be typed first works as it stands; Prometheus itself is started as it says by every test here."""
    first, check, start = re.findall(r"^```sh\n(.*?)```", TEXT, re.M | re.S)[0].splitlines()
    first = first.replace("http://127.0.0.1:8000/", str(watched.client.base_url).rstrip("/") + "/")
    for line in (first, check):
        ended = subprocess.run(line.split(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, ended.stderr
    assert start.split()[:2] == ["prometheus", "--config.file=deploy/prometheus/prometheus.yml"]


def test_the_bell_rings_when_the_gateway_is_away(watched: Watched) -> None:
    """Charges that find nobody open the breaker, and the alert fires."""
    for _ in range(6):
        watched.place(PRICED)
    watched.prometheus.until_firing("ExpediterGatewayBreakerOpen")
    assert not {"ExpediterDatabaseAway", "ExpediterAway"} & watched.prometheus.firing()


def test_the_bell_rings_when_orders_wait_for_too_long(watched: Watched) -> None:
    """A worker that stands still leaves orders to wait; the alert fires, and the process is named."""
    watched.worker.suspend()
    try:
        order_id = watched.place(FREE)
        assert 'expediter_process_up{process="worker-1"} 0.0' in watched.scrape()
        watched.prometheus.until_firing("ExpediterQueueTooOld")
        watched.prometheus.until_firing("ExpediterProcessAway")
    finally:
        watched.worker.resume()
    wait_until(lambda: watched.status(order_id) == "completed")
    wait_until(lambda: "ExpediterQueueTooOld" not in watched.prometheus.firing())


def test_the_bell_rings_when_the_database_is_away(watched: Watched) -> None:
    """A database that hangs: scrapes are answered all the same, and the alert fires."""
    with watched.database.frozen():
        wait_until(lambda: 'expediter_dependency_up{dependency="database"} 0.0' in watched.scrape())
        assert "expediter_http_requests_total{" in watched.scrape()
        watched.prometheus.until_firing("ExpediterDatabaseAway")
        assert "ExpediterAway" not in watched.prometheus.firing()
    wait_until(lambda: "ExpediterDatabaseAway" not in watched.prometheus.firing())
