"""Brings a fault about in the midst of clients, and holds what is there afterwards against what they were told.

A `Scene` is a service on servers that may fall ill: a serving and a working process, a database, where need be a
cache and a broker, and clients that place and read orders without a pause. `endure` lets one `Fault` happen to it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis import Redis

from auditing import charges, gateway_with_ledger, wait_until
from callers import PLACING, Clients
from disks import Disk, small_disk
from expediter.orders.order import gateway_key
from servers import MariadbServer, PostgresServer, RabbitServer, RedisServer, Server, free_port
from serving import PATIENCE_SECONDS, Program, environment
from storing import Place
from verifying import verified

#: Where the suite writes down what it brought about: one JSON line for each fault on each database.
TALLY = "EXPEDITER_FAULTS_TALLY"
#: Every fault on every database, and not only those that are quick.
EVERYTHING = os.environ.get("EXPEDITER_FAULTS") == "all"
DATABASES = ("sqlite", "postgresql", "mariadb")

#: Orders that are accepted before a fault, and that must be accepted after it.
BEFORE, AFTER = 10, 6
#: Orders that are accepted in the midst of a fault that keeps nobody from placing them.
MIDST = 10
#: Seconds that an answer, and a look at the health, may take; with what a busy machine adds.
ANSWER_SECONDS_MAX = 10.0 + 2.0
LOOK_SECONDS_MAX = 2.0 + 1.0
#: From the first refusal on all are refused, up to so many seconds before the fault ends.
ENDING_SECONDS = 1.5
#: Seconds after which orders are taken again, with what a busy machine adds.
BACK_SECONDS_MAX = 5.0 + 5.0
#: Lines that a process may log about one fault.
LOG_LINES_MAX = 200


class Meanwhile(Enum):
    """What clients are answered while a fault lasts."""

    TAKEN = "orders are taken as always"
    REFUSED = "every order is refused with 503, and readiness says so"
    SOME = "an order is taken or refused with 503"
    NOBODY = "nobody answers"


@dataclass(frozen=True)
class Fault:
    """Something that happens to a service; `bring` does it and, where it does not pass by itself, undoes it."""

    name: str
    bring: Callable[[Scene], AbstractContextManager[None]]
    meanwhile: Meanwhile
    #: How long it lasts, at least, and how often it comes.
    seconds: float = 0.0
    times: int = 1
    #: What there is besides the database.
    cache: bool = False
    broker: str = ""
    intake: str = "direct"
    #: Whether the database's files are on a disk of their own.
    disk: bool = False
    #: The databases that it can happen on, and those on which `make test` brings it about.
    on: tuple[str, ...] = DATABASES
    quick: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    #: What is asked of the payment gateway, in an order.
    token: str = ""


SERVERS: dict[str, type[Server]] = {
    "postgresql": PostgresServer,
    "mariadb": MariadbServer,
    "redis": RedisServer,
    "rabbitmq": RabbitServer,
}


class Mortals:
    """Servers that a test may kill and start again; each kind is started when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._running: dict[str, Server] = {}

    def get(self, kind: str, name: str = "") -> Server:
        name = name or kind
        if name not in self._running:
            self._running[name] = SERVERS[kind](self._factory.mktemp(name))
        elif self._running[name].process.poll() is not None:  # a test failed while it was away
            self._running[name].restart()
        return self._running[name]

    def cache(self) -> RedisServer:
        server = self.get("redis", "cache")
        assert isinstance(server, RedisServer)
        return server

    def stop(self) -> None:
        for server in self._running.values():
            server.kill()


def broker_settings(server: Server) -> dict[str, str]:
    """Return the settings of a broker that nobody has used."""
    if isinstance(server, RabbitServer):
        return {"BROKER_URL": server.url, "RABBITMQ_QUEUE_NAME": server.new_queue()}
    return {"BROKER_URL": server.new_database()}


def wipe(server: Server, settings: dict[str, str]) -> None:
    """Remove all that a broker holds."""
    if isinstance(server, RabbitServer):
        for end in ("", ".due", ".dead"):
            server.query("", f"DELETE {settings['RABBITMQ_QUEUE_NAME']}{end}")
    else:
        server.query("", "FLUSHALL")


