"""The table of faults in the docs has what the suite has."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_faults_has_those_that_the_suite_knows() -> None:
    """Its rows are the faults, its columns the databases, and a cell is empty where a fault cannot happen.

    Whether the counts are the newest is not looked at: `make test-faults` writes them.
    """
    spec = importlib.util.spec_from_file_location("docs_faults", ROOT / "docs" / "faults.py")
    assert spec is not None and spec.loader is not None
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    text = faults.DOCUMENT.read_text(encoding="utf-8")
    assert faults.written(text, {}) == text, "run make test-faults: a fault is new, gone or renamed"
    assert faults.NOT_YET not in faults.read_cells(text).values(), "run make test-faults: a fault is new"
