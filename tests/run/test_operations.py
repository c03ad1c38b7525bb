"""docs/operations.md, carried out: every set-up as it stands there, and every command that looks into one."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest

from auditing import wait_until
from servers import RabbitServer, Server
from serving import FAST, PATIENCE_SECONDS
from shopping import online_retail

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
#: The lines of each set-up, by its heading.
SETUPS = dict(re.findall(r"^### ([^\n]+)\n(?:(?!^#).)*?```env\n(.*?)```", TEXT, re.M | re.S))
#: The cells of every row of every table.
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")] for line in TEXT.splitlines() if line.startswith("| ")
]
INVOICES = [order for order in online_retail.read_orders(online_retail.DATA) if online_retail.is_valid(order)][:25]
ALONE, CACHED = "SQLite alone", "SQLite and Redis"
QUEUED, STREAMS = "MySQL, Redis and RabbitMQ, queued", "PostgreSQL and Redis"

Find = Callable[[str], Any]


def on_throwaway_servers(lines: str, server_of: Find) -> str:
    """Return the lines of a set-up with other hosts, ports, users and names of databases, and nothing else."""
    settings = dict(line.split("=", 1) for line in lines.splitlines())
    redis_url = ""
    for name, value in settings.items():
        if value.startswith("redis://"):
            redis_url = redis_url or server_of("redis_server").new_database()
            settings[name] = redis_url
        elif value.startswith("postgresql://"):
            settings[name] = server_of("postgresql").new_database()
    if "DB_HOST" in settings:
        mariadb: Server = server_of("mariadb")
        database = mariadb.new_database().rpartition("/")[2]
        settings |= {"DB_HOST": f"127.0.0.1:{mariadb.port}", "DB_USER": "root", "DB_PASS": "", "DB_NAME": database}
    if "RABBITMQ_HOST" in settings:
        rabbit: RabbitServer = server_of("rabbitmq")
        settings |= {"RABBITMQ_PORT": str(rabbit.port), "RABBITMQ_QUEUE_NAME": rabbit.new_queue()}
        settings |= {"RABBITMQ_USER": "guest", "RABBITMQ_PASSWORD": "guest"}
    return "".join(f"{name}={value}\n" for name, value in settings.items())


class Setup:
    """A set-up of the document in a folder of its own, up and running."""

    def __init__(self, folder: Path, lines: str) -> None:
        self.folder = folder
        (folder / ".env").write_text(lines)
        self.settings = dict(line.split("=", 1) for line in lines.splitlines())
        ended = self.run("up")
        assert ended.returncode == 0, ended.stderr
        self.client = httpx2.Client(base_url=ended.stdout.split()[-1], timeout=PATIENCE_SECONDS)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `expediter` as an operator would: the settings are in `.env`, but for what only a test needs."""
        return subprocess.run(
            [sys.executable, "-m", "expediter", *arguments],
            cwd=self.folder,
            env={**FAST, "PORT": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_SECONDS,
            check=False,
        )

    def place(self, order: dict[str, Any]) -> int:
        """Place an order, read it at once, and return the status that it was answered with."""
        placed = self.client.post("/orders", json=order)
        read = self.client.get(f"/orders/{order['order_id']}")
        assert (read.status_code, read.json()["order_id"]) == (200, order["order_id"])
        assert read.json()["total_minor"] == placed.json()["total_minor"] == online_retail.value_minor(order)
        return placed.status_code

    def completed(self, order_id: str) -> bool:
        return bool(self.client.get(f"/orders/{order_id}").json()["status"] == "completed")

    def processes(self) -> list[psutil.Process]:
        return [each for each in psutil.process_iter() if self._is_of_it(each)]

    def _is_of_it(self, process: psutil.Process) -> bool:
        try:
            return bool(process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False

    def look(self, command: str) -> str:
        """Run a `redis-cli` of the document, at the Redis of this set-up, and return what it prints."""
        place = urlsplit(self.settings["REDIS_URL"])
        words = command.replace("redis-cli", f"redis-cli -p {place.port}", 1)
        words = words.replace(" -n 0 ", f" -n {place.path.strip('/')} ")
        ended = subprocess.run(words, shell=True, capture_output=True, text=True, timeout=10, check=True)
        assert not re.match("ERR|NOGROUP|WRONGTYPE|\\(error", ended.stdout), ended.stdout
        return ended.stdout.strip()


@pytest.fixture(scope="module")
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """The set-up of a heading, for all tests that look at it; `down` leaves no process and no pid file of it."""
    setup = Setup(
        tmp_path_factory.mktemp("setup"), on_throwaway_servers(SETUPS[request.param], request.getfixturevalue)
    )
    try:
        yield setup
    finally:
        setup.client.close()
        ended = setup.run("down")
        left = setup.processes()
        for process in left:
            process.kill()
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("Stopped api-1")
    assert left == []
    assert list(setup.folder.glob("run/*.pid")) == []


def on(*headings: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("setup", headings, indirect=True)


def test_the_document_has_four_set_ups() -> None:
    """Each of the four has one block of lines."""
    assert set(SETUPS) == {ALONE, CACHED, QUEUED, STREAMS}


@on(ALONE, CACHED, QUEUED, STREAMS)
def test_a_set_up_works_as_it_is_written(setup: Setup) -> None:
    """With the lines in `.env`, `doctor` is content, and `up` takes real orders in and brings them to rest."""
    answered = {setup.place(order) for order in INVOICES}
    assert answered == ({202} if setup.settings.get("INTAKE") == "queued" else {201})
    for order in INVOICES:
        wait_until(lambda order=order: setup.completed(order["order_id"]))  # type: ignore[misc]

    examined = setup.run("doctor", "--json")
    findings = json.loads(examined.stdout)
    assert examined.returncode == 0, findings
    # The throwaway Redis keeps nothing on disk: as a broker that is a note, and no failure.
    notes = [each["what"] for each in findings if each["verdict"] != "ok" and "append" not in each["detail"]]
    assert notes == ["admin"], findings
    names = {"expediter.pid", "expediter.json", "supervisor.log"}
    for kind, count in (("api", setup.settings.get("API_WORKERS", "1")), ("worker", "4")):
        names |= {f"{kind}-{number}.{end}" for number in range(1, int(count) + 1) for end in ("pid", "log")}
    assert {path.name for path in (setup.folder / "run").iterdir()} == names


#: What each command of the document prints, where the order DEMO-1 was placed and read twice.
SHAPES = {
    "GET orders:list:version": r"[0-9a-f]+-[0-9a-f]{12}\.\d+\.[0-9a-f]{16}",
    "--scan --pattern 'orders:list:*:50:0'": r"orders:list:[0-9a-f.-]+:50:0",
    "GET orders:detail:DEMO-1": r'\{"version":\d+,"epoch":"[^"]+","order":(\{"order_id":"DEMO-1".*\}|null)\}',
    "PTTL orders:detail:DEMO-1": r"[1-9]\d{0,4}",
    "HGETALL orders:cache:stats": r"hits\n\d+\nmisses\n\d+",
    "INFO stats": r"(?s).*keyspace_hits:\d+\s+keyspace_misses:\d+.*",
    "GET temp_order:DEMO-1": r'\{"state":"stored",.*"order":\{"order_id":"DEMO-1".*',
    "TTL temp_order:DEMO-1": r"[1-5]?\d|60",
    "ZCARD orders:accepted": r"\d+",
    "HLEN temp_changes:DEMO-1": r"0",
    "XLEN orders:commands": r"\d+",
    "XPENDING orders:commands workers": r"0(?!\d)",
    "XLEN orders:commands:dead": r"0",
    "XRANGE orders:commands:dead - + COUNT 10": r"",
}


def commands_of_the_document() -> list[str]:
    """Return every `redis-cli` of the document but the one that removes something."""
    shown = [row[0].strip("`") for row in ROWS if row[0].startswith("`redis-cli")]
    shown += re.findall(r"^redis-cli .*$", TEXT, re.M)
    return shown


def arguments(command: str) -> str:
    return command.removeprefix("redis-cli ").removeprefix("-n 0 ")


def test_every_command_has_its_shape() -> None:
    """SHAPES has what the document shows, and nothing else."""
    assert sorted(map(arguments, commands_of_the_document())) == sorted(SHAPES)


@on(QUEUED, STREAMS)
def test_the_commands_on_redis_show_what_is_said(setup: Setup) -> None:
    """Each `redis-cli` prints what the document says of it, on the set-up that has what it asks for."""
    elsewhere = "orders:commands" if "RABBITMQ_HOST" in setup.settings else "temp_order"
    setup.place(INVOICES[0] | {"order_id": "DEMO-1"})
    wait_until(lambda: setup.completed("DEMO-1"))
    for command in commands_of_the_document():
        if elsewhere in command:
            continue
        for _ in range(2):  # the second one is answered by the cache
            setup.client.get("/orders")
            setup.client.get("/orders/DEMO-1")
        wait_until(lambda command=command: is_as_said(setup, command))  # type: ignore[misc]


def is_as_said(setup: Setup, command: str) -> bool:
    """Tell whether it prints what is said; what readers have loaded is kept a moment after they are answered."""
    printed = setup.look(command)
    shape = SHAPES[arguments(command)]
    return bool(re.match(shape, printed) if "XPENDING" in command else re.fullmatch(shape, printed))


@on(QUEUED)
def test_a_pending_order_is_kept_for_seven_days(setup: Setup, rabbitmq: RabbitServer) -> None:
    """While no worker runs a queued order is `pending`, for 7 days; RabbitMQ counts its message in `orders`."""
    workers = [psutil.Process(int(path.read_text())) for path in setup.folder.glob("run/worker-*.pid")]
    for worker in workers:
        worker.suspend()
    try:
        assert setup.place(INVOICES[0] | {"order_id": "DEMO-2"}) == 202
        assert setup.look("redis-cli -n 0 GET temp_order:DEMO-2").startswith('{"state":"pending"')
        assert 604_700 < int(setup.look("redis-cli -n 0 TTL temp_order:DEMO-2")) <= 604_800
        queue = setup.settings["RABBITMQ_QUEUE_NAME"]
        wait_until(lambda: listed(rabbitmq).get(queue) == (1, 4))
        assert listed(rabbitmq)[f"{queue}.due"][1] == 4
        assert listed(rabbitmq)[f"{queue}.dead"] == (0, 0)
    finally:
        for worker in workers:
            worker.resume()
    wait_until(lambda: setup.completed("DEMO-2"))


def listed(rabbit: RabbitServer) -> dict[str, tuple[int, int]]:
    """Return messages and consumers of each queue, by the command that the document shows."""
    (shown,) = re.findall(r"^rabbitmqctl (list_queues .*)$", TEXT, re.M)
    assert rabbit.program is not None
    ended = subprocess.run(
        [Path(rabbit.program).with_name("rabbitmqctl"), *shown.split()],
        env=rabbit._environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"^(\S+)\t(\d+)\t(\d+)$", ended.stdout, re.M)
    return {name: (int(messages), int(consumers)) for name, messages, consumers in found}


def test_the_limits_are_those_of_the_code() -> None:
    """Each limit in the document has the value of the constant that it names."""
    shown = {
        row[0].strip("`"): float(row[1].replace(",", ""))
        for row in ROWS
        if re.match(r"`[a-z.]+\.[A-Z_]+`", row[0])
    }
    assert len(shown) > 20
    for place, value in shown.items():
        module, _, name = place.rpartition(".")
        assert getattr(importlib.import_module(f"expediter.{module}"), name) == value, place


@on(STREAMS)
def test_a_change_in_env_comes_with_a_rolling_restart(setup: Setup) -> None:
    """`restart` takes up a changed `.env`, and no request fails meanwhile."""
    env = setup.folder / ".env"
    env.write_text(env.read_text() + "ADMIN_PASSWORD=open sesame\n")
    restart = ThreadPoolExecutor(1).submit(setup.run, "restart")
    while not restart.done():
        assert httpx2.get(f"{setup.client.base_url}/healthz", timeout=PATIENCE_SECONDS).status_code == 200
    ended = restart.result()
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("Renewed api-1, api-2, worker-1")
    seeded = setup.client.post("/admin/seed", json={"count": 1}, headers={"X-Admin-Password": "open sesame"})
    assert seeded.status_code == 201
