"""Many processes and clients meet on one database, stall and die, and every law holds: a walk of some seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from storing import Place
from walking import Walk, printed

SECONDS = 5.0


@pytest.mark.parametrize("stages", ["payment,fulfilment", "payment"])
def test_a_walk_by_many_breaks_no_law(at: Place, folder: Path, stages: str) -> None:
    """Two serving and two working processes, eight clients, stalls and deaths at the moments that matter."""
    walk = Walk(folder, at, seed=1, stages=stages)
    with printed(walk):
        walk.run(seconds=SECONDS)
