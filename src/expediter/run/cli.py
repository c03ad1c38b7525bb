"""The command line. Data goes to stdout, logs and progress to stderr; exit 0 is success, 1 failure, 2 usage."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from expediter import __version__
from expediter.backends import points
from expediter.errors import ConfigurationError, ExpediterError
from expediter.run.opening import opening_lines, reachability_lines
from expediter.settings import Settings, effective, in_users_words, load_settings
from expediter.settings.reading import ENV_FILE_VARIABLE
from expediter.telemetry import configure_logs

if TYPE_CHECKING:
    from expediter.run import background, processes
    from expediter.run.service import Service

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
#: Objects made before the garbage collector looks at the young ones, and how often until it looks at older ones.
#: With Python's own 700, 10, 10 it takes a fifteenth of intake; hardly anything here is in a cycle.
COLLECT_AFTER = (20_000, 50, 100)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except ExpediterError as error:
        said = str(error) if _read is None else in_users_words(str(error), _read)
        _say(f"expediter: {said}", style="red")
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)


def _say(text: str, style: str = "") -> None:
    # As it is: no markup (a path may have brackets), no wrapping (a line may be copied).
    # That it cannot be written (disk full, nobody reads) must not end a service.
    with suppress(OSError):
        _stderr.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


#: The settings of this run, once they are read.
_read: Settings | None = None


def _settings(**overrides: Any) -> Settings:
    global _read
    settings = _read = load_settings(**{name: value for name, value in overrides.items() if value is not None})
    configure_logs(settings.log_level, settings.log_format)
    if moments := os.environ.get(points.VARIABLE):
        points.switch_on(moments)
    return settings


def _run(work: Coroutine[Any, Any, None]) -> None:
    sys.setswitchinterval(SWITCH_SECONDS)
    # What is loaded by now stays: the collector need not look at it ever again.
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)
    uvloop.run(work)


def _progress(*, total: int | None, what: str) -> tuple[Progress, Callable[[int], None]]:
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
    env_file: Annotated[
        Path | None, typer.Option("--env-file", help="Read settings from this file instead of .env.")
    ] = None,
) -> None:
    """Takes orders, stores each one before it answers, and brings every one to rest."""
    if env_file is not None:
        # For the processes that this one starts, too.
        os.environ[ENV_FILE_VARIABLE] = str(env_file.absolute())


_Host = Annotated[str | None, typer.Option(help="Address to listen on (HOST).")]
_Port = Annotated[int | None, typer.Option(help="Port to listen on (PORT); 0 picks a free one.")]
_Insecure = Annotated[bool, typer.Option("--insecure", help="Let other machines in without a key.")]
#: What a supervisor hands to its processes.
_Descriptor = Annotated[int | None, typer.Option(hidden=True)]


def _say_all(lines: Sequence[str]) -> None:
    for line in lines:
        _say(line, style="yellow" if line.startswith(("  Anyone", "  files")) else "")


def _supervised(work: Coroutine[Any, Any, None], lifeline: processes.Lifeline | None) -> None:
    try:
        _run(work)
    except ConfigurationError as error:
        if lifeline is None:
            raise
        lifeline.refuse(
            str(error) if _read is None else in_users_words(str(error), _read)
        )  # the supervisor says it, once for all processes
        raise typer.Exit(2) from None


def _lifeline(descriptor: int | None) -> processes.Lifeline | None:
    from expediter.run import processes

    return None if descriptor is None else processes.Lifeline(descriptor)


@app.command()
def serve(
    host: _Host = None,
    port: _Port = None,
    workers: Annotated[int | None, typer.Option(help="Serving processes, on one port (API_WORKERS).")] = None,
    no_workers: Annotated[
        bool, typer.Option("--no-workers", help="Take orders only; `work` does the rest.")
    ] = False,
    insecure: _Insecure = False,
    listen_fd: _Descriptor = None,
    lifeline_fd: _Descriptor = None,
) -> None:
    """Take orders over HTTP, and work them off in the same processes."""
    from expediter.run import serving
    from expediter.web.server import listener

    lifeline = _lifeline(lifeline_fd)
    settings = _settings(host=host, port=port, api_workers=workers)
    at_once = settings.worker_count * settings.worker_concurrency
    if settings.api_workers > 1 and lifeline is None:
        where = f"in each of {settings.api_workers} processes, {at_once} at once"
        plans = _serving(settings, no_workers=no_workers)
        _supervise(settings, plans, insecure=insecure, worked_off=_BESIDE if no_workers else where)
        return

    def announce(opened: Service, address: str) -> None:
        lines = [*reachability_lines(opened), *listener.file_limit_lines()]
        if lifeline is not None:
            lifeline.ready(lines)
        else:
            where = _BESIDE if no_workers else f"in this process, {at_once} at once"
            _say_all(opening_lines(settings, address, lines, where))

    _supervised(
        serving.serve(
            settings,
            working=not no_workers,
            insecure=insecure,
            announce=announce,
            listen_fd=listen_fd,
            lifeline=lifeline,
        ),
        lifeline,
    )


_BESIDE = "none here: `expediter work` works orders off"


def _serving(settings: Settings, *, no_workers: bool) -> list[processes.Plan]:
    from expediter.run.processes import Plan

    command = ("serve", "--no-workers") if no_workers else ("serve",)
    return [Plan(f"api-{number}", command, listens=True) for number in range(1, settings.api_workers + 1)]


def _supervise(
    settings: Settings,
    plans: Sequence[processes.Plan],
    *,
    insecure: bool,
    worked_off: str,
    run_dir: Path | None = None,
    on_ready: Callable[[str, list[str]], None] | None = None,
) -> None:
    """Keep processes alive until told to stop; `on_ready` gets the address and the opening lines, once said."""
    from expediter.run import chores, processes, serving
    from expediter.web.server import listener

    taken = serving.bind(settings, insecure=insecure)
    address = listener.address_of(taken)
    chores.upgrade_database(settings)

    def ready(reachable: list[str]) -> None:
        lines = opening_lines(settings, address, reachable, worked_off)
        _say_all(lines)
        if on_ready is not None:
            on_ready(address, lines)

    supervisor = processes.Supervisor(plans, listener=taken, drain_seconds=settings.drain_seconds, run_dir=run_dir)
    if not asyncio.run(supervisor.run(ready)):
        raise typer.Exit(1)


@app.command()
def work(lifeline_fd: _Descriptor = None) -> None:
    """Work off orders, without taking any; for use beside `serve --no-workers`."""
    from expediter.run import serving

    lifeline = _lifeline(lifeline_fd)
    settings = _settings()

    def announce(opened: Service) -> None:
        reachable = reachability_lines(opened)
        about = f"Expediter {__version__} works off {opened.database.describe()}, {opened.concurrency} at once"
        _say_all([about, *reachable])
        if lifeline is not None:
            lifeline.ready(reachable)

    _supervised(serving.work(settings, announce=announce, lifeline=lifeline), lifeline)


@app.command()
def up(
    host: _Host = None,
    port: _Port = None,
    insecure: _Insecure = False,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until SIGTERM, for systemd and the like.")
    ] = False,
    report_fd: _Descriptor = None,
) -> None:
    """Start API_WORKERS serving and WORKER_COUNT working processes; pid and log files are in RUN_DIR."""
    from expediter.run import background, processes

    settings = _settings(host=host, port=port)
    pid_file = _pid_file(settings)
    if not foreground:
        arguments = ["up", "--foreground", "--host", settings.host, "--port", str(settings.port)]
        arguments += ["--insecure"] if insecure else []
        address, *lines = background.launch(arguments, pid_file, drain_seconds=settings.drain_seconds)
        _say_all(lines)
        print(f"Expediter is up at {address}")
        return

    def report(address: str, lines: list[str]) -> None:
        if report_fd is None:
            print(f"Expediter is up at {address}", flush=True)
        else:
            processes.Lifeline(report_fd).ready([address, *lines])

    # Each works with WORKER_CONCURRENCY: here the count is that of the processes.
    workers = [
        processes.Plan(f"worker-{number}", ("work",), {"WORKER_COUNT": "1"})
        for number in range(1, settings.worker_count + 1)
    ]
    with pid_file:
        _supervise(
            settings,
            [*_serving(settings, no_workers=True), *workers],
            insecure=insecure,
            worked_off=f"{settings.worker_count} processes, {settings.worker_concurrency} at once in each",
            run_dir=pid_file.path.parent,
            on_ready=report,
        )


@app.command()
def down() -> None:
    """Stop what `up` started: requests and jobs under way end first."""
    from expediter.run import background

    settings = _settings()
    pid_file = _pid_file(settings)
    stopped = background.stop(pid_file, drain_seconds=settings.drain_seconds)
    print(f"Nothing is up ({pid_file.path})" if stopped is None else f"Stopped {stopped}")


def _pid_file(settings: Settings) -> background.PidFile:
    from expediter.run import background

    return background.PidFile(Path(settings.run_dir) / "expediter.pid")


@app.command()
def config(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show every setting as it counts, and where it comes from; secrets as stars."""
    import msgspec

    found = effective(_settings())
    if as_json:
        print(msgspec.json.format(msgspec.json.encode([each._asdict() for each in found]), indent=2).decode())
        return
    width = max(len(each.name) for each in found)
    for each in found:
        print(f"{each.name:<{width}}  {each.value or '-'}  ({each.source})")


