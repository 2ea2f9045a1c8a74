"""The models say what the migration makes: columns, keys and indexes."""

import sqlite3
from contextlib import closing

import msgspec
import pytest
from peewee import SqliteDatabase
from playhouse.migrations import Runner

from understudy import Runtime, ScriptedModel
from understudy.store import schema
from understudy.store.database import APPLICATION_ID, MIGRATIONS, prepare
from understudy.store.reads import open_readonly

OLD_INSERT = (
    "INSERT INTO journal (cursor, session_id, seq, time_ms, type, data) VALUES (?, ?, ?, ?, ?, ?)"
)


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


def as_of(path, target, today):
    """A database of an earlier schema, with the rows of one of today's."""
    database = SqliteDatabase(path)
    Runner(database, str(MIGRATIONS)).up(target)
    database.pragma("application_id", APPLICATION_ID)
    database.pragma("user_version", int(target.partition("_")[0]))
    database.execute_sql(f"ATTACH '{today}' AS today")
    for table in schema.MODELS:
        columns = ", ".join(field.column_name for field in table._meta.sorted_fields)
        name = table._meta.table_name
        if name == "journal":
            one_event_each(database, today)
            continue
        database.execute_sql(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM today.{name}")
    database.close()
    return path


def one_event_each(database, today):
    """The journal as the first two schemas have it."""
    for event in told(today):
        database.execute_sql(
            OLD_INSERT,
            (
                event.cursor,
                event.session_id,
                event.seq,
                event.time_ms,
                event.type,
                msgspec.json.encode(event.data),
            ),
        )


def test_a_process_of_before_that_runs_on_goes_on_writing(tmp_path):
    with Runtime(tmp_path / "a.db", model=ScriptedModel("one")) as runtime:
        session = runtime.create_session()
        session.prompt("a").result(timeout_s=15)
        last = runtime.cursor
    fact = msgspec.json.encode({"sessionID": session.id})
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute(OLD_INSERT, (last + 1, session.id, 99, 1, "session.idle", fact))
    connection.close()
    events = told(tmp_path / "a.db")
    assert [event.cursor for event in events] == list(range(1, last + 2))
    assert (events[-1].type, events[-1].seq) == ("session.idle", 99)


def told(path):
    """Every event."""
    with closing(open_readonly(path)) as reads:
        return reads.events(after=0)


def rows(path):
    """Every row of every table but the journal's, by column name."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    names = [table._meta.table_name for table in schema.MODELS]
    names.remove("journal")
    found = {
        name: sorted(repr(dict(row)) for row in connection.execute(f"SELECT * FROM {name}"))
        for name in names
    }
    connection.close()
    return found


@pytest.mark.parametrize("target", ["0001_initial", "0002_time_order"])
def test_a_database_of_an_earlier_schema_keeps_every_row_and_goes_on(tmp_path, target):
    model = ScriptedModel(["one", "two"])
    with Runtime(tmp_path / "today.db", model=model) as runtime:
        session, other = runtime.create_session(), runtime.create_session()
        session.prompt("a").result(timeout_s=15)
        other.prompt("b").result(timeout_s=15)
        said = [message.text for message in session.messages()]
        kept = (session.id, other.id)
    old = as_of(tmp_path / "old.db", target, tmp_path / "today.db")
    before = rows(old)
    assert before["inbox"] and before["part"]
    prepare(old).close()
    assert rows(old) == before
    assert told(old) == told(tmp_path / "today.db") != []
    assert shape(old) == shape(tmp_path / "today.db")
    with Runtime(old, model=model) as runtime:
        session, other = (runtime.session(session_id) for session_id in kept)
        assert [message.text for message in session.messages()] == said
        assert session.prompt("c").result(timeout_s=15).text == "two"
        session.delete()
        other.delete()
    left = rows(old)
    assert not any(left[name] for name in ("session", "message", "part", "inbox", "claim"))
