"""A database that became read-only is found out by looking: nobody need place an order first."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from auditing import wait_until
from bringing import read_only
from callers import ITEMS
from enduring import Fault, Meanwhile, Mortals, Scene
from known import SERVERS

FAULT = Fault("database read-only, without orders", read_only, Meanwhile.REFUSED)


@pytest.mark.parametrize("database", SERVERS)
def test_a_database_that_became_read_only_is_found_out_by_looking(
    folder: Path, mortals: Mortals, database: str
) -> None:
    """No write need fail first: readiness is 503, and back once the database takes writes again."""
    with ExitStack() as stack:
        client = (scene := Scene(folder, FAULT, database, mortals, stack)).client
        with read_only(scene):
            for path in ("/readyz", "/health"):
                wait_until(lambda path=path: client.get(path).status_code == 503)  # type: ignore[misc]
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/orders", json={"customer_id": "c", "items": ITEMS}).status_code == 201
