"""The commands that run the service: in the foreground, in the background, and what one asks about it then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expediter import __version__
from expediter.errors import ConfigurationError
from expediter.run.cli.output import (
    command,
    in_words,
    print_json,
    print_line,
    run_to_end,
    say,
    say_opening,
    settings_of,
    spinner,
)
from expediter.run.opening import access_line, opening_lines, reachability_lines
from expediter.settings import Settings

if TYPE_CHECKING:
    from expediter.run import background, processes
    from expediter.run.service import Service

app = typer.Typer()

Host = Annotated[str | None, typer.Option(help="Address to listen on (HOST).")]
Port = Annotated[int | None, typer.Option(help="Port to listen on (PORT); 0 picks a free one.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Let other machines in without a key.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
#: What a supervisor hands to its processes.
Descriptor = Annotated[int | None, typer.Option(hidden=True)]
Place = Annotated[Path | None, typer.Option(hidden=True)]

_BESIDE = "none here: `expediter work` works orders off"


@command(app, "serve", "serve --port 9000 --processes 2")
def serve(
    host: Host = None,
    port: Port = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", "--workers", help="Serving processes, on one port (API_WORKERS)."),
    ] = None,
    no_workers: Annotated[
        bool, typer.Option("--no-workers", help="Take orders only; `work` does the rest.")
    ] = False,
    insecure: Insecure = False,
    listen_fd: Descriptor = None,
    lifeline_fd: Descriptor = None,
    metrics_socket: Place = None,
) -> None:
    """Take orders over HTTP, and work them off in the same processes."""
    from expediter.run import serving
    from expediter.web.server import listener

    lifeline = _lifeline(lifeline_fd)
    settings = settings_of(service=True, host=host, port=port, api_workers=processes)
    at_once = settings.worker_count * settings.worker_concurrency
    if settings.api_workers > 1 and lifeline is None:
        where = f"in each of {settings.api_workers} processes, {at_once} at once"
        plans = _serving(settings, no_workers=no_workers, insecure=insecure)
        _supervise(settings, plans, insecure=insecure, worked_off=_BESIDE if no_workers else where)
        return

    def announce(opened: Service, address: str) -> None:
        lines = [*reachability_lines(opened), access_line(opened), *listener.file_limit_lines()]
        if lifeline is not None:
            lifeline.ready(lines)
        else:
            where = _BESIDE if no_workers else f"in this process, {at_once} at once"
            say_opening(opening_lines(settings, address, lines, where))

    _supervised(
        serving.serve(
            settings,
            working=not no_workers,
            insecure=insecure,
            announce=announce,
            listen_fd=listen_fd,
            lifeline=lifeline,
            place=metrics_socket,
        ),
        lifeline,
    )


@command(app, "work", "work --concurrency 50")
def work(
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", min=1, help="Jobs at once in this process (WORKER_COUNT times WORKER_CONCURRENCY)."
        ),
    ] = None,
    lifeline_fd: Descriptor = None,
    metrics_socket: Place = None,
) -> None:
    """Work off orders, without taking any; for use beside `serve --no-workers`."""
    from expediter.run import serving

    lifeline = _lifeline(lifeline_fd)
    settings = settings_of(
        service=True, worker_concurrency=concurrency, worker_count=None if concurrency is None else 1
    )

    def announce(opened: Service, measured_at: str | None) -> None:
        reachable = reachability_lines(opened)
        if measured_at is not None:
            reachable.append(f"  metrics  {measured_at}/metrics")
        about = f"Expediter {__version__} works off {opened.database.describe()}, {opened.concurrency} at once"
        say_opening([about, *reachable])
        if lifeline is not None:
            lifeline.ready(reachable)

    _supervised(serving.work(settings, announce=announce, lifeline=lifeline, place=metrics_socket), lifeline)


@command(app, "up", "up --foreground")
def up(
    host: Host = None,
    port: Port = None,
    insecure: Insecure = False,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until SIGTERM, for systemd and the like.")
    ] = False,
    report_fd: Descriptor = None,
) -> None:
    """Start API_WORKERS serving and WORKER_COUNT working processes; pid and log files are in RUN_DIR."""
    from expediter.run import background, processes

    settings = settings_of(service=foreground, host=host, port=port)
    pid_file = _pid_file(settings)
    if not foreground:
        arguments = ["up", "--foreground", "--host", settings.host, "--port", str(settings.port)]
        arguments += ["--insecure"] if insecure else []
        count = settings.api_workers + settings.worker_count
        with spinner(f"Starting {count} processes"):
            address, *lines = background.launch(arguments, pid_file, drain_seconds=settings.drain_seconds)
        say_opening(lines)
        print_line(f"Expediter is up at {address}")
        return

    def report(address: str, lines: list[str]) -> None:
        if report_fd is None:
            print_line(f"Expediter is up at {address}")
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
            [*_serving(settings, no_workers=True, insecure=insecure), *workers],
            insecure=insecure,
            worked_off=f"{settings.worker_count} processes, {settings.worker_concurrency} at once in each",
            run_dir=pid_file.path.parent,
            on_ready=report,
        )


@command(app, "down")
def down() -> None:
    """Stop what `up` started: requests and jobs under way end first."""
    from expediter.run import background

    settings = settings_of()
    pid_file = _pid_file(settings)
    with spinner("Waiting for what is under way"):
        stopped = background.stop(pid_file, drain_seconds=settings.drain_seconds)
    print_line(_nothing(pid_file) if stopped is None else f"Stopped {stopped}")


@command(app, "restart")
def restart() -> None:
    """Renew the processes that `up` started, one after the other, without refusing a request.

    Each new process reads the settings and the program anew. It must be ready before the one in its place is told
    to stop. If one cannot start, the rest go on as they are (exit status 1). The address and the number of
    processes stay: for other ones, `down` and `up`.
    """
    from expediter.run import background

    settings = settings_of()
    with spinner("Renewing") as words:
        renewed = background.restart(
            _pid_file(settings),
            drain_seconds=settings.drain_seconds,
            told=lambda done, count: words(f"Renewed {done} of {count}"),
        )
    print_line(f"Renewed {', '.join(renewed)}")


@command(app, "status", "status --url http://127.0.0.1:9000 --json")
def status(
    url: Annotated[
        str | None, typer.Option(help="Ask the service at this address, instead of what `up` started.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what runs, since when, what waits in the queue, and the breaker.

    The exit status is 1 if nothing is up, or a part has failed.
    """
    from expediter.run import looking

    settings = settings_of()
    found = looking.Found()
    if url is None:
        pid_file = _pid_file(settings)
        if pid_file.holder() is None:
            say(f"{_nothing(pid_file)}; a service that `serve` started is asked with --url", style="red")
            raise typer.Exit(1)
        run_to_end(looking.look(settings, pid_file.path.parent, found))
    else:
        run_to_end(looking.look_at(settings, url, found))
    if as_json:
        print_json(found)
    else:
        for line in looking.lines(found):
            print_line(line)
    if found.verdict == "failed":
        raise typer.Exit(1)


