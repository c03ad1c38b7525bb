"""What is accepted and not stored, when nobody who accepted it is left; and what was cleared or restored away."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from auditing import assert_verified, rows, wait_until
from expediter.queued.applier import BUSY_SECONDS
from queueing import BURGER, STREAM, Doors, new_id, order
from servers import RedisServer
from serving import PATIENCE_SECONDS, environment

ADMIN = "open sesame"


@pytest.fixture
def own(folder: Path, redis_server: RedisServer) -> Iterator[Doors]:
    """Two serving processes of the test's own, on SQLite and one Redis."""
    with ExitStack() as stack:
        doors = Doors(folder, stack, redis_server.new_database(), None, ADMIN_PASSWORD=ADMIN)
        yield doors
        doors.drain()
        assert_verified(f"sqlite:///{folder}/orders.db")


def expediter(doors: Doors, *arguments: str) -> str:
    """Run a command of the program on the doors' settings, and return what it prints."""
    run = subprocess.run(
        [sys.executable, "-m", "expediter", *arguments],
        cwd=doors.folder,
        env=environment(doors.folder, **doors.settings),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    return run.stdout


@pytest.mark.parametrize("how", ["clear", "reset"])
def test_what_was_accepted_before_clearing_does_not_come_back(own: Doors, how: str) -> None:
    """Orders, changes and answers that waited are gone for good; what is accepted right after stays."""
    stored = own.placed()
    own.apply()
    key = {"Idempotency-Key": new_id()}
    first = own.place(order(None, BURGER), **key).json()["order_id"]
    waiting = [own.placed(), own.placed(), first]
    assert own.two.client.post(f"/orders/{stored}/cancel").status_code == 202
    if how == "clear":
        assert "Removed" in expediter(own, "clear", "--yes")
    else:
        answer = own.two.client.post("/admin/reset", headers={"X-Admin-Password": ADMIN})
        assert answer.status_code == 200, answer.text
    again = own.place(order(None, BURGER), **key).json()["order_id"]
    named = own.place(order(waiting[0])).json()["order_id"]
    assert again != first
    for each in (stored, *waiting[1:]):
        assert own.states(each) <= {"404", "503"}
    own.drain()
    left = {row[0] for row in rows(own.folder, "SELECT order_id FROM orders")}
    assert {again, named} <= left
    assert not {stored, *waiting[1:]} & left
    assert [own.states(each) for each in (stored, *waiting[1:])] == [{"404"}] * 3


def test_a_restored_database_has_what_it_has(own: Doors) -> None:
    """After a backup came back no kept answer names an order that is gone, and nothing accepted before returns."""
    early = own.placed()
    own.drain()
    for door in (own.one, own.two):
        door.stop()
    backup = own.folder / "backup.db"
    shutil.copy(own.folder / "orders.db", backup)
    with own.reopened():
        key = {"Idempotency-Key": new_id()}
        gone = own.place(order(None, BURGER), **key).json()["order_id"]
        own.drain()
        waiting = own.placed()
    for end in ("", "-wal", "-shm"):
        (own.folder / f"orders.db{end}").unlink(missing_ok=True)
    shutil.copy(backup, own.folder / "orders.db")
    # The gateway's books name orders that the backup does not have: they are no longer held against it.
    (own.folder / "ledger.jsonl").unlink()
    assert "dropped" in expediter(own, "db", "restored")
    own.reopen()
    assert own.states(gone) | own.states(waiting) <= {"404", "503"}
    again = own.place(order(None, BURGER), **key)
    assert (again.json()["order_id"] != gone, "idempotency-replayed" in again.headers) == (True, False)
    own.drain()
    left = {row[0] for row in rows(own.folder, "SELECT order_id FROM orders")}
    assert left >= {early, again.json()["order_id"]}
    assert [own.states(each) for each in (gone, waiting)] == [{"404"}] * 2


def test_an_order_whose_accepter_and_broker_are_gone_is_stored(own: Doors) -> None:
    """Any worker finds what was accepted, in its order, once nobody is left who remembers it."""
    order_id, moved = own.placed(BURGER), own.placed()
    key = {"Idempotency-Key": new_id()}
    cancelled = own.two.client.post(f"/orders/{moved}/cancel", headers=key)
    assert cancelled.status_code == 202
    own.one.process.kill()
    own.two.process.kill()
    own.streams.delete(STREAM)
    own.reopen()
    slow = {"FULFILMENT_MOCK_LATENCY_MIN": "1000", "FULFILMENT_MOCK_LATENCY_MAX": "1000"}
    with own.worker(**slow):
        own.until(order_id, "completed")
        own.until(moved, "cancelled")
    again = own.one.client.post(f"/orders/{moved}/cancel", headers=key)
    assert (again.status_code, again.json()) == (202, cancelled.json())
    types = [event["type"] for event in own.one.client.get(f"/orders/{moved}/events").json()["events"]]
    assert types == ["order.placed", "order.cancelled"]


def test_what_redis_was_not_told_of_is_found_out(own: Doors) -> None:
    """An order that is stored while Redis says that it waits is shown as it is, and settled in seconds."""
    order_id, deleted = own.placed(), own.placed()
    tokens = own.pending()
    commands = own.redis.hmget("orders:accepted:commands", tokens)
    shown = [own.redis.get(f"temp_order:{each}") for each in (order_id, deleted)]
    own.apply()
    assert own.one.client.delete(f"/orders/{deleted}").status_code == 202
    own.drain()
    # As if Redis had been out of reach when they were stored.
    known = dict(zip(tokens, commands, strict=True))  # type: ignore[arg-type]
    own.redis.hset("orders:accepted:commands", mapping=known)
    own.redis.zadd("orders:accepted", dict.fromkeys(tokens, 0))
    for each, value in zip((order_id, deleted), shown, strict=True):
        own.redis.set(f"temp_order:{each}", str(value))
    assert (own.states(order_id), own.states(deleted)) == ({"completed"}, {"404"})
    with own.worker():
        own.until_settled()
    assert own.temporary(order_id)["state"] == "stored"
    assert (own.states(order_id), own.states(deleted)) == ({"completed"}, {"404"})


def test_changes_of_one_order_are_bounded(own: Doors) -> None:
    """A hundred changes of one order may wait; one more is told to try again."""
    order_id = own.placed()
    client = own.one.client
    answers = [client.post(f"/orders/{order_id}/cancel").status_code for _ in range(101)]
    assert answers == [202] * 100 + [503]
    own.drain()
    own.until(order_id, "cancelled")


def test_what_a_dead_worker_took_along_waits_for_its_lease(own: Doors) -> None:
    """Redis gives a dead worker's message to others after a minute; its command is settled after LEASE_SECONDS."""
    with own.worker() as heir:
        heir.process.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: own.redis.info("clients")["blocked_clients"] == 0)  # nothing is handed to it
            with own.worker(EXPEDITER_TEST_POINTS="applied:kill:1") as doomed:
                began = time.monotonic()
                order_id = own.placed()
                wait_until(lambda: doomed.process.poll() is not None)
        finally:
            heir.process.send_signal(signal.SIGCONT)
        assert own.temporary(order_id)["state"] == "pending"
        own.until(order_id, "completed")
        assert time.monotonic() - began < BUSY_SECONDS
        assert own.taken()  # the message itself is still the dead worker's
        own.let_a_minute_pass()
