"""`expediter events`: every change of every order, at a terminal."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from expediter.run.asking import opened
from expediter.run.cli.output import (
    command,
    moment,
    print_line,
    run_to_end,
    say,
    settings_of,
    to_json,
    what_happened,
)

app = typer.Typer()

#: Events that are asked for at once.
PAGE_EVENTS = 500
#: Seconds that the service holds an answer while nothing happens.
WAIT_SECONDS = 20


@command(app, "events --follow", "events --from now --follow --types order.completed,payment.* --json")
def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens from now on.")] = False,
    begin: Annotated[
        str | None, typer.Option("--from", help="Begin behind this cursor; `now` for what is to come.")
    ] = None,
    types: Annotated[
        str | None, typer.Option(help="Only these types, parted by commas: order.completed,payment.*")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="The service's address. Without it the database of the settings is used.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a line.")] = False,
) -> None:
    """Print every change of every order, in the order in which it was stored, each once.

    At the end the cursor behind the last one is said on stderr: with --from a later call goes on from there.
    """
    settings = settings_of()
    reached: list[str] = []

    async def run() -> None:
        async with opened(settings, url) as client:
            query = {"limit": str(PAGE_EVENTS)} | ({"types": types} if types else {})
            after = {"after": begin} if begin else {}
            wait = {"wait": str(WAIT_SECONDS)} if follow else {}
            while True:
                page = await client.read(f"/api/v1/events?{urlencode(query | after | wait)}")
                for event in page["events"]:
                    print_line(to_json(event).decode() if as_json else _line(event))
                after = {"after": page["next_cursor"]}
                reached[:] = [page["next_cursor"]]
                if not follow and not page["has_more"]:
                    return

    try:
        run_to_end(run())
    except KeyboardInterrupt:
        pass
    finally:
        if reached:
            say(f"Go on with --from {reached[0]}")


def _line(event: dict[str, Any]) -> str:
    return f"{moment(event['at'])}  {event['order_id']:<36}  {what_happened(event)}"
