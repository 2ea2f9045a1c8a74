"""A session's rows and events as plain SQL and JSON give them, for those who check the store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from understudy.gateway.fold import KEYS, PUTS, Row, Tables, no_tables

_MANY: Final = 1_000  # events that no row has
_COLUMNS: Final = {
    "session": ("id", "id"),
    "message": ("session_id", "id"),
    "part": ("session_id", "id"),
    "inbox": ("session_id", "message_id"),
    "ask": ("session_id", "id"),
}


class Rows(msgspec.Struct):
    """One session as the database has it.

    Attributes:
        tables: readable records by table and key.
        columns: the rows they are in, and those that cannot be read.
        events: (seq, cursor, type, payload), in order; ``whole`` if all could be read.
        damaged: what could not be read, in words.
    """

    id: str
    tables: Tables = msgspec.field(default_factory=no_tables)
    columns: dict[str, dict[str, sqlite3.Row]] = msgspec.field(
        default_factory=lambda: {table: {} for table in KEYS}
    )
    events: list[tuple[int, int, str, Row]] = []
    whole: bool = True
    damaged: list[str] = []


def session_ids(c: sqlite3.Connection) -> list[str]:
    """Every session that left anything, also deleted ones."""
    ids = {row[0] for row in c.execute("SELECT id FROM session")}
    for table in ("claim", "message", "part", "inbox", "ask", "journal", "tombstone"):
        ids |= {row[0] for row in c.execute(f"SELECT DISTINCT session_id FROM {table}")}  # noqa: S608
    return sorted(ids)


def rows_of(c: sqlite3.Connection, session_id: str) -> Rows:
    rows = Rows(session_id)
    for table, (owner, key) in _COLUMNS.items():
        sql = f"SELECT * FROM {table} WHERE {owner} = ?"  # noqa: S608 - constants
        for row in c.execute(sql, (session_id,)):
            rows.columns[table][row[key]] = row
            record = decoded(row["data"])
            if record is None or record.get(KEYS[table]) != row[key]:
                rows.damaged.append(f"{table} {row[key]} cannot be read")
            else:
                rows.tables[table][row[key]] = record
    sql = "SELECT seq, cursor, type, data, size FROM journal WHERE session_id = ? ORDER BY seq"
    for row in c.execute(sql, (session_id,)):
        for seq, cursor, kind, fact in events_of(*row):
            if fact is None:
                rows.damaged.append(f"event {cursor} cannot be read")
                rows.whole = False
            else:
                rows.events.append((seq, cursor, kind, fact))
    return rows


def events_of(
    seq: int, cursor: int, types: Any, data: Any, size: int
) -> Iterator[tuple[int, int, str, Row | None]]:
    """The events in a row of the journal: (seq, cursor, type, payload), None if that is damaged."""
    count = size if isinstance(size, int) and 0 < size < _MANY else 1
    kinds = types.split(" ") if isinstance(types, str) else []
    data = data.encode() if isinstance(data, str) else data
    lines = data.splitlines() if isinstance(data, bytes) and count > 1 else [data]
    whole = len(lines) == len(kinds) == count
    for number in range(count):
        later = count - 1 - number
        kind = kinds[number] if whole else str(types)
        fact = decoded(lines[number]) if whole else None
        told = fact if fact is not None and _says(kind, fact) else None
        yield seq - later, cursor - later, kind, told


def _says(kind: str, fact: Row) -> bool:
    """Whether a payload has what events of its type are about."""
    if kind in PUTS:
        table, field = PUTS[kind]
        record = fact.get(field)
        return isinstance(record, dict) and KEYS[table] in record
    wanted = {"message.removed": "messageID", "message.part.removed": "partID"}.get(kind)
    return wanted is None or wanted in fact


def decoded(data: Any) -> Row | None:
    try:
        record = msgspec.json.decode(data)
    except (ValueError, TypeError):
        return None
    return record if isinstance(record, dict) else None
