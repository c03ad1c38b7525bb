"""When a delivery is tried again, and how a receiver fares: pure, time and chance are handed in."""

from __future__ import annotations

from expediter.orders.order import MICROSECONDS
from expediter.store.webhooks import Endpoint, Tried

#: Requests to one receiver under way at once.
REQUESTS_MAX = 32

#: The longest pause after the first failed try of a delivery, in seconds; it doubles with each, up to the last.
AGAIN_SECONDS_MIN, AGAIN_SECONDS_MAX = 1.0, 4 * 3600.0
#: After this long a delivery that fails once more is given up, in seconds.
GIVE_UP_SECONDS = 3 * 24 * 3600
#: Failures in a row after which a receiver counts as failing, and gets one delivery at a time.
FAILING_AFTER = 5
#: The longest pause before the first of these, and before later ones, in seconds.
FAILING_SECONDS_MIN, FAILING_SECONDS_MAX = 0.5, 10.0
#: A receiver that asks to be left alone for longer is tried after this, in seconds.
RETRY_AFTER_SECONDS_MAX = 3600.0


def again_in(tries: int, chance: float) -> int:
    """Return the pause after so many tries in microseconds: any up to the longest, so that many do not meet."""
    longest = min(AGAIN_SECONDS_MAX, AGAIN_SECONDS_MIN * 2 ** min(tries - 1, 30))
    return int(longest * chance * MICROSECONDS)


def failing_pause(failures: int, chance: float) -> int:
    """Return for how long a receiver that failed so often in a row is left alone, in microseconds."""
    if failures < FAILING_AFTER:
        return 0
    longest = min(FAILING_SECONDS_MAX, FAILING_SECONDS_MIN * 2 ** min(failures - FAILING_AFTER, 30))
    return int(longest * chance * MICROSECONDS)


def is_over(first_tried_at: int, now: int) -> bool:
    """Return whether a delivery that has failed now is given up (microseconds)."""
    return now - first_tried_at >= GIVE_UP_SECONDS * MICROSECONDS


class Receiver:
    """How a receiver fares; times are microseconds since 1970."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Go on from what is stored: one that fails is tried with care."""
        self.last_success_at = endpoint.last_success_at
        self.last_error = endpoint.last_error
        self.failing_since = endpoint.failing_since
        #: Until when it has asked to be left alone.
        self.wait_until = endpoint.wait_until
        #: Whether it has said that it wants no more.
        self.gone = False
        self._failures = 0 if self.failing_since is None else FAILING_AFTER
        self._pause_until = 0

    @property
    def requests_max(self) -> int:
        """How many requests may be under way."""
        return REQUESTS_MAX if self._failures < FAILING_AFTER else 1

    @property
    def left_alone_until(self) -> int:
        """Until when nothing is sent."""
        return max(self._pause_until, self.wait_until or 0)

    def succeeded(self, now: int) -> bool:
        """It has taken a delivery; return whether it was failing."""
        failing = self.failing_since is not None
        self.last_success_at = now
        self.failing_since = None
        self._failures = self._pause_until = 0
        return failing

    def failed(self, outcome: Tried, now: int, chance: float) -> None:
        """It has not taken a delivery."""
        self._failures += 1
        self.last_error = outcome.error
        if outcome.gone:
            self.gone = True
            self.last_error = f"{outcome.error}: it wants no more, and is paused"
        if outcome.wait_seconds is not None:
            wait = int(min(outcome.wait_seconds, RETRY_AFTER_SECONDS_MAX) * MICROSECONDS)
            self.wait_until = max(self.wait_until or 0, now + wait)
            self._failures = max(self._failures, FAILING_AFTER)
        if self._failures >= FAILING_AFTER:
            self.failing_since = self.failing_since or now
            self._pause_until = now + failing_pause(self._failures, chance)
