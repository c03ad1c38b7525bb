"""Sends all that `bad_rows.py` has to a running service, and prints what was expected and what came.

    python tests/bad_input.py http://127.0.0.1:8000 --password "open sesame"

It needs Python alone. It places a few orders there. The exit status is 1 if an answer is another than expected.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from bad_rows import Row, all_rows, call, head

#: Seconds in which something must come from the service: more than its longest limit, on a slow machine.
SILENCE_SECONDS_MAX = 60.0
#: Connections that are open at once.
AT_ONCE = 8
#: Sent behind each row: where it is answered, the connection was left open.
LAST = head("GET /healthz", b"Host: bad-input\r\nConnection: close\r\n")
#: What a refusal may never show.
LEAK = re.compile(rb"Traceback|File \"|\.py\b|msgspec|sqlite3|asyncpg|asyncmy")

#: What makes the description of an answer, by its status.
_HEADERS = {
    401: ("www-authenticate",),
    405: ("allow",),
    412: ("etag",),
    415: ("accept", "accept-encoding"),
    429: ("retry-after",),
    503: ("retry-after",),
}


class Answered(NamedTuple):
    """One answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """Describe it in short, with all that is wrong with it."""
        if "x-request-id" not in self.headers:
            return f"{self.status} by {self.headers.get('server', 'nobody').partition('/')[0]}"
        found = str(self.status)
        if self.headers.get("content-type") == "application/x-ndjson":
            return f"{found} rows: {_verdicts([json.loads(line) for line in self.body.splitlines()])}"
        if self.status < 400:
            batch = json.loads(self.body) if b'"results"' in self.body else {}
            return f"{found} rows: {_verdicts(batch['results'])}" if batch else found
        return " ".join([found, *self._details()])

    def _details(self) -> Iterator[str]:
        if LEAK.search(self.body):
            yield "LEAKS"
        if self.headers.get("content-type") != "application/problem+json":
            yield "NO PROBLEM DOCUMENT"
            return
        problem: dict[str, Any] = json.loads(self.body)
        if problem.get("status") != self.status or not problem.get("title") or not problem.get("error"):
            yield "BAD PROBLEM DOCUMENT"
        if problem.get("request_id") != self.headers["x-request-id"]:
            yield "ANOTHER REQUEST ID"
        if self.status == 422 and "errors" in problem:
            yield from dict.fromkeys(error["field"] or "''" for error in problem["errors"])
        if problem.get("title") == "Illegal transition":
            yield f"legal: {', '.join(problem.get('legal', [])) or 'none'}"
        for name in _HEADERS.get(self.status, ()):
            if name in self.headers:
                yield f"{name}: {', '.join(sorted(self.headers[name].split(', ')))}"


def _verdicts(rows: Sequence[dict[str, Any]]) -> str:
    return " ".join(str(row["status"]) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Send everything, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument(
        "--behind-nginx", action="store_true", help="nginx stands before it, with its own defaults"
    )
    parser.add_argument("--password", help="of the administrator: then admin calls are made, too")
    parser.add_argument("--without-slow", action="store_true", help="leave out what takes ten seconds")
    given = parser.parse_args(arguments)
    order_id = order_at_rest(given.address)
    rows = [
        row
        for row in all_rows(given.password)
        if not row.half or not (given.without_slow or (given.behind_nginx and not row.behind))
    ]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = list(threads.map(lambda row: outcome(given.address, row, order_id, given.behind_nginx), rows))
    wrong = 0
    print(f"| input | expected | actual |{'':<4}\n| --- | --- | --- |")
    for row, actual in zip(rows, found, strict=True):
        expected = row.behind if given.behind_nginx and row.behind is not None else direct(row, given.behind_nginx)
        differs = actual != expected
        wrong += differs
        print(f"| {row.input} | {expected} | {actual} |{'  <-- DIFFERS' if differs else ''}")
    print(f"{len(rows)} inputs, {wrong} answered otherwise than expected", file=sys.stderr)
    return 1 if wrong else 0


def direct(row: Row, behind_nginx: bool) -> str:
    """Return what is expected; whether nginx closes a connection is its own affair."""
    return row.expected.removesuffix("; closes") if behind_nginx else row.expected


def outcome(address: str, row: Row, order_id: str, behind_nginx: bool) -> str:
    """Send a row, and describe what came."""
    sent = row.sent.replace(b"{order}", order_id.encode())
    if b'"order_id": "{order}"' in row.sent:
        at = sent.index(b"\r\n\r\n") + 4
        sent = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(sent[at:]), sent)
    try:
        answers = exchange(address, sent if row.half else sent + LAST)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    open_still = not row.half and len(answers) > 1 and answers[-1].status == 200 and b"ok" in answers[-1].body
    if open_still:
        answers.pop()
    text = ", ".join(answer.text for answer in answers)
    return text if open_still or behind_nginx else f"{text}; closes"


def exchange(address: str, sent: bytes) -> list[Answered]:
    """Send bytes, and return every answer that comes before the end of the connection."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname or "", place.port or 80), SILENCE_SECONDS_MAX) as connection:
        received = b""
        with suppress(ConnectionError):  # what is refused before all was sent has its answer nevertheless
            connection.sendall(sent)
        with suppress(ConnectionError):
            while part := connection.recv(65_536):
                received += part
    return list(answers_in(received))


def answers_in(received: bytes) -> Iterator[Answered]:
    """Part what was received into answers. Raises ValueError for what is cut short."""
    while received:
        begin, gap, received = received.partition(b"\r\n\r\n")
        first, *lines = begin.decode("latin-1").split("\r\n")
        found = re.fullmatch(r"HTTP/1\.1 (\d{3}) .*", first)
        if not gap or found is None:
            raise ValueError(f"no answer: {begin[:60]!r}")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status, size = int(found[1]), int(headers.get("content-length", "0"))
        if status == 100:
            continue
        if len(received) < size:
            raise ValueError(f"an answer is cut short: {begin[:60]!r}")
        yield Answered(status, headers, received[:size])
        received = received[size:]


def order_at_rest(address: str) -> str:
    """Place an order and cancel it: nothing happens to it any more."""
    (placed,) = exchange(
        address,
        call(
            '{"user_id": 1, "item_ids": [1]}', headers=b"Connection: close\r\nContent-Type: application/json\r\n"
        ),
    )
    order_id: str = json.loads(placed.body)["order_id"]
    exchange(address, head(f"POST /orders/{order_id}/cancel", b"Host: bad-input\r\nConnection: close\r\n"))
    return order_id


if __name__ == "__main__":
    sys.exit(main())
