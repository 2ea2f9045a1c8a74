"""Repairing a database: what cannot be read is moved aside, what is unfinished is recovered.

Nothing is thrown away: rows go to ``FILE.damaged-<time>.jsonl``, one JSON object a line with the
table, the reason and the columns (bytes in base64), which is on disk before the rows are changed.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec

from understudy import Runtime
from understudy.errors import StoreBusy
from understudy.gateway.diagnosis import DamagedRow, damaged_rows, dead_locks, live_runtimes
from understudy.gateway.fold import Tables, fold
from understudy.gateway.rows import events_of
from understudy.store.database import check_existing, legible, prepare, translated
from understudy.store.events import SessionDeleted, SessionUpdated
from understudy.store.reads import Reads
from understudy.store.records import Session, SessionTime

_NO_SESSION: Final = "NOT EXISTS (SELECT 1 FROM session s WHERE s.id = t.session_id)"
_NO_MESSAGE: Final = (
    "NOT EXISTS (SELECT 1 FROM message m WHERE m.session_id = t.session_id AND m.id = t.message_id)"
)
_ORPHANS: Final = {  # messages before their parts
    "message": _NO_SESSION,
    "part": _NO_MESSAGE,
    "inbox": _NO_SESSION,
    "ask": _NO_SESSION,
}


class Repair(msgspec.Struct, kw_only=True):
    """What was done. ``aside`` is the file with the rows as they were, or empty."""

    restored: int = 0
    removed: int = 0
    recovered: int = 0
    locks: int = 0
    aside: str = ""


def repair(path: Path) -> Repair:
    """Repair what can be. Raises ``StoreBusy`` while a runtime has the database open."""
    file = check_existing(path)
    with closing(Reads(file, readonly=True)) as reads:
        live = live_runtimes(reads, file)
    if live:
        raise StoreBusy(f"Runtime {live[0]} has {file} open: close it first", path=str(file))
    done = Repair()
    database = prepare(file)
    try:
        with translated(file):
            connection = database.connection()
            connection.text_factory = legible
            _mend(connection, file, done)
    finally:
        database.close()
    for lock in dead_locks(file):
        lock.unlink(missing_ok=True)
        done.locks += 1
    runtime = Runtime(file, model="scripted")
    # Not the app's model, nor its tools: what waits for the next start is the app's to answer.
    runtime.engine.rules = msgspec.structs.replace(runtime.engine.rules, rest=True)
    with runtime:
        done.recovered = len(runtime.recovered)
    return done


def _mend(c: sqlite3.Connection, path: Path, done: Repair) -> None:
    """Move rows aside and put back what is known of them, all or nothing."""
    c.execute("BEGIN IMMEDIATE")
    try:
        damaged = damaged_rows(c)
        _set_aside(path, damaged, "damaged", done)
        for row in damaged:
            if row.table != "journal":
                _restore(c, row, done)
        events = [row for row in damaged if row.table == "journal"]
        for session_id in {row.session_id for row in events}:
            last = max(row.columns["seq"] for row in events if row.session_id == session_id)
            # A gap would stay for ever; a journal that begins later is what retention leaves, too.
            rows = _rows(c, "journal", "t.session_id = ? AND t.seq <= ?", (session_id, last))
            _remove(c, path, rows, "before a damaged event", done)
        if events:
            _keep_cursor(c, max(events, key=lambda row: row.columns["cursor"]))
        for table, condition in _ORPHANS.items():
            _remove(c, path, _rows(c, table, condition), "orphan", done)
        c.execute("COMMIT")
    except BaseException:
        c.execute("ROLLBACK")
        raise


def _restore(c: sqlite3.Connection, row: DamagedRow, done: Repair) -> None:
    """Put a record back as its events say, a session also as its columns say; or remove the row."""
    record: Any = _told(c, row.session_id).get(row.table, {}).get(row.key)
    if record is None and row.table == "session":
        record = _session_of(row.columns)
    if record is None:
        c.execute(f"DELETE FROM {row.table} WHERE rowid = ?", (row.rowid,))  # noqa: S608 - constants
        done.removed += 1
    else:
        data = msgspec.json.encode(record)
        c.execute(f"UPDATE {row.table} SET data = ? WHERE rowid = ?", (data, row.rowid))  # noqa: S608
        done.restored += 1


def _keep_cursor(c: sqlite3.Connection, event: DamagedRow) -> None:
    """Say what is so in place of the journal's newest row, if that was damaged.

    Its cursors would be given again, and whoever has read up to them would miss as many events.
    """
    (newest,) = c.execute("SELECT coalesce(max(cursor), 0) FROM journal").fetchone()
    if newest >= event.columns["cursor"]:
        return
    found = c.execute("SELECT data FROM session WHERE id = ?", (event.session_id,)).fetchone()
    fact: SessionUpdated | SessionDeleted
    if found is not None:
        info = msgspec.json.decode(found[0], type=Session)
        fact = SessionUpdated(session_id=event.session_id, info=info)
    else:
        at_ms = event.columns["time_ms"]
        time_of = SessionTime(created=at_ms, updated=at_ms)
        info = Session(id=event.session_id, title="", time=time_of)
        fact = SessionDeleted(session_id=event.session_id, info=info)
    values = {**event.columns, "type": fact.type, "data": msgspec.json.encode(fact), "size": 1}
    names = ", ".join(values)
    c.execute(
        f"INSERT INTO journal ({names}) VALUES ({', '.join('?' * len(values))})",  # noqa: S608
        tuple(values.values()),
    )


def _session_of(columns: dict[str, Any]) -> Session:
    return Session(
        id=columns["id"],
        title=columns["title"],
        directory=columns["directory"],
        parent_id=columns["parent_id"],
        internal=bool(columns["internal"]),
        time=SessionTime(
            created=columns["created_ms"],
            updated=columns["updated_ms"],
            archived=columns["archived_ms"],
        ),
    )


def _told(c: sqlite3.Connection, session_id: str) -> Tables:
    """What the journal says of a session, if it reaches back to the beginning; else nothing."""
    rows = c.execute(
        "SELECT seq, cursor, type, data, size FROM journal WHERE session_id = ? ORDER BY seq",
        (session_id,),
    ).fetchall()
    events = []
    for row in rows:
        for _, _, kind, fact in events_of(*row):
            if fact is None:
                return {}
            events.append((kind, fact))
    return fold(events) if events and events[0][0] == "session.created" else {}


def _rows(
    c: sqlite3.Connection, table: str, condition: str, values: Sequence[Any] = ()
) -> list[DamagedRow]:
    cursor = c.execute(f"SELECT t.rowid, t.* FROM {table} t WHERE {condition}", values)  # noqa: S608
    names = [column[0] for column in cursor.description]
    return [
        DamagedRow(table, found[0], "", "", dict(zip(names[1:], found[1:], strict=True)))
        for found in cursor
    ]


def _remove(
    c: sqlite3.Connection, path: Path, rows: Sequence[DamagedRow], why: str, done: Repair
) -> None:
    _set_aside(path, rows, why, done)
    for row in rows:
        c.execute(f"DELETE FROM {row.table} WHERE rowid = ?", (row.rowid,))  # noqa: S608 - constants
    done.removed += len(rows)


def _set_aside(path: Path, rows: Sequence[DamagedRow], why: str, done: Repair) -> None:
    """Write rows to the file beside the database, and wait until they are on disk."""
    if not rows:
        return
    if not done.aside:
        stamp = time.strftime("%Y%m%dT%H%M%S")
        done.aside = str(path.with_name(f"{path.name}.damaged-{stamp}.jsonl"))
    lines = [{"table": row.table, "why": why, "columns": row.columns} for row in rows]
    with Path(done.aside).open("ab") as file:
        file.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
