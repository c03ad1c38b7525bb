"""The load file in examples/: both of its users work, and no call of theirs fails."""

from __future__ import annotations

import json
from pathlib import Path

from installed import ROOT, python_program, run
from serving import Serving


def test_readers_and_a_writer_load_a_service(service: Serving, tmp_path: Path) -> None:
    """Of ten users nine read lists, orders and figures, and one places orders; no call fails."""
    done = run(
        tmp_path,
        python_program("locust"),
        *("--locustfile", ROOT / "examples" / "locustfile.py", "--headless", "--json", "--host", service.url),
        *("--users", "10", "--spawn-rate", "10", "--run-time", "3s"),
    )
    assert done.returncode == 0, done.stderr
    calls = {(each["method"], each["name"]): each for each in json.loads(done.stdout)}

    assert {("GET", "/orders"), ("GET", "/orders/{id}"), ("POST", "/orders")} <= calls.keys()
    assert [each for each in calls.values() if each["num_failures"]] == []
    placed = calls["POST", "/orders"]["num_requests"]
    read = sum(each["num_requests"] for (method, _), each in calls.items() if method == "GET")
    assert read > placed > 0
    assert service.client.get("/orders").json()["total"] >= placed
