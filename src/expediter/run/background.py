"""A service in the background: the file that names its supervisor, its start, and its stop."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Self
from urllib.parse import urlsplit

from expediter.errors import ConfigurationError, ExpediterError
from expediter.run.processes import PROGRAM, READY_SECONDS_MAX, RENEW_SIGNAL, STOP_SECONDS_MARGIN, USAGE
from expediter.run.state import STATE_FILE, read_state

#: Seconds in which `up` must see the service ready.
UP_SECONDS_MAX = 30.0
#: Pause between two looks at something that another process does, in seconds.
LOOK_SECONDS = 0.05
#: Lines and files that are shown of the logs of a start that failed.
TAIL_LINES = 10
TAIL_FILES = 4


class NotUp(ExpediterError):
    """The service could not be brought up, or not be stopped."""


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
        except (FileNotFoundError, NotADirectoryError):
            return None

    def clear(self) -> None:
        """Remove what a killed supervisor left behind: its own file, and those of its processes."""
        if self.path.exists():
            with self._alone():
                if self.holder() is None:
                    state = self.path.with_name(STATE_FILE)
                    for path in (self.path, state, *process_files(self.path.parent)):
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
                [*PROGRAM, *arguments, "--report-fd", str(theirs.fileno())],
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
                    if is_ready(report[0], deadline - time.monotonic()):
                        return report
                    time.sleep(LOOK_SECONDS)
            late = time.monotonic() >= deadline
        except BaseException:
            _end(process, drain_seconds)
            raise
        status = _end(process, drain_seconds)
    said = f"Expediter was not ready within {UP_SECONDS_MAX:g} s" if late else "Expediter did not come up"
    kind = ConfigurationError if status == USAGE else NotUp
    raise kind("\n".join([f"{said}; the ends of the logs:", *_tails(run_dir, sizes)]))


def _end(process: subprocess.Popen[bytes], drain_seconds: float) -> int:
    process.terminate()
    try:
        return process.wait(drain_seconds + 2 * STOP_SECONDS_MARGIN)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def is_ready(address: str, seconds_max: float) -> bool:
    """Tell whether the service at this address says within `seconds_max` that it is ready."""
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
    with suppress(FileNotFoundError, NotADirectoryError), pid_file.path.open() as file:
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


def restart(pid_file: PidFile, *, drain_seconds: float, told: Callable[[int, int], None]) -> list[str]:
    """Have the supervisor renew its processes one after the other, and return their names.

    `told` hears how many of how many are done. Raises NotUp if nothing is up, or if it was broken off.
    """
    run_dir = pid_file.path.parent
    pid, before = pid_file.holder(), read_state(run_dir)
    if pid is None or before is None:
        raise NotUp(f"Nothing is up ({pid_file.path}); `expediter up` starts it")
    if before.restart.under_way:
        raise NotUp("A restart is under way already; `expediter status` shows how far it is")
    each = READY_SECONDS_MAX + drain_seconds + 2 * STOP_SECONDS_MARGIN
    try:
        os.kill(pid, RENEW_SIGNAL)
    except PermissionError as error:
        raise NotUp(f"Expediter (pid {pid}) belongs to another user and cannot be restarted") from error
    deadline = time.monotonic() + each * (1 + len(before.processes))
    while time.monotonic() < deadline:
        if pid_file.holder() != pid:
            raise NotUp("Expediter has ended meanwhile; `expediter up` starts it")
        state = read_state(run_dir)
        if state is not None and state.restart.number > before.restart.number:
            told(len(state.restart.done), len(state.processes))
            if not state.restart.under_way:
                if state.restart.failed:
                    raise NotUp(f"{state.restart.failed}. What is not renewed goes on as it was")
                return state.restart.done
        time.sleep(LOOK_SECONDS)
    raise NotUp(f"Expediter (pid {pid}) was asked to renew its processes and has not done it; see its log")


def _names(paths: Sequence[Path]) -> list[str]:
    names = []
    for path in paths:
        with suppress(FileNotFoundError):  # it has just ended
            names.append(f"{path.stem} (pid {path.read_text().strip()})")
    return names
