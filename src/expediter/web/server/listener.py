"""How connections are taken: the socket, how many there may be, and how their serving ends."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
from collections.abc import Callable
from contextlib import suppress

from expediter.errors import AddressTaken, ConfigurationError
from expediter.web.server.connections import Connection
from expediter.web.server.state import TURNED_AWAY_MAX, State

#: Connections that may wait to be taken up. The kernel may allow fewer: net.core.somaxconn.
CONNECTIONS_WAITING_MAX = 4096
#: Connections that a process serves at once; fewer where it may not open as many files.
CONNECTIONS_MAX = 16_384
#: File descriptors that are kept for everything else: the database, Redis, the broker, logs.
DESCRIPTORS_RESERVED = 128
#: Connections without which a process does not start.
CONNECTIONS_MIN = 32
#: Connections that are taken up before those that are open get their turn again. One (as libuv takes them) leaves
#: newcomers waiting for seconds beside busy connections; many would all go to one of several processes.
TAKEN_PER_TURN = 8
#: Seconds without taking up connections once nothing was left to take one up with; less if one ends before.
TAKING_PAUSE_SECONDS = 1.0
#: Seconds for the answers to those that the drain time was too short for.
LAST_WORDS_SECONDS = 0.5

#: Files that a process wants to be allowed to open.
_FILES_WANTED = CONNECTIONS_MAX + TURNED_AWAY_MAX + DESCRIPTORS_RESERVED
_ADVICE = (
    f"raise the hard limit, by `ulimit -n {_FILES_WANTED}` before the start, or by LimitNOFILE={_FILES_WANTED} "
    "under systemd"
)

#: What the kernel says when there is nothing to take a connection up with.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Takes up what arrives at a listening socket.

    libuv, by itself, closes every connection that it finds no file descriptor for. Here they wait in the backlog,
    and the socket is left alone meanwhile: it is readable all the time, and watching it would be a busy loop.
    """

    def __init__(self, listener: socket.socket, protocol: Callable[[], Connection], state: State) -> None:
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


class Server:
    """Serves what arrives at a socket until it is told to stop; then it drains."""

    def __init__(self, state: State) -> None:
        """Have the connections share `state`."""
        self._state = state
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Take up no more connections, and let `serve` come to its end."""
        self._stop.set()

    async def serve(self, listener: socket.socket) -> None:
        """Serve until `stop`, and return once all is answered or the drain time is up. Closes the `listener`."""
        state = self._state
        acceptor = Acceptor(listener, lambda: Connection(state), state)
        try:
            await self._stop.wait()
        finally:
            acceptor.close()
            listener.close()
        state.stopping = True  # connections that are accepted and come to be only later hear of it
        for connection in list(state.connections):
            connection.shut_down()
        with suppress(TimeoutError):
            async with asyncio.timeout(state.drain_seconds):
                await acceptor.wait_closed()
                await state.until_empty()
        for connection in list(state.connections):
            if connection.task is not None:
                connection.task.cancel()
        for task in list(state.left):
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                await state.until_empty()
        for connection in list(state.connections):
            connection.cut_off()


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
