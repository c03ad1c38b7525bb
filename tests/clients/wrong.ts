// Nothing here may compile: each line with a mistake says which.
import createClient from "openapi-fetch";

import type { components, paths } from "./schema.js";

const client = createClient<paths>({ baseUrl: "" });
const item = { item_id: "item_001", quantity: 1 };

await client.PATCH("/api/v1/orders/{order_id}/status", {
  params: { path: { order_id: "ORD-1" } },
  body: { status: "lost" }, // mistake: no such status
});
await client.GET("/api/v1/orders", { params: { query: { status: "lost" } } }); // mistake: no such status
await client.GET("/api/v1/orders", { params: { query: { limit: "5" } } }); // mistake: a number as a text
await client.POST("/api/v1/orders", { body: { items: [{ item_id: "item_001" }] } }); // mistake: no quantity
await client.POST("/api/v1/orders", { body: { customer_id: 1, items: item } }); // mistake: one item and no list
await client.POST("/api/v1/orders", {}); // mistake: no body
await client.POST("/api/v1/orders/batch", { body: item }); // mistake: one order and no list
export const body: components["schemas"]["OrderBody"] = { customer: 1, items: [item] }; // mistake: no such field
export const status: components["schemas"]["OrderDocument"]["status"] = "lost"; // mistake: no such status
