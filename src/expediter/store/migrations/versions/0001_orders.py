"""Orders and everything that belongs to them.

Revision ID: 0001
Revises:
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None

MYSQL: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}

#: The database itself holds a total against its lines: lines are written first, and neither changes later.
SQLITE_TRIGGERS = (
    """
    CREATE TRIGGER orders_total_is_the_sum_of_lines AFTER INSERT ON orders WHEN NEW.priced = 1
    BEGIN
        SELECT RAISE(ABORT, 'total_minor is not the sum of the lines')
        WHERE NEW.total_minor IS NOT
            (SELECT SUM(quantity * price_minor) FROM order_lines WHERE order_id = NEW.order_id);
    END
    """,
    """
    CREATE TRIGGER orders_money_never_changes BEFORE UPDATE OF total_minor, currency, priced ON orders
    BEGIN
        SELECT RAISE(ABORT, 'the total of an order never changes');
    END
    """,
    """
    CREATE TRIGGER order_lines_never_change BEFORE UPDATE ON order_lines
    BEGIN
        SELECT RAISE(ABORT, 'the lines of an order never change');
    END
    """,
)

POSTGRESQL_TRIGGERS = (
    """
    CREATE FUNCTION orders_total_is_the_sum_of_lines() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF EXISTS (
            SELECT FROM placed WHERE priced = 1 AND total_minor IS DISTINCT FROM
                (SELECT SUM(quantity * price_minor) FROM order_lines l WHERE l.order_id = placed.order_id)
        ) THEN
            RAISE EXCEPTION 'total_minor is not the sum of the lines';
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER orders_total_is_the_sum_of_lines AFTER INSERT ON orders
    REFERENCING NEW TABLE AS placed FOR EACH STATEMENT EXECUTE FUNCTION orders_total_is_the_sum_of_lines()
    """,
    """
    CREATE FUNCTION money_never_changes() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'the total and the lines of an order never change';
    END $$
    """,
    """
    CREATE TRIGGER orders_money_never_changes BEFORE UPDATE OF total_minor, currency, priced ON orders
    FOR EACH ROW EXECUTE FUNCTION money_never_changes()
    """,
    """
    CREATE TRIGGER order_lines_never_change BEFORE UPDATE ON order_lines
    FOR EACH ROW EXECUTE FUNCTION money_never_changes()
    """,
)

MYSQL_TRIGGERS = (
    """
    CREATE TRIGGER orders_total_is_the_sum_of_lines BEFORE INSERT ON orders FOR EACH ROW
    BEGIN
        IF NEW.priced = 1 AND NOT NEW.total_minor <=>
            (SELECT SUM(quantity * price_minor) FROM order_lines WHERE order_id = NEW.order_id)
        THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'total_minor is not the sum of the lines';
        END IF;
    END
    """,
    """
    CREATE TRIGGER orders_money_never_changes BEFORE UPDATE ON orders FOR EACH ROW
    BEGIN
        IF NEW.total_minor <> OLD.total_minor OR NEW.currency <> OLD.currency OR NEW.priced <> OLD.priced THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'the total of an order never changes';
        END IF;
    END
    """,
    """
    CREATE TRIGGER order_lines_never_change BEFORE UPDATE ON order_lines FOR EACH ROW
    SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'the lines of an order never change'
    """,
)

TRIGGERS = {
    "sqlite": SQLITE_TRIGGERS,
    "postgresql": POSTGRESQL_TRIGGERS,
    "mysql": MYSQL_TRIGGERS,
    "mariadb": MYSQL_TRIGGERS,
}

#: On SQLite only a plain INTEGER key is the row number itself.
_POSITION = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
#: JSON documents: an order of 2,000 lines is longer than the TEXT of MySQL.
_DOCUMENT = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def _make_orders() -> None:
    op.create_table(
        "orders",
        sa.Column("order_id", sa.String(64), primary_key=True),
        sa.Column("status", sa.String(24), nullable=False),
        sa.Column("payment_status", sa.String(24), nullable=False),
        sa.Column("stages", sa.String(24), nullable=False),
        sa.Column("customer_id", sa.String(128)),
        sa.Column("customer_id_number", sa.SmallInteger(), nullable=False),
        sa.Column("customer_name", sa.String(256)),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("total_minor", sa.BigInteger(), nullable=False),
        sa.Column("priced", sa.SmallInteger(), nullable=False),
        sa.Column("metadata", _DOCUMENT, nullable=False),
        sa.Column("payment_token", sa.String(256)),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("processing_started_at", sa.BigInteger()),
        sa.Column("completed_at", sa.BigInteger()),
        sa.Column("cancelled_at", sa.BigInteger()),
        sa.Column("charging", sa.SmallInteger(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("charge_started_at", sa.BigInteger()),
        sa.Column("last_error", sa.Text()),
        sa.CheckConstraint("total_minor >= 0", name="orders_total_not_negative"),
        sa.CheckConstraint("version >= 1", name="orders_version_counts_from_one"),
        **MYSQL,
    )
    op.create_index("orders_by_age", "orders", ["created_at", "order_id"])
    op.create_index("orders_by_customer", "orders", ["customer_id", "created_at", "order_id"])
    op.create_index("orders_by_status", "orders", ["status", "created_at", "order_id"])


def _make_order_lines() -> None:
    op.create_table(
        "order_lines",
        sa.Column("order_id", sa.String(64), primary_key=True),
        sa.Column("line", sa.Integer(), primary_key=True),
        sa.Column("item_id", sa.String(128)),
        sa.Column("item_id_number", sa.SmallInteger(), nullable=False),
        sa.Column("name", sa.String(512)),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("price_minor", sa.BigInteger()),
        sa.CheckConstraint("price_minor >= 0", name="order_lines_price_not_negative"),
        sa.CheckConstraint("quantity >= 1", name="order_lines_quantity_positive"),
        sqlite_with_rowid=False,
        **MYSQL,
    )


def _make_events() -> None:
    op.create_table(
        "events",
        sa.Column("position", _POSITION, primary_key=True, autoincrement=False),
        sa.Column("order_id", sa.String(64), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("data", _DOCUMENT, nullable=False),
        **MYSQL,
    )
    op.create_index("events_by_order", "events", ["order_id", "number"], unique=True)


def _make_feed() -> None:
    op.create_table(
        "feed",
        sa.Column("feed_id", sa.SmallInteger(), primary_key=True, autoincrement=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        **MYSQL,
    )


def _make_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("order_id", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.String(128)),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("claims", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("dead_at", sa.BigInteger()),
        **MYSQL,
    )
    op.create_index("jobs_by_due", "jobs", ["kind", "due_at"])


def _make_payment_attempts() -> None:
    op.create_table(
        "payment_attempts",
        sa.Column("order_id", sa.String(64), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("action", sa.String(8), nullable=False),
        sa.Column("gateway_key", sa.String(64), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger()),
        sa.Column("outcome", sa.String(16)),
        sa.Column("reference", sa.String(128)),
        sa.Column("error", sa.Text()),
        sqlite_with_rowid=False,
        **MYSQL,
    )


def _make_idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("idempotency_key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("status_code", sa.SmallInteger(), nullable=False),
        sa.Column("headers", sa.Text(), nullable=False),
        sa.Column("body", _DOCUMENT, nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        **MYSQL,
    )
    op.create_index("idempotency_keys_by_expiry", "idempotency_keys", ["expires_at"])


def _make_counters() -> None:
    op.create_table(
        "counters",
        sa.Column("name", sa.String(48), primary_key=True),
        sa.Column("slot", sa.SmallInteger(), primary_key=True, autoincrement=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sqlite_with_rowid=False,
        **MYSQL,
    )


def _make_deleted_orders() -> None:
    op.create_table(
        "deleted_orders",
        sa.Column("order_id", sa.String(64), primary_key=True),
        sa.Column("deleted_at", sa.BigInteger(), nullable=False),
        sqlite_with_rowid=False,
        **MYSQL,
    )


def _make_circuit_breakers() -> None:
    op.create_table(
        "circuit_breakers",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("open_until", sa.BigInteger()),
        sa.Column("probe_holder", sa.String(128)),
        sa.Column("probe_until", sa.BigInteger()),
        sa.Column("version", sa.BigInteger(), nullable=False),
        **MYSQL,
    )


def upgrade() -> None:
    """Make the tables, the triggers that guard the money, and the rows that always exist."""
    _make_orders()
    _make_order_lines()
    _make_events()
    _make_feed()
    _make_jobs()
    _make_payment_attempts()
    _make_idempotency_keys()
    _make_counters()
    _make_deleted_orders()
    _make_circuit_breakers()
    for statement in TRIGGERS[op.get_bind().dialect.name]:
        op.execute(statement)
    op.execute("INSERT INTO feed (feed_id, position) VALUES (1, 0)")
    op.execute("INSERT INTO circuit_breakers (name, failures, version) VALUES ('payment', 0, 0)")
