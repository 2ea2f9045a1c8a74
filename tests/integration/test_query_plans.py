"""No statement scans a table that grows: every one is caught as it is executed, and explained.

Nothing here runs ANALYZE, and no runtime does: the plans do not depend on statistics.
"""

import inspect
import re
import sqlite3

import pytest

from understudy import Limits, Question, Retention, Runtime, ScriptedModel, ToolContext, tool
from understudy.actors.models.scripted import Call
from understudy.store import changes, claims, journal
from understudy.store.reads import Reads

GROWING = ("session", "claim", "message", "part", "inbox", "ask", "journal", "restart", "tombstone")

# Walks in the order of an index: as long as what is open, what is kept back, or what is wanted.
WALKS = {
    "message": {"message_open"},
    "part": {"part_open"},
    "inbox": {"inbox_open"},
    "ask": {"ask_open"},
    "restart": {"restart_quarantined"},
    "session": {"session_listed", "session_updated", "session_created"},
}

# Statements that may read a whole table: not on any path that a session waits for.
WHOLE = {
    "SELECT count(*) FROM session": "asked for by people, of one table's smallest index",
    "DELETE FROM tombstone WHERE deleted_ms < ?": "upkeep, now and then",
}


class Recording(sqlite3.Connection):
    """Remembers the text of every statement, with its placeholders."""

    seen: set[str]

    def execute(self, sql, *args):
        self.seen.add(sql)
        return super().execute(sql, *args)

    def executemany(self, sql, *args):
        self.seen.add(sql)
        return super().executemany(sql, *args)


@pytest.fixture
def statements(monkeypatch):
    """The text of every statement executed from here on."""
    seen = set()
    factory = type("Recorder", (Recording,), {"seen": seen})
    connect = sqlite3.connect

    def recorded(*args, **options):
        return connect(*args, **{**options, "factory": factory})

    monkeypatch.setattr(sqlite3, "connect", recorded)
    return seen


@pytest.fixture
def used(monkeypatch):
    """The names of the queries that were called."""
    called = set()
    for name, query in list(vars(Reads).items()):
        if name.startswith("_") or not inspect.isfunction(query):
            continue

        def counted(self, *args, _name=name, _query=query, **options):
            called.add(_name)
            return _query(self, *args, **options)

        monkeypatch.setattr(Reads, name, counted)
    return called


@tool
def ask_me(context: ToolContext) -> str:
    """Ask."""
    return str(context.question([Question(text="Which?")]))


def play(path):
    """Something of everything that a runtime does to its store."""
    model = ScriptedModel([[Call("ask_me")], "Well."], repeat=True)
    with Runtime(path, model=model, tools=[ask_me], limits=Limits(model_attempts=1)) as runtime:
        parent = runtime.create_session(title="parent", directory="/a")
        child = runtime.create_session(parent_id=parent.id)
        events = runtime.events()
        for session in (parent, child):
            turn = session.prompt("Hello", message_id=f"msg_{session.id}")
            ask = next(e.data.info for e in events if e.type == "question.asked")
            assert len(runtime.asks()) == len(session.asks()) == 1
            runtime.reply(ask.id, answers=[["this"]])
            turn.result(timeout_s=10)
        last = parent.messages()[-1]
        assert parent.messages(limit=1, before=last.id)
        parent.compact().result(timeout_s=10)
        parent.revert(last.id)
        parent.unrevert()
        parent.update(title="other")
        parent.fork().archive()
        listings(runtime)
        runtime.engine.store.run(
            lambda tx: claims.put_restart(tx, claims.RestartRecord(child.id, reason="x"))
        )
        runtime.engine.store.run(
            lambda tx: tx.connection.execute(changes._FORGIVE, (child.id,)).rowcount
        )
        runtime.engine.orphans.wake()
        runtime.engine.store.trim_journal(Retention(events=1))
        runtime.engine.store.run(lambda tx: journal.trim_tombstones(tx, older_than_ms=0))
        runtime.engine.registry.passivate(0.0)
        runtime.engine.store.release([(child.id, 1)])
        runtime.engine.tracker.sweep()
        queries(runtime.engine.store.read, child.id)
        parent.delete()


