"""Several processes on one database server: whose write counts, what readers see, and what a restart costs."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import uuid_utils
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from auditing import wait_until
from expediter.backends.databases import open_database, parse_url
from expediter.errors import CommitUncertain, ConfigurationError, DatabaseUnavailable, DuplicateOrder
from expediter.orders.commands import CancelOrder, PlaceOrder
from expediter.orders.order import Line
from expediter.store.feed import read_part
from expediter.store.lookups import counters, orders_with_lines
from expediter.store.migrations import upgrade
from expediter.store.migrations.servers import upgrade_server
from expediter.store.statements import POSITION
from expediter.store.submissions import Answer, Applied, IdempotencyKey, Outcome, Replayed, Request
from servers import MariadbServer, PostgresServer, Server
from serving import PATIENCE_SECONDS, environment
from storing import Place, ask, claim, claimed, open_committer, place, position, rows

SPELLINGS = {
    "sqlite:///orders.db": "sqlite",
    "postgres://u:p@h/d": "postgresql",
    "postgresql://u:p@h:5433/d": "postgresql",
    "postgresql+psycopg2://u@h/d": "postgresql",
    "mysql://u:p@h/d": "mysql",
    "mysql+pymysql://u:p@h/d": "mysql",
    "mariadb://u:p@h/d": "mysql",
}


@pytest.mark.parametrize("address", SPELLINGS)
def test_every_usual_spelling_is_understood(address: str) -> None:
    """An address means the same database however its scheme is written."""
    assert parse_url(address)[0] == SPELLINGS[address]


@pytest.mark.parametrize("address", ["oracle://h/d", "postgres", "", "http://h/d"])
def test_another_address_is_refused(address: str) -> None:
    """An address of a database that is not supported is refused by the name of its setting."""
    with pytest.raises(ConfigurationError, match="DATABASE_URL"):
        parse_url(address)


@pytest.mark.parametrize("address", ["postgresql://u:secret@h/d", "mysql://u:secret@h/d"])
def test_a_password_is_not_shown(address: str) -> None:
    """What is said of a database never has its password."""
    assert "secret" not in open_database(address).describe()


def test_ten_upgrades_at_once_do_the_work_once(bare: Place) -> None:
    """Of ten processes that start together on an empty database one makes the tables, the others find them."""
    with ThreadPoolExecutor(10) as threads:
        done = list(threads.map(upgrade, [bare.address] * 10))
    assert done.count(True) == 1
    assert rows(bare, "SELECT count(*) FROM feed") == [(1,)]


def answer(applied: Applied) -> Answer:
    return Answer(201, {}, applied.order.order_id)


async def test_an_id_placed_by_two_processes_is_one_order(at: Place) -> None:
    """When two processes place the same ids at once, each id is placed by exactly one of them."""
    async with open_committer(at, slot=1) as one, open_committer(at, slot=2) as two:
        outcomes = await asyncio.gather(
            *(one.submit(place(f"A{number}")) for number in range(200)),
            *(two.submit(place(f"A{number}")) for number in reversed(range(200))),
        )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds.count(Applied) == 200
    assert kinds.count(DuplicateOrder) == 200
    assert rows(at, "SELECT count(*) FROM orders") == [(200,)]
    assert rows(at, "SELECT sum(value) FROM counters WHERE name = 'status:pending'") == [(200,)]


async def test_a_key_used_at_two_processes_places_one_order(at: Place) -> None:
    """When two processes get the same key at once, one places the order and the other answers the same."""
    async with open_committer(at, slot=1) as one, open_committer(at, slot=2) as two:
        for number in range(20):
            key = IdempotencyKey(f"key-{number}", "print", 10**12)
            outcomes = await asyncio.gather(
                one.submit(Request(place(f"one-{number}").command, key, answer)),
                two.submit(Request(place(f"two-{number}").command, key, answer)),
            )
            assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Applied", "Replayed"]
            (replayed,) = (outcome for outcome in outcomes if isinstance(outcome, Replayed))
            assert rows(at, f"SELECT count(*) FROM orders WHERE order_id = '{replayed.answer.body}'") == [(1,)]
    assert rows(at, "SELECT count(*) FROM orders") == [(20,)]


async def test_two_processes_never_claim_the_same_job(at: Place) -> None:
    """Workers of two processes that claim at the same moment have no job in common, and leave none."""
    async with open_committer(at, slot=1) as one, open_committer(at, slot=2) as two:
        await ask(one, *(place(f"A{number:03}") for number in range(240)))
        taken: list[str] = []
        while len(taken) < 240:
            claims = await asyncio.gather(
                claimed(one, claim("one", 20)), claimed(two, claim("two", 20)), claimed(one, claim("three", 20))
            )
            taken += [job.order.order_id for each in claims for job in each.claimed]
        assert len(set(taken)) == len(taken)
    assert rows(at, "SELECT count(*) FROM payment_attempts") == [(240,)]


async def test_changes_from_two_processes_add_up(at: Place) -> None:
    """Two processes that change the same orders at once lose no change: rows, events and counters agree."""
    chance = random.Random(5)
    async with open_committer(at, slot=1) as one, open_committer(at, slot=2) as two:
        await ask(one, *(place(f"A{number}") for number in range(60)))

        async def cancel_some() -> None:
            committer = chance.choice((one, two))
            await ask(committer, *(Request(CancelOrder(order_id=f"A{chance.randrange(60)}")) for _ in range(4)))

        await asyncio.gather(*(cancel_some() for _ in range(40)))
    cancelled = rows(at, "SELECT count(*) FROM orders WHERE status = 'cancelled'")
    assert rows(at, "SELECT count(*) FROM events WHERE type = 'order.cancelled'") == cancelled
    assert rows(at, "SELECT sum(value) FROM counters WHERE name = 'status:cancelled'") == cancelled


async def test_a_reader_of_the_feed_misses_nothing(at: Place) -> None:
    """A reader that follows settled positions while two processes write sees each event once, in order."""
    async with open_committer(at, slot=1) as one, open_committer(at, slot=2) as two:
        writing = asyncio.gather(
            *(one.submit(place(f"one-{number}")) for number in range(300)),
            *(two.submit(place(f"two-{number}")) for number in range(300)),
        )
        database = open_database(at.address)
        seen: list[int] = []
        reached = 0
        while len(seen) < 600:
            part = await database.read(
                partial(read_part, position=reached, types=None, limit=50), settled=POSITION
            )
            seen += [event.position for event in part.events]
            assert part.reached >= reached
            reached = part.reached
        await writing
        await database.close()
    assert seen == [row[0] for row in rows(at, "SELECT position FROM events ORDER BY position")]


#: Text that a database, an array or JSON may take for something else.
texts = st.one_of(
    st.sampled_from(
        ["", "NULL", "null", '"', "\\", '\\"', '\\\\"', "{}", "{a,b}", "',--", "\n\t\r\x01\x7f", "%s $1 :x ?"]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.tuples(texts, st.none() | texts), min_size=1, max_size=40))
def test_text_comes_back_as_it_went(at: Place, names: list[tuple[str, str | None]]) -> None:
    """Names, references and errors are stored as they are, whatever is in them, in a batch of many."""

    async def there_and_back() -> None:
        async with open_committer(at) as committer:
            asked = [
                place(
                    str(uuid_utils.uuid7()),
                    customer_name=whose,
                    lines=(Line(1, name or None, name, 2, 1299), Line(2, None, name, 1, 399)),
                    metadata=json.dumps({"name": name}),
                )
                for name, whose in names
            ]
            await ask(committer, *asked)
            database = open_database(at.address)
            ids = [each.command.order_id for each in asked]
            found = {
                order.order_id: (order, lines)
                for order, lines in await database.read(lambda connection: orders_with_lines(connection, ids))
            }
            await database.close()
        for each in asked:
            order, lines = found[each.command.order_id]
            assert isinstance(each.command, PlaceOrder)
            assert (order.customer_name, order.metadata) == (each.command.customer_name, each.command.metadata)
            assert tuple(lines) == each.command.lines

    asyncio.run(there_and_back())


@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
async def test_nobody_waits_for_the_feed_and_no_reader_passes_over_who_is_late(
    postgresql: Server, ending: str
) -> None:
    """While a transaction has a position, others commit behind it; readers see theirs once it has ended."""
    at = Place(postgresql.new_database(), postgresql)
    database = open_database(at.address)

    async def read() -> list[str]:
        part = await database.read(partial(read_part, position=0, types=None, limit=50), settled=POSITION)
        assert part.reached <= position(at)
        return [event.order_id for event in part.events]

    async with open_committer(at) as committer:
        await ask(committer, place("A1"))
        late = await asyncpg.connect(at.address)
        await late.execute("BEGIN")
        await late.execute("SELECT feed_position_hold()")
        assert await read() == ["A1"]
        await ask(committer, place("A2"))
        assert await read() == ["A1"], "who holds the sequence may take a number that is lower, and has not yet"
        event = "INSERT INTO events SELECT nextval('feed_position'), 'B1', 1, at, type, data FROM events LIMIT 1"
        await late.execute(event)
        await ask(committer, place("A3"))
        assert await read() == ["A1"]
        assert [row[0] for row in rows(at, "SELECT order_id FROM events ORDER BY position")] == ["A1", "A2", "A3"]
        await late.execute(ending)
        assert await read() == (["A1", "A2", "B1", "A3"] if ending == "COMMIT" else ["A1", "A2", "A3"])
        await late.close()
    await database.close()
    assert rows(at, "SELECT name, value FROM counters ORDER BY name") == [("jobs", 3), ("status:pending", 3)]


async def test_the_numbers_of_a_batch_come_after_what_it_has_waited_for(postgresql: Server) -> None:
    """Who waits for a row has no number yet: per order the feed follows the order of commits."""
    at = Place(postgresql.new_database(), postgresql)
    async with open_committer(at) as committer:
        await ask(committer, place("A1"))
        other = await asyncpg.connect(at.address)
        await other.execute("BEGIN; SELECT FROM counters WHERE name = 'jobs' FOR UPDATE")
        asked = asyncio.create_task(committer.submit(place("A2")))
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        await asyncio.to_thread(wait_until, lambda: rows(at, waits)[0][0] == 1)
        assert await asyncio.to_thread(position, at) == 1
        held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        assert rows(at, held) == [(0,)]
        await other.execute("COMMIT")
        await other.close()
        assert isinstance(await asked, Applied)
    assert rows(at, "SELECT position, order_id FROM events ORDER BY position") == [(1, "A1"), (2, "A2")]


class Wire:
    """A connection to a server that can be cut at the client's end: the server does not hear of it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._ends: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._cut: set[asyncio.StreamReader] = set()
        self._far_ends: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.own_port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        for end in self._far_ends:
            end.close()
        await asyncio.wait(self._tasks)
        self._server.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._ends.append((reader, writer))
        self._far_ends.append(far_writer)
        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pass_on(source, target))
            self._tasks.add(task)

    async def _pass_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(1 << 16):
                target.write(data)
        if source not in self._cut:
            target.close()

    def cut(self) -> None:
        for reader, end in self._ends:
            self._cut.add(reader)
            end.close()
        self._ends.clear()


