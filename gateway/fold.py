"""A second reading of the journal: what the tables must hold, worked out from the events alone.

Knows the wire shapes and nothing of the store's code, so that it can contradict it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeAlias

Row: TypeAlias = dict[str, Any]
Tables: TypeAlias = dict[str, dict[str, Row]]
"""Records by table and key, as decoded JSON."""

KEYS: Final = {
    "session": "id",
    "message": "id",
    "part": "id",
    "inbox": "messageID",
    "ask": "id",
}
PUTS: Final = {
    "session.created": ("session", "info"),
    "session.updated": ("session", "info"),
    "message.updated": ("message", "info"),
    "message.part.updated": ("part", "part"),
    "prompt.accepted": ("inbox", "info"),
    "prompt.started": ("inbox", "info"),
    "prompt.settled": ("inbox", "info"),
    "permission.asked": ("ask", "info"),
    "permission.replied": ("ask", "info"),
    "question.asked": ("ask", "info"),
    "question.replied": ("ask", "info"),
}


def no_tables() -> Tables:
    return {table: {} for table in KEYS}


def fold(events: Iterable[tuple[str, Row]]) -> Tables:
    """What one session's tables hold after its events, given as (type, payload) in order."""
    tables = no_tables()
    for kind, fact in events:
        if kind in PUTS:
            table, field = PUTS[kind]
            record = fact[field]
            tables[table][record[KEYS[table]]] = record
        elif kind == "message.removed":
            gone = fact["messageID"]
            tables["message"].pop(gone, None)
            for key in [k for k, part in tables["part"].items() if part["messageID"] == gone]:
                del tables["part"][key]
        elif kind == "message.part.removed":
            tables["part"].pop(fact["partID"], None)
        elif kind == "session.deleted":
            tables = no_tables()
    return tables


def is_open(table: str, record: Row) -> bool:
    """Whether a record waits for something: an answer, a result, an end, a person."""
    if table == "message":
        return record["role"] == "assistant" and "completed" not in record["time"]
    if table in ("inbox", "ask"):
        return ("outcome" if table == "inbox" else "replied") not in record
    return table == "part" and _is_open_part(record)


def _is_open_part(part: Row) -> bool:
    if part["type"] == "tool":
        return part["state"]["status"] in ("pending", "running")
    if part["type"] == "compaction":
        return part["state"] in ("requested", "summarising")
    span = part.get("time")
    return part["type"] in ("text", "reasoning") and span is not None and "end" not in span
