"""What `expediter status` finds: what runs, since when, what waits, and the parts that the service needs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec

from expediter.run.asking import Client, NotAnswered, Remote, opened
from expediter.run.background import is_ready
from expediter.run.state import Restart, Running, read_state
from expediter.settings import Settings

#: Seconds in which a service that runs must say that it is ready.
READY_SECONDS_MAX = 5.0

_VERDICTS = {"ok": "ok", "degraded": "warning", "down": "failed"}


class Part(msgspec.Struct, frozen=True):
    """Something that the service needs: `ok`, `warning` or `failed`, and what there is to say about it."""

    what: str
    verdict: str
    detail: str


class Queue(msgspec.Struct, frozen=True):
    """Jobs: ready to be worked off, waiting for their time, in a worker's hands, parked; the age of the oldest."""

    ready: int
    scheduled: int
    leased: int
    parked: int
    oldest_age_seconds: float | None
    handed_over: int = 0


class Found(msgspec.Struct):
    """What was found. `pid` and what follows it is known only of what `up` started here."""

    verdict: str = "ok"
    address: str = ""
    version: str = ""
    queue: Queue | None = None
    parts: list[Part] = []
    pid: int | None = None
    since: datetime | None = None
    processes: list[Running] = []
    restart: Restart | None = None


async def look(settings: Settings, run_dir: Path, found: Found) -> None:
    """Add what `up` started in `run_dir`, and how its database and the parts beside it are."""
    state = read_state(run_dir)
    if state is not None:
        found.address, found.version = state.address, state.version
        found.pid, found.since = state.pid, state.started_at
        found.processes, found.restart = state.processes, state.restart
        ready = is_ready(state.address, READY_SECONDS_MAX)
        said = "takes orders" if ready else f"is not ready: {state.address}/health says why"
        found.parts.append(Part("service", "ok" if ready else "failed", said))
    async with opened(settings, None) as client:
        await _ask(client, found, here=True)


async def look_at(settings: Settings, url: str, found: Found) -> None:
    """Add what the service at `url` says of itself. Raises NotAnswered."""
    remote = Remote(url, settings.expediter_api_key)
    found.address = url
    await _ask(Client(remote), found, here=False)


async def _ask(client: Client, found: Found, *, here: bool) -> None:
    health = (await client.look("/health")).document
    if not isinstance(health, dict) or "dependencies" not in health:
        raise NotAnswered(f"What answers at {client.name} is not Expediter: its /health says {health}")
    found.version = found.version or str(health.get("version", ""))
    for name, part in health["dependencies"].items():
        if here and name in ("queue", "cache"):
            continue  # of this very process; those that run have their own
        verdict = _VERDICTS.get(part.get("status"), "warning")
        found.parts.append(Part(name.replace("_", " "), verdict, part.get("detail", "")))
    waits = (await client.look("/api/v1/orders/status")).document
    if isinstance(waits, dict) and "leased" in waits:
        found.queue = Queue(
            waits["ready"],
            waits["scheduled"],
            waits["leased"],
            waits["dead"],
            waits.get("oldest_age_seconds"),
            waits.get("handed_over", 0),
        )
    verdicts = {part.verdict for part in found.parts}
    if found.queue is not None and found.queue.parked:
        verdicts.add("warning")
    if found.restart is not None and found.restart.failed and not found.restart.under_way:
        verdicts.add("warning")
    found.verdict = next((verdict for verdict in ("failed", "warning") if verdict in verdicts), "ok")


def lines(found: Found) -> list[str]:
    """Return it for people."""
    since = "" if found.since is None else f" since {_moment(found.since)} ({_age(found.since)})"
    shown = [f"Expediter {found.version} is up at {found.address}{since}"]
    if found.pid is not None:
        rows = [Running("supervisor", found.pid, found.since or datetime.now(UTC)), *found.processes]
        width = max(len(row.name) for row in rows)
        for row in rows:
            died = f", has died {row.deaths} times" if row.deaths > 1 else ", has died once" if row.deaths else ""
            shown.append(f"  {row.name:<{width}}  pid {row.pid}, since {_moment(row.since)}{died}")
    if found.restart is not None and found.restart.under_way:
        shown.append(f"  a restart is under way: {len(found.restart.done)} of {len(found.processes)} renewed")
    elif found.restart is not None and found.restart.failed:
        shown.append(f"  the last restart was broken off: {found.restart.failed}")
    rows_of_parts = list(found.parts)
    if found.queue is not None:
        queue = found.queue
        said = f"{queue.ready} ready, {queue.scheduled} scheduled, {queue.leased} leased, {queue.parked} parked"
        if queue.handed_over:
            said += f", {queue.handed_over} handed over and not reported yet"
        if queue.oldest_age_seconds is not None:
            said += f"; the oldest waits for {queue.oldest_age_seconds:.1f} s"
        if queue.parked:
            said += "; `expediter orders explain ID` says why, `expediter orders retry ID` takes one up again"
        rows_of_parts.append(Part("jobs", "warning" if queue.parked else "ok", said))
    width = max((len(part.what) for part in rows_of_parts), default=0)
    shown += [f"{part.verdict:<7}  {part.what:<{width}}  {part.detail}" for part in rows_of_parts]
    return shown


def _moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _age(since: datetime) -> str:
    minutes, seconds = divmod(max(0, int((datetime.now(UTC) - since).total_seconds())), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    told = [f"{count} {unit}" for count, unit in parts if count]
    return " ".join(told[:2]) or "0 s"
