"""What work costs, counted and not timed: the same numbers on every machine, fast or slow, busy or idle.

Counted are what goes over the wire to a database server or to Redis (a proxy in between reads it), what goes into
sqlite3, and the function calls of a request.

When one of these tests fails, it shows what was counted. A changed number is a decision: if it is meant, change it
in the tables below, and say in the commit why. It is lowered, too, when things cost less, so that they stay so.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import re
import sqlite3
import statistics
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import hiredis
import msgspec
import pytest
import uvloop

from expediter.backends.cache import redis as shared_cache
from expediter.backends.cache.redis import RedisCache
from expediter.orders.commands import FulfilmentOutcome, RecordFulfilment, RecordPayment
from expediter.orders.order import PaymentOutcome
from expediter.run.service import Service, open_service
from expediter.run.serving import context_of
from expediter.settings import load_settings
from expediter.store.committer import Committer
from expediter.store.submissions import Applied, Claimed, Outcome, Request
from expediter.web import create_app
from expediter.web.server.connections import Connection
from expediter.web.server.state import State
from servers import RedisServer
from storing import LEASE, Place, ask, claim, claimed, open_committer, place


class Sql(NamedTuple):
    """What one batch says to its database.

    `statements` are all that the driver sends, BEGIN and COMMIT included; many rows in one call (COPY,
    executemany) are one. `commits` are those among them. `round_trips` are how often the driver waits for the
    server (SQLite has none).
    """

    statements: int
    commits: int
    round_trips: int = 0


class Talk(NamedTuple):
    """What one request says to Redis; a pipeline, or a script, is one round trip."""

    commands: int
    round_trips: int


class Calls(NamedTuple):
    """Calls of Python functions (a coroutine that goes on counts again), and from Python of functions in C."""

    python: int
    c: int


_ASKS_THE_TIME = re.compile(r"clock_timestamp|UTC_TIMESTAMP")

#: What each batch may cost: exactly this. A statement more is paid by every batch, whatever its size; on a server
#: it is a round trip more for everybody who waits for the commit.
SQL: Mapping[str, Mapping[str, Sql]] = {
    "sqlite": {
        "100 new orders, ids of the server's": Sql(9, 1),
        "100 new orders, ids of the client's": Sql(11, 1),
        "a claim of 50": Sql(12, 1),
        "50 payments, lease kept": Sql(10, 1),
        "50 fulfilments": Sql(9, 1),
    },
    "postgresql": {
        # It commits by itself.
        "100 new orders, ids of the server's": Sql(1, 0, 1),
        "100 new orders, ids of the client's": Sql(5, 1, 5),
        "a claim of 50": Sql(6, 1, 6),
        "50 payments, lease kept": Sql(4, 1, 4),
        "50 fulfilments": Sql(4, 1, 4),
    },
    "mysql": {
        "100 new orders, ids of the server's": Sql(14, 1, 14),
        "100 new orders, ids of the client's": Sql(16, 1, 16),
        "a claim of 50": Sql(11, 1, 11),
        "50 payments, lease kept": Sql(10, 1, 10),
        "50 fulfilments": Sql(8, 1, 8),
    },
}

#: What each request may say to Redis as a cache: exactly this. The statistics, once a second, are not counted.
CACHED: Mapping[str, Talk] = {
    "GET an order, hit": Talk(1, 1),
    "GET an order, miss": Talk(2, 2),
    "GET a page, hit": Talk(1, 1),
    "GET a page, miss": Talk(2, 2),
    "POST an order": Talk(1, 1),
    "PATCH a status": Talk(2, 2),
}

#: The same with INTAKE=queued, over Redis Streams.
QUEUED: Mapping[str, Talk] = {
    "POST an order": Talk(2, 2),
    "POST an order with a key": Talk(4, 3),
    "POST an order with an id of the client's": Talk(4, 3),
    "GET an order that waits": Talk(3, 2),
    "GET an order that is stored, hit": Talk(3, 2),
    "PATCH an order that waits": Talk(4, 3),
}

#: Ceilings of the calls that one request makes: what was measured on Python 3.11, plus 5 %. SQLite, one process,
#: INTAKE=direct, requests one after another: from the bytes of a request to those of its answer.
CALLS: Mapping[str, Calls] = {
    "POST an order, the event loop": Calls(186, 168),
    "POST an order, sqlite-writer": Calls(102, 93),
    "GET an order, hit, the event loop": Calls(38, 46),
    "GET a page, hit, the event loop": Calls(61, 57),
}
#: How far below its ceiling a number may fall before the ceiling must be lowered.
SLACK = 0.25

#: Requests that are counted, after as many that are not.
REQUESTS = 50
#: Times that a request to Redis is made; what is usual among them is taken, for background work may join one.
TIMES = 5
#: Characters of a statement that a failure shows.
SHOWN_CHARACTERS = 150

ORDER: Mapping[str, object] = {
    "customer_id": "customer_123",
    "items": [
        {"item_id": "item_001", "item_name": "Burger", "quantity": 2, "price": 12.99},
        {"item_id": "item_002", "item_name": "Fries", "quantity": 1, "price": 3.99},
    ],
}
CANCELLED = b'{"status": "cancelled"}'


@dataclass
class Said:
    """What was said since the last look: texts, and how often an answer was waited for."""

    texts: list[str] = field(default_factory=list)
    round_trips: int = 0

    def note(self, text: str) -> None:
        self.texts.append(" ".join(text.split())[:SHOWN_CHARACTERS])

    def take(self) -> Said:
        taken, self.texts, self.round_trips = replace(self), [], 0
        return taken

    @property
    def sql(self) -> Sql:
        return Sql(len(self.texts), sum(text.startswith("COMMIT") for text in self.texts), self.round_trips)

    def __str__(self) -> str:
        return "".join(f"\n    {number:3} {text}" for number, text in enumerate(self.texts, 1))


class Language(Protocol):
    """Understands what a client sends, one for each connection."""

    def read(self, sent: bytes) -> Iterator[str]: ...


class Postgresql:
    """The messages of PostgreSQL's clients: https://www.postgresql.org/docs/current/protocol-message-formats.html"""

    def __init__(self) -> None:
        self._held = b""
        self._started = False
        self._prepared: dict[bytes, str] = {}
        self._bound = ""
        self._executed = 0

    def read(self, sent: bytes) -> Iterator[str]:
        self._held += sent
        while len(self._held) >= (5 if self._started else 8):
            head = int(self._started)  # a letter comes first, but not at the start
            end = head + int.from_bytes(self._held[head : head + 4])
            if end > len(self._held):
                return
            message, self._held = self._held[:end], self._held[end:]
            if self._started:
                yield from self._message(message[:1], message[5:])
            self._started = self._started or message[4:8] == b"\x00\x03\x00\x00"

    def _message(self, letter: bytes, body: bytes) -> Iterator[str]:
        if letter == b"Q":
            yield body[:-1].decode()
        elif letter == b"P":
            name, text, _ = body.split(b"\0", 2)
            self._prepared[name] = text.decode()
            yield f"(prepare) {text.decode()}"
        elif letter == b"B":
            self._bound = self._prepared[body.split(b"\0", 2)[1]]
        elif letter == b"E":
            self._executed += 1
        elif letter == b"S" and self._executed:
            yield f"({self._executed} times) {self._bound}" if self._executed > 1 else self._bound
            self._executed = 0


