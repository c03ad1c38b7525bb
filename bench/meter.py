"""Processor time of what is measured, from /proc: steadier than rates, and what a user pays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Cpu(NamedTuple):
    """Seconds of processor time, user and system, by who spent them; microseconds where it is of one order."""

    serving: float
    working: float
    database: float

    @property
    def total(self) -> float:
        return sum(self)

    def since(self, before: Cpu) -> Cpu:
        return Cpu(*(now - then for now, then in zip(self, before, strict=True)))

    def of_one(self, orders: int) -> Cpu:
        """Return the microseconds of one of so many orders."""
        return Cpu(*(1e6 * seconds / orders for seconds in self))


class Processes(NamedTuple):
    """Who serves, who works and who is the database, by pid; each with all the processes that it started."""

    serving: int | None = None
    working: int | None = None
    database: int | None = None

    def used(self) -> Cpu:
        return Cpu(*(0.0 if pid is None else cpu_seconds(pid) for pid in self))


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process, of those it started, and of those among them that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0  # it has just ended: its parent has its time now
    own = sum(map(int, fields[11:15])) / _TICKS_PER_SECOND
    return own + sum(cpu_seconds(int(child)) for found in children for child in found.split())
