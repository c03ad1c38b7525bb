"""Two serving processes with a cache in Redis between them, and a worker that is stopped past its lease."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from auditing import charges, gateway_with_ledger, wait_until, working
from servers import RedisServer, missing
from serving import Serving
from storing import Place, position, rows

#: Writes and reads on each database: a thousand in all.
TURNS = 340


def redis_cli(server: RedisServer, database: str, *words: str) -> str:
    """Return what an operator sees."""
    if shutil.which("redis-cli") is None:
        missing("redis-tools")
    run = subprocess.run(
        ["redis-cli", "-p", str(server.port), "-n", database, *words], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_what_one_read_has_shown_no_other_read_hides(folder: Path) -> None:
    """A change is stored, and the process that stored it is slow to notice: its cache shows nothing older."""
    slow = {"EXPEDITER_TEST_POINTS": "visible:pause:1:500"}
    with (
        Serving(folder, "--no-workers", **slow) as writer,
        Serving(folder, "--no-workers") as other,
        ThreadPoolExecutor(1) as pool,
    ):
        body = {"order_id": "A1", "user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}
        assert writer.client.post("/orders", json=body).is_success
        assert writer.client.get("/orders/A1").json()["status"] == "pending"
        assert writer.client.get("/orders").json()["orders"][0]["status"] == "pending"
        with httpx2.Client(base_url=writer.url, timeout=30) as client:
            changed = pool.submit(client.patch, "/orders/A1/status", json={"status": "processing"})
            wait_until(lambda: other.client.get("/orders/A1").json()["status"] == "processing")
            assert writer.client.get("/orders/A1").json()["status"] == "processing"
            assert writer.client.get("/orders").json()["orders"][0]["status"] == "processing"
            assert not changed.done(), "the writer has noticed too soon: this shows nothing"
            assert changed.result().is_success


def test_what_is_written_at_one_door_is_read_at_the_other(
    folder: Path, at: Place, redis_server: RedisServer
) -> None:
    """Hundreds of times a client writes at one process and reads at the other, and never sees an older version."""
    url = redis_server.new_database()
    database = url.rpartition("/")[2]
    settings = {"DATABASE_URL": at.address, "REDIS_URL": url}
    with (
        Serving(folder, "--no-workers", **settings) as one,
        Serving(folder, "--no-workers", **settings) as two,
    ):
        doors = (one.client, two.client)
        for number in range(TURNS):
            here, there = doors[number % 2], doors[1 - number % 2]
            order_id, step = f"A{number // 4}", number % 4
            if step == 0:
                body = {"order_id": order_id, "user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}
                answer = here.post("/orders", json=body)
            elif step < 3:
                status = "processing" if step == 1 else "completed"
                answer = here.patch(f"/orders/{order_id}/status", json={"status": status})
            else:
                assert here.delete(f"/orders/{order_id}").status_code == 204
                assert there.get(f"/orders/{order_id}").status_code == 404
                assert order_id not in {order["order_id"] for order in there.get("/orders").json()["orders"]}
                continue
            assert answer.is_success, answer.text
            written = answer.json()
            assert there.get(f"/orders/{order_id}").json() == {
                name: value for name, value in written.items() if name != "message"
            }
            assert there.get("/orders?limit=5").json()["orders"][0]["version"] == written["version"]
            if number % 97 == 0:
                redis_server.query(database, "FLUSHDB")
        for door in doors:
            assert door.get("/health").json()["dependencies"]["cache"]["status"] == "ok"


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_who_waits_at_one_door_hears_of_the_other(
    folder: Path, at: Place, redis_server: RedisServer, cached: bool
) -> None:
    """Forty readers wait at one process: each hears of the change that another makes, and of no other one."""
    settings = {"DATABASE_URL": at.address, **({"REDIS_URL": redis_server.new_database()} if cached else {})}
    ids = [f"A{number}" for number in range(40)]
    with (
        Serving(folder, "--no-workers", **settings) as one,
        Serving(folder, "--no-workers", **settings) as two,
        ThreadPoolExecutor(len(ids)) as pool,
    ):
        for order_id in ids:
            body = {"order_id": order_id, "user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}
            assert two.client.post("/orders", json=body).status_code == 201
        waiting = {
            order_id: pool.submit(
                httpx2.get, f"{one.url}/orders/{order_id}?wait=30", headers={"If-None-Match": '"1"'}, timeout=60
            )
            for order_id in ids
        }
        for order_id in ids[::2]:
            two.client.patch(f"/orders/{order_id}/status", json={"status": "processing"})
        for order_id in ids[::2]:
            assert waiting[order_id].result().json()["version"] == 2
        assert two.client.delete("/orders/A1").status_code == 204
        assert waiting["A1"].result().status_code == 404
        assert not any(waiting[order_id].done() for order_id in ids[3::2])
        for order_id in ids[3::2]:
            two.client.patch(f"/orders/{order_id}/status", json={"status": "processing"})
        assert {waiting[order_id].result().json()["version"] for order_id in ids[3::2]} == {2}


def test_an_operator_watches_the_cache(folder: Path, redis_server: RedisServer) -> None:
    """With redis-cli one sees the keys, what they hold, how long they live, and hits and misses."""
    url = redis_server.new_database()
    database = url.rpartition("/")[2]
    with Serving(folder, "--no-workers", REDIS_URL=url, ORDERS_CACHE_TTL="25") as service:
        body = {"order_id": "A1", "user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}
        placed = service.client.post("/orders", json=body).json()
        for _ in range(2):
            for path in ("/orders/A1", "/orders?limit=20&offset=0"):
                assert service.client.get(path).status_code == 200
            wait_until(lambda: redis_cli(redis_server, database, "EXISTS", "orders:detail:A1") == "1")
        version = redis_cli(redis_server, database, "GET", "orders:list:version")
        page = f"orders:list:{version}:20:0"
        wait_until(lambda: redis_cli(redis_server, database, "EXISTS", page) == "1")
        kept = json.loads(redis_cli(redis_server, database, "GET", "orders:detail:A1"))
        assert kept["version"] == 1 and kept["order"]["total_amount"] == placed["total_amount"]
        assert json.loads(redis_cli(redis_server, database, "GET", page))["orders"][0]["order_id"] == "A1"
        for key in ("orders:detail:A1", page):
            assert 0 < int(redis_cli(redis_server, database, "TTL", key)) <= 25
        wait_until(lambda: "hits\n2" in redis_cli(redis_server, database, "HGETALL", "orders:cache:stats"))
        assert "misses\n2" in redis_cli(redis_server, database, "HGETALL", "orders:cache:stats")
        assert "keyspace_hits:" in redis_cli(redis_server, database, "INFO", "stats")
        assert "2 hits, 2 misses" in service.client.get("/health").json()["dependencies"]["cache"]["detail"]
        service.client.patch("/orders/A1/status", json={"status": "cancelled"})
        assert redis_cli(redis_server, database, "GET", "orders:list:version") != version
        assert json.loads(redis_cli(redis_server, database, "GET", "orders:detail:A1"))["order"] is None


def test_without_reading_the_cache_a_process_still_tells_the_others(
    folder: Path, redis_server: RedisServer
) -> None:
    """CACHE_DISABLED=true at one process leaves the others nothing out of date."""
    settings = {"REDIS_URL": redis_server.new_database()}
    with (
        Serving(folder, "--no-workers", **settings) as cached,
        Serving(folder, "--no-workers", CACHE_DISABLED="true", **settings) as uncached,
    ):
        body = {"order_id": "A1", "user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}
        uncached.client.post("/orders", json=body)
        for status in ("processing", "completed"):
            for _ in range(3):
                cached.client.get("/orders/A1")
            uncached.client.patch("/orders/A1/status", json={"status": status})
            assert cached.client.get("/orders/A1").json()["status"] == status
        assert "0 hits" in uncached.client.get("/health").json()["dependencies"]["cache"]["detail"]


@pytest.mark.parametrize("broker", ["database", "redis"])
def test_a_worker_that_was_stopped_past_its_lease_commits_nothing(
    folder: Path, at: Place, redis_server: RedisServer, broker: str
) -> None:
    """A worker that wakes after its lease finds its orders taken over: each charged once, each step done once."""
    settings = {"DATABASE_URL": at.address, "PAYMENT_GATEWAY": gateway_with_ledger(folder), "LEASE_SECONDS": "1"}
    if broker == "redis":
        settings["BROKER_URL"] = redis_server.new_database()
    slow = {"PAYMENT_MOCK_LATENCY_MIN": "200", "PAYMENT_MOCK_LATENCY_MAX": "400"}
    with Serving(folder, "--no-workers", **settings) as service:
        with working(folder, **settings, **slow) as sleeper:
            service.client.post("/orders/populate", json={"total_entries": 40})
            wait_until(lambda: rows(at, "SELECT count(*) FROM payment_attempts")[0][0] >= 20)
            sleeper.process.send_signal(signal.SIGSTOP)
            try:
                with working(folder, **settings):
                    wait_until(lambda: rows(at, "SELECT count(*) FROM jobs") == [(0,)])
                    before = position(at)
                    sleeper.process.send_signal(signal.SIGCONT)
                    # Once it has drained it has tried to hand in whatever it had.
                    assert sleeper.stop() == 0
            finally:
                if sleeper.process.poll() is None:
                    sleeper.process.send_signal(signal.SIGCONT)
        assert position(at) == before
    made = charges(folder)
    assert len(made) == len({key for key, _ in made}) == 40
    assert rows(at, "SELECT count(*) FROM orders WHERE status = 'completed'") == [(40,)]
    twice = "SELECT order_id FROM events WHERE type = 'payment.succeeded' GROUP BY order_id HAVING count(*) > 1"
    assert rows(at, twice) == []