def listings(runtime):
    for order in ("updated", "created"):
        for options in (
            {},
            {"archived": None, "internal": None},
            {"archived": True},
            {"internal": True},
            {"roots": True},
            {"directory": "/a"},
            {"search": "par"},
        ):
            runtime.sessions(order=order, **options)


def queries(read, session_id):
    """Every query that nothing else of this module comes by."""
    message = read.messages(session_id)[-1][0].id
    read.session_count()
    read.children(session_id)
    read.is_unfinished(session_id)
    read.runtimes()
    read.owner(session_id)
    read.claims([session_id])
    read.message(session_id, message)
    read.turn(session_id, 1)
    read.marker(session_id, message)
    read.tool_parts(session_id, ("write",))
    read.prompts(session_id)
    read.accepted_after(session_id, f"msg_{session_id}")
    read.ask(session_id, "per_x")
    read.unfinished([session_id])
    read.orphans([session_id])
    read.events(after=0, upto=9, limit=3)
    read.events(after=0, session_id=session_id)
    read.events(after=0, session_id=session_id, upto=9)
    read.quarantined()
    read.restarts(session_id)
    if hasattr(read, "snapshot"):
        read.snapshot(session_id, limit=3)


def plan(connection, sql):
    marks = max([sql.count("?"), *map(int, re.findall(r"\?(\d+)", sql))])
    values = () if "?1" not in sql else (None,) * int(max(re.findall(r"\?(\d+)", sql)))
    values = values or (None,) * marks
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]


def problems(connection, sql):
    """The steps of a statement's plan that read more than they need."""
    found = []
    for step in plan(connection, sql):
        for table in GROWING:
            scanned = re.match(rf"SCAN {table}\b", step)
            index = re.search(r"INDEX (\w+)", step)
            if scanned and (index is None or index[1] not in WALKS.get(table, ())):
                found.append(step)
    return found


def explainable(statements):
    words = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")
    return sorted(sql for sql in statements if sql.split(None, 1)[0].upper() in words)


def test_no_statement_scans_a_table_that_grows(tmp_path, statements, used):
    play(tmp_path / "a.db")
    connection = sqlite3.connect(tmp_path / "a.db")
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    assert not tables & {"sqlite_stat1", "sqlite_stat4"}, "nobody ran ANALYZE"

    every = {name for name in vars(Reads) if not name.startswith("_")} - {"close", "connection"}
    assert every - used == set(), "each query is looked at"
    checked = explainable(statements)
    assert len(checked) > 50
    found = {sql: bad for sql in checked if sql not in WHOLE and (bad := problems(connection, sql))}
    assert found == {}


def test_a_page_of_sessions_is_not_sorted(tmp_path, statements, used):
    play(tmp_path / "a.db")
    connection = sqlite3.connect(tmp_path / "a.db")
    pages = [sql for sql in explainable(statements) if "FROM session" in sql and "LIMIT" in sql]
    assert len(pages) >= 12
    sorting = [
        sql
        for sql in pages
        if any("TEMP B-TREE" in step for step in plan(connection, sql))
        and not ("directory" in sql and "created_ms DESC" in sql)
    ]
    assert sorting == []


def test_the_journal_of_a_session_is_read_from_its_cursor_on(tmp_path, statements, used):
    play(tmp_path / "a.db")
    connection = sqlite3.connect(tmp_path / "a.db")
    queries = [
        sql
        for sql in explainable(statements)
        if "FROM journal WHERE cursor > ?" in sql and "session_id = ?" in sql
    ]
    assert queries
    for sql in queries:
        assert re.search(
            r"journal_session \(session_id=\? AND (rowid|cursor)>\?", str(plan(connection, sql))
        )


def test_a_scan_would_be_found(tmp_path, statements, used):
    play(tmp_path / "a.db")
    connection = sqlite3.connect(tmp_path / "a.db")
    for sql in (
        "SELECT * FROM message WHERE role = 'user'",
        "SELECT * FROM part WHERE kind = ?",
        "UPDATE inbox SET open = 0 WHERE data = ?",
        "SELECT 1 FROM journal WHERE time_ms < ?",
    ):
        assert problems(connection, sql), sql
