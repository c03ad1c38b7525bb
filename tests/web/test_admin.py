"""Seeding and resetting, behind the admin password; populate, for anyone."""

from __future__ import annotations

import base64
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from serving import ADMIN_PASSWORD, Serving, environment


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


#: The three ways to give the password: headers, and fields of the body.
WAYS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "header": ({"X-Admin-Password": ADMIN_PASSWORD}, {}),
    "basic": (basic("admin", ADMIN_PASSWORD), {}),
    "basic, any user": (basic("", ADMIN_PASSWORD), {}),
    "body": ({}, {"admin_password": ADMIN_PASSWORD}),
}
WRONG: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "nothing": ({}, {}),
    "wrong header": ({"X-Admin-Password": "guess"}, {}),
    "empty header": ({"X-Admin-Password": ""}, {}),
    "longer header": ({"X-Admin-Password": ADMIN_PASSWORD + "!"}, {}),
    "wrong basic": (basic("admin", "guess"), {}),
    "password as user": (basic(ADMIN_PASSWORD, ""), {}),
    "not base64": ({"Authorization": "Basic !!!"}, {}),
    "not UTF-8": ({"Authorization": "Basic " + base64.b64encode(b"a:\xff").decode()}, {}),
    "bearer": ({"Authorization": f"Bearer {ADMIN_PASSWORD}"}, {}),
    "wrong body": ({}, {"admin_password": "guess"}),
    "empty body": ({}, {"admin_password": ""}),
}


def total(service: Serving) -> int:
    count: int = service.client.get("/orders").json()["total"]
    return count


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("way", WAYS)
def test_the_password_opens_seed(idle_service: Serving, way: str, slash: str) -> None:
    """With the password in any of the three places /admin/seed makes as many orders as asked for."""
    before = total(idle_service)
    headers, fields = WAYS[way]
    answer = idle_service.client.post("/admin/seed" + slash, json={"count": 3, **fields}, headers=headers)

    assert (answer.status_code, answer.history) == (201, [])
    assert answer.json()["count"] == 3
    assert total(idle_service) == before + 3


@pytest.mark.parametrize("way", WAYS)
def test_the_password_opens_reset(idle_service: Serving, way: str) -> None:
    """With the password in any of the three places /admin/reset removes every order and says how many."""
    idle_service.client.post("/orders", json={"user_id": 1, "item_ids": [1]})
    before = total(idle_service)
    headers, fields = WAYS[way]
    answer = idle_service.client.post("/admin/reset", json=fields, headers=headers)

    assert (answer.status_code, answer.json()["deleted"]) == (200, before)
    assert total(idle_service) == 0


@pytest.mark.parametrize("path", ["/admin/seed", "/admin/reset"])
@pytest.mark.parametrize("way", WRONG)
def test_a_wrong_password_is_401(idle_service: Serving, path: str, way: str) -> None:
    """Without the right password an admin call is a 401 with WWW-Authenticate, and does nothing."""
    idle_service.client.post("/orders", json={"user_id": 1, "item_ids": [1]})
    before = total(idle_service)
    headers, fields = WRONG[way]
    # An address of its own: one that guesses too often is refused.
    headers = headers | {"X-Forwarded-For": f"192.0.2.{list(WRONG).index(way)}"}
    answer = idle_service.client.post(path, json=fields, headers=headers)

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert answer.headers["content-type"] == "application/problem+json"
    assert ADMIN_PASSWORD not in answer.text
    assert total(idle_service) == before


def test_without_a_password_set_admin_calls_are_403(payment_service: Serving) -> None:
    """Where ADMIN_PASSWORD is not set every admin call is a 403, whatever password is given."""
    answers = [
        payment_service.client.post(path, json=fields, headers=headers)
        for path in ("/admin/seed", "/admin/reset")
        for headers, fields in [*WAYS.values(), WRONG["nothing"], WRONG["empty header"], WRONG["empty body"]]
    ]

    assert {answer.status_code for answer in answers} == {403}
    assert {answer.headers["content-type"] for answer in answers} == {"application/problem+json"}


