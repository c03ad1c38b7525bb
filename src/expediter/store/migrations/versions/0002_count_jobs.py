"""Counters of the jobs, and of the parked ones among them.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Count the jobs that are there; from now on each change of one counts itself.

    Processes of the version before this step do not, so they have to be stopped first.
    """
    op.execute("INSERT INTO counters (name, slot, value) SELECT 'jobs', 0, count(*) FROM jobs HAVING count(*) > 0")
    op.execute(
        "INSERT INTO counters (name, slot, value) "
        "SELECT 'jobs:dead', 0, count(dead_at) FROM jobs HAVING count(dead_at) > 0"
    )
