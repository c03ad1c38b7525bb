"""API keys: who may call.

Revision ID: 0011
Revises: 0010
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

MYSQL: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}


def upgrade() -> None:
    """There is no key yet, and so nobody is asked for one."""
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(40), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(255), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("revoked_at", sa.BigInteger),
        sa.Column("last_used_at", sa.BigInteger),
        **MYSQL,
    )
    op.create_index("api_keys_by_digest", "api_keys", ["digest"], unique=True)
    op.add_column("installation", sa.Column("api_keys_mark", sa.String(32), nullable=True))
    dialect = op.get_bind().dialect
    if dialect.name in ("mysql", "mariadb"):
        # As step 0005 did with the tables that were there then: a blank at the end counts.
        collation = "utf8mb4_nopad_bin" if getattr(dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
        op.execute(f"ALTER TABLE api_keys CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")
