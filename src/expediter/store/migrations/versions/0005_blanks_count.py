"""On MariaDB and MySQL a blank at the end of a text counts, as it does on the other databases.

Revision ID: 0005
Revises: 0004
"""

from alembic import op

revision = "0005"
down_revision = "0004"

TABLES = (
    "orders",
    "order_lines",
    "events",
    "feed",
    "cache_standing",
    "incarnation",
    "jobs",
    "payment_attempts",
    "idempotency_keys",
    "counters",
    "deleted_orders",
    "circuit_breakers",
)


def upgrade() -> None:
    """Give every table a collation that compares whole texts, byte by byte. Tables with text are written anew."""
    dialect = op.get_bind().dialect
    if dialect.name not in ("mysql", "mariadb"):
        return
    collation = "utf8mb4_nopad_bin" if getattr(dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")
