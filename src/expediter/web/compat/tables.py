"""The five services whose clients are understood, by the name that COMPAT gives them."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from expediter.orders.order import Status
from expediter.settings import Compat
from expediter.web.compat.dialect import Dialect, Kind, Refusals

#: The cached orders API: callers move the orders, in words of their own.
CACHED = Dialect(
    shown={Status.PENDING: "received"},
    meant={
        "received": Status.PENDING,
        "preparing": Status.PROCESSING,
        "shipped": Status.PROCESSING,
        "delivered": Status.COMPLETED,
    },
    through=True,
    codes={(Kind.DELETE, 204): 200},
    refusals=Refusals.ERROR,
    refused={(None, 422): 400},
    digits=True,
    whole_lists=True,
    deleted="Order deleted",
)

#: The same with writes through a broker: a change is accepted, and carried out later.
QUEUED = replace(
    CACHED,
    codes={(Kind.DELETE, 204): 202, (Kind.CHANGE, 200): 202, (Kind.PLACE, 201): 202},
    deleted="Order deletion accepted",
)

#: The in-process order processor.
PROCESSOR = Dialect(
    shown={status: status.value.capitalize() for status in Status},
    refusals=Refusals.ERROR,
    refused={(None, 422): 400, (Kind.PLACE, 409): 400, (Kind.POPULATE, 409): 400},
    naive_times=True,
    empty_ids=True,
)

#: The food-delivery order service: payment is the end of its road, and refusals are FastAPI's.
DELIVERY = Dialect(
    canonical=True,
    refusals=Refusals.DETAIL,
    counted=True,
    attempts=True,
    placed_as=Status.PAYMENT_PROCESSING,
)

#: The scalable order processing system.
STREAMS = Dialect(
    codes={(Kind.PLACE, 201): 200, (Kind.PLACE, 202): 200},
    naive_times=True,
    lenient=True,
)

DIALECTS: Mapping[Compat, Dialect] = {
    Compat.CACHED: CACHED,
    Compat.QUEUED: QUEUED,
    Compat.PROCESSOR: PROCESSOR,
    Compat.DELIVERY: DELIVERY,
    Compat.STREAMS: STREAMS,
}
