"""`expediter keys ...`: who may call the service. They need the database, and no service that runs."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from expediter.orders.order import MICROSECONDS
from expediter.run.cli.output import command, print_json, print_line, run_to_end, say, settings_of
from expediter.store.scopes import NAME_CHARACTERS_MAX, NAME_PATTERN, Scope

if TYPE_CHECKING:
    from expediter.store.keys import ApiKey, MadeKey

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_SPAN = re.compile(r"(\d{1,5})([hd])")


@command(
    app,
    'keys create "till 3" --scope orders:read --scope orders:write',
    "keys create ops --scope admin --expires 90d --json",
)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is called in lists.")],
    scope: Annotated[
        list[Scope],
        typer.Option("--scope", help="What it may be used for; may be given again. `admin` is for everything."),
    ],
    expires: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="When it ends: 90d, 12h, or a time such as 2027-01-01T00:00:00Z."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key and print it, this once. From the first one on every call needs one."""
    from expediter.run import chores

    if len(name) > NAME_CHARACTERS_MAX or not re.fullmatch(NAME_PATTERN, name):
        raise typer.BadParameter(f"a name has 1 to {NAME_CHARACTERS_MAX} characters, and no control characters")
    made: list[MadeKey] = []
    run_to_end(chores.make_key(settings_of(), name, scope, _moment(expires), made.append))
    key, secret = made[0].key, made[0].secret
    if as_json:
        print_json({**_document(key), "key": secret})
    else:
        say(f"Made the key {key.key_id}, named {key.name}. It is shown here only:")
        print_line(secret)


@command(app, "keys list --json", name="list")
def show(as_json: AsJson = False) -> None:
    """List the API keys, also those that are revoked; never the keys themselves."""
    from expediter.run import chores

    found: list[ApiKey] = []
    run_to_end(chores.list_keys(settings_of(), found))
    if as_json:
        print_json({"keys": [_document(each) for each in found]})
        return
    for each in found:
        ends = f"revoked {_said(each.revoked_at)}" if each.revoked_at is not None else ""
        if not ends and each.expires_at is not None:
            ends = f"ends {_said(each.expires_at)}"
        used = f"used {_said(each.last_used_at)}" if each.last_used_at is not None else "never used"
        print_line("  ".join(filter(None, [each.key_id, each.name, ",".join(each.scopes), used, ends])))


@command(app, 'keys revoke "till 3"')
def revoke(
    named: Annotated[str, typer.Argument(metavar="KEY", help="Its id, or its name.")], as_json: AsJson = False
) -> None:
    """Revoke an API key for good. Within a second no process lets it in any more."""
    from expediter.run import chores

    found: list[ApiKey] = []
    run_to_end(chores.revoke_key(settings_of(), named, found))
    if as_json:
        print_json(_document(found[0]))
    else:
        print_line(f"Revoked the key {found[0].key_id}, named {found[0].name}")


def _moment(text: str | None) -> int | None:
    """Return when a key ends, in microseconds since 1970; None: never."""
    if text is None:
        return None
    try:
        if span := _SPAN.fullmatch(text):
            at = datetime.now(UTC) + timedelta(hours=int(span[1]) * (24 if span[2] == "d" else 1))
        else:
            at = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("--expires is 90d, 12h, or a time such as 2027-01-01T00:00:00Z") from None
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * MICROSECONDS)


def _said(at: int) -> str:
    return f"{datetime.fromtimestamp(at // MICROSECONDS, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _document(key: ApiKey) -> dict[str, object]:
    """Return a key as `/admin/keys` shows it."""
    from expediter.web.api.keys import key_document

    shown: dict[str, object] = msgspec.to_builtins(key_document(key))
    return shown
