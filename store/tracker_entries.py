"""What the tracker keeps over a restart, and the seam through which it does.

An entry's expiry is a wall-clock time, because nothing else means anything to the next process.
``as_of_ms`` is the wall clock at the moment the expiry was computed: ``expires_at_ms - as_of_ms``
is what the entry had left when it was saved, and it never gets more than that after a load.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

import msgspec


class ClaimEntry(msgspec.Struct, frozen=True, kw_only=True, tag="claim"):
    """An outside integration (``owner``) works with the session ``key``."""

    key: str
    owner: str
    ttl_s: float
    expires_at_ms: int = 0
    as_of_ms: int = 0


class BypassEntry(msgspec.Struct, frozen=True, kw_only=True, tag="bypass"):
    """The hooks of the session ``key`` are no-ops.

    ``owner`` is whose claim made the key known; another owner does not inherit such a bypass.
    None: the bypass belongs to the session itself, whoever claims it.
    """

    key: str
    owner: str | None
    ttl_s: float
    expires_at_ms: int = 0
    as_of_ms: int = 0


TrackerEntry: TypeAlias = ClaimEntry | BypassEntry


class TrackerStore(Protocol):
    """Where the tracker's entries survive. A key has at most one claim and one bypass.

    ``load`` is called once, by the constructor. ``save`` and ``remove`` are called by one thread at
    a time and return when the change is durable: the tracker answers its caller after that, so a
    bypass is on disk before the first prompt goes out. If one raises (a ``StoreError``), the
    tracker's caller gets the error; a failed ``save`` changes nothing in memory either. They must
    not call back into the tracker, nor wait for a thread that does.

    Never called on the way of a hook of a bypassed session, except to release its claim when it
    ends.
    """

    def load(self) -> Iterable[TrackerEntry]:
        """Every entry, expired ones included; in any order."""
        ...

    def save(self, entries: Sequence[TrackerEntry]) -> None:
        """Insert or replace by kind and key, all in one transaction."""
        ...

    def remove(self, entries: Sequence[TrackerEntry]) -> None:
        """Delete by kind and key the rows that expire no later than the entry given.

        A row with a later ``expires_at_ms`` was refreshed by another process since: leave it. An
        absent row is no error. All in one transaction.
        """
        ...


class MemoryTrackerStore:
    """Entries in a dictionary: for tests, and to hand from one tracker to the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[tuple[type[TrackerEntry], str], TrackerEntry] = {}

    def load(self) -> list[TrackerEntry]:
        with self._lock:
            return list(self._rows.values())

    def save(self, entries: Sequence[TrackerEntry]) -> None:
        with self._lock:
            self._rows.update({(type(entry), entry.key): entry for entry in entries})

    def remove(self, entries: Sequence[TrackerEntry]) -> None:
        with self._lock:
            for entry in entries:
                row = self._rows.get((type(entry), entry.key))
                if row is not None and row.expires_at_ms <= entry.expires_at_ms:
                    del self._rows[type(entry), entry.key]
