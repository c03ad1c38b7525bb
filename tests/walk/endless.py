"""`make walk`: one seed after the other on every set-up, until something is found or the time is over."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import MariadbServer, PostgresServer, RabbitServer, RedisServer, Server
from storing import Place
from walking import Walk

SERVERS: dict[str, type[Server]] = {"postgresql": PostgresServer, "mariadb": MariadbServer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--on", choices=["sqlite", *SERVERS], action="append", help="databases; all without it")
    parser.add_argument("--intake", choices=["direct", "queued"], action="append", help="ways; both without it")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="in all")
    parser.add_argument("--seconds", type=float, default=15.0, help="that one walk lasts")
    parser.add_argument("--seed", type=int, help="walk with this seed only; without it from 1 on")
    parser.add_argument("--clients", type=int, default=8)
    given = parser.parse_args()
    kinds = given.on or ["sqlite", *SERVERS]
    seeds = itertools.count(1) if given.seed is None else iter([given.seed])
    ends = time.monotonic() + given.minutes * 60
    with tempfile.TemporaryDirectory(prefix="walk-") as name:
        os.chmod(name, 0o755)
        servers: dict[str, Server] = {}
        queues = Queues(Path(name))
        try:
            for kind in kinds:
                if kind in SERVERS:
                    folder = Path(name) / kind
                    folder.mkdir()
                    servers[kind] = SERVERS[kind](folder)
            for seed in seeds:
                for kind in kinds:
                    for intake in given.intake or ("direct", "queued"):
                        for stages in ("payment,fulfilment", "payment"):
                            if time.monotonic() > ends:
                                return
                            queued = queues.settings(seed) if intake == "queued" else None
                            cache = "" if queued or seed % 2 else queues.redis().new_database()
                            folder = Path(name) / f"{kind}-{intake}-{seed}-{stages}"
                            step(folder, servers.get(kind), seed, stages, queued, cache, given)
        finally:
            queues.stop()
            for server in servers.values():
                server.stop()


class Queues:
    """A Redis, and for every other seed a RabbitMQ, that are started when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._redis: RedisServer | None = None
        self._rabbit: RabbitServer | None = None

    def redis(self) -> RedisServer:
        if self._redis is None:
            (self._folder / "redis").mkdir()
            self._redis = RedisServer(self._folder / "redis")
        return self._redis

    def settings(self, seed: int) -> dict[str, str]:
        """Return the settings of queued intake."""
        url = self.redis().new_database()
        if seed % 2:
            return {"REDIS_URL": url, "BROKER_URL": url}
        if self._rabbit is None:
            (self._folder / "rabbitmq").mkdir()
            self._rabbit = RabbitServer(self._folder / "rabbitmq")
        queue = self._rabbit.new_queue()
        return {"REDIS_URL": url, "BROKER_URL": self._rabbit.url, "RABBITMQ_QUEUE_NAME": queue}

    def stop(self) -> None:
        if self._redis is not None:
            self._redis.stop()
        if self._rabbit is not None:
            self._rabbit.kill()


def step(
    folder: Path,
    server: Server | None,
    seed: int,
    stages: str,
    queued: dict[str, str] | None,
    cache: str,
    given: argparse.Namespace,
) -> None:
    """Walk once; every third seed removes everything on the way, every second one has a cache that fails."""
    folder.mkdir()
    at = Place(f"sqlite:///{folder}/orders.db") if server is None else Place(server.new_database(), server)
    walk = Walk(folder, at, seed, stages=stages, queued=queued, cache=cache, clears=seed % 3 == 0)
    print(f"{folder.name}: ", end="", flush=True)
    walk.run(seconds=given.seconds, clients=given.clients)
    orders = at.rows("SELECT count(*) FROM orders")[0][0]
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(walk.answers.items()))
    print(f"{orders} orders, {walk.deaths} deaths, answers {statuses}; every law holds", flush=True)


if __name__ == "__main__":
    main()
