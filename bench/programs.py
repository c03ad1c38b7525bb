"""What is measured: the service, the baselines, and throwaway servers with their usual durability settings."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import asyncpg
from results import Missing

HERE = Path(__file__).parent
ROOT = HERE.parent
BASELINES = HERE / "baselines"
#: The baselines' own environment; `make bench` lays it.
BASELINE_BIN = ROOT / ".venv-bench" / "bin"
#: What `make baselines` builds in Go.
GO_PROGRAM = BASELINES / "go" / "built" / "orders"
#: The oldest Node that Fastify runs on.
NODE_VERSION_MIN = 20

sys.path.insert(0, str(ROOT / "tests"))

from servers import DurableRedisServer, PostgresServer, RedisServer, free_port  # noqa: E402
from serving import Program, Serving  # noqa: E402


class Web(NamedTuple):
    """A running program: its address, and the process that was started."""

    url: str
    pid: int


class RoomyPostgresServer(PostgresServer):
    """PostgreSQL for many programs at once, each with a pool of its own."""

    def more_options(self) -> list[str]:
        return ["-cmax_connections=200"]


class Site:
    """A place for a run: its folder, and the servers that were asked for, each started once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expediter-bench-")))
        self.folder.chmod(0o711)
        self._servers: dict[str, PostgresServer | RedisServer] = {}
        self._folders = 0

    def new_folder(self) -> Path:
        self._folders += 1
        folder = self.folder / str(self._folders)
        folder.mkdir()
        return folder

    def _server(self, name: str, kind: type[PostgresServer] | type[RedisServer]) -> PostgresServer | RedisServer:
        if name not in self._servers:
            server = self._servers[name] = kind(self.new_folder())
            self._stack.callback(server.stop)
        return self._servers[name]

    def postgresql(self) -> str:
        """Return the address of a new database; fsync, synchronous_commit and full_page_writes are on."""
        return self._server("postgresql", RoomyPostgresServer).new_database()

    @property
    def database_pid(self) -> int:
        """The process of PostgreSQL from which all its others come."""
        return self._servers["postgresql"].process.pid

    def cache(self) -> str:
        """Return the address of a new database in a Redis that keeps nothing."""
        return self._server("cache", RedisServer).new_database()

    def queue(self) -> str:
        """Return the address of a new database in a Redis that syncs before it answers."""
        return self._server("queue", DurableRedisServer).new_database()

    @contextmanager
    def service(self, *arguments: str, database: str | None = None, **settings: str) -> Iterator[Serving]:
        """Run `expediter serve` on a fresh database, without latency in gateway and fulfilment."""
        folder = self.new_folder()
        settings = {"LEASE_SECONDS": "30", "DATABASE_URL": database or f"sqlite:///{folder}/orders.db"} | settings
        with Serving(folder, *arguments, **settings) as running:
            yield running
            running.stop()

    @contextmanager
    def worker(self, **settings: str) -> Iterator[Program]:
        """Run `expediter work`."""
        program = Program(self.new_folder(), "work", **{"LEASE_SECONDS": "30", **settings})
        try:
            program.wait_for("works off")
            yield program
        finally:
            program.stop()

    @contextmanager
    def web(self, command: list[str], port: int, **environment: str) -> Iterator[Web]:
        """Run a baseline that listens on a port."""
        with _running(command, environment) as process:
            _until_listening(port, process)
            yield Web(f"http://127.0.0.1:{port}", process.pid)

    def uvicorn(self, app: str, python: Path, **environment: str) -> AbstractContextManager[Web]:
        """Run a baseline's application with uvicorn."""
        port = free_port()
        command = [str(python / "uvicorn"), app, "--port", str(port), "--loop", "uvloop", "--http", "httptools"]
        command += ["--no-access-log", "--log-level", "warning", "--app-dir", str(BASELINES)]
        return self.web(command, port, **environment)

    def echo(self) -> AbstractContextManager[Web]:
        """Run the echo baseline, with the service's own libraries."""
        return self.uvicorn("echo:app", Path(sys.executable).parent)

    def bare(self) -> AbstractContextManager[Web]:
        """Run the bare baseline, with the service's own libraries."""
        port = free_port()
        return self.web([sys.executable, "bare.py", str(port)], port)

    def usual(self) -> AbstractContextManager[Web]:
        """Run the usual baseline on a fresh database and a fresh list."""
        database = self.postgresql().replace("postgresql://", "postgresql+asyncpg://")
        return self.uvicorn("usual:app", BASELINE_BIN, DATABASE_URL=database, REDIS_URL=self.cache())

    def go(self) -> AbstractContextManager[Web]:
        """Run the Go baseline on a fresh database. Raises Missing."""
        if not GO_PROGRAM.exists():
            raise Missing("`make baselines` could not build it" if shutil.which("go") else "go is not installed")
        port, database = free_port(), self._laid_out()
        return self.web([str(GO_PROGRAM), "place.sql"], port, PORT=str(port), DATABASE_URL=database)

    def fastify(self, form: str) -> AbstractContextManager[Web]:
        """Run the Fastify baseline, `tuned` or `usual`, on a fresh database and queue. Raises Missing."""
        node = shutil.which("node")
        if node is None:
            raise Missing("node is not installed")
        said = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        if int(re.findall(r"\d+", said)[0]) < NODE_VERSION_MIN:
            raise Missing(f"node is {said}, and Fastify needs {NODE_VERSION_MIN}")
        if not (BASELINES / "fastify" / "node_modules" / ".lock").exists():
            raise Missing("`make baselines` could not install its packages")
        port, database, queue = free_port(), self._laid_out(), self.queue()
        command = [node, "fastify/orders.js", form, "place.sql"]
        return self.web(command, port, PORT=str(port), DATABASE_URL=database, REDIS_URL=queue)

    def _laid_out(self) -> str:
        """Return the address of a new database with the tables of the programs in other languages."""
        database = self.postgresql()

        async def lay() -> None:
            raw = await asyncpg.connect(database)
            await raw.execute((BASELINES / "tables.sql").read_text())
            await raw.close()

        asyncio.run(lay())
        return f"{database}?sslmode=disable"

    @contextmanager
    def celery(self) -> Iterator[tuple[dict[str, str], int]]:
        """Run a Celery worker with a process a core; yield the environment of who places orders, and its pid."""
        database = self.postgresql().replace("postgresql://", "postgresql+psycopg://")
        environment = {"DATABASE_URL": database, "REDIS_URL": self.cache()}
        command = [str(BASELINE_BIN / "celery"), "--quiet", "-A", "celery_app", "worker", "--loglevel", "error"]
        with _running([*command, "--concurrency", str(os.cpu_count())], environment) as process:
            yield environment, process.pid


@contextmanager
def _running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=BASELINES, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
        time.sleep(0.02)
