"""The Postman collection in docs/, run by newman against a service."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from expediter.web import operations_document
from installed import ROOT, node_modules, run
from serving import ADMIN_PASSWORD, Serving

COLLECTION = ROOT / "docs" / "expediter.postman_collection.json"


def run_collection(service: Serving, folder: Path, *options: str) -> list[tuple[str, str]]:
    """Run the collection; assert that every assertion held; return the calls with their paths, in order."""
    report = folder / "report.json"
    done = run(
        folder,
        *(node_modules() / ".bin" / "newman", "run", COLLECTION, "--color", "off", *options),
        *("--env-var", f"base_url={service.url}", "--env-var", f"admin_password={ADMIN_PASSWORD}"),
        *("--reporters", "cli,json", "--reporter-json-export", report),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))["run"]
    assert found["failures"] == []
    requests = [execution["request"] for execution in found["executions"]]
    assert found["stats"]["assertions"]["total"] >= len(requests) > 0
    return [(each["method"], "/" + "/".join(each["url"].get("path", []))) for each in requests]


def test_the_collection_calls_every_operation(service: Serving, tmp_path: Path) -> None:
    """From top to bottom on a fresh service: every operation is called, and succeeds."""
    called = run_collection(service, tmp_path)
    paths = operations_document()["paths"]
    operations = [(method.upper(), path) for path, methods in paths.items() for method in methods]

    def is_called(method: str, path: str) -> bool:
        pattern = re.compile(re.sub(r"\{\w+\}", r"((?:ORD-|wh_|key_)\\w+)", path))
        return any(method == each and pattern.fullmatch(where) for each, where in called)

    assert [operation for operation in operations if not is_called(*operation)] == []
    assert len(operations) > 30


def test_its_first_folder_is_what_clients_of_the_streams_service_call(tmp_path: Path) -> None:
    """The four calls come first, and go the same way on a service that speaks as that one does."""
    first = json.loads(COLLECTION.read_text(encoding="utf-8"))["item"][0]["name"]
    with Serving(tmp_path, COMPAT="streams") as service:
        called = run_collection(service, tmp_path, "--folder", first)
    placed, read, *others = called
    assert (placed, read[0], read[1].startswith("/orders/ORD-")) == (("POST", "/orders"), "GET", True)
    assert others == [("GET", "/orders/status"), ("GET", "/orders/metrics")]
