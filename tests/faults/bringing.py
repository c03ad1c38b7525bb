"""How each fault is brought about, and undone where it does not pass by itself."""

from __future__ import annotations

import asyncio
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from random import Random

import msgspec
import pytest

from auditing import wait_until
from enduring import Scene, wipe
from expediter.backends.brokers import Topic, open_broker
from expediter.errors import BrokerUnavailable
from expediter.orders.order import MICROSECONDS
from servers import MariadbServer, PostgresServer, RabbitServer, RedisServer, Server, in_thread, newest
from serving import PATIENCE_SECONDS

Bring = Callable[[Scene], AbstractContextManager[None]]

#: Which process is killed at each named point: whichever passes it.
PASSES = {
    "loaded": ("door", "worker"),
    "decided": ("door", "worker"),
    "announced": ("door", "worker"),
    "visible": ("door", "worker"),
    "committed": ("door", "worker"),
    "told": ("door", "worker"),
    "claimed": ("worker",),
    "called": ("worker",),
    "handed in": ("worker",),
    "kept": ("door",),
    "sent": ("door",),
    "applied": ("worker",),
}
#: Of how many times that it passes the point a process dies there once.
DEATH_CHANCE = 0.1
#: Bytes that the database's log may still grow by before the quota, in turn: the next orders fit, or half of one.
ROOM = (0, 3_000, 20_000)
#: Orders that wait in the broker when it is killed or wiped.
WAITING = 5
#: How often each hint comes.
HINTS = 5
#: In a process that has this on its path, the wall clock is wrong; what C code reads of it is not.
WRONG_CLOCK = """import time
real, real_ns = time.time, time.time_ns
time.time = lambda: real() + ({seconds})
time.time_ns = lambda: real_ns() + ({seconds}) * 1_000_000_000
"""


# Processes.


def killed_at(point: str) -> Bring:
    """Kill with SIGKILL, at a named point, each process that passes it, one after the other."""

    @contextmanager
    def bring(scene: Scene) -> Iterator[None]:
        for part in PASSES[point]:
            plan = f"seed={scene.times} {point.replace(' ', '_')}:kill:{DEATH_CHANCE}"
            armed = scene.replace(part, EXPEDITER_TEST_POINTS=plan)
            wait_until(lambda armed=armed: armed.process.poll() is not None)  # type: ignore[misc]
            assert armed.process.returncode == -signal.SIGKILL, armed.log
            scene.replace(part)
        yield

    return bring


def clock_off(part: str, seconds: int) -> Bring:
    """Replace the door or the worker by one whose wall clock is wrong."""

    @contextmanager
    def bring(scene: Scene) -> Iterator[None]:
        path = scene.folder / "clock"
        path.mkdir(exist_ok=True)
        (path / "sitecustomize.py").write_text(WRONG_CLOCK.format(seconds=seconds))
        scene.replace(part, PYTHONPATH=str(path))
        scene.accepted_more(1)
        yield
        scene.replace(part)

    return bring


# Disks.


@contextmanager
def power_cut(scene: Scene) -> Iterator[None]:
    """Cut the power of the database's disk; then everything starts again on what the disk has."""
    assert scene.disk is not None
    before = set(scene.clients.accepted)
    scene.disk.cut_power()
    scene.kill()
    # A machine without power answers nothing. These processes had a moment left, in which the disk told them what
    # does not count (a flush that was under way may seem to have gone well).
    scene.clients.lost |= set(scene.clients.accepted) - before
    if scene.at.server is not None:
        scene.server.kill()
    scene.disk.power_on()
    if scene.at.server is not None:
        scene.server.restart()
    for part in scene.programs:
        scene.replace(part)
    yield


@contextmanager
def full_disk(scene: Scene) -> Iterator[None]:
    """Leave no room on the database's disk; whoever ended because of it is started again once there is some."""
    assert scene.disk is not None
    scene.disk.fill()
    try:
        yield
    finally:
        scene.disk.make_room()
        if scene.at.server is not None and scene.server.process.poll() is not None:
            scene.server.restart()


