"""The tracker's entries as rows: ``TrackerStore`` over a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from understudy.store.tracker_entries import BypassEntry, ClaimEntry, TrackerEntry

if TYPE_CHECKING:
    from understudy.store.changes import Transaction
    from understudy.store.store import Store

_decode: Final = msgspec.json.Decoder(TrackerEntry).decode
_TABLES: Final = {ClaimEntry: "tracker_claim", BypassEntry: "tracker_bypass"}


class TrackerRows:
    """See ``TrackerStore``. Not for the writer's own thread, which it waits for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def load(self) -> list[TrackerEntry]:
        with self._store.read.connection() as c:
            rows = [
                data
                for table in _TABLES.values()
                for (data,) in c.execute(f"SELECT data FROM {table}").fetchall()  # noqa: S608
            ]
        return [_decode(data) for data in rows]

    def save(self, entries: Sequence[TrackerEntry]) -> None:
        def work(tx: Transaction) -> None:
            for entry in entries:
                tx.connection.execute(
                    f"INSERT OR REPLACE INTO {_TABLES[type(entry)]} "  # noqa: S608
                    "(key, expires_at_ms, data) VALUES (?, ?, ?)",
                    (entry.key, entry.expires_at_ms, msgspec.json.encode(entry)),
                )

        self._store.run(work)

    def remove(self, entries: Sequence[TrackerEntry]) -> None:
        def work(tx: Transaction) -> None:
            for entry in entries:
                tx.connection.execute(
                    f"DELETE FROM {_TABLES[type(entry)]} WHERE key = ? AND expires_at_ms <= ?",  # noqa: S608
                    (entry.key, entry.expires_at_ms),
                )

        self._store.run(work)
