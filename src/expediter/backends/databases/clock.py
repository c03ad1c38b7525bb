"""The time of a database server, without a round trip for each look at it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

#: Microseconds for which an answer of the server is good, and in which it must come.
GOOD_FOR = 500_000
ANSWER_TAKES_MAX = 50_000


def _here() -> int:
    return time.monotonic_ns() // 1_000


class ServerClock:
    """Follows a database server's clock, which all processes share, by this machine's own.

    It is behind the server's by what the answer took to come, at most ANSWER_TAKES_MAX, and never ahead of it but
    for what two clocks drift apart in half a second. A server's clock that is set is followed after that time.
    """

    def __init__(self, here: Callable[[], int] = _here) -> None:
        """`here` tells this machine's time in microseconds; it never goes back, and need not mean anything."""
        self._here = here
        self._ahead = 0
        self._good_until: int | None = None

    async def now(self, ask: Callable[[], Awaitable[int]]) -> int:
        """Return the server's time in microseconds since 1970; where need be, `ask` asks it."""
        at = self._here()
        if self._good_until is not None and at < self._good_until:
            return at + self._ahead
        told = await ask()
        answered_at = self._here()
        if answered_at - at > ANSWER_TAKES_MAX:
            return told  # This process was held up, or the server: nobody knows which moment was told.
        ahead = told - answered_at
        if self._good_until is not None and answered_at < self._good_until:
            # Somebody else asked meanwhile. Both are behind; the one that is ahead of the other is less so.
            ahead = max(ahead, self._ahead)
        self._ahead = ahead
        self._good_until = answered_at + GOOD_FOR
        return max(told, answered_at + ahead)
