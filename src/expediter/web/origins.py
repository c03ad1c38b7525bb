"""Pages of other origins: which may call, what they may send and read. It is CORS, in the Fetch standard."""

from __future__ import annotations

from collections.abc import Collection, Coroutine
from typing import Any

from expediter.web.http import App, Call, Header, Reply

#: Seconds for which a browser may remember that an origin is let in.
PREFLIGHT_SECONDS = 600

_METHODS = ("GET", "POST", "PATCH", "DELETE")
#: What a page on another origin may read of an answer, besides its body.
_EXPOSED = (
    b"ETag, Location, Retry-After, RateLimit, RateLimit-Policy, "
    b"Idempotency-Replayed, X-Request-ID, WWW-Authenticate"
)
#: What the answer to a preflight depends on.
_ASKED = b", ".join(
    [b"Origin", *(b"Access-Control-Request-" + each for each in (b"Method", b"Headers", b"Private-Network"))]
)


class Origins:
    """Lets pages of some origins call an application; `*` lets in all of them."""

    def __init__(self, app: App, allowed: Collection[str]) -> None:
        """Answer preflights, and pass everything else on to `app`."""
        self._app = app
        self._allowed = frozenset(origin.encode() for origin in allowed)

    def __call__(self, call: Call) -> Reply | Coroutine[Any, Any, Reply]:
        """Answer one request."""
        origin = call.named.get(b"origin")
        if origin is not None and call.method == "OPTIONS" and b"access-control-request-method" in call.named:
            return self._preflight(call, origin)
        answer = self._app(call)
        if isinstance(answer, Reply):
            return self._shown(answer, origin)
        return self._shown_later(answer, origin)

    async def _shown_later(self, answer: Coroutine[Any, Any, Reply], origin: bytes | None) -> Reply:
        return self._shown(await answer, origin)

    def _shown(self, reply: Reply, origin: bytes | None) -> Reply:
        if origin is not None:
            reply.headers += [(b"access-control-expose-headers", _EXPOSED), *self._let_in(origin)]
        varied = [value for name, value in reply.headers if name == b"vary"]
        reply.headers = [each for each in reply.headers if each[0] != b"vary"]
        reply.headers.append((b"vary", b", ".join([*varied, b"Origin"])))
        return reply

    def _let_in(self, origin: bytes) -> list[Header]:
        if b"*" in self._allowed:
            return [(b"access-control-allow-origin", b"*")]
        return [(b"access-control-allow-origin", origin)] if origin in self._allowed else []

    def _preflight(self, call: Call, origin: bytes) -> Reply:
        let_in = self._let_in(origin)
        headers: list[Header] = [
            (b"vary", _ASKED),
            (b"access-control-allow-methods", ", ".join(_METHODS).encode()),
            (b"access-control-max-age", b"%d" % PREFLIGHT_SECONDS),
            *let_in,
        ]
        refused = [] if let_in else ["origin"]
        if call.header(b"access-control-request-method") not in _METHODS:
            refused.append("method")
        if wanted := call.named.get(b"access-control-request-headers"):
            headers.append((b"access-control-allow-headers", wanted))
        if b"access-control-request-private-network" in call.named:
            refused.append("private-network")
        headers.append((b"content-type", b"text/plain; charset=utf-8"))
        if refused:
            return Reply(400, f"Disallowed CORS {', '.join(refused)}".encode(), headers)
        return Reply(200, b"OK", headers)
