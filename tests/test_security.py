"""What SECURITY.md says: each test that it names exists; and those of its rows that have no other place."""

from __future__ import annotations

import ast
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest

from expediter.settings import load_settings
from expediter.web import create_app
from expediter.web.context import Context
from expediter.web.http import Body, Call, answered
from serving import Serving

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
#: What would change something, or show more, if it were read as SQL.
INJECTED = (
    "'; DROP TABLE orders; --",
    "x' OR '1'='1",
    '" OR ""="',
    "\\'; SELECT 1; --",
    "%",
    "_",
    "$1",
    ":id",
    "?",
)


def rows() -> Iterator[tuple[str, list[str]]]:
    """Give what each row of the threat model says is tried, and the tests that it names."""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if len(cells) == 6 and not set(cells[1]) & set("-") and cells[2] != "what they try":
            yield cells[2], re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cells[4])


def test_the_threat_model_names_tests_that_exist() -> None:
    """Each row has a test at least, and each is a function of the file that is named."""
    found = dict(rows())
    assert len(found) > 15
    for tried, named in found.items():
        assert named, tried
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert name in tests, f"{file} has no {name}"
    assert len(re.findall(r"`tests/[^`]+`", PAGE)) == sum(map(len, found.values())), "a name is not read as one"


def test_by_default_only_this_machine_is_listened_to(idle_service: Serving) -> None:
    """Without HOST the service has one listening socket, on the loopback address."""
    listening = [
        each.laddr.ip
        for each in psutil.Process(idle_service.process.pid).net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]
    assert idle_service.url.startswith("http://127.0.0.1:")
    with pytest.raises(OSError, match=r"refused|unreachable|assign"):
        socket.create_connection(("127.0.0.2", int(idle_service.url.rpartition(":")[2])), 5).close()


async def test_a_bug_shows_its_request_id_and_nothing_else() -> None:
    """An error that nobody foresaw, here of a service without a database, is a 500 that tells nothing of it."""
    app = create_app(
        cast(Context, SimpleNamespace(settings=load_settings(), draining=False, ring=SimpleNamespace(asks=False)))
    )
    for method, target in (("GET", b"/orders"), ("GET", b"/orders/a"), ("POST", b"/orders/a/cancel")):
        call = Call(method, target, [], Body())
        reply = await answered(app(call))
        problem = json.loads(reply.body)
        said = f"Something went wrong here, not with your request; it is logged as {call.request_id}"
        assert problem.pop("detail") == problem.pop("error") == said
        assert problem == {
            "type": "about:blank",
            "title": "Internal error",
            "status": 500,
            "request_id": call.request_id,
        }
        assert (b"x-request-id", call.request_id.encode()) in reply.headers


def test_sql_in_a_value_is_a_value(idle_service: Serving) -> None:
    """A customer of any name has their own orders and no others, and everything is still there."""
    client = idle_service.client
    for customer in INJECTED:
        body = {
            "customer_id": customer,
            "items": [{"name": customer, "quantity": 1}],
            "metadata": {customer: customer},
        }
        placed = client.post("/orders", json=body, headers={"Idempotency-Key": customer.replace(" ", "")})
        assert placed.status_code == 201, placed.text
        assert placed.json()["metadata"] == {customer: customer}
    for customer in INJECTED:
        page = client.get("/orders", params={"customer_id": customer}).json()
        assert [order["items"][0]["name"] for order in page["orders"]] == [customer]
    assert client.get("/orders").json()["total"] == len(INJECTED)
    for path in ("/orders/x'%20OR%20'1'='1", "/orders?status=pending'--", "/orders?cursor=';--"):
        assert client.get(path).status_code in (404, 422)


def test_a_page_of_a_stranger_gets_nothing(idle_service: Serving) -> None:
    """Without CORS_ORIGINS no answer may be read by a page of another origin, and none may ask for more."""
    stranger = {"Origin": "https://stranger.example"}
    for method, path in (("GET", "/orders"), ("GET", "/orders/nobody"), ("POST", "/orders")):
        answer = idle_service.client.request(method, path, headers=stranger)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    asked = {**stranger, "Access-Control-Request-Method": "DELETE"}
    answer = idle_service.client.options("/orders/nobody", headers=asked)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers
