"""The access log: what a line says, what it never says, and that it holds up nobody."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from test_cli import ORDER, assert_refused, run
from test_drain import read_to_end, sockets_address

from auditing import wait_until
from expediter.errors import ConfigurationError
from expediter.web.http import Body, Call, Header, Reply
from expediter.web.server.access_log import (
    ATOMS,
    VALUE_BYTES_MAX,
    WAITING_BYTES_MAX,
    Exchange,
    access_log,
    compile_format,
)
from serving import Serving

#: A line of the default format.
DEFAULT_LINE = re.compile(
    r'127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d \+0000\] "([^"]*)" (\d{3}) (\d+) (\d+)'
)

#: Every atom, separated so that a line can be taken apart again.
EVERY_ATOM = "|".join([f"%({name})s" for name in ATOMS] + ["%({X-Shop}i)s", "%({Content-Type}o)s", "%%"])


def exchange(target: bytes = b"/orders", headers: Sequence[Header] = (), client: str = "10.0.0.7") -> Exchange:
    call = Call("GET", target, list(headers), Body(), client=client)
    return Exchange(call, Reply(200), arrived=1_750_000_000.7, seconds=0.0123456, size=17)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_for_lines(path: Path, count: int) -> list[str]:
    wait_until(lambda: len(lines_of(path)) >= count)
    return lines_of(path)


def send_raw(url: str, head: bytes) -> bytes:
    with socket.create_connection(sockets_address(url), timeout=30) as connection:
        connection.sendall(head + b"\r\nHost: test\r\nConnection: close\r\n\r\n")
        return read_to_end(connection)


def test_each_request_is_a_line(folder: Path) -> None:
    """In the default format a line has the address, the time, the request, the status, the bytes and the time."""
    with Serving(folder, ACCESS_LOG_FILE="access.log") as service:
        body = service.client.get("/orders?limit=3").content
        service.client.head("/orders/")
        service.client.post("/orders", json={})
        service.client.get("/nowhere")
        assert service.stop() == 0
    lines = [line for line in lines_of(folder / "access.log") if "/readyz" not in line]
    found = [DEFAULT_LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    said = [(match[1], match[2]) for match in found if match]
    assert said == [
        ("GET /orders?limit=3 HTTP/1.1", "200"),
        ("HEAD /orders/ HTTP/1.1", "200"),
        ("POST /orders HTTP/1.1", "422"),
        ("GET /nowhere HTTP/1.1", "404"),
    ]
    sizes = [int(match[3]) for match in found if match]
    assert sizes[0] == len(body)
    assert sizes[1] == 0, "to HEAD no body is sent"


def test_no_file_no_log(folder: Path) -> None:
    """Without ACCESS_LOG_FILE nothing is written."""
    with Serving(folder) as service:
        service.client.get("/health")
        service.stop()
    assert "GET /health" not in "\n".join(service.log)
    assert not [path for path in folder.iterdir() if "access" in path.name]


async def test_without_a_log_nobody_is_told() -> None:
    """Off, the log costs nothing: there is nothing to be told of an answer."""
    async with access_log("", "%(h)s") as note:
        assert note is None


def test_the_log_may_be_stderr(folder: Path) -> None:
    """`-` writes the lines to stderr, the last ones too."""
    with Serving(folder, ACCESS_LOG_FILE="-") as service:
        service.client.get("/health?verbose")
        assert service.stop() == 0
    assert [line for line in service.log if "GET /health?verbose" in line]


def test_every_atom_has_its_value(folder: Path) -> None:
    """A custom format with every atom is filled in from the request and its answer."""
    with Serving(folder, ACCESS_LOG_FILE="access.log", ACCESS_LOG_FORMAT=EVERY_ATOM) as service:
        headers = {"Referer": "https://shop.test/", "User-Agent": "till/7", "X-Shop": "Köln".encode("latin-1")}
        answer = service.client.post("/orders?", json=ORDER, headers=headers)
        assert answer.status_code == 201
        pid = service.process.pid
        assert service.stop() == 0
    line = next(line for line in lines_of(folder / "access.log") if "POST" in line)
    values = dict(zip([*ATOMS, "X-Shop", "Content-Type", "%"], line.split("|"), strict=True))
    size = str(len(answer.content))
    assert (
        values.items()
        >= {
            "h": "127.0.0.1",
            "l": "-",
            "u": "-",
            "r": "POST /orders HTTP/1.1",
            "m": "POST",
            "U": "/orders",
            "q": "",
            "H": "HTTP/1.1",
            "s": "201",
            "B": size,
            "b": size,
            "f": "https://shop.test/",
            "a": "till/7",
            "T": "0",
            "p": f"<{pid}>",
            "X-Shop": "K\\xf6ln",
            "Content-Type": "application/json",
            "%": "%",
        }.items()
    )
    assert int(values["D"]) // 1000 == int(values["M"])
    assert abs(float(values["L"]) * 1_000_000 - int(values["D"])) <= 1


def test_times_and_nothings() -> None:
    """Times are in gunicorn's units, the date is that of arrival in UTC, and what is missing is a dash."""
    line = compile_format("%(t)s %(T)s %(M)s %(D)s %(L)s %(f)s %(a)s %({x-shop}i)s %({etag}o)s")
    assert line(exchange()) == "[15/Jun/2025:15:06:40 +0000] 0 12 12345 0.012346 - - - -\n"
    empty = exchange(client="")
    empty.size = 0
    assert compile_format("%(h)s %(s)s %(B)s %(b)s")(empty) == "- 200 0 -\n"


