"""The files around the code: the locks, the settings' documents, the README's commands, the built wheel."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from expediter.settings import Settings, load_settings
from expediter.settings.fields import OTHERWISE
from expediter.settings.reading import effective

ROOT = Path(__file__).resolve().parents[1]
LOCKS = (
    "requirements.txt",
    "requirements-build.txt",
    "requirements-dev.txt",
    "bench/requirements.txt",
    "tests/clients/requirements.txt",
    "tests/audit/requirements.txt",
)

#: An address, a path, a direct reference, or an option that says where packages come from.
PLACE = re.compile(r"://|\s@\s|(^|[\s=])[./~][\w.]*/|^\s*-|--(index|extra-index|find-links|trusted-host)")

#: A line of .env.example that gives a setting, switched off or on.
ASSIGNMENT = re.compile(r"^#?\s*([A-Z][A-Z0-9_]*)=", re.M)


class Locked(NamedTuple):
    """One entry of a lock: `requirement` without its hashes, and the hashes."""

    requirement: Requirement
    hashes: list[str]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read_lock(name: str) -> dict[str, Locked]:
    """Read a lock into its entries by canonical name; an entry goes on while its lines end in a backslash."""
    text = re.sub(r"^\s*#.*\n?", "", read(name), flags=re.M)
    entries: dict[str, Locked] = {}
    for entry in re.sub(r"\\\n", " ", text).splitlines():
        if entry.strip():
            requirement = Requirement(entry.split("--hash=")[0].strip())
            entries[canonicalize_name(requirement.name)] = Locked(requirement, re.findall(r"--hash=(\S+)", entry))
    return entries


def project() -> dict[str, list[str]]:
    """Read what pyproject.toml asks for, by the lock that must hold it."""
    table = tomllib.loads(read("pyproject.toml"))
    runtime = table["project"]["dependencies"]
    build = table["build-system"]["requires"]
    return {
        "requirements.txt": runtime,
        "requirements-build.txt": build,
        "requirements-dev.txt": [*runtime, *build, *table["project"]["optional-dependencies"]["dev"]],
        **{
            f"{folder}/requirements.txt": [
                line for line in read(f"{folder}/requirements.in").splitlines() if line[0] != "#"
            ]
            for folder in ("bench", "tests/clients", "tests/audit")
        },
    }


def drawing(name: str) -> ModuleType:
    """Load the script in docs/ that draws a document."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(document: Path) -> set[str]:
    """Return the anchor of each heading, as GitHub makes it: lower case, without signs, blanks as dashes."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "bench" / "README.md"]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
SETTINGS = {name.upper() for name in Settings.model_fields}


@pytest.fixture
def nothing_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting is given: a folder without `.env`, and an environment without their names."""
    monkeypatch.chdir(tmp_path)
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_place(lock: str) -> None:
    """A lock says what to install and never where to get it."""
    text = re.sub(r"^\s+--hash=sha256:[0-9a-f]{64}( \\)?$", "", read(lock), flags=re.M)
    assert [line for line in text.splitlines() if PLACE.search(line)] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_and_hashes_everything(lock: str) -> None:
    """Every entry of a lock has one exact version and at least one SHA-256."""
    for requirement, hashes in read_lock(lock).values():
        assert [item.operator for item in requirement.specifier] == ["=="], requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_what_the_project_asks_for(lock: str) -> None:
    """Each dependency in pyproject.toml is locked at a version it allows; if not, `make lock` renews it."""
    locked = read_lock(lock)
    for wanted in map(Requirement, project()[lock]):
        entry = locked.get(canonicalize_name(wanted.name))
        assert entry, f"{lock} lacks {wanted.name}: run make lock"
        (version,) = (item.version for item in entry.requirement.specifier)
        assert wanted.specifier.contains(version), f"{lock} has {wanted.name} {version}: run make lock"


def test_the_development_lock_holds_the_other_two() -> None:
    """What is tested is what is served: the same versions, the same hashes."""
    development = read_lock("requirements-dev.txt")
    for lock in ("requirements.txt", "requirements-build.txt"):
        for name, entry in read_lock(lock).items():
            assert development[name].requirement.specifier == entry.requirement.specifier
            assert development[name].hashes == entry.hashes