class Mysql:
    """MariaDB's packets: https://mariadb.com/docs/server/reference/clientserver-protocol"""

    def __init__(self) -> None:
        self._held = b""

    def read(self, sent: bytes) -> Iterator[str]:
        self._held += sent
        while len(self._held) > 4 and len(self._held) >= (end := 4 + int.from_bytes(self._held[:3], "little")):
            packet, self._held = self._held[:end], self._held[end:]
            number, command = packet[3], packet[4]
            if number == 0:  # a command; what follows the server's greeting has higher numbers
                yield packet[5:].decode(errors="replace") if command == 3 else f"(command {command})"


class Resp:
    """Redis's commands, which are arrays in the form of its answers."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()

    def read(self, sent: bytes) -> Iterator[str]:
        self._reader.feed(sent)
        while words := self._reader.gets():
            yield " ".join(word[:60].decode(errors="replace") for word in words)


@asynccontextmanager
async def overheard(address: str, language: Callable[[], Language]) -> AsyncIterator[tuple[str, Said]]:
    """Put a proxy before a server; yield its address, and what is said through it."""
    port = int(re.findall(r":(\d+)/", address)[0])
    said = Said()
    tasks: set[asyncio.Task[None]] = set()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_connection("127.0.0.1", port)
        understood = language()
        answered = True

        async def ask() -> None:
            nonlocal answered
            while sent := await reader.read(1 << 20):
                # A server's clock is asked twice a second, however many batches there are.
                texts = [text for text in understood.read(sent) if not _ASKS_THE_TIME.search(text)]
                if texts:
                    # Statements that are sent before the server has answered share their round trip; what
                    # completes none (the rows of a COPY) belongs to the statement before.
                    said.round_trips += answered
                    answered = False
                for text in texts:
                    said.note(text)
                downstream.write(sent)
            downstream.close()

        async def answer() -> None:
            nonlocal answered
            while got := await upstream.read(1 << 20):
                answered = True
                writer.write(got)
            writer.close()

        for work in (ask(), answer()):
            task = asyncio.create_task(_until_closed(work))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    own_port = server.sockets[0].getsockname()[1]
    try:
        yield address.replace(f":{port}/", f":{own_port}/"), said
    finally:
        server.close()
        if tasks:
            await asyncio.wait(tasks)
        await server.wait_closed()


async def _until_closed(work: Coroutine[Any, Any, None]) -> None:
    with suppress(ConnectionError):  # one side has hung up
        await work


@asynccontextmanager
async def overheard_sqlite(at: Place, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, Said]]:
    """Let the driver open connections that note what they are told."""
    said = Said()

    class Overheard(sqlite3.Connection):
        def execute(self, text: str, *values: Any) -> sqlite3.Cursor:
            said.note(text)
            return super().execute(text, *values)

        def executemany(self, text: str, rows: Any) -> sqlite3.Cursor:
            said.note(f"({len(rows)} times) {text}")
            return super().executemany(text, rows)

    connect = sqlite3.connect
    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", lambda *given, **more: connect(*given, factory=Overheard, **more))
        yield at.address, said


def applied_all(outcomes: Sequence[Outcome]) -> list[Claimed]:
    """Return the orders with the jobs that were kept."""
    assert all(isinstance(outcome, Applied) for outcome in outcomes), outcomes
    return [Claimed(each.order, each.job) for each in outcomes if isinstance(each, Applied) and each.job]


async def walk(committer: Committer, said: Said, mark: str) -> dict[str, Said]:
    """Take orders from their placing to their end; return what each batch said."""
    spoken: dict[str, Said] = {}
    said.take()

    async def step(name: str, batch: Awaitable[Any]) -> Any:
        outcome = await batch
        spoken[name] = said.take()
        return outcome

    for whose, fresh in (("server", True), ("client", False)):
        orders = [place(f"{mark}-{whose}-{number:03}", fresh=fresh) for number in range(100)]
        await step(f"100 new orders, ids of the {whose}'s", ask(committer, *orders))
    claims = await step("a claim of 50", claimed(committer, claim()))
    assert len(claims.claimed) == 50
    payments = [
        RecordPayment(
            order_id=job.order.order_id, fence=job.job.fence, outcome=PaymentOutcome.SUCCEEDED, lease=LEASE
        )
        for job in claims.claimed
    ]
    paid = applied_all(await step("50 payments, lease kept", ask(committer, *map(Request, payments))))
    assert len(paid) == 50
    done = [
        RecordFulfilment(order_id=job.order.order_id, fence=job.job.fence, outcome=FulfilmentOutcome.DONE)
        for job in paid
    ]
    assert not applied_all(await step("50 fulfilments", ask(committer, *map(Request, done))))
    return spoken


async def test_a_batch_says_to_its_database_what_was_agreed(at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders are placed, claimed, paid and fulfilled with the statements, commits and round trips of the table."""
    kind = at.address.partition(":")[0]
    if kind == "sqlite":
        listening = overheard_sqlite(at, monkeypatch)
    else:
        listening = overheard(at.address, {"postgresql": Postgresql, "mysql": Mysql}[kind])
    async with listening as (address, said), open_committer(replace(at, address=address)) as committer:
        await walk(committer, said, "first")  # connections are opened and statements prepared once
        spoken = await walk(committer, said, "second")
    wrong = [
        f"{name} on {kind}: {each.sql}, allowed {SQL[kind][name]}{each}"
        for name, each in spoken.items()
        if each.sql != SQL[kind][name]
    ]
    assert not wrong, "\n".join(wrong)


