"""The tracker's memory: claims and bypasses by key, each with its expiry, and their rows.

Expiry is monotonic in memory and wall-clock in rows. An expired lease is never handed out; the
first look at it evicts it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Generic, TypeVar

import msgspec

from understudy.actors.clock import Clock
from understudy.store.tracker_entries import BypassEntry, ClaimEntry, TrackerEntry, TrackerStore

DEFAULT_TTL_S: Final = 4 * 3600.0
MIN_TTL_S: Final = 0.001
MAX_TTL_S: Final = 365 * 86400.0

# The wall clock was set (or the machine slept) when it moved this much against the monotonic one.
_DRIFT_MS: Final = 1000

E = TypeVar("E", ClaimEntry, BypassEntry)


def sane_ttl_s(ttl_s: object, *, default_s: float = DEFAULT_TTL_S) -> float:
    """``ttl_s`` if it is a finite number of at least 1 ms (and at most a year), else the default.

    An expiry is a sum: infinity would make an entry immortal, NaN would compare as anything, and
    less than the clock can tell apart would be dead on arrival.
    """
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float):
        return default_s
    return float(min(ttl_s, MAX_TTL_S)) if MIN_TTL_S <= ttl_s < math.inf else default_s


class Lease(msgspec.Struct, Generic[E], frozen=True):
    """An entry as last saved, the expiry it has now, and the one it was saved with (monotonic)."""

    entry: E
    expires_s: float
    saved_s: float


class Counts(msgspec.Struct, frozen=True):
    """Live entries. ``claims`` is the number of active sessions; ``bypass_only`` have no claim."""

    claims: int
    bypasses: int
    bypass_only: int


class Swept(msgspec.Struct, frozen=True):
    """How many expired entries a sweep took from memory."""

    claims: int
    bypasses: int


class Leases:
    """Reads need nothing and never wait for the store; hold ``writing`` to change something.

    ``writing`` is held while the store works, the inner lock never is: that is why a bypassed hook
    waits for nobody's commit.
    """

    def __init__(self, *, store: TrackerStore | None, clock: Clock) -> None:
        self.writing = threading.Lock()
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._claims: dict[str, Lease[ClaimEntry]] = {}
        self._bypasses: dict[str, Lease[BypassEntry]] = {}
        self._gone: list[TrackerEntry] = []  # evicted; their rows go with the next sweep
        self._drift_base_ms = self._drift_ms()
        self._load()

    # --- reading -------------------------------------------------------------------------------

    def claim(self, key: str) -> Lease[ClaimEntry] | None:
        return self._live(self._claims, key)

    def bypass(self, key: str) -> Lease[BypassEntry] | None:
        return self._live(self._bypasses, key)

    def claims(self) -> Mapping[str, ClaimEntry]:
        return self._snapshot(self._claims)

    def bypasses(self) -> Mapping[str, BypassEntry]:
        return self._snapshot(self._bypasses)

    def counts(self) -> Counts:
        with self._lock:
            now_s = self._clock.monotonic_s()
            claims = {key for key, lease in self._claims.items() if now_s < lease.expires_s}
            bypasses = {key for key, lease in self._bypasses.items() if now_s < lease.expires_s}
        return Counts(len(claims), len(bypasses), len(bypasses - claims))

    # --- changing: hold ``writing`` ------------------------------------------------------------

    def lease(self, entry: E, expires_s: float) -> Lease[E]:
        """A lease whose entry says in wall-clock time what ``expires_s`` means."""
        wall_ms = self._clock.wall_ms()
        expires_at_ms = wall_ms + round((expires_s - self._clock.monotonic_s()) * 1000)
        stamped = msgspec.structs.replace(entry, expires_at_ms=expires_at_ms, as_of_ms=wall_ms)
        return Lease(stamped, expires_s, expires_s)

    def put(
        self,
        claims: Sequence[Lease[ClaimEntry]] = (),
        bypasses: Sequence[Lease[BypassEntry]] = (),
        *,
        durable: bool = True,
    ) -> None:
        """Save, then show: what others see is durable."""
        if self._store is not None and durable and (claims or bypasses):
            self._store.save([*(c.entry for c in claims), *(b.entry for b in bypasses)])
        with self._lock:
            self._claims.update((lease.entry.key, lease) for lease in claims)
            self._bypasses.update((lease.entry.key, lease) for lease in bypasses)

    def drop(
        self, claim: Lease[ClaimEntry] | None = None, bypass: Lease[BypassEntry] | None = None
    ) -> None:
        self._remove([lease.entry for lease in (claim, bypass) if lease])
        with self._lock:
            if claim:
                self._claims.pop(claim.entry.key, None)
            if bypass:
                self._bypasses.pop(bypass.entry.key, None)

    def sweep(self) -> Swept:
        """Drop what has expired, rows included; save the rest again if the wall clock was set."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            claims = list(_expire(self._claims, now_s))
            bypasses = list(_expire(self._bypasses, now_s))
            gone = [*self._gone, *claims, *bypasses] if self._store is not None else []
            # A key evicted and then used again has a new row, not to be removed.
            gone = [entry for entry in gone if entry.key not in self._table(entry)]
            self._gone = []
        try:
            self._remove(gone)
        except BaseException:
            with self._lock:
                self._gone += gone
            raise
        self._restamp()
        return Swept(len(claims), len(bypasses))

    # --- inside --------------------------------------------------------------------------------

    def _live(self, leases: dict[str, Lease[E]], key: str) -> Lease[E] | None:
        with self._lock:
            lease = leases.get(key)
            if lease is None or self._clock.monotonic_s() < lease.expires_s:
                return lease
            del leases[key]
            if self._store is not None:
                self._gone.append(lease.entry)
        return None

    def _snapshot(self, leases: dict[str, Lease[E]]) -> Mapping[str, E]:
        with self._lock:
            now_s = self._clock.monotonic_s()
            live = [lease for lease in leases.values() if now_s < lease.expires_s]
        return MappingProxyType(
            {lease.entry.key: self.lease(lease.entry, lease.expires_s).entry for lease in live}
        )

    def _table(self, entry: TrackerEntry) -> Mapping[str, object]:
        return self._claims if isinstance(entry, ClaimEntry) else self._bypasses

    def _remove(self, entries: Sequence[TrackerEntry]) -> None:
        if self._store is not None and entries:
            self._store.remove(entries)

    def _load(self) -> None:
        """Take over the stored entries, none with more time left than it had when it was saved."""
        now_s, wall_ms = self._clock.monotonic_s(), self._clock.wall_ms()
        for row in self._store.load() if self._store is not None else ():
            entry = msgspec.structs.replace(row, ttl_s=sane_ttl_s(row.ttl_s))
            left_s = (entry.expires_at_ms - max(wall_ms, entry.as_of_ms)) / 1000
            expires_s = now_s + min(left_s, MAX_TTL_S)
            if left_s <= 0:
                self._gone.append(entry)
            elif isinstance(entry, ClaimEntry):
                self._claims[entry.key] = Lease(entry, expires_s, expires_s)
            else:
                self._bypasses[entry.key] = Lease(entry, expires_s, expires_s)
            if entry.as_of_ms > wall_ms + _DRIFT_MS:
                # The clock was set back since. Unless the next sweep saves the entry again, every
                # restart would give it the same time anew.
                self._drift_base_ms = -math.inf

    def _drift_ms(self) -> float:
        return self._clock.wall_ms() - self._clock.monotonic_s() * 1000

    def _restamp(self) -> None:
        """Save everything again if the wall clock moved against the monotonic one."""
        drift_ms = self._drift_ms()
        if abs(drift_ms - self._drift_base_ms) > _DRIFT_MS:
            with self._lock:
                claims = [self.lease(c.entry, c.expires_s) for c in self._claims.values()]
                bypasses = [self.lease(b.entry, b.expires_s) for b in self._bypasses.values()]
            self.put(claims, bypasses)
            self._drift_base_ms = drift_ms


def _expire(leases: dict[str, Lease[E]], now_s: float) -> Iterator[E]:
    """Take the expired leases out, giving their entries."""
    for key in [key for key, lease in leases.items() if lease.expires_s <= now_s]:
        yield leases.pop(key).entry
