"""Who may call: every scope against every call, keys that do not count, and the password beside them."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from auditing import wait_until
from expediter.store.keys import ApiKey, Holder, MadeKey
from expediter.store.scopes import Scope
from expediter.web import OPERATIONS, operations_document
from expediter.web.access import given_keys
from expediter.web.http import Body, Call
from serving import Serving
from storing import rows
from wire import exchange, request

#: What is in no alphabet of another: quotes, a colon, a backslash, letters beyond Latin-1 and beyond 16 bits.
PASSWORD = 'Öl: "密码" \\ß 🔑'
ADMIN = {b"X-Admin-Password": PASSWORD.encode()}
#: What may be called without a key: whatever is added here is open to every stranger.
OPEN = {("GET", path) for path in ("/", "/health", "/healthz", "/readyz", "/docs", "/redoc")} | {
    ("POST", f"/api/v1/payments/{who}") for who in ("callback", "stripe")
}
NEVER = "exp_" + "0" * 64


class Guarded(NamedTuple):
    """A service whose callers need a key, and a key for each scope."""

    service: Serving
    folder: Path
    keys: dict[Scope, str]

    def get(self, path: str = "/orders", **headers: str) -> httpx2.Response:
        return self.service.client.get(path, headers={n.replace("_", "-"): v for n, v in headers.items()})

    def make(self, name: str, *scopes: Scope, **more: Any) -> dict[str, Any]:
        """Make a key by the admin password, which needs none."""
        body = {"name": name, "scopes": scopes, **more}
        made = self.service.client.post("/admin/keys", json=body, headers=ADMIN)
        assert made.status_code == 201, made.text
        shown: dict[str, Any] = made.json()
        return shown


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A service with a key for each scope, which logs all it can."""
    folder = tmp_path_factory.mktemp("guarded")
    atoms = "%(r)s %({authorization}i)s %({x-api-key}i)s %({x-admin-password}i)s %(u)s"
    settings = {"LOG_LEVEL": "DEBUG", "ACCESS_LOG_FILE": "-", "ACCESS_LOG_FORMAT": atoms}
    with Serving(folder, "--no-workers", ADMIN_PASSWORD=PASSWORD, **settings) as service:
        found = Guarded(service, folder, {})
        found.keys.update({scope: found.make(scope, scope)["key"] for scope in Scope})
        yield found


CALLS = [(operation, path) for operation in OPERATIONS for path in operation.paths]


@pytest.mark.parametrize("scope", [None, *Scope])
def test_every_call_wants_its_scope(guarded: Guarded, scope: Scope | None) -> None:
    """With the scope, or `admin`, a call is judged by what it asks; without a key it is 401, with another 403."""
    headers = {} if scope is None else {"Authorization": f"Bearer {guarded.keys[scope]}"}
    wrong = []
    for operation, path in CALLS:
        where = re.sub(r"\{\w+\}", "nobody", path)
        answer = guarded.service.client.request(operation.method, where, headers=headers)
        challenge = answer.headers.get("www-authenticate", "")
        if operation.scope is None or scope in (operation.scope, Scope.ADMIN):
            fine = answer.status_code != 403 and not challenge
        elif scope is None:
            fine = answer.status_code == 401 and "Bearer" in challenge
        else:
            fine = answer.status_code == 403 and operation.scope in answer.json()["error"]
            fine = fine and f'scope="{operation.scope}"' in challenge
        if not fine:
            wrong.append(f"{operation.method} {path} by {scope}: {answer.status_code} {answer.text[:120]}")
    assert not wrong, "\n".join(wrong)


def test_what_is_open_is_what_is_meant_to_be() -> None:
    """No call is open to strangers but those that are listed here, and the document says the same of each."""
    assert {(each.method, path) for each, path in CALLS if each.scope is None} == OPEN
    paths = operations_document()["paths"]
    assert isinstance(paths, dict)
    for operation, path in CALLS:
        described = paths[path][operation.method.lower()]
        ways = {name for way in described["security"] for name in way}
        assert ways >= {"bearerKey", "headerKey"} if operation.scope else not ways
        assert operation.scope is None or f"one for `{operation.scope}`" in described["description"]


@pytest.mark.parametrize("path", ["/health", "/healthz", "/readyz", "/openapi.json", "/docs"])
def test_a_wrong_key_closes_nothing_that_is_open(guarded: Guarded, path: str) -> None:
    """A probe that sends a key of yesterday's still learns how the service is."""
    assert guarded.get(path, X_API_Key=NEVER).status_code == 200


