"""The heads of answers: what stands before a body."""

from __future__ import annotations

import time
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from expediter.web.http import Call, Header, Reply

#: What every answer has: what it is is never guessed, no page frames it, and no link from it says where it was.
_SECURITY = (
    b"x-content-type-options: nosniff\r\n"
    b"content-security-policy: frame-ancestors 'none'\r\n"
    b"referrer-policy: no-referrer\r\n"
)
#: Whoever has come by https comes by https for a year.
_HTTPS_ONLY = b"strict-transport-security: max-age=31536000\r\n"

CLOSE: Header = (b"connection", b"close")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

_BODILESS = frozenset({204, 304})
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


@lru_cache(maxsize=2)
def _date(second: int) -> bytes:
    return b"date: %b\r\n%b" % (formatdate(second, usegmt=True).encode(), _SECURITY)


def head(call: Call, reply: Reply, size: int | None) -> bytes:
    """Return the head of an answer whose body has `size` bytes, or comes in parts.

    Raises ValueError for a header that has a line break in it, and would be several.
    """
    lines = b"".join([b"%b: %b\r\n" % each for each in reply.headers])
    if lines.count(b"\n") != len(reply.headers) or lines.count(b"\r") != len(reply.headers):
        raise ValueError(f"a header of the answer has a line break: {reply.headers}")
    end = b"\r\n"
    if size is None:
        end = b"transfer-encoding: chunked\r\n\r\n" if call.version == "1.1" else end
    elif reply.status not in _BODILESS:
        end = b"content-length: %d\r\n\r\n" % size
    if call.last:
        if CLOSE not in reply.headers:
            end = b"connection: close\r\n" + end
    elif call.version == "1.0":
        end = b"connection: keep-alive\r\n" + end
    if call.secure:
        end = _HTTPS_ONLY + end
    return _STATUS_LINES[reply.status] + _date(int(time.time())) + lines + end


def chunk(data: bytes) -> bytes:
    """Return a part of a body whose length is not known before."""
    return b"%x\r\n%b\r\n" % (len(data), data)