@contextmanager
def quota(scene: Scene) -> Iterator[None]:
    """Let no file of the two processes grow beyond what the database's log has now, and a little."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux limits the files of a running process")
    unlimited = resource.RLIM_INFINITY
    full = (scene.folder / "orders.db-wal").stat().st_size + ROOM[scene.times % len(ROOM)]
    for program in scene.programs.values():
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (full, unlimited))
    yield
    for program in scene.programs.values():
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))


# Databases.


def server_of(scene: Scene, what: str) -> Server:
    """Return the server that a fault is about."""
    found = {"database": scene.at.server, "cache": scene.cache, "broker": scene.broker}[what]
    assert found is not None
    return found


def frozen(what: str) -> Bring:
    """Let a server hang: it takes connections and answers nothing."""
    return lambda scene: server_of(scene, what).frozen()


def killed(what: str, *, part: str) -> Bring:
    """Kill a server, with what it has in memory, and start it again."""

    @contextmanager
    def bring(scene: Scene) -> Iterator[None]:
        server = server_of(scene, what)
        server.kill()
        wait_until(lambda: scene.is_ill(part))
        yield
        server.restart()

    return bring


@contextmanager
def restarted(scene: Scene) -> Iterator[None]:
    """Stop the database server as its operator would, without waiting for its clients, and start it again."""
    fast = signal.SIGINT if isinstance(scene.server, PostgresServer) else signal.SIGTERM
    scene.server.process.send_signal(fast)
    scene.server.process.wait()
    scene.server.restart()
    yield


@contextmanager
def locked(scene: Scene) -> Iterator[None]:
    """Let every write wait for somebody else's lock, as a backup may hold one."""
    if scene.at.server is None:
        path = scene.at.address.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as raw:
            raw.execute("BEGIN IMMEDIATE")
            yield
            raw.execute("ROLLBACK")
        return
    lock = "FLUSH TABLES WITH READ LOCK" if isinstance(scene.server, MariadbServer) else "LOCK TABLE orders"
    with scene.server.holding(scene.name, lock):
        yield


