"""HTTP as the programs speak it that people use: each places orders, none of its requests fails, none is lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import httpx2
import pytest
import requests

from proxying import haproxy, nginx, program
from serving import Serving

HERE = Path(__file__).resolve().parent
PEN = {"user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}
JSON = {"Content-Type": "application/json"}
#: Seconds that a program may take.
SECONDS_MAX = 120
#: Orders that one client places, by so many at once, and those that go through a proxy.
ORDERS, AT_ONCE, PROXIED = 200, 16, 1_000

UPSTREAM = """
    upstream orders {{ server {address}; keepalive 16; }}
    proxy_http_version 1.1;
    proxy_set_header Connection "";
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service without workers: nothing but answers."""
    with Serving(tmp_path_factory.mktemp("here"), "--no-workers") as running:
        yield running


def orders_at(service: Serving) -> int:
    return int(service.client.get("/orders?limit=1").json()["total"])


def said_by(*command: str, cwd: Path | None = None, **environment: str) -> str:
    """Run a program to its good end and return what it printed."""
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS_MAX, cwd=cwd, env={**os.environ, **environment}
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    "how",
    [
        (),
        ("-H", "Expect: 100-continue"),
        ("-H", "Transfer-Encoding: chunked"),
        ("--http1.0",),
        ("--http2",),
        ("--request-target", "http://a/orders"),
    ],
    ids=["plain", "asking first", "in chunks", "HTTP/1.0", "asking for HTTP/2", "with an address as target"],
)
def test_curl(here: Serving, how: tuple[str, ...]) -> None:
    """curl places two orders, the second on the connection of the first unless that speaks HTTP/1.0."""
    one = (*how, "-H", "Content-Type: application/json", "-d", json.dumps(PEN), "-o", "/dev/null")
    one = (*one, "-w", "%{http_code} %{num_connects}\n", f"{here.url}/orders")
    before = orders_at(here)
    said = said_by(program("curl", "curl"), "-sS", *one, "--next", "-sS", *one)
    assert said.splitlines() == ["201 1", "201 1" if "--http1.0" in how else "201 0"]
    assert orders_at(here) == before + 2


def test_curl_reads_the_refusal_of_a_body_that_it_still_sends(here: Serving, tmp_path: Path) -> None:
    """A body that is far too large is refused, and curl gets to see why."""
    large = tmp_path / "large"
    large.write_bytes(b"a" * 8_000_000)
    command = (program("curl", "curl"), "-sS", "-H", "Content-Type: application/json", "-H", "Expect:")
    for target in ("/orders", "/nothing"):
        said = said_by(*command, "--data-binary", f"@{large}", f"{here.url}{target}")
        assert json.loads(said)["status"] == {"/orders": 413, "/nothing": 404}[target]


def test_ab(here: Serving, tmp_path: Path) -> None:
    """ab keeps its HTTP/1.0 connections for all of its orders."""
    (tmp_path / "pen.json").write_text(json.dumps(PEN))
    before = orders_at(here)
    posted = ("-p", str(tmp_path / "pen.json"), "-T", "application/json", f"{here.url}/orders")
    said = said_by(
        program("ab", "apache2-utils"), "-q", "-k", "-l", "-n", str(ORDERS), "-c", str(AT_ONCE), *posted
    )
    counts = {name: int(count) for name, count in re.findall(r"^([A-Z][\w -]+):\s+(\d+)$", said, re.M)}
    assert (counts["Complete requests"], counts["Keep-Alive requests"]) == (ORDERS, ORDERS)
    assert counts["Failed requests"] == 0
    assert "Non-2xx responses" not in counts
    assert orders_at(here) == before + ORDERS


def test_wrk(folder: Path, tmp_path: Path) -> None:
    """wrk meets neither a refusal nor an error, also where it sends the next requests before the answers."""
    script = tmp_path / "pipelined.lua"
    script.write_text(
        "init = function(args)\n"
        "  local look = wrk.format('GET', '/healthz')\n"
        "  local head = {['Content-Type'] = 'application/json'}\n"
        f"  local order = wrk.format('POST', '/orders', head, [[{json.dumps(PEN)}]])\n"
        "  all = look .. order .. order .. look\n"
        "end\n"
        "request = function() return all end\n"
    )
    # Its own service: at its end it leaves orders behind that are not answered yet.
    with Serving(folder, "--no-workers") as service:
        said = said_by(program("wrk", "wrk"), "-t1", f"-c{AT_ONCE}", "-d1s", "-s", str(script), service.url)
        assert "Non-2xx" not in said
        assert "Socket errors" not in said
        assert orders_at(service) > AT_ONCE


async def place_by_aiohttp(url: str, count: int) -> list[int]:
    """Place orders over few connections and return the statuses."""
    waiting = iter(range(count))
    statuses = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:

        async def place() -> None:
            for _ in waiting:
                async with session.post(f"{url}/orders", json=PEN) as answer:
                    await answer.read()
                    statuses.append(answer.status)

        await asyncio.gather(*(place() for _ in range(AT_ONCE)))
    return statuses


async def test_aiohttp(here: Serving) -> None:
    """aiohttp places orders, and sends one whose length it does not know."""

    async def parts() -> AsyncIterator[bytes]:
        for part in (json.dumps(PEN)[:9], json.dumps(PEN)[9:]):
            yield part.encode()

    before = orders_at(here)
    assert await place_by_aiohttp(here.url, ORDERS) == [201] * ORDERS
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{here.url}/orders", data=parts(), headers=JSON, expect100=True) as answer,
    ):
        assert answer.status == 201
    assert orders_at(here) == before + ORDERS + 1


def test_httpx2_and_requests(here: Serving) -> None:
    """Both place orders one after the other, with and without a known length, and read what has no body."""

    def parts() -> Iterator[bytes]:
        yield json.dumps(PEN)[:9].encode()
        yield json.dumps(PEN)[9:].encode()

    before = orders_at(here)
    with httpx2.Client(base_url=here.url) as one, requests.Session() as other:
        for _ in range(20):
            assert one.post("/orders", json=PEN).status_code == 201
            assert one.post("/orders", content=parts(), headers=JSON).status_code == 201
            assert one.head("/orders").headers["content-length"] != "0"
            assert other.post(f"{here.url}/orders", json=PEN).status_code == 201
            assert other.post(f"{here.url}/orders", data=parts(), headers=JSON).status_code == 201
            assert other.head(f"{here.url}/orders").text == ""
    assert orders_at(here) == before + 80


def test_node(here: Serving) -> None:
    """Node's fetch places orders, streams some, follows the events, and hears why a long body is refused."""
    before = orders_at(here)
    said = json.loads(said_by(program("node", "nodejs"), str(HERE / "orders.mjs"), here.url, str(ORDERS)))
    assert said == {"statuses": {"201": ORDERS}, "refused": 413}
    assert orders_at(here) == before + ORDERS


def test_go(here: Serving, tmp_path: Path) -> None:
    """Go's client places orders, some in chunks, and some only once it is asked for their bodies."""
    before = orders_at(here)
    built = str(tmp_path / "orders")
    said_by(
        program("go", "golang-go"), "build", "-o", built, str(HERE / "orders.go"), cwd=tmp_path, GO111MODULE="off"
    )
    assert int(said_by(built, here.url, str(ORDERS))) == ORDERS
    assert orders_at(here) == before + ORDERS


def address(service: Serving) -> str:
    return service.url.removeprefix("http://")


async def test_behind_nginx(here: Serving, tmp_path: Path) -> None:
    """Through nginx, which keeps its connections to the service, every order arrives."""
    before = orders_at(here)
    passed = "location / { proxy_pass http://orders; }"
    with nginx(tmp_path, passed, UPSTREAM.format(address=address(here))) as url:
        assert await place_by_aiohttp(url, PROXIED) == [201] * PROXIED
    assert orders_at(here) == before + PROXIED


async def test_behind_haproxy(here: Serving, tmp_path: Path) -> None:
    """Through haproxy, which shares its connections to the service among clients, every order arrives."""
    before = orders_at(here)
    with haproxy(tmp_path, address(here)) as url:
        assert await place_by_aiohttp(url, PROXIED) == [201] * PROXIED
    assert orders_at(here) == before + PROXIED
