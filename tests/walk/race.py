"""`make race`: orders that are cancelled again and again while they are charged, by several processes at once.

In the end every order is at rest, each was charged at most once, what was charged of a cancelled one is refunded,
and every law holds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from auditing import gateway_with_ledger, wait_until
from servers import MariadbServer, PostgresServer, Server
from serving import Serving
from storing import Place
from verifying import verified
from walking import Here

SERVERS: dict[str, type[Server]] = {"postgresql": PostgresServer, "mariadb": MariadbServer}
CLIENTS = 16
KILL_SECONDS = 4.0
REST_SECONDS = 600.0


class Race:
    """Serving processes that work as well, on one database."""

    def __init__(self, folder: Path, at: Place, given: argparse.Namespace) -> None:
        self.at = at
        self.given = given
        self.folder = folder
        self.answers: Counter[int] = Counter()
        self.deaths = 0
        self._next = iter(range(given.orders))
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._settings = {
            "DATABASE_URL": at.address,
            "PAYMENT_GATEWAY": gateway_with_ledger(folder),
            "PAYMENT_MOCK_LATENCY_MIN": "10",
            "PAYMENT_MOCK_LATENCY_MAX": "40",
            "LEASE_SECONDS": "2",
            "WORKER_COUNT": "4",
            "STAGES": given.stages,
            "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000000",
        }
        self._doors = [self._open() for _ in range(given.processes)]

    def _open(self, port: str = "0") -> Serving:
        return Serving(self.folder, PORT=port, **self._settings)

    def run(self) -> None:
        try:
            with ThreadPoolExecutor(CLIENTS + 1) as pool:
                clients = [pool.submit(self._client, number) for number in range(CLIENTS)]
                killing = pool.submit(self._kill)
                for client in clients:
                    client.result()
                self._over.set()
                killing.result()
            wait_until(lambda: self.at.rows("SELECT count(*) FROM jobs")[0][0] == 0, REST_SECONDS)
        finally:
            self._over.set()
            for door in self._doors:
                door.kill()

    def _client(self, number: int) -> None:
        random = Random(number)
        here = Here(self._doors)
        while True:
            with self._lock:
                order = next(self._next, None)
            if order is None:
                return here.close()
            body = {
                "order_id": f"R{order}",
                "customer_id": "c",
                "items": [{"item_id": "i", "quantity": 1, "price": 2}],
            }
            while self._ask(here, random, "POST", "/orders", body) not in (201, 409):
                pass
            while not self._is_over(here, random, f"/orders/R{order}"):
                self._ask(here, random, "POST", f"/orders/R{order}/cancel", None)

    def _ask(self, here: Here, random: Random, method: str, path: str, body: dict[str, object] | None) -> int:
        answer = here.ask(random.randrange(len(self._doors)), method, path, body, "")
        with self._lock:
            self.answers[answer.status] += 1
        if answer.status == 0:
            time.sleep(0.05)
        return answer.status

    def _is_over(self, here: Here, random: Random, path: str) -> bool:
        answer = here.ask(random.randrange(len(self._doors)), "GET", path, None, "")
        ended = {"confirmed" if self.given.stages == "payment" else "completed", "cancelled", "payment_failed"}
        return answer.status == 200 and answer.document["status"] in ended

    def _kill(self) -> None:
        """Kill one process after the other, and start it again."""
        random = Random(0)
        while self.given.kills and not self._over.wait(KILL_SECONDS):
            index = random.randrange(len(self._doors))
            door = self._doors[index]
            door.kill()
            self.deaths += 1
            self._doors[index] = self._open(port=door.url.rpartition(":")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--on", choices=["sqlite", *SERVERS], action="append", help="databases; all without it")
    parser.add_argument("--orders", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--stages", default="payment", choices=["payment", "payment,fulfilment"])
    parser.add_argument("--kills", action="store_true", help=f"kill a process every {KILL_SECONDS:g} seconds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        os.chmod(name, 0o755)
        for kind in given.on or ["sqlite", *SERVERS]:
            folder = Path(name) / kind
            folder.mkdir()
            server = SERVERS[kind](folder) if kind in SERVERS else None
            try:
                address = f"sqlite:///{folder}/orders.db" if server is None else server.new_database()
                at = Place(address, server)
                began = time.monotonic()
                race = Race(folder, at, given)
                race.run()
                found = verified(at.address, folder / "ledger.jsonl")
                ends = at.rows(
                    "SELECT status, payment_status, count(*) FROM orders GROUP BY status, payment_status"
                )
                seconds = time.monotonic() - began
                print(
                    f"{kind}, {given.processes} processes, {race.deaths} killed, {seconds:.0f} s: "
                    + ", ".join(f"{count} {status}/{payment}" for status, payment, count in sorted(ends))
                    + f"; answers {dict(sorted(race.answers.items()))}; {len(found.breaches)} breaches",
                    flush=True,
                )
                if found.breaches:
                    sys.exit("\n".join(f"{each.order_id}: {each.law}" for each in found.breaches[:20]))
            finally:
                if server is not None:
                    server.stop()


if __name__ == "__main__":
    main()
