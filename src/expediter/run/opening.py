"""What a process says about itself when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from expediter import __version__
from expediter.settings import Settings

if TYPE_CHECKING:
    from expediter.run.service import Service

#: How the line about access says that callers need no key, and that they need one.
OPEN_TO_ALL, ASKED = "nobody is asked for an API key", "for whoever has an API key"

_EXAMPLE = '{"customer_name": "Alice", "items": [{"name": "Pen", "quantity": 2, "price": 1.20}]}'


def reachability_lines(service: Service) -> list[str]:
    """Return a line each about the database, the broker and the cache: reachable or not, and what if not."""
    if service.intake is None:
        without = "orders are refused with 503"
    else:
        without = "orders are still taken in by the broker"
    return [
        f"  orders   {service.database.describe()}, {service.database.durability}; reachable, and if it "
        f"cannot be, {without}",
        _queue_line(service),
        _cache_line(service),
    ]


def access_line(service: Service) -> str:
    """Return a line about who is let in."""
    if service.ring.asks:
        count = service.ring.count
        return f"  access   {ASKED}; there {'is 1' if count == 1 else f'are {count}'}"
    if service.settings.loopback:
        return f"  access   from this machine only, because {OPEN_TO_ALL}: `expediter keys create` makes one"
    return f"  access   from everywhere, and {OPEN_TO_ALL}"


def _queue_line(service: Service) -> str:
    broker = service.broker
    if broker is None:
        return "  queue    in the database"
    if broker.failing is None:
        queued = "; takes orders in before they are stored" if service.intake is not None else ""
        return f"  queue    {broker.name}{queued}"
    return (
        f"  queue    {broker.name} cannot be reached, and until it can the database is the queue, and "
        f"takes orders in: {broker.failing}"
    )


def _cache_line(service: Service) -> str:
    cache = service.cache
    if cache.failing is None:
        return f"  cache    {cache.name}"
    return f"  cache    {cache.name} cannot be reached: {cache.failing}"


def opening_lines(settings: Settings, address: str, reachable: Sequence[str], worked_off: str) -> list[str]:
    """Return what a service says when it begins to listen on `address`; workers run as `worked_off` says."""
    with_key = '-H "X-API-Key: $EXPEDITER_API_KEY" ' if any(ASKED in line for line in reachable) else ""
    lines = [
        f"Expediter {__version__} listens on {address}",
        *reachable,
        f"  workers  {worked_off}",
        "Try:",
        f"  curl {address}/health",
        f"  curl -d '{_EXAMPLE}' -H 'Content-Type: application/json' {with_key}{address}/orders",
        f"  open {address}/docs",
    ]
    if not settings.loopback and any(OPEN_TO_ALL in line for line in reachable):
        lines.append("  Anyone who reaches this address may place and change orders.")
    return lines
