"""What a program must know to work on this database.

Revision ID: 0012
Revises: 0011
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
#: The oldest step that a program must know to work on a database at this one; see store/migrations.
needs = "0010"

MYSQL: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}


def upgrade() -> None:
    """From here on a program that does not know the newest steps can tell whether it may go on."""
    table = op.create_table("schema_needs", sa.Column("step", sa.String(32), primary_key=True), **MYSQL)
    dialect = op.get_bind().dialect
    if dialect.name in ("mysql", "mariadb"):
        # As step 0005 did with the tables that were there then: a blank at the end counts.
        collation = "utf8mb4_nopad_bin" if getattr(dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
        op.execute(f"ALTER TABLE schema_needs CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")
    op.bulk_insert(table, [{"step": needs}])
