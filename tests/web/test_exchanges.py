"""HTTP/1.1 byte by byte, at this service and at nginx: what is answered, in what order, and what stays open."""

from __future__ import annotations

import re
import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

import pytest
from exchanges import EXCHANGES, LAST, Exchange

from proxying import NGINX_VERSION, nginx, nginx_version
from serving import Serving
from wire import connect

#: Bytes of the longest exchange that is cut at each of them.
CUT_BYTES_MAX = 600
#: Connections that are open at once while exchanges are cut: all of their bodies have room (BODIES_BYTES_MAX).
CUT_AT_ONCE = 60

AS_HERE = """
    client_max_body_size 1m;
    lingering_timeout 200ms;
    location = /healthz { if ($request_method !~ ^(GET|HEAD)$) { return 405; } return 200 "{}"; }
    location = / { return 200 "{}"; }
    location = /orders { return 201 "{}"; }
    location / { return 404; }
"""

_LENGTH = re.compile(rb"^content-length: *(\d+)", re.I | re.M)


def answers_in(received: bytes, methods: list[bytes]) -> list[int]:
    """Return the status of each answer in what was received until the end; none may be cut short."""
    found = []
    while received:
        head, gap, received = received.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 "):
            return [*found, 9]  # HTTP/0.9 has no head
        assert gap, head
        status = int(head[9:12])
        found.append(status)
        if status < 200:
            continue
        method = methods.pop(0) if methods else b""
        length = _LENGTH.search(head)
        size = int(length[1]) if length and method != b"HEAD" and status not in (204, 304) else 0
        assert len(received) >= size, (head, received)
        received = received[size:]
    return found


def until_end(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(65_536):
            parts.append(part)
    except ConnectionResetError:
        parts.append(b"\r\n\r\nreset")
    return b"".join(parts)


def methods_of(exchange: Exchange) -> list[bytes]:
    return [exchange.sent.lstrip()[:4].strip()]


def answers(url: str, exchange: Exchange) -> tuple[int, ...]:
    """Have an exchange, and return the status of each answer."""
    with connect(url) as connection:
        connection.sendall(exchange.sent if exchange.ends else exchange.sent + LAST)
        if exchange.ends:
            connection.shutdown(socket.SHUT_WR)
        return tuple(answers_in(until_end(connection), methods_of(exchange)))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service without workers: nothing but answers."""
    with Serving(tmp_path_factory.mktemp("here"), "--no-workers") as running:
        yield running


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an nginx that has the same paths."""
    if nginx_version() != NGINX_VERSION:
        pytest.skip(f"the table is of nginx {NGINX_VERSION}, and this is {nginx_version()}")
    with nginx(tmp_path_factory.mktemp("there"), AS_HERE) as url:
        yield url


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.name)
def test_an_exchange_is_answered_as_the_table_says(here: Serving, exchange: Exchange) -> None:
    """Each request has its answer, in order, and a connection stays open where the next request is certain."""
    assert answers(here.url, exchange) == exchange.answers


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.name)
def test_nginx_answers_as_the_table_says(there: str, exchange: Exchange) -> None:
    """What nginx does otherwise is in the table, and nothing else."""
    assert answers(there, exchange) == (exchange.nginx or exchange.answers)


def cuts(exchange: Exchange) -> Iterator[int]:
    """Give each place at which what is sent can be cut; long exchanges are cut at the ends of their lines."""
    if len(exchange.sent) <= CUT_BYTES_MAX:
        yield from range(1, len(exchange.sent))
    else:
        yield from (found.end() for found in re.finditer(rb"\r|\n|.\Z", exchange.sent[:-1]))


def settled(statuses: Sequence[int]) -> list[int]:
    """Return the statuses that do not depend on where a request is cut.

    A body that is on its way is not asked for, and where an unknown method begins behind it is not known.
    """
    return [400 if status == 501 else status for status in statuses if status != 100]


def test_no_cut_changes_an_answer(here: Serving) -> None:
    """Whatever arrives in two parts, and wherever it is cut, is answered as if it had arrived at once."""
    pieces = [(exchange, place) for exchange in EXCHANGES for place in cuts(exchange)]
    assert len(pieces) > 9_000
    wrong: dict[str, list[int]] = defaultdict(list)
    for start in range(0, len(pieces), CUT_AT_ONCE):
        with ExitStack() as stack:
            halves = [
                (each, place, stack.enter_context(connect(here.url)))
                for each, place in pieces[start:][:CUT_AT_ONCE]
            ]
            for exchange, place, connection in halves:
                connection.sendall(exchange.sent[:place])
            for _ in range(2):  # once a connection that came later is answered, all first parts were read
                assert here.client.get("/healthz").status_code == 200
            for exchange, place, connection in halves:
                with suppress(ConnectionError):  # it is refused, and closed
                    connection.sendall(exchange.sent[place:] + (b"" if exchange.ends else LAST))
                if exchange.ends:
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_WR)
            for exchange, place, connection in halves:
                found = answers_in(until_end(connection), methods_of(exchange))
                if settled(found) != settled(exchange.answers):
                    wrong[f"{exchange.name}: {found}"].append(place)
    assert not wrong
