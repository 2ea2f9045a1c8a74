"""The journal's retention: by age and by number of events. Work of the writer's jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from understudy.store.changes import Transaction


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the journal is kept: events younger than ``age_s``, at most ``events``."""

    age_s: float = 7 * 24 * 3600.0
    events: int = 1_000_000


TRIM_AT_ONCE = 5_000

# The oldest and the newest, each by itself: together they are a scan.
CURSORS: Final = (
    "SELECT coalesce((SELECT min(cursor) FROM journal), 0), "
    "coalesce((SELECT max(cursor) FROM journal), 0)"
)


def trim(tx: Transaction, *, retention: Retention, now_ms: int) -> int:
    """Remove what retention no longer covers, a bounded piece at a time. The newest event stays.

    Returns how many were removed; call again while that is ``TRIM_AT_ONCE``.
    """
    oldest, newest = tx.connection.execute(CURSORS).fetchone()
    limit = min(oldest + TRIM_AT_ONCE, newest)
    surplus = newest - retention.events + 1
    cut = tx.connection.execute(
        "DELETE FROM journal WHERE cursor < ? AND (cursor < ? OR time_ms < ?)",
        (limit, surplus, now_ms - int(retention.age_s * 1000)),
    )
    return cut.rowcount


def trim_tombstones(tx: Transaction, *, older_than_ms: int) -> int:
    """Forget deletions that no writer of that time can still be around for."""
    return tx.connection.execute(
        "DELETE FROM tombstone WHERE deleted_ms < ?", (older_than_ms,)
    ).rowcount
