"""The programs that make clients of the interface, and Locust: `make clients` puts them into `.clients`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from servers import missing
from serving import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = ROOT / ".clients"
PYTHON = CLIENTS / "python" / "bin"
_HOW = "make clients"


def python_program(name: str) -> str:
    """Return the path of a program from the clients' own Python environment."""
    if not (CLIENTS / "python" / ".lock").exists():
        missing(name, _HOW)
    return str(PYTHON / name)


def node_modules() -> Path:
    """Return the folder with what npm installed."""
    for program, package in (("node", "nodejs"), ("npm", "npm")):
        if shutil.which(program) is None:
            missing(package)
    if not (CLIENTS / "node" / ".lock").exists():
        missing("what tests/clients/package.json names", _HOW)
    return CLIENTS / "node" / "node_modules"


def environment() -> dict[str, str]:
    """Return what such a program needs of the environment, and nothing that would change what it does."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "PATH": f"{PYTHON}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program to its end in `folder`, and return what it said."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
