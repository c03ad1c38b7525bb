"""Many processes and clients meet on one database, stall and die, and every law holds: a walk of some seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from servers import RedisServer
from storing import Place
from walking import Walk, printed

SECONDS = 5.0


@pytest.mark.parametrize("intake", ["direct", "queued"])
def test_a_walk_by_many_breaks_no_law(at: Place, folder: Path, intake: str, redis_server: RedisServer) -> None:
    """Two serving and two working processes, eight clients, stalls and deaths at the moments that matter.

    Halfway everything is removed, and the cache is flushed, slow or full now and then. With queued intake a
    payment is all that there is to do, and Redis works.
    """
    url = redis_server.new_database()
    queued = {"REDIS_URL": url, "BROKER_URL": url} if intake == "queued" else None
    stages = "payment" if queued else "payment,fulfilment"
    walk = Walk(folder, at, seed=1, stages=stages, queued=queued, cache="" if queued else url, clears=True)
    with printed(walk):
        walk.run(seconds=SECONDS)
