"""How connections are taken: the socket, how many there may be, and uvicorn as a part among parts."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uuid_utils
import uvicorn

from expediter.errors import AddressTaken, ConfigurationError, Overloaded
from expediter.web.problems import problem_reply
from expediter.web.server.connections import IDLE_SECONDS_MAX, TURNED_AWAY_SECONDS_MAX, BoundedProtocol, State

#: Connections that may wait to be taken up. The kernel may allow fewer: net.core.somaxconn.
CONNECTIONS_WAITING_MAX = 4096
#: Connections that a process serves at once; fewer where it may not open as many files.
CONNECTIONS_MAX = 16_384
#: Connections beyond these that a process may have while it turns them away; more of them wait to be taken up.
TURNED_AWAY_MAX = 64
#: File descriptors that are kept for everything else: the database, Redis, the broker, logs.
DESCRIPTORS_RESERVED = 128
#: Connections without which a process does not start.
CONNECTIONS_MIN = 32
#: Connections that are taken up before those that are open get their turn again. One (as libuv takes them) leaves
#: newcomers waiting for seconds beside busy connections; many would all go to one of several processes.
TAKEN_PER_TURN = 8
#: Seconds without taking up connections once nothing was left to take one up with; less if one ends before.
TAKING_PAUSE_SECONDS = 1.0

#: Files that a process wants to be allowed to open.
_FILES_WANTED = CONNECTIONS_MAX + TURNED_AWAY_MAX + DESCRIPTORS_RESERVED
_ADVICE = (
    f"raise the hard limit, by `ulimit -n {_FILES_WANTED}` before the start, or by LimitNOFILE={_FILES_WANTED} "
    "under systemd"
)

#: What the kernel says when there is nothing to take a connection up with.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Takes up what arrives at a listening socket; to uvicorn it is one of its `asyncio.Server`s.

    libuv, by itself, closes every connection that it finds no file descriptor for. Here they wait in the backlog,
    and the socket is left alone meanwhile: it is readable all the time, and watching it would be a busy loop.
    """

    def __init__(self, listener: socket.socket, protocol: Callable[[], BoundedProtocol], state: State) -> None:
        """Begin. `protocol` makes a new one for each connection."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._protocol = protocol
        self._state = state
        self._taking: set[asyncio.Task[None]] = set()
        self._watching = False
        self._closed = False
        state.on_end = self._watch
        self._watch()

    def close(self) -> None:
        """Take up no more."""
        self._pause()
        self._closed = True

    async def wait_closed(self) -> None:
        """Wait until each connection that was taken up is one."""
        await asyncio.gather(*self._taking)

    def _watch(self) -> None:
        if not self._watching and not self._closed:
            self._watching = True
            self._loop.add_reader(self._listener, self._take_some)

    def _pause(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_reader(self._listener)

    def _take_some(self) -> None:
        for _ in range(TAKEN_PER_TURN):
            if len(self._state.connections) + len(self._taking) >= self._state.connections_max + TURNED_AWAY_MAX:
                self._pause()  # the end of a connection goes on with it
                return
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause()
                    self._loop.call_later(TAKING_PAUSE_SECONDS, self._watch)
                    self._state.warn("new connections wait: no file can be opened", error=error.strerror)
                return  # none is left, or this one is gone already
            connection.setblocking(False)
            task = self._loop.create_task(self._take(connection))
            self._taking.add(task)
            task.add_done_callback(self._taken)

    async def _take(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:
            connection.close()  # its client has gone

    def _taken(self, task: asyncio.Task[None]) -> None:
        self._taking.discard(task)
        self._watch()


class Server(uvicorn.Server):
    """uvicorn, but it takes connections up as above, and signals are the service's.

    uvicorn would end by the signal, where a drained stop is exit 0.
    """

    def __init__(self, app: Any, *, turn_away: Any, connections_max: int, drain_seconds: float) -> None:
        """Serve `app`, and `turn_away` to connections beyond `connections_max`."""
        config = uvicorn.Config(
            app,
            loop="none",
            http=BoundedProtocol,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            date_header=True,
            timeout_keep_alive=IDLE_SECONDS_MAX,
            # Passed to asyncio as it is, which takes fractions too.
            timeout_graceful_shutdown=drain_seconds,  # type: ignore[arg-type]
        )
        super().__init__(config)
        self.server_state: State = State(connections_max, turn_away)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take up connections."""

        def protocol() -> BoundedProtocol:
            return BoundedProtocol(self.config, self.server_state, {})

        acceptors = [Acceptor(each, protocol, self.server_state) for each in sockets or ()]
        self.servers = acceptors  # type: ignore[assignment]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, and let connections know that are accepted but come to be only later."""
        self.server_state.stopping = True
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


async def turn_away(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request on a connection beyond the limit: 503, and when to come again.

    What was sent of its body is read before: a connection that is closed over unread bytes takes the answer along.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(TURNED_AWAY_SECONDS_MAX):
            while (await receive()).get("more_body"):
                pass
    request_id = uuid_utils.uuid7().hex
    reply = problem_reply(Overloaded("There are too many connections"), request_id)
    reply.headers += [(b"connection", b"close"), (b"x-request-id", request_id.encode())]
    await reply.send(send)


def raise_file_limit() -> int:
    """Let this process open as many files as it may, and return how many connections it can then serve.

    Raises ConfigurationError that says what to do if that is next to none.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connections = _connections_max()
    if connections < CONNECTIONS_MIN:
        needed = CONNECTIONS_MIN + TURNED_AWAY_MAX + DESCRIPTORS_RESERVED
        raise ConfigurationError(f"{_files_max()} files may be open at once, and it takes {needed}: {_ADVICE}")
    return connections


def file_limit_lines() -> list[str]:
    """Return a line for people if too few files may be open for CONNECTIONS_MAX connections, else none."""
    connections = _connections_max()
    if connections == CONNECTIONS_MAX:
        return []
    return [
        f"  files    {_files_max():,} may be open at once, so a process serves {connections:,} connections "
        f"and not {CONNECTIONS_MAX:,}: {_ADVICE}"
    ]


def _files_max() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _FILES_WANTED if soft == resource.RLIM_INFINITY else soft


def _connections_max() -> int:
    return min(CONNECTIONS_MAX, _files_max() - DESCRIPTORS_RESERVED - TURNED_AWAY_MAX)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigurationError or AddressTaken, which say what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # From here on a connection waits instead of being refused, so the address may be announced.
        listener.listen(CONNECTIONS_WAITING_MAX)
    except socket.gaierror as error:
        listener.close()
        raise ConfigurationError(f"HOST={host} is not the name of an address here ({error.strerror})") from error
    except OSError as error:
        listener.close()
        raise AddressTaken(
            f"{host}:{port} cannot be used ({error.strerror}): stop what listens there, or set another PORT"
        ) from error
    listener.setblocking(False)
    return listener


def inherit(descriptor: int) -> socket.socket:
    """Return the listening socket that this process was given at its start."""
    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the address of a listening socket for people: http://127.0.0.1:8000."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
