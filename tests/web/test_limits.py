"""What happens at the limits: requests that never end, pages that are too large, a database file that is gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving import Serving
from wire import connect, exchange

#: A request that announces a body and sends none of it.
NO_BODY = b"POST /orders HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Long: " + b"x" * 50_000, 431),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Half: ", 408),
        (NO_BODY, 408),
    ],
    ids=["headers without end", "half the headers", "no byte of the body"],
)
def test_a_request_that_does_not_end_is_refused(idle_service: Serving, sent: bytes, status: int) -> None:
    """Headers that are too long are 431 while they arrive; a client that falls silent is 408; both are closed."""
    answer = exchange(idle_service.url, sent)
    assert answer.status == answer.json()["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"


def test_an_incomplete_request_is_not_carried_out(idle_service: Serving) -> None:
    """A cancellation whose announced body never came changes nothing."""
    body = {"order_id": "half", "user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}
    assert idle_service.client.post("/orders", json=body).status_code == 201
    with connect(idle_service.url) as connection:
        connection.sendall(b"POST /orders/half/cancel HTTP/1.1\r\nHost: a\r\nContent-Length: 400\r\n\r\n")
    assert idle_service.client.get("/healthz").status_code == 200
    assert idle_service.client.get("/orders/half").json()["status"] == "pending"


def test_an_over_long_row_of_a_batch_is_refused_alone(idle_service: Serving) -> None:
    """A line of more than 1 MiB gets a 413 of its own, and the rows around it are stored."""
    good = b'{"user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}'
    lines = [good, b'{"metadata": {"a": "' + b"x" * (1024 * 1024) + b'"}}', good, b"", good]
    answer = idle_service.client.post(
        "/orders/batch", content=b"\r\n".join(lines), headers={"Content-Type": "application/x-ndjson"}
    )
    assert [json.loads(line)["status"] for line in answer.text.splitlines()] == [202, 413, 202, 202]


def test_a_refusal_names_a_hundred_faults_at_most(idle_service: Serving) -> None:
    """A body with thousands of faults is refused with the first hundred."""
    body = {"user_id": 1, "items": [{"name": "Pen", "quantity": 0}] * 2000}
    answer = idle_service.client.post("/orders", json=body)
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == 100


def test_a_page_that_would_be_too_large_is_cut(folder: Path) -> None:
    """A page of very long orders ends early; by cursor none is passed over, by number the client is told."""
    with Serving(folder, "--no-workers") as service:
        items = [{"name": "x" * 450, "quantity": 1}] * 2000
        for number in range(6):
            body = {"order_id": f"long-{number}", "user_id": 1, "items": items}
            assert service.client.post("/orders", json=body).status_code == 201
        seen: list[str] = []
        pages = 0
        cursor: dict[str, str] = {}
        while True:
            page = service.client.get("/orders", params={"limit": "6", **cursor}).json()
            pages += 1
            seen += [order["order_id"] for order in page["orders"]]
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}
        assert seen == [f"long-{number}" for number in reversed(range(6))]
        assert pages > 1
        assert service.client.get("/orders", params={"page": "1", "page_size": "6"}).status_code == 422


def test_a_database_file_that_is_gone_takes_no_orders(folder: Path) -> None:
    """When the file is removed under the service orders are refused with 503, and /health says why."""
    body = {"user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}
    with Serving(folder, "--no-workers") as service:
        assert service.client.post("/orders", json=body).status_code == 201
        for name in ("orders.db", "orders.db-wal", "orders.db-shm"):
            (folder / name).unlink(missing_ok=True)
        refused = service.client.post("/orders", json=body)
        assert refused.status_code == 503
        assert "gone" in refused.json()["error"]
        assert not (folder / "orders.db").exists()
        health = service.client.get("/health")
        assert health.status_code == 503
        assert "gone" in health.json()["dependencies"]["database"]["detail"]
