"""Several processes as one service: what keeps them alive, and how each is tied to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import structlog

from expediter.backends.tasks import Background, Pauses
from expediter.errors import ConfigurationError

#: Pause before a process that died is started again, in seconds; it doubles with each death, up to the second one.
PAUSE_SECONDS_MIN = 0.1
PAUSE_SECONDS_MAX = 5.0
#: Seconds after which a process counts as well, and its next pause is the short one again.
WELL_SECONDS = 10.0
#: Seconds beyond the drain time in which a process must have stopped; then it is killed.
STOP_SECONDS_MARGIN = 5.0

#: Exit status of a process that finds a setting wrong: trying again would not help.
USAGE = 2
#: How each process is called. -P: the working directory is a place for data, not for modules.
PROGRAM = (sys.executable, "-P", "-m", "expediter")

log = structlog.get_logger(__name__)


class Plan(NamedTuple):
    """One process to keep alive: its name, the command of `expediter`, and settings of its own."""

    name: str
    arguments: tuple[str, ...]
    settings: Mapping[str, str] = {}
    listens: bool = False


class Lifeline:
    """A process's end of the socket pair that ties it to whoever started it.

    It reports one line of JSON there. When the other end closes, even by SIGKILL, it knows that it is alone.
    (PR_SET_PDEATHSIG would be Linux alone, and asked for too late when the parent is gone by then.)
    """

    def __init__(self, descriptor: int) -> None:
        """Take over an inherited descriptor."""
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)

    def ready(self, lines: Sequence[str]) -> None:
        """Report that this process is ready, and what it has to say about it."""
        self._report({"ready": list(lines)})

    def refuse(self, message: str) -> None:
        """Report why this process cannot start, now or later."""
        self._report({"refused": message})

    def on_end(self, end: Callable[[], None]) -> None:
        """Call `end` in the running event loop once the other side is gone."""
        loop = asyncio.get_running_loop()

        def notice() -> None:
            loop.remove_reader(self._socket)
            log.warning("the supervisor is gone, so this process stops")
            end()

        self._socket.setblocking(False)
        loop.add_reader(self._socket, notice)  # nothing is ever sent this way: readable means closed

    def _report(self, document: dict[str, object]) -> None:
        # The other side may be gone; what that means is on_end's affair.
        with suppress(OSError):
            self._socket.sendall(json.dumps(document).encode() + b"\n")


class Supervisor:
    """Keeps processes alive until it is told to stop, and stops them."""

    def __init__(
        self,
        plans: Sequence[Plan],
        *,
        listener: socket.socket,
        drain_seconds: float,
        run_dir: Path | None = None,
    ) -> None:
        """With `run_dir`, each process has a pid file and a log file there; else it writes where this one does.

        Every process that listens accepts on the one `listener`. With a socket each (SO_REUSEPORT) the kernel
        deals connections out in advance, and resets those that a process has not taken up when it ends.
        """
        self._plans = plans
        self._listener = listener
        self._seconds_max = drain_seconds + STOP_SECONDS_MARGIN
        self._run_dir = run_dir
        self._stop = asyncio.Event()
        self._refusal: ConfigurationError | None = None
        self._keepers: dict[str, Background] = {}
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._reports: dict[str, list[str]] = {}
        self._statuses: dict[str, int] = {}

    async def run(self, on_ready: Callable[[list[str]], None]) -> bool:
        """Keep every process alive until SIGTERM or SIGINT, stop them, and return whether all ended cleanly.

        Once all are ready, `on_ready` is told what the first one reported.
        Raises ConfigurationError, all processes stopped, if one of them finds a setting wrong.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        for plan in self._plans:
            self._keepers[plan.name] = Background(plan.name, partial(self._keep, plan, on_ready))
            self._keepers[plan.name].start()
        try:
            await self._stop.wait()
        finally:
            self._stop.set()
            await self._end()
        if unready := [plan.name for plan in self._plans if plan.name not in self._reports]:
            log.warning("processes were stopped before they were ready", processes=unready)
        log.info("every process has stopped")
        if self._refusal is not None:
            raise self._refusal
        # One that had no time yet to listen to signals ends by the one that it was sent.
        return all(status in (0, -signal.SIGTERM) for status in self._statuses.values())

    async def _end(self) -> None:
        self._listener.close()
        keepers = self._keepers.values()
        for keeper in keepers:
            keeper.stop_soon()
        for process in self._running.values():
            _send(process, signal.SIGTERM)
        ended = asyncio.gather(*(keeper.stop() for keeper in keepers))
        await asyncio.wait([ended], timeout=self._seconds_max)
        for name, process in self._running.items():
            log.error("a process did not stop in time and is killed", process=name, pid=process.pid)
            _send(process, signal.SIGKILL)
        await ended

    async def _keep(self, plan: Plan, on_ready: Callable[[list[str]], None]) -> None:
        loop = asyncio.get_running_loop()
        keeper = self._keepers[plan.name]
        pauses = Pauses(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)
        while not keeper.stopping:
            started = loop.time()
            try:
                ended = await self._live(plan, on_ready)
            except ConfigurationError as refused:
                self._refusal = self._refusal or refused
                self._stop.set()
                return
            if self._stop.is_set():
                return
            if loop.time() - started >= WELL_SECONDS:
                pauses.reset()
            pause = pauses.next()
            log.warning(
                "a process ended and is started again", process=plan.name, ended=ended, pause_seconds=pause
            )
            await keeper.rest(pause)

    async def _live(self, plan: Plan, on_ready: Callable[[list[str]], None]) -> str:
        """Start a process, wait for its end, and say how it ended."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await self._start(plan, theirs.fileno())
        except OSError as error:
            ours.close()
            return f"it could not be started: {error}"
        self._running[plan.name] = process
        self._write_pid(plan, process.pid)
        if self._keepers[plan.name].stopping:
            _send(process, signal.SIGTERM)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            report = json.loads(await reader.readline() or "{}")
            if "ready" in report:
                self._note(plan, report["ready"], on_ready)
            status = await process.wait()
        finally:
            # Whatever went wrong here: it begins again with a process of its own.
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            writer.close()
            del self._running[plan.name]
        self._statuses[plan.name] = status
        self._remove_pid(plan)
        if "refused" in report or status == USAGE:
            raise ConfigurationError(report.get("refused") or f"{plan.name} finds a setting wrong; see its log")
        return f"by signal {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"

    async def _start(self, plan: Plan, descriptor: int) -> asyncio.subprocess.Process:
        inherits = [descriptor]
        command = [*PROGRAM, *plan.arguments, "--lifeline-fd", str(descriptor)]
        if plan.listens:
            inherits.append(self._listener.fileno())
            command += ["--listen-fd", str(self._listener.fileno())]
        output = self._log_file(plan)
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                env={**os.environ, **plan.settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=inherits,
                # Ctrl-C goes to every process of a terminal; here the supervisor alone decides who stops when.
                start_new_session=True,
            )
        finally:
            if output is not None:
                output.close()

    def _note(self, plan: Plan, lines: list[str], on_ready: Callable[[list[str]], None]) -> None:
        first = len(self._reports) < len(self._plans)
        self._reports[plan.name] = lines
        if first and len(self._reports) == len(self._plans):
            on_ready(self._reports[self._plans[0].name])

    def _log_file(self, plan: Plan) -> IO[bytes] | None:
        return None if self._run_dir is None else (self._run_dir / f"{plan.name}.log").open("ab")

    def _write_pid(self, plan: Plan, pid: int) -> None:
        if self._run_dir is not None:
            try:
                (self._run_dir / f"{plan.name}.pid").write_text(f"{pid}\n")
            except OSError as error:
                log.warning("a pid file cannot be written", process=plan.name, pid=pid, error=str(error))

    def _remove_pid(self, plan: Plan) -> None:
        if self._run_dir is not None:
            with suppress(OSError):
                (self._run_dir / f"{plan.name}.pid").unlink()


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)