def test_head_is_asked_for_a_key_like_get(guarded: Guarded) -> None:
    """What GET does not tell strangers, HEAD does not tell either."""
    assert guarded.service.client.head("/orders").status_code == 401


#: Ways to give the key R (for orders:read), and what is answered. W is another good key.
WAYS = {
    "bearer": (["authorization: Bearer R"], 200),
    "in small letters": (["authorization: bearer R"], 200),
    "several blanks": (["authorization:   Bearer   R  "], 200),
    "header of its own": (["x-api-key: R"], 200),
    "both the same": (["authorization: Bearer R", "x-api-key: R"], 200),
    "the same twice": (["x-api-key: R", "x-api-key: R"], 200),
    "beside another scheme": (["authorization: Basic OnA=", "x-api-key: R"], 200),
    "both, and different": (["authorization: Bearer R", "x-api-key: W"], 401),
    "two that are good": (["x-api-key: R", "x-api-key: W"], 401),
    "the second is none": (["authorization: Bearer R", "authorization: Bearer nothing"], 401),
    "nothing": ([], 401),
    "empty": (["x-api-key:"], 401),
    "no text": (["authorization: Bearer"], 401),
    "another scheme": (["authorization: Basic R"], 401),
    "no scheme": (["authorization: R"], 401),
    "two in one": (["x-api-key: R, R"], 401),
    "cut short": (["x-api-key: R-"], 401),
    "more behind it": (["x-api-key: R0"], 401),
    "in quotes": (['x-api-key: "R"'], 401),
    "not in UTF-8": (["x-api-key: \xff\xfe"], 401),
    "very long": ([f"x-api-key: exp_{'0' * 20_000}"], 401),
    "never made": ([f"x-api-key: {NEVER}"], 401),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_key_counts_as_it_was_made_and_no_other(guarded: Guarded, way: str) -> None:
    """In either header, once; whatever else comes is refused, and the refusal never repeats it."""
    lines, status = WAYS[way]
    read, write = guarded.keys[Scope.ORDERS_READ], guarded.keys[Scope.ORDERS_WRITE]
    sent = "\r\n".join(lines).replace("R-", read[:-1]).replace("R", read).replace("W", write)
    head = f"GET /orders HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{sent}"
    answer = exchange(guarded.service.url, head.rstrip("\r\n").encode("latin-1") + b"\r\n\r\n")
    assert answer.status == status, answer.body
    assert b"exp_0" not in answer.body and read.encode() not in answer.body
    if status == 401:
        assert answer.headers["www-authenticate"].startswith('Bearer realm="expediter"')
        assert ("invalid_token" in answer.headers["www-authenticate"]) == ("exp_" in sent or ":" in sent) or (
            way in ("another scheme", "no scheme")
        )


_VALUES = st.one_of(
    st.binary(max_size=12).filter(lambda raw: not set(raw) & set(b"\r\n\0")),
    st.sampled_from([b"A", b"B", b"Bearer A", b"bEARER\tB", b"Bearer", b" Bearer  A ", b"Basic A", b"BearerA"]),
)
_HEADERS = st.lists(st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"accept"]), _VALUES), max_size=4)


@given(headers=_HEADERS)
def test_no_headers_hide_a_second_key(headers: list[tuple[bytes, bytes]]) -> None:
    """Whatever comes in whatever order, each different key is found, and nothing else is taken for one."""
    found = given_keys(Call("GET", b"/orders", headers, Body()))
    wanted = set()
    for name, value in headers:
        words = value.strip().split(None, 1)
        if name == b"x-api-key":
            wanted.add(value.strip())
        elif name == b"authorization" and words and words[0].lower() == b"bearer":
            wanted.add(words[1].strip() if len(words) > 1 else b"")
    assert found == wanted


def test_a_key_ends_when_it_was_to_end(guarded: Guarded) -> None:
    """It counts until then; then it is refused like any other that does not count, without anybody's doing."""
    now = rows(guarded.folder, "SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '+2 seconds')")[0][0]
    made = guarded.make("short", Scope.ORDERS_READ, expires_at=now)
    assert guarded.get(X_API_Key=made["key"]).status_code == 200
    wait_until(lambda: guarded.get(X_API_Key=made["key"]).status_code == 401)
    past = {"name": "late", "scopes": ["admin"], "expires_at": "2020-01-01T00:00:00Z"}
    refused = guarded.service.client.post("/admin/keys", json=past, headers=ADMIN)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "/expires_at")


