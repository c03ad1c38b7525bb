"""The command line: what it prints where, what it changes, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import socket
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from auditing import order_ids, rows, wait_until
from expediter import __version__
from serving import Program, Serving, environment

#: Seconds that one command may take.
COMMAND_SECONDS_MAX = 20.0

ORDER = {"customer_name": "Ann", "items": [{"name": "Pen", "quantity": 2, "price": "1.20"}]}


def run(folder: Path, *arguments: str, answer: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `answer` is what is typed into it."""
    return subprocess.run(
        [sys.executable, "-m", "expediter", *arguments],
        cwd=folder,
        env=environment(folder, **settings),
        input=answer,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS_MAX,
        check=False,
    )


def assert_refused(ended: subprocess.CompletedProcess[str], *words: str, status: int = 2) -> None:
    """Assert a refusal (2: of what was asked for): nothing on stdout, a message with `words`, no traceback."""
    said = " ".join(ended.stderr.split())
    assert ended.returncode == status, said
    assert ended.stdout == ""
    assert "Traceback" not in said
    for word in words:
        assert word in said, said


def test_version_is_told(folder: Path) -> None:
    """`--version` prints the name and the version, and touches nothing."""
    ended = run(folder, "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"expediter {__version__}\n", "")
    assert list(folder.iterdir()) == []


def test_without_a_command_help_is_shown(folder: Path) -> None:
    """Without a command the commands are listed; an unknown one is a usage error."""
    assert "serve" in run(folder).stdout
    assert run(folder, "sreve").returncode == 2


def test_serve_opens_with_what_to_try(folder: Path) -> None:
    """The opening lines name the address, the database, its durability, the queue and the cache, and work."""
    with Serving(folder) as service:
        service.wait_for(r"open http://\S+/docs")
        lines = service.log
        assert lines[0] == f"Expediter {__version__} listens on {service.url}"
        text = "\n".join(lines)
        for line in (r"orders   SQLite", f"{folder}/orders.db, power-safe", "cache    memory", "in this process"):
            assert line in text
        command = next(line for line in lines if "curl -d" in line)
        body = command.split("'")[1]
        response = service.client.post("/orders", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 201


def test_the_options_of_serve_win_over_the_environment(folder: Path) -> None:
    """`--host` and `--port` win over HOST and PORT."""
    with Serving(folder, "--port", "0", "--host", "127.0.0.2", PORT="1", HOST="127.0.0.3") as service:
        assert service.url.startswith("http://127.0.0.2:")


def test_seed_makes_orders(folder: Path) -> None:
    """`seed --count 450` prints one line and stores 450 orders with a job each."""
    ended = run(folder, "seed", "--count", "450")
    assert (ended.returncode, ended.stdout) == (0, "Created 450 orders\n"), ended.stderr
    assert len(order_ids(folder)) == 450
    assert rows(folder, "SELECT sum(value) FROM counters WHERE name LIKE 'status:%'") == [(450,)]
    assert rows(folder, "SELECT count(*) FROM jobs") == [(450,)]
    assert run(folder, "seed", "--count", "0").returncode == 2


def test_a_running_service_works_off_what_seed_makes(folder: Path) -> None:
    """Orders that `seed` stores beside a running service are seen by it and brought to rest."""
    with Serving(folder) as service:
        assert service.client.get("/orders").json()["total"] == 0
        assert run(folder, "seed", "--count", "30").returncode == 0
        assert service.client.get("/orders").json()["total"] == 30
        wait_until(lambda: service.client.get("/orders/metrics").json()["completed"]["count"] == 30)


def at_a_terminal(folder: Path, *arguments: str, typed: str) -> tuple[int, str]:
    """Run a command at a terminal where `typed` is typed; return its exit status and what the terminal shows."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "expediter", *arguments],
        cwd=folder,
        env=environment(folder, TERM="xterm", COLUMNS="200"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    os.write(ours, typed.encode())
    with suppress(OSError):  # the other end is closed: the program has ended
        while data := os.read(ours, 4096):
            shown += data
    os.close(ours)
    return process.wait(COMMAND_SECONDS_MAX), shown.decode()


def test_clear_asks_first(folder: Path) -> None:
    """`clear` asks a person at a terminal, and removes nothing unless it is told yes."""
    run(folder, "seed", "--count", "5")
    status, shown = at_a_terminal(folder, "clear", typed="n\n")
    assert status == 1
    assert f"Remove every order from SQLite {sqlite3.sqlite_version}, {folder}/orders.db?" in shown
    assert len(order_ids(folder)) == 5
    status, shown = at_a_terminal(folder, "clear", typed="y\n")
    assert status == 0
    assert "Removed 5 orders" in shown
    assert order_ids(folder) == set()


def test_clear_without_a_terminal_names_the_option(folder: Path) -> None:
    """Where nobody can be asked nothing is removed, whatever is piped in, and `--yes` is named."""
    run(folder, "seed", "--count", "5")
    assert_refused(run(folder, "clear", answer="y\n"), "Nobody can be asked here", "`clear --yes`")
    assert len(order_ids(folder)) == 5


def test_up_shows_that_it_is_under_way(folder: Path) -> None:
    """At a terminal something moves while `up` starts its processes, and the address is printed at the end."""
    try:
        status, shown = at_a_terminal(folder, "up", typed="")
        assert status == 0, shown
        assert "Starting 5 processes" in shown
        assert "Expediter is up at http://127.0.0.1:" in shown
    finally:
        ended = run(folder, "down")
    assert ended.stdout.startswith("Stopped api-1 (pid ")
    assert ended.stderr == ""


def test_the_shell_completes_commands_and_values(folder: Path) -> None:
    """What `--install-completion` sets up completes commands, options and statuses."""
    for words, word, found in (
        ("expediter orders wa", 2, "watch"),
        ("expediter serve --proc", 2, "--processes"),
        ("expediter orders list --status compl", 4, "completed"),
    ):
        asked = {"_EXPEDITER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(word)}
        ended = subprocess.run(
            [Path(sys.executable).with_name("expediter")],
            env=environment(folder, **asked),
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            check=False,
        )
        assert ended.stdout.split() == [found], ended.stderr


def test_work_takes_as_many_jobs_as_it_is_told(folder: Path) -> None:
    """`work --concurrency 7` works off seven jobs at once, whatever the settings say."""
    worker = Program(folder, "work", "--concurrency", "7", WORKER_COUNT="3")
    try:
        worker.wait_for("7 at once")
    finally:
        assert worker.stop() == 0


def test_clear_empties_everything_at_once(folder: Path) -> None:
    """`clear --yes` asks nothing, removes every trace, and a running service shows it in its next answer."""
    with Serving(folder) as service:
        order_id = service.client.post("/orders", json=ORDER, headers={"Idempotency-Key": "k"}).json()["order_id"]
        service.until_rest(order_id)
        assert service.client.get(f"/orders/{order_id}").status_code == 200
        ended = run(folder, "clear", "--yes")
        assert (ended.returncode, ended.stdout) == (0, "Removed 1 orders\n"), ended.stderr
        assert service.client.get(f"/orders/{order_id}").status_code == 404
        assert service.client.get("/orders").json()["orders"] == []
        assert service.client.get("/orders/metrics").json()["total_orders"] == 0
        for table in ("orders", "order_lines", "jobs", "events", "payment_attempts", "idempotency_keys"):
            assert rows(folder, f"SELECT count(*) FROM {table}") == [(0,)], table
        assert service.client.post("/orders", json=ORDER).status_code == 201


def test_cache_reset_reaches_a_running_service(folder: Path) -> None:
    """After `cache reset` the next read of a running service is a miss, the one after it a hit again."""
    with Serving(folder) as service:
        order_id = service.client.post("/orders", json=ORDER).json()["order_id"]
        service.until_rest(order_id)

        def misses_of_a_read() -> int:
            before = misses(service)
            assert service.client.get(f"/orders/{order_id}").status_code == 200
            return misses(service) - before

        misses_of_a_read()
        assert misses_of_a_read() == 0
        ended = run(folder, "cache", "reset")
        assert ended.returncode == 0
        assert ended.stdout.count("\n") == 1
        assert misses_of_a_read() == 1
        assert misses_of_a_read() == 0


def misses(service: Serving) -> int:
    detail = service.client.get("/health").json()["dependencies"]["cache"]["detail"]
    return int(detail.split()[3])


def test_db_upgrade_is_done_once(folder: Path) -> None:
    """The first `db upgrade` makes the tables, the second finds nothing to do, and orders stay."""
    first = run(folder, "db", "upgrade")
    assert (first.returncode, first.stdout) == (0, "The database was upgraded\n"), first.stderr
    run(folder, "seed", "--count", "3")
    second = run(folder, "db", "upgrade")
    assert (second.returncode, second.stdout) == (0, "The database is up to date\n")
    assert len(order_ids(folder)) == 3


def test_two_upgrades_at_once_do_it_once(folder: Path) -> None:
    """Of two `db upgrade` at the same time one does the work, the other finds it done."""
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda _: run(folder, "db", "upgrade"), range(2)))
    assert [each.returncode for each in ended] == [0, 0], [each.stderr for each in ended]
    assert sorted(each.stdout for each in ended) == ["The database is up to date\n", "The database was upgraded\n"]


def test_doctor_says_that_all_is_well(folder: Path) -> None:
    """`doctor` exits 0 and reports the settings, the database, its durability, the queue and the gateway."""
    run(folder, "seed", "--count", "4")
    ended = run(folder, "doctor", ADMIN_PASSWORD="open sesame")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "power-safe" in ended.stdout
    assert "4 ready" in ended.stdout
    assert "failed" not in ended.stdout
    assert "open sesame" not in ended.stdout + ended.stderr
    assert rows(folder, "SELECT count(*) FROM jobs") == [(4,)]


def test_doctor_speaks_json(folder: Path) -> None:
    """`doctor --json` prints one JSON array of findings, each with what, verdict and detail."""
    ended = run(folder, "doctor", "--json")
    findings = {finding["what"]: finding["verdict"] for finding in json.loads(ended.stdout)}
    assert ended.returncode == 0
    assert findings.items() >= {"settings": "ok", "database": "ok", "durability": "ok", "admin": "warning"}.items()


@pytest.mark.parametrize("command", [("doctor",), ("doctor", "--json"), ("serve",), ("seed",), ("db", "upgrade")])
def test_a_broken_database_is_said_clearly(folder: Path, command: tuple[str, ...]) -> None:
    """A file that is no database ends every command with exit 1 or 2, its name and no traceback."""
    (folder / "broken.db").write_bytes(b"this is not a database, whatever its name says\n" * 100)
    ended = run(folder, *command, DATABASE_URL=f"sqlite:///{folder}/broken.db")
    assert ended.returncode in (1, 2)
    assert "broken.db" in "".join((ended.stdout + ended.stderr).split())
    assert "Traceback" not in ended.stderr
    if command == ("doctor", "--json"):
        verdicts = [finding["verdict"] for finding in json.loads(ended.stdout)]
        assert "failed" in verdicts


def test_doctor_reports_a_folder_that_is_not_there(folder: Path) -> None:
    """A database in a folder that does not exist is a failed finding and exit 1, and nothing is created."""
    ended = run(folder, "doctor", DATABASE_URL=f"sqlite:///{folder}/nowhere/orders.db")
    assert ended.returncode in (1, 2)
    assert "nowhere" in ended.stdout + ended.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eighty"),
        ("PORT", "65536"),
        ("STAGES", "payment,shipping"),
        ("DEFAULT_CURRENCY", "XQX"),
        ("WORKER_COUNT", "0"),
        ("ORDERS_CACHE_TTL", "-1"),
        ("CACHE_DISABLED", "perhaps"),
        ("PAYMENT_MOCK_SUCCESS_RATE", "1.5"),
        ("PAYMENT_RETRY_ATTEMPTS", "0"),
        ("DRAIN_SECONDS", "soon"),
        ("LOG_LEVEL", "LOUD"),
        ("LOG_FORMAT", "xml"),
        ("PAYMENT_GATEWAY", "barter"),
        ("PAYMENT_GATEWAY", "simulated://?luck=7"),
        ("FULFILMENT", "pigeon"),
        ("DATABASE_URL", "oracle://localhost/orders"),
        ("DATABASE_URL", "orders"),
        ("PAYMENT_MOCK_LATENCY_MIN", "100"),
        ("ADMIN_PASSWORD_FILE", "missing.txt"),
        ("PAYMENT_GATEWAY", "[/oops]"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(folder: Path, name: str, value: str) -> None:
    """A setting that cannot be used ends `serve` at once with exit 2 and the setting's name."""
    assert_refused(run(folder, "serve", **{name: value}), name)


def test_queued_intake_asks_for_a_broker_and_a_redis(folder: Path) -> None:
    """INTAKE=queued is refused without a broker, and without a Redis that keeps what is not stored yet."""
    assert_refused(run(folder, "serve", INTAKE="queued"), "INTAKE=queued", "BROKER_URL")
    assert_refused(run(folder, "serve", INTAKE="queued", RABBITMQ_HOST="localhost"), "REDIS_URL")


def test_settings_come_from_a_file_too(folder: Path) -> None:
    """A setting in `.env` counts, and the environment wins over it."""
    (folder / ".env").write_text("DEFAULT_CURRENCY=JPY\nSTAGES=nonsense\n")
    with Serving(folder, STAGES="fulfilment") as service:
        order = service.client.post(
            "/orders", json={"customer_name": "Ann", "items": [{"name": "a", "quantity": 1}]}
        )
        assert order.json()["currency"] == "JPY"
        assert service.until_rest(order.json()["order_id"])["payment_status"] == "not_required"


def test_other_machines_are_let_in_on_purpose_only(folder: Path) -> None:
    """HOST=0.0.0.0 is refused without --insecure, and warned about with it."""
    assert_refused(run(folder, "serve", HOST="0.0.0.0"), "HOST=0.0.0.0", "--insecure")
    assert list(folder.iterdir()) == []
    program = Program(folder, "serve", "--insecure", HOST="0.0.0.0")
    try:
        program.wait_for("listens on")
        program.wait_for("Anyone who reaches this address")
        assert program.stop() == 0
    finally:
        if program.process.poll() is None:
            program.kill()


def test_a_port_in_use_is_said(folder: Path) -> None:
    """A port that something else listens on is refused with its number and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(run(folder, "serve", PORT=port), port, "in use", "PORT", status=1)


def test_a_second_service_on_one_port_is_refused(folder: Path) -> None:
    """A second `serve` on the same port does not start, and the first one goes on."""
    with Serving(folder) as service:
        assert_refused(run(folder, "serve", PORT=service.url.rpartition(":")[2]), "in use", status=1)
        assert service.client.get("/healthz").status_code == 200


def test_the_admin_password_may_come_as_a_file(folder: Path) -> None:
    """ADMIN_PASSWORD_FILE opens the admin calls, with its last newline left out, and is never shown."""
    secret = folder / "secret"
    secret.write_text("Sésame ouvre-toi\n", encoding="utf-8")
    with Serving(folder, ADMIN_PASSWORD_FILE=str(secret), LOG_LEVEL="DEBUG") as service:
        body = {"admin_password": "Sésame ouvre-toi", "count": 2}
        assert service.client.post("/admin/seed", json=body).status_code == 201
        body["admin_password"] = "wrong"
        assert service.client.post("/admin/seed", json=body).status_code == 401
    assert "Sésame" not in "\n".join(service.log)


def test_without_an_admin_password_admin_calls_are_off(folder: Path) -> None:
    """Without ADMIN_PASSWORD an admin call is 403, whatever it brings."""
    with Serving(folder) as service:
        assert service.client.post("/admin/reset", json={"admin_password": ""}).status_code == 403


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(folder: Path, address: str) -> None:
    """A database that would not outlive the process is refused by every command that stores orders."""
    for command in ("serve", "seed", "work"):
        assert_refused(run(folder, command, DATABASE_URL=address), "memory")
    assert list(folder.iterdir()) == []


def test_db_path_names_the_file(folder: Path) -> None:
    """DB_PATH is the database's file as a plain path, with whatever characters it has."""
    name = "über [orders] 100%.db"
    ended = run(folder, "seed", "--count", "2", DATABASE_URL="", DB_PATH=name)
    assert ended.returncode == 0, ended.stderr
    assert (folder / name).is_file()


def test_without_settings_the_database_lies_in_the_working_directory(folder: Path) -> None:
    """The default database is expediter.db in the working directory."""
    assert run(folder, "seed", "--count", "1", DATABASE_URL="").returncode == 0
    assert (folder / "expediter.db").is_file()


def test_work_ends_on_a_signal(folder: Path) -> None:
    """`work` says what it works off, works off what is there, and ends with 0 on SIGTERM."""
    run(folder, "seed", "--count", "20")
    program = Program(folder, "work")
    try:
        program.wait_for(r"works off SQLite")
        wait_until(lambda: rows(folder, "SELECT count(*) FROM jobs") == [(0,)])
        assert program.stop() == 0
    finally:
        if program.process.poll() is None:
            program.kill()


def test_logs_can_be_json(folder: Path) -> None:
    """With LOG_FORMAT=json every line is one JSON object: the opening, the log, and why the program ends."""
    with Serving(folder, LOG_FORMAT="json", PAYMENT_GATEWAY="simulated") as service:
        order = ORDER | {"order_id": "A1"}
        service.client.post("/orders", json=order)
        service.until_rest("A1")
        assert service.stop() == 0
    opening = json.loads(service.log[0])
    assert opening["address"] == service.url
    assert opening["orders"].startswith("SQLite")
    assert opening["workers"] == "in this process, 100 at once"
    for line in service.log:
        assert "event" in json.loads(line)
    refused = run(folder, "serve", LOG_FORMAT="json", HOST="0.0.0.0")
    assert refused.returncode == 2
    assert json.loads(refused.stderr)["level"] == "error"


def test_settings_are_shown_and_read_from_a_named_file(folder: Path) -> None:
    """`config` shows what counts and where it comes from; `--env-file` holds for the whole program."""
    (folder / "shop.env").write_text("PORT=8123\nADMIN_PASSWORD=hush\n")
    shown = run(folder, "--env-file", "shop.env", "config", LOG_LEVEL="debug")
    assert shown.returncode == 0
    lines = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines()}
    assert lines["ADMIN_PASSWORD"] == ["********", f"({folder}/shop.env)"]
    assert lines["LOG_LEVEL"] == ["DEBUG", "(environment)"]
    assert lines["LEASE_SECONDS"] == ["4", "(environment)"]
    as_json = json.loads(run(folder, "--env-file", "shop.env", "config", "--json").stdout)
    assert {"name": "STAGES", "value": "payment,fulfilment", "source": "default"} in as_json
    assert_refused(run(folder, "--env-file", "none.env", "config"), "none.env cannot be read")


def test_a_misspelt_setting_is_named_by_doctor(folder: Path) -> None:
    """A line of `.env` that nothing reads is a warning, with what may be meant."""
    (folder / ".env").write_text("WORKER_CONUT=2\n")
    said = run(folder, "doctor")
    assert said.returncode == 0
    assert "warning  settings     WORKER_CONUT in .env is no setting: is WORKER_COUNT meant?" in said.stdout
