"""Two versions on one database: this one, and a newer one that is made of it by two more steps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from expediter.store.migrations import BEFORE, HEAD, NEEDS
from serving import PATIENCE_SECONDS, Program, Serving, environment
from storing import Place
from verifying import assert_verified

SOURCE = Path(__file__).resolve().parents[2] / "src"
#: Orders that go through each pair of versions: EXPEDITER_SIDE_BY_SIDE=500 is 2,000 in all.
ORDERS = int(os.environ.get("EXPEDITER_SIDE_BY_SIDE", "8"))
#: What the newer version adds, which processes of before do not mind; and what they cannot work beside.
STEPS = {
    "0098": (
        HEAD,
        NEEDS,
        "op.add_column('orders', sa.Column('gift', sa.String(40), nullable=True))\n"
        "    op.add_column('jobs', sa.Column('lane', sa.Integer, nullable=False, server_default='0'))\n"
        "    op.add_column('events', sa.Column('region', sa.String(8), nullable=True))",
    ),
    "0099": ("0098", "0099", "op.add_column('orders', sa.Column('packed', sa.Integer, nullable=True))"),
}
STEP = """import sqlalchemy as sa
from alembic import op

revision = "{number}"
down_revision = "{before}"
needs = "{needs}"


def upgrade() -> None:
    {change}
"""


@pytest.fixture
def newer(tmp_path: Path) -> dict[str, str]:
    """Return the settings with which a program is of the newer version."""
    package = tmp_path / "newer"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    folder = package / "expediter" / "store" / "migrations"
    for number, (before, needs, change) in STEPS.items():
        text = STEP.format(number=number, before=before, needs=needs, change=change)
        (folder / "versions" / f"{number}_more.py").write_text(text)
    module = folder / "__init__.py"
    text = re.sub(
        r"^HEAD = .*\nBEFORE = .*\nNEEDS = .*|^HEAD = .*", 'HEAD = "0099"', module.read_text(), flags=re.M
    )
    text = re.sub(r"^BEFORE = .*", 'BEFORE = "0098"', text, flags=re.M)
    module.write_text(text)
    return {"PYTHONPATH": str(package)}


def command(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expediter", *words],
        cwd=folder,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def place(service: Serving, letter: str) -> list[str]:
    ids = [f"{letter}{number}" for number in range(ORDERS)]
    for order_id in ids:
        order: dict[str, Any] = {"order_id": order_id, "customer_id": "c"}
        order["items"] = [{"item_id": "i", "quantity": 1, "price": 12.99}]
        assert service.client.post("/orders", json=order).status_code == 201
    return ids


def worker(folder: Path, **settings: str) -> Program:
    program = Program(folder, "work", **settings)
    program.wait_for("works off")
    return program


def test_orders_go_through_both_versions_while_one_takes_the_other_s_place(
    at: Place, folder: Path, newer: dict[str, str]
) -> None:
    """Doors and workers of both meet on one database; the older one ends, and then it may not come back."""
    here = {"DATABASE_URL": at.address}
    programs: list[Program] = []
    with Serving(folder, "--no-workers", **here) as door:
        try:
            programs.append(worker(folder, **here))
            ids = place(door, "A")
            told = command(folder, "db", "upgrade", "--before", **here, **newer)
            assert told.stdout.splitlines()[0] == "The database was upgraded", told.stderr
            assert "`expediter db upgrade --after`" in told.stdout
            ids += place(door, "B")
            programs.pop().kill()
            # A process of the older version begins beside the newer structure, and the other way round.
            programs.append(worker(folder, **here))
            assert "at step 0098, of a newer version" in command(folder, "doctor", **here).stdout
            with Serving(folder, "--no-workers", **here, **newer) as other:
                ids += place(other, "C")
                programs.append(worker(folder, **here, **newer))
                ids += place(door, "D")
                programs.pop(0).kill()
                for order_id in ids:
                    assert other.until_rest(order_id)["status"] == "completed"
                    assert door.client.get(f"/orders/{order_id}").json()["status"] == "completed"
                door.stop()
                told = command(folder, "db", "upgrade", "--after", **here, **newer)
                assert told.stdout == "The database was upgraded\n", told.stderr
                refused = command(folder, "serve", **here)
                assert refused.returncode == 2
                assert "needs step 0099" in refused.stderr
                assert "upgrade the program" in refused.stderr
                for order_id in place(other, "E"):
                    assert other.until_rest(order_id)["status"] == "completed"
        finally:
            for program in programs:
                program.kill()
    assert_verified(at.address, None)


def test_what_this_version_does_not_know_is_left_alone_order_by_order(at: Place, folder: Path) -> None:
    """A status, an action and an event of a newer version: the order waits for that one, and the others go on."""
    with Serving(folder, "--no-workers", DATABASE_URL=at.address) as service:
        place(service, "A")
        at.change("UPDATE alembic_version SET version_num = '9999'")
        at.change("UPDATE orders SET status = 'packing' WHERE order_id = 'A0'")
        at.change("UPDATE jobs SET kind = 'pack' WHERE order_id = 'A1'")
        at.change("UPDATE events SET type = 'order.weighed' WHERE order_id = 'A2'")
        program = worker(folder, DATABASE_URL=at.address)
        try:
            for number in range(2, ORDERS):
                assert service.until_rest(f"A{number}")["status"] == "completed"
        finally:
            assert program.stop() == 0
        assert service.client.get("/orders/A0").status_code == 503
        assert service.client.get("/orders/status").json()["dead"] == 0
        assert service.client.get("/orders/A1").json()["status"] == "pending"
        page = service.client.get("/orders").json()
        assert {order["order_id"] for order in page["orders"]} >= {f"A{number}" for number in range(1, ORDERS)}
        types = [event["type"] for event in service.client.get("/orders/A2/events").json()["events"]]
        assert types[0] == "order.weighed"
        feed = service.client.get("/api/v1/events", params={"limit": "200"}).json()
        assert "order.weighed" in [event["type"] for event in feed["events"]]
        at.change("UPDATE orders SET status = 'pending' WHERE order_id = 'A0'")
        at.change("UPDATE jobs SET kind = 'charge' WHERE order_id = 'A1'")
        at.change("UPDATE events SET type = 'order.placed' WHERE type = 'order.weighed'")
    with Serving(folder, DATABASE_URL=at.address) as service:
        for number in range(2):
            assert service.until_rest(f"A{number}")["status"] == "completed"
    assert_verified(at.address, None)


def test_the_constants_are_those_of_the_steps() -> None:
    """The newest step says what it needs, and a start makes no step that is behind BEFORE."""
    folder = SOURCE / "expediter" / "store" / "migrations" / "versions"
    (newest,) = folder.glob(f"{HEAD}_*.py")
    assert f'needs = "{NEEDS}"' in newest.read_text()
    assert list(folder.glob(f"{BEFORE}_*.py"))
    assert NEEDS <= BEFORE <= HEAD