@contextmanager
def read_only(scene: Scene) -> Iterator[None]:
    """Let the database take no writes, as after a failover."""
    server = scene.server
    if isinstance(server, PostgresServer):
        setting = f"ALTER DATABASE {scene.name} SET default_transaction_read_only"
        off, on = f"{setting} = on", f"{setting} = off"
    else:
        off, on = "SET GLOBAL read_only = 1", "SET GLOBAL read_only = 0"
    server.query(server.user, off)
    if isinstance(server, PostgresServer):  # sessions that are open have it as it was
        ours = f"usename = '{server.user}' AND pid <> pg_backend_pid()"
        server.query(scene.name, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {ours}")
    try:
        yield
    finally:
        server.query(server.user, on)


def tool(name: str) -> str:
    """Return the path of a program that comes with a database server."""
    found = shutil.which(name) or newest(f"usr/lib/postgresql/*/bin/{name}")
    assert found is not None, f"{name} is not installed"
    return found


def at(server: Server) -> list[str]:
    """Return the options by which a server's own programs reach it."""
    user, port = ("-U", "-p") if isinstance(server, PostgresServer) else ("-u", "-P")
    return ["-h", "127.0.0.1", port, str(server.port), user, server.user]


HOUR = 3600
#: A time of these years as the database has it, in a column or in the data of an event: microseconds.
TIME = re.compile(r"\b1[78][0-9]{14}\b")


def aged(backup: str, seconds: int) -> str:
    """Return a backup as if it had been made so long ago: every time in it is earlier."""
    return TIME.sub(lambda time: str(int(time[0]) - seconds * MICROSECONDS), backup)


def dump(scene: Scene, backup: Path) -> None:
    """Make a backup of the database beside the running service, as its operator would; of an hour ago."""
    if scene.at.server is None:
        with closing(sqlite3.connect(scene.folder / "orders.db")) as source:
            source.execute("BEGIN")  # else each table is read as it is at that moment
            text = "\n".join(source.iterdump())
        with closing(sqlite3.connect(backup)) as copy:
            copy.executescript(aged(text, HOUR))
        return
    if isinstance(scene.server, PostgresServer):
        words = [tool("pg_dump"), *at(scene.server), scene.name]
    else:
        words = [tool("mariadb-dump"), *at(scene.server), "--single-transaction", scene.name]
    made = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    backup.write_text(aged(made.stdout, HOUR))


def restore(scene: Scene, backup: Path) -> None:
    """Put a backup in the place of the database."""
    if scene.at.server is None:
        for end in ("", "-wal", "-shm"):
            (scene.folder / f"orders.db{end}").unlink(missing_ok=True)
        shutil.copy(backup, scene.folder / "orders.db")
        return
    server = scene.server
    force = " WITH (FORCE)" if isinstance(server, PostgresServer) else ""
    server.query(server.user, f"DROP DATABASE {scene.name}{force}")
    server.query(server.user, f"CREATE DATABASE {scene.name}")
    program = tool("psql" if isinstance(server, PostgresServer) else "mariadb")
    words = [program, *at(server), scene.name]
    with backup.open("rb") as text:
        subprocess.run(words, stdin=text, stdout=subprocess.DEVNULL, check=True)


@contextmanager
def restored(scene: Scene) -> Iterator[None]:
    """Put an hour-old backup in the place of the database: what came after it is gone, save what was charged."""
    backup = scene.folder / "backup"
    kept = set(scene.clients.accepted)
    dump(scene, backup)
    scene.accepted_more(40)
    scene.kill()
    restore(scene, backup)
    scene.command("db", "restored")
    ((newest,),) = scene.at.rows("SELECT MAX(at) FROM events")
    assert newest < (time.time() - HOUR + 60) * MICROSECONDS, "the backup is younger than an hour"
    there = {row[0] for row in scene.at.rows("SELECT order_id FROM orders")}
    assert kept <= there, "what was accepted before the backup is not in it"
    scene.clients.lost |= set(scene.clients.accepted) - there
    for part in scene.programs:
        scene.replace(part)
    yield


# Brokers and caches.


@contextmanager
def wiped(scene: Scene) -> Iterator[None]:
    """Remove everything that the broker holds."""
    wipe(server_of(scene, "broker"), scene.settings)
    yield


@contextmanager
def alarmed(scene: Scene) -> Iterator[None]:
    """Let the broker be out of memory: it is there, and takes no more messages."""
    broker = server_of(scene, "broker")
    if isinstance(broker, RabbitServer):
        broker.control("set_vm_memory_high_watermark", "0")
        yield
        broker.control("set_vm_memory_high_watermark", "0.6")
    else:
        broker.query("", "CONFIG SET maxmemory 1")
        yield
        broker.query("", "CONFIG SET maxmemory 0")


def amid_waiting(bring: Bring) -> Bring:
    """Bring a fault about while orders wait that are accepted and not stored: the worker stands still."""

    @contextmanager
    def both(scene: Scene) -> Iterator[None]:
        worker = scene.programs["worker"].process
        worker.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: scene.waiting() >= WAITING)
            with bring(scene):
                worker.send_signal(signal.SIGCONT)
                yield
        finally:
            worker.send_signal(signal.SIGCONT)

    return both


def at_once(*brings: Bring) -> Bring:
    """Bring several faults about at once."""

    @contextmanager
    def bring(scene: Scene) -> Iterator[None]:
        with ExitStack() as stack:
            for each in brings:
                stack.enter_context(each(scene))
            yield

    return bring


def told(*commands: str, undone: str = "") -> Bring:
    """Give the cache's Redis these commands, and afterwards one that undoes them."""

    @contextmanager
    def bring(scene: Scene) -> Iterator[None]:
        cache = server_of(scene, "cache")
        assert isinstance(cache, RedisServer)
        for command in commands:
            cache.query("0", command)
        yield
        if undone:
            cache.query("0", undone)

    return bring


@contextmanager
def repeated_hints(scene: Scene) -> Iterator[None]:
    """Give the hint of each order that was accepted five times, all of them shuffled."""
    yield
    hints = [msgspec.json.encode([order_id]) for order_id in scene.clients.accepted] * HINTS
    Random(7).shuffle(hints)

    async def work() -> None:
        queue = scene.settings.get("RABBITMQ_QUEUE_NAME", "orders")
        broker = open_broker(scene.settings["BROKER_URL"], queue_name=queue)
        assert broker is not None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while hints:
                    with suppress(BrokerUnavailable):  # it is slow on a busy machine; then the hint is given again
                        await broker.publish(Topic.HINTS, hints[-1])
                        hints.pop()
        finally:
            await broker.close()

    in_thread(work)


def nothing(scene: Scene) -> AbstractContextManager[None]:
    """Do nothing: what is wrong is in what the orders ask of the gateway."""
    return nullcontext()
