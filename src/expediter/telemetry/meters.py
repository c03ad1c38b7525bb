"""Numbers that a process keeps of its own work, as Prometheus reads them: counts, gauges and histograms.

They are plain integers and lists, changed on the event loop without a lock. Names and words are given only where
somebody asks, so that counting costs a request next to nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec

#: Upper bounds of durations, in seconds: from what a cached answer takes to what a call to a gateway may.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: Upper bounds of numbers in one batch.
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
#: Values of one label whose set no table bounds; what comes later is counted as OTHER.
LABELS_MAX = 100
OTHER = "other"

#: What every name begins with.
PREFIX = "expediter_"

Kind = Literal["counter", "gauge", "histogram"]
Labels = dict[str, str]


class Sample(NamedTuple):
    """One number. `suffix` is what the name of its family is followed by, such as `_bucket`."""

    suffix: str
    labels: Labels
    value: float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """All numbers of one name. The name has no `_total`: counters are given it where they are shown."""

    name: str
    kind: Kind
    words: str
    samples: list[Sample]


class Histogram:
    """How often a value was at most so much, and the sum of all values. `observe` costs one call."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        """`bounds` are the upper ends, ascending; one more bucket takes what is above the last."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the unit of the bounds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def samples(self, **labels: str) -> Iterable[Sample]:
        """Give the samples as the exposition wants them: each bucket with all that are below it."""
        so_far = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            so_far += count
            yield Sample("_bucket", {**labels, "le": str(bound)}, so_far)
        yield Sample("_sum", labels, self.total)
        yield Sample("_count", labels, so_far)


class Histograms:
    """A histogram for each value of the labels, made when it is first met."""

    def __init__(self, *labels: str, bounds: tuple[float, ...] = SECONDS) -> None:
        """`labels` name what the values stand for; their sets must be bounded by whoever observes."""
        self._labels = labels
        self._bounds = bounds
        self._by_values: dict[tuple[str, ...], Histogram] = {}

    def observe(self, value: float, *values: str) -> None:
        """Count a value under these values of the labels."""
        found = self._by_values.get(values)
        if found is None:
            found = self._by_values[values] = Histogram(self._bounds)
        found.observe(value)

    def samples(self) -> Iterable[Sample]:
        """Give the samples of all."""
        for values, histogram in list(self._by_values.items()):
            yield from histogram.samples(**dict(zip(self._labels, values, strict=True)))


class Counts:
    """A count for each value of the labels."""

    def __init__(self, *labels: str) -> None:
        """`labels` name what the values stand for; their sets must be bounded by whoever adds."""
        self._labels = labels
        self._by_values: dict[tuple[str, ...], int] = {}

    def add(self, *values: str, by: int = 1) -> None:
        """Add to the count of these values of the labels."""
        self._by_values[values] = self._by_values.get(values, 0) + by

    def samples(self) -> Iterable[Sample]:
        """Give the samples of all."""
        for values, count in list(self._by_values.items()):
            yield Sample("", dict(zip(self._labels, values, strict=True)), count)


class Bounded:
    """Keeps the set of a label's values small: what comes after LABELS_MAX of them is OTHER."""

    def __init__(self) -> None:
        """None is known yet."""
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """Return the value to count under."""
        if value not in self._known:
            if len(self._known) >= LABELS_MAX:
                return OTHER
            self._known.add(value)
        return value


def counter(name: str, words: str, samples: Iterable[Sample] | float) -> Family:
    """Return a family of counts; a number stands for one without labels."""
    return Family(PREFIX + name, "counter", words, _listed(samples))


def gauge(name: str, words: str, samples: Iterable[Sample] | float) -> Family:
    """Return a family of what may rise and fall; a number stands for one without labels."""
    return Family(PREFIX + name, "gauge", words, _listed(samples))


def histogram(name: str, words: str, samples: Iterable[Sample]) -> Family:
    """Return a family of histograms."""
    return Family(PREFIX + name, "histogram", words, list(samples))


def labelled(label: str, values: Mapping[str, float]) -> list[Sample]:
    """Return a sample for each value of a label."""
    return [Sample("", {label: value}, number) for value, number in values.items()]


def _listed(samples: Iterable[Sample] | float) -> list[Sample]:
    return [Sample("", {}, samples)] if isinstance(samples, int | float) else list(samples)


def merged(families: Iterable[Family]) -> list[Family]:
    """Return one family for each name, in the order in which the names come first."""
    found: dict[str, Family] = {}
    for each in families:
        if each.name in found:
            found[each.name].samples.extend(each.samples)
        else:
            found[each.name] = Family(each.name, each.kind, each.words, list(each.samples))
    return list(found.values())


def of_process(families: Iterable[Family], process: str) -> list[Family]:
    """Return the families with the name of their process in each sample."""
    return [
        Family(
            each.name,
            each.kind,
            each.words,
            [Sample(one.suffix, {"process": process, **one.labels}, one.value) for one in each.samples],
        )
        for each in families
    ]
