"""What the command line does to a database without serving it: fill, clear, archive, upgrade, examine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from msgspec.structs import replace

from expediter.backends.databases import open_database
from expediter.backends.databases.backup import back_up
from expediter.errors import ConfigurationError, ExpediterError
from expediter.orders.laws import Verified
from expediter.orders.samples import sample_orders
from expediter.run.service import gateway_of, open_parts, open_service
from expediter.settings import Settings, in_users_words, unknown_names
from expediter.store.keys import ApiKey, Keys, MadeKey
from expediter.store.migrations import HEAD, Standing, standing, upgrade
from expediter.store.scopes import Scope
from expediter.store.submissions import Request
from expediter.upkeep import doctor
from expediter.upkeep.archive import Archived, archive
from expediter.upkeep.doctor import Finding
from expediter.upkeep.reconcile import Reconciled, reconcile
from expediter.upkeep.verify import verify
from expediter.web.api.admin import SAMPLES_PER_BATCH
from expediter.web.api.orders import new_order_id


async def seed(settings: Settings, count: int, advance: Callable[[int], None]) -> None:
    """Store `count` made-up orders; `advance` is told how many more are stored. Raises Unavailable."""
    rng = random.Random()
    async with open_service(settings, working=False) as service:
        for start in range(0, count, SAMPLES_PER_BATCH):
            orders = sample_orders(
                min(SAMPLES_PER_BATCH, count - start),
                rng,
                new_order_id,
                currency=settings.default_currency,
                stages=settings.stages,
            )
            outcomes = await service.committer.submit_patiently([Request(order) for order in orders])
            for outcome in outcomes:
                if isinstance(outcome, ExpediterError):
                    raise outcome
            advance(len(orders))


async def clear(settings: Settings, report: Callable[[int], None]) -> None:
    """Remove every order; `report` is told how many there were."""
    async with open_service(settings, working=False) as service:
        removed = await service.committer.clear(moved=service.moved)
        assert isinstance(removed, int)  # a replay needs a key
        report(removed)


async def move_to_archive(
    settings: Settings, folder: Path, days: float, advance: Callable[[int], None], found: list[Archived]
) -> None:
    """Move the history of orders at rest for `days` into a file in `folder`; add what was moved to `found`."""
    database = open_database(settings.database)
    try:
        await asyncio.to_thread(upgrade, settings.database)
        found.append(await archive(database, folder, days=days, advance=advance))
    finally:
        await database.close()


async def verify_database(
    settings: Settings, ledger: Path | None, advance: Callable[[int], None], found: list[Verified]
) -> None:
    """Hold everything that is stored against the laws; add what was found to `found`."""
    database = open_database(settings.database)
    try:
        found.append(await verify(database, ledger=ledger, advance=advance))
    finally:
        await database.close()


async def reconcile_payments(
    settings: Settings, since: int, until: int, advance: Callable[[int], None], found: list[Reconciled]
) -> None:
    """Compare what the gateway has of a span of time with what the orders say; add what was found to `found`."""
    database = open_database(settings.database)
    gateway = gateway_of(settings)
    try:
        found.append(await reconcile(database, gateway, since=since, until=until, advance=advance))
    finally:
        await gateway.close()
        await database.close()


async def make_key(
    settings: Settings,
    name: str,
    scopes: Sequence[Scope],
    expires_at: int | None,
    report: Callable[[MadeKey], None],
) -> None:
    """Make an API key that ends then (microseconds since 1970; None: never); `report` is told it."""
    async with _keys(settings) as keys:
        made = await keys.create(name, scopes, expires_at)
        assert isinstance(made, MadeKey)  # a replay needs a key
        report(made)


async def list_keys(settings: Settings, found: list[ApiKey]) -> None:
    """Add every API key to `found`, the oldest first."""
    async with _keys(settings) as keys:
        found += await keys.all()


async def revoke_key(settings: Settings, named: str, found: list[ApiKey]) -> None:
    """Revoke the API key of this id or name, and add it to `found`. Raises KeyNotFound."""
    async with _keys(settings) as keys:
        revoked = await keys.revoke(named)
        assert isinstance(revoked, ApiKey)  # a replay needs a key
        found.append(revoked)


@asynccontextmanager
async def _keys(settings: Settings) -> AsyncIterator[Keys]:
    await asyncio.to_thread(upgrade, settings.database)
    database = open_database(settings.database)
    try:
        yield Keys(database)
    finally:
        await database.close()


async def begin_anew(settings: Settings) -> None:
    """Drop what was accepted and is not stored, and what is cached: the database was restored."""
    async with open_service(settings, working=False) as service:
        await service.committer.begin_anew(service.moved)


async def reset_cache(settings: Settings) -> None:
    """Make every process on this database drop what it has cached."""
    async with open_service(settings, working=False) as service:
        await service.committer.retire_caches()


def database_name(settings: Settings) -> str:
    """Return the database for people: never with its password. Raises ConfigurationError."""
    return open_database(settings.database).describe()


def make_backup(settings: Settings, target: Path) -> int | str:
    """Copy the database to a new file and return its bytes; for a server, the command of its own tool."""
    return back_up(settings.database, target)


def upgrade_database(settings: Settings, *, after: bool = False) -> tuple[bool, str]:
    """Make the steps that are missing; `after`: all of them. Return whether any was, and what waits in words."""
    changed = upgrade(settings.database, after=after)
    return changed, waiting_steps(standing(settings.database))


def waiting_steps(found: Standing) -> str:
    """Return in words which steps wait until no process of an older version runs; empty: none does."""
    if found.newer or not found.lacks(HEAD):
        return ""
    return f"Steps behind {found.step}, up to {HEAD}, wait"


def _steps(settings: Settings) -> Finding:
    found = standing(settings.database)
    if found.newer:
        detail = f"at step {found.step}, of a newer version; this one (step {HEAD}) can work beside it"
    elif waits := waiting_steps(found):
        detail = f"{waits}: `expediter db upgrade --after`, once no process of an older version runs"
    else:
        detail = f"at step {found.step}, which is this version's"
    return Finding("steps", "ok", detail)


async def examine(settings: Settings, findings: list[Finding]) -> None:
    """Look at the settings and at everything they name, without changing an order; add what was found."""
    read = f"read; stages {settings.stages.value}, intake {settings.intake.value}"
    findings.append(
        Finding("settings", "ok", read if not settings.compat else f"{read}, compat {settings.compat}")
    )
    try:
        await asyncio.to_thread(upgrade, settings.database)
    except ExpediterError as error:
        what = "settings" if isinstance(error, ConfigurationError) else "database"
        findings.append(Finding(what, "failed", f"{error}. Nothing is stored until it can be used"))
        await _examine_parts(settings, findings, stored=False)
    else:
        findings.append(await asyncio.to_thread(_steps, settings))
        await _examine_parts(settings, findings, stored=True)
    findings[:] = [replace(each, detail=in_users_words(each.detail, settings)) for each in findings]
    findings[1:1] = [Finding("settings", "warning", sentence) for sentence in unknown_names()]


async def _examine_parts(settings: Settings, findings: list[Finding], *, stored: bool) -> None:
    """Look at every part; not `stored`: the database cannot be looked at."""
    try:
        async with AsyncExitStack() as stack:
            service = await open_parts(settings, stack, working=False)
            queued = service.intake is not None
            if stored:
                await doctor.examine_database(service.database, service.queries, findings)
            await doctor.examine_cache(service.cache, findings)
            await doctor.examine_broker(service.broker, service.temporary, findings, queued=queued)
            if stored:
                await doctor.examine_gateway(service.gateway, service.queries, findings)
            findings.append(Finding("fulfilment", "ok", service.fulfiller.name))
            if stored:
                await doctor.examine_keys(Keys(service.database), settings, findings)
    except ExpediterError as error:
        what = "settings" if isinstance(error, ConfigurationError) else "database"
        if not any(finding.verdict == "failed" for finding in findings):
            findings.append(Finding(what, "failed", str(error)))
