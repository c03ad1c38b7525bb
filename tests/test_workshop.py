"""The files around the code: the locks, the settings' documents, the README's commands, the built wheel."""

import importlib.util
import json
import re
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

from expediter.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
LOCKS = (
    "requirements.txt",
    "requirements-build.txt",
    "requirements-dev.txt",
    "bench/requirements.txt",
    "tests/clients/requirements.txt",
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
            for folder in ("bench", "tests/clients")
        },
    }


def settings_named_in_tables() -> set[str]:
    """Collect the `NAMES` in the rows of every table of the README and the docs."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    rows = [
        line
        for document in documents
        for line in document.read_text(encoding="utf-8").splitlines()
        if line.lstrip().startswith("|")
    ]
    return {name for row in rows for name in re.findall(r"`([A-Z][A-Z0-9_]*)`", row)}


def load_document(name: str) -> ModuleType:
    """Load what writes a document: a file in docs/, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"document_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETTINGS = {name.upper() for name in Settings.model_fields}


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


def test_the_lock_of_npm_pins_and_hashes_everything_and_names_no_place() -> None:
    """Every package has one exact version and its hash, and no address to get it from."""
    asked = json.loads(read("tests/clients/package.json"))["dependencies"]
    packages = json.loads(read("tests/clients/package-lock.json"))["packages"]
    assert packages.pop("")["dependencies"] == asked
    assert {name: packages[f"node_modules/{name}"]["version"] for name in asked} == asked
    for name, package in packages.items():
        assert re.fullmatch(r"sha(256|512)-[\w+/=]+", package["integrity"]), name
        assert "resolved" not in package, name
    assert "omit-lockfile-registry-resolved=true" in read("tests/clients/.npmrc").splitlines()


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


def test_every_setting_is_in_a_table() -> None:
    """Each setting has a row in a table of the README or of the docs."""
    missing = sorted(SETTINGS - settings_named_in_tables())
    assert not missing, f"add a row to the settings table for: {missing}"


def test_the_lifecycle_is_drawn_from_its_table() -> None:
    """The drawing in the README and in the docs is the one that the table gives; `make docs` renews it."""
    lifecycle = load_document("lifecycle")
    for document in lifecycle.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert lifecycle.BEGIN + lifecycle.drawing() + lifecycle.END in text, f"run make docs for {document.name}"


def test_the_calls_of_other_services_are_those_that_are_tested() -> None:
    """The tables in docs/coming-from.md are those of tests/promises.py; `make docs` writes them."""
    document = load_document("promises")
    text = document.DOCUMENT.read_text(encoding="utf-8")
    assert document.written(text) == text, "run make docs"
    assert text.count("| `") > 56


def test_the_postman_collection_is_made_of_the_openapi_document() -> None:
    """The collection in docs/ is the one that the document gives; `make docs` writes it."""
    postman = load_document("postman")
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
