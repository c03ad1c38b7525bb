"""Several processes as one service: what keeps them alive, and how each is tied to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import structlog

from expediter import __version__
from expediter.backends.tasks import Background, Pauses
from expediter.errors import ConfigurationError
from expediter.run.state import Restart, Running, State, forget_state, write_state

#: Pause before a process that died is started again, in seconds; it doubles with each death, up to the second one.
PAUSE_SECONDS_MIN = 0.1
PAUSE_SECONDS_MAX = 5.0
#: Seconds after which a process counts as well, and its next pause is the short one again.
WELL_SECONDS = 10.0
#: Seconds beyond the drain time in which a process must have stopped; then it is killed.
STOP_SECONDS_MARGIN = 5.0

#: Seconds in which a process that is to take another's place must be ready.
READY_SECONDS_MAX = 30.0
#: What makes a supervisor renew its processes. (SIGHUP comes when a terminal is closed, too.)
RENEW_SIGNAL = signal.SIGUSR2

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


class _Life:
    """One process of a plan, from its start to its end."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.since = datetime.now(UTC)
        #: What it reported; empty until then, and if it ended before.
        self.report: dict[str, Any] = {}
        self.over = asyncio.Event()
        self._reader, self._writer = reader, writer

    @property
    def ready(self) -> bool:
        return "ready" in self.report

    async def read_report(self) -> None:
        """Wait until it has reported, or has ended without a word."""
        if not self.report:
            self.report = json.loads(await self._reader.readline() or "{}")

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def bury(self) -> None:
        """See that it has ended, whatever happened before."""
        self.send(signal.SIGKILL)
        await self.process.wait()
        self._writer.close()
        self.over.set()

    def ending(self) -> str:
        """Say how it ended."""
        status = self.process.returncode
        assert status is not None
        if "refused" in self.report:
            return str(self.report["refused"])
        return f"by signal {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"


