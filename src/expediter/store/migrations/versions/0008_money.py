"""What was authorized, captured and refunded of each order; refunds; and what waits behind a job about money.

Revision ID: 0008
Revises: 0007
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

MYSQL: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}

#: In the order in which SQLite can check each column against those before it.
AMOUNTS = ("authorized_minor", "captured_minor", "refunding_minor", "refunded_minor")
CAPTURED = "captured_minor >= 0 AND captured_minor <= authorized_minor AND authorized_minor <= total_minor"
REFUNDED = "refunded_minor >= 0 AND refunding_minor >= 0 AND refunded_minor + refunding_minor <= captured_minor"

NAMES = {"captured_minor": "orders_captured_was_authorized", "refunded_minor": "orders_refunded_was_captured"}

#: What an order's payment status said by itself until now: money moved as a whole, or not at all.
FILL = (
    "UPDATE orders SET authorized_minor = total_minor, captured_minor = total_minor "
    "WHERE payment_status IN ('paid', 'refund_pending', 'refunded')",
    "UPDATE orders SET refunding_minor = total_minor, refunds = 1 WHERE payment_status = 'refund_pending'",
    "UPDATE orders SET refunded_minor = total_minor, refunds = 1 WHERE payment_status = 'refunded'",
    "INSERT INTO refunds "
    "(order_id, number, amount_minor, status, requested_at, reason, by_hand, generation, settled_at) "
    "SELECT order_id, 1, total_minor, 'succeeded', COALESCE(cancelled_at, updated_at), 'the order was cancelled', "
    "0, 1, updated_at FROM orders WHERE payment_status = 'refunded'",
    "INSERT INTO refunds "
    "(order_id, number, amount_minor, status, requested_at, reason, by_hand, generation, error) "
    "SELECT o.order_id, 1, o.total_minor, CASE WHEN j.dead_at IS NULL THEN 'pending' ELSE 'parked' END, "
    "COALESCE(o.cancelled_at, o.updated_at), 'the order was cancelled', 0, 1, o.last_error "
    "FROM orders o LEFT JOIN jobs j ON j.order_id = o.order_id WHERE o.payment_status = 'refund_pending'",
)


def _compare_whole_texts(table: str) -> None:
    """Give a new table of MariaDB or MySQL the collation that step 0005 gave the others."""
    dialect = op.get_bind().dialect
    if dialect.name in ("mysql", "mariadb"):
        collation = "utf8mb4_nopad_bin" if getattr(dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
        op.execute(f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")


def upgrade() -> None:
    op.create_table(
        "refunds",
        sa.Column("order_id", sa.String(64), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("requested_at", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("by_hand", sa.SmallInteger(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("reference", sa.String(128)),
        sa.Column("error", sa.Text()),
        sa.Column("settled_at", sa.BigInteger()),
        sa.CheckConstraint("amount_minor > 0", name="refunds_amount_positive"),
        sqlite_with_rowid=False,
        **MYSQL,
    )
    _compare_whole_texts("refunds")
    sqlite = op.get_bind().dialect.name == "sqlite"
    checks = {"captured_minor": CAPTURED, "refunded_minor": REFUNDED} if sqlite else {}
    for name in AMOUNTS:
        if name in checks:
            # SQLite takes a check only together with its column.
            check = f"CONSTRAINT {NAMES[name]} CHECK ({checks[name]})"
            op.execute(f"ALTER TABLE orders ADD COLUMN {name} BIGINT NOT NULL DEFAULT 0 {check}")
        else:
            op.add_column("orders", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("orders", sa.Column("refunds", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("orders", sa.Column("payment_action", sa.Text()))
    op.add_column("orders", sa.Column("action_expires_at", sa.BigInteger()))
    op.add_column("jobs", sa.Column("then_kind", sa.String(16)))
    op.add_column("jobs", sa.Column("then_due_at", sa.BigInteger()))
    for statement in FILL:
        op.execute(statement)
    if not sqlite:
        op.create_check_constraint("orders_captured_was_authorized", "orders", CAPTURED)
        op.create_check_constraint("orders_refunded_was_captured", "orders", REFUNDED)
