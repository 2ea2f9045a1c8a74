"""The journal: the events of a change in a row, and how much of it is kept.

``size`` is how many events a row has, ``type`` names them in order, with a space between, and
``data`` has a line of JSON for each, its payload; ``cursor`` and ``seq`` are those of the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from understudy.store.events import AnyFact, Event, EventDamaged, EventData, decode_fact

if TYPE_CHECKING:
    import sqlite3

    from understudy.store.changes import Transaction

Row: TypeAlias = tuple[Any, ...]
"""The columns of a row, in this order."""

# Texts as bytes: SQLite refuses to give one that is no UTF-8.
COLUMNS: Final = "cursor, CAST(session_id AS BLOB), seq, time_ms, CAST(type AS BLOB), data, size"
MOST: Final = 64
MOST_BYTES: Final = 256 * 1024
"""So much is in a row, unless a single event has more: who reads one event reads its row."""

_lines: Final = msgspec.json.Encoder().encode_lines


def rows_of(
    facts: Sequence[AnyFact], *, session_id: str, cursor: int, seq: int, time_ms: int
) -> Iterator[Row]:
    """The rows of facts that come after ``cursor`` and ``seq``."""
    size = len(facts)
    if size == 0:
        return
    if size <= MOST:
        # A list: msgspec 0.22 never lets go of the iterator it takes of anything else.
        data = _lines([*facts])
        if size == 1 or len(data) <= MOST_BYTES:
            types = " ".join([fact.type for fact in facts])
            # No bytes: see ``_blob`` in changes.
            yield cursor + size, session_id, seq + size, time_ms, types, bytearray(data), size
            return
    half = size // 2
    for start, group in ((0, facts[:half]), (half, facts[half:])):
        yield from rows_of(
            group, session_id=session_id, cursor=cursor + start, seq=seq + start, time_ms=time_ms
        )


def size_of(size: Any) -> int:
    """How many events a row has that says so; one if that is damaged."""
    return size if isinstance(size, int) and 0 < size <= MOST else 1


def events_of(row: Row, *, after: int = 0, upto: float = math.inf) -> list[Event]:
    """The events of a row between two cursors; one that cannot be read: ``events.damaged``."""
    last, owner, seq, time_ms, types, data, size = row
    session_id = owner.decode(errors="replace")
    parts = parted(types.decode(errors="replace"), data, size)
    events = []
    for cursor, (kind, line) in enumerate(parts, last - len(parts) + 1):
        if after < cursor <= upto:
            fact = _fact(session_id, kind, line)
            number = seq - (last - cursor)
            events.append(Event(fact.type, session_id, cursor, number, time_ms, fact))
    return events


def parted(types: Any, data: Any, size: Any) -> list[tuple[str, bytes]]:
    """The type and the payload of each event of a row; what is damaged cannot be decoded."""
    size = size_of(size)
    names = types.split(" ") if isinstance(types, str) else []
    if len(names) != size:
        names = [str(types)] * size
    if isinstance(data, str):
        data = data.encode()  # as somebody's own SQL may have put it back
    lines = [data] if size == 1 else data.splitlines() if isinstance(data, bytes) else []
    return list(zip(names, lines if len(lines) == size else [b""] * size, strict=True))


def _fact(session_id: str, event_type: str, data: Any) -> EventData:
    try:
        return decode_fact(event_type, data)
    except (ValueError, TypeError, KeyError):
        return EventDamaged(session_id=session_id, was=event_type)


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the journal is kept: events younger than ``age_s``, at most ``events``.

    And those that were stored with the oldest of these.
    """

    age_s: float = 7 * 24 * 3600.0
    events: int = 1_000_000


TRIM_AT_ONCE = 5_000

# The oldest and the newest row, each by itself: together they are a scan.
_ENDS: Final = (
    "SELECT cursor, size, (SELECT max(cursor) FROM journal) FROM journal "
    "WHERE cursor = (SELECT min(cursor) FROM journal)"
)


def cursors(c: sqlite3.Connection) -> tuple[int, int]:
    """The cursors of the oldest and the newest event; (0, 0) when there is none."""
    row = c.execute(_ENDS).fetchone()
    if row is None:
        return 0, 0
    last, size, newest = row
    return last - size_of(size) + 1, newest


def trim(tx: Transaction, *, retention: Retention, now_ms: int) -> bool:
    """Remove what retention no longer covers, a bounded piece at a time. The newest stay.

    Returns whether there may be more to remove: call again.
    """
    oldest, newest = cursors(tx.connection)
    piece = oldest + TRIM_AT_ONCE
    surplus = newest - retention.events + 1
    cut = tx.connection.execute(
        "DELETE FROM journal WHERE cursor < ? AND (cursor < ? OR time_ms < ?)",
        (min(piece, newest), surplus, now_ms - int(retention.age_s * 1000)),
    )
    return cut.rowcount > 0 and piece < newest


def trim_tombstones(tx: Transaction, *, older_than_ms: int) -> int:
    """Forget deletions that no writer of that time can still be around for."""
    return tx.connection.execute(
        "DELETE FROM tombstone WHERE deleted_ms < ?", (older_than_ms,)
    ).rowcount
