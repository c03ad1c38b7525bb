"""`make walk`: one seed after the other on every database, until something is found or the time is over."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import MariadbServer, PostgresServer, Server
from storing import Place
from walking import Walk

SERVERS: dict[str, type[Server]] = {"postgresql": PostgresServer, "mariadb": MariadbServer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--on", choices=["sqlite", *SERVERS], action="append", help="databases; all without it")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for each database in turn, in all")
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
        try:
            for kind in kinds:
                if kind in SERVERS:
                    folder = Path(name) / kind
                    folder.mkdir()
                    servers[kind] = SERVERS[kind](folder)
            for seed in seeds:
                for kind in kinds:
                    for stages in ("payment,fulfilment", "payment"):
                        if time.monotonic() > ends:
                            return
                        step(Path(name) / f"{kind}-{seed}-{stages}", servers.get(kind), seed, stages, given)
        finally:
            for server in servers.values():
                server.stop()


def step(folder: Path, server: Server | None, seed: int, stages: str, given: argparse.Namespace) -> None:
    folder.mkdir()
    at = Place(f"sqlite:///{folder}/orders.db") if server is None else Place(server.new_database(), server)
    walk = Walk(folder, at, seed, stages=stages)
    print(f"{folder.name}: ", end="", flush=True)
    walk.run(seconds=given.seconds, clients=given.clients)
    orders = at.rows("SELECT count(*) FROM orders")[0][0]
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(walk.answers.items()))
    print(f"{orders} orders, {walk.deaths} deaths, answers {statuses}; every law holds", flush=True)


if __name__ == "__main__":
    main()
