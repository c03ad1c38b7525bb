"""Webhooks: who is told of events, and what could not be delivered yet.

Revision ID: 0009
Revises: 0008
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

MYSQL: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}


def _compare_whole_texts(table: str) -> None:
    """Give a new table of MariaDB or MySQL the collation that step 0005 gave the others."""
    dialect = op.get_bind().dialect
    if dialect.name in ("mysql", "mariadb"):
        collation = "utf8mb4_nopad_bin" if getattr(dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
        op.execute(f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")


def upgrade() -> None:
    """Nobody is told of anything yet."""
    op.create_table(
        "webhook_endpoints",
        sa.Column("endpoint_id", sa.String(40), primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("types", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("status", sa.String(8), nullable=False),
        sa.Column("secret", sa.String(128), nullable=False),
        sa.Column("old_secret", sa.String(128)),
        sa.Column("old_secret_until", sa.BigInteger),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("last_success_at", sa.BigInteger),
        sa.Column("last_error", sa.Text),
        sa.Column("failing_since", sa.BigInteger),
        sa.Column("wait_until", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.String(128)),
        sa.Column("lease_until", sa.BigInteger, nullable=False),
        sa.Column("fence", sa.BigInteger, nullable=False),
        **MYSQL,
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("endpoint_id", sa.String(40), primary_key=True),
        sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("notice_id", sa.String(40), nullable=False),
        sa.Column("order_id", sa.String(64), nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("status", sa.String(12), nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("first_tried_at", sa.BigInteger),
        sa.Column("last_tried_at", sa.BigInteger),
        sa.Column("next_try_at", sa.BigInteger),
        sa.Column("answer_status", sa.Integer),
        sa.Column("answer", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("took_ms", sa.Integer),
        **MYSQL,
    )
    op.create_index("webhook_deliveries_by_status", "webhook_deliveries", ["endpoint_id", "status", "position"])
    op.create_index("webhook_deliveries_by_order", "webhook_deliveries", ["order_id"])
    for table in ("webhook_endpoints", "webhook_deliveries"):
        _compare_whole_texts(table)
