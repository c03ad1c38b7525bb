"""What the handlers work with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from expediter.backends.brokers import Broker
from expediter.backends.cache import Cache
from expediter.backends.tallies import SharedTally
from expediter.orders.commands import HearDispute, HearGateway
from expediter.orders.laws import Verified
from expediter.orders.order import MICROSECONDS
from expediter.queued.intake import QueuedIntake
from expediter.queued.temporary import TemporaryOrders
from expediter.settings import Settings
from expediter.store.committer import Committer
from expediter.store.keys import KeyRing, Keys
from expediter.store.queries import Queries
from expediter.store.webhooks import Endpoint, Tried, Webhooks
from expediter.telemetry.meters import Family
from expediter.web.limits import WrongSecrets
from expediter.web.tallies import Requests


class Hears(Protocol):
    """Verifies what payment gateways tell by themselves, and reads it into commands.

    Raises CallbackRefused for what is not signed, or cannot be read.
    """

    async def callback(self, headers: Mapping[str, str], body: bytes) -> HearGateway:
        """Return the command for a payment document of the HTTP protocol."""

    async def stripe(self, headers: Mapping[str, str], body: bytes) -> HearGateway | HearDispute | None:
        """Return the command for an event of Stripe's; None: it concerns no order."""


async def nothing_measured() -> list[Family]:
    """Return that nothing is measured: the interface is used without a server around it."""
    return []


@dataclass
class Context:
    """The parts that the web uses. `draining` turns readiness off while the process stops.

    `verify` holds the database against the laws; None: it takes longer than so many seconds. `ended` names what
    should run in the background of this process, and does not any more. `batches` is how many are being read, and
    `streams` how many readers of events are connected.

    `keys` are the API keys, and `ring` what this process knows of them.
    `verdicts` are what the last looks at each part have found, and since when (Unix microseconds) it has been so.

    `send` makes one try to send a body, under a name, to a webhook endpoint.

    `requests` counts what was answered, and `metrics` returns what is measured of the whole service.

    `secrets` knows who has guessed passwords or keys. `tally` None: rates are counted in this process alone.

    `broker` None: the database is the queue. `intake` None: everything is stored before it is answered.
    """

    settings: Settings
    committer: Committer
    queries: Queries
    cache: Cache
    durability: str
    database: str
    working: bool
    ended: Callable[[], list[str]]
    verify: Callable[[float], Awaitable[Verified | None]]
    hear: Hears
    webhooks: Webhooks
    keys: Keys
    ring: KeyRing
    send: Callable[[Endpoint, str, bytes, int], Awaitable[Tried]]
    broker: Broker | None = None
    intake: QueuedIntake | None = None
    temporary: TemporaryOrders | None = None
    tally: SharedTally | None = None
    secrets: WrongSecrets = field(default_factory=WrongSecrets)
    draining: bool = False
    batches: int = 0
    streams: int = 0
    verdicts: dict[str, tuple[str, int]] = field(default_factory=dict)
    requests: Requests = field(default_factory=Requests)
    metrics: Callable[[], Awaitable[list[Family]]] = nothing_measured

    @property
    def keep(self) -> int:
        """How long an idempotency key is kept, in microseconds."""
        return int(self.settings.idempotency_keep_days * 24 * 3600 * MICROSECONDS)
