"""What is said on a connection byte by byte, and what this service and nginx answer: a table."""

from __future__ import annotations

from typing import NamedTuple

PEN = b'{"user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}'
HOST = b"Host: a\r\n"
JSON = b"Content-Type: application/json\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
#: Sent behind everything that does not end its side of the connection: who answers it has left it open.
LAST = b"GET /healthz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"


class Exchange(NamedTuple):
    """What a client sends, and the status of each answer; behind it goes LAST unless the client `ends` its side.

    `nginx` has what nginx answers where that is something else.
    """

    name: str
    sent: bytes
    answers: tuple[int, ...]
    nginx: tuple[int, ...] | None = None
    ends: bool = False


def get(line: bytes = b"GET /healthz HTTP/1.1", headers: bytes = HOST) -> bytes:
    """Return a request without a body."""
    return line + b"\r\n" + headers + b"\r\n"


def post(headers: bytes, body: bytes = PEN, target: bytes = b"/orders", version: bytes = b"1.1") -> bytes:
    """Return a request with a body."""
    return b"POST " + target + b" HTTP/" + version + b"\r\n" + HOST + JSON + headers + b"\r\n" + body


def sized(body: bytes = PEN, target: bytes = b"/orders", headers: bytes = b"") -> bytes:
    """Return a request whose body has its length said."""
    return post(b"Content-Length: %d\r\n" % len(body) + headers, body, target)


CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n" % (10, PEN[:10], len(PEN) - 10, PEN[10:])
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
LONG, LONGER = b"Content-Length: 100000\r\n", b"Content-Length: 900000\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(PEN)

