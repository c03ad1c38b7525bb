"""What identifies a request under an Idempotency-Key: what it asks for, not how that is written."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from expediter.orders.commands import PlaceOrder
from expediter.orders.order import Stages

_sorted_json = msgspec.json.Encoder(order="sorted").encode


def fingerprinted(asked: Any) -> bytes:
    """Return what identifies a request: the same for all that ask for the same."""
    if isinstance(asked, PlaceOrder):
        # Its id if the client has chosen it; and neither the time nor the stages, which the settings say.
        changes: dict[str, Any] = {"order_id": ""} if asked.fresh else {}
        metadata = _plain_numbers(msgspec.json.decode(asked.metadata))
        plain = replace(asked, placed_at=None, stages=Stages.PAYMENT, metadata="", **changes)
        return _sorted_json((plain, metadata))
    return _sorted_json(asked)


def _plain_numbers(metadata: dict[str, Any]) -> dict[str, Any]:
    """Write 1.0 as 1: in JSON they are the same number."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in metadata.items()
    }