@pytest.mark.parametrize("reads", [False, True], ids=["one statement", "several"])
async def test_what_a_lost_client_asked_for_is_not_done_behind_its_back(postgresql: Server, reads: bool) -> None:
    """A connection breaks while the server is at a batch: it is carried out once, and whoever asked hears so."""
    at = Place(postgresql.new_database(), postgresql)
    port = int(at.address.rpartition(":")[2].partition("/")[0])
    async with Wire(port) as wire:
        through = replace(at, address=at.address.replace(f":{port}/", f":{wire.own_port}/"))
        async with open_committer(through) as committer:
            await ask(committer, place("A1"))
            other = await asyncpg.connect(at.address)
            await other.execute("BEGIN; SELECT FROM counters WHERE name = 'jobs' FOR UPDATE")
            asked = asyncio.create_task(committer.submit(place("A2", fresh=not reads)))
            waits = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            await asyncio.to_thread(wait_until, lambda: len(rows(at, waits)) == 1)
            ((stranded,),) = rows(at, waits)
            wire.cut()
            if reads:
                # Its transaction was not to be committed yet, and never is. What it locks it does not keep for
                # long, although the server waits for its next statement.
                with pytest.raises(DatabaseUnavailable):
                    await asked
            else:
                # The server is at the whole transaction, and would go on with it.
                still = f"SELECT pid FROM pg_stat_activity WHERE pid = {stranded}"
                await asyncio.to_thread(wait_until, lambda: not rows(at, still))
            await other.execute("ROLLBACK")
            await other.close()
            outcome = await committer.submit(place("A2")) if reads else await asked
            assert isinstance(outcome, Applied)
    assert rows(at, "SELECT order_id FROM events ORDER BY position") == [("A1",), ("A2",)]
    assert rows(at, "SELECT name, value FROM counters ORDER BY name") == [("jobs", 2), ("status:pending", 2)]


