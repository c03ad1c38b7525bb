"""`expediter keys`, and the door that it opens: who may listen where, and how the command line gives a key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2

from auditing import wait_until
from serving import Program, Serving, environment, make_database
from storing import rows


def run(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `expediter` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "expediter", *words],
        cwd=folder,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
    )


def made(folder: Path, name: str, *scopes: str) -> str:
    """Make a key on the command line and return it."""
    done = run(folder, "keys", "create", name, *[word for scope in scopes for word in ("--scope", scope)])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_keys_on_the_command_line(folder: Path) -> None:
    """They are made, listed and revoked beside a running service, or without one; each is shown once."""
    make_database(folder, {})
    done = run(folder, "keys", "create", "till 3", "--scope", "orders:read", "--expires", "90d", "--json")
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["key"].startswith("exp_") and document["scopes"] == ["orders:read"]
    assert document["expires_at"] is not None

    taken = run(folder, "keys", "create", "till 3", "--scope", "admin")
    assert (taken.returncode, "till 3" in taken.stderr) == (1, True)

    revoked = run(folder, "keys", "revoke", "till 3")
    assert (revoked.returncode, document["id"] in revoked.stdout) == (0, True)
    listed = run(folder, "keys", "list").stdout
    assert all(word in listed for word in (document["id"], "till 3", "orders:read", "never used", "revoked"))
    assert run(folder, "keys", "create", "x", "--scope", "admin", "--expires", "soon").returncode == 2
    assert document["key"] not in "".join((listed, taken.stderr, revoked.stdout))
    assert len(rows(folder, "SELECT digest FROM api_keys")[0][0]) == 64


def test_a_key_for_admin_calls_and_the_key_of_the_command_line(folder: Path) -> None:
    """Admin calls are off without a password or a key for them; `--url` asks with EXPEDITER_API_KEY."""
    with Serving(folder, "--no-workers") as service:
        assert any("nobody is asked for an API key" in line for line in service.log)
        assert service.client.post("/admin/seed").status_code == 403
        key = made(folder, "ops", "admin")
        headers = {"X-API-Key": key}
        wait_until(lambda: service.client.post("/admin/seed", json={"count": 1}, headers=headers).is_success)
        refused = service.client.post("/admin/seed", headers={"X-Admin-Password": "guessed"})
        assert (refused.status_code, "Bearer" in refused.headers["www-authenticate"]) == (401, True)

        words = ("orders", "list", "--url", service.url, "--json")
        assert "Give an API key" in run(folder, *words).stderr
        (folder / "key").write_text(f"{key}\n")
        known = run(folder, *words, EXPEDITER_API_KEY_FILE=str(folder / "key"))
        assert known.returncode == 0 and len(known.stdout.splitlines()) == 1, known
        status = run(folder, "status", "--url", service.url, EXPEDITER_API_KEY=key)
        assert (status.returncode, "jobs" in status.stdout) == (0, True), status
        # Whoever has the database has everything, and needs no key.
        assert run(folder, "orders", "list", "--json").stdout == known.stdout
        assert not any(key in text for text in (*service.log, known.stderr, status.stderr))


def test_others_are_let_in_with_a_key(folder: Path) -> None:
    """With a key a service may listen to other machines; it goes on asking when its last key is revoked."""
    make_database(folder, {})
    refused = run(folder, "serve", HOST="0.0.0.0")
    assert (refused.returncode, "expediter keys create" in refused.stderr) == (2, True)
    key = made(folder, "till", "orders:read")
    program = Program(folder, "serve", "--no-workers", "--processes", "2", HOST="0.0.0.0")
    try:
        port = program.wait_for(r"listens on http://[\d.]+:(\d+)")[1]
        assert "there is 1" in program.wait_for("access   for whoever has an API key.*").string
        program.wait_for("X-API-Key")
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert client.get("/orders").status_code == 401
            assert client.get("/orders", headers={"X-API-Key": key}).status_code == 200
            assert run(folder, "keys", "revoke", "till").returncode == 0
            wait_until(lambda: client.get("/orders", headers={"X-API-Key": key}).status_code == 401)
            assert [client.get("/orders").status_code for _ in range(5)] == [401] * 5
        assert program.stop() == 0
        assert not any("Anyone who reaches" in line for line in program.log)
    finally:
        if program.process.poll() is None:
            program.kill()