@pytest.mark.parametrize(
    ("sent", "written"),
    [
        (b'x" 200 0 0', r"x\" 200 0 0"),
        (b"x\\", r"x\\"),
        (b"x\r\n127.0.0.1 - -", r"x\x0d\x0a127.0.0.1 - -"),
        (b"\x1b[2J\x00\x7f\x9b\xe2\x80\xa8", r"\x1b[2J\x00\x7f\x9b\xe2\x80\xa8"),
        (b"a" * (VALUE_BYTES_MAX + 7), "a" * VALUE_BYTES_MAX),
    ],
)
def test_what_a_client_sends_stays_in_its_field(sent: bytes, written: str) -> None:
    """Quotes, backslashes, control characters and all but ASCII are escaped, wherever a client can put them."""
    asked = exchange(b"/?" + sent, [(b"user-agent", sent), (b"referer", sent), (b"x", sent)])
    for atom in ("%(q)s", "%(a)s", "%(f)s", "%({x}i)s"):
        assert compile_format(atom)(asked) == f"{written}\n"
    line = compile_format("%(r)s %(U)s")(exchange(b"/" + sent))
    assert line.count("\n") == 1
    assert written[: VALUE_BYTES_MAX - 1] in line


def test_a_line_cannot_be_forged(folder: Path) -> None:
    """A request line and headers made to look like log lines stay within one line of their own."""
    with Serving(folder, ACCESS_LOG_FILE="access.log", ACCESS_LOG_FORMAT='"%(r)s" %(s)s "%(a)s"') as service:
        head = b'GET /orders/x%0a"y HTTP/1.1\r\nUser-Agent: a"b\\c\td\xe9'
        assert send_raw(service.url, head).startswith(b"HTTP/1.1 404 ")
        assert service.stop() == 0
    (line,) = [line for line in lines_of(folder / "access.log") if "/orders" in line]
    assert line == r'"GET /orders/x%0a\"y HTTP/1.1" 404 "a\"b\\c\x09d\xe9"'


def test_secrets_are_not_written(folder: Path) -> None:
    """Passwords and keys in headers are a dash in the log, whatever the format asks for."""
    names = ("X-Admin-Password", "authorization", "Cookie", "X-Api-Key", "Proxy-Authorization")
    form = " ".join(f"%({{{name}}}i)s" for name in names) + " %(u)s %(r)s"
    with Serving(folder, ACCESS_LOG_FILE="access.log", ACCESS_LOG_FORMAT=form, ADMIN_PASSWORD="sesame") as service:
        headers = {name: "sesame" for name in names} | {"Authorization": "Basic c2VzYW1lOnNlc2FtZQ=="}
        assert service.client.post("/admin/seed", json={"count": 1}, headers=headers).status_code == 201
        assert service.stop() == 0
    lines = lines_of(folder / "access.log")
    assert "- - - - - - POST /admin/seed HTTP/1.1" in lines
    assert "sesame" not in "\n".join(lines + service.log)


