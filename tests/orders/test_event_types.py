"""The words of an order's history are listed once, for clients that are told of them."""

from __future__ import annotations

import re
from pathlib import Path

import expediter.orders
from expediter.orders.events import EVENT_TYPES


def test_every_event_is_in_the_list() -> None:
    """Whatever the decisions write into a history has its word in EVENT_TYPES, and each word is written."""
    written = set()
    for path in Path(expediter.orders.__file__).parent.glob("*.py"):
        if path.stem != "events":
            written |= set(
                re.findall(
                    r'"((?:order|payment|capture|void|refund|fulfilment|job|command)\.[a-z_]+)"', path.read_text()
                )
            )
    assert written == set(EVENT_TYPES)
    assert len(set(EVENT_TYPES)) == len(EVENT_TYPES)
