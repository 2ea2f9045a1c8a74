"""The journal: a row for the events that a change made, and how much of it is kept.

``types`` names the events in order, a space between; ``data`` has a line of JSON for each, its
payload. Their numbers follow one another: ``cursor`` and ``seq`` are those of the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from understudy.store.events import AnyFact, Event, EventDamaged, EventData, decode_fact

if TYPE_CHECKING:
    from understudy.store.changes import Transaction

Row: TypeAlias = tuple[Any, ...]
"""The columns of a row, in this order."""

COLUMNS: Final = "cursor, session_id, seq, time_ms, types, data"
MOST: Final = 64
"""Events in a row: whoever reads one has all of it in memory."""

_lines: Final = msgspec.json.Encoder().encode_lines


def rows_of(
    facts: Sequence[AnyFact], *, session_id: str, cursor: int, seq: int, time_ms: int
) -> Iterator[Row]:
    """The rows of facts that come after ``cursor`` and ``seq``."""
    for start in range(0, len(facts), MOST):
        # A list: msgspec 0.22 never lets go of the iterator it takes of anything else.
        group = [*facts[start : start + MOST]]
        last = start + len(group)
        types = " ".join([fact.type for fact in group])
        # No bytes: see ``changes.blob``.
        yield cursor + last, session_id, seq + last, time_ms, types, bytearray(_lines(group))


def events_of(row: Row) -> list[Event]:
    """The events of a row; one that cannot be read is told as ``events.damaged``."""
    cursor, session_id, seq, time_ms, types, data = row
    facts = [_fact(session_id, *each) for each in parted(types, data)]
    before = len(facts) - 1
    return [
        Event(fact.type, session_id, cursor - before + n, seq - before + n, time_ms, fact)
        for n, fact in enumerate(facts)
    ]


def size(types: str) -> int:
    """How many events a row has."""
    return types.count(" ") + 1


def parted(types: str, data: Any) -> list[tuple[str, bytes]]:
    """The type and the payload of each event of a row. Damaged data gives empty payloads."""
    names = types.split(" ")
    lines = data.splitlines() if isinstance(data, bytes) else []
    return list(zip(names, lines if len(lines) == len(names) else [b""] * len(names), strict=True))


def _fact(session_id: str, event_type: str, data: bytes) -> EventData:
    try:
        return decode_fact(event_type, data)
    except (msgspec.DecodeError, KeyError):
        return EventDamaged(session_id=session_id, was=event_type)


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the journal is kept: events younger than ``age_s``, at most ``events``.

    And what is left of the change that the oldest of these belongs to.
    """

    age_s: float = 7 * 24 * 3600.0
    events: int = 1_000_000


TRIM_AT_ONCE = 5_000

# The oldest and the newest, each by itself: together they are a scan.
CURSORS: Final = (
    "SELECT coalesce((SELECT cursor - length(types) + length(replace(types, ' ', '')) "
    "FROM journal WHERE cursor = (SELECT min(cursor) FROM journal)), 0), "
    "coalesce((SELECT max(cursor) FROM journal), 0)"
)


def trim(tx: Transaction, *, retention: Retention, now_ms: int) -> bool:
    """Remove what retention no longer covers, a bounded piece at a time. The newest stay.

    Returns whether there may be more to remove: call again.
    """
    oldest, newest = tx.connection.execute(CURSORS).fetchone()
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
