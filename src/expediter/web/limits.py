"""How often somebody may come: a rate for each caller, and a limit on wrong passwords."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import Any

from expediter.backends.tallies import SharedTally, Tally, window_of
from expediter.settings import Rate
from expediter.web.http import App, Call, Header, Reply, passed_on
from expediter.web.problems import RequestRefused, problem_reply
from expediter.web.server.addresses import place_of

#: Wrong passwords and keys that one address may send in a minute, to one process; then whatever it sends is 429.
WRONG_SECRETS_MAX = 10
WRONG_SECRETS_SECONDS = 60

#: What tells whether the service lives is answered always.
_NEVER_LIMITED = frozenset({"/health", "/healthz", "/readyz", "/metrics"})


class RateLimited:
    """An application whose callers have a rate: each API key, and else each address."""

    def __init__(self, app: App, rate: Rate, shared: SharedTally | None) -> None:
        """Count in this process, and also in the `shared` tally of all processes, where there is one."""
        self._app = app
        self._rate = rate
        self._shared = shared
        self._tally = Tally()
        self._policy: Header = (b"ratelimit-policy", b'"default";q=%d;w=%d' % rate)

    def __call__(self, call: Call) -> Reply | Coroutine[Any, Any, Reply]:
        """Answer one request, or refuse it."""
        if call.path in _NEVER_LIMITED:
            return self._app(call)
        name = f"key:{call.key_id}" if call.key_id else place_of(call.client)
        window, left = window_of(name, self._rate.seconds, time.time())
        count = self._tally.add(name, window)
        if count > self._rate.requests:
            return self._refused(call, left)
        if self._shared is not None:
            return self._answer_together(self._shared, call, name, window, count, left)
        answer = self._app(call)
        if isinstance(answer, Reply):
            return self._told(answer, count, left)
        return self._told_later(answer, count, left)

    async def _answer_together(
        self, shared: SharedTally, call: Call, name: str, window: int, count: int, left: int
    ) -> Reply:
        together = await shared.add(name, window, self._rate.seconds)
        count = max(count, together or 0)
        if count > self._rate.requests:
            return self._refused(call, left)
        answer = self._app(call)
        return self._told(answer if isinstance(answer, Reply) else await answer, count, left)

    async def _told_later(self, answer: Coroutine[Any, Any, Reply], count: int, left: int) -> Reply:
        return self._told(await answer, count, left)

    def _told(self, reply: Reply, count: int, left: int) -> Reply:
        """Add the fields of draft-ietf-httpapi-ratelimit-headers-10."""
        requests = max(0, self._rate.requests - count)
        reply.headers += (self._policy, (b"ratelimit", b'"default";r=%d;t=%d' % (requests, left)))
        return reply

    def _refused(self, call: Call, left: int) -> Reply:
        error = f"There may be {self._rate.requests} requests in {self._rate.seconds} s; come again in {left} s"
        refusal = RequestRefused(429, "Too many requests", error, {"Retry-After": str(left)})
        reply = problem_reply(refusal, call.request_id)
        return passed_on(call, self._told(reply, self._rate.requests, left))


class WrongSecrets:
    """Counts wrong passwords and keys by the address that they come from, so that guessing slows the guesser only.

    It counts in this process: with several processes an address has as many times the guesses.
    """

    def __init__(self) -> None:
        """Nobody has guessed."""
        self._tally = Tally()

    def check(self, call: Call) -> None:
        """Raise a 429 for an address that has guessed too often, before anything is compared or read."""
        place = place_of(call.client)
        window, left = window_of(place, WRONG_SECRETS_SECONDS, time.time())
        if self._tally.count(place, window) >= WRONG_SECRETS_MAX:
            error = f"Too many wrong passwords or keys came from this address; try again in {left} s"
            raise RequestRefused(429, "Too many requests", error, {"Retry-After": str(left)})

    def wrong_secret(self, call: Call) -> None:
        """Count one that was wrong: whoever refuses a password or a key says so here."""
        place = place_of(call.client)
        self._tally.add(place, window_of(place, WRONG_SECRETS_SECONDS, time.time()).number)
