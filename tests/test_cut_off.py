"""A writer whose cache is out of reach, full, read-only or slow, and readers elsewhere who still use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from auditing import wait_until
from servers import RedisServer
from serving import Serving
from storing import Place

#: What is done to the cache, and what undoes it. The writer has a name of its own there.
FAULTS = {
    "cut-off": (
        ("ACL SETUSER writer off", "CLIENT KILL USER writer"),
        ("ACL SETUSER writer on",),
    ),
    "full": (("CONFIG SET maxmemory 1",), ("CONFIG SET maxmemory 0",)),
    "read-only": (("REPLICAOF 127.0.0.1 1",), ("REPLICAOF NO ONE",)),
    "slow": (("CLIENT PAUSE 1500 WRITE",), ("CLIENT UNPAUSE",)),
    "flushed": (("FLUSHALL",), ()),
}
#: What every database has a part in; the others differ in what Redis answers only.
CUT_OFF = {"cut-off": FAULTS["cut-off"]}
#: Orders that are changed during each fault, twice each.
ORDERS = 4
BODY = {"user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    (tmp_path / "cache").mkdir()
    server = RedisServer(tmp_path / "cache")
    yield server
    server.kill()


class Watch:
    """Two readers who look in turn, without a pause, and never see an older version than before."""

    def __init__(self, order_ids: list[str], *doors: Serving) -> None:
        self.order_ids = order_ids
        self.doors = doors
        self.seen = dict.fromkeys(order_ids, 0)
        self.over = False

    def look(self) -> None:
        while not self.over:
            for order_id in self.order_ids:
                for door in self.doors:
                    version = door.client.get(f"/orders/{order_id}").json()["version"]
                    before = self.seen[order_id]
                    assert version >= before, f"{order_id}: version {version} after {before}"
                    self.seen[order_id] = version


@contextmanager
def watching(order_ids: list[str], *doors: Serving) -> Iterator[None]:
    watch = Watch(order_ids, *doors)
    with ThreadPoolExecutor(1) as thread:
        looking = thread.submit(watch.look)
        try:
            yield
        finally:
            watch.over = True
        looking.result()


def test_nobody_is_shown_what_was_before(folder: Path, at: Place, own_redis: RedisServer) -> None:
    """Whatever happens to the cache: what a client was answered every process shows, and nobody goes back."""
    own_redis.query("0", "ACL SETUSER writer on nopass ~* &* +@all")
    url = f"redis://127.0.0.1:{own_redis.port}/0"
    settings = {"DATABASE_URL": at.address, "REDIS_URL": url}
    with (
        Serving(folder, "--no-workers", **settings) as one,
        Serving(folder, "--no-workers", **settings) as two,
        Serving(folder, "--no-workers", **settings | {"REDIS_URL": url.replace("//", "//writer:x@")}) as writer,
    ):
        doors = (one, two, writer)
        for fault, (brought, undone) in (FAULTS if at.address.startswith("postgresql") else CUT_OFF).items():
            order_ids = [f"{fault}-{number}" for number in range(ORDERS)]
            for order_id in order_ids:
                assert writer.client.post("/orders", json=BODY | {"order_id": order_id}).status_code == 201
            for door in doors:
                for order_id in order_ids:
                    wait_until(partial(_is_hit, door, order_id))
                assert _cache(door)["status"] == "ok"
            with watching(order_ids, one, two):
                for command in brought:
                    own_redis.query("0", command)
                for order_id in order_ids:
                    for status in ("processing", "completed"):
                        answer = writer.client.patch(f"/orders/{order_id}/status", json={"status": status})
                        assert answer.status_code == 200, answer.text
                        for door in doors:
                            shown = door.client.get(f"/orders/{order_id}").json()
                            assert shown["version"] == answer.json()["version"], f"{order_id} {status}"
                    other = f"{order_id}-new"
                    assert writer.client.post("/orders", json=BODY | {"order_id": other}).status_code == 201
                    for door in doors:
                        assert door.client.get("/orders?limit=5").json()["orders"][0]["order_id"] == other
                for command in undone:
                    own_redis.query("0", command)


def _cache(door: Serving) -> dict[str, str]:
    found: dict[str, str] = door.client.get("/health").json()["dependencies"]["cache"]
    return found


def _hits(door: Serving) -> int | None:
    found = re.search(r"(\d+) hits", _cache(door)["detail"])
    return int(found[1]) if found else None


def _is_hit(door: Serving, order_id: str) -> bool:
    """Whether a read is answered from the cache."""
    before = _hits(door)
    door.client.get(f"/orders/{order_id}")
    after = _hits(door)
    return before is not None and after is not None and after > before