class Wire:
    """A client's end of a connection: it keeps what is written to it."""

    def __init__(self) -> None:
        self.written = asyncio.get_running_loop().create_future()

    def write(self, data: bytes) -> None:
        self.written.set_result(data)

    def get_extra_info(self, name: str) -> tuple[str, int]:
        return "127.0.0.1", 50_000

    def set_write_buffer_limits(self, **limits: int) -> None: ...


class Client:
    """Sends requests to a connection of the service, without the sockets under it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        app = create_app(context_of(service, working=False))
        self._connection = Connection(State(app, connections_max=1, drain_seconds=0))
        self._wire = Wire()
        self._connection.connection_made(self._wire)

    async def send(self, method: str, path: str, body: bytes = b"", key: str = "") -> bytes:
        """Return the body of the answer to a request that succeeds."""
        headers = [b"Host: 127.0.0.1:8000", b"Accept: */*", b"User-Agent: test"]
        if body:
            headers += [b"Content-Type: application/json", b"Content-Length: %d" % len(body)]
        if key:
            headers.append(f"Idempotency-Key: {key}".encode())
        head = b"\r\n".join([f"{method} {path} HTTP/1.1".encode(), *headers])
        written = self._wire.written = asyncio.get_running_loop().create_future()
        self._connection.data_received(head + b"\r\n\r\n" + body)
        answer: bytes = await written
        assert answer[9:10] == b"2", answer
        return answer.partition(b"\r\n\r\n")[2]

    async def place(self, *, key: str = "", **more: str) -> str:
        """Place an order and return its path."""
        body = msgspec.json.encode({**ORDER, **more})
        answer = msgspec.json.decode(await self.send("POST", "/api/v1/orders", body, key))
        return f"/api/v1/orders/{answer['order_id']}"

    async def settle(self) -> None:
        """Wait until what was read is kept."""
        if isinstance(self.service.cache, RedisCache):
            await self.service.cache.settle()


@asynccontextmanager
async def client(folder: Path, **settings: Any) -> AsyncIterator[Client]:
    """An application on a SQLite file of its own, without workers and without the machine's settings."""
    given = {"redis_url": "", "broker_url": "", "rabbitmq_host": "", "intake": "direct", "cache_disabled": False}
    address = f"sqlite:///{folder}/orders.db"
    async with open_service(
        load_settings(database_url=address, **{**given, **settings}), working=False
    ) as service:
        yield Client(service)


