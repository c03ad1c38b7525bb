"""Several processes as one service: what keeps them alive, how each is tied to it, and the file that names it."""

from __future__ import annotations

import asyncio
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, Self
from urllib.parse import urlsplit

import structlog

from expediter.errors import ConfigurationError, ExpediterError

#: Pause before a process that died is started again, in seconds; it doubles with each death, up to the second one.
PAUSE_SECONDS_MIN = 0.1
PAUSE_SECONDS_MAX = 5.0
#: Seconds after which a process counts as well, and its next pause is the short one again.
WELL_SECONDS = 10.0
#: Seconds beyond the drain time in which a process must have stopped; then it is killed.
STOP_SECONDS_MARGIN = 5.0
#: Seconds in which `up` must see the service ready.
UP_SECONDS_MAX = 30.0
#: Pause between two looks at something that another process does, in seconds.
LOOK_SECONDS = 0.05
#: Lines and files that are shown of the logs of a start that failed.
TAIL_LINES = 10
TAIL_FILES = 4

#: Exit status of a process that finds a setting wrong: trying again would not help.
_USAGE = 2
#: How each process is called. -P: the working directory is a place for data, not for modules.
_PROGRAM = (sys.executable, "-P", "-m", "expediter")

log = structlog.get_logger(__name__)


