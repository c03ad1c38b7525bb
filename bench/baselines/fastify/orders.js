// Fastify, with pg and a pool of 20, in two forms.
//
//     DATABASE_URL=... PORT=8000 node orders.js tuned STATEMENT.sql       one statement, and so one commit, an order
//     DATABASE_URL=... REDIS_URL=... PORT=8000 node orders.js usual       BEGIN, three INSERTs, COMMIT, then BullMQ
//
// A schema checks what comes in, another one writes what goes out; money is counted in whole cents.

import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { Queue } from "bullmq";
import Fastify from "fastify";
import pg from "pg";

const [form, statementFile] = process.argv.slice(2);
const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 20 });
const app = Fastify({ logger: { level: "error" } });
const CURRENCY = "USD";

class Refusal extends Error {
  statusCode = 422;
}

const text = (maxLength) => ({ type: "string", minLength: 1, maxLength });
const amount = { type: "number" };
const whole = { type: "integer" };
const schema = {
  body: {
    type: "object",
    required: ["customer_id", "items"],
    additionalProperties: false,
    properties: {
      order_id: text(64),
      customer_id: text(128),
      items: {
        type: "array",
        minItems: 1,
        maxItems: 2000,
        items: {
          type: "object",
          required: ["item_id", "item_name", "quantity", "price"],
          additionalProperties: false,
          properties: {
            item_id: text(128),
            item_name: text(512),
            quantity: { type: "integer", minimum: 1, maximum: 1_000_000 },
            price: { type: "number", minimum: 0, maximum: 1e11 },
          },
        },
      },
    },
  },
  response: {
    201: {
      type: "object",
      properties: {
        order_id: { type: "string" },
        status: { type: "string" },
        customer_id: { type: "string" },
        currency: { type: "string" },
        total_amount: amount,
        total_minor: whole,
        items: {
          type: "array",
          items: {
            type: "object",
            properties: {
              line: whole,
              item_id: { type: "string" },
              item_name: { type: "string" },
              quantity: whole,
              price: amount,
              price_minor: whole,
            },
          },
        },
        version: whole,
        created_at: { type: "string" },
        updated_at: { type: "string" },
      },
    },
  },
};

function minor(price) {
  const cents = Math.round(price * 100);
  if (Math.abs(price * 100 - cents) > 1e-4) {
    throw new Refusal("a price has at most two digits after the point");
  }
  return cents;
}

// A UUIDv7 without its dashes: ids of one time lie together in the index.
function newOrderId(now) {
  const id = randomBytes(16);
  id.writeUIntBE(now.getTime(), 0, 6);
  id[6] = (id[6] & 0x0f) | 0x70;
  id[8] = (id[8] & 0x3f) | 0x80;
  return `ORD-${id.toString("hex")}`;
}

function accept(body) {
  const now = new Date();
  const items = body.items.map((item, index) => ({ line: index + 1, ...item, price_minor: minor(item.price) }));
  const total = items.reduce((sum, item) => sum + item.price_minor * item.quantity, 0);
  return {
    order_id: body.order_id ?? newOrderId(now),
    status: "pending",
    customer_id: body.customer_id,
    currency: CURRENCY,
    total_amount: total / 100,
    total_minor: total,
    items,
    version: 1,
    created_at: now.toISOString(),
    updated_at: now.toISOString(),
  };
}

const placed = (order) =>
  JSON.stringify({ customer_id: order.customer_id, currency: order.currency, total_minor: order.total_minor });

function columns(items) {
  return ["item_id", "item_name", "quantity", "price_minor"].map((name) => items.map((item) => item[name]));
}

async function tuned() {
  const statement = readFileSync(statementFile, "utf8");
  return async (order) => {
    const { order_id, customer_id, currency, total_minor, created_at, items } = order;
    const values = [order_id, customer_id, currency, total_minor, created_at, ...columns(items), placed(order)];
    await pool.query({ name: "place", text: statement, values });
  };
}

async function usual() {
  const { hostname, port, pathname } = new URL(process.env.REDIS_URL);
  const connection = { host: hostname, port: Number(port), db: Number(pathname.slice(1)) };
  const queue = new Queue("orders", { connection });
  return async (order) => {
    const { order_id, customer_id, currency, total_minor, created_at, items } = order;
    const client = await pool.connect();
    try {
      await client.query("BEGIN");
      await client.query(
        "INSERT INTO orders (order_id, customer_id, status, currency, total_minor, version, created_at, updated_at)" +
          " VALUES ($1, $2, 'pending', $3, $4, 1, $5, $5)",
        [order_id, customer_id, currency, total_minor, created_at],
      );
      const rows = items.map((_, index) => {
        const at = index * 6;
        return `($${at + 1}, $${at + 2}, $${at + 3}, $${at + 4}, $${at + 5}, $${at + 6})`;
      });
      await client.query(
        `INSERT INTO order_lines (order_id, line, item_id, name, quantity, price_minor) VALUES ${rows.join(", ")}`,
        items.flatMap((item) => [
          order_id,
          item.line,
          item.item_id,
          item.item_name,
          item.quantity,
          item.price_minor,
        ]),
      );
      await client.query(
        "INSERT INTO events (order_id, number, at, type, data) VALUES ($1, 1, $2, 'order.placed', $3)",
        [order_id, created_at, placed(order)],
      );
      await client.query("COMMIT");
    } catch (error) {
      await client.query("ROLLBACK");
      throw error;
    } finally {
      client.release();
    }
    await queue.add("process", { order_id });
  };
}

const store = await { tuned, usual }[form]();

app.post("/orders", { schema }, async (request, reply) => {
  const order = accept(request.body);
  await store(order);
  reply.code(201);
  return order;
});

app.setErrorHandler((error, _, reply) => {
  const status = error.validation ? 422 : error.code === "23505" ? 409 : (error.statusCode ?? 503);
  if (status === 503) app.log.error(error);
  reply.code(status).send({ error: status === 503 ? "the order was not stored" : error.message });
});

await app.listen({ host: "127.0.0.1", port: Number(process.env.PORT) });
