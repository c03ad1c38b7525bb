"""The logs of what `up` started: their ends, merged by time, and what is added to them from now on."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from expediter.errors import ExpediterError

#: Seconds between two looks for something new.
LOOK_SECONDS = 0.1
#: Bytes of a log's end that are looked at, at most.
TAIL_BYTES_MAX = 4 * 1024 * 1024

#: When a line was written, as text or as JSON; colours may stand before it.
_TIME = re.compile(r'(?:\x1b\[\d+m)*(\d{4}-\d\d-\d\dT[\d:.]+Z)|"timestamp": ?"([^"]+)"')


class NoLogs(ExpediterError):
    """There is nothing to show."""


class LogFiles:
    """The log files of a folder, each by the name of its process. Every line is shown with that name before it."""

    def __init__(self, run_dir: Path, names: Sequence[str]) -> None:
        """Only those with these `names`, all if there are none. Raises NoLogs if there is no such file."""
        self._folder = run_dir
        self._names = names
        self._positions: dict[Path, tuple[int, int]] = {}
        there = sorted(path.stem for path in run_dir.glob("*.log"))
        if not there:
            raise NoLogs(f"There are no logs in {run_dir}; `expediter up` writes some there (RUN_DIR)")
        if unknown := [name for name in names if name not in there]:
            raise NoLogs(f"There is no log of {', '.join(unknown)} in {run_dir}; there are: {', '.join(there)}")
        self._width = max(map(len, there))

    def tail(self, count: int) -> list[str]:
        """Return the last `count` lines of each file, in the order of their times."""
        found: list[tuple[str, str]] = []
        for path in self._paths():
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - TAIL_BYTES_MAX))
                data = file.read()
            # A line that is still being written is left to `follow`.
            whole = data[: data.rfind(b"\n") + 1]
            self._positions[path] = (path.stat().st_ino, size - len(data) + len(whole))
            texts = whole.decode(errors="replace").splitlines()
            at = ""
            for text in texts[len(texts) - min(count, len(texts)) :]:
                # What has no time of its own, such as a traceback, stays behind the line before it.
                at = _time_of(text) or at
                found.append((at, self._shown(path, text)))
        return [text for _, text in sorted(found, key=lambda each: each[0])]

    def follow(self) -> Iterator[str]:
        """Yield each whole line that is added, for ever. A file that is renamed away or emptied begins anew."""
        while True:
            some = False
            for path in self._paths():
                for text in self._added(path):
                    some = True
                    yield self._shown(path, text)
            if not some:
                time.sleep(LOOK_SECONDS)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("*.log") if not self._names or path.stem in self._names)

    def _added(self, path: Path) -> list[str]:
        inode, position = self._positions.get(path, (0, 0))
        with suppress(FileNotFoundError), path.open("rb") as file:
            now = os.fstat(file.fileno())
            if now.st_ino != inode or now.st_size < position:
                inode, position = now.st_ino, 0
            lines = _whole_lines(file, position)
            self._positions[path] = (inode, position + sum(map(len, lines)))
            return [line.decode(errors="replace").rstrip("\r\n") for line in lines]
        return []

    def _shown(self, path: Path, text: str) -> str:
        return f"{path.stem:<{self._width}} | {text}"


def _whole_lines(file: IO[bytes], position: int) -> list[bytes]:
    file.seek(position)
    data = file.read(TAIL_BYTES_MAX)
    whole = data[: data.rfind(b"\n") + 1]
    # A line longer than what is read at once is shown in parts.
    return (whole or (data if len(data) == TAIL_BYTES_MAX else b"")).splitlines(keepends=True)


def _time_of(text: str) -> str:
    found = _TIME.search(text[:400])
    return (found[1] or found[2]) if found else ""
