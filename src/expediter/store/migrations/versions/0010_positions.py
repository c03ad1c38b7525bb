"""On PostgreSQL nobody waits for the feed: positions come from a sequence, and readers know which are settled.

Revision ID: 0010
Revises: 0009
"""

from alembic import op

revision = "0010"
down_revision = "0009"

#: A transaction that takes numbers first says so: it locks the number that the sequence is at, together with
#: others, until it has ended. Its own are higher. So below the lowest such lock nothing can still appear.
#: The key of the lock: 15 bits that say which sequence, 48 bits for the number.
HOLD = """
CREATE FUNCTION feed_position_hold() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    reached bigint;
BEGIN
    SELECT last_value INTO reached FROM feed_position;
    PERFORM pg_advisory_xact_lock_shared(('feed_position'::regclass::oid::bigint % 32767 + 1) << 48 | reached);
    RETURN reached;
END $$
"""
#: The order counts: who takes a number after the first look gets a higher one, who took one before it and has
#: not ended is seen by the second.
SETTLED = """
CREATE FUNCTION feed_position_settled() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    reached bigint;
    held bigint;
BEGIN
    SELECT last_value INTO reached FROM feed_position;
    SELECT min((classid::bigint << 32 | objid::bigint) & 281474976710655) INTO held FROM pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND classid::bigint >> 16 = 'feed_position'::regclass::oid::bigint % 32767 + 1;
    RETURN least(reached, held);
END $$
"""


def upgrade() -> None:
    """Go on from where the feed is. A program of before does not find that there any more, and stops."""
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute("CREATE SEQUENCE feed_position MINVALUE 0")
    op.execute("SELECT setval('feed_position', position) FROM feed")
    op.drop_column("feed", "position")
    op.execute(HOLD)
    op.execute(SETTLED)