@pytest.mark.parametrize("folder", ["tests/clients", "bench/baselines/fastify"])
def test_the_lock_of_npm_pins_and_hashes_everything_and_names_no_place(folder: str) -> None:
    """Every package has one exact version and its hash, and no address to get it from."""
    asked = json.loads(read(f"{folder}/package.json"))["dependencies"]
    packages = json.loads(read(f"{folder}/package-lock.json"))["packages"]
    assert packages.pop("")["dependencies"] == asked
    assert {name: packages[f"node_modules/{name}"]["version"] for name in asked} == asked
    for name, package in packages.items():
        assert re.fullmatch(r"sha(256|512)-[\w+/=]+", package["integrity"]), name
        assert "resolved" not in package, name
    assert "://" not in read(f"{folder}/package-lock.json"), "an address of any kind: make lock leaves them out"
    assert "omit-lockfile-registry-resolved=true" in read(f"{folder}/.npmrc").splitlines()


def test_the_readme_shows_how_to_run_and_test() -> None:
    """The README shows `make run` and `make test`, and every make command in it exists."""
    shown = set(re.findall(r"^\s*\$?\s*make ([a-z-]+)|`make ([a-z-]+)`", read("README.md"), re.M))
    commands = {line or inline for line, inline in shown}
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    assert {"run", "test"} <= commands
    assert commands <= targets


def test_the_example_environment_holds_every_setting_and_nothing_else() -> None:
    """`.env.example` gives each field of Settings once, in upper case, and no other name."""
    assert sorted(ASSIGNMENT.findall(read(".env.example"))) == sorted(SETTINGS)


@pytest.mark.usefixtures("nothing_given")
def test_the_example_environment_is_what_counts_without_it() -> None:
    """`.env.example` with every line switched on is read, and changes nothing."""
    without = load_settings()
    switched_on = re.sub(r"^# ([A-Z][A-Z0-9_]*=)", r"\1", read(".env.example"), flags=re.M)
    Path(".env").write_text(switched_on, encoding="utf-8")
    given = load_settings()
    assert {each.source for each in effective(given) if each.value} == {".env"}
    assert given.model_copy(update=dict.fromkeys(OTHERWISE)) == without.model_copy(update=dict.fromkeys(OTHERWISE))
    assert given.database == without.database


@pytest.mark.usefixtures("nothing_given")
def test_every_setting_is_on_its_page() -> None:
    """docs/settings.md has one row for each setting, with its default and what it is."""
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| (?:`(.*?)`)? \| .*? \| (.+) \|$", read("docs/settings.md"), re.M)
    assert sorted(name for name, _, _ in rows) == sorted(SETTINGS)
    own = {each.name: each.value for each in effective(load_settings())}
    for name, default, _ in rows:
        assert default == (own[name] or OTHERWISE.get(name.lower(), "")), name


@pytest.mark.usefixtures("nothing_given")
def test_what_counts_otherwise_is_so() -> None:
    """Where a field only says that nothing is given, the page has the default that counts."""
    assert load_settings().database == OTHERWISE["database_url"]
    assert load_settings(redis_host="cache").redis == f"redis://cache:{OTHERWISE['redis_port']}"
    password, port = OTHERWISE["rabbitmq_password"], OTHERWISE["rabbitmq_port"]
    assert load_settings(rabbitmq_host="queue").broker == f"amqp://guest:{password}@queue:{port}/"


def test_the_settings_are_written_from_their_fields() -> None:
    """docs/settings.md and `.env.example` are what the fields give; `make docs` renews them."""
    for document, written in drawing("settings").DOCUMENTS.items():
        assert document.read_text(encoding="utf-8") == written(), f"run make docs for {document.name}"


def test_the_lifecycle_is_drawn_from_its_table() -> None:
    """The drawing in the docs is the one that the table gives; `make docs` renews it."""
    lifecycle = drawing("lifecycle")
    assert lifecycle.DOCUMENTS
    for document in lifecycle.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert lifecycle.BEGIN + lifecycle.drawing() + lifecycle.END in text, f"run make docs for {document.name}"


def test_the_types_of_events_are_those_of_the_code() -> None:
    """docs/events.md has every type of event, what it says and its fields; `make docs` writes them."""
    script = drawing("events")
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.BEGIN + script.written() + script.END in text, "run make docs"


def test_the_page_of_commands_is_what_their_help_says() -> None:
    """docs/commands.md has the help of every command; `make docs` writes it."""
    script = drawing("commands")
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.BEGIN + script.written() + script.END in text, "run make docs"
    assert {"expediter restart", "expediter orders watch"} < {name for name, _ in script.commands()}


