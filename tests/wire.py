"""Requests as bytes on a socket: for what no HTTP client sends, and for many at the same instant."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

#: Seconds that an answer may take before the test fails.
ANSWER_SECONDS_MAX = 30.0


class Answer(NamedTuple):
    """An answer as it came; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)


def request(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    """Return a request that asks to close; `_` in a header's name stands for `-`. A body of None is left out."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b"")


def connect(url: str, source: str = "") -> socket.socket:
    """Return a connection to the service at `url`, from this address of the machine's if one is given."""
    address = urlsplit(url)
    place, bound = (address.hostname or "", address.port or 80), (source, 0) if source else None
    connection = socket.create_connection(place, ANSWER_SECONDS_MAX, bound)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_answer(connection: socket.socket) -> Answer:
    """Read until the service closes the connection."""
    received = b""
    while part := connection.recv(65_536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return Answer(int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}, body)


def exchange(url: str, raw: bytes) -> Answer:
    """Send bytes and return the answer."""
    with connect(url) as connection:
        connection.sendall(raw)
        return read_answer(connection)


def burst(url: str, requests: Sequence[bytes]) -> list[Answer]:
    """Send each request on a connection of its own, all before any answer is read."""
    connections = [connect(url) for _ in requests]
    try:
        for connection, raw in zip(connections, requests, strict=True):
            connection.sendall(raw)
        return [read_answer(connection) for connection in connections]
    finally:
        for connection in connections:
            connection.close()
