"""What `expediter doctor` looks at in each part, and what it advises."""

from __future__ import annotations

import re

import msgspec

from expediter.backends.brokers import Broker, Topic
from expediter.backends.cache import Cache
from expediter.backends.databases import Database
from expediter.backends.redis_client import RedisUnavailable
from expediter.errors import BrokerUnavailable
from expediter.payments import PaymentGateway
from expediter.queued.temporary import TemporaryOrders
from expediter.settings import Settings
from expediter.store.keys import Keys
from expediter.store.queries import Queries
from expediter.store.scopes import Scope


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
        told = f"process-safe only, a power cut can lose answered orders: {'; '.join(wrong)}"
        findings.append(Finding("durability", "failed", told))
    else:
        findings.append(Finding("durability", "ok", f"{database.durability}: {said}"))
    state = (await queries.queue()).backlog
    verdict = "warning" if state.dead else "ok"
    text = f"{state.ready} ready, {state.scheduled} scheduled, {state.leased} leased, {state.dead} parked"
    if state.handed_over:
        text += f", {state.handed_over} handed over and not reported yet"
    if state.dead:
        text += "; /orders/{id}/explain says why, POST /orders/{id}/retry takes one up again"
    findings.append(Finding("queue", verdict, text))


async def examine_cache(cache: Cache, findings: list[Finding]) -> None:
    """Look at the cache."""
    if cache.failing is None:
        findings.append(Finding("cache", "ok", cache.name))
    else:
        # Nothing depends on it but speed.
        findings.append(Finding("cache", "warning", f"{cache.name}: {cache.failing}{_advice(cache.failing)}"))


async def examine_broker(
    broker: Broker | None, temporary: TemporaryOrders | None, findings: list[Finding], *, queued: bool = True
) -> None:
    """Look at the broker, at what waits in it, and at what would survive a power cut.

    Not `queued`: it carries hints, and nothing is lost with it.
    """
    if broker is None:
        findings.append(Finding("broker", "ok", "none: the database is the queue"))
        return
    try:
        depth = await broker.depth(Topic.COMMANDS)
        said = f"{broker.name}: {depth.waiting} messages of queued commands wait, {depth.dead} are put aside"
        if depth.dead:
            said += (
                " as unusable: nobody takes those up again; look at why (docs/operations.md, Dead letters), "
                "then remove them"
            )
        findings.append(Finding("broker", "warning" if depth.dead else "ok", said))
        for what, survives, advice in await broker.durability():
            if survives:
                findings.append(Finding("broker", "ok", what))
            elif queued:
                findings.append(Finding("broker", "warning", f"{what}: {advice}"))
            else:
                kept = "enough for hints; before INTAKE=queued mend this"
                findings.append(Finding("broker", "ok", f"{what}: {kept} ({advice})"))
        await _examine_hints(broker, findings)
    except BrokerUnavailable as error:
        meanwhile = "until it is back the database is the queue"
        if queued:
            meanwhile += " and orders are stored there before they are answered"
        findings.append(Finding("broker", "failed", f"{broker.name}: {error}; {meanwhile}{_advice(str(error))}"))
    if temporary is not None and queued:
        await _examine_temporary(temporary, findings)


async def _examine_hints(broker: Broker, findings: list[Finding]) -> None:
    """Look at the hints of a broker that is there: nothing is said of them where they work."""
    try:
        await broker.depth(Topic.HINTS)
    except BrokerUnavailable as error:
        detail = f"no hints: {error}; the workers look for what is due by themselves, up to half a second later"
        findings.append(Finding("broker", "warning", detail + _advice(str(error))))