EXCHANGES = (
    # One request after the other.
    Exchange("a request", GET, (200, 200)),
    Exchange("empty lines before a request", b"\r\n\r\n" + GET, (200, 200)),
    Exchange("two at once", GET + GET, (200, 200, 200)),
    Exchange("others at once", sized() + get(b"GET /nothing HTTP/1.1") + sized() + GET, (201, 404, 201, 200, 200)),
    Exchange("a last one, and more behind it", LAST + GET, (200,)),
    Exchange("the client ends its side", GET, (200,), ends=True),
    Exchange("the client ends its side behind an order", sized(), (201,), ends=True),
    Exchange("the client ends its side behind several", GET + sized() + GET, (200, 201, 200), ends=True),
    Exchange("the client ends its side within a body", sized()[:-5], (), nginx=(201,), ends=True),
    Exchange("the client ends its side within headers", GET[:-5], (), ends=True),
    Exchange("the client says nothing", b"", (), ends=True),
    Exchange("HTTP/1.0", get(b"GET /healthz HTTP/1.0"), (200,)),
    Exchange("HTTP/1.0 without Host", get(b"GET /healthz HTTP/1.0", b""), (200,)),
    Exchange(
        "HTTP/1.0 that asks to stay", get(b"GET /healthz HTTP/1.0", b"Connection: keep-alive\r\n"), (200, 200)
    ),
    Exchange("HEAD", get(b"HEAD /healthz HTTP/1.1"), (200, 200)),
    Exchange("HEAD of nothing", get(b"HEAD /nothing HTTP/1.1"), (404, 200)),
    # Targets.
    Exchange("an address as target", get(b"GET http://a/healthz?_=1 HTTP/1.1"), (200, 200)),
    Exchange("an address without a path", get(b"GET http://a HTTP/1.1"), (200, 200)),
    Exchange("an address with a query alone", get(b"GET http://a?_=1 HTTP/1.1"), (200, 200)),
    Exchange("the whole service", get(b"OPTIONS * HTTP/1.1"), (204, 200), nginx=(400,)),
    Exchange("GET of the whole service", get(b"GET * HTTP/1.1"), (400,)),
    Exchange("a fragment", get(b"GET /healthz#a?b HTTP/1.1"), (200, 200)),
    Exchange("a blank in the target", get(b"GET /healthz a HTTP/1.1"), (400,)),
    Exchange("a target that is no path", get(b"GET healthz HTTP/1.1"), (400,)),
    Exchange("a control character in the target", get(b"GET /\x01 HTTP/1.1"), (400,)),
    Exchange("a byte beyond ASCII in the target", get(b"GET /\xe9 HTTP/1.1"), (400,), nginx=(404, 200)),
    Exchange("a long target", get(b"GET /healthz?_=" + b"a" * 9000 + b" HTTP/1.1"), (414,)),
    Exchange("a tunnel", get(b"CONNECT a:80 HTTP/1.1"), (501,), nginx=(400,)),
    # Methods and versions.
    Exchange("a method that is not served", get(b"PURGE /healthz HTTP/1.1"), (405, 200)),
    Exchange("a method that nobody knows", get(b"FOO /healthz HTTP/1.1"), (501,), nginx=(405, 200)),
    Exchange("a method in small letters", get(b"get /healthz HTTP/1.1"), (501,), nginx=(400,)),
    Exchange("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (400,)),
    Exchange("HTTP/0.9", b"GET /healthz\r\n\r\n", (505,), nginx=(9,)),
    Exchange("HTTP/1.2", get(b"GET /healthz HTTP/1.2"), (505,), nginx=(200, 200)),
    Exchange("HTTP/2 from the start", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (505,), nginx=(400,)),
    Exchange("HTTP/3.0", get(b"GET /healthz HTTP/3.0"), (505,)),
    Exchange("another protocol", get(b"GET /healthz RTSP/1.0"), (505,), nginx=(400,)),
    Exchange("a newer one of that protocol", get(b"GET  /healthz  RTSP/1.1"), (505,), nginx=(400,)),
    Exchange("a method of that protocol", get(b"DESCRIBE /healthz RTSP/1.0"), (505,), nginx=(400,)),
    Exchange("a method of that protocol in HTTP", get(b"DESCRIBE /healthz HTTP/1.1"), (501,), nginx=(405, 200)),
    Exchange("that protocol behind a request", GET + get(b"GET /healthz RTSP/1.0"), (200, 505), nginx=(200, 400)),
    Exchange("that protocol in a header", get(headers=HOST + b"X: GET /orders RTSP/1.0\r\n"), (200, 200)),
    # Headers.
    Exchange("no Host", get(headers=b""), (400,)),
    Exchange("two Hosts", get(headers=HOST + HOST), (400,)),
    Exchange("a folded header", get(headers=HOST + b"X: a\r\n b\r\n"), (400,)),
    Exchange("a bare carriage return", get(headers=HOST + b"X: a\rb\r\n"), (400,)),
    Exchange("bare line feeds", b"GET /healthz HTTP/1.1\nHost: a\n\n", (400,), nginx=(200, 200)),
    Exchange("NUL in a header", get(headers=HOST + b"X: a\x00b\r\n"), (400,)),
    Exchange("a control character in a header", get(headers=HOST + b"X: a\x01b\r\n"), (400,), nginx=(200, 200)),
    Exchange("a byte beyond ASCII in a header", get(headers=HOST + b"X: \xe9\r\n"), (200, 200)),
    Exchange("a blank before the colon", get(headers=b"Host : a\r\n"), (400,)),
    Exchange("a header without a name", get(headers=HOST + b": a\r\n"), (400,)),
    Exchange("a header without a colon", get(headers=HOST + b"X\r\n"), (400,), nginx=(200, 200)),
    Exchange("long headers", get(headers=HOST + b"X: " + b"a" * 40_000 + b"\r\n"), (431,), nginx=(400,)),
    Exchange(
        "many headers",
        get(headers=HOST + b"".join(b"X-%d: %050d\r\n" % (n, n) for n in range(700))),
        (431,),
        (400,),
    ),
    # Bodies.
    Exchange("an order", sized(), (201, 200)),
    Exchange("an order in chunks", post(CHUNKED, CHUNKS + b"\r\n"), (201, 200)),
    Exchange(
        "chunks with extensions", post(CHUNKED, CHUNKS.replace(b"a\r\n", b"a;x=y\r\n", 1) + b"\r\n"), (201, 200)
    ),
    Exchange("trailers", post(CHUNKED, CHUNKS + b"X: y\r\nHost: evil\r\n\r\n"), (201, 200)),
    Exchange(
        "a trailer that repeats a header",
        post(CHUNKED + b"Idempotency-Key: a\r\n", CHUNKS + b"Idempotency-Key: a\r\n\r\n"),
        (201, 200),
    ),
    Exchange("a folded trailer", post(CHUNKED, CHUNKS + b"X: y\r\n z\r\n\r\n"), (400,), nginx=(201, 200)),
    Exchange("chunks and a length", post(LENGTH + CHUNKED, CHUNKS + b"\r\n"), (400,)),
    Exchange("a length and chunks", post(CHUNKED + LENGTH, CHUNKS + b"\r\n"), (400,)),
    Exchange("chunks in HTTP/1.0", post(CHUNKED, CHUNKS + b"\r\n", version=b"1.0"), (400,)),
    Exchange("two lengths", post(LENGTH + b"Content-Length: 5\r\n"), (400,)),
    Exchange("the same length twice", post(LENGTH + LENGTH), (400,)),
    Exchange("a list of lengths", post(b"Content-Length: 57, 57\r\n"), (400,)),
    Exchange("a length below zero", post(b"Content-Length: -1\r\n"), (400,)),
    Exchange("a length with a sign", post(b"Content-Length: +57\r\n"), (400,)),
    Exchange("an endless length", post(b"Content-Length: 99999999999999999999999\r\n"), (400,)),
    Exchange("chunks twice", post(CHUNKED + CHUNKED, CHUNKS + b"\r\n"), (400,)),
    Exchange(
        "packed chunks, said twice",
        post(b"Transfer-Encoding: gzip\r\n" + CHUNKED, CHUNKS + b"\r\n"),
        (400,),
    ),
    Exchange("packed chunks", post(b"Transfer-Encoding: gzip, chunked\r\n", CHUNKS + b"\r\n"), (501,)),
    Exchange("a body that is only packed", post(b"Transfer-Encoding: gzip\r\n"), (400,), nginx=(501,)),
    Exchange("chunks that are packed then", post(b"Transfer-Encoding: chunked, gzip\r\n"), (400,), nginx=(501,)),
    Exchange("a coding that is none", post(b"Transfer-Encoding: identity\r\n" + LENGTH), (400,), nginx=(501,)),
    Exchange("a size that is none", post(CHUNKED, b"zz\r\nabc\r\n0\r\n\r\n"), (400,)),
    Exchange("a size that is too large", post(CHUNKED, b"f" * 17 + b"\r\nabc\r\n0\r\n\r\n"), (400,)),
    Exchange("a chunk that does not end", post(CHUNKED, b"3\r\nabcd\r\n0\r\n\r\n"), (400,)),
    Exchange("a size that ends in a line feed", post(CHUNKED, b"3\nabc\r\n0\r\n\r\n"), (400,), nginx=(201, 200)),
    Exchange(
        "long trailers", post(CHUNKED, CHUNKS + b"X: " + b"a" * 120_000 + b"\r\n\r\n"), (431,), nginx=(201, 200)
    ),
    Exchange(
        "a long extension",
        post(CHUNKED, b"3;" + b"a" * 120_000 + b"\r\nabc\r\n0\r\n\r\n"),
        (431,),
        nginx=(201, 200),
    ),
    Exchange("a body asked for", sized(headers=b"Expect: 100-continue\r\n"), (201, 200), nginx=(100, 201, 200)),
    Exchange("a body not asked for", post(LENGTH + b"Expect: 100-continue\r\n", b"", b"/nothing"), (404,)),
    Exchange("something else expected", sized(headers=b"Expect: tea\r\n"), (417,), nginx=(201, 200)),
    Exchange("a body too large", post(b"Content-Length: 1048577\r\n", b"a"), (413,)),
    Exchange(
        "chunks too large",
        post(CHUNKED, 33 * (b"8000\r\n" + b" " * 0x8000 + b"\r\n") + b"0\r\n\r\n"),
        (413,),
        nginx=(201, 200),
    ),
    Exchange(
        "a long body of GET", get(b"GET /orders HTTP/1.1", HOST + LONG) + b"a" * 100_000, (200, 200), (201, 200)
    ),
    Exchange("a longer one", get(b"GET /orders HTTP/1.1", HOST + LONGER) + b"a" * 900_000, (200, 200), (201, 200)),
    Exchange("a body that nobody reads", sized(target=b"/nothing") + GET, (404, 200, 200)),
    Exchange("chunks that nobody reads", post(CHUNKED, CHUNKS + b"\r\n", b"/nothing") + GET, (404, 200, 200)),
    Exchange("a long body that nobody reads", sized(b"a" * 3_000_000, b"/nothing"), (404,), nginx=(413,)),
    Exchange("a body of GET", b"GET /healthz HTTP/1.1\r\n" + HOST + LENGTH + b"\r\n" + PEN, (200, 200)),
    # Other protocols are not spoken, and what was asked for by the way is answered.
    Exchange("an upgrade", get(headers=HOST + UPGRADE), (200, 200)),
    Exchange("an upgrade, and more", get(headers=HOST + UPGRADE) + GET, (200, 200, 200)),
    Exchange("an upgrade with a body", sized(headers=UPGRADE) + GET, (201, 200, 200)),
    Exchange("an upgrade with chunks", post(UPGRADE + CHUNKED, CHUNKS + b"\r\n") + GET, (201, 200, 200)),
    Exchange("an upgrade to HTTP/2", sized(headers=UPGRADE.replace(b"websocket", b"h2c")), (201, 200)),
    # What cannot be read behind what can.
    Exchange("nonsense behind a request", GET + b"\x00\x00", (200, 400)),
    Exchange(
        "a method that nobody knows behind a request",
        GET + get(b"FOO /healthz HTTP/1.1"),
        (200, 501),
        nginx=(200, 405, 200),
    ),
    Exchange(
        "a method that nobody knows behind an order",
        sized() + get(b"FOO /healthz HTTP/1.1"),
        (201, 501),
        nginx=(201, 405, 200),
    ),
    Exchange(
        "a method that nobody knows behind many",
        b"\r\n" + GET + sized() + post(CHUNKED, CHUNKS + b"\r\n") + GET + b"\r\n" + get(b"FOO /healthz HTTP/1.1"),
        (200, 201, 201, 200, 501),
        nginx=(200, 201, 201, 200, 405, 200),
    ),
    Exchange("nonsense behind an order", sized() + b"\x00\x00", (201, 400)),
    Exchange("bytes beyond a body", sized() + b"abc", (201, 501), nginx=(201, 400)),
)
