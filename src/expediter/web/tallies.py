"""What is counted of requests: how many by route, method and status, and how long their answers took."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from time import monotonic

from expediter.telemetry.meters import SECONDS, Family, Histogram, Sample, counter, histogram
from expediter.web.http import Call

#: The methods that are told apart where no operation is asked for; any other word is OTHER_METHOD.
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD = "OTHER"
#: The route of what leads nowhere.
NO_ROUTE = "none"


class Tally:
    """The answers to one method of one route."""

    __slots__ = ("measured", "statuses")

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.statuses: defaultdict[int, int] = defaultdict(int)
        self.measured = Histogram()


class Requests:
    """All requests of one process. Use it from one event loop."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self._routes: dict[str, dict[str, Tally]] = {}

    def note(self, call: Call, status: int) -> None:
        """Count an answer. Every request comes by here, so no label is made and nothing is called twice."""
        seconds = monotonic() - call.began
        try:
            tally = self._routes[call.route][call.method]
        except KeyError:
            tally = self._first(call)
        tally.statuses[status] += 1
        measured = tally.measured
        measured.counts[bisect_left(SECONDS, seconds)] += 1
        measured.total += seconds

    def _first(self, call: Call) -> Tally:
        method = call.method if call.route or call.method in METHODS else OTHER_METHOD
        return self._routes.setdefault(call.route, {}).setdefault(method, Tally())

    def families(self) -> list[Family]:
        """Return what was counted."""
        statuses: list[Sample] = []
        seconds: list[Sample] = []
        for route, methods in self._routes.items():
            for method, tally in methods.items():
                labels = {"route": route or NO_ROUTE, "method": method}
                for status, count in tally.statuses.items():
                    statuses.append(Sample("", {**labels, "status": str(status)}, count))
                seconds += tally.measured.samples(**labels)
        return [
            counter("http_requests", "Requests that were answered.", statuses),
            histogram(
                "http_request_duration_seconds", "Seconds from the head of a request to its answer.", seconds
            ),
        ]
