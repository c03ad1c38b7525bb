"""The tables. Only whole numbers and text: the same on every database, and nothing to convert on the way.

Times are microseconds since 1970 (BigInteger), flags are 0 or 1, JSON is text that Expediter itself has encoded.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
)
from sqlalchemy.dialects import mysql

metadata = MetaData()

#: Ids differ by case, and sort by their bytes, also on MariaDB and MySQL (where step 0005 lets blanks count).
_MYSQL: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
#: JSON documents: an order of 2,000 lines is longer than MySQL's TEXT.
_Document = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")

#: An order as its row; the columns are the fields of `orders.Order`, in that order.
orders = Table(
    "orders",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("status", String(24), nullable=False),
    Column("payment_status", String(24), nullable=False),
    Column("stages", String(24), nullable=False),
    Column("customer_id", String(128)),
    #: 1 where the client sent `customer_id` as a number, so that it goes back as one.
    Column("customer_id_number", SmallInteger, nullable=False),
    Column("customer_name", String(256)),
    Column("currency", String(3), nullable=False),
    Column("total_minor", BigInteger, nullable=False),
    Column("priced", SmallInteger, nullable=False),
    Column("metadata", _Document, nullable=False),
    Column("payment_token", String(256)),
    Column("version", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("processing_started_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("cancelled_at", BigInteger),
    Column("charging", SmallInteger, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("charge_started_at", BigInteger),
    Column("last_error", Text),
    Column("authorized_minor", BigInteger, nullable=False, server_default="0"),
    Column("captured_minor", BigInteger, nullable=False, server_default="0"),
    Column("refunded_minor", BigInteger, nullable=False, server_default="0"),
    Column("refunding_minor", BigInteger, nullable=False, server_default="0"),
    Column("refunds", Integer, nullable=False, server_default="0"),
    Column("payment_action", Text),
    Column("action_expires_at", BigInteger),
    CheckConstraint("total_minor >= 0", name="orders_total_not_negative"),
    CheckConstraint(
        "captured_minor >= 0 AND captured_minor <= authorized_minor AND authorized_minor <= total_minor",
        name="orders_captured_was_authorized",
    ),
    CheckConstraint(
        "refunded_minor >= 0 AND refunding_minor >= 0 AND refunded_minor + refunding_minor <= captured_minor",
        name="orders_refunded_was_captured",
    ),
    CheckConstraint("version >= 1", name="orders_version_counts_from_one"),
    Index("orders_by_age", "created_at", "order_id"),
    Index("orders_by_status", "status", "created_at", "order_id"),
    Index("orders_by_customer", "customer_id", "created_at", "order_id"),
    **_MYSQL,
)

#: The lines of an order, written once. A trigger on `orders` holds their sum against the order's total.
order_lines = Table(
    "order_lines",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("item_id", String(128)),
    Column("item_id_number", SmallInteger, nullable=False),
    Column("name", String(512)),
    Column("quantity", Integer, nullable=False),
    Column("price_minor", BigInteger),
    CheckConstraint("quantity >= 1", name="order_lines_quantity_positive"),
    CheckConstraint("price_minor >= 0", name="order_lines_price_not_negative"),
    sqlite_with_rowid=False,
    **_MYSQL,
)

#: Every change of every order; `position` follows the order of commits (docs/decisions/004-event-positions.md).
events = Table(
    "events",
    metadata,
    Column("position", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("order_id", String(64), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("type", String(32), nullable=False),
    Column("data", _Document, nullable=False),
    Index("events_by_order", "order_id", "number", unique=True),
    **_MYSQL,
)

#: One row: the position of the newest event, and up to which position events may have left for the archive.
feed = Table(
    "feed",
    metadata,
    Column("feed_id", SmallInteger, primary_key=True, autoincrement=False),
    Column("position", BigInteger, nullable=False),
    Column("archived", BigInteger, nullable=False, server_default="0"),
    **_MYSQL,
)

#: One row: whether what readers have cached in Redis may be believed (store/standing.py).
cache_standing = Table(
    "cache_standing",
    metadata,
    Column("standing_id", SmallInteger, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
    Column("suspended_until", BigInteger, nullable=False),
    **_MYSQL,
)

#: One row: rises when what was accepted before must not come back (store/incarnation.py).
incarnation = Table(
    "incarnation",
    metadata,
    Column("incarnation_id", SmallInteger, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
    **_MYSQL,
)

#: One row: what the database is bound to for as long as it lives (store/installation.py), and a mark of its keys.
installation = Table(
    "installation",
    metadata,
    Column("installation_id", SmallInteger, primary_key=True, autoincrement=False),
    Column("gateway_key_prefix", String(64), nullable=True),
    #: Another text after each change of `api_keys`, so that processes read them only then; null: there was none.
    Column("api_keys_mark", String(32), nullable=True),
    **_MYSQL,
)

#: Who may call (store/keys.py). Of a key only its SHA-256 is here; a revoked one keeps its row.
api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(40), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("digest", String(64), nullable=False),
    #: Words parted by blanks.
    Column("scopes", String(255), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("last_used_at", BigInteger),
    Index("api_keys_by_digest", "digest", unique=True),
    **_MYSQL,
)

#: The step that this database is at. Alembic makes it, and keeps it up to date.
alembic_version = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))

#: The oldest step that a program must know to work on this database; see store/migrations.
schema_needs = Table("schema_needs", metadata, Column("step", String(32), primary_key=True), **_MYSQL)

#: The next action of each order that is not at rest; a parked job keeps its row and has `dead_at`.
jobs = Table(
    "jobs",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("holder", String(128)),
    Column("fence", BigInteger, nullable=False),
    Column("claims", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("dead_at", BigInteger),
    #: What the order's road needs next, while its money goes first.
    Column("then_kind", String(16)),
    Column("then_due_at", BigInteger),
    Index("jobs_by_due", "kind", "due_at"),
    **_MYSQL,
)

#: Every call to the payment gateway: stored before it (outcome null), completed after it.
payment_attempts = Table(
    "payment_attempts",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("action", String(8), nullable=False),
    Column("gateway_key", String(64), nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    Column("outcome", String(16)),
    Column("reference", String(128)),
    Column("error", Text),
    sqlite_with_rowid=False,
    **_MYSQL,
)

#: Every refund, from when it is asked for; how it goes is in `payment_attempts`.
refunds = Table(
    "refunds",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("amount_minor", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("requested_at", BigInteger, nullable=False),
    Column("reason", Text),
    Column("by_hand", SmallInteger, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("reference", String(128)),
    Column("error", Text),
    Column("settled_at", BigInteger),
    CheckConstraint("amount_minor > 0", name="refunds_amount_positive"),
    sqlite_with_rowid=False,
    **_MYSQL,
)

#: What a request with an `Idempotency-Key` was answered, kept in the transaction that it caused.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("idempotency_key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("status_code", SmallInteger, nullable=False),
    Column("headers", Text, nullable=False),
    Column("body", _Document, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Index("idempotency_keys_by_expiry", "expires_at"),
    **_MYSQL,
)

#: Sums that are read instead of scanning; each process adds to its own slot, readers sum the slots.
counters = Table(
    "counters",
    metadata,
    Column("name", String(48), primary_key=True),
    Column("slot", SmallInteger, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
    sqlite_with_rowid=False,
    **_MYSQL,
)

#: The ids of deleted orders: an id is used once, because the payment gateway remembers it.
deleted_orders = Table(
    "deleted_orders",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("deleted_at", BigInteger, nullable=False),
    sqlite_with_rowid=False,
    **_MYSQL,
)

#: One row for each thing outside that may be away; shared, so that the whole cluster probes once.
circuit_breakers = Table(
    "circuit_breakers",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("failures", Integer, nullable=False),
    #: Null while closed; otherwise when a probe may be sent.
    Column("open_until", BigInteger),
    #: Who sends the probe now, and until when nobody else may.
    Column("probe_holder", String(128)),
    Column("probe_until", BigInteger),
    #: Counts the changes, so that of two processes that change it at once one looks again.
    Column("version", BigInteger, nullable=False),
    **_MYSQL,
)

#: Who is told of events: an address, and how far its reader has come in the feed (work/webhooks).
webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("endpoint_id", String(40), primary_key=True),
    Column("url", Text, nullable=False),
    #: JSON: words such as order.* or *.
    Column("types", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("status", String(8), nullable=False),
    #: Readable, for it signs. The old one signs, too, until its time is over.
    Column("secret", String(128), nullable=False),
    Column("old_secret", String(128)),
    Column("old_secret_until", BigInteger),
    #: Every event up to here is delivered, or stands in webhook_deliveries.
    Column("position", BigInteger, nullable=False),
    Column("last_success_at", BigInteger),
    Column("last_error", Text),
    Column("failing_since", BigInteger),
    #: Until when the receiver has asked to be left alone.
    Column("wait_until", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    #: Counts the changes that callers have made, so that its reader notices.
    Column("revision", BigInteger, nullable=False),
    Column("holder", String(128)),
    Column("lease_until", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    **_MYSQL,
)

#: What an endpoint waits for, what was given up, and the newest of what was delivered.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("endpoint_id", String(40), primary_key=True),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("notice_id", String(40), nullable=False),
    Column("order_id", String(64), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("type", String(32), nullable=False),
    Column("status", String(12), nullable=False),
    Column("tries", Integer, nullable=False),
    Column("first_tried_at", BigInteger),
    Column("last_tried_at", BigInteger),
    #: Null where it waits for an earlier event of its order, and where nothing is tried any more.
    Column("next_try_at", BigInteger),
    Column("answer_status", Integer),
    Column("answer", Text),
    Column("error", Text),
    Column("took_ms", Integer),
    Index("webhook_deliveries_by_status", "endpoint_id", "status", "position"),
    Index("webhook_deliveries_by_order", "order_id"),
    **_MYSQL,
)
