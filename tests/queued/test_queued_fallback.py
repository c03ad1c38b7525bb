"""INTAKE=queued without its database, its broker or its Redis, and when they are back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from auditing import rows, wait_until
from queueing import BURGER, PEN, Doors, order
from servers import DurableRedisServer, PostgresServer, RabbitServer, RedisServer
from storing import Place


@pytest.fixture(scope="module")
def mortal_postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL that tests may kill, if they start it again."""
    server = PostgresServer(tmp_path_factory.mktemp("mortal_postgresql"))
    yield server
    server.stop()


def health(client: httpx2.Client, part: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/health").json()["dependencies"][part]
    return found


def test_intake_goes_on_while_the_database_is_away(
    folder: Path, mortal_postgresql: PostgresServer, mortal_rabbitmq: RabbitServer, redis_server: RedisServer
) -> None:
    """With PostgreSQL killed orders are accepted and read, changes too; with the broker gone as well it is 503."""
    at = Place(mortal_postgresql.new_database(), mortal_postgresql)
    with ExitStack() as stack:
        doors = Doors(folder, stack, redis_server.new_database(), mortal_rabbitmq, DATABASE_URL=at.address)
        one, two = doors.clients
        known = doors.placed()
        slow = {"FULFILMENT_MOCK_LATENCY_MIN": "1500", "FULFILMENT_MOCK_LATENCY_MAX": "1500"}
        with doors.worker(**slow):
            doors.until(known, "completed")
            mortal_postgresql.kill()
            ids = [doors.placed(), *(doors.placed(BURGER) for _ in range(9))]
            assert all(doors.states(order_id) == {"pending"} for order_id in ids)
            assert two.post(f"/orders/{ids[0]}/cancel").status_code == 202
            assert [answer.json()["pending_changes"] for answer in doors.both(f"/orders/{ids[0]}")] == [1, 1]
            # Nobody can judge these now.
            assert one.post("/orders/NOBODY/cancel").status_code == 202
            assert one.post(f"/orders/{known}/cancel").status_code == 202
            assert two.post("/orders", json=order("TAKEN")).status_code == 202
            assert health(one, "database")["status"] == "down"
            mortal_postgresql.restart()
            doors.until(ids[0], "cancelled")
            for order_id in ids[1:]:
                doors.until(order_id, "completed")
            doors.until("TAKEN", "completed")
            wait_until(lambda: doors.states("NOBODY") == {"409"})
            assert "Order not found" in two.get("/orders/NOBODY").json()["error"]
            wait_until(lambda: "refused" in str(two.get(f"/orders/{known}").json()["last_error"]))
        # The id that belonged to no order is free.
        assert one.post("/orders", json=order("NOBODY")).status_code == 202
        mortal_postgresql.kill()
        mortal_rabbitmq.kill()
        neither = one.post("/orders", json=order())
        assert neither.status_code == 503
        mortal_postgresql.restart()
        wait_until(lambda: health(one, "database")["status"] == "ok")
        directly = one.post("/orders", json=order())
        assert directly.status_code == 201, directly.text
        for client in doors.clients:
            assert client.get(f"/orders/{directly.json()['order_id']}").status_code == 200
        assert "RabbitMQ" in health(one, "queue")["detail"]
        mortal_rabbitmq.restart()
        wait_until(lambda: health(one, "queue")["status"] == "ok")
        assert one.post("/orders", json=order()).status_code == 202


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_a_broker_that_goes_away_takes_no_accepted_order_along(
    folder: Path,
    kind: str,
    mortal_redis: DurableRedisServer,
    mortal_rabbitmq: RabbitServer,
    redis_server: RedisServer,
) -> None:
    """What waited in a broker that is killed is stored by any worker; a change before that is 503, never a 404."""
    rabbit = mortal_rabbitmq if kind == "rabbitmq" else None
    broker = mortal_rabbitmq if rabbit else mortal_redis
    with ExitStack() as stack:
        settings = {} if rabbit else {"BROKER_URL": mortal_redis.new_database()}
        doors = Doors(folder, stack, redis_server.new_database(), rabbit, **settings)
        one, two = doors.clients
        order_id, other = doors.placed(), doors.placed()
        broker.kill()
        assert two.get(f"/orders/{order_id}").status_code == 200
        statuses = set()

        def cancelled() -> bool:
            statuses.add(two.post(f"/orders/{order_id}/cancel").status_code)
            statuses.update(answer.status_code for answer in doors.both(f"/orders/{order_id}"))
            return 202 in statuses

        with doors.busy_worker_without_broker():
            wait_until(cancelled)
            assert statuses <= {200, 202, 503}, statuses
            assert doors.states(order_id) == {"cancelled"}
            assert one.post("/orders", json=order()).status_code == 201
            wait_until(lambda: one.get(f"/orders/{other}/events").status_code == 200)
            assert one.delete(f"/orders/{other}").status_code == 204
            assert doors.states(other) <= {"404", "503"}
        broker.restart()
        wait_until(lambda: health(one, "queue")["status"] == "ok" and health(two, "queue")["status"] == "ok")
        doors.apply()
        doors.drain()
        assert (doors.states(order_id), doors.states(other)) == ({"cancelled"}, {"404"})
        assert_sound_history(folder, order_id)


def assert_sound_history(folder: Path, order_id: str) -> None:
    types = rows(folder, "SELECT type FROM events WHERE order_id = ? ORDER BY number", order_id)
    assert types == [("order.placed",), ("order.cancelled",)]


def test_without_hints_orders_are_taken_in_and_come_to_rest(
    folder: Path, rabbitmq: RabbitServer, redis_server: RedisServer
) -> None:
    """RabbitMQ: where its queue of hints is another's, POST is 202, orders are found, health says it."""
    with ExitStack() as stack:
        queue = rabbitmq.new_queue()
        rabbitmq.query("", f"DECLARE {queue}.due")
        doors = Doors(folder, stack, redis_server.new_database(), rabbitmq, RABBITMQ_QUEUE_NAME=queue)
        one, two = doors.clients
        order_id = doors.placed()
        with doors.worker():
            doors.until(order_id, "completed")
            doors.until(doors.placed(), "completed")
        for client in (one, two):
            verdict = health(client, "queue")
            assert verdict["status"] == "degraded"
            assert "0 messages of queued commands wait, 0 are put aside; there are no hints" in verdict["detail"]
            assert "delete it" in verdict["detail"]
        rabbitmq.query("", f"DELETE {queue}.due")
        wait_until(lambda: health(one, "queue")["status"] == health(two, "queue")["status"] == "ok")


def test_without_redis_orders_are_stored_directly(
    folder: Path, mortal_redis: DurableRedisServer, rabbitmq: RabbitServer
) -> None:
    """With Redis killed POST is 201, /health says why, and it is 202 again by itself once Redis is back."""
    with ExitStack() as stack:
        doors = Doors(folder, stack, mortal_redis.new_database(), rabbitmq)
        one, two = doors.clients
        waiting = doors.placed()
        mortal_redis.kill()
        answer = one.post("/orders", json=order())
        assert answer.status_code == 201, answer.text
        assert two.get(f"/orders/{answer.json()['order_id']}").status_code == 200
        assert {found.status_code for found in doors.both(f"/orders/{waiting}")} == {503}
        assert two.post(f"/orders/{waiting}/cancel").status_code == 503
        assert "stored directly" in health(one, "queue")["detail"]
        mortal_redis.restart()
        wait_until(lambda: health(one, "queue")["status"] == "ok")
        assert one.post("/orders", json=order()).status_code == 202
        assert doors.states(waiting) == {"pending"}


@pytest.mark.parametrize("same", [True, False])
def test_a_key_whose_answer_cannot_be_asked_for_loses_no_accepted_order(
    folder: Path, mortal_redis: DurableRedisServer, same: bool
) -> None:
    """Redis hangs between two requests with one key: the same is one order, and of two different none is lost."""
    key = {"Idempotency-Key": "once"}
    with ExitStack() as stack:
        doors = Doors(folder, stack, mortal_redis.new_database(), None)
        one, two = doors.clients
        first = one.post("/orders", json=order(None, BURGER), headers=key)
        assert first.status_code == 202
        with mortal_redis.frozen():
            second = two.post("/orders", json=order(None, BURGER if same else PEN), headers=key)
            assert second.is_success, second.text
        ids = {answer.json()["order_id"] for answer in (first, second)}
        assert len(ids) == (1 if same else 2)
        with doors.worker():
            for order_id in ids:
                doors.until(order_id, "completed")
        again = one.post("/orders", json=order(None, BURGER), headers=key)
        assert again.status_code == (second.status_code if same else 422)
        assert sorted(ids) == sorted(row[0] for row in rows(folder, "SELECT order_id FROM orders"))


def test_a_key_whose_time_is_over_makes_another_order(folder: Path, redis_server: RedisServer) -> None:
    """The id of a queued order comes from its key; the same request after the key's time gets an id of its own."""
    key = {"Idempotency-Key": "again"}
    with ExitStack() as stack:
        doors = Doors(folder, stack, redis_server.new_database(), None)
        first = doors.clients[0].post("/orders", json=order(None, BURGER), headers=key)
        with doors.worker():
            doors.until(first.json()["order_id"], "completed")
        with closing(sqlite3.connect(folder / "orders.db", timeout=30)) as raw, raw:
            raw.execute("DELETE FROM idempotency_keys")
        redis.Redis.from_url(doors.settings["REDIS_URL"]).delete("idempotency:again")
        second = doors.clients[1].post("/orders", json=order(None, BURGER), headers=key)
        assert second.status_code == 202
        assert second.json()["order_id"] != first.json()["order_id"]
        with doors.worker():
            doors.until(second.json()["order_id"], "completed")
