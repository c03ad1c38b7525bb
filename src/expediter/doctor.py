"""What `expediter doctor` looks at in each part, and what it advises."""

from __future__ import annotations

import msgspec

from expediter.brokers import Broker, Topic
from expediter.cache import Cache
from expediter.dialects import Database
from expediter.errors import BrokerUnavailable
from expediter.payments import PaymentGateway
from expediter.queries import Queries
from expediter.redis_client import RedisUnavailable
from expediter.temporary import TemporaryOrders


class Finding(msgspec.Struct, frozen=True):
    """One thing that `doctor` looked at: `ok`, `warning` or `failed`, and what to do."""

    what: str
    verdict: str
    detail: str


async def examine_database(database: Database, queries: Queries, findings: list[Finding]) -> None:
    """Look at the database, its durability and its queue."""
    found = await database.durability_settings()
    wrong = [
        f"{name} is {found[name]}, not {want}" for name, want in database.power_safe.items() if found[name] != want
    ]
    said = ", ".join(f"{name}={value}" for name, value in found.items())
    findings.append(Finding("database", "ok", database.describe()))
    if wrong:
        findings.append(Finding("durability", "failed", f"process-safe only: {'; '.join(wrong)}"))
    else:
        findings.append(Finding("durability", "ok", f"{database.durability}: {said}"))
    state, _ = await queries.queue()
    verdict = "warning" if state.dead else "ok"
    text = f"{state.ready} ready, {state.scheduled} scheduled, {state.leased} leased, {state.dead} parked"
    findings.append(Finding("queue", verdict, text))


async def examine_cache(cache: Cache, findings: list[Finding]) -> None:
    """Look at the cache."""
    if cache.failing is None:
        findings.append(Finding("cache", "ok", cache.name))
    else:
        # Nothing depends on it but speed.
        findings.append(Finding("cache", "warning", f"{cache.name}: {cache.failing}"))


async def examine_broker(
    broker: Broker | None, temporary: TemporaryOrders | None, findings: list[Finding]
) -> None:
    """Look at the broker, at what waits in it, and at what would survive a power cut."""
    if broker is None:
        findings.append(Finding("broker", "ok", "none: the database is the queue"))
        return
    try:
        depth = await broker.depth(Topic.COMMANDS)
        findings.append(
            Finding(
                "broker",
                "warning" if depth.dead else "ok",
                f"{broker.name}: {depth.waiting} messages of queued commands wait, {depth.dead} are put aside",
            )
        )
        for what, survives, advice in await broker.durability():
            findings.append(Finding("broker", "ok" if survives else "warning", f"{what}: {advice}"))
    except BrokerUnavailable as error:
        findings.append(Finding("broker", "failed", f"{broker.name}: {error}"))
    if temporary is not None:
        try:
            await temporary.check()
            findings.append(Finding("queued intake", "ok", f"orders that are not stored yet: {temporary.name}"))
        except RedisUnavailable as error:
            detail = f"{temporary.name}: {error}; orders are stored directly"
            findings.append(Finding("queued intake", "failed", detail))


async def examine_gateway(gateway: PaymentGateway, queries: Queries, findings: list[Finding]) -> None:
    """Look at the gateway's circuit breaker."""
    breaker = await queries.breaker()
    verdict = "ok" if breaker.open_until is None else "warning"
    findings.append(Finding("gateway", verdict, f"{gateway.name}, circuit breaker {breaker.state}"))
