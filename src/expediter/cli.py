"""The command line. Data goes to stdout, logs and progress to stderr; exit 0 is success, 1 failure, 2 usage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from expediter import __version__
from expediter.errors import ConfigurationError, ExpediterError
from expediter.settings import Settings, load_settings
from expediter.telemetry import configure_logs

app = typer.Typer(
    help="Takes orders, stores each one before it answers, and brings every one to rest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cache_app = typer.Typer(help="The cache of reads.", no_args_is_help=True)
db_app = typer.Typer(help="The database's structure.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
app.add_typer(db_app, name="db")

_stderr = Console(stderr=True)

#: How often a thread may be made to give way, in seconds: the writer's thread must not wait 5 ms for its turn.
SWITCH_SECONDS = 0.0001


def main() -> None:
    """Run the command line."""
    try:
        app()
    except ConfigurationError as error:
        _say(f"expediter: {error}", style="red")
        sys.exit(2)
    except ExpediterError as error:
        _say(f"expediter: {error}", style="red")
        sys.exit(1)


def _say(text: str, style: str = "") -> None:
    # As it is: no markup (a path may have brackets), no wrapping (a line may be copied).
    _stderr.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _settings(**overrides: Any) -> Settings:
    settings = load_settings(**{name: value for name, value in overrides.items() if value is not None})
    configure_logs(settings.log_level, settings.log_format)
    return settings


def _run(work: Coroutine[Any, Any, None]) -> None:
    sys.setswitchinterval(SWITCH_SECONDS)
    uvloop.run(work)


def _progress(*, total: int, what: str) -> tuple[Progress, Callable[[int], None]]:
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


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"expediter {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Takes orders, stores each one before it answers, and brings every one to rest."""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (PORT); 0 picks a free one.")] = None,
    no_workers: Annotated[
        bool, typer.Option("--no-workers", help="Take orders only; `work` does the rest.")
    ] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let other machines in without a key.")] = False,
) -> None:
    """Take orders over HTTP, and work them off in the same process."""
    from expediter import service

    settings = _settings(host=host, port=port)

    def announce(opened: service.Service, address: str) -> None:
        queue = "by `expediter work`" if no_workers else f"in this process, {opened.concurrency} at once"
        for line in (
            f"Expediter {__version__} listens on {address}",
            f"  orders   {opened.database.describe()}, {opened.database.durability}",
            f"  queue    in the database; worked off {queue}",
            f"  cache    {opened.cache.name}",
            "Try:",
            f"  curl {address}/health",
            f"  curl -d '{_EXAMPLE}' -H 'Content-Type: application/json' {address}/orders",
            f"  open {address}/docs",
        ):
            _say(line)
        if not settings.loopback:
            _say("  Anyone who reaches this address may place and change orders.", style="yellow")

    _run(service.serve(settings, working=not no_workers, insecure=insecure, announce=announce))


_EXAMPLE = '{"customer_name": "Alice", "items": [{"name": "Pen", "quantity": 2, "price": 1.20}]}'


@app.command()
def work() -> None:
    """Work off orders, without taking any; for use beside `serve --no-workers`."""
    from expediter import service

    settings = _settings()

    def announce(opened: service.Service) -> None:
        _say(f"Expediter {__version__} works off {opened.database.describe()}, {opened.concurrency} at once")

    _run(service.work(settings, announce=announce))


@app.command()
def seed(count: Annotated[int, typer.Option(min=1, max=10_000_000, help="How many orders.")] = 100) -> None:
    """Make up orders and store them."""
    from expediter import service

    progress, advance = _progress(total=count, what="Seeding")
    with progress:
        _run(service.seed(_settings(), count, advance))
    print(f"Created {count} orders")


@app.command()
def clear(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove every order and everything that belongs to one."""
    from expediter import service

    settings = _settings()
    if not yes:
        typer.confirm(f"Remove every order from {settings.database}?", abort=True, err=True)
    found: list[int] = []
    _run(service.clear(settings, found.append))
    print(f"Removed {found[0]} orders")


@cache_app.command("reset")
def cache_reset() -> None:
    """Empty the cache of every process on this database."""
    from expediter import service

    _run(service.reset_cache(_settings()))
    print("Every cache of this database is emptied before its next use")


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Bring the database's structure to this version; other commands do it by themselves."""
    from expediter.service import upgrade_database

    settings = _settings()
    changed = upgrade_database(settings)
    print("The database was upgraded" if changed else "The database is up to date")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check the settings, what can be reached, and how durable it is."""
    import msgspec

    from expediter import service

    findings: list[service.Finding] = []
    _run(service.examine(_settings(), findings))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(findings), indent=2).decode())
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "warning": "note", "failed": "FAIL"}[finding.verdict]
            print(f"{mark}  {finding.what:<12} {finding.detail}")
    if any(finding.verdict == "failed" for finding in findings):
        raise typer.Exit(1)
