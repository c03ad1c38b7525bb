"""The command line. Data goes to stdout, logs and progress to stderr; exit 0 is success, 1 failure, 2 usage."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from expediter import __version__
from expediter.errors import ConfigurationError, ExpediterError
from expediter.run.cli import events, keys, orders, services, trial, upkeep
from expediter.run.cli.output import in_words, say_error
from expediter.settings.reading import ENV_FILE_VARIABLE

app = typer.Typer(
    help="Takes orders, stores each one before it answers, and brings every one to rest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(services.app)
app.add_typer(
    orders.app,
    name="orders",
    help="Orders: place, look, change.",
    no_args_is_help=True,
    epilog="$ expediter orders list --status payment_failed",
)
app.add_typer(events.app)
app.add_typer(
    keys.app,
    name="keys",
    help="API keys: who may call.",
    no_args_is_help=True,
    epilog="$ expediter keys list",
)
app.add_typer(trial.app)
app.add_typer(upkeep.app)
app.add_typer(
    upkeep.cache_app,
    name="cache",
    help="The cache of reads.",
    no_args_is_help=True,
    epilog="$ expediter cache reset",
)
app.add_typer(
    upkeep.db_app,
    name="db",
    help="The database's structure.",
    no_args_is_help=True,
    epilog="$ expediter db upgrade",
)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except ExpediterError as error:
        say_error(in_words(error))
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"expediter {__version__}")
        raise typer.Exit


@app.callback(epilog="$ expediter serve")
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end."),
    ] = False,
    env_file: Annotated[
        Path | None, typer.Option("--env-file", help="Read settings from this file instead of .env.")
    ] = None,
) -> None:
    """Takes orders, stores each one before it answers, and brings every one to rest."""
    if env_file is not None:
        # For the processes that this one starts, too.
        os.environ[ENV_FILE_VARIABLE] = str(env_file.absolute())