@pytest.mark.parametrize("reads", [False, True], ids=["one statement", "several"])
async def test_a_commit_whose_answer_is_lost_counts_once(
    tmp_path_factory: pytest.TempPathFactory, reads: bool
) -> None:
    """A connection breaks amid the commit: whoever asked hears in the end that it is stored, and it is so once."""
    server = PostgresServer(tmp_path_factory.mktemp("postgresql"))
    try:
        at = Place(server.new_database(), server)
        async with Wire(server.port) as wire:
            through = replace(at, address=at.address.replace(f":{server.port}/", f":{wire.own_port}/"))
            async with open_committer(through) as committer:
                await ask(committer, place("A1"))
                # A commit waits for a standby that is not there; it has reached the disk here all the same.
                await set_standby(at, "nobody")
                await until_commits_wait(at)
                asked = asyncio.create_task(committer.submit(place("A2", fresh=not reads)))
                await asyncio.to_thread(wait_until, lambda: rows(at, SYNC_WAITS)[0][0] == 1)
                wire.cut()
                await set_standby(at, "")
                assert isinstance(await asked, Applied)
        assert rows(at, "SELECT position, order_id FROM events ORDER BY position") == [(1, "A1"), (2, "A2")]
    finally:
        server.stop()


async def test_a_connection_that_broke_before_its_commit_is_no_bug(postgresql: Server) -> None:
    """Where the server ends a connection between a statement and the commit, the database is unavailable."""
    at = Place(postgresql.new_database(), postgresql)
    database = open_database(at.address)
    other = await asyncpg.connect(at.address)

    async def work(connection: Any) -> None:
        await connection.now()
        ((pid,),) = await connection.fetch(text("SELECT pg_backend_pid()"))
        await other.execute(f"SELECT pg_terminate_backend({pid})")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while connection._raw._con is not None:
                await asyncio.sleep(0)

    with pytest.raises((CommitUncertain, DatabaseUnavailable)):
        await database.write(work)
    await other.close()
    await database.close()


