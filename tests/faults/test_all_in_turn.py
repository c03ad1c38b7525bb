"""Real invoices while a worker is killed, the broker wiped and killed, the cache killed, the database stopped."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from auditing import wait_until
from enduring import EVERYTHING, Mortals, broker_settings, wipe
from servers import RedisServer, Server
from shopping import Shop, open_shop
from storing import Place

#: Seconds for which the database is away.
AWAY_SECONDS = 10.0

#: Database, broker, intake. Every database, broker and intake meets every fault; EXPEDITER_FAULTS=all brings about
#: all combinations, which takes a quarter of an hour.
ROADS = [
    ("sqlite", "redis", "queued"),
    ("postgresql", "redis", "direct"),
    ("mariadb", "rabbitmq", "queued"),
]
if EVERYTHING:
    BROKERS = [("database", "direct")]
    BROKERS += [(broker, intake) for broker in ("redis", "rabbitmq") for intake in ("direct", "queued")]
    ROADS = [(database, *road) for database in ("sqlite", "postgresql", "mariadb") for road in BROKERS]


class Faults:
    """What is done to one shop's servers."""

    def __init__(self, shop: Shop, cache: RedisServer, broker: Server | None) -> None:
        self.shop = shop
        self.cache = cache
        self.broker = broker
        self._next = 0

    def during(self, fault: Callable[[], None]) -> None:
        """Bring a fault about in the midst of a further part of the invoices."""
        part = self.shop.invoices[self._next : self._next + len(self.shop.invoices) // 5]
        self._next += len(part)
        before = len(self.shop.shoppers.accepted)
        placing = self.shop.shoppers.place(part)
        wait_until(lambda: len(self.shop.shoppers.accepted) > before + len(part) // 5)
        fault()
        wait(placing)
        for each in placing:
            each.result()

    def finish(self) -> None:
        for each in self.shop.shoppers.place(self.shop.invoices[self._next :]):
            each.result()

    def kill_a_worker(self) -> None:
        self.shop.workers.pop().kill()
        self.shop.workers.append(self.shop.hire())

    def wipe_the_broker(self) -> None:
        if self.broker is not None:
            wipe(self.broker, self.shop.settings)

    def kill_the_broker(self) -> None:
        if self.broker is not None:
            self.broker.kill()
            wait_until(lambda: self._health("queue")["status"] == "degraded")
            self.broker.restart()
            wait_until(lambda: self._health("queue")["status"] == "ok")

    def kill_the_cache(self) -> None:
        self.cache.query("", "FLUSHALL")
        self.cache.kill()
        wait_until(lambda: self._health("cache")["status"] == "degraded")

    def stop_the_database(self) -> None:
        """Take the database away, look at what is answered meanwhile, and give it back."""
        at = self.shop.at
        if at.server is None:
            with closing(sqlite3.connect(at.address.removeprefix("sqlite:///"), isolation_level=None)) as raw:
                raw.execute("BEGIN IMMEDIATE")
                self._look_without_database()
                raw.execute("ROLLBACK")
        else:
            at.server.kill()
            self._look_without_database()
            at.server.restart()
        wait_until(lambda: self._health("database")["status"] == "ok")

    def _look_without_database(self) -> None:
        ends = time.monotonic() + AWAY_SECONDS
        door = self.shop.doors[0].client
        body = {"customer_name": "Ann", "items": [{"name": "a free sample", "quantity": 1}]}
        placed = door.post("/orders", json=body)
        if self.shop.settings["INTAKE"] == "queued":
            assert placed.status_code == 202, placed.text
            order_id = placed.json()["order_id"]
            assert self.shop.doors[1].client.get(f"/orders/{order_id}").json()["status"] == "pending"
            self.shop.shoppers.accepted.append(order_id)
        else:
            assert placed.status_code == 503, placed.text
            assert placed.headers["Retry-After"] == "1"
        threading.Event().wait(max(0.0, ends - time.monotonic()))

    def _health(self, part: str) -> dict[str, Any]:
        found: dict[str, Any] = self.shop.doors[0].client.get("/health").json()["dependencies"][part]
        return found


def open_settings(mortals: Mortals, broker: str, intake: str) -> tuple[dict[str, str], RedisServer, Server | None]:
    cache = mortals.cache()
    settings = {"REDIS_URL": cache.new_database(), "INTAKE": intake}
    if broker == "database":
        return settings, cache, None
    server = mortals.get(broker)
    return settings | broker_settings(server), cache, server


@pytest.mark.parametrize(("database", "broker", "intake"), ROADS)
def test_real_orders_through_every_fault(
    folder: Path, mortals: Mortals, database: str, broker: str, intake: str
) -> None:
    """Whatever is killed, wiped or stopped in mid-run: all rest, each charged once, none unknown to its client."""
    settings, cache, server = open_settings(mortals, broker, intake)
    if database == "sqlite":
        at = Place(f"sqlite:///{folder}/orders.db")
    else:
        at = Place(mortals.get(database).new_database(), mortals.get(database))
    with open_shop(folder, at, settings) as shop:
        faults = Faults(shop, cache, server)
        faults.during(faults.kill_a_worker)
        faults.during(faults.wipe_the_broker)
        faults.during(faults.kill_the_broker)
        faults.during(faults.kill_the_cache)
        cache.restart()
        wait_until(lambda: faults._health("cache")["status"] == "ok")
        faults.during(faults.stop_the_database)
        faults.finish()
        shop.assert_all_went_well(valid=1629 + (intake == "queued"))
        for program in (*shop.doors, *shop.workers):
            assert program.stop() == 0
            assert "Traceback" not in "\n".join(program.log), "\n".join(program.log)
