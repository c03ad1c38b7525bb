"""What every command does alike: read the settings, speak on stderr, show progress, run to its end."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import msgspec
import structlog
import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from expediter.backends import points
from expediter.settings import Settings, in_users_words, load_settings
from expediter.telemetry import configure_logs

F = TypeVar("F", bound=Callable[..., None])

#: How often a thread may be made to give way, in seconds: the writer's thread must not wait 5 ms for its turn.
SWITCH_SECONDS = 0.0001
#: Objects made before the garbage collector looks at the young ones, and how often until it looks at older ones.
#: With Python's own 700, 10, 10 it takes a fifteenth of intake; hardly anything here is in a cycle.
COLLECT_AFTER = (20_000, 50, 100)

_stderr = Console(stderr=True)
_stdout = Console()

#: Amounts are numbers, with the digits that they came with.
to_json = msgspec.json.Encoder(decimal_format="number").encode

#: The address at the end of an opening sentence.
_ADDRESS = re.compile(r"https?://\S+$")

log = structlog.get_logger("expediter")


class _Run:
    """What this run of the program knows by now."""

    settings: Settings | None = None
    #: What the program says is lines of JSON.
    json = False


def command(app: typer.Typer, *examples: str, name: str | None = None) -> Callable[[F], F]:
    """Make a function a command of `app`, whose help ends with `examples`: what is typed after `expediter`."""

    def register(function: F) -> F:
        shown = "\n\n".join(f"$ expediter {example}" for example in examples)
        return app.command(name, epilog=shown)(function)

    return register


def say(text: str, style: str = "") -> None:
    """Say a line to the person at the terminal, on stderr."""
    # As it is: no markup (a path may have brackets), no wrapping (a line may be copied).
    # That it cannot be written (disk full, nobody reads) must not end a service.
    with suppress(OSError):
        _stderr.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def say_opening(lines: Sequence[str]) -> None:
    """Say what a process says when it starts; with LOG_FORMAT=json, as one line of JSON.

    The first line is a sentence, and each indented one a word and what there is to say about it.
    """
    if not _Run.json:
        for line in lines:
            say(line, style="yellow" if line.startswith(("  Anyone", "  files")) else "")
        return
    facts: dict[str, str] = {}
    if address := _ADDRESS.search(lines[0]):
        facts["address"] = address[0]
    for line in lines[1:]:
        word, _, detail = line.strip().partition(" ")
        if line.startswith("  ") and word not in ("curl", "open"):
            facts["warning" if word == "Anyone" else word] = line.strip() if word == "Anyone" else detail.strip()
    log.info(lines[0], **facts)


def say_error(text: str) -> None:
    """Say why the program ends; with LOG_FORMAT=json, as a line of JSON."""
    if _Run.json:
        log.error(text)
    else:
        say(f"expediter: {text}", style="red")


def in_words(error: Exception) -> str:
    """Return what an error says, by the names of settings that the user set."""
    return str(error) if _Run.settings is None else in_users_words(str(error), _Run.settings)


def settings_of(*, service: bool = False, **overrides: Any) -> Settings:
    """Read the settings; what is not None wins over them. Logs are as they say from here on.

    `service`: it runs on, and where no terminal is its log is for machines.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = _Run.settings = load_settings(**given)
    form = settings.log_format
    if form == "auto":
        form = "json" if service and not sys.stderr.isatty() else "text"
    _Run.json = form == "json"
    configure_logs(settings.log_level, form)
    if moments := os.environ.get(points.VARIABLE):
        points.switch_on(moments)
    return settings


def run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """Run an event loop until `work` is done."""
    sys.setswitchinterval(SWITCH_SECONDS)
    # What is loaded by now stays: the collector need not look at it ever again.
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)
    uvloop.run(work)


def progress_bar(*, total: int | None, what: str) -> tuple[Progress, Callable[[int], None]]:
    """Return a progress bar on stderr, shown on a terminal only, and what moves it forward."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_stderr,
        disable=not _stderr.is_terminal,
    )
    task = progress.add_task(what, total=total)
    return progress, lambda count: progress.advance(task, count)


@contextmanager
def spinner(what: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal that something is under way; what is yielded changes its words."""
    if not _stderr.is_terminal:
        yield lambda words: None
        return
    with _stderr.status(what) as status:
        yield status.update


def print_json(document: Any) -> None:
    """Print a document as indented JSON."""
    print_line(msgspec.json.format(to_json(document), indent=2).decode())


def print_line(text: str) -> None:
    """Print a line of data. Whoever reads may have gone: then the program ends in silence, as others do."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # What Python would flush at its end must not fail there again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def print_styled(*parts: tuple[str, str]) -> None:
    """Print a line of data made of texts and their styles, which are seen on a terminal only."""
    with _stdout.capture() as line:
        _stdout.print(Text.assemble(*parts), soft_wrap=True, highlight=False, end="")
    print_line(line.get().rstrip())


def moment(text: str) -> str:
    """Return a time of the interface as it is read: to the second, in UTC as everything here."""
    return f"{text[:10]} {text[11:19]} UTC"


def what_happened(event: dict[str, Any]) -> str:
    """Return the type of an event and what it changed, for people."""
    data = event["data"]
    order = data.get("order", data)
    facts = [f"{name.replace('_', ' ')} {order[name]}" for name in ("status", "payment_status") if order.get(name)]
    facts += [str(data["last_error"])] if data.get("last_error") else []
    return f"{event['type']:<22}  {', '.join(facts)}".rstrip()
