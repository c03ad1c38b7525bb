-- One order, its lines and its first event, in one statement and so in one commit.
WITH placed AS (
  INSERT INTO orders (order_id, customer_id, status, currency, total_minor, version, created_at, updated_at)
  VALUES ($1, $2, 'pending', $3, $4, 1, $5, $5)
), lined AS (
  INSERT INTO order_lines (order_id, line, item_id, name, quantity, price_minor)
  SELECT $1, line, item_id, name, quantity, price_minor
  FROM unnest($6::text[], $7::text[], $8::integer[], $9::bigint[])
    WITH ORDINALITY AS given (item_id, name, quantity, price_minor, line)
)
INSERT INTO events (order_id, number, at, type, data) VALUES ($1, 1, $5, 'order.placed', $10)