async def usual(client: Client, said: Said, request: Callable[[], Awaitable[Any]]) -> tuple[Talk, Said]:
    """Make a request some times and return what it usually says."""
    heard = []
    for _ in range(TIMES):
        said.take()
        await request()
        await client.settle()
        heard.append(said.take())
    talks = [Talk(len(each.texts), each.round_trips) for each in heard]
    talk = statistics.mode(talks)
    return talk, heard[talks.index(talk)]


async def differences(
    http: Client, said: Said, requests: Mapping[str, Callable[[], Awaitable[Any]]], allowed: Mapping[str, Talk]
) -> list[str]:
    """Return where requests say something else to Redis than the table allows, and what they say."""
    assert requests.keys() == allowed.keys()
    wrong = []
    for name, request in requests.items():
        await request()  # connections are opened and scripts loaded once
        talk, example = await usual(http, said, request)
        if talk != allowed[name]:
            wrong.append(f"{name}: {talk}, allowed {allowed[name]}{example}")
    return wrong


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No answer comes too late for the cache, however busy the machine is; statistics are told at the end."""
    monkeypatch.setattr(shared_cache, "CALL_SECONDS_MAX", 10.0)
    monkeypatch.setattr(shared_cache, "STATS_SECONDS", 3600.0)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("patient")
async def test_a_request_says_to_the_shared_cache_what_was_agreed(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """Reads and writes send the commands, and wait for the round trips, of the table."""
    async with (
        overheard(redis_server.new_database(), Resp) as (url, said),
        client(tmp_path, redis_url=url) as http,
    ):
        orders = [await http.place() for _ in range(TIMES + 2)]
        unread, unchanged, limits = iter(orders), iter(orders), itertools.count(1)
        requests: dict[str, Callable[[], Awaitable[Any]]] = {
            "GET an order, miss": lambda: http.send("GET", next(unread)),
            "GET an order, hit": lambda: http.send("GET", orders[0]),
            "GET a page, miss": lambda: http.send("GET", f"/api/v1/orders?limit={next(limits)}"),
            "GET a page, hit": lambda: http.send("GET", "/api/v1/orders?limit=1"),
            "POST an order": http.place,
            "PATCH a status": lambda: http.send("PATCH", f"{next(unchanged)}/status", CANCELLED),
        }
        wrong = await differences(http, said, requests, CACHED)
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("patient")
async def test_a_queued_request_says_to_redis_what_was_agreed(redis_server: RedisServer, tmp_path: Path) -> None:
    """Orders that are queued, and read and changed while they wait, cost the round trips of the table."""
    async with (
        overheard(redis_server.new_database(), Resp) as (url, said),
        client(tmp_path, redis_url=url, broker_url=url, intake="queued") as http,
    ):
        await ask(http.service.committer, place("stored"))
        waiting = [await http.place() for _ in range(TIMES + 2)]
        unchanged, keys, names = iter(waiting), itertools.count(), itertools.count()
        requests: dict[str, Callable[[], Awaitable[Any]]] = {
            "POST an order": http.place,
            "POST an order with a key": lambda: http.place(key=f"key-{next(keys)}"),
            "POST an order with an id of the client's": lambda: http.place(order_id=f"order-{next(names)}"),
            "GET an order that waits": lambda: http.send("GET", waiting[-1]),
            "GET an order that is stored, hit": lambda: http.send("GET", "/api/v1/orders/stored"),
            "PATCH an order that waits": lambda: http.send("PATCH", f"{next(unchanged)}/status", CANCELLED),
        }
        wrong = await differences(http, said, requests, QUEUED)
    assert not wrong, "\n".join(wrong)


class Profile:
    """Counts the calls of this thread, where the event loop runs, and of the writer's; the tests' own are not."""

    def __init__(self) -> None:
        self._loop_thread = threading.get_ident()
        self._counting = False
        self.python: dict[str, Counter[str]] = {}
        self.c: dict[str, Counter[str]] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if not self._counting or event not in ("call", "c_call") or frame.f_code.co_filename == __file__:
            return
        thread = "the event loop"
        if threading.get_ident() != self._loop_thread:
            thread = threading.current_thread().name.partition("_")[0]
        if event == "call":
            code = frame.f_code
            name = f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_qualname}"
            self.python.setdefault(thread, Counter())[name] += 1
        else:
            self.c.setdefault(thread, Counter())[f"{argument.__qualname__} (C)"] += 1

    @contextmanager
    def watching_new_threads(self) -> Iterator[None]:
        """Watch the threads that begin here."""
        threading.setprofile(self)
        try:
            yield
        finally:
            threading.setprofile(None)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is called here; the garbage collector stays out of it."""
        self.python, self.c = {}, {}
        gc.disable()
        self._counting = True
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            self._counting = False
            gc.enable()

    def per_request(self, thread: str) -> Calls:
        counted = (each.get(thread, Counter()).total() for each in (self.python, self.c))
        return Calls(*(round(total / REQUESTS) for total in counted))

    def shown(self, thread: str) -> str:
        """Return the functions that are called, with their calls per request."""
        most = (self.python.get(thread, Counter()) + self.c.get(thread, Counter())).most_common()
        return "".join(f"\n    {count / REQUESTS:6.2f} {name}" for name, count in most)


