"""The database's incarnation, by which queued commands are told that were accepted before it was cleared.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Begin with 0: everything that waits in a queue now was accepted for this database."""
    table = op.create_table(
        "incarnation",
        sa.Column("incarnation_id", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        mysql_engine="InnoDB",
    )
    op.bulk_insert(table, [{"incarnation_id": 1, "number": 0}])
