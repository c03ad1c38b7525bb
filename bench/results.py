"""What a row says: figures in pairs, what is to be reached, what an order costs; or why nothing was measured."""

from __future__ import annotations

from typing import Any, NamedTuple

from load import Sample, ratio
from meter import Cpu

#: The unit of a figure that is to be high, without a baseline.
RATE = "events/s"


class Plan(NamedTuple):
    """How much is done: rounds of pairs, seconds of load in each, orders of a pipeline run, orders of growth."""

    pairs: int
    seconds: int
    orders: int
    celery_orders: int
    grown: int


class Missing(Exception):
    """A program that a row needs is not there; the message says which."""


class Result(NamedTuple):
    """One line of the table.

    `ratio` is a plain figure in `unit` where there is no baseline, and None where nothing was measured; `measured`
    says why then. `bound` says on which side of `target` it is to be. `cpu` is for one order, in microseconds.
    """

    row: str
    name: str
    baseline: str | None
    ratio: float | None
    bound: str
    target: float | None
    unit: str
    measured: str
    against: str = ""
    cpu: Cpu | None = None
    cpu_against: Cpu | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the target is reached; None where there is none, or no figure."""
        if self.ratio is None or self.target is None:
            return None
        return {"≥": self.ratio >= self.target, "≤": self.ratio <= self.target, "<": self.ratio < self.target}[
            self.bound
        ]

    def line(self, on: str) -> dict[str, Any]:
        """Return it for the file of results, with the day on which it was measured."""
        parts = {name: rounded(value) for name, value in self._asdict().items()}
        return {**parts, "holds": self.holds, "on": on}


def rounded(value: object) -> object:
    if isinstance(value, Cpu):
        return {part: round(microseconds, 1) for part, microseconds in value._asdict().items()}
    return round(value, 4) if isinstance(value, float) else value


def at_least(row: str, name: str, one: Sample, baseline: str, other: Sample, target: float | None) -> Result:
    return Result(
        row, name, baseline, ratio(one, other), "≥", target, "x", told(one), told(other), one.cpu, other.cpu
    )


def at_most(
    row: str, name: str, found: float, target: float, unit: str, told: str = "", cpu: Cpu | None = None
) -> Result:
    return Result(row, name, None, found, "<", target, unit, told, cpu=cpu)


def not_measured(row: str, name: str, why: str, baseline: str | None = None) -> Result:
    return Result(row, name, baseline, None, "≥", None, "x", f"not measured: {why}")


def told(sample: Sample) -> str:
    return f"{sample.median:,.0f} ({sample.spread})"
