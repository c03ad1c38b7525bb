"""How far the archive has taken events out of the feed.

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Say that all was archived where events are missing: nobody has a cursor into them yet."""
    op.add_column("feed", sa.Column("archived", sa.BigInteger, nullable=False, server_default="0"))
    op.execute("UPDATE feed SET archived = position WHERE position > (SELECT count(*) FROM events)")