def test_seed_makes_100_orders_by_itself(idle_service: Serving) -> None:
    """Without a body /admin/seed makes 100 orders."""
    before = total(idle_service)
    answer = idle_service.client.post("/admin/seed", headers=WAYS["header"][0])

    assert (answer.status_code, answer.json()["count"]) == (201, 100)
    assert total(idle_service) == before + 100


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"count": 0}, "/count"),
        ({"count": -1}, "/count"),
        ({"count": "5"}, "/count"),
        ({"count": 1.5}, "/count"),
        ({"count": 100_001}, "/count"),
        ({"count": 1, "fast": True}, "/fast"),
        ({"admin_password": 7}, "/admin_password"),
    ],
)
def test_a_seed_without_sense_is_422(idle_service: Serving, body: dict[str, Any], field: str) -> None:
    """A count that is none, or an unknown field, is named by its pointer."""
    answer = idle_service.client.post("/admin/seed", json=body, headers=WAYS["header"][0])

    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]


def test_after_a_reset_nothing_is_left(idle_service: Serving) -> None:
    """After /admin/reset an order that was just read is 404, the lists are empty, and every counter is 0."""
    client = idle_service.client
    order_id = client.post("/orders", json={"user_id": 1, "item_ids": [1]}).json()["order_id"]
    client.get(f"/orders/{order_id}")
    client.get("/orders")
    client.post("/admin/reset", headers=WAYS["header"][0])

    assert client.get(f"/orders/{order_id}").status_code == 404
    assert client.get("/orders").json()["orders"] == []
    metrics = client.get("/orders/metrics", params={"getOrderIds": "true"}).json()
    assert metrics["total_orders"] == 0
    assert set(metrics["order_status_counts"].values()) == {0}
    assert metrics["pending"] == {"count": 0, "order_ids": []}
    queue = client.get("/orders/status").json()
    assert (queue["ready"], queue["pending"], queue["oldest_age_seconds"]) == (0, [], None)


def test_seeded_orders_are_worked_off(service: Serving) -> None:
    """Orders made by /admin/seed are paid and completed like any others."""
    service.client.post("/admin/seed", json={"count": 20}, headers=WAYS["header"][0])
    seeded = service.client.get("/orders", params={"limit": 20}).json()["orders"]

    ends = [service.until_rest(order["order_id"]) for order in seeded]

    assert {(order["status"], order["payment_status"]) for order in ends} == {("completed", "paid")}


@pytest.mark.parametrize("path", ["/orders/populate", "/orders/populate/", "/api/v1/orders/populate"])
def test_populate_needs_no_password(idle_service: Serving, path: str) -> None:
    """Populate makes as many orders as asked for, under a batch id of the caller's or of its own."""
    before = total(idle_service)
    batch_id = f"friday{path.replace('/', '.')}"
    named = idle_service.client.post(path, json={"total_entries": 2, "batch_id": batch_id}).json()
    unnamed = idle_service.client.post(path, json={"total_entries": 1}).json()

    assert named["batch_id"] == batch_id
    assert unnamed["batch_id"]
    assert (named["success_count"], named["failure_count"], named["errors"]) == (2, 0, [])
    assert total(idle_service) == before + 3


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "/total_entries"),
        ({"total_entries": 0}, "/total_entries"),
        ({"total_entries": 10_001}, "/total_entries"),
        ({"total_entries": "4"}, "/total_entries"),
        ({"total_entries": 1, "batch_id": ""}, "/batch_id"),
        ({"total_entries": 1, "batch_id": 7}, "/batch_id"),
        ({"total_entries": 1, "x": 1}, "/x"),
    ],
)
def test_a_populate_without_sense_is_422(idle_service: Serving, body: dict[str, Any], field: str) -> None:
    """Populate wants a whole number of entries, and names what is wrong."""
    answer = idle_service.client.post("/orders/populate", json=body)

    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]


