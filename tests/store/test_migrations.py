"""The database's structure: what the steps make is what the program expects, and every read has its index."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from expediter.backends.databases.sqlite import _statements
from expediter.errors import ConfigurationError
from expediter.orders.order import Status
from expediter.store import migrations
from expediter.store.lookups import _page_statement
from expediter.store.schema import metadata
from expediter.store.submissions import PageQuery


def test_the_steps_make_the_schema(folder: Path) -> None:
    """A database brought to the newest step has exactly the tables, columns and indexes of schema.py."""
    migrations.upgrade(f"sqlite:///{folder}/orders.db")
    engine = create_engine(f"sqlite:///{folder}/orders.db")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_head_is_the_newest_step() -> None:
    """The step that a start compares with is the newest one in the package."""
    script = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert script.get_current_head() == migrations.HEAD


def test_a_second_upgrade_has_nothing_to_do(folder: Path) -> None:
    """Upgrading an up-to-date database changes nothing and says so."""
    url = f"sqlite:///{folder}/orders.db"
    assert migrations.upgrade(url)
    assert not migrations.upgrade(url)


def test_a_newer_database_is_refused(folder: Path) -> None:
    """A database whose newer steps this version cannot work beside is not touched; the message says what to do."""
    url = f"sqlite:///{folder}/orders.db"
    migrations.upgrade(url)
    with closing(sqlite3.connect(folder / "orders.db")) as raw, raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
        raw.execute("UPDATE schema_needs SET step = '9998'")
    with pytest.raises(ConfigurationError, match="newer version"):
        migrations.upgrade(url)


def test_a_file_that_is_no_database_is_refused(folder: Path) -> None:
    """A file that is not SQLite is refused by name."""
    (folder / "orders.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigurationError, match=r"orders\.db"):
        migrations.upgrade(f"sqlite:///{folder}/orders.db")


PAGES = {
    "all": PageQuery(limit=50),
    "cursor": PageQuery(limit=50, after=(5, "A")),
    "status": PageQuery(limit=50, status=Status.PENDING),
    "status and cursor": PageQuery(limit=50, status=Status.PENDING, after=(5, "A")),
    "customer": PageQuery(limit=50, customer_id="c"),
    "customer and cursor": PageQuery(limit=50, customer_id="c", after=(5, "A")),
    "dates": PageQuery(limit=50, created_after=1, created_before=9),
}


@pytest.mark.parametrize("query", PAGES.values(), ids=PAGES.keys())
def test_a_page_searches_an_index_and_sorts_nothing(folder: Path, query: PageQuery) -> None:
    """Each kind of page is read in index order: no scan of the table without an index, no sort."""
    migrations.upgrade(f"sqlite:///{folder}/orders.db")
    values = {name: 1 for name in ("after_at", "after_id", "limit", "offset", *query.__struct_fields__)}
    text, arguments = _statements.bind(_page_statement(query), values)
    with closing(sqlite3.connect(folder / "orders.db")) as raw:
        plan = [row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {text}", arguments)]
    assert not [step for step in plan if "TEMP B-TREE" in step], plan
    assert all("INDEX" in step for step in plan), plan
