"""What a supervisor says of its processes in RUN_DIR, for `status` and `restart`: one small file of JSON."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path

import msgspec

#: The name of the file, beside the pid files and the logs.
STATE_FILE = "expediter.json"


class Running(msgspec.Struct, frozen=True):
    """One process: its name, its number, since when it runs, and how often it died before."""

    name: str
    pid: int
    since: datetime
    deaths: int = 0


class Restart(msgspec.Struct):
    """The latest rolling restart: its number (0: none yet), how far it is, and why it was broken off."""

    number: int = 0
    done: list[str] = []
    under_way: bool = False
    failed: str | None = None


class State(msgspec.Struct):
    """A supervisor and what it keeps alive. `started_at` and `since` are in UTC."""

    version: str
    pid: int
    address: str
    started_at: datetime
    processes: list[Running]
    restart: Restart


def write_state(run_dir: Path, state: State) -> None:
    """Replace the file as a whole: who reads sees the old or the new. Raises OSError."""
    new = run_dir / f"{STATE_FILE}.new"
    new.write_bytes(msgspec.json.encode(state))
    new.replace(run_dir / STATE_FILE)


def read_state(run_dir: Path) -> State | None:
    """Return what was written last, None if nothing is there that can be read."""
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((run_dir / STATE_FILE).read_bytes(), type=State)
    return None


def forget_state(run_dir: Path) -> None:
    """Remove the file."""
    with suppress(OSError):
        (run_dir / STATE_FILE).unlink()
