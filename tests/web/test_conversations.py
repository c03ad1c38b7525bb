"""HTTP/1.1 in steps: what is answered before all has been said, and to clients that say no more."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
from exchanges import CHUNKED, GET, HOST, JSON, LAST, PEN, get, post, sized

from auditing import wait_until
from expediter.web.http import Body, Call, Reply
from expediter.web.server.heads import head as answer_head
from serving import Serving
from wire import Answer, connect

STREAM = b"Accept: text/event-stream\r\n"


def end_its_side(connection: socket.socket) -> None:
    """Say that no more will come, and go on listening."""
    connection.shutdown(socket.SHUT_WR)


def reset(connection: socket.socket) -> None:
    """Go without a word: a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service without workers: nothing but answers."""
    with Serving(tmp_path_factory.mktemp("here"), "--no-workers") as running:
        yield running


def until(connection: socket.socket, end: bytes) -> bytes:
    """Return what is received up to and with `end`."""
    received = b""
    while not received.endswith(end):
        part = connection.recv(1)
        assert part, received
        received += part
    return received


def head(connection: socket.socket) -> Answer:
    """Return an answer without its body."""
    first, *lines = until(connection, b"\r\n\r\n").decode().strip().split("\r\n")
    pairs = (line.partition(": ") for line in lines)
    return Answer(int(first.split()[1]), {name: value for name, _, value in pairs}, b"")


def answer(connection: socket.socket) -> Answer:
    """Return an answer on a connection that may stay open."""
    begun = head(connection)
    body = b""
    while len(body) < int(begun.headers["content-length"]):
        body += connection.recv(int(begun.headers["content-length"]) - len(body))
    return begun._replace(body=body)


def rest(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def test_a_refusal_does_not_wait_for_the_body(here: Serving) -> None:
    """What is refused by its head is answered before its body has come; the next request follows the body."""
    with connect(here.url) as connection:
        request = sized(target=b"/nothing")
        connection.sendall(request[:-20])
        assert answer(connection).status == 404
        connection.sendall(request[-20:] + GET)
        assert answer(connection).status == 200


def test_a_body_is_asked_for_once_it_is_wanted(here: Serving) -> None:
    """`Expect: 100-continue` is answered with 100 where the body is read, and with the refusal where it is not."""
    asking = b"Expect: 100-continue\r\n"
    for wanted in (b"Content-Length: %d\r\n" % len(PEN), CHUNKED):
        with connect(here.url) as connection:
            connection.sendall(post(wanted + asking, b""))
            assert head(connection).status == 100
            connection.sendall(PEN if wanted != CHUNKED else b"%x\r\n%b\r\n0\r\n\r\n" % (len(PEN), PEN))
            assert answer(connection).status == 201
            connection.sendall(GET)
            assert answer(connection).status == 200
    for length, target, status in ((2_000_000, b"/orders", 413), (len(PEN), b"/nothing", 404)):
        with connect(here.url) as connection:
            connection.sendall(post(b"Content-Length: %d\r\n" % length + asking, b"", target))
            refused = answer(connection)
            assert (refused.status, refused.headers["connection"]) == (status, "close")
            assert rest(connection) == b""
    with connect(here.url) as connection:
        connection.sendall(post(b"Content-Length: %d\r\n" % len(PEN) + asking, b"", version=b"1.0"))
        connection.sendall(PEN)
        assert answer(connection).status == 201, "HTTP/1.0 knows of no 100"


def test_whoever_says_no_more_still_listens(here: Serving) -> None:
    """A client that has ended its side gets the answer that it waits for, and then the end."""
    order_id = here.client.post("/orders", json=json.loads(PEN)).json()["order_id"]
    with connect(here.url) as connection:
        connection.sendall(get(b"GET /orders/%b?wait=1 HTTP/1.1" % order_id.encode()) + GET)
        connection.shutdown(socket.SHUT_WR)
        assert answer(connection).json()["order_id"] == order_id
        assert answer(connection).status == 200
        assert rest(connection) == b""


def test_a_reader_that_leaves_gives_up_its_place(folder: Path) -> None:
    """A wait for an order or for events ends with its reader: the access log has it long before its time is up."""
    log = folder / "access.log"
    with Serving(folder, "--no-workers", ACCESS_LOG_FILE=str(log)) as service:
        order_id = service.client.post("/orders", json=json.loads(PEN)).json()["order_id"]
        for number, goes in enumerate((end_its_side, reset, socket.socket.close)):
            for waits in (f"/orders/{order_id}?wait=30", "/api/v1/events?after=now&wait=30"):
                target = f"{waits}&_={number}"
                began = time.monotonic()
                connection = connect(service.url)
                connection.sendall(get(b"GET %b HTTP/1.1" % target.encode()))
                assert service.client.get("/healthz").status_code == 200, "the wait has begun"
                goes(connection)
                wait_until(lambda target=target: target in log.read_text())
                assert time.monotonic() - began < 20, target
                connection.close()


def test_what_a_client_that_left_has_written_is_carried_out(here: Serving) -> None:
    """An order whose client is gone before the answer is stored."""
    connection = connect(here.url)
    connection.sendall(sized(json.dumps({**json.loads(PEN), "order_id": "left"}).encode()))
    connection.close()
    wait_until(lambda: here.client.get("/orders/left").status_code == 200)


def test_answers_come_in_the_order_of_the_requests(here: Serving) -> None:
    """A quick request behind one that waits is answered after it."""
    order_id = here.client.post("/orders", json=json.loads(PEN)).json()["order_id"]
    with connect(here.url) as connection:
        connection.sendall(get(b"GET /orders/%b?wait=0.5 HTTP/1.1" % order_id.encode()) + GET + b"\x00")
        assert answer(connection).json()["order_id"] == order_id
        assert answer(connection).json() == {"status": "ok"}
        assert answer(connection).status == 400
        assert rest(connection) == b""


def test_many_requests_at_once_are_all_answered(here: Serving) -> None:
    """5,000 requests that are sent before any answer is read are answered, in bounded pieces."""
    with connect(here.url) as connection:
        connection.sendall(5_000 * GET + LAST)
        assert rest(connection).count(b"HTTP/1.1 200 OK\r\n") == 5_001


@pytest.mark.parametrize(
    ("begun", "status"),
    [
        (b"GET /" + 100_000 * b"a", 414),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + 100_000 * b"a", 431),
        (post(CHUNKED, b"3;" + 100_000 * b"a"), 431),
        (post(CHUNKED, b"0\r\nX: " + 100_000 * b"a"), 431),
    ],
    ids=["a target", "a header", "an extension", "a trailer"],
)
def test_what_does_not_end_is_refused_while_it_comes(here: Serving, begun: bytes, status: int) -> None:
    """Nothing that a client may make long is kept for longer than its limit: it is refused before its end."""
    with connect(here.url) as connection:
        connection.sendall(begun)
        assert answer(connection).status == status
        assert rest(connection) == b""


def test_a_stream_comes_in_chunks_or_until_the_end(here: Serving) -> None:
    """In HTTP/1.1 a streamed answer has chunks; in HTTP/1.0, and only there, its end is that of the connection."""
    with connect(here.url) as connection:
        connection.sendall(get(b"GET /api/v1/events HTTP/1.1", HOST + STREAM))
        assert head(connection).headers["transfer-encoding"] == "chunked"
        size = int(until(connection, b"\r\n"), 16)
        assert until(connection, b"\n\n\r\n").startswith(b": expediter\n")
        assert size > 10
    with connect(here.url) as connection:
        connection.sendall(get(b"GET /api/v1/events HTTP/1.0", STREAM + b"Connection: keep-alive\r\n"))
        headers = head(connection).headers
        assert "transfer-encoding" not in headers
        assert headers["connection"] == "close"
        assert until(connection, b"\n\n").startswith(b": expediter\n")
    with connect(here.url) as connection:
        connection.sendall(get(b"HEAD /api/v1/events HTTP/1.1", HOST + STREAM) + LAST)
        assert head(connection).status == 200
        assert head(connection).status == 200


def test_a_stream_has_an_end(folder: Path) -> None:
    """Where the service stops it ends its streams as they are to end: a client can tell that from a broken one."""
    with Serving(folder, "--no-workers") as service, connect(service.url) as connection:
        connection.sendall(get(b"GET /api/v1/events HTTP/1.1", HOST + STREAM))
        until(connection, b"\n\n\r\n")
        assert service.stop() == 0
        assert rest(connection).endswith(b"\n\n\r\n0\r\n\r\n")


def test_no_header_can_become_two() -> None:
    """A line break in the value of a header would begin another one, or the body: no such answer is sent."""
    call = Call("GET", b"/", [], Body())
    for value in (b"a\r\nx: b", b"a\nb", b"a\rb"):
        with pytest.raises(ValueError, match="line break"):
            answer_head(call, Reply(200, b"", [(b"location", value)]), 0)


def test_every_answer_has_its_date(here: Serving) -> None:
    """The time of the answer is in it, to the second."""
    for target in (b"/healthz", b"/nothing", b"/orders"):
        with connect(here.url) as connection:
            before = int(time.time())
            connection.sendall(get(b"GET %b HTTP/1.1" % target))
            said = parsedate_to_datetime(answer(connection).headers["date"]).timestamp()
            assert before <= said <= time.time()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (get(headers=HOST + b"X: a\r\n b\r\n"), 400),
        (get(headers=b""), 400),
        (get(b"GET /%b HTTP/1.1" % (b"a" * 9000)), 414),
        (sized(headers=b"Expect: tea\r\n"), 417),
        (get(headers=HOST + b"X: " + b"a" * 40_000 + b"\r\n"), 431),
        (get(b"FOO / HTTP/1.1"), 501),
        (post(b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"), 501),
        (get(b"GET / HTTP/2.0"), 505),
        (post(b"Content-Length: 1048577\r\n", b""), 413),
        (b"PUT /orders HTTP/1.1\r\n" + HOST + JSON + b"Content-Length: 2\r\n\r\n{}", 405),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_what_cannot_be_read_is_refused_by_a_document(here: Serving, sent: bytes, status: int) -> None:
    """Whatever is wrong with a request, its refusal is a problem document with the id under which it is found."""
    with connect(here.url) as connection:
        connection.sendall(sent)
        refused = answer(connection)
    problem = refused.json()
    assert (refused.status, problem["status"]) == (status, status)
    assert refused.headers["content-type"] == "application/problem+json"
    assert problem["error"]
    assert problem["request_id"] == refused.headers["x-request-id"]
