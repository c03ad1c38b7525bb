"""The README's tour, taken by somebody slow: before each command, all that is under way has come to its end.

Also by somebody who copies whole blocks: then that is so before each block.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from auditing import wait_until
from servers import missing
from serving import FAST, PATIENCE_SECONDS, Serving
from trying import Trial

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: The README from its first command to the end of the tour.
TOUR = README[README.index("\n## Start\n") : README.index("\n## More\n")]
ADDRESS = "http://127.0.0.1:8000"
#: What `make run` runs, without the program's name.
(RUN,) = re.findall(
    r"^run:.*\n\t@exec \$\(BIN\)/expediter (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M
)

#: The gateway as it is by default, but asked until it answers: with three attempts, one tour in some thousands
#: would meet an order that is never paid.
USUAL = {"PAYMENT_RETRY_ATTEMPTS": "100"}
#: One that fails often, and one that never does.
FLAKY = USUAL | {
    "PAYMENT_MOCK_SUCCESS_RATE": "0.6",
    "PAYMENT_RETRY_DELAY": "0.05",
    "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000",
}
#: Where the programs listen that stand beside the service.
USUAL_ADDRESSES = {"gateway": "http://127.0.0.1:9100", "receive": "http://127.0.0.1:9200"}
STEADY = {"PAYMENT_MOCK_SUCCESS_RATE": "1"}


class Step(NamedTuple):
    """A command of the tour: its block with the text before it, and what the README says that it prints."""

    block: str
    is_first: bool
    command: str
    prints: str

    @property
    def beside(self) -> list[str] | None:
        """The words of an `expediter` command that goes on in the background, or None if it is none."""
        words = shlex.split(self.command, comments=True)
        return words[1:-1] if words[-1] == "&" and words[0] == ".venv/bin/expediter" else None

    @property
    def starts(self) -> dict[str, str] | None:
        """The settings with which it starts the service, or None if it does not."""
        words = shlex.split(self.command, comments=True)
        if words[-2:] != ["make", "run"]:
            return None
        return dict(word.split("=", 1) for word in words[:-2])

    def is_shown_in(self, printed: str) -> bool:
        """Whether all that it is said to print is in what it printed, in that order."""
        shown = (re.escape(part) for line in self.prints.splitlines() for part in line.split("..."))
        return re.search(".*".join(shown), printed, re.S) is not None


def steps() -> Iterator[Step]:
    """Yield every command in order; a line that begins with a blank goes on with the one above."""
    for block, lines in re.findall(r"((?:(?!^```).)*^```sh\n(.*?)^```$)", TOUR, re.M | re.S):
        for found in re.finditer(r"^([^\s#].*\n(?:[ \t].*\n)*)((?:#.*\n)*)", lines, re.M):
            yield Step(block, found.start() == 0, found[1].rstrip(), re.sub("^# ?", "", found[2], flags=re.M))


STEPS = [step for step in steps() if not step.command.startswith("make test")]


def run(command: str, service: Serving, folder: Path) -> str:
    """Run a command as it stands, at the address of the service, and return what it printed."""
    ended = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, service.url)],
        env={"PATH": os.environ["PATH"], "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, f"{command}: {ended.stderr}"
    return ended.stdout.replace("\r", "")


def body(printed: str) -> str:
    """Return what `curl -i` printed below the headers."""
    return printed.partition("\n\n")[2]


def is_idle(service: Serving) -> bool:
    """Whether nothing more happens to any order until somebody asks for it, or reports what they have done."""
    orders = service.client.get("/orders").json()["orders"]
    explained = [service.client.get(f"/orders/{order['order_id']}/explain").json() for order in orders]
    return all(each["at_rest"] or "PATCH its /status" in each["why"] for each in explained)


def serving(folder: Path, settings: dict[str, str]) -> Serving:
    """Start what `make run` does, on a free port; a setting that is empty is as by default."""
    command, *arguments = shlex.split(RUN)
    assert command == "serve"
    default = dict.fromkeys(FAST, "") | {"DATABASE_URL": f"sqlite:///{folder}/expediter.db"}
    return Serving(folder, *arguments, **(default | settings))


@pytest.mark.parametrize(
    ("ending", "gateway", "by_blocks"),
    [(signal.SIGINT, USUAL, False), (signal.SIGKILL, FLAKY, False), (signal.SIGINT, STEADY, True)],
    ids=["ctrl-c", "kill -9", "whole blocks"],
)
def test_the_tour_works_at_a_persons_speed(
    tmp_path: Path, ending: signal.Signals, gateway: dict[str, str], by_blocks: bool
) -> None:
    """Each command in order prints what the README says, however long its reader takes."""
    for program in ("bash", "curl"):
        if shutil.which(program) is None:
            missing(program)
    with ExitStack() as running:
        service = running.enter_context(serving(tmp_path, gateway | (STEPS[0].starts or {})))
        addresses: dict[str, str] = {}
        printed = ""
        for step in STEPS[1:]:
            if step.beside is not None:
                (name,) = step.beside
                program = Trial(tmp_path, name, "--port", "0", printed=tmp_path / name)
                addresses[USUAL_ADDRESSES[name]] = running.enter_context(program).url
                continue
            if step.is_first or not by_blocks:
                wait_until(partial(is_idle, service))
            if step.starts is not None:
                assert "Ctrl-C" in step.block and "`kill -9`" in step.block
                assert service.stop(ending) == (0 if ending is signal.SIGINT else -ending)
                settings = {name: addresses.get(value, value) for name, value in step.starts.items()}
                service = running.enter_context(serving(tmp_path, gateway | settings))
                continue
            command = step.command
            for usual, address in addresses.items():
                command = command.replace(usual, address)
                step = step._replace(prints=step.prints.replace(usual, address))
            before, printed = printed, run(command, service, tmp_path)
            assert step.is_shown_in(printed), f"{step.command}\nis to print\n{step.prints}and printed\n{printed}"
            assert "replayed" not in step.prints or body(printed) == body(before)
            assert ("urn:expediter:problem" in printed) == ('"status":4' in step.prints), printed
        wait_until(lambda: "refund.succeeded" in (tmp_path / "receive").read_text())
        told = re.findall(r" (\S+\.\S+) +(\S+) ", (tmp_path / "receive").read_text())
        shown = service.client.get("/api/v1/orders/DEMO-3/events").json()["events"]
        assert [(type, "DEMO-3") for type in (event["type"] for event in shown)] == told
        look_around(service)


def look_around(service: Serving) -> None:
    """What the text says beside the commands: no order is there twice, one was declined again, pages answer."""
    assert service.client.get("/orders").json()["total"] == 3
    attempts = service.client.get("/orders/DEMO-2/explain").json()["attempts"]
    assert [attempt["outcome"] for attempt in attempts].count("declined") == 2
    placed = service.client.post(
        "/orders", json={"customer_name": "Dave", "items": [{"name": "Tea", "quantity": 1}]}
    )
    assert placed.status_code == 201
    pages = re.findall(rf"(?:`|{ADDRESS})(/[a-z/]+)[`>]", TOUR)
    assert {"/docs", "/health", "/orders/metrics"} <= set(pages)
    assert {page: service.client.get(page).status_code for page in pages} == dict.fromkeys(pages, 200)


def test_the_tour_is_read_as_a_whole() -> None:
    """Every line of the README's commands is run, and fits on two screens with all around it."""
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", TOUR, re.M | re.S) for line in block.splitlines()]
    read = [line for step in steps() for line in (step.command + "\n" + step.prints).splitlines() if line]
    assert len(lines) == len(read)
    assert [step.starts for step in STEPS if step.starts is not None] == [
        {},
        {"PAYMENT_GATEWAY": USUAL_ADDRESSES["gateway"], "FULFILMENT": "manual"},
    ]
    assert STEPS[0].starts == {}
    assert len(README.splitlines()) < 100
    assert max(map(len, README.splitlines())) <= 120
