"""A month of real invoices through two serving and two working processes, on every set of servers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from servers import RabbitServer, RedisServer
from shopping import open_shop
from storing import Place

#: What carries the work, and whether it also takes the orders in.
ROADS = [
    ("database", "direct"),
    ("redis", "direct"),
    ("redis", "queued"),
    ("rabbitmq", "direct"),
    ("rabbitmq", "queued"),
]


@pytest.fixture
def servers(request: pytest.FixtureRequest, redis_server: RedisServer, broker: str, intake: str) -> dict[str, str]:
    """The settings of a cache in Redis, a broker, and an intake."""
    settings = {"REDIS_URL": redis_server.new_database(), "INTAKE": intake}
    if broker == "redis":
        settings["BROKER_URL"] = settings["REDIS_URL"]
    elif broker == "rabbitmq":
        rabbit: RabbitServer = request.getfixturevalue("rabbitmq")
        settings |= {
            "RABBITMQ_HOST": "127.0.0.1",
            "RABBITMQ_PORT": str(rabbit.port),
            "RABBITMQ_QUEUE_NAME": rabbit.new_queue(),
        }
    return settings


#: The roads on which all 2,025 invoices go; on the others goes every fifth, unless EXPEDITER_ORDERS=all.
WHOLE = {("database", "direct")}


@pytest.mark.parametrize(("broker", "intake"), ROADS)
def test_real_orders_come_to_rest(
    folder: Path, at: Place, servers: dict[str, str], broker: str, intake: str
) -> None:
    """The 1,629 valid ones of 2,025 invoices rest, each charged once; none was ever unknown to who placed it."""
    whole = (broker, intake) in WHOLE or os.environ.get("EXPEDITER_ORDERS") == "all"
    valid, refused = (1629, 396) if whole else (317, 88)
    with open_shop(folder, at, servers) as shop:
        for placed in shop.shoppers.place(shop.invoices if whole else shop.invoices[::5]):
            placed.result()
        shop.assert_all_went_well(valid)
        accepted = 202 if intake == "queued" else 201
        told = shop.shoppers.statuses.copy()
        # Where the broker is slower than it may be, an order is stored at once.
        told[accepted] += told.pop(201, 0) if accepted != 201 else 0
        assert told == {accepted: valid, 200: 2 * valid, 422: refused}
        for program in (*shop.doors, *shop.workers):
            assert program.stop() == 0
            assert [line for line in program.log if "[error" in line or "Traceback" in line] == []