@command(app, "logs -f", "logs -n 100 worker-1")
def logs(
    names: Annotated[
        list[str] | None, typer.Argument(help="Of which: supervisor, api-1, worker-1 and so on; all without.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many lines of each log.")] = 20,
) -> None:
    """Show the logs of what `up` started, in the order of their times."""
    from expediter.run import logfiles

    settings = settings_of()
    files = logfiles.LogFiles(Path(settings.run_dir), names or [])
    for line in files.tail(lines):
        print_line(line)
    try:
        if follow:
            for line in files.follow():
                print_line(line)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _nothing(pid_file: background.PidFile) -> str:
    return f"Nothing is up ({pid_file.path})"


def _pid_file(settings: Settings) -> background.PidFile:
    from expediter.run import background

    return background.PidFile(Path(settings.run_dir) / "expediter.pid")


def _lifeline(descriptor: int | None) -> processes.Lifeline | None:
    from expediter.run import processes

    return None if descriptor is None else processes.Lifeline(descriptor)


def _supervised(work: Coroutine[Any, Any, None], lifeline: processes.Lifeline | None) -> None:
    try:
        run_to_end(work)
    except ConfigurationError as error:
        if lifeline is None:
            raise
        lifeline.refuse(in_words(error))  # the supervisor says it, once for all processes
        raise typer.Exit(2) from None


def _serving(settings: Settings, *, no_workers: bool, insecure: bool) -> list[processes.Plan]:
    from expediter.run.processes import Plan

    words = ("serve", *(["--no-workers"] if no_workers else []), *(["--insecure"] if insecure else []))
    return [Plan(f"api-{number}", words, listens=True) for number in range(1, settings.api_workers + 1)]


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

    wide = asyncio.run(serving.may_listen_wide(settings, insecure=insecure))
    taken = serving.bind(settings, wide=wide)
    address = listener.address_of(taken)
    chores.upgrade_database(settings)

    def ready(reachable: list[str]) -> None:
        lines = opening_lines(settings, address, reachable, worked_off)
        say_opening(lines)
        if on_ready is not None:
            on_ready(address, lines)

    # Not in RUN_DIR: the path of a socket may have a hundred characters.
    with TemporaryDirectory(prefix="expediter-run-") as sockets:
        supervisor = processes.Supervisor(
            plans,
            listener=taken,
            address=address,
            drain_seconds=settings.drain_seconds,
            sockets=Path(sockets),
            run_dir=run_dir,
        )
        if not asyncio.run(supervisor.run(ready)):
            raise typer.Exit(1)
