"""What is measured: the service, the baselines, and throwaway servers with their usual durability settings."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
#: The baselines' own environment; `make bench` lays it.
BASELINE_BIN = ROOT / ".venv-bench" / "bin"

sys.path.insert(0, str(ROOT / "tests"))

from servers import DurableRedisServer, PostgresServer, RedisServer, free_port  # noqa: E402
from serving import Program, Serving  # noqa: E402


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
        return self._server("postgresql", PostgresServer).new_database()

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
    def web(self, app: str, python: Path, **environment: str) -> Iterator[str]:
        """Run a baseline's application with uvicorn and return its address."""
        port = free_port()
        command = [str(python / "uvicorn"), app, "--port", str(port), "--loop", "uvloop", "--http", "httptools"]
        command += ["--no-access-log", "--log-level", "warning", "--app-dir", str(HERE / "baselines")]
        with _running(command, environment) as process:
            _until_listening(port, process)
            yield f"http://127.0.0.1:{port}"

    def echo(self) -> AbstractContextManager[str]:
        """Run the echo baseline, with the service's own libraries."""
        return self.web("echo:app", Path(sys.executable).parent)

    def usual(self) -> AbstractContextManager[str]:
        """Run the usual baseline on a fresh database and a fresh list."""
        database = self.postgresql().replace("postgresql://", "postgresql+asyncpg://")
        return self.web("usual:app", BASELINE_BIN, DATABASE_URL=database, REDIS_URL=self.cache())

    @contextmanager
    def celery(self) -> Iterator[dict[str, str]]:
        """Run a Celery worker with a process a core; yield the environment of whoever places orders."""
        database = self.postgresql().replace("postgresql://", "postgresql+psycopg://")
        environment = {"DATABASE_URL": database, "REDIS_URL": self.cache()}
        command = [str(BASELINE_BIN / "celery"), "--quiet", "-A", "celery_app", "worker", "--loglevel", "error"]
        with _running([*command, "--concurrency", str(os.cpu_count())], environment):
            yield environment


@contextmanager
def _running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=HERE / "baselines", stdout=log, stderr=log
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
