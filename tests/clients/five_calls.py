"""Five calls with the client that openapi-python-client makes; what they say goes to stdout as JSON."""

from __future__ import annotations

import json
import sys

from generated import Client
from generated.api.orders import cancel_order, create_order, get_order, list_orders
from generated.models import (
    ItemBody,
    ListOrdersStatus,
    OrderBody,
    OrderBodyMetadataType0,
    OrderDocument,
    OrderList,
    Problem,
    ShownOrder,
)

metadata = OrderBodyMetadataType0()
metadata["table"] = 7
body = OrderBody(
    customer_id="python",
    items=[
        ItemBody(quantity=2, item_id="item_001", price=12.99),
        ItemBody(quantity=1, item_id="item_002", price="3.49"),
    ],
    metadata=metadata,
)

with Client(base_url=sys.argv[1]) as client:
    placed = create_order.sync(client=client, body=body)
    assert isinstance(placed, OrderDocument), placed
    got = get_order.sync(client=client, order_id=placed.order_id)
    assert isinstance(got, ShownOrder), got
    listed = list_orders.sync(client=client, customer_id="python", limit=5, status=ListOrdersStatus.PENDING)
    assert isinstance(listed, OrderList), listed
    cancelled = cancel_order.sync_detailed(client=client, order_id=placed.order_id)
    assert isinstance(cancelled.parsed, ShownOrder), cancelled
    wrong = OrderBody(customer_id="python", items=[ItemBody(quantity=0, item_id="item_001")])
    refused = create_order.sync_detailed(client=client, body=wrong)
    assert isinstance(refused.parsed, Problem), refused

print(
    json.dumps(
        {
            "placed": {"order_id": placed.order_id, "total": placed.total_amount},
            "got": {
                "order_id": got.order_id,
                "status": got.status.value,
                "table": got.metadata["table"],
                "quantity": got.items[0].quantity,
            },
            "listed": [order.order_id for order in listed.orders],
            "cancelled": {"code": cancelled.status_code, "status": cancelled.parsed.status.value},
            "refused": {
                "code": refused.status_code,
                "fields": [error.field for error in refused.parsed.errors or ()],
            },
        }
    )
)
