"""Logs: one line per fact, on stderr, as text for people or JSON for machines."""

import atexit
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import structlog

#: Seconds for which the same trouble is counted once it was told.
QUIET_SECONDS = 60.0
#: Kinds of trouble that are remembered; the one told longest ago is forgotten first.
KINDS_MAX = 1000


class _Stderr:
    """stderr, where a line that cannot be written (disk full, nobody reads) is a line lost and nothing more."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


class Repeats:
    """Lets trouble that many may meet (`often=True` in the call) through once a minute, and counts the rest.

    A kind is a sentence and the kind of its error. A line about a request always comes through, since its client
    was told to look for it; within the minute it has no traceback. What was counted is said with the first line of
    any kind after that minute, and at the end of the process.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now` is the time in seconds."""
        self._now = now
        self._lock = threading.Lock()
        #: When each kind was told, how often it came since, and the last of those lines.
        self._told: dict[tuple[str, str], tuple[float, int, structlog.types.EventDict]] = {}
        self._telling = False

    def __call__(self, logger: object, method: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        """Pass a line on, or drop it (structlog.DropEvent)."""
        if self._telling:
            return event  # what was counted is being told
        self.tell(before=self._now() - QUIET_SECONDS)
        if not event.pop("often", False):
            return event
        error = _error_of(event)
        kind = str(event["event"]), type(error).__name__
        with self._lock:
            known = self._told.get(kind)
            if known is None:
                while len(self._told) >= KINDS_MAX:
                    del self._told[next(iter(self._told))]
                self._told[kind] = self._now(), 0, {}
                return event
            at, count, _ = known
            if "request_id" not in event:
                self._told[kind] = at, count + 1, dict(event)
                raise structlog.DropEvent
        event.pop("exc_info", None)
        if error is not None:
            event["error"] = f"{type(error).__name__}: {error}"
        return event

    def tell(self, *, before: float = float("inf")) -> None:
        """Say what was counted of each kind that was told `before` then, and forget it."""
        with self._lock:
            over = [kind for kind, (at, _, _) in self._told.items() if at <= before]
            counted = [self._told.pop(kind)[1:] for kind in over]
            self._telling = True
        try:
            for count, event in counted:
                if count:
                    event.pop("exc_info", None)
                    event.pop("timestamp", None)
                    log = structlog.get_logger("expediter")
                    level = event.pop("level", "warning")
                    getattr(log, level)(event.pop("event"), **event, more_of_this=count)
        finally:
            self._telling = False


def _error_of(event: structlog.types.EventDict) -> BaseException | None:
    told = event.get("exc_info")
    if told is True:
        return sys.exc_info()[1]
    if isinstance(told, tuple):
        return told[1] if isinstance(told[1], BaseException) else None
    return told if isinstance(told, BaseException) else None


def configure_logs(level: str, form: str) -> None:
    """Send every log line at or above `level` to stderr, as `text` or `json`."""
    repeats = Repeats()
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        repeats,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if form == "json":
        last: structlog.types.Processor = structlog.processors.JSONRenderer()
        shared.append(structlog.processors.format_exc_info)
    else:
        last = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # The default shows local variables, and with them whatever a client sent.
            exception_formatter=structlog.dev.plain_traceback,
        )
    structlog.configure(
        processors=[*shared, last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.PrintLoggerFactory(_Stderr()),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    atexit.register(repeats.tell)
    logging.raiseExceptions = False
    # It says with a traceback at each try what the service says in a sentence: that the database is away.
    logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