async def profiled(folder: Path) -> dict[str, tuple[Calls, str]]:
    """Return the calls that each kind of request makes, and which they are."""
    found = {}
    profile = Profile()
    with profile.watching_new_threads():
        async with client(folder) as http:
            order = await http.place()
            requests: dict[str, Callable[[], Awaitable[Any]]] = {
                "POST an order": http.place,
                "GET an order, hit": lambda: http.send("GET", order),
                "GET a page, hit": lambda: http.send("GET", "/api/v1/orders"),
            }
            for what, request in requests.items():
                for _ in range(REQUESTS):
                    await request()
                with profile.counting():
                    for _ in range(REQUESTS):
                        await request()
                for thread in profile.python:
                    found[f"{what}, {thread}"] = profile.per_request(thread), profile.shown(thread)
    return found


@pytest.mark.usefixtures("patient")
def test_a_request_calls_as_many_functions_as_was_agreed(tmp_path: Path) -> None:
    """A request on a hot road makes no more calls than its ceiling, nor so few that the ceiling is idle."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the loop that serves
        found = runner.run(profiled(tmp_path))
    assert found.keys() == CALLS.keys()
    wrong = []
    for name, (calls, shown) in found.items():
        for counted, ceiling in zip(calls, CALLS[name], strict=True):
            if not ceiling * (1 - SLACK) <= counted <= ceiling:
                wrong.append(
                    f"{name}: {calls}, allowed at most {CALLS[name]}, and {SLACK:.0%} below that lower it{shown}"
                )
                break
    assert not wrong, "\n".join(wrong)
