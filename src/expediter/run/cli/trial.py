"""The commands to try things on: a payment gateway that misbehaves, and a receiver of webhooks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expediter.errors import ConfigurationError
from expediter.run.cli.output import (
    command,
    moment,
    print_line,
    print_styled,
    run_to_end,
    say_opening,
    settings_of,
    to_json,
)

if TYPE_CHECKING:
    from expediter.trial.gateway import Calling
    from expediter.trial.receiver import Heard

app = typer.Typer()

#: What the callbacks of the gateway are signed with, where no option says it.
SECRET_VARIABLE = "PAYMENT_GATEWAY_SECRET"
#: Seconds that anything may be told to wait: ten years.
SECONDS_MAX = 10 * 366 * 86_400.0

Port = Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 picks a free one.")]
Ledger = Annotated[
    Path | None, typer.Option(dir_okay=False, help="A file for its books; without, they end with it.")
]
Latency = Annotated[int, typer.Option(min=0, help="Milliseconds that every answer takes.")]
Slow = Annotated[
    float,
    typer.Option(min=0, max=SECONDS_MAX, help="Seconds that tok_slow, tok_processing and a pending refund take."),
]
Drop = Annotated[int, typer.Option(min=0, help="Every so many charges the answer is lost.")]
Broken = Annotated[int, typer.Option(min=0, help="Every so many charges the answer is 500.")]
Decline = Annotated[int, typer.Option(min=0, help="Every so many requests are declined.")]
Unavailable = Annotated[int, typer.Option(min=0, help="Every so many requests get a 503.")]
AsksCustomer = Annotated[int, typer.Option(min=0, help="Every so many requests the customer must say yes or no.")]
ActionSeconds = Annotated[
    float, typer.Option(min=0.001, max=SECONDS_MAX, help="Seconds that the customer has to answer.")
]
Authorized = Annotated[
    float, typer.Option(min=0.001, max=SECONDS_MAX, help="Seconds that an amount stays reserved.")
]
Callback = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Where to POST what became of a payment: http://127.0.0.1:8000/api/v1/payments/callback",
    ),
]
CallbackSecret = Annotated[
    str | None, typer.Option(metavar="whsec_...", help=f"What signs the callbacks; or {SECRET_VARIABLE}.")
]
Twice = Annotated[bool, typer.Option("--callbacks-twice", help="Send each callback twice, under one id.")]
Early = Annotated[bool, typer.Option("--callbacks-early", help="Call back before the charge is answered.")]
Late = Annotated[
    float, typer.Option("--callbacks-late", min=0, max=SECONDS_MAX, help="Seconds that each callback is late.")
]


@command(
    app,
    "gateway",
    "gateway --port 9100 --ledger payments.jsonl --drop-every 10 --error-every 20",
    "gateway --callback http://127.0.0.1:8000/api/v1/payments/callback --secret whsec_dHJ5IGl0IG9uIGEgbGFwdG9w",
)
def gateway(
    port: Port = 9100,
    ledger: Ledger = None,
    latency_ms: Latency = 0,
    slow_seconds: Slow = 20.0,
    drop_every: Drop = 0,
    error_every: Broken = 0,
    decline_every: Decline = 0,
    unavailable_every: Unavailable = 0,
    action_every: AsksCustomer = 0,
    action_seconds: ActionSeconds = 900.0,
    authorized_seconds: Authorized = 604_800.0,
    callback: Callback = None,
    secret: CallbackSecret = None,
    callbacks_twice: Twice = False,
    callbacks_early: Early = False,
    callbacks_late: Late = 0.0,
) -> None:
    """Run a payment gateway to try things on: it speaks the HTTP payment protocol and moves no money.

    It misbehaves by the payment token of an order (tok_declined, tok_unavailable, tok_unknown, tok_error,
    tok_slow, tok_action, tok_processing) and by the options. With PAYMENT_GATEWAY_TOKEN set it asks for that
    token.

    With --callback it tells what becomes of a payment. A callback that is not taken (2xx) is sent again, ten times
    in all. At most 10,000 wait; they are in memory, so the end of the gateway ends them.
    """
    from expediter.trial.books import Books, Spans
    from expediter.trial.gateway import Habits, serve

    settings = settings_of()
    token = settings.payment_gateway_token
    calling = _calling(callback, secret, twice=callbacks_twice, early=callbacks_early, late_seconds=callbacks_late)
    habits = Habits(
        latency_seconds=latency_ms / 1000,
        slow_seconds=slow_seconds,
        drop_every=drop_every,
        error_every=error_every,
        decline_every=decline_every,
        unavailable_every=unavailable_every,
        action_every=action_every,
    )
    spans = Spans(action_seconds=action_seconds, authorized_seconds=authorized_seconds, slow_seconds=slow_seconds)
    run_to_end(
        serve(
            port=port,
            books=Books(ledger, spans),
            habits=habits,
            token=token.get_secret_value() if token else None,
            calling=calling,
            announce=lambda address: say_opening(_opening(address, ledger, callback)),
        )
    )


def _opening(address: str, ledger: Path | None, callback: str | None) -> list[str]:
    calls = [] if callback is None else [f"  callbacks  to {callback}"]
    return [
        f"A gateway to try things on listens on {address}",
        f"  books      {ledger or 'in memory: they end with it'}",
        *calls,
        "Try:",
        f"  PAYMENT_GATEWAY={address} expediter serve",
    ]


def _calling(
    url: str | None, secret: str | None, *, twice: bool, early: bool, late_seconds: float
) -> Calling | None:
    """Return where callbacks go, None for nowhere. Raises ConfigurationError for half of what they need."""
    from expediter.trial.callbacks import Manners
    from expediter.trial.gateway import Calling
    from expediter.trial.signatures import webhook_of

    named = SECRET_VARIABLE if secret is None else "--secret"
    key = os.environ.get(SECRET_VARIABLE) or None if secret is None else secret
    if url is None:
        if key is not None:
            raise ConfigurationError(
                f"{named} is there and --callback is not: name the address that callbacks go to, or leave both out"
            )
        if twice or early or late_seconds:
            raise ConfigurationError("--callbacks-twice, --callbacks-early and --callbacks-late need --callback")
        return None
    if key is None:
        raise ConfigurationError(
            f"--callback is there and its secret is not: give --secret whsec_..., or set {SECRET_VARIABLE}"
        )
    if early and late_seconds:
        raise ConfigurationError("A callback cannot be early and late: leave one of the two options out")
    manners = Manners(twice=twice, early=early, late_seconds=late_seconds)
    return Calling(url=url, webhook=webhook_of(key, named), manners=manners)


@command(
    app,
    "receive",
    "receive --port 9200 --secret whsec_dHJ5IGl0IG9uIGEgbGFwdG9w --json",
    "receive --fail-every 3 --slow 2",
)
def receive(
    port: Port = 9200,
    secret: Annotated[
        str | None, typer.Option(metavar="whsec_...", help="What the webhooks are signed with.")
    ] = None,
    fail_every: Annotated[int, typer.Option(min=0, help="Every so many answers are 500.")] = 0,
    slow: Annotated[
        float, typer.Option(min=0, max=SECONDS_MAX, metavar="SECONDS", help="Seconds that every answer takes.")
    ] = 0.0,
    gone: Annotated[bool, typer.Option("--gone", help="Answer 410: send nothing here any more.")] = False,
    dead: Annotated[bool, typer.Option("--dead", help="Take everything and never answer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a line.")] = False,
) -> None:
    """Receive webhooks on 127.0.0.1 and print each one, and whether it can be trusted.

    What is verified is answered 204, a bad or old signature 401, and what is no JSON 400. Without --secret nothing
    can be verified: it is printed as unverified, and answered 204.
    """
    from expediter.trial.receiver import Faults, serve

    settings_of()
    if gone and dead:
        raise ConfigurationError("--gone answers everything and --dead nothing: leave one of them out")

    def announce(address: str) -> None:
        checked = "verified by --secret" if secret else "not verified: give --secret whsec_... for that"
        say_opening([f"A receiver of webhooks listens on {address}", f"  signatures  {checked}"])

    def told(heard: Heard) -> None:
        if as_json:
            print_line(to_json(heard).decode())
        else:
            print_styled(*_heard_line(heard))

    faults = Faults(fail_every=fail_every, slow_seconds=slow, gone=gone, dead=dead)
    run_to_end(serve(port=port, secret=secret, faults=faults, announce=announce, told=told))


def _heard_line(heard: Heard) -> list[tuple[str, str]]:
    """Return the line about a webhook, in parts, each with its colour."""
    good = {"verified": "green", "unverified": "yellow"}
    answer = "no answer" if heard.status is None else str(heard.status)
    parts = [
        (f"{moment(heard.at)}  ", "dim"),
        (f"{heard.verdict:<15}", good.get(heard.verdict, "red")),
        (f"  {answer:<9}", "dim" if heard.status == 204 else "red"),
        (f"  {heard.type:<22}", "bold"),
        (f"  {heard.order_id}", ""),
    ]
    places = (("number", heard.number), ("position", heard.position))
    return parts + [(f"  {word} {value}", "dim") for word, value in places if value is not None]