def test_a_renamed_log_is_begun_anew(folder: Path) -> None:
    """After a rename, as log rotation does it, the next lines are in a new file and none is lost."""
    log = folder / "access.log"
    with Serving(folder, ACCESS_LOG_FILE=str(log), ACCESS_LOG_FORMAT="%(U)s") as service:
        service.client.get("/orders/before")
        wait_until(lambda: "/orders/before" in lines_of(log))
        log.rename(folder / "access.log.1")
        service.client.get("/orders/after")
        wait_until(lambda: "/orders/after" in lines_of(log))
        log.unlink()
        service.client.get("/orders/removed")
        assert service.stop() == 0
    assert lines_of(log) == ["/orders/removed"]
    assert "/orders/before" in lines_of(folder / "access.log.1")
    assert "/orders/after" not in lines_of(folder / "access.log.1")


def test_processes_share_one_file(folder: Path) -> None:
    """Several processes write to one file, line by line, and every request is there once."""
    settings = {"ACCESS_LOG_FILE": "access.log", "ACCESS_LOG_FORMAT": "%(p)s %(U)s end"}
    with Serving(folder, "--workers", "2", **settings) as service:

        def ask(number: int) -> int:
            return httpx2.get(f"{service.url}/orders/n-{number}", timeout=30).status_code

        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(ask, range(80))) == {404}
        assert service.stop() == 0
    found = [re.fullmatch(r"<(\d+)> (\S+) end", line) for line in lines_of(folder / "access.log")]
    assert all(found)
    paths = [match[2] for match in found if match and match[2] != "/readyz"]
    assert sorted(paths) == sorted(f"/orders/n-{number}" for number in range(80))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_fails_no_request(folder: Path) -> None:
    """While the log cannot be written requests are answered, and one warning says so."""
    with Serving(folder, ACCESS_LOG_FILE="/dev/full") as service:
        service.wait_for("access log cannot be written.*No space left")
        assert [service.client.post("/orders", json=ORDER).status_code for _ in range(5)] == [201] * 5
        assert service.stop() == 0
    assert "\n".join(service.log).count("cannot be written") == 1


async def test_what_waits_is_bounded_and_written_later(folder: Path) -> None:
    """A log that nobody can write keeps so many bytes and no more, and writes them when it can again."""
    folder = folder / "logs"
    folder.mkdir()
    path = folder / "access.log"
    line = "x" * VALUE_BYTES_MAX

    asked = exchange(b"/?" + line.encode()).call
    async with access_log(str(path), "%(q)s") as note:
        assert note is not None
        folder.rename(folder.with_name("away"))
        for _ in range(2 * WAITING_BYTES_MAX // VALUE_BYTES_MAX):
            note(asked, Reply(200), 0)
        folder.with_name("away").rename(folder)
    lines = lines_of(path)
    assert set(lines) == {line}
    assert len(lines) == WAITING_BYTES_MAX // (VALUE_BYTES_MAX + 1)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ("%(h)s %(z)s", "%(z)s"),
        ("%(h)s %({X-Shop}e)s", "%({X-Shop}e)s"),
        ("%({}i)s", "%({}i)s"),
        ("%()s", "%()s"),
        ("%h %l", "'%h"),
        ("%(h)d", "'%(h)d"),
        ("100%", "'%'"),
        ("%(h)s\n%(r)s", "control character"),
    ],
)
def test_a_broken_format_is_refused(form: str, named: str) -> None:
    """What cannot be understood in a format is named."""
    with pytest.raises(ConfigurationError, match=re.escape(named)) as refused:
        compile_format(form)
    assert "ACCESS_LOG_FORMAT" in str(refused.value)


def test_a_broken_format_ends_the_start(folder: Path) -> None:
    """`serve` with an unknown atom ends with exit 2 and names it, whether or not there is a file."""
    assert_refused(run(folder, "serve", ACCESS_LOG_FORMAT="%(z)s"), "ACCESS_LOG_FORMAT", "%(z)s")
    assert list(folder.iterdir()) == []


def test_a_file_that_cannot_be_opened_ends_the_start(folder: Path) -> None:
    """`serve` with a log in a folder that is not there ends with exit 2 and names it."""
    ended = run(folder, "serve", ACCESS_LOG_FILE="nowhere/access.log")
    assert_refused(ended, "ACCESS_LOG_FILE=nowhere/access.log", os.strerror(2))
