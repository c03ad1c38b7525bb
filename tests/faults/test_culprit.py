"""An order at which the database server breaks off: it fails alone, again and again, and the others go on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from auditing import wait_until
from servers import PostgresServer, RedisServer
from serving import Program, Serving
from storing import Place

ORDERS = 60


def make_a_culprit(at: Place) -> None:
    """Have the server end the session of whoever stores an order of `culprit`."""
    at.change(
        "CREATE FUNCTION break_off() RETURNS trigger AS "
        "'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END' LANGUAGE plpgsql"
    )
    at.change(
        "CREATE TRIGGER break_off BEFORE INSERT ON orders FOR EACH ROW WHEN (NEW.customer_id = 'culprit') "
        "EXECUTE FUNCTION break_off()"
    )


def an_order(number: int) -> dict[str, object]:
    customer = "culprit" if number == ORDERS // 2 else "c"
    items = [{"item_id": "i", "quantity": 1, "price": 1}]
    return {"order_id": f"ORD-{number}", "customer_id": customer, "items": items}


def test_whoever_is_placed_beside_it_is_stored(postgresql: PostgresServer, folder: Path) -> None:
    """It is answered 503 each time; the others need to come back a few times at most."""
    at = Place(postgresql.new_database(), postgresql)
    with Serving(folder, DATABASE_URL=at.address) as service:
        make_a_culprit(at)

        def place(number: int) -> bool:
            status = service.client.post("/orders", json=an_order(number)).status_code
            assert status in (201, 409, 503)
            return status != 503

        def insist(number: int) -> None:
            if number == ORDERS // 2:
                assert not any(place(number) for _ in range(20))
            else:
                wait_until(lambda: place(number))

        with ThreadPoolExecutor(ORDERS) as clients:
            list(clients.map(insist, range(ORDERS)))
        wait_until(lambda: service.client.get("/health").json()["status"] == "healthy")
        assert service.client.get(f"/orders/ORD-{ORDERS // 2}").status_code == 404
        wait_until(lambda: at.rows("SELECT count(*) FROM orders WHERE status = 'completed'")[0][0] == ORDERS - 1)
        assert len(service.log) < 20 * ORDERS


def test_a_worker_puts_it_aside(postgresql: PostgresServer, redis_server: RedisServer, folder: Path) -> None:
    """Queued, it comes in one message with others: these are stored, and it is put among the dead."""
    at = Place(postgresql.new_database(), postgresql)
    url = redis_server.new_database()
    queued = {"DATABASE_URL": at.address, "INTAKE": "queued", "REDIS_URL": url, "BROKER_URL": url}
    with Serving(folder, "--no-workers", **queued) as door:
        make_a_culprit(at)
        with ThreadPoolExecutor(20) as clients:
            placed = clients.map(lambda number: door.client.post("/orders", json=an_order(number)), range(ORDERS))
            assert {answer.status_code for answer in placed} == {202}
        worker = Program(folder, "work", **queued)
        try:
            wait_until(
                lambda: at.rows("SELECT count(*) FROM orders WHERE status = 'completed'")[0][0] == ORDERS - 1
            )
            wait_until(lambda: door.client.get(f"/orders/ORD-{ORDERS // 2}").status_code == 409)
            answer = door.client.get(f"/orders/ORD-{ORDERS // 2}").json()
            assert "the database fails at it, and at nothing else" in answer["error"]
            assert door.client.post("/orders", json=an_order(ORDERS)).status_code == 202
            wait_until(lambda: door.client.get(f"/orders/ORD-{ORDERS}").json()["status"] == "completed")
        finally:
            worker.kill()
        assert len(worker.log) < 4 * ORDERS
