"""Throwaway servers for tests: on free ports, in folders of their own, ended by their pid."""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aio_pika
import asyncmy.errors
import asyncpg
import pytest
import redis

from expediter.store.migrations import upgrade

#: Seconds that a server may take to start.
START_SECONDS_MAX = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def missing(what: str, how: str = "") -> None:
    """A program that is not installed: on a laptop its tests are skipped, in CI that is a failure.

    `how` is what installs it, if not `apt-get install`.
    """
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed: {how or f'apt-get install {what}'}")


def in_thread(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine to its end, whether or not an event loop runs here."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(work())).result()


class Server:
    """One running server; each test gets a database of its own in it."""

    scheme: str
    user: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.databases = 0
        self.process = self.start()
        self._wait()

    def start(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def more_options(self) -> list[str]:
        """What a test's own kind of server adds to the command line."""
        return []

    def query(self, database: str, statement: str) -> Sequence[Any]:
        raise NotImplementedError

    def new_database(self) -> str:
        """Make an empty database and return its address."""
        self.databases += 1
        return self.create(f"orders_{self.databases}")

    def create(self, name: str, more: str = "") -> str:
        """Make a database of this name and return its address."""
        self.query(self.user, f"CREATE DATABASE {name} {more}")
        return f"{self.scheme}://{self.user}@127.0.0.1:{self.port}/{name}"

    def made_database(self) -> str:
        """Make a database at the newest step, without any order, and return its address."""
        address = self.new_database()
        upgrade(address)
        return address

    def restart(self) -> None:
        self.process = self.start()
        self._wait()

    def kill(self) -> None:
        """End it as a power cut would, with the processes it started: they can outlive it and still answer."""
        self.process.send_signal(signal.SIGSTOP)
        self._signal_children(signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def _signal_children(self, number: signal.Signals) -> None:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for child in children.read_text().split() if children.exists() else ():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it hang, with the processes it started: it takes connections and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)
        self._signal_children(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal_children(signal.SIGCONT)
            self.process.send_signal(signal.SIGCONT)

    @contextmanager
    def holding(self, database: str, statement: str) -> Iterator[None]:
        """Run a statement, and keep its transaction open with what it has locked."""
        held, over = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as thread:
            session = thread.submit(lambda: asyncio.run(self._hold(database, statement, held, over)))
            try:
                while not held.wait(0.05) and not session.done():
                    pass
                yield
            finally:
                over.set()
            session.result()

    async def _hold(self, database: str, statement: str, held: threading.Event, over: threading.Event) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    pass
                self.query(self.user, "SELECT 1")
                return
            except (OSError, asyncpg.PostgresError, asyncmy.errors.MySQLError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise
            time.sleep(0.05)

    def log(self) -> Any:
        return (self.folder / "server.log").open("ab")


def newest(pattern: str) -> str | None:
    found = sorted(Path("/").glob(pattern))
    return str(found[-1]) if found else None


class PostgresServer(Server):
    scheme = "postgresql"
    user = "postgres"
    #: Whether there is a database to copy.
    pattern = False

    def start(self) -> subprocess.Popen[bytes]:
        program = shutil.which("postgres") or newest("usr/lib/postgresql/*/bin/postgres")
        if program is None:
            missing("postgresql")
            raise AssertionError
        # PostgreSQL refuses to run as root, and its own user may not enter root's folders: pytest closes the one
        # above its own whenever another run begins, and a server that cannot see its data any more ends.
        owner = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        if owner and self.folder.owner() != "postgres":
            given, self.folder = self.folder, Path(tempfile.mkdtemp(prefix="expediter-postgres-"))
            shutil.copytree(given, self.folder, dirs_exist_ok=True)
            shutil.chown(self.folder, "postgres", "postgres")
            atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        data = self.folder / "data"
        if not data.exists():
            self._make(program, data, owner)
        options = [f"-p{self.port}", f"-k{self.folder}", "-clisten_addresses=127.0.0.1", "-cmax_connections=60"]
        options += self.more_options()
        with self.log() as log:
            return subprocess.Popen(
                [program, "-D", data, *options], stdout=log, stderr=log, cwd=self.folder, **owner
            )

    def _make(self, program: str, data: Path, owner: dict[str, str]) -> None:
        subprocess.run(
            [str(Path(program).with_name("initdb")), "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            **owner,
        )

    def made_database(self) -> str:
        """See Server. The tables are made once: a copy costs a tenth of that."""
        if not self.pattern:
            self.pattern = True
            upgrade(self.create("pattern"))
        self.databases += 1
        return self.create(f"orders_{self.databases}", "TEMPLATE pattern")

    def query(self, database: str, statement: str) -> Sequence[Any]:
        async def work() -> Any:
            raw = await asyncpg.connect(host="127.0.0.1", port=self.port, user=self.user, database=database)
            try:
                return [tuple(row) for row in await raw.fetch(statement)]
            finally:
                await raw.close()

        found: Sequence[Any] = in_thread(work)
        return found

    async def _hold(self, database: str, statement: str, held: threading.Event, over: threading.Event) -> None:
        raw = await asyncpg.connect(host="127.0.0.1", port=self.port, user=self.user, database=database)
        try:
            async with raw.transaction():
                await raw.execute(statement)
                held.set()
                await asyncio.to_thread(over.wait)
        finally:
            await raw.close()


class MariadbServer(Server):
    scheme = "mysql"
    user = "root"

    def start(self) -> subprocess.Popen[bytes]:
        program = shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin")
        if program is None:
            missing("mariadb-server")
            raise AssertionError
        data = self.folder / "data"
        owner = "--user=root" if os.geteuid() == 0 else f"--user={os.environ.get('USER', 'nobody')}"
        # Its own: a server that starts removes what others have in theirs, and kills them by that.
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        if not data.exists():
            self._make(data, owner, temporary)
        options = [
            "--no-defaults",
            f"--datadir={data}",
            f"--port={self.port}",
            f"--socket={self.folder / 'socket'}",
            f"--tmpdir={temporary}",
            "--bind-address=127.0.0.1",
            f"--pid-file={self.folder / 'pid'}",
            owner,
            *self.more_options(),
        ]
        with self.log() as log:
            return subprocess.Popen([program, *options], stdout=log, stderr=log)

    def _make(self, data: Path, owner: str, temporary: Path) -> None:
        subprocess.run(
            [
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={data}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                owner,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(temporary)},
        )

    def query(self, database: str, statement: str) -> Sequence[Any]:
        async def work() -> Any:
            name = None if database == self.user else database
            raw = await asyncmy.connect(host="127.0.0.1", port=self.port, user=self.user, db=name, autocommit=True)
            try:
                async with raw.cursor() as cursor:
                    await cursor.execute(statement)
                    return [tuple(row) for row in await cursor.fetchall()]
            finally:
                await raw.ensure_closed()

        found: Sequence[Any] = in_thread(work)
        return found

    async def _hold(self, database: str, statement: str, held: threading.Event, over: threading.Event) -> None:
        raw = await asyncmy.connect(host="127.0.0.1", port=self.port, user=self.user, db=database)
        try:
            async with raw.cursor() as cursor:
                await cursor.execute(statement)
                held.set()
                await asyncio.to_thread(over.wait)
        finally:
            await raw.ensure_closed()


class RedisServer(Server):
    """A Redis without persistence, as Debian's users would start it for a cache; each test gets a database."""

    scheme = "redis"
    user = ""
    options: tuple[str, ...] = ("--save", "", "--appendonly", "no")

    def start(self) -> subprocess.Popen[bytes]:
        program = shutil.which("redis-server")
        if program is None:
            missing("redis-server")
            raise AssertionError
        bound = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder), "--databases", "1000"]
        with self.log() as log:
            return subprocess.Popen([program, *bound, *self.options], stdout=log, stderr=log)

    def query(self, database: str, statement: str) -> Sequence[Any]:
        """Return what `redis-cli` would: the answer to one command, its words parted by spaces."""
        if statement == "SELECT 1":
            statement = "PING"
        options = {"decode_responses": True, "protocol": 2, "socket_timeout": START_SECONDS_MAX}
        with redis.Redis(port=self.port, db=int(database or 0), **options) as client:
            try:
                found: Sequence[Any] = client.execute_command(*statement.split())
            except redis.ConnectionError as error:
                raise OSError(str(error)) from error
            return found

    def new_database(self) -> str:
        self.databases += 1
        return f"redis://127.0.0.1:{self.port}/{self.databases}"


class DurableRedisServer(RedisServer):
    """A Redis as it must be where it holds commands: it answers after they are on disk."""

    options = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")


class RabbitServer(Server):
    """A RabbitMQ node that knows no other, with its own port mapper (epmd); each test gets queues of its own."""

    scheme = "amqp"
    user = "guest"

    def start(self) -> subprocess.Popen[bytes]:
        # Debian's wrapper in /usr/sbin changes the user and reads /etc; the program itself does not.
        self.program = program = newest("usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server")
        mapper = shutil.which("epmd")
        if program is None or mapper is None:
            missing("rabbitmq-server")
            raise AssertionError
        if not (self.folder / "rabbitmq.conf").exists():
            self.mapper_port, self.peer_port = free_port(), free_port()
            (self.folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n")
            (self.folder / "enabled_plugins").write_text("[].\n")
        with self.log() as log:
            self.mapper = subprocess.Popen(
                [mapper, "-port", str(self.mapper_port), "-address", "127.0.0.1"], stdout=log, stderr=log
            )
            self._wait_for_mapper()
            return subprocess.Popen([program], stdout=log, stderr=log, cwd=self.folder, env=self._environment())

    def _environment(self) -> dict[str, str]:
        folder = self.folder
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder),  # of Erlang's cookie
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the server, instead of its parent
            "ERL_EPMD_PORT": str(self.mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self.peer_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1",  # one thread: others need the machine too
        }

    def _wait_for_mapper(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.mapper_port), 1).close()
                return
            except OSError:
                if self.mapper.poll() is not None or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def stop(self) -> None:
        super().stop()
        self._end_mapper()

    def kill(self) -> None:
        super().kill()
        self._end_mapper()

    def _end_mapper(self) -> None:
        self.mapper.kill()
        self.mapper.wait()

    def query(self, database: str, statement: str) -> Sequence[Any]:
        """Do one thing: `DELETE queue`, `DECLARE queue` (a classic one), or only connect (`SELECT 1`)."""

        async def work() -> None:
            async with await aio_pika.connect(self.url) as connection:
                channel = await connection.channel()
                if statement.startswith("DELETE "):
                    await channel.queue_delete(statement.removeprefix("DELETE "))
                if statement.startswith("DECLARE "):
                    await channel.declare_queue(statement.removeprefix("DECLARE "), durable=True)

        try:
            in_thread(work)
        except aio_pika.exceptions.AMQPError as error:
            raise OSError(str(error)) from error
        return ()

    def control(self, *words: str) -> None:
        """Run rabbitmqctl, which takes seconds."""
        assert self.program is not None
        tool = Path(self.program).with_name("rabbitmqctl")
        subprocess.run([tool, *words], check=True, stdout=subprocess.DEVNULL, env=self._environment())

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def new_queue(self) -> str:
        """Return the name of a queue that nobody has used."""
        self.databases += 1
        return f"orders_{self.databases}"
