"""A bounded part of `make pay`: a gateway over HTTP that loses answers, and workers that are killed."""

from __future__ import annotations

from pathlib import Path

from paying import Paying

from storing import Place

#: Orders on each database, a fifth of which is cancelled at once.
ORDERS = 300


def test_a_gateway_that_loses_answers_charges_nobody_twice(folder: Path, at: Place) -> None:
    """Every tenth connection is dropped after the charge, every twentieth answer is 500: the books agree."""
    paying = Paying(folder, at, orders=ORDERS, cancel=5, kill_seconds=0.5)
    paying.run()
    assert paying.found() == []
    assert paying.deaths > 0
    assert len(paying.entries) > ORDERS / 2