async def _examine_temporary(temporary: TemporaryOrders, findings: list[Finding]) -> None:
    """Look at the Redis that has the orders that were accepted and are not stored yet."""
    try:
        await temporary.check()
    except RedisUnavailable as error:
        detail = f"{temporary.name}: {error}; until it is back orders are stored before they are answered"
        findings.append(Finding("queued intake", "failed", detail + _advice(str(error))))
        return
    settings = await _memory_settings(temporary)
    policy = settings.get("maxmemory-policy", "")
    if not policy:
        detail = "CONFIG GET is forbidden: see to it that maxmemory-policy is noeviction"
        findings.append(Finding("queued intake", "warning", f"{temporary.name}: {detail}"))
    elif settings.get("maxmemory", "0") != "0" and policy != "noeviction":
        detail = (
            f"{temporary.name} has maxmemory-policy {policy}: when it is full it evicts accepted orders before "
            "they are stored, and until they are their readers may get 404; set maxmemory-policy noeviction"
        )
        findings.append(Finding("queued intake", "warning", detail))
    else:
        detail = f"orders that are not stored yet: {temporary.name}"
        findings.append(Finding("queued intake", "ok", detail))


async def _memory_settings(temporary: TemporaryOrders) -> dict[str, str]:
    """Return what decides whether Redis evicts; nothing where asking is forbidden, as at many hosted ones."""
    try:
        return await temporary.settings("maxmemory", "maxmemory-policy")
    except RedisUnavailable:
        return {}


#: What the reason of a failed connection shows, and what a person can do about it; the first match counts.
_ADVICE = (
    (
        "access to (queue|exchange)",
        "let its user configure, write and read the queue RABBITMQ_QUEUE_NAME and those whose names begin with it",
    ),
    (
        "username-password|WRONGPASS|NOAUTH|Authentication required|ACCESS_REFUSED|invalid password",
        "look at user and password in its settings",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "name its authority's certificate: ?ssl_ca_certs=FILE for rediss://, ?cafile=FILE for amqps://, or "
        "SSL_CERT_FILE",
    ),
    ("WRONG_VERSION_NUMBER", "that port speaks no TLS: correct the port, or use redis:// or amqp://"),
    (
        "reset by peer|closed by server|connection reset",
        "if that port speaks TLS, use rediss://, amqps:// or MQ_USE_SSL=true",
    ),
    ("refused", "nothing listens there: start it, or correct host and port"),
    ("Name or service not known|name resolution|nodename", "no such host: correct its name"),
    ("did not answer", "it is overloaded, or a firewall drops what is sent there"),
    ("OOM command|memory or disk", "it is full: give it room"),
)


def _advice(reason: str) -> str:
    """Return what a person can do about a connection that failed for this reason, as the end of a sentence."""
    for pattern, advice in _ADVICE:
        if re.search(pattern, reason, re.IGNORECASE):
            return f". What to do: {advice}"
    return ""


async def examine_gateway(gateway: PaymentGateway, queries: Queries, findings: list[Finding]) -> None:
    """Look at the gateway's circuit breaker."""
    breaker = await queries.breaker()
    text = f"{gateway.name}, circuit breaker {breaker.state}"
    if breaker.open_until is None:
        findings.append(Finding("gateway", "ok", text))
    else:
        text += f" after {breaker.failures} failures in a row; charges wait and one probe at a time goes out"
        findings.append(Finding("gateway", "warning", text))


async def examine_keys(keys: Keys, settings: Settings, findings: list[Finding]) -> None:
    """Look at who is let in: API keys, and admin calls."""
    counting = [each for each in await keys.all() if each.revoked_at is None]
    if counting:
        findings.append(Finding("access", "ok", f"for whoever has an API key; there are {len(counting)}"))
    else:
        wide = "" if settings.loopback else f", and HOST={settings.host} can be reached from other machines"
        text = f"nobody is asked for an API key{wide}: `expediter keys create` makes one"
        findings.append(Finding("access", "warning" if wide else "ok", text))
    if settings.admin_password is not None:
        findings.append(Finding("admin", "ok", "admin calls ask for the password"))
    elif any(Scope.ADMIN in each.scopes for each in counting):
        findings.append(Finding("admin", "ok", "admin calls ask for an API key"))
    else:
        text = "admin calls are off: set ADMIN_PASSWORD to allow them, or make an API key for admin"
        findings.append(Finding("admin", "warning", text))
