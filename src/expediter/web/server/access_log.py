"""The access log: one line per request, in a form with gunicorn's atoms, written by a thread of its own."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

import msgspec
import structlog

from expediter.errors import ConfigurationError
from expediter.web.http import Call, Header, Reply

#: Told of each answer, and of the bytes of its body that were sent.
Note = Callable[[Call, Reply, int], None]

#: Pause between two writes, in seconds.
FLUSH_SECONDS = 0.5
#: Bytes that may wait to be written, at most; beyond them lines are dropped, and counted.
WAITING_BYTES_MAX = 4 * 1024 * 1024
#: Bytes of one value in a line, at most; the rest of a longer one is left out.
VALUE_BYTES_MAX = 4096
#: Seconds that the end of the process waits for the last write.
CLOSE_SECONDS_MAX = 2.0

#: What stands for something that is not there, or that is not to be seen.
NOTHING = "-"

log = structlog.get_logger(__name__)
_to_json = msgspec.json.Encoder().encode

#: Headers whose values are never written: they open doors.
_SECRET = re.compile(r"authorization|cookie|password|secret|token|api-?key", re.I)
_ATOM = re.compile(r"%(?:(?P<percent>%)|\((?P<name>[^()]*)\)s|(?P<broken>.{0,12}))", re.S)
_HEADER = re.compile(r"\{([!#$%&'*+.^_`|~0-9A-Za-z-]+)\}([io])")
#: All but visible ASCII and the blank; the quote and the backslash, too, since they end and escape fields.
_UNSAFE = re.compile(r"[^ !#-\[\]-~]")


@dataclass(slots=True)
class Exchange:
    """A request and its answer, with the bytes of its body; times are in seconds."""

    call: Call
    reply: Reply
    arrived: float
    seconds: float
    size: int


Getter = Callable[[Exchange], str]


def _safe(value: bytes) -> str:
    """Return what a client sent so that it can neither begin a line nor end a field: "\\x0a", not a line feed."""
    return _UNSAFE.sub(_escape, value[:VALUE_BYTES_MAX].decode("latin-1"))


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    return f"\\{character}" if character in '"\\' else f"\\x{ord(character):02x}"


def _path(call: Call) -> str:
    # As it was sent: with its percent signs, and before a slash at its end was taken off.
    return _safe(call.target.partition(b"?")[0])


def _request_line(exchange: Exchange) -> str:
    call = exchange.call
    target = call.target if call.query_string else call.target.removesuffix(b"?")
    return f"{_safe(call.method.encode())} {_safe(target)} HTTP/{call.version}"


def _header(headers: Iterable[Header], name: bytes) -> str:
    for key, value in headers:
        if key == name:
            return _safe(value) or NOTHING
    return NOTHING


@lru_cache(maxsize=4)
def _date(second: int) -> str:
    return time.strftime("[%d/%b/%Y:%H:%M:%S +0000]", time.gmtime(second))


#: Every atom besides those of headers, named as gunicorn names them.
ATOMS: dict[str, Getter] = {
    "h": lambda exchange: exchange.call.client or NOTHING,
    "l": lambda exchange: NOTHING,
    # There are no users; what a client gives as a Basic user name may be half of a secret.
    "u": lambda exchange: NOTHING,
    "t": lambda exchange: _date(int(exchange.arrived)),
    "r": _request_line,
    "m": lambda exchange: _safe(exchange.call.method.encode()),
    "U": lambda exchange: _path(exchange.call),
    "q": lambda exchange: _safe(exchange.call.query_string),
    "H": lambda exchange: f"HTTP/{exchange.call.version}",
    "s": lambda exchange: str(exchange.reply.status),
    "B": lambda exchange: str(exchange.size),
    "b": lambda exchange: str(exchange.size or NOTHING),
    "f": lambda exchange: _header(exchange.call.headers, b"referer"),
    "a": lambda exchange: _header(exchange.call.headers, b"user-agent"),
    "T": lambda exchange: str(int(exchange.seconds)),
    "M": lambda exchange: str(int(exchange.seconds * 1_000)),
    "D": lambda exchange: str(int(exchange.seconds * 1_000_000)),
    "L": lambda exchange: f"{exchange.seconds:.6f}",
    "p": lambda exchange: f"<{os.getpid()}>",
}


def compile_format(form: str) -> Callable[[Exchange], str]:
    """Return what makes a line, with its line feed, of an exchange.

    `form` has gunicorn's atoms (https://docs.gunicorn.org/en/stable/settings.html#access-log-format); `json` is an
    object with the keys of `_fields`. Raises ConfigurationError that names what cannot be understood.
    """
    if form == "json":
        return lambda exchange: f"{_to_json(_fields(exchange)).decode()}\n"
    getters: list[Getter] = []

    def place(found: re.Match[str]) -> str:
        if found["percent"]:
            return "%%"
        if found["broken"] is not None:
            raise ConfigurationError(f"ACCESS_LOG_FORMAT: {found[0]!r} is no atom: write %(name)s, or %% for a %")
        getters.append(_getter(found["name"]))
        return "%s"

    if any(ord(character) < 32 and character != "\t" for character in form):
        raise ConfigurationError("ACCESS_LOG_FORMAT: has a control character, and a line is to stay one line")
    template = _ATOM.sub(place, form) + "\n"
    return lambda exchange: template % tuple([getter(exchange) for getter in getters])


def _fields(exchange: Exchange) -> dict[str, object]:
    call, reply = exchange.call, exchange.reply
    traced = call.named.get(b"traceparent", b"").split(b"-")
    return {
        "timestamp": datetime.fromtimestamp(exchange.arrived, UTC),
        "client": call.client,
        "method": _safe(call.method.encode()),
        "target": _safe(call.target),
        "status": reply.status,
        "bytes": exchange.size,
        "seconds": round(exchange.seconds, 6),
        "request_id": call.request_id,
        "trace_id": _safe(traced[1]) if len(traced) == 4 else None,
        "user_agent": _header(call.headers, b"user-agent"),
    }


def _getter(name: str) -> Getter:
    if name in ATOMS:
        return ATOMS[name]
    named = _HEADER.fullmatch(name)
    if named is None:
        known = " ".join(f"%({atom})s" for atom in ATOMS)
        raise ConfigurationError(
            f"ACCESS_LOG_FORMAT: there is no atom %({name})s; there are {known} %({{header}}i)s %({{header}}o)s"
        )
    header = named[1].lower().encode()
    if _SECRET.search(named[1]):
        return lambda exchange: NOTHING
    if named[2] == "i":
        return lambda exchange: _header(exchange.call.headers, header)
    return lambda exchange: _header(exchange.reply.headers, header)


@asynccontextmanager
async def access_log(path: str, form: str) -> AsyncIterator[Note | None]:
    """Give what logs an answer to the file `path`; `-` is stderr. Without a path there is nothing to be told.

    Raises ConfigurationError for a wrong `form` or `path`.
    """
    line = compile_format(form)
    if not path:
        yield None
        return
    writer = _Writer(path)

    def note(call: Call, reply: Reply, size: int) -> None:
        seconds = time.monotonic() - call.began
        writer.write(line(Exchange(call, reply, time.time() - seconds, seconds, size)))

    try:
        yield note
    finally:
        writer.close()


class _Writer:
    """Appends lines to a file from a thread of its own, so that a slow or full disk holds up no request.

    Several processes may append to one file: each write is of whole lines, in one call.
    """

    def __init__(self, path: str) -> None:
        """Open the file and start the thread. Raises ConfigurationError if it cannot be opened."""
        self._path = path
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._waiting = 0
        self._dropped = 0
        self._failing = False
        self._closing = threading.Event()
        self._descriptor = -1
        try:
            self._follow()
        except OSError as error:
            raise ConfigurationError(f"ACCESS_LOG_FILE={path} cannot be written ({error.strerror})") from error
        # A daemon: a pipe that nobody reads must not keep the process from its end.
        self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Have a line written soon."""
        data = line.encode(errors="backslashreplace")
        with self._lock:
            if self._waiting + len(data) > WAITING_BYTES_MAX:
                self._dropped += 1
            else:
                self._waiting += len(data)
                self._lines.append(data)

    def close(self) -> None:
        """Write what waits, and end."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS_MAX)

    def _run(self) -> None:
        unwritten = b""
        while not self._closing.wait(FLUSH_SECONDS):
            unwritten = self._flush(unwritten)
        self._flush(unwritten)
        if self._path != NOTHING and self._descriptor >= 0:
            os.close(self._descriptor)

    def _flush(self, unwritten: bytes) -> bytes:
        """Write what was left last time and what waits; return what could not be written."""
        with self._lock:
            lines, self._lines = self._lines, []
        data = unwritten + b"".join(lines)
        if not data:
            return data
        size = len(data)
        try:
            self._follow()
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            if not self._failing:
                log.warning("the access log cannot be written", file=self._path, error=str(error))
            self._failing = True
        with self._lock:
            self._waiting -= size - len(data)
            dropped, self._dropped = self._dropped, self._dropped if data else 0
        if not data and (self._failing or dropped):
            log.warning("the access log is written again", file=self._path, lines_lost=dropped)
            self._failing = False
        return data

    def _follow(self) -> None:
        """Open the file, again if it was renamed or removed since, as log rotation does."""
        if self._path == NOTHING:
            self._descriptor = 2
            return
        if self._descriptor >= 0:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                    return
            os.close(self._descriptor)
            self._descriptor = -1
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
