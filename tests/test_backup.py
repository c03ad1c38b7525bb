"""docs/backup.md, carried out on each database beside a gateway that remembers more than the backup."""

from __future__ import annotations

import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from expediter.backends.databases import parse_url
from servers import missing
from serving import PATIENCE_SECONDS, Serving, environment
from storing import Place
from trying import TrialGateway
from verifying import assert_verified

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "backup.md").read_text(encoding="utf-8")
#: What the page's blocks are about, in turn.
HEADINGS = {
    "sqlite": "SQLite",
    "postgresql": "PostgreSQL",
    "mysql": "MariaDB and MySQL",
    "after": "After the start",
}
#: What each database is called at first on the page: a place, the user and the name of the database.
PAGE_PLACES = {
    "postgresql": {"postgresql://orders@db.example:5432/orders": "{address}"},
    "mysql": {
        "--host=db.example --port=3306 --user=orders": "{place}",
        " orders\n": " {name}\n",
        " orders <": " {name} <",
    },
}


def blocks(kind: str) -> list[str]:
    """Return the commands of a part of the page, block by block."""
    part = re.split(r"^## ", TEXT, flags=re.M)
    (found,) = [each for each in part if each.startswith(HEADINGS[kind])]
    return re.findall(r"^```sh\n(.*?)```", found, re.M | re.S)


def here(block: str, at: Place, backups: Path) -> str:
    """Return a block as it is typed for this database."""
    kind, url = parse_url(at.address)
    facts = {
        "address": at.address,
        "place": f"--host={url.host} --port={url.port} --user={url.username}",
        "name": url.database,
    }
    for said, meant in PAGE_PLACES.get(kind, {}).items():
        block = block.replace(said, meant.format(**facts))
    program = block.split()[0]
    if program != "expediter" and shutil.which(program) is None:
        missing({"postgresql": "postgresql-client", "mysql": "mariadb-client"}[kind])
    return block.replace("/var/backups", str(backups)).replace("expediter ", f"{sys.executable} -m expediter ")


def run(block: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-ec", block],
        cwd=folder,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def order(order_id: str) -> dict[str, object]:
    return {"order_id": order_id, "customer_id": "c", "items": [{"item_id": "i", "quantity": 1, "price": 12.99}]}


def test_after_a_restore_nothing_is_charged_twice_and_what_is_missing_is_listed(
    at: Place, folder: Path, tmp_path: Path
) -> None:
    """One order is charged before the backup, one after it, and one is placed after it."""
    kind = parse_url(at.address)[0]
    backups = tmp_path / "backups"
    backups.mkdir()
    make, restore = blocks(kind)
    with TrialGateway(tmp_path) as gateway:
        settings = {"DATABASE_URL": at.address, "PAYMENT_GATEWAY": gateway.url}
        with Serving(folder, **settings) as service:
            assert service.client.post("/orders", json=order("BEFORE")).status_code == 201
            service.until_rest("BEFORE")
        with Serving(folder, "--no-workers", **settings) as service:
            assert service.client.post("/orders", json=order("BETWEEN")).status_code == 201
            made = run(here(make, at, backups), folder, **settings)
            assert made.returncode == 0, made.stderr
            (backup,) = backups.iterdir()
        with Serving(folder, **settings) as service:
            service.until_rest("BETWEEN")
            assert service.client.post("/orders", json=order("AFTER")).status_code == 201
            service.until_rest("AFTER")
        assert len(gateway.entries()) == 3

        restored = run(here(restore, at, backups), folder, **settings)
        assert restored.returncode == 0, restored.stderr
        with Serving(folder, **settings) as service:
            assert service.until_rest("BETWEEN")["payment_status"] == "paid"
            assert service.client.get("/orders/BEFORE").json()["payment_status"] == "paid"
            assert service.client.get("/orders/AFTER").status_code == 404
            reconcile, verify = here(blocks("after")[0], at, backups).splitlines()
            compared = run(re.sub(r"--since \S+", "", reconcile), folder, **settings)
            assert compared.returncode == 1, compared.stderr
            assert [line.split(":")[0] for line in compared.stdout.splitlines()[:-1]] == ["AFTER"]
            assert run(verify, folder, **settings).returncode == 0
        assert [entry["action"] for entry in gateway.entries()] == ["charge"] * 3
    assert backup.stat().st_size > 0
    assert_verified(at.address, None)


def test_for_a_server_the_command_of_the_page_is_printed_without_the_password(folder: Path) -> None:
    """It is exact: a test of this file carries it out. No file was made, and the exit status says so."""
    for kind, address in {
        "postgresql": "postgresql://orders:hidden@db.example:5432/orders",
        "mysql": "mysql://orders@db.example:3306/orders",
    }.items():
        (command,) = blocks(kind)[0].splitlines()
        target = command.split("=/var")[1].split()[0]
        said = run(f"{sys.executable} -m expediter backup /var{target}", folder, DATABASE_URL=address)
        assert (said.returncode, said.stdout) == (1, command + "\n")
        assert "Nothing was copied" in said.stderr
        assert "hidden" not in said.stdout + said.stderr


def test_a_copy_is_of_one_moment_while_others_write(folder: Path, tmp_path: Path) -> None:
    """Orders arrive all the time: the copy holds every law, and lets only its owner read it."""
    with Serving(folder) as service:
        service.client.post("/orders", json=order("FIRST"))
        over = threading.Event()

        def keep_placing() -> None:
            number = 0
            while not over.is_set():
                service.client.post("/orders", json=order(f"N{number}"))
                number += 1

        busy = threading.Thread(target=keep_placing)
        busy.start()
        try:
            for number in range(3):
                copy = tmp_path / f"copy-{number}.db"
                said = run(f"{sys.executable} -m expediter backup {copy}", folder)
                assert said.returncode == 0, said.stderr
                assert stat.S_IMODE(copy.stat().st_mode) == 0o600
                assert_verified(f"sqlite:///{copy}", None)
        finally:
            over.set()
            busy.join()
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("what", ["there already", "no folder", "cut off", "no database", "damaged"])
def test_a_backup_that_cannot_be_made_says_why_and_leaves_nothing(folder: Path, tmp_path: Path, what: str) -> None:
    """Each refusal is a sentence with what to do, and nothing that was there is changed."""
    with Serving(folder, "--no-workers") as service:
        for number in range(60):
            service.client.post("/orders", json=order(f"N{number}"))
    target = tmp_path / "copies" / "copy.db"
    if what != "no folder":
        target.parent.mkdir()
    if what == "there already":
        target.write_text("mine")
    if what == "cut off":
        target.with_name("copy.db.part").write_text("mine")
    if what == "no database":
        (folder / "orders.db").unlink()
    if what == "damaged":
        with closing(sqlite3.connect(folder / "orders.db")) as raw:
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with (folder / "orders.db").open("r+b") as file:
            file.seek(20 * 4096)
            file.write(b"\xff" * 40 * 4096)
    said = run(f"{sys.executable} -m expediter backup {target}", folder)
    expected = {
        "there already": "exists already",
        "no folder": "cannot be made: No such file",
        "cut off": "another backup is being made, or one was cut off",
        "no database": "There is no database",
        "damaged": "cannot be copied",
    }[what]
    assert said.returncode != 0
    assert expected in said.stderr, said.stderr
    left = {path.name: path.read_text() for path in tmp_path.glob("copies/*")}
    kept = {"there already": {"copy.db": "mine"}, "cut off": {"copy.db.part": "mine"}}
    assert left == kept.get(what, {})
