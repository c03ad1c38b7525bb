-- The tables of an order as a good team would lay them: the baselines `go` and `fastify` share them.
CREATE TABLE orders (
  order_id text PRIMARY KEY,
  customer_id text NOT NULL,
  status text NOT NULL,
  currency text NOT NULL,
  total_minor bigint NOT NULL CHECK (total_minor >= 0),
  version bigint NOT NULL,
  created_at timestamptz NOT NULL,
  updated_at timestamptz NOT NULL
);
CREATE INDEX orders_by_age ON orders (created_at, order_id);
CREATE INDEX orders_by_status ON orders (status, created_at, order_id);
CREATE INDEX orders_by_customer ON orders (customer_id, created_at, order_id);

CREATE TABLE order_lines (
  order_id text NOT NULL,
  line integer NOT NULL,
  item_id text NOT NULL,
  name text NOT NULL,
  quantity integer NOT NULL CHECK (quantity >= 1),
  price_minor bigint NOT NULL CHECK (price_minor >= 0),
  PRIMARY KEY (order_id, line)
);

CREATE TABLE events (
  position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  order_id text NOT NULL,
  number bigint NOT NULL,
  at timestamptz NOT NULL,
  type text NOT NULL,
  data text NOT NULL,
  UNIQUE (order_id, number)
);
