"""What a program must know to work on this database.

Revision ID: 0011
Revises: 0010
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
#: The oldest step that a program must know to work on a database at this one; see store/migrations.
needs = "0010"

MYSQL: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}


def upgrade() -> None:
    """From here on a program that does not know the newest steps can tell whether it may go on."""
    table = op.create_table("schema_needs", sa.Column("step", sa.String(32), primary_key=True), **MYSQL)
    op.bulk_insert(table, [{"step": needs}])
