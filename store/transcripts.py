"""Transcripts: the messages of one session with their parts, in order."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from understudy.store.records import AnyPart, CompactionPart, Pair, summary_text
from understudy.store.rows import messages as message_rows
from understudy.store.rows import parts as part_rows
from understudy.store.schema import QUEUED


def transcript(
    c: sqlite3.Connection, session_id: str, *, limit: int | None, before: str | None
) -> list[Pair]:
    bound = (QUEUED + 1, 0)
    if before is not None:
        row = c.execute(
            "SELECT turn, seq FROM message WHERE session_id = ? AND id = ?",
            (session_id, before),
        ).fetchone()
        bound = row or bound
    rows = c.execute(
        "SELECT id, data FROM message WHERE session_id = ? AND (turn, seq) < (?, ?) "
        "ORDER BY turn DESC, seq DESC LIMIT ?",
        (session_id, *bound, -1 if limit is None else limit),
    ).fetchall()
    rows.reverse()
    return with_parts(c, session_id, rows)


def with_parts(
    c: sqlite3.Connection, session_id: str, rows: Sequence[tuple[str, bytes]]
) -> list[Pair]:
    """Messages of one session with their parts."""
    parts: dict[str, list[AnyPart]] = {row[0]: [] for row in rows}
    if len(rows) == 1:
        found = c.execute(
            "SELECT message_id, data FROM part WHERE session_id = ? AND message_id = ? "
            "ORDER BY seq",
            (session_id, rows[0][0]),
        )
    else:
        found = c.execute(
            "SELECT p.message_id, p.data FROM json_each(?) m "
            "JOIN part p ON p.session_id = ? AND p.message_id = m.value ORDER BY m.key, p.seq",
            (msgspec.json.encode([row[0] for row in rows]).decode(), session_id),
        )
    for part in part_rows.decoded(found.fetchall()):
        parts.setdefault(part.message_id, []).append(part)
    return [(message, tuple(parts.get(message.id, ()))) for message in message_rows.decoded(rows)]


def history_start(c: sqlite3.Connection, session_id: str) -> tuple[int, int]:
    """The transcript position from which context is built: the last compaction and its tail.

    Either may come first: steps can finish between the request of a compaction and its summary.
    A compaction whose summary was edited out or reverted is none: what it stood for is shown.
    """

    def place(message_id: str | None) -> tuple[int, int] | None:
        row: tuple[int, int] | None = c.execute(
            "SELECT turn, seq FROM message WHERE session_id = ? AND id = ?",
            (session_id, message_id),
        ).fetchone()
        return row

    rows = c.execute(
        "SELECT data FROM part WHERE session_id = ? AND kind = 'compaction' "
        "ORDER BY seq DESC LIMIT 20",
        (session_id,),
    ).fetchall()
    for part in part_rows.decoded(rows):
        if isinstance(part, CompactionPart) and _stands(c, part):
            tail = place(part.tail_start_id) or place(part.head_end_id)
            places = [each for each in (tail, place(part.message_id)) if each is not None]
            if places:
                return min(places)
    return 0, 0


def _stands(c: sqlite3.Connection, marker: CompactionPart) -> bool:
    if marker.state != "committed":
        return False
    rows = c.execute(
        "SELECT id, data FROM message WHERE session_id = ? AND id = ?",
        (marker.session_id, marker.summary_id),
    ).fetchall()
    return any(summary_text(*pair) for pair in with_parts(c, marker.session_id, rows))
