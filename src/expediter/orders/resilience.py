"""When to try again, and when to stop asking: back-off and the circuit breaker, as pure functions.

Back-off is exponential with full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015). The breaker is
Nygard's ("Release It!", 2007) with its state in one database row, so that a whole cluster shares one opinion
and sends one probe.
"""

import math
from collections import deque
from itertools import islice

import msgspec
from msgspec.structs import replace

from expediter.orders.order import MICROSECONDS, JobKind

#: The breaker that stands before the payment gateway, and the jobs that it holds back while it is open.
PAYMENT_BREAKER = "payment"
GATEWAY_KINDS = frozenset({JobKind.CHARGE, JobKind.CAPTURE, JobKind.VOID, JobKind.REFUND})
#: The longest possible delay before the first retry, in microseconds.
BACKOFF_BASE = 1 * MICROSECONDS
#: No delay is longer, in microseconds.
BACKOFF_CAP = 30 * MICROSECONDS
#: Calls that a process looks back at, at most, to judge whether the gateway is down.
LAST_CALLS_MAX = 10_000
#: Calls to a failing gateway that may be made again at once, the share of first calls beyond them, and the seconds
#: after which one may be in any case.
RETRY_BURST = 100
RETRIES_PER_CALL = 0.1
RETRY_SECONDS = 1.0
#: The gateway is taken to be well while fewer than a tenth of so many last calls failed.
WELL_CALLS = 20
#: How long a call waits that may not be made again yet, at least and at most, in microseconds.
POSTPONED_MIN, POSTPONED_MAX = 2 * MICROSECONDS, 10 * MICROSECONDS
#: How long a probe may take before another process may send one, in microseconds.
PROBE_LEASE = 30 * MICROSECONDS


def backoff(failures: int, random: float, base: int = BACKOFF_BASE) -> int:
    """Return microseconds to wait after `failures` (>= 1) failures; `random` is uniform in [0, 1).

    After the first it is at most `base`, and after each more at most twice as long.
    """
    ceiling = min(max(BACKOFF_CAP, base), base * 2 ** min(failures - 1, 16))
    return int(ceiling * random)


class CallWatch:
    """One process's calls to the gateway, as they end: whether they say that it is down.

    To a lone caller, `threshold` failures in a row say so. When many calls at once fail now and then, as many come
    to stand in a row by chance. So as many of the last calls are looked at as were under way, and of those more
    than half must have failed, by 1.2 times the square root of their number. With 25 or 400 calls at once, one in
    five of which fails, chance alone does that less than once in a hundred hours. A gateway that is down does it
    before the calls that were under way have all ended (tests/orders/test_call_watch.py).
    """

    def __init__(self, threshold: int) -> None:
        """Nothing is under way."""
        self._threshold = threshold
        self._under_way = 0
        self._failed: deque[bool] = deque(maxlen=LAST_CALLS_MAX)
        #: Failures in a row, up to now.
        self.failures = 0

    def begin(self) -> int:
        """Take note of a call that goes out; return how many are under way with it."""
        self._under_way += 1
        return self._under_way

    def end(self, under_way: int, *, failed: bool | None) -> bool:
        """Take note of the end of a call (None: it tells nothing); return whether the gateway is taken to be down.

        `under_way` is what `begin` returned.
        """
        self._under_way -= 1
        if failed is None:
            return False
        self._failed.append(failed)
        self.failures = self.failures + 1 if failed else 0
        if self.failures < self._threshold:
            return False
        last = min(under_way, LAST_CALLS_MAX)
        of_them = sum(islice(reversed(self._failed), last))
        return of_them >= min(last, last / 2 + 1.2 * math.sqrt(last))

    def forget(self) -> None:
        """Begin to count anew: it is known elsewhere, or it was this process that slept."""
        self.failures = 0
        self._failed.clear()


class RetryBudget:
    """How many calls to the gateway a process may make again while the gateway fails.

    A gateway in trouble gets a call for each order, and then another for each that failed: retries are what keeps
    it down. So while it fails they are at most a tenth of the first calls, after a burst of `RETRY_BURST`; and one
    a second at least, so that every order gets its turn. As long as the last calls went well there is no limit.
    The bound is that of Finagle's retry budgets (Twitter, 2016).
    """

    def __init__(self) -> None:
        """The whole burst is there, and nothing has failed."""
        self._left = float(RETRY_BURST)
        self._failed: deque[bool] = deque(maxlen=WELL_CALLS)
        self._last_at = -math.inf

    def first(self) -> None:
        """Take note of a first call: it earns a tenth of a retry."""
        self._left = min(float(RETRY_BURST), self._left + RETRIES_PER_CALL)

    def end(self, *, failed: bool) -> None:
        """Take note of how a call ended."""
        self._failed.append(failed)

    def forget(self) -> None:
        """Take the gateway to be well again: the breaker's probe says so."""
        self._failed.clear()

    def take(self, now: float) -> bool:
        """Return whether a call may be made again, at `now` seconds of a clock that only goes forward."""
        if sum(self._failed) <= WELL_CALLS * RETRIES_PER_CALL - 1:
            return True
        if self._left >= 1:
            self._left -= 1
        elif now - self._last_at < RETRY_SECONDS:
            return False
        self._last_at = now
        return True


class Breaker(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one breaker; `open_until` is None while it is closed, times are microseconds."""

    failures: int = 0
    open_until: int | None = None
    probe_holder: str | None = None
    probe_until: int | None = None

    @property
    def state(self) -> str:
        """`closed`, `open`, or `half_open` while a probe is out."""
        if self.open_until is None:
            return "closed"
        return "open" if self.probe_holder is None else "half_open"

    def may_probe(self, now: int) -> bool:
        """Return whether the open breaker has waited long enough and no probe is out."""
        waited = self.open_until is not None and self.open_until <= now
        return waited and (self.probe_until is None or self.probe_until <= now)

    def probing(self, holder: str, now: int) -> "Breaker":
        """Return the half-open breaker whose one probe `holder` sends."""
        return replace(self, probe_holder=holder, probe_until=now + PROBE_LEASE)

    def after_success(self) -> "Breaker":
        """Return the closed breaker: whoever got an answer has shown that the other side is back."""
        return Breaker()

    def after_failure(self, now: int, *, threshold: int, recovery: int, probe: bool, times: int = 1) -> "Breaker":
        """Return the breaker `times` failures in a row on; it opens at `threshold` for `recovery` microseconds."""
        failures = self.failures + times
        if self.open_until is not None and probe:
            return Breaker(failures=failures, open_until=now + recovery)
        if self.open_until is not None:
            # A call that was under way when it opened tells nothing new; only a failed probe opens it anew.
            return replace(self, failures=failures)
        return Breaker(failures=failures, open_until=now + recovery if failures >= threshold else None)
