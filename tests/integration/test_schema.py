"""The models say what the migration makes: columns, keys and indexes."""

import sqlite3

from peewee import SqliteDatabase

from understudy.store import schema
from understudy.store.database import prepare


def shape(path):
    """Every table's columns and every index's columns, order and condition."""
    connection = sqlite3.connect(path)
    tables = {}
    for table in schema.MODELS:
        name = table._meta.table_name
        columns = connection.execute(f"PRAGMA table_info({name})").fetchall()
        tables[name] = sorted((c[1], c[2], bool(c[3]), bool(c[5])) for c in columns)
    indexes = {}
    for name, sql in connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL "
        "AND tbl_name != 'schema_migration'"
    ):
        keys = [row[2:4] for row in connection.execute(f"PRAGMA index_xinfo({name})") if row[5]]
        condition = sql.upper().replace('"', "").partition(" WHERE ")[2].strip("() ")
        indexes[name] = (keys, condition)
    return tables, indexes


def test_the_migration_makes_what_the_models_say(tmp_path):
    prepare(tmp_path / "migrated.db").close()
    database = SqliteDatabase(tmp_path / "modelled.db")
    with database.bind_ctx(schema.MODELS):
        database.create_tables(schema.MODELS)
    database.close()
    migrated, modelled = shape(tmp_path / "migrated.db"), shape(tmp_path / "modelled.db")
    assert migrated[1] == modelled[1]
    assert migrated[0].keys() == modelled[0].keys()
    for table, columns in migrated[0].items():
        # peewee says BIGINT and TEXT where SQLite only knows INTEGER and TEXT: names, nulls, keys.
        assert [c[0] for c in columns] == [c[0] for c in modelled[0][table]], table
