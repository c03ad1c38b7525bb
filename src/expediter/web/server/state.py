"""What the connections of one server share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import structlog

from expediter.errors import ExpediterError, Overloaded
from expediter.web.http import App, Call, Gathered, Reply
from expediter.web.problems import RequestRefused
from expediter.web.server.addresses import Proxies
from expediter.web.tallies import Requests

#: Bytes of answers that clients have not taken, all together, beyond what each may leave; then who is longest
#: behind is cut off.
UNREAD_BYTES_MAX = 64 * 1024 * 1024
#: Connections beyond a limit that a process has while it turns them away. After these one address that goes beyond
#: its share is cut off unheard; beyond the limit of all, more of them wait to be taken up.
TURNED_AWAY_MAX = 64
#: Of the connections that a process serves, the share that one address may have where no setting says how many: so
#: large that a proxy that nobody has named, or ten thousand clients on one machine, get by.
ADDRESS_SHARE = 0.75
#: Seconds between two looks for connections on which something is overdue.
LOOK_SECONDS = 0.25
#: Seconds between two warnings of the same kind.
WARNING_SECONDS = 60.0

log = structlog.get_logger(__name__)


class Watched(Protocol):
    """A connection, as the others know it; times are on the loop's clock."""

    silent_at: float
    unread_at: float
    task: asyncio.Task[None] | None

    def on_silence(self) -> None:
        """Nothing came until `silent_at`."""

    def on_unread(self) -> None:
        """Perhaps nothing was taken until `unread_at`."""

    def shut_down(self) -> None:
        """End once what is under way is answered."""

    def cut_off(self) -> None:
        """End at once, by a reset."""


class State:
    """The connections, and who answers their calls. `stopping`: they take up no more."""

    def __init__(
        self,
        app: App,
        *,
        connections_max: int,
        per_address_max: int | None = None,
        drain_seconds: float,
        note: Callable[[Call, Reply, int], None] | None = None,
        requests: Requests | None = None,
        proxies: Proxies | None = None,
    ) -> None:
        """Serve `connections_max` at once; `note` is told of each answer, and the bytes of its body.

        `requests` counts the answers, too.

        One address may have `per_address_max` of them; None: ADDRESS_SHARE of all.

        `proxies` are those that are believed; None: none is.
        """
        self.app = app
        self.requests = requests or Requests()
        self.connections_max = connections_max
        self._per_address_max = per_address_max or max(1, int(connections_max * ADDRESS_SHARE))
        #: How many connections each address has.
        self._per_address: Counter[str] = Counter()
        self.drain_seconds = drain_seconds
        self.note = note
        self.proxies = proxies or Proxies()
        self.bodies = Gathered()
        self.loop = asyncio.get_running_loop()
        self.connections: set[Watched] = set()
        #: What still works for clients that have gone.
        self.left: set[asyncio.Task[None]] = set()
        self.turned_away = 0
        #: How many ever were.
        self.turned_away_ever = 0
        self.stopping = False
        self.on_end: Callable[[], None] = lambda: None
        #: Connections whose client does not read, longest first, and the bytes that each has not taken.
        self._unread: dict[Watched, int] = {}
        self._unread_bytes = 0
        self._warned: dict[str, float] = {}
        self._emptied: asyncio.Event | None = None
        self._looking: asyncio.TimerHandle | None = None

    def add(self, connection: Watched, place: str) -> ExpediterError | None:
        """Take one more from an address, if it is not a proxy's; return what it is told if it is one too many."""
        self.connections.add(connection)
        if self._looking is None:
            self._looking = self.loop.call_later(LOOK_SECONDS, self._look)
        if place:
            self._per_address[place] += 1
            if self._per_address[place] > self._per_address_max:
                return self._turn_away_one_of_many(connection, place)
        if len(self.connections) - self.turned_away <= self.connections_max:
            return None
        self.turned_away += 1
        self.turned_away_ever += 1
        self.warn("new connections are turned away: there are too many", limit=self.connections_max)
        return Overloaded("There are too many connections")

    def _turn_away_one_of_many(self, connection: Watched, place: str) -> ExpediterError:
        self.turned_away += 1
        self.warn("an address has too many connections", address=place, limit=self._per_address_max)
        if self.turned_away > TURNED_AWAY_MAX:
            connection.cut_off()  # it must not be in the way of those who are told
        error = f"There are more than {self._per_address_max} connections from this address"
        return RequestRefused(429, "Too many requests", error, {"Retry-After": "1"})

    def remove(self, connection: Watched, place: str, *, surplus: bool) -> None:
        """Forget one that has ended; what it asked for is still carried out."""
        self.connections.discard(connection)
        if place:
            self._per_address[place] -= 1
            if not self._per_address[place]:
                del self._per_address[place]
        self.let_go(connection)
        self.turned_away -= surplus
        if connection.task is not None:
            self.left.add(connection.task)
            connection.task.add_done_callback(self.left.discard)
        self.on_end()
        if self._emptied is not None:
            self._emptied.set()

    async def until_empty(self) -> None:
        """Return once there is no connection, and nothing under way for those that have gone."""
        self._emptied = asyncio.Event()
        while self.connections or self.left:
            if self.connections:
                await self._emptied.wait()
                self._emptied.clear()
            else:
                await asyncio.wait(set(self.left))

    def _look(self) -> None:
        self._looking = self.loop.call_later(LOOK_SECONDS, self._look) if self.connections else None
        now = self.loop.time()
        for each in [each for each in self.connections if each.silent_at < now]:
            each.on_silence()
        for each in [each for each in self.connections if each.unread_at < now]:
            each.on_unread()

    def hold(self, connection: Watched, size: int) -> None:
        """Count an answer that waits for its reader, and cut off who is longest behind if it is all too much."""
        self.let_go(connection)
        self._unread[connection] = size
        self._unread_bytes += size
        while self._unread_bytes > UNREAD_BYTES_MAX:
            slowest = next(iter(self._unread))
            self.let_go(slowest)
            self.warn("clients that do not read their answers are cut off", limit_bytes=UNREAD_BYTES_MAX)
            slowest.cut_off()

    def let_go(self, connection: Watched) -> None:
        """Forget an answer: it was taken, or never will be."""
        self._unread_bytes -= self._unread.pop(connection, 0)

    def warn(self, text: str, **facts: object) -> None:
        """Log a warning, unless the same one was logged a moment ago."""
        now = self.loop.time()
        if now - self._warned.get(text, -WARNING_SECONDS) >= WARNING_SECONDS:
            self._warned[text] = now
            log.warning(text, **facts)