def test_every_help_ends_with_an_example_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command's help ends with examples of that very command, which its own parser takes."""
    script = drawing("commands")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ledger.jsonl").touch()  # the file that an example names
    for name, command in script.commands():
        examples = script.examples(command)
        assert examples, f"{name} has no example"
        for example in examples:
            words = shlex.split(example.partition(" | ")[0])
            if name == "expediter":
                continue  # its example is another command's
            if words[1] == "--env-file":
                del words[1:3]
            start = len(name.split())
            assert words[:start] == name.split(), example
            command.make_context(name, words[start:])


def test_the_calls_of_other_services_are_those_that_are_tested() -> None:
    """The tables in docs/coming-from.md are those of tests/promises.py; `make docs` writes them."""
    document = drawing("promises")
    text = document.DOCUMENT.read_text(encoding="utf-8")
    assert document.written(text) == text, "run make docs"
    assert text.count("| `") > 56


#: What the rows of docs/limits.md say first, and the constants behind it.
BEHIND_LIMITS = {
    "body": ["web.http.BODY_BYTES_MAX", "web.http.BODY_SECONDS_MAX"],
    "headers": ["web.http.HEADER_BYTES_MAX", "web.server.connections.HEADER_SECONDS_MAX"],
    "path and query": ["web.http.TARGET_BYTES_MAX"],
    "JSON nesting": ["web.faults.DEPTH_MAX"],
    "lines of an order": ["orders.order.LINES_MAX"],
    "amount, price": ["orders.money.AMOUNT_MINOR_MAX"],
    "`metadata`": ["web.payloads.METADATA_ENTRIES_MAX"],
    "page": ["web.api.pages.PAGE_SIZE_MAX"],
    "`offset`": ["web.api.pages.OFFSET_MAX"],
    "requests waiting to be stored": ["store.gathering.QUEUE_REQUESTS_MAX"],
    "wrong admin passwords": ["web.limits.WRONG_SECRETS_MAX"],
    "documents on one page": ["store.queries.PAGE_BYTES_MAX"],
    "rows in a batch; one row of NDJSON": ["web.api.batch.ROWS_MAX", "web.api.batch.BODY_BYTES_MAX"],
    "errors listed in one refusal": ["errors.FAULTS_MAX"],
    "ids in `/orders/metrics` and `/orders/status`": ["web.api.progress.IDS_MAX"],
    "webhook endpoints": ["store.webhooks.ENDPOINTS_MAX"],
    "deliveries sent again by one call": ["store.webhooks.REDELIVERED_MAX"],
    "claims of a job without an outcome": ["work.worker.CLAIMS_MAX"],
}


def test_the_limits_of_callers_are_those_of_the_code() -> None:
    """Each row of docs/limits.md has the values of the constants behind it."""
    units = {"KiB": 1024, "MiB": 1024**2}
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", read("docs/limits.md"), re.M))
    for what, places in BEHIND_LIMITS.items():
        shown = [
            int(n.replace(",", "")) * units.get(u, 1) for n, u in re.findall(r"([\d,]*\d) ?(\w*)", rows[what])
        ]
        constants = [place.rpartition(".") for place in places]
        values = [getattr(importlib.import_module(f"expediter.{module}"), name) for module, _, name in constants]
        assert shown[: len(values)] == values, what


def test_every_limit_is_in_a_table() -> None:
    """Each constant that ends in _MAX has its row in docs/operations.md; `make docs` writes what lacks one."""
    script = drawing("limits")
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.BEGIN + script.written(text) + script.END in text, "run make docs"
    places = dict(script.limits())
    assert len(places) > 100
    assert all(f"| `{place}` |" in text for place in places)
    assert not [place for place, comment in places.items() if not comment], "a limit has no comment"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(document: Path) -> None:
    """A relative link names a file that is there, and a heading in it."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            place, _, anchor = link.partition("#")
            target = (document.parent / place).resolve() if place else document
            assert target.exists(), link
            assert target.is_relative_to(ROOT), link
            assert not anchor or anchor in anchors(target), link


def test_the_postman_collection_is_made_of_the_openapi_document() -> None:
    """The collection in docs/ is the one that the document gives; `make docs` writes it."""
    postman = drawing("postman")
    assert postman.COLLECTION.read_text(encoding="utf-8") == postman.written(), "run make docs"


def test_the_wheel_carries_the_whole_package(tmp_path: Path) -> None:
    """The built wheel holds every file of the package: code, migrations and what the browser loads."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "expediter").rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }
    assert files <= packed