@app.command()
def seed(count: Annotated[int, typer.Option(min=1, max=10_000_000, help="How many orders.")] = 100) -> None:
    """Make up orders and store them."""
    from expediter.run import chores

    progress, advance = _progress(total=count, what="Seeding")
    with progress:
        _run(chores.seed(_settings(), count, advance))
    print(f"Created {count} orders")


@app.command()
def clear(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove every order and everything that belongs to one."""
    from expediter.run import chores

    settings = _settings()
    if not yes:
        where = chores.database_name(settings)
        typer.confirm(f"Remove every order from {where}?", abort=True, err=True)
    found: list[int] = []
    _run(chores.clear(settings, found.append))
    print(f"Removed {found[0]} orders")


@app.command()
def archive(
    folder: Annotated[Path, typer.Argument(help="Where the file is made.")],
    older_than: Annotated[float, typer.Option(min=1, metavar="DAYS", help="Days that an order is at rest.")] = 90,
) -> None:
    """Move the history of orders long at rest out of the database into a file; the orders stay."""
    from expediter.run import chores
    from expediter.upkeep.archive import Archived

    found: list[Archived] = []
    progress, advance = _progress(total=None, what="Archiving")
    with progress:
        _run(chores.move_to_archive(_settings(), folder, older_than, advance, found))
    (moved,) = found
    if moved.path is None:
        print(f"No order with a history here has been at rest for {older_than:g} days")
    else:
        print(f"Moved {moved.events} events of {moved.orders} orders to {moved.path}")


@app.command()
def verify(
    ledger: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The simulated gateway's ledger, to compare.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold everything that is stored against the conservation laws; exit 1 and name what breaks one."""
    import msgspec

    from expediter.orders.laws import Verified
    from expediter.run import chores

    found: list[Verified] = []
    progress, advance = _progress(total=None, what="Verifying")
    with progress:
        _run(chores.verify_database(_settings(), ledger, advance, found))
    (verified,) = found
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(verified), indent=2).decode())
    else:
        for breach in verified.breaches:
            print(f"{breach.order_id or '-'}: {breach.law}")
        print(f"{verified.orders} orders, {verified.found} breaches of the laws")
    if verified.found:
        raise typer.Exit(1)


@cache_app.command("reset")
def cache_reset() -> None:
    """Empty the cache of every process on this database."""
    from expediter.run import chores

    _run(chores.reset_cache(_settings()))
    print("Every cache of this database is emptied before its next use")


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Bring the database's structure to this version; other commands do it by themselves."""
    from expediter.run import chores

    settings = _settings()
    changed = chores.upgrade_database(settings)
    print("The database was upgraded" if changed else "The database is up to date")


@db_app.command("restored")
def db_restored() -> None:
    """Say that the database was restored from a backup: what was accepted before and is not stored is dropped."""
    from expediter.run import chores

    _run(chores.begin_anew(_settings()))
    print("What was accepted before and is not stored is dropped, and every cache is emptied")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check the settings, what can be reached, and how durable it is."""
    import msgspec

    from expediter.run import chores
    from expediter.upkeep.doctor import Finding

    findings: list[Finding] = []
    _run(chores.examine(_settings(), findings))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(findings), indent=2).decode())
    else:
        for finding in findings:
            print(f"{finding.verdict:<7}  {finding.what:<12} {finding.detail}")
    if any(finding.verdict == "failed" for finding in findings):
        raise typer.Exit(1)