class NotUp(ExpediterError):
    """The service could not be brought up, or not be stopped."""


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
        stopped = asyncio.create_task(self._stop.wait())
        keepers = [asyncio.create_task(self._keep(plan, on_ready)) for plan in self._plans]
        try:
            await asyncio.wait([stopped, *keepers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stop.set()
            await self._end(keepers)
            outcomes = await asyncio.gather(*keepers, return_exceptions=True)
        if unready := [plan.name for plan in self._plans if plan.name not in self._reports]:
            log.warning("processes were stopped before they were ready", processes=unready)
        log.info("every process has stopped")
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        # One that had no time yet to listen to signals ends by the one that it was sent.
        return all(status in (0, -signal.SIGTERM) for status in self._statuses.values())

    async def _end(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        self._listener.close()
        for process in self._running.values():
            _send(process, signal.SIGTERM)
        _, late = await asyncio.wait(keepers, timeout=self._seconds_max)
        for name, process in self._running.items():
            log.error("a process did not stop in time and is killed", process=name, pid=process.pid)
            _send(process, signal.SIGKILL)
        if late:
            await asyncio.wait(late)

    async def _keep(self, plan: Plan, on_ready: Callable[[list[str]], None]) -> None:
        loop = asyncio.get_running_loop()
        pause = PAUSE_SECONDS_MIN
        while True:
            started = loop.time()
            ended = await self._live(plan, on_ready)
            if self._stop.is_set():
                return
            if loop.time() - started >= WELL_SECONDS:
                pause = PAUSE_SECONDS_MIN
            log.warning(
                "a process ended and is started again", process=plan.name, ended=ended, pause_seconds=pause
            )
            try:
                await asyncio.wait_for(self._stop.wait(), pause)
            except TimeoutError:
                pause = min(2 * pause, PAUSE_SECONDS_MAX)
            else:
                return

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
        if self._stop.is_set():
            _send(process, signal.SIGTERM)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            report = json.loads(await reader.readline() or "{}")
            if "ready" in report:
                self._note(plan, report["ready"], on_ready)
            status = await process.wait()
        finally:
            writer.close()
        del self._running[plan.name]
        self._statuses[plan.name] = status
        self._remove_pid(plan)
        if "refused" in report or status == _USAGE:
            raise ConfigurationError(report.get("refused") or f"{plan.name} finds a setting wrong; see its log")
        return f"by signal {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"

    async def _start(self, plan: Plan, descriptor: int) -> asyncio.subprocess.Process:
        inherits = [descriptor]
        command = [*_PROGRAM, *plan.arguments, "--lifeline-fd", str(descriptor)]
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


class PidFile:
    """The file that names the running supervisor. Its lock, not its number, says whether there is one.

    The lock ends with the process, however it ends, so a number that was left behind, or that belongs to another
    process by now, is never taken for a running service.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is opened yet."""
        self.path = path

    def __enter__(self) -> Self:
        """Take the file for this process. Raises NotUp if another process has it."""
        self.prepare()
        new = self.path.with_name(f"{self.path.name}.new")
        with self._alone():
            self.refuse_two()
            # Locked and written before it has its name: whoever finds it locked finds its holder's number in it.
            # It is never closed: the lock is to last as long as the process.
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            new.replace(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def prepare(self) -> None:
        """Make the folder. Raises ConfigurationError if it cannot be used."""
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"RUN_DIR={folder} cannot be used ({error.strerror})") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigurationError(f"RUN_DIR={folder} cannot be used (this user may not write there)")

    def refuse_two(self) -> None:
        """Raise NotUp if a process has the file."""
        if (pid := self.holder()) is not None:
            raise NotUp(f"Expediter is up already (pid {pid}, {self.path}); `expediter down` stops it")

    def holder(self) -> int | None:
        """Return the number of the process that holds the file, None if nobody does."""
        try:
            with self.path.open() as file:
                return None if _is_free(file) else int(file.read())
        except FileNotFoundError:
            return None

    def clear(self) -> None:
        """Remove what a killed supervisor left behind: its own file, and those of its processes."""
        if self.path.exists():
            with self._alone():
                if self.holder() is None:
                    for path in (self.path, *process_files(self.path.parent)):
                        path.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def _is_free(file: IO[str]) -> bool:
    try:
        # Shared: two that look do not take each other for a holder.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def process_files(run_dir: Path) -> list[Path]:
    """Return the pid files of the single processes, those that serve first."""
    return [
        path
        for kind in ("api", "worker")
        for path in sorted(run_dir.glob(f"{kind}-*.pid"), key=lambda path: (len(path.name), path.name))
    ]


def launch(arguments: Sequence[str], pid_file: PidFile, *, drain_seconds: float) -> list[str]:
    """Start `expediter` with `arguments` in the background and return what it reports once it is ready.

    The first reported line is the address, which must answer /readyz. What does not come up within UP_SECONDS_MAX
    is stopped. Raises NotUp, or ConfigurationError for a wrong setting, with the ends of the logs.
    """
    pid_file.prepare()
    pid_file.refuse_two()
    run_dir = pid_file.path.parent
    deadline = time.monotonic() + UP_SECONDS_MAX
    sizes = {path: path.stat().st_size for path in run_dir.glob("*.log")}
    ours, theirs = socket.socketpair()
    with ours:
        with theirs, (run_dir / "supervisor.log").open("ab") as output:
            process = subprocess.Popen(
                [*_PROGRAM, *arguments, "--report-fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            ours.settimeout(UP_SECONDS_MAX)
            with suppress(TimeoutError), ours.makefile("rb") as reports:
                report: list[str] = json.loads(reports.readline() or "{}").get("ready", [])
                while report and process.poll() is None and time.monotonic() < deadline:
                    if _is_ready(report[0], deadline - time.monotonic()):
                        return report
                    time.sleep(LOOK_SECONDS)
            late = time.monotonic() >= deadline
        except BaseException:
            _end(process, drain_seconds)
            raise
        status = _end(process, drain_seconds)
    said = f"Expediter was not ready within {UP_SECONDS_MAX:g} s" if late else "Expediter did not come up"
    kind = ConfigurationError if status == _USAGE else NotUp
    raise kind("\n".join([f"{said}; the ends of the logs:", *_tails(run_dir, sizes)]))


def _end(process: subprocess.Popen[bytes], drain_seconds: float) -> int:
    process.terminate()
    try:
        return process.wait(drain_seconds + 2 * STOP_SECONDS_MARGIN)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _is_ready(address: str, seconds_max: float) -> bool:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port, timeout=max(seconds_max, LOOK_SECONDS)
    )
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tails(run_dir: Path, sizes: Mapping[Path, int]) -> list[str]:
    """Return the last lines that were added to the logs since they had these `sizes`, the supervisor's first."""
    lines: list[str] = []
    grown = [path for path in run_dir.glob("*.log") if path.stat().st_size > sizes.get(path, 0)]
    for path in sorted(grown, key=lambda path: (path.name != "supervisor.log", path.name))[:TAIL_FILES]:
        with path.open("rb") as file:
            file.seek(sizes.get(path, 0))
            text = file.read().decode(errors="replace")
        lines += [f"{path}:", *(f"  {line}" for line in text.splitlines()[-TAIL_LINES:])]
    return lines


def stop(pid_file: PidFile, *, drain_seconds: float) -> str | None:
    """Stop the service that `pid_file` names, wait for its end, and say what was stopped; None: nothing was up.

    Only a process that holds the lock of the file is ever sent a signal. Raises NotUp if it does not end in time.
    """
    deadline = time.monotonic() + drain_seconds + 2 * STOP_SECONDS_MARGIN
    with suppress(FileNotFoundError), pid_file.path.open() as file:
        if not _is_free(file):
            names = _names(process_files(pid_file.path.parent))
            pid = int(file.read())
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                return None  # it ended by itself at this very moment
            except PermissionError as error:
                raise NotUp(f"Expediter (pid {pid}) belongs to another user and cannot be stopped") from error
            while not _is_free(file):
                if time.monotonic() > deadline:
                    raise NotUp(f"Expediter (pid {pid}) was asked to stop and has not ended yet")
                time.sleep(LOOK_SECONDS)
            return ", ".join([*names, f"supervisor (pid {pid})"])
    pid_file.clear()
    return None


def _names(paths: Sequence[Path]) -> list[str]:
    names = []
    for path in paths:
        with suppress(FileNotFoundError):  # it has just ended
            names.append(f"{path.stem} (pid {path.read_text().strip()})")
    return names
