"""When to try again, and when to stop asking: back-off and the circuit breaker, as pure functions.

Back-off is exponential with full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015). The breaker is
Nygard's ("Release It!", 2007) with its state in one database row, so that a whole cluster shares one opinion
and sends one probe.
"""

import msgspec
from msgspec.structs import replace

from expediter.orders.order import MICROSECONDS, JobKind

#: The breaker that stands before the payment gateway, and the jobs that it holds back while it is open.
PAYMENT_BREAKER = "payment"
GATEWAY_KINDS = frozenset({JobKind.CHARGE, JobKind.REFUND})
#: The longest possible delay before the first retry, in microseconds.
BACKOFF_BASE = 1 * MICROSECONDS
#: No delay is longer, in microseconds.
BACKOFF_CAP = 30 * MICROSECONDS
#: How long a probe may take before another process may send one, in microseconds.
PROBE_LEASE = 30 * MICROSECONDS


def backoff(failures: int, random: float) -> int:
    """Return microseconds to wait after `failures` (>= 1) failures; `random` is uniform in [0, 1)."""
    ceiling = min(BACKOFF_CAP, BACKOFF_BASE * 2 ** min(failures - 1, 16))
    return int(ceiling * random)


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

    def after_failure(self, now: int, *, threshold: int, recovery: int, probe: bool) -> "Breaker":
        """Return the breaker one consecutive failure on; it opens at `threshold`, for `recovery` microseconds."""
        failures = self.failures + 1
        if self.open_until is not None and probe:
            return Breaker(failures=failures, open_until=now + recovery)
        if self.open_until is not None:
            # A call that was under way when it opened tells nothing new; only a failed probe opens it anew.
            return replace(self, failures=failures)
        return Breaker(failures=failures, open_until=now + recovery if failures >= threshold else None)
