"""Whether what readers have cached in Redis may be believed.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Begin with a cache that may be believed."""
    table = op.create_table(
        "cache_standing",
        sa.Column("standing_id", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("suspended_until", sa.BigInteger, nullable=False),
        mysql_engine="InnoDB",
    )
    op.bulk_insert(table, [{"standing_id": 1, "number": 0, "suspended_until": 0}])
