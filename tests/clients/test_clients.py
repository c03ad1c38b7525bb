"""Clients made of /openapi.json by the usual programs: they are made without a word, compile, and work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from installed import node_modules, python_program, run
from serving import Serving

HERE = Path(__file__).resolve().parent
#: What the five calls say, beside the id of the order.
SAID = {
    "placed": {"total": 29.47},
    "got": {"status": "pending", "table": 7, "quantity": 2},
    "cancelled": {"code": 202, "status": "cancelled"},
    "refused": {"code": 422, "fields": ["/items/0/quantity"]},
}


def described(service: Serving, folder: Path) -> Path:
    """Write down the document that a service serves."""
    file = folder / "openapi.json"
    file.write_bytes(service.client.get("/openapi.json").content)
    return file


def assert_said(said: Any, service: Serving) -> None:
    """Assert that a client was told what it should have been told, and that its order is cancelled."""
    order_id = said["placed"].pop("order_id")
    assert said["got"].pop("order_id") == order_id
    assert said.pop("listed") == [order_id]
    assert said == SAID
    assert service.client.get(f"/orders/{order_id}").json()["status"] == "cancelled"


def test_the_document_breaks_no_rule(idle_service: Serving, tmp_path: Path) -> None:
    """Redocly's and Spectral's default rules find no error in it, and nothing to warn of."""
    for name in ("lint.mjs", "package.json"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(node_modules())

    done = run(tmp_path, "node", "lint.mjs", described(idle_service, tmp_path))

    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stdout + done.stderr


def test_a_python_client_works(idle_service: Serving, tmp_path: Path) -> None:
    """The client of openapi-python-client places, reads, lists and cancels an order, and reads a refusal."""
    document = described(idle_service, tmp_path)
    program = python_program("openapi-python-client")
    made = run(
        tmp_path,
        program,
        *("generate", "--path", document, "--output-path", tmp_path / "generated"),
        *("--meta", "none", "--fail-on-warning"),
    )
    assert made.returncode == 0, made.stdout + made.stderr
    shutil.copy(HERE / "five_calls.py", tmp_path)

    done = run(tmp_path, python_program("python"), "five_calls.py", idle_service.url)

    assert done.returncode == 0, done.stderr
    assert_said(json.loads(done.stdout), idle_service)


@pytest.fixture(scope="module")
def compiled(idle_service: Serving, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Compile the TypeScript files with the types of openapi-typescript; return the folder and what was said."""
    folder = tmp_path_factory.mktemp("typescript")
    modules = node_modules()
    (folder / "node_modules").symlink_to(modules)
    for name in ("five_calls.ts", "wrong.ts", "tsconfig.json", "package.json"):
        shutil.copy(HERE / name, folder)
    document = described(idle_service, folder)
    made = run(folder, modules / ".bin" / "openapi-typescript", document, "-o", "schema.ts")
    assert made.returncode == 0, made.stdout + made.stderr
    return folder, run(folder, modules / ".bin" / "tsc", "--pretty", "false").stdout


def test_a_typescript_client_works(idle_service: Serving, compiled: tuple[Path, str]) -> None:
    """Strict TypeScript compiles; the client of openapi-fetch does the same five calls, and is told the same."""
    folder, complaints = compiled
    assert [line for line in complaints.splitlines() if not line.startswith(("wrong.ts", " "))] == []

    done = run(folder, "node", "out/five_calls.js", idle_service.url)

    assert done.returncode == 0, done.stderr
    assert_said(json.loads(done.stdout), idle_service)


def test_a_mistake_does_not_compile(compiled: tuple[Path, str]) -> None:
    """An unknown status, a quantity that is missing, a field that is not there: the compiler points to each."""
    _, complaints = compiled
    lines = (HERE / "wrong.ts").read_text(encoding="utf-8").splitlines()
    mistakes = [number for number, line in enumerate(lines, 1) if "// mistake: " in line]

    found = {int(number) for number in re.findall(r"^wrong\.ts\((\d+),", complaints, re.M)}

    assert sorted(found) == mistakes, complaints
