"""The load file in examples/: both of its users work, and no call of theirs fails."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from auditing import wait_until
from installed import ROOT, environment, python_program
from serving import PATIENCE_SECONDS, Serving

#: What must have been called, as it begins in the access log, and how often: the last call may still be under way.
CALLED = {'"GET /orders?': 10, '"GET /orders/ORD-': 10, '"GET /orders/metrics': 2, '"POST /orders ': 2}


def enough(log: str) -> bool:
    return all(log.count(call) >= times for call, times in CALLED.items())


def test_readers_and_a_writer_load_a_service(tmp_path: Path) -> None:
    """Of ten users nine read lists, orders and figures, and one places orders; no call fails."""
    log = tmp_path / "access.log"
    locust = python_program("locust")
    command = [
        *(locust, "--locustfile", str(ROOT / "examples" / "locustfile.py"), "--headless", "--json"),
        *("--users", "10", "--spawn-rate", "10", "--run-time", str(int(PATIENCE_SECONDS))),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (
        Serving(tmp_path, ACCESS_LOG_FILE="access.log") as service,
        subprocess.Popen(
            [*command, "--host", service.url], cwd=tmp_path, env=environment(), text=True, **pipes
        ) as load,
    ):
        try:
            wait_until(lambda: load.poll() is not None or enough(log.read_text()))
            load.send_signal(signal.SIGTERM)
            said, complaints = load.communicate(timeout=PATIENCE_SECONDS)
        finally:
            load.kill()
        total = service.client.get("/orders").json()["total"]
    assert load.returncode == 0, complaints
    calls = {(each["method"], each["name"]): each for each in json.loads(said)}

    assert calls.keys() == {
        ("GET", "/orders"),
        ("GET", "/orders/{id}"),
        ("GET", "/orders/metrics"),
        ("POST", "/orders"),
    }
    assert [each for each in calls.values() if each["num_failures"]] == []
    placed = calls["POST", "/orders"]["num_requests"]
    read = sum(each["num_requests"] for (method, _), each in calls.items() if method == "GET")
    assert total >= placed > 0
    assert read > placed
