"""What is wrong with a request before anybody reads it: the errors that RFC 9110 and RFC 9112 ask for."""

from __future__ import annotations

import re
from bisect import bisect_left
from contextlib import suppress

import httptools

from expediter.errors import BadRequest, ExpediterError
from expediter.web.http import HEADER_BYTES_MAX, TARGET_BYTES_MAX, Call
from expediter.web.problems import RequestRefused

#: A protocol whose requests look like those of HTTP, and that the parser takes for HTTP.
FOREIGN = b"RTSP/"

#: What the parser says of versions and protocols that it does not know.
_NO_VERSION = ("HTTP version", "PRI/Upgrade", "RTSP/x.x", "ICE/x.x")
#: What begins like a method, as far as it is there.
_METHOD = re.compile(rb"[\r\n]*[A-Za-z_-]+(?: |\Z)")
_SCHEME = re.compile(rb"https?://[^/?#]+", re.I)


def origin_form(target: bytes) -> bytes:
    """Return the path and query that a target means, which may be a whole address; as it is if it is neither."""
    target = target.partition(b"#")[0]
    if target[:1] != b"/" and (found := _SCHEME.match(target)):
        rest = target[found.end() :]
        return rest if rest[:1] == b"/" else b"/" + rest
    return target


def refusal_of(call: Call) -> ExpediterError | None:
    """Return why a request is refused whose headers are there; None: it is not."""
    if call.version not in ("1.1", "1.0"):
        return version_not_known()
    if call.method == "CONNECT":
        return _not_implemented("This service is no proxy")
    if len(call.target) > TARGET_BYTES_MAX:
        return target_too_long()
    if call.target[:1] != b"/" and (call.target != b"*" or call.method != "OPTIONS"):
        return BadRequest("The target of the request is neither a path nor an address")
    names = [name for name, _ in call.headers]
    if names.count(b"transfer-encoding") > 1:
        return BadRequest("The request has several Transfer-Encoding headers; send one that says chunked")
    hosts = names.count(b"host")
    if hosts != 1 and (hosts or call.version == "1.1"):
        return BadRequest(f"The request has {hosts or 'no'} Host headers; HTTP/1.1 asks for one")
    coding = call.named.get(b"transfer-encoding", b"chunked").strip().lower()
    if coding != b"chunked" and coding.endswith(b"chunked"):
        return _not_implemented(f"The transfer coding {coding.decode('latin-1')} is not known here; send chunked")
    if coding != b"chunked" or (b"transfer-encoding" in call.named and call.version == "1.0"):
        return BadRequest(
            "Where the body ends cannot be told: its last transfer coding is not chunked, in HTTP/1.1"
        )
    expected = call.named.get(b"expect", b"100-continue")
    if expected.lower() != b"100-continue":
        return RequestRefused(417, "Expectation failed", "Of what can be expected only 100-continue is known here")
    return None


def misread(error: Exception, seen: bytes) -> ExpediterError:
    """Return why a request is refused that the parser could not read.

    `seen` is what came, from the beginning of a request on, which may be an earlier one; b"": that is not known.
    """
    text = str(error)
    unknown = text.startswith("Invalid method for HTTP")
    if isinstance(error, httptools.HttpParserInvalidMethodError):
        unknown = _METHOD.match(behind_whole(seen, _whole(seen))) is not None
    if unknown:
        return _not_implemented("The method of the request is not known here")
    if any(said in text for said in _NO_VERSION):
        return version_not_known()
    return BadRequest(f"The request cannot be read: {text}")


class _Whole:
    """Counts requests that are there whole."""

    def __init__(self) -> None:
        self.count = 0

    def on_message_complete(self) -> None:
        """One more."""
        self.count += 1


def _whole(data: bytes) -> int:
    counted = _Whole()
    with suppress(httptools.HttpParserError, httptools.HttpParserUpgrade):
        httptools.HttpRequestParser(counted).feed_data(data)
    return counted.count


def behind_whole(seen: bytes, count: int) -> bytes:
    """Return what stands behind so many whole requests; the parser does not say where it has stopped."""
    return seen[bisect_left(range(len(seen)), count, key=lambda size: _whole(seen[:size])) :]


def target_too_long() -> ExpediterError:
    """The request line does not end."""
    return RequestRefused(414, "Target too long", f"Send at most {TARGET_BYTES_MAX} bytes of path and query")


def headers_too_large() -> ExpediterError:
    """The headers do not end."""
    return RequestRefused(431, "Headers too large", f"Send at most {HEADER_BYTES_MAX} bytes of headers")


def headers_too_slow(seconds: float) -> ExpediterError:
    """The headers do not come."""
    return RequestRefused(408, "Request timeout", f"The headers took more than {seconds:g} seconds")


def version_not_known() -> ExpediterError:
    """It is another protocol, or a version of HTTP that is not spoken here."""
    return RequestRefused(505, "HTTP version not supported", "HTTP/1.1 and HTTP/1.0 are spoken here")


def _not_implemented(error: str) -> ExpediterError:
    return RequestRefused(501, "Not implemented", error)