class Supervisor:
    """Keeps processes alive until it is told to stop. At RENEW_SIGNAL it renews one after the other."""

    def __init__(
        self,
        plans: Sequence[Plan],
        *,
        listener: socket.socket,
        address: str,
        drain_seconds: float,
        sockets: Path,
        run_dir: Path | None = None,
    ) -> None:
        """With `run_dir`, each process has a pid file and a log file there; else it writes where this one does.

        In the folder `sockets` the processes ask each other what they have measured.

        Every process that listens accepts on the one `listener`. With a socket each (SO_REUSEPORT) the kernel
        deals connections out in advance, and resets those that a process has not taken up when it ends.
        """
        self._plans = plans
        self._listener = listener
        self._seconds_max = drain_seconds + STOP_SECONDS_MARGIN
        self._run_dir = run_dir
        self._sockets = sockets
        self._stop = asyncio.Event()
        self._refusal: ConfigurationError | None = None
        self._keepers: dict[str, Background] = {}
        #: Every process that has not ended; of them the one that stands for each plan, and what is to follow it.
        self._alive: dict[_Life, Plan] = {}
        self._leading: dict[str, _Life] = {}
        self._successors: dict[str, _Life] = {}
        self._restarting: asyncio.Task[None] | None = None
        self._reports: dict[str, list[str]] = {}
        self._statuses: dict[str, int] = {}
        self._deaths: Counter[str] = Counter()
        self._state = State(__version__, os.getpid(), address, datetime.now(UTC), [], Restart())

    async def run(self, on_ready: Callable[[list[str]], None]) -> bool:
        """Keep every process alive until SIGTERM or SIGINT, stop them, and return whether all ended cleanly.

        Once all are ready, `on_ready` is told what the first one reported.
        Raises ConfigurationError, all processes stopped, if one of them finds a setting wrong.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(RENEW_SIGNAL, self._restart_soon)
        self._tell()
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
        for life in self._alive:
            life.send(signal.SIGTERM)
        works: list[asyncio.Future[Any]] = [asyncio.ensure_future(keeper.stop()) for keeper in keepers]
        works += [asyncio.ensure_future(life.process.wait()) for life in self._alive]
        works += [self._restarting] if self._restarting is not None else []
        await asyncio.wait(works, timeout=self._seconds_max)
        for life, plan in self._alive.items():
            if life.process.returncode is None:
                log.error("a process did not stop in time and is killed", process=plan.name, pid=life.process.pid)
                life.send(signal.SIGKILL)
        await asyncio.wait(works)
        for life in list(self._alive):  # what was ready to take a place that nobody keeps any more
            await self._bury(life)
        if self._run_dir is not None:
            forget_state(self._run_dir)

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
            if plan.name in self._successors:
                continue
            if loop.time() - started >= WELL_SECONDS:
                pauses.reset()
            pause = pauses.next()
            self._deaths[plan.name] += 1
            log.warning(
                "a process ended and is started again", process=plan.name, ended=ended, pause_seconds=pause
            )
            await keeper.rest(pause)

    async def _live(self, plan: Plan, on_ready: Callable[[list[str]], None]) -> str:
        """Start a process, or take up the one that follows; wait for its end, and say how it ended."""
        try:
            life = self._successors.pop(plan.name, None) or await self._start(plan)
        except OSError as error:
            return f"it could not be started: {error}"
        self._leading[plan.name] = life
        self._write_pid(plan, life.process.pid)
        self._tell()
        try:
            await life.read_report()
            if life.ready:
                self._note(plan, life.report["ready"], on_ready)
            status = await life.process.wait()
        finally:
            # Whatever went wrong here: it begins again with a process of its own.
            del self._leading[plan.name]
            await self._bury(life)
        self._statuses[plan.name] = status
        if plan.name not in self._successors:
            self._remove_pid(plan)
        if "refused" in life.report or status == USAGE:
            raise ConfigurationError(
                life.report.get("refused") or f"{plan.name} finds a setting wrong; see its log"
            )
        return life.ending()

    async def _start(self, plan: Plan) -> _Life:
        """Start a process. Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await self._execute(plan, theirs.fileno())
        except OSError:
            ours.close()
            raise
        life = _Life(process, *await asyncio.open_unix_connection(sock=ours))
        self._alive[life] = plan
        if self._stop.is_set():
            life.send(signal.SIGTERM)
        return life

    async def _bury(self, life: _Life) -> None:
        await life.bury()
        self._alive.pop(life, None)
        self._tell()

    def _restart_soon(self) -> None:
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.create_task(self._restart())

    async def _restart(self) -> None:
        """Renew every process in turn; where one cannot be, the rest go on as they are."""
        restart = self._state.restart = Restart(self._state.restart.number + 1, under_way=True)
        self._tell()
        try:
            for plan in self._plans:
                restart.failed = f"{plan.name} was broken off"  # by what nobody foresaw: its traceback says more
                if failed := await self._renew(plan):
                    restart.failed = f"{plan.name} could not be renewed: {failed}"
                    log.error(restart.failed)
                    return
                restart.failed = None
                restart.done = [*restart.done, plan.name]
                self._tell()
            log.info("every process is renewed")
        finally:
            restart.under_way = False
            self._tell()

    async def _renew(self, plan: Plan) -> str | None:
        """Start what is to follow a process, wait until it is ready, and only then tell the one before to stop.

        Return why it could not be done; then the one before goes on.
        """
        before = self._leading.get(plan.name)
        try:
            life = await self._start(plan)
        except OSError as error:
            return str(error)
        try:
            async with asyncio.timeout(READY_SECONDS_MAX):
                await life.read_report()
        except TimeoutError:
            life.send(signal.SIGTERM)
            await self._see_end(life)
            return f"it was not ready within {READY_SECONDS_MAX:g} s"
        if not life.ready:
            await self._see_end(life)
            if self._stop.is_set():
                return "everything was told to stop"
            return life.report.get("refused") or f"it ended {life.ending()}; see its log"
        if self._stop.is_set() or self._leading.get(plan.name, before) is not before:
            # All are to stop; or the one before has died meanwhile, and another one is there that is as new.
            life.send(signal.SIGTERM)
            await self._see_end(life)
            return None
        self._successors[plan.name] = life
        if before is not None:
            before.send(signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_max):
                    await before.over.wait()
            before.send(signal.SIGKILL)
            await before.over.wait()
        return None

    async def _see_end(self, life: _Life) -> None:
        """Wait for the end of a process that takes no place, and no longer than for others."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds_max):
                await life.process.wait()
        await self._bury(life)

    async def _execute(self, plan: Plan, descriptor: int) -> asyncio.subprocess.Process:
        inherits = [descriptor]
        command = [*PROGRAM, *plan.arguments, "--lifeline-fd", str(descriptor)]
        command += ["--metrics-socket", str(self._sockets / plan.name)]
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

    def _tell(self) -> None:
        """Write down what runs now, for `status` and `restart`."""
        if self._run_dir is None:
            return
        self._state.processes = [
            Running(plan.name, life.process.pid, life.since, self._deaths[plan.name])
            for plan in self._plans
            if (life := self._leading.get(plan.name)) is not None
        ]
        try:
            write_state(self._run_dir, self._state)
        except OSError as error:
            log.warning("what runs cannot be written down", error=str(error))
