"""Orders as large as they may be, many at once: no statement is longer than the database takes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from auditing import wait_until
from expediter.backends.databases.mysql import STATEMENT_BYTES_MAX
from expediter.errors import ConfigurationError
from expediter.store.migrations import upgrade
from servers import MariadbServer
from serving import Serving

#: Some 1 MiB; apostrophes are twice as long in a statement.
BODY = {
    "customer_id": "c",
    "items": [{"item_id": f"i{index}", "name": "'" * 500, "quantity": 1} for index in range(1800)],
}


class NarrowMariadbServer(MariadbServer):
    """Takes the shortest statements that the service works with."""

    def more_options(self) -> list[str]:
        return [f"--max-allowed-packet={STATEMENT_BYTES_MAX}"]


@pytest.fixture
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariadbServer]:
    server = NarrowMariadbServer(tmp_path_factory.mktemp("narrow"))
    yield server
    server.stop()


def test_twenty_five_of_the_largest_orders_at_once(narrow: MariadbServer, tmp_path: Path) -> None:
    """Each is stored, with the answer that its key keeps; a small one beside them, too."""
    with Serving(tmp_path, DATABASE_URL=narrow.new_database(), PAYMENT_MOCK_LATENCY_MAX="0") as service:

        def place(number: int) -> bool:
            body = BODY if number else {**BODY, "items": BODY["items"][:1]}
            answer = service.client.post("/orders", json=body, headers={"Idempotency-Key": f"k{number}"})
            assert answer.status_code in (201, 503), answer.text  # a slow machine may ask to come back
            return answer.status_code == 201

        def insist(number: int) -> None:
            wait_until(lambda: place(number))

        with ThreadPoolExecutor(26) as clients:
            list(clients.map(insist, range(26)))


def test_a_server_that_takes_too_little_is_refused_at_the_start(narrow: MariadbServer) -> None:
    """It would refuse the largest orders, again and again; the sentence says what to set."""
    address = narrow.new_database()
    narrow.query("root", f"SET GLOBAL max_allowed_packet = {STATEMENT_BYTES_MAX // 2}")
    with pytest.raises(ConfigurationError, match="max_allowed_packet=16M"):
        upgrade(address)
