"""`make pay`: orders through a gateway that loses answers, by workers that are killed; the books must agree.

The trial gateway is a process of its own. It drops every tenth connection after it has charged, answers every
twentieth charge by 500, and sends every callback twice. In the end every order is at rest, no order was charged
twice, every charge is an order's, every law holds, and `expediter reconcile` finds no difference.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from auditing import wait_until
from servers import MariadbServer, PostgresServer, Server, free_port
from serving import Program, Serving, environment
from storing import Place
from trying import SECRET, TrialGateway
from verifying import verified

SERVERS: dict[str, type[Server]] = {"postgresql": PostgresServer, "mariadb": MariadbServer}
#: Orders that one request makes up.
BATCH = 500
KILL_SECONDS = 3.0
REST_SECONDS = 900.0


class Paying:
    """A serving process, two workers and a gateway, on one database."""

    def __init__(
        self,
        folder: Path,
        at: Place,
        *,
        orders: int,
        cancel: int = 0,
        kill_seconds: float = KILL_SECONDS,
        later: bool = False,
    ) -> None:
        """`later`: the money is reserved, and captured when an order is completed."""
        self.at = at
        self.folder = folder
        self.deaths = 0
        self._orders = orders
        self._cancel = cancel
        self._kill_seconds = kill_seconds
        self._later = later
        #: How many differences `expediter reconcile` has found.
        self.reconciled = ""
        self._over = threading.Event()

    def run(self) -> None:
        """Place the orders and wait until all are at rest; one worker after the other is killed meanwhile."""
        port = free_port()
        callback = f"http://127.0.0.1:{port}/api/v1/payments/callback"
        misbehaves = ("--drop-every", "10", "--error-every", "20", "--callbacks-twice")
        with TrialGateway(self.folder, *misbehaves, "--callback", callback, "--secret", SECRET) as gateway:
            settings = {
                "PAYMENT_CAPTURE": "on_completion" if self._later else "at_once",
                "PAYMENT_GATEWAY_SECRET": SECRET,
                "DATABASE_URL": self.at.address,
                "PAYMENT_GATEWAY": gateway.url,
                "LEASE_SECONDS": "2",
                "PAYMENT_RETRY_DELAY": "0.2",
                "PAYMENT_RETRY_ATTEMPTS": "100",
                "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000",
            }
            workers = [self._work(settings) for _ in range(2)]
            killing = threading.Thread(target=self._kill, args=(workers, settings))
            try:
                with Serving(self.folder, "--no-workers", **settings, PORT=str(port)) as service:
                    killing.start()
                    for start in range(0, self._orders, BATCH):
                        count = min(BATCH, self._orders - start)
                        bodies = [_body(number) for number in range(start, start + count)]
                        answer = service.client.post("/orders/batch", json=bodies)
                        assert answer.status_code < 300, answer.text
                        for number in range(start, start + count):
                            if self._cancel and number % self._cancel == 0:
                                service.client.post(f"/orders/P{number}/cancel")
                    wait_until(lambda: self.at.rows("SELECT count(*) FROM jobs") == [(0,)], REST_SECONDS)
            finally:
                self._over.set()
                killing.join()
                for worker in workers:
                    worker.kill()
            self.entries = gateway.entries()
            self.reconciled = self._reconcile(settings)

    def found(self) -> list[str]:
        """Return what does not agree between the orders and the gateway's books."""
        wrong = [
            f"{each.order_id}: {each.law}"
            for each in verified(self.at.address, self.folder / "payments.jsonl").breaches
        ]
        if not self.reconciled.endswith(" 0 under way, 0 differences"):
            wrong.append(f"reconcile says: {self.reconciled}")
        sums: Counter[str] = Counter()
        for entry in self.entries:
            sums[entry["action"]] += entry["amount_minor"]
        if sums["authorize"] != sums["capture"] + sums["void"]:
            wrong.append(f"what was reserved is not what was captured and voided: {dict(sums)}")
        charged = Counter(
            self._named[entry["key"]] for entry in self.entries if entry["action"] in ("charge", "capture")
        )
        wrong += [f"{order_id} was charged {count} times" for order_id, count in charged.items() if count > 1]
        paid = {
            order_id
            for (order_id,) in self.at.rows(
                "SELECT order_id FROM orders WHERE payment_status IN ('paid', 'refunded', 'refund_pending')"
            )
        }
        wrong += [f"{order_id} was charged, and says that it was not" for order_id in charged.keys() - paid]
        wrong += [f"{order_id} says that it was charged, and was not" for order_id in paid - charged.keys()]
        return wrong

    @property
    def _named(self) -> dict[str, str]:
        """The orders by the keys of their payments."""
        return {entry["key"]: entry["order_id"] for entry in self.entries if entry.get("order_id")}

    def _reconcile(self, settings: dict[str, str]) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "expediter", "reconcile"],
            cwd=self.folder,
            env=environment(self.folder, **settings),
            capture_output=True,
            text=True,
            timeout=REST_SECONDS,
        )
        return (ran.stdout.strip().splitlines() or [ran.stderr])[-1]

    def _work(self, settings: dict[str, str]) -> Program:
        worker = Program(self.folder, "work", **settings)
        worker.wait_for("works off")
        return worker

    def _kill(self, workers: list[Program], settings: dict[str, str]) -> None:
        random = Random(0)
        while not self._over.wait(self._kill_seconds):
            index = random.randrange(len(workers))
            workers[index].kill()
            self.deaths += 1
            workers[index] = self._work(settings)


def _body(number: int) -> dict[str, object]:
    return {
        "order_id": f"P{number}",
        "customer_id": "c",
        "items": [{"item_id": "i", "quantity": 1, "price": f"{1 + number % 90}.{number % 100:02}"}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--on", choices=["sqlite", *SERVERS], action="append", help="databases; all without it")
    parser.add_argument("--orders", type=int, default=5000)
    parser.add_argument("--later", action="store_true", help="reserve, and capture when an order is completed")
    parser.add_argument("--cancel", type=int, default=0, help="cancel every so many orders at once")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="paying-") as name:
        os.chmod(name, 0o755)
        for kind in given.on or ["sqlite", *SERVERS]:
            folder = Path(name) / kind
            folder.mkdir()
            server = SERVERS[kind](folder) if kind in SERVERS else None
            try:
                at = Place(f"sqlite:///{folder}/orders.db" if server is None else server.new_database(), server)
                began = time.monotonic()
                paying = Paying(folder, at, orders=given.orders, cancel=given.cancel, later=given.later)
                paying.run()
                wrong = paying.found()
                ends = at.rows(
                    "SELECT status, payment_status, count(*) FROM orders GROUP BY status, payment_status"
                )
                actions = Counter(entry["action"] for entry in paying.entries)
                print(
                    f"{kind}, {paying.deaths} workers killed, {time.monotonic() - began:.0f} s: "
                    + ", ".join(f"{count} {status}/{payment}" for status, payment, count in sorted(ends))
                    + f"; the gateway's books {dict(actions)}; {paying.reconciled}; {len(wrong)} wrong",
                    flush=True,
                )
                if wrong:
                    sys.exit("\n".join(wrong[:20]))
            finally:
                if server is not None:
                    server.stop()


if __name__ == "__main__":
    main()
