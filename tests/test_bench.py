"""What the service is measured against: it does what it says, and what is missing is said."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx2

from auditing import wait_until
from servers import free_port
from serving import PATIENCE_SECONDS
from verifying import verified

BENCH = Path(__file__).resolve().parents[1] / "bench"
BASELINES = BENCH / "baselines"
ORDER = json.loads((BENCH / "order.json").read_text())


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_floor_writes_what_the_service_would_have_written(tmp_path: Path) -> None:
    """The rows that bulk intake is compared with keep every law, also where the last batch is not a whole one."""
    address = f"sqlite:///{tmp_path}/orders.db"
    command = [sys.executable, str(BASELINES / "floor.py"), address, "130"]
    assert float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) > 0
    found = verified(address)
    assert (found.orders, found.breaches) == (130, [])


def test_bare_decodes_an_order_and_answers_it() -> None:
    """Order after order on one connection, each answered with what was read."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(BASELINES / "bare.py"), str(port)])
    try:
        wait_until(lambda: process.poll() is not None or listens(port))
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS) as client:
            for customer in ("alice", "bob"):
                answer = client.post("/orders", json={**ORDER, "customer_id": customer})
                assert (answer.status_code, answer.json()["customer_id"]) == (202, customer)
                assert [item["price"] for item in answer.json()["items"]] == [12.99, 3.49]
    finally:
        process.kill()
        process.wait()


def test_a_row_whose_programs_are_missing_says_so(tmp_path: Path) -> None:
    """With nothing on the PATH, each row names what it lacks, the run goes on, and no earlier figure is lost."""
    kept = [BENCH / "README.md", *sorted((BENCH / "results").iterdir())]
    before = [path.read_bytes() for path in kept]
    command = [sys.executable, str(BENCH / "run.py"), "--rows", "1b,3"]
    run = subprocess.run(
        command, env={"PATH": str(tmp_path), "LANG": "C.UTF-8"}, capture_output=True, text=True, check=True
    )
    assert "row 1 and 1b" in run.stdout
    assert "row 3 " in run.stdout
    assert run.stdout.count("redis-server and wrk are not installed") >= 2
    assert [path.read_bytes() for path in kept] == before