class Scene:
    """A serving and a working process, the servers they need, and their clients."""

    def __init__(self, folder: Path, fault: Fault, database: str, mortals: Mortals, stack: ExitStack) -> None:
        self.folder, self.fault, self.database = folder, fault, database
        #: How often the fault was brought about.
        self.times = 0
        self.disk: Disk | None = stack.enter_context(small_disk()) if fault.disk else None
        self.at = self._place(mortals, stack)
        self.cache = mortals.cache() if fault.cache or fault.intake == "queued" else None
        self.broker = mortals.get(fault.broker) if fault.broker else None
        self.settings = {
            "DATABASE_URL": self.at.address,
            "PAYMENT_GATEWAY": gateway_with_ledger(folder),
            "PAYMENT_MOCK_LATENCY_MAX": "40",
            "FULFILMENT_MOCK_LATENCY_MAX": "20",
            "LEASE_SECONDS": "2",
            "DRAIN_SECONDS": "5",
            "WORKER_COUNT": "1",
            "CIRCUIT_BREAKER_RECOVERY_SECONDS": "1",
            "INTAKE": fault.intake,
            **(broker_settings(self.broker) if self.broker else {}),
            **({"REDIS_URL": self.cache.new_database()} if self.cache else {}),
            **fault.settings,
        }
        self.port = free_port()
        self.programs: dict[str, Program] = {}
        stack.callback(self.kill)
        for part in ("door", "worker"):
            self.start(part)
        self.client = stack.enter_context(httpx2.Client(base_url=self.url, timeout=PATIENCE_SECONDS))
        self.clients = Clients(self.url, fault.token)
        self.until_well()
        if self.disk is not None:
            self.disk.flush()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def server(self) -> Server:
        """The database server. Only where there is one."""
        assert self.at.server is not None
        return self.at.server

    @property
    def name(self) -> str:
        """The database's name at its server."""
        return self.at.address.rpartition("/")[2]

    def _place(self, mortals: Mortals, stack: ExitStack) -> Place:
        if self.database == "sqlite":
            return Place(f"sqlite:///{self.disk.at if self.disk else self.folder}/orders.db")
        if self.disk is None:
            server = mortals.get(self.database)
        else:
            data = self.disk.at / "server"
            data.mkdir()
            if self.database == "postgresql" and os.geteuid() == 0:
                shutil.chown(data, "postgres", "postgres")
            server = SERVERS[self.database](data)
            stack.callback(server.kill)
        address = server.new_database()
        if self.database == "mariadb":  # root may write where nobody may
            server.query("root", "CREATE USER IF NOT EXISTS shop@'127.0.0.1'")
            server.query("root", f"GRANT ALL ON {address.rpartition('/')[2]}.* TO shop@'127.0.0.1'")
            address = address.replace("root@", "shop@")
        return Place(address, server)

    def start(self, part: str, **settings: str) -> Program:
        """Start the door or the worker; the one before has ended."""
        words = ("serve", "--no-workers") if part == "door" else ("work",)
        program = Program(self.folder, *words, **{**self.settings, "PORT": str(self.port), **settings})
        self.programs[part] = program
        if not settings:
            program.wait_for("listens on" if part == "door" else "works off")
        return program

    def replace(self, part: str, **settings: str) -> Program:
        """End the door or the worker as it is, and start it with these settings."""
        self.programs[part].kill()
        return self.start(part, **settings)

    def kill(self) -> None:
        """Kill both processes."""
        for program in self.programs.values():
            program.kill()

    def command(self, *words: str) -> None:
        """Run a command of the program on the scene's settings."""
        subprocess.run(
            [sys.executable, "-m", "expediter", *words],
            cwd=self.folder,
            env=environment(self.folder, **self.settings),
            stdout=subprocess.DEVNULL,
            timeout=PATIENCE_SECONDS,
            check=True,
        )

    def health(self) -> dict[str, Any]:
        """Return what the door says of its parts; nothing while it is away."""
        try:
            found: dict[str, Any] = self.client.get("/health").json()
        except httpx2.TransportError:
            return {"status": "away", "dependencies": {}}
        return found

    def is_ill(self, part: str) -> bool:
        """Return whether a part is said not to be well."""
        return bool(self.health()["dependencies"].get(part, {}).get("status", "ok") != "ok")

    def until_well(self) -> None:
        """Wait until the door says that all is well."""
        wait_until(lambda: self.health()["status"] == "healthy")

    def accepted_more(self, count: int) -> None:
        """Wait until so many more orders are accepted."""
        before = len(self.clients.accepted)
        wait_until(lambda: len(self.clients.accepted) >= before + count)

    def live_through(self) -> None:
        """Be in the midst of the fault, until it has shown what clients are answered then."""
        ends = time.monotonic() + self.fault.seconds
        clients, meanwhile = self.clients, self.fault.meanwhile
        if meanwhile is Meanwhile.TAKEN:
            clients.unwell.set()
            self.accepted_more(MIDST)
            wait_until(lambda: time.monotonic() >= ends)
            clients.unwell.clear()
            assert clients.statuses["POST"] <= {201, 202}, clients.refused[:3]
        elif meanwhile is Meanwhile.REFUSED:
            before = clients.refusals
            wait_until(lambda: clients.refusals > before)
            clients.unwell.set()
            wait_until(lambda: time.monotonic() >= ends - ENDING_SECONDS and "POST" in clients.statuses)
            clients.unwell.clear()
            assert clients.statuses["POST"] == {503}
            assert clients.statuses.get("health", {503}) == clients.statuses.get("readyz", {503}) == {503}
            wait_until(lambda: time.monotonic() >= ends)
        elif meanwhile is Meanwhile.SOME:
            before = clients.refusals
            wait_until(lambda: clients.refusals > before + PLACING)

    def waiting(self) -> int:
        """Return how many accepted commands are not settled."""
        if self.fault.intake == "direct":
            return 0
        with closing(Redis.from_url(self.settings["REDIS_URL"])) as client:
            return int(client.zcard("orders:accepted"))  # type: ignore[arg-type]

    def come_to_rest(self) -> None:
        """Wait until nothing is left to do but what is parked."""
        unfinished = "SELECT count(*) FROM jobs WHERE dead_at IS NULL"
        wait_until(lambda: not self.waiting() and not int(self.at.rows(unfinished)[0][0]))

    def check(self) -> None:
        """Assert what holds after every fault, and write down what was found."""
        clients = self.clients
        found = {row[0] for row in self.at.rows("SELECT order_id FROM orders")}
        accepted = set(clients.accepted)
        assert len(clients.accepted) == len(accepted), "two requests were answered with one order"
        missing = accepted - found - clients.lost
        assert not missing, f"{len(missing)} of {len(accepted)} accepted and not there: {sorted(missing)[:5]}"
        assert found - accepted == set(), "there and not accepted"
        assert clients.wrong == [], clients.wrong[:5]
        ledger = self.folder / "ledger.jsonl"
        of_nobody = {gateway_key(order_id, 1) for order_id in clients.lost - found}
        breaches = [
            f"{breach.order_id}: {breach.law}"
            for breach in verified(self.at.address, ledger).breaches
            if breach.order_id is not None or not any(key in breach.law for key in of_nobody)
        ]
        assert breaches == [], breaches[:20]
        made = [key for key, _ in charges(self.folder)]
        assert len(made) == len(set(made)), "a gateway key was charged twice"
        paid = {row[0] for row in self.at.rows("SELECT order_id FROM orders WHERE payment_status = 'paid'")}
        parked = {row[0] for row in self.at.rows("SELECT order_id FROM jobs WHERE dead_at IS NOT NULL")}
        assert paid | parked == found
        logs = {part: program.log for part, program in self.programs.items()}
        assert max(len(log) for log in logs.values()) < LOG_LINES_MAX, [log[-20:] for log in logs.values()]
        self._write_down(accepted=len(accepted), found=len(found), charged=len(set(made)))

    def _write_down(self, **counts: int) -> None:
        if TALLY in os.environ:
            line = {"fault": self.fault.name, "database": self.database, "times": self.times, **counts}
            with Path(os.environ[TALLY]).open("a", encoding="utf-8") as tally:
                tally.write(json.dumps(line) + "\n")


def endure(fault: Fault, database: str, folder: Path, mortals: Mortals) -> None:
    """Let a fault happen to a service in the midst of its clients; all holds afterwards."""
    with ExitStack() as stack:
        scene = Scene(folder, fault, database, mortals, stack)
        with scene.clients.running():
            for _ in range(fault.times):
                scene.accepted_more(BEFORE)
                with fault.bring(scene):
                    scene.live_through()
                scene.times += 1
                began = time.monotonic()
                scene.accepted_more(AFTER)
                back = time.monotonic() - began
                scene.until_well()
        slowest = scene.clients.slowest
        if fault.meanwhile is not Meanwhile.NOBODY:
            assert back < BACK_SECONDS_MAX
            assert max(slowest["POST"], slowest["GET"]) < ANSWER_SECONDS_MAX, slowest
            assert max(slowest["health"], slowest["readyz"]) < LOOK_SECONDS_MAX, slowest
        scene.come_to_rest()
        scene.check()
