"""What is measured, for Prometheus: `GET /metrics`, in its text format or in that of OpenMetrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from expediter.store.scopes import Scope
from expediter.telemetry.meters import Family
from expediter.web.context import Context
from expediter.web.http import App, Call, Reply
from expediter.web.operations import Operation
from expediter.web.problems import RequestRefused, problem_reply

if TYPE_CHECKING:
    from prometheus_client import Metric

PATH = "/metrics"
#: What is answered to whoever does not say what it understands.
TEXT = "text/plain; version=0.0.4; charset=utf-8"


async def metrics(call: Call, context: Context) -> Reply:
    """What every process of this service counts and measures, and how the whole stands by the database."""
    call.query()
    return await exposition(call, await context.metrics())


async def exposition(call: Call, families: Sequence[Family]) -> Reply:
    """Return these as a body of the form that the caller asks for."""
    # In a thread: the first time it imports a library that most processes never need.
    body, media_type = await asyncio.to_thread(_written, call.header(b"accept") or "", families)
    return Reply(200, body, [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")])


def _written(accept: str, families: Sequence[Family]) -> tuple[bytes, str]:
    from prometheus_client.exposition import choose_encoder

    encode, media_type = choose_encoder(accept)
    return encode(_Collector(families)), media_type


def metrics_app(measured: Callable[[], Awaitable[Sequence[Family]]]) -> App:
    """Return what answers at a port that has metrics and nothing else."""

    async def answer(call: Call) -> Reply:
        if call.refusal is None and call.path == PATH and call.method in ("GET", "HEAD"):
            return await exposition(call, await measured())
        refusal = call.refusal or RequestRefused(404, "Not found", f"There is nothing here but GET {PATH}")
        return problem_reply(refusal, call.request_id)

    return answer


class _Collector:
    """The collector protocol of prometheus-client, over what is measured already."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        from prometheus_client import Metric

        for family in self._families:
            metric = Metric(family.name, family.words, family.kind)
            total = "_total" if family.kind == "counter" else ""
            for suffix, labels, value in family.samples:
                metric.add_sample(family.name + (suffix or total), labels, value)
            yield metric


OPERATIONS = (
    Operation(
        paths=(PATH,),
        handler=metrics,
        scope=Scope.ORDERS_READ,
        summary="Metrics for Prometheus",
        tag="service",
        answers={200: TEXT},
    ),
)