def test_a_key_is_shown_once_and_kept_by_its_hash_alone(guarded: Guarded) -> None:
    """Lists never show one, nor does the answer of a repeat; it is in no file of the database and in no log."""
    planted = guarded.keys[Scope.ORDERS_READ]
    body = {"name": "once", "scopes": ["webhooks"]}
    headers = {**ADMIN, b"Idempotency-Key": b"make-once"}
    first, again = (guarded.service.client.post("/admin/keys", json=body, headers=headers) for _ in range(2))
    secret = first.json()["key"]
    assert re.fullmatch("exp_[0-9a-f]{64}", secret)
    assert (again.status_code, again.headers["idempotency-replayed"]) == (201, "true")
    assert again.json() == {name: value for name, value in first.json().items() if name != "key"}
    listed = guarded.service.client.get("/admin/keys", headers=ADMIN)
    assert [each["name"] for each in listed.json()["keys"]].count("once") == 1
    guarded.get(X_API_Key=secret, Authorization=f"Bearer {planted}")
    guarded.get(Authorization=f"Basic {base64.b64encode(PASSWORD.encode()).decode()}")
    wait_until(lambda: any("GET /orders" in line for line in guarded.service.log))
    files = b"".join(path.read_bytes() for path in guarded.folder.glob("orders.db*"))
    for known in (secret, planted, PASSWORD):
        assert known not in listed.text
        assert known.encode() not in files
        assert not any(known in line or known[4:40] in line for line in guarded.service.log)


def test_what_may_be_logged_shows_no_key() -> None:
    """The values that carry a key, or what it is known by, leave it out of their repr."""
    key = ApiKey("key_1", "till", "d1ge57", (Scope.ADMIN,), 1)
    shown = f"{key!r} {MadeKey(key, 'exp_secret')!r} {Holder('key_1', b'd1ge57', frozenset(), 0.0)!r}"
    assert "secret" not in shown and "d1ge57" not in shown


def test_when_a_key_was_used_last_is_noted_once_a_minute(guarded: Guarded) -> None:
    """It shows soon after the first use, and the next uses within the minute do not change it."""
    made = guarded.make("noted", Scope.ORDERS_READ)

    def used() -> Any:
        keys = guarded.service.client.get("/admin/keys", headers=ADMIN).json()["keys"]
        return next(each["last_used_at"] for each in keys if each["id"] == made["id"])

    assert used() is None
    guarded.get(X_API_Key=made["key"])
    wait_until(lambda: used() is not None)
    first = used()
    other = guarded.make("noted too", Scope.ORDERS_READ)
    guarded.get(X_API_Key=made["key"])
    guarded.get(X_API_Key=other["key"])
    wait_until(lambda: rows(guarded.folder, _USED.format(other["id"]))[0][0] is not None)
    assert used() == first


_USED = "SELECT last_used_at FROM api_keys WHERE key_id = '{}'"


@pytest.mark.parametrize("way", ["header", "basic", "body", "body, short name"])
def test_the_password_opens_admin_calls_beside_keys(guarded: Guarded, way: str) -> None:
    """In each of its ways, with every letter in it; one letter less, and it is refused."""
    for password, status in ((PASSWORD, 201), (PASSWORD[1:], 401)):
        credentials = base64.b64encode(f"anna:{password}".encode())
        headers = {
            "header": {b"X-Admin-Password": password.encode()},
            "basic": {b"Authorization": b"Basic " + credentials},
        }.get(way, {})
        body = {"body": {"admin_password": password}, "body, short name": {"password": password}}.get(way, {})
        answer = guarded.service.client.post("/admin/seed", json={"count": 1, **body}, headers=headers)
        assert answer.status_code == status, answer.text
        assert status == 201 or "Basic" in answer.headers["www-authenticate"]


def test_a_stranger_s_body_is_not_waited_for(guarded: Guarded) -> None:
    """Who may not call is refused before the body has come."""
    raw = request("POST", "/orders", content_type="application/json", content_length="1000000")
    assert exchange(guarded.service.url, raw).status == 401
