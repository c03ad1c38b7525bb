"""The commands that look after a database and its settings, beside a running service or without one."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from expediter.errors import ConfigurationError
from expediter.orders.order import MICROSECONDS
from expediter.run.cli.output import command, print_json, print_line, progress_bar, run_to_end, settings_of
from expediter.settings import effective

app = typer.Typer()
cache_app = typer.Typer()
db_app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@command(app, "config", "--env-file production.env config --json")
def config(as_json: AsJson = False) -> None:
    """Show every setting as it counts, and where it comes from; secrets as stars."""
    found = effective(settings_of())
    if as_json:
        print_json([each._asdict() for each in found])
        return
    width = max(len(each.name) for each in found)
    for each in found:
        print_line(f"{each.name:<{width}}  {each.value or '-'}  ({each.source})")


@command(app, "doctor", "doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Check the settings, what can be reached, and how durable it is."""
    from expediter.run import chores
    from expediter.upkeep.doctor import Finding

    findings: list[Finding] = []
    run_to_end(chores.examine(settings_of(), findings))
    if as_json:
        print_json(findings)
    else:
        for finding in findings:
            print_line(f"{finding.verdict:<7}  {finding.what:<12} {finding.detail}")
    if any(finding.verdict == "failed" for finding in findings):
        raise typer.Exit(1)


@command(app, "verify", "verify --json", "verify --ledger ledger.jsonl")
def verify(
    ledger: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The simulated gateway's ledger, to compare.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold everything that is stored against the conservation laws; exit 1 and name what breaks one."""
    from expediter.orders.laws import Verified
    from expediter.run import chores

    found: list[Verified] = []
    progress, advance = progress_bar(total=None, what="Verifying")
    with progress:
        run_to_end(chores.verify_database(settings_of(), ledger, advance, found))
    (verified,) = found
    if as_json:
        print_json(verified)
    else:
        for breach in verified.breaches:
            print_line(f"{breach.order_id or '-'}: {breach.law}")
        print_line(f"{verified.orders} orders, {verified.found} breaches of the laws")
    if verified.found:
        raise typer.Exit(1)


def _moment(text: str | None, option: str, default: datetime) -> int:
    """Return a time in microseconds since 1970. Raises ConfigurationError."""
    try:
        at = default if text is None else datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(f"{option} must be a time such as 2026-11-27T00:00:00Z") from error
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return int(at.timestamp() * MICROSECONDS)


@command(app, "reconcile", "reconcile --since 2026-11-27T00:00:00Z --until 2026-11-28T00:00:00Z --json")
def reconcile(
    since: Annotated[str | None, typer.Option(metavar="TIME", help="From when on; a day ago without it.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Until when; now without it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every payment that the gateway has of a span of time with the orders; exit 1 if any differs."""
    from expediter.run import chores
    from expediter.upkeep.reconcile import Reconciled

    now = datetime.now(UTC)
    begin = _moment(since, "--since", now - timedelta(days=1))
    end = _moment(until, "--until", now)
    if begin >= end:
        raise ConfigurationError("--since must be before --until")
    found: list[Reconciled] = []
    progress, advance = progress_bar(total=None, what="Comparing")
    with progress:
        run_to_end(chores.reconcile_payments(settings_of(), begin, end, advance, found))
    (said,) = found
    if as_json:
        print_json(said)
    else:
        for difference in said.differences:
            print_line(f"{difference.order_id or '-'}: {difference.what} ({difference.key})")
        print_line(
            f"{said.payments} payments and {said.orders} orders compared, {said.open} under way, "
            f"{said.found} differences"
        )
    if said.found:
        raise typer.Exit(1)


@command(app, "seed --count 1000")
def seed(count: Annotated[int, typer.Option(min=1, max=10_000_000, help="How many orders.")] = 100) -> None:
    """Make up orders and store them."""
    from expediter.run import chores

    progress, advance = progress_bar(total=count, what="Seeding")
    with progress:
        run_to_end(chores.seed(settings_of(), count, advance))
    print_line(f"Created {count} orders")


@command(app, "clear", "clear --yes")
def clear(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove every order and everything that belongs to one."""
    from expediter.run import chores

    settings = settings_of()
    if not yes:
        where = chores.database_name(settings)
        if not sys.stdin.isatty():
            raise ConfigurationError(f"Nobody can be asked here: `clear --yes` removes every order from {where}")
        typer.confirm(f"Remove every order from {where}?", abort=True, err=True)
    found: list[int] = []
    run_to_end(chores.clear(settings, found.append))
    print_line(f"Removed {found[0]} orders")


@command(app, "archive /var/backups/orders --older-than 90")
def archive(
    folder: Annotated[Path, typer.Argument(help="Where the file is made.")],
    older_than: Annotated[float, typer.Option(min=1, metavar="DAYS", help="Days that an order is at rest.")] = 90,
) -> None:
    """Move the history of orders long at rest out of the database into a file; the orders stay."""
    from expediter.run import chores
    from expediter.upkeep.archive import Archived

    found: list[Archived] = []
    progress, advance = progress_bar(total=None, what="Archiving")
    with progress:
        run_to_end(chores.move_to_archive(settings_of(), folder, older_than, advance, found))
    (moved,) = found
    if moved.path is None:
        print_line(f"No order with a history here has been at rest for {older_than:g} days")
    else:
        print_line(f"Moved {moved.events} events of {moved.orders} orders to {moved.path}")


@command(app, "backup /var/backups/orders-2026-11-28.db")
def backup(file: Annotated[Path, typer.Argument(help="The new file; one that exists is left alone.")]) -> None:
    """Copy a SQLite database beside the running service; for a server, print its own command, and exit 1."""
    from expediter.run import chores

    made = chores.make_backup(settings_of(), file)
    if isinstance(made, str):
        print_line(made)
        sys.stderr.write("Nothing was copied: a database server has a tool of its own for that, see above\n")
        raise typer.Exit(1)
    print_line(f"Copied {made:,} bytes to {file}")


@command(cache_app, "cache reset", name="reset")
def cache_reset() -> None:
    """Empty the cache of every process on this database."""
    from expediter.run import chores

    run_to_end(chores.reset_cache(settings_of()))
    print_line("Every cache of this database is emptied before its next use")


@command(db_app, "db upgrade", name="upgrade")
def db_upgrade() -> None:
    """Bring the database's structure to this version; other commands do it by themselves."""
    from expediter.run import chores

    changed = chores.upgrade_database(settings_of())
    print_line("The database was upgraded" if changed else "The database is up to date")


@command(db_app, "db restored", name="restored")
def db_restored() -> None:
    """Say that the database was restored from a backup: what was accepted before and is not stored is dropped."""
    from expediter.run import chores

    run_to_end(chores.begin_anew(settings_of()))
    print_line("What was accepted before and is not stored is dropped, and every cache is emptied")