@pytest.mark.parametrize(
    ("path", "status"), [("/", None), ("/health", "healthy"), ("/healthz", "ok"), ("/readyz", "ok")]
)
def test_the_service_says_how_it_is(idle_service: Serving, path: str, status: str | None) -> None:
    """The index, health, liveness and readiness answer 200 with a word."""
    answer = idle_service.client.get(path)

    assert answer.status_code == 200
    assert answer.json().get("status") == status


def test_health_names_each_dependency(idle_service: Serving) -> None:
    """Health has a verdict with its reason for each dependency, and says how durable an accepted order is."""
    health = idle_service.client.get("/health").json()

    assert health["durability"] == "power-safe"
    assert {"database", "cache", "queue", "payment_gateway"} <= health["dependencies"].keys()
    assert all(part["status"] == "ok" and part["detail"] for part in health["dependencies"].values())


def test_the_password_is_in_no_log(idle_service: Serving) -> None:
    """Neither the right password nor a wrong one that was given appears in the log."""
    idle_service.client.post("/admin/seed", json={"count": 1, "admin_password": ADMIN_PASSWORD})
    idle_service.client.post("/admin/seed", json={"count": 1}, headers={"X-Admin-Password": "guessed-word"})

    assert not any(word in line for line in idle_service.log for word in (ADMIN_PASSWORD, "guessed-word"))


def test_verify_says_that_every_law_holds_and_names_what_breaks_one(folder: Path) -> None:
    """/admin/verify looks at the whole database of a running service; a breach is said with its order."""
    with Serving(folder, "--no-workers", ADMIN_PASSWORD=ADMIN_PASSWORD) as service:
        order = {"order_id": "A1", "customer_id": "c", "items": [{"item_id": "i", "quantity": 1, "price": 1}]}
        service.client.post("/orders", json=order)
        assert service.client.post("/admin/verify").status_code == 401
        whole = service.client.post("/admin/verify", headers=WAYS["header"][0])
        assert (whole.status_code, whole.json()["status"]) == (200, "done")
        assert (whole.json()["orders"], whole.json()["found"]) == (1, 0)
        with closing(sqlite3.connect(folder / "orders.db", isolation_level=None)) as raw:
            raw.execute("CREATE TABLE taken AS SELECT * FROM jobs")
            raw.execute("DELETE FROM jobs")
            broken = service.client.post("/admin/verify", headers=WAYS["header"][0]).json()
            raw.execute("INSERT INTO jobs SELECT * FROM taken")
        assert broken["found"] == 2
        assert "A1" in {breach["order_id"] for breach in broken["breaches"]}


def test_verify_on_the_command_line(folder: Path) -> None:
    """`expediter verify` looks beside the running service, and exits with 1 where a law is broken."""
    with Serving(folder, "--no-workers") as service:
        order = {"order_id": "A1", "customer_id": "c", "items": [{"item_id": "i", "quantity": 1, "price": 1}]}
        service.client.post("/orders", json=order)
        for statement, status, said in (
            ("CREATE TABLE taken AS SELECT * FROM jobs", 0, "1 orders, 0 breaches of the laws"),
            ("DELETE FROM jobs", 1, "A1: it is pending and pending, not at rest, and has no job"),
            ("INSERT INTO jobs SELECT * FROM taken", 0, "1 orders, 0 breaches of the laws"),
        ):
            with closing(sqlite3.connect(folder / "orders.db")) as raw, raw:
                raw.execute(statement)
            ended = subprocess.run(
                [sys.executable, "-m", "expediter", "verify"],
                cwd=folder,
                env=environment(folder),
                capture_output=True,
                text=True,
            )
            assert (ended.returncode, said in ended.stdout) == (status, True), ended


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_password_beyond_ascii_fits_the_header(folder: Path, encoding: str) -> None:
    """As clients send it: curl in UTF-8, some libraries in Latin-1; another one is refused in both."""
    with Serving(folder, "--no-workers", ADMIN_PASSWORD="Ölweg 7") as service:
        for password, status in (("Ölweg 7", 200), ("Ölweg 8", 401)):
            headers = {b"X-Admin-Password": password.encode(encoding)}
            assert service.client.post("/admin/reset", headers=headers).status_code == status
