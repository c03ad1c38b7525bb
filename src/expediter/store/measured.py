"""What a process measures of its own writing: its transactions, and the requests that wait for one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from time import monotonic

from expediter.store.gathering import Gathering, Group
from expediter.telemetry.meters import SECONDS, SIZES, Family, Histogram, counter, gauge, histogram


class Commits:
    """How many requests a transaction carries, how long it takes, and how long they wait for it."""

    def __init__(self) -> None:
        """Nothing was committed yet."""
        self._waited = Histogram()
        self._sizes = Histogram(SIZES)
        self._seconds = Histogram()
        self._failed = 0

    def begin(self, groups: Sequence[Group], now: float) -> None:
        """Take note that these wait no more (on the monotonic clock)."""
        waited = self._waited
        for group in groups:
            seconds = now - group.since
            waited.counts[bisect_left(SECONDS, seconds)] += 1
            waited.total += seconds

    def end(self, requests: int, began: float) -> None:
        """Take note of a transaction that was committed, with so many requests."""
        self._sizes.observe(requests)
        self._seconds.observe(monotonic() - began)

    def fail(self) -> None:
        """Take note of one that was not."""
        self._failed += 1

    def families(self, gathering: Gathering, under_way_seconds: float) -> list[Family]:
        """Return what was measured, and what waits now."""
        return [
            histogram("commit_batch_size", "Requests in one transaction.", self._sizes.samples()),
            histogram(
                "commit_duration_seconds",
                "Seconds of a transaction, its commit included.",
                self._seconds.samples(),
            ),
            histogram(
                "commit_wait_seconds",
                "Seconds that a request waited for its transaction to begin.",
                self._waited.samples(),
            ),
            counter("commit_failures", "Transactions that the database did not store.", self._failed),
            gauge("commit_waiting_requests", "Requests that wait for a transaction.", gathering.requests),
            gauge("commit_waiting_bytes", "Bytes of their bodies.", gathering.bytes),
            gauge(
                "commit_under_way_seconds",
                "For how long the transaction under way has been; 0 where there is none.",
                under_way_seconds,
            ),
        ]
