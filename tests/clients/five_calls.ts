// Five calls with the client that openapi-fetch makes of schema.ts; what they say goes to stdout as JSON.
import createClient from "openapi-fetch";

import type { components, paths } from "./schema.js";

type Order = components["schemas"]["OrderDocument"];
type Status = Order["status"];

const client = createClient<paths>({ baseUrl: process.argv[2] ?? "" });

const placed = await client.POST("/api/v1/orders", {
  body: {
    customer_id: "typescript",
    items: [
      { item_id: "item_001", quantity: 2, price: 12.99 },
      { item_id: "item_002", quantity: 1, price: "3.49" },
    ],
    metadata: { table: 7 },
  },
});
if (placed.error) throw new Error(placed.error.error);
const order: Order = placed.data;
const path = { order_id: order.order_id };

const got = await client.GET("/api/v1/orders/{order_id}", { params: { path } });
if (got.error) throw new Error(got.error.error);
if (!got.data) throw new Error("no order");
const status: Status = got.data.status;
const table: string | number | boolean | null | undefined = got.data.metadata["table"];
const firstLine: number | undefined = got.data.items[0]?.quantity;

const list = await client.GET("/api/v1/orders", {
  params: { query: { customer_id: "typescript", limit: 5, status: "pending" } },
});
if (list.error) throw new Error(list.error.error);

const cancelled = await client.POST("/api/v1/orders/{order_id}/cancel", { params: { path } });
if (cancelled.error) throw new Error(cancelled.error.error);

const refused = await client.POST("/api/v1/orders", {
  body: { customer_id: "typescript", items: [{ item_id: "item_001", quantity: 0 }] },
});

console.log(
  JSON.stringify({
    placed: { order_id: order.order_id, total: order.total_amount },
    got: { order_id: got.data.order_id, status, table, quantity: firstLine },
    listed: list.data.orders.map((each) => each.order_id),
    cancelled: {
      code: cancelled.response.status,
      status: "status" in cancelled.data ? cancelled.data.status : null,
    },
    refused: { code: refused.response.status, fields: refused.error?.errors?.map((each) => each.field) },
  }),
);
