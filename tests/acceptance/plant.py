"""Rows planted and read with plain sqlite3: states that only a crash, or another program, leaves.

The tables (see ``store/schema.py``); ``data`` holds the record as JSON:

    session  id, parent_id, title, directory, created_ms, updated_ms, archived_ms, internal, data
    claim    session_id, owner (a runtime, or NULL), epoch (the fence), seq (of the last event)
    message  session_id, id, turn, seq, role, open (assistant without time.completed), data
    part     session_id, id, message_id, seq, kind, open (no result, no end, live marker), data
    inbox    session_id, message_id, seq, open (no outcome yet), data
    ask      session_id, id, seq, open (nobody replied), data
    journal  cursor, session_id, seq, time_ms, type, data, size: the events of a change in a row,
             with a space or a line break between; cursor and seq are those of the last
    restart  session_id, total, consecutive, …, quarantined_ms
    tombstone  session_id, epoch, seq, deleted_ms

Plant only while no runtime has the file open.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from understudy.gateway.rows import events_of
from understudy.store.changes import is_open
from understudy.store.records import (
    AnyPart,
    AssistantMessage,
    MessageTime,
    Span,
    Tokens,
    ToolPart,
    ToolPending,
    ToolRunning,
)

LONG_AGO_MS = 1_700_000_000_000
SESSION_TABLES = ("message", "part", "inbox", "ask", "claim", "restart")


def copy_store(source: Path, target: Path) -> Path:
    """A copy of a database that nobody has open, with its log as a crash left it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for file in source.parent.glob(f"{source.name}*"):
        shutil.copy(file, target.with_name(file.name.replace(source.name, target.name, 1)))
    return target


def query(path: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path, timeout=10)) as connection:
        return connection.execute(sql, values).fetchall()


def write(path: Path, sql: str, *values: Any) -> None:
    with closing(sqlite3.connect(path, timeout=10)) as connection, connection:
        connection.execute(sql, values)


def table(path: Path, name: str) -> list[tuple[Any, ...]]:
    """Every row of a table, in order: two snapshots are equal when nothing was written."""
    return sorted(query(path, f"SELECT * FROM {name}"), key=repr)


def snapshot(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    names = ("session", "message", "part", "inbox", "ask", "journal", "restart", "tombstone")
    return {name: table(path, name) for name in names}


def events(path: Path, session_id: str | None = None) -> list[tuple[int, int, str]]:
    """The journal's events in order, of one session or of all: (cursor, seq, type)."""
    sql = "SELECT seq, cursor, type, data, size, session_id FROM journal ORDER BY cursor"
    return [
        (cursor, seq, kind)
        for *row, owner in query(path, sql)
        if session_id in (None, owner)
        for seq, cursor, kind, _ in events_of(*row)
    ]


def records(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """The records of ``message`` or ``part`` by id, as plain JSON values."""
    return {
        row[0]: msgspec.json.decode(row[1]) for row in query(path, f"SELECT id, data FROM {name}")
    }


def open_counts(path: Path) -> dict[str, int]:
    """How many rows are unfinished, by table."""
    return {
        name: query(path, f"SELECT count(*) FROM {name} WHERE open = 1")[0][0]
        for name in ("message", "part", "inbox", "ask")
    }


def rows_of(path: Path, session_id: str) -> dict[str, int]:
    """How many rows name a session, by table; its tombstone and the journal not counted."""
    counts = {
        name: query(path, f"SELECT count(*) FROM {name} WHERE session_id = ?", session_id)[0][0]
        for name in SESSION_TABLES
    }
    counts["session"] = query(path, "SELECT count(*) FROM session WHERE id = ?", session_id)[0][0]
    return {name: count for name, count in counts.items() if count}


# --- planting ----------------------------------------------------------------------------------


def _next_seq(path: Path, session_id: str) -> int:
    write(path, "UPDATE claim SET seq = seq + 1 WHERE session_id = ?", session_id)
    return int(query(path, "SELECT seq FROM claim WHERE session_id = ?", session_id)[0][0])


def assistant(
    path: Path, session_id: str, message_id: str, *, turn: int, completed: bool = False
) -> AssistantMessage:
    """An assistant message of a step that began long ago, by default never completed."""
    message = AssistantMessage(
        id=message_id,
        session_id=session_id,
        parent_id="msg_elsewhere",
        turn=turn,
        time=MessageTime(created=LONG_AGO_MS, completed=LONG_AGO_MS + 5 if completed else None),
        tokens=Tokens(),
        agent="build",
        mode="build",
        provider_id="scripted",
        model_id="scripted",
        finish="tool-calls",
    )
    write(
        path,
        "INSERT INTO message (session_id, id, turn, seq, role, open, data) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        session_id,
        message_id,
        turn,
        _next_seq(path, session_id),
        "assistant",
        not completed,
        msgspec.json.encode(message),
    )
    return message


def part(path: Path, part: AnyPart) -> None:
    write(
        path,
        "INSERT INTO part (session_id, id, message_id, seq, kind, open, data) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        part.session_id,
        part.id,
        part.message_id,
        _next_seq(path, part.session_id),
        part.__struct_config__.tag,
        is_open(part),
        msgspec.json.encode(part),
    )


def call(path: Path, session_id: str, message_id: str, part_id: str, *, running: bool) -> ToolPart:
    """A tool call without a result: running, or pending (it never started)."""
    state: ToolPending | ToolRunning = ToolPending(input={"n": 1})
    if running:
        state = ToolRunning(input={"n": 1}, time=Span(start=LONG_AGO_MS + 1))
    planted = ToolPart(
        id=part_id,
        session_id=session_id,
        message_id=message_id,
        tool="block",
        call_id=f"call_{part_id}",
        state=state,
    )
    part(path, planted)
    return planted
