"""Documents of orders that were worded before: an order of one version is always the same text."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

from expediter.backends.bounded import Bounded
from expediter.orders.order import Order

#: Bytes of documents that a process keeps for its pages; what was kept first goes first.
WORDED_BYTES_MAX = 16 * 1024 * 1024
#: What an entry costs beside its document, about.
_ENTRY_BYTES = 400

#: With the moment of its last change: an id may be placed anew once all orders were cleared, and a version may be
#: another one's once a backup came back.
_Key = tuple[str, int, int]


class Worded:
    """Documents by order and version. Safe to use from several threads."""

    def __init__(self, bytes_max: int = WORDED_BYTES_MAX) -> None:
        """Nothing is kept yet."""
        self._documents: Bounded[_Key, bytes] = Bounded(bytes_max, lambda document: len(document) + _ENTRY_BYTES)
        self._lock = Lock()

    def find(self, orders: Sequence[Order]) -> dict[str, bytes]:
        """Return the documents of those of these orders that are kept, by order id."""
        kept = self._documents.kept
        found = ((order.order_id, kept.get(_key(order))) for order in orders)
        return {order_id: document for order_id, document in found if document is not None}

    def keep(self, order: Order, document: bytes) -> None:
        """Keep a document, in the place of the oldest ones."""
        with self._lock:
            self._documents.keep(_key(order), document)


def _key(order: Order) -> _Key:
    return order.order_id, order.version, order.updated_at