SYNC_WAITS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


async def until_commits_wait(at: Place) -> None:
    """Return once a commit waits for a standby; the one that tried it is called back."""
    raw = await asyncpg.connect(at.address)
    pid = await raw.fetchval("SELECT pg_backend_pid()")
    waiting = False
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not waiting:
            tried = asyncio.create_task(raw.execute("SELECT pg_logical_emit_message(true, 'try', 'it')"))
            while not tried.done() and not waiting:
                waiting = rows(at, SYNC_WAITS)[0][0] == 1
                await asyncio.sleep(0)
            if waiting:
                rows(at, f"SELECT pg_cancel_backend({pid})")
            await tried
    await raw.close()


async def set_standby(at: Place, name: str) -> None:
    """Set the standby that commits wait for; the server acts on it a moment later."""
    raw = await asyncpg.connect(at.address)
    await raw.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    await raw.execute("SELECT pg_reload_conf()")
    await raw.close()


SERVERS = {"postgresql": PostgresServer, "mariadb": MariadbServer}


@pytest.fixture(params=SERVERS)
def own_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the test may stop."""
    server = SERVERS[request.param](tmp_path_factory.mktemp(request.param))
    yield server
    server.stop()


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
def test_a_server_that_hangs_up_at_once_is_unavailable(scheme: str) -> None:
    """A server that takes a connection and drops it, as it does when it ends, is unavailable and no bug."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        address = f"{scheme}://user@127.0.0.1:{listening.getsockname()[1]}/orders"

        async def knock() -> None:
            database = open_database(address)
            knocks = [database.read(counters) for _ in range(100)]
            assert {type(answer) for answer in await asyncio.gather(*knocks, return_exceptions=True)} == {
                DatabaseUnavailable
            }
            await database.close()

        uvloop.run(knock())
        for _ in range(20):
            with pytest.raises(DatabaseUnavailable):
                uvloop.run(upgrade_server(*parse_url(address)))
        listening.shutdown(socket.SHUT_RDWR)


async def test_a_restarted_server_is_found_again(own_server: Server) -> None:
    """While the server is away writes are refused as unavailable; once it is back they work by themselves."""
    at = Place(own_server.new_database(), own_server)
    async with open_committer(at) as committer:
        await ask(committer, place("A1"))
        await asyncio.to_thread(own_server.stop)
        with pytest.raises(DatabaseUnavailable):
            await committer.submit(place("A2"))
        await asyncio.to_thread(own_server.restart)
        outcomes: list[Outcome] = []
        while not outcomes:
            try:
                outcomes = await ask(committer, place("A3"))
            except DatabaseUnavailable:
                await asyncio.sleep(0.01)
    assert rows(at, "SELECT order_id FROM orders ORDER BY order_id") == [("A1",), ("A3",)]


def doctor(folder: Path, address: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Run `doctor --json` and return its exit status, and its findings by what they are about."""
    run = subprocess.run(
        [sys.executable, "-m", "expediter", "doctor", "--json"],
        cwd=folder,
        env=environment(folder, DATABASE_URL=address),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return run.returncode, {finding["what"]: finding for finding in json.loads(run.stdout)}


def test_doctor_reads_the_durability_of_each_database(folder: Path, at: Place) -> None:
    """On a database as it is installed, `doctor` says power-safe and names the settings that make it so."""
    status, findings = doctor(folder, at.address)
    assert status == 0
    assert findings["durability"]["verdict"] == "ok"
    assert findings["durability"]["detail"].startswith("power-safe: ")


def test_doctor_finds_a_database_that_is_not_power_safe(folder: Path, postgresql: Server) -> None:
    """Where commits do not wait for the disk, `doctor` fails and names the setting."""
    address = postgresql.new_database()
    name = address.rpartition("/")[2]
    postgresql.query("postgres", f"ALTER DATABASE {name} SET synchronous_commit = off")
    status, findings = doctor(folder, address)
    assert status == 1
    assert "synchronous_commit is off" in findings["durability"]["detail"]
