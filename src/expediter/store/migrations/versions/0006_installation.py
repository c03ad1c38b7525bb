"""The prefix of gateway keys that a database is bound to.

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Bind a database that has charged to no prefix: there was none."""
    table = op.create_table(
        "installation",
        sa.Column("installation_id", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("gateway_key_prefix", sa.String(64), nullable=True),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
    )
    charged = op.get_bind().execute(sa.text("SELECT order_id FROM payment_attempts LIMIT 1")).first() is not None
    op.bulk_insert(table, [{"installation_id": 1, "gateway_key_prefix": "" if charged else None}])
