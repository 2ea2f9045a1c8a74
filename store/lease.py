"""Leases: whether a runtime that holds claims is alive.

A runtime proves it in two ways: a row it renews (which a frozen process does not), and a lock on a
file that the operating system lets go the moment the process dies. Dead is who lost either.
"""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from understudy.store.changes import Transaction

LEASE_S: Final = 15.0
_TRIES: Final = 10
STEADY: Final = 2  # renewals in time after which others have had time for theirs


class Lease:
    """This runtime's own proof of life, and the judge of others'."""

    def __init__(self, path: Path, runtime_id: str, *, lease_s: float = LEASE_S) -> None:
        self.runtime_id = runtime_id
        self.lease_s = lease_s
        self.host = socket.gethostname()
        self._base = path
        self._file: IO[bytes] | None = None
        self.term = (
            0  # how often the lease had lapsed: a claim proved in one may be lost in the next
        )
        self._until_ms: int | None = None
        self._steady = STEADY

    def lock_path(self, runtime_id: str) -> Path:
        return self._base.with_name(f"{self._base.name}-{runtime_id}.lock")

    def hold(self) -> None:
        """Take this runtime's lock file. Released by ``let_go`` or by the process's death."""
        for _ in range(_TRIES):
            file = self.lock_path(self.runtime_id).open("wb")
            if not _try_lock(file):
                file.close()
                raise BlockingIOError(f"{file.name} is locked")
            self._file = file
            if self._is_held():
                return
            file.close()  # swept away between its making and its locking
        raise BlockingIOError(f"{self.lock_path(self.runtime_id)} does not stay")

    def sweep(self) -> None:
        """Remove the lock files of runtimes that died before or after they were on record."""
        prefix, suffix = f"{self._base.name}-", ".lock"
        for path in self._base.parent.glob(f"{glob.escape(prefix)}rtm_*{suffix}"):
            runtime_id = path.name.removeprefix(prefix).removesuffix(suffix)
            if runtime_id != self.runtime_id:
                self._locked(runtime_id)

    def let_go(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                self.lock_path(self.runtime_id).unlink()

    @property
    def _lease_ms(self) -> int:
        return int(self.lease_s * 1000)

    def lasts(self, term: int, *, now_ms: int) -> bool:
        """Whether nobody can have taken this runtime for dead since a claim held in ``term``."""
        return term == self.term and self._in_time(now_ms)

    def is_due(self, *, now_ms: int) -> bool:
        """Whether a quarter of the lease is over: until a renewal is committed, it stays due."""
        if self._until_ms is None:
            return True
        return not 0 <= now_ms - (self._until_ms - self._lease_ms) < self._lease_ms // 4

    # --- jobs of the writer --------------------------------------------------------------------

    def extend(self, until_ms: int) -> None:
        """What ``register`` or ``renew`` gave was committed."""
        if self._in_time(until_ms - self._lease_ms):
            self._steady += 1
        else:
            self._steady = 0
            self.term += 1
        self._until_ms = until_ms

    def register(self, tx: Transaction, *, now_ms: int) -> int:
        """Enter this runtime, and strike out those that died without doing so themselves.

        Gives, like ``renew``, until when the lease holds once this is committed: see ``extend``.
        """
        for (other,) in tx.connection.execute("SELECT id FROM runtime").fetchall():
            if not self.alive(tx, other, now_ms=now_ms):
                tx.connection.execute("DELETE FROM runtime WHERE id = ?", (other,))
        until_ms = now_ms + self._lease_ms
        tx.connection.execute(
            "INSERT OR REPLACE INTO runtime (id, host, pid, started_ms, until_ms) "
            "VALUES (?, ?, ?, ?, ?)",
            (self.runtime_id, self.host, os.getpid(), now_ms, until_ms),
        )
        return until_ms

    def is_shared(self, tx: Transaction) -> bool:
        """Whether another process is on record. Its runtime may have died just now."""
        others = tx.connection.execute("SELECT host, pid FROM runtime").fetchall()
        return any(other != (self.host, os.getpid()) for other in others)

    def renew(self, tx: Transaction, *, now_ms: int) -> int:
        """Extend the lease. A late renewal is as good as any: the claims' epochs are the fence."""
        until_ms = now_ms + self._lease_ms
        renewed = tx.connection.execute(
            "UPDATE runtime SET until_ms = ? WHERE id = ?",
            (until_ms, self.runtime_id),
        )
        if renewed.rowcount == 0:
            self.term += 1  # somebody took this runtime for dead
            self.register(tx, now_ms=now_ms)
        if self._file is not None and not self._is_held():
            with contextlib.suppress(OSError):  # the next renewal tries again
                self._file.close()
                self.hold()
        return until_ms

    def _in_time(self, now_ms: int) -> bool:
        """Whether this runtime's own lease holds, by the clock that others' are judged by."""
        if self._until_ms is None:
            return True
        return self._until_ms - self._lease_ms <= now_ms < self._until_ms

    def _is_held(self) -> bool:
        """Whether the lock file others look at is still the one that is locked here."""
        assert self._file is not None, "only asked while it is held"
        try:
            return os.path.samestat(
                os.fstat(self._file.fileno()), self.lock_path(self.runtime_id).stat()
            )
        except (OSError, ValueError):
            return False

    def alive(self, tx: Transaction, runtime_id: str, *, now_ms: int) -> bool:
        """Whether a runtime may still be at work."""
        if runtime_id == self.runtime_id:
            return True
        row = tx.connection.execute(
            "SELECT host, until_ms FROM runtime WHERE id = ?", (runtime_id,)
        ).fetchone()
        if row is None:
            return False
        host, until_ms = row
        # A lease from a future beyond any honest one was written by a clock that jumped.
        honest = until_ms <= now_ms + int(2 * max(LEASE_S, self.lease_s) * 1000)
        if host == self.host and not self._locked(runtime_id):
            return False
        if now_ms < until_ms and honest:
            return True
        # Who slept, or whose clock was set, finds everybody's lease as old as its own: on the same
        # machine they were asleep too, and have yet to renew.
        return host == self.host and not (self._in_time(now_ms) and self._steady >= STEADY)

    def _locked(self, runtime_id: str) -> bool:
        """Whether a process still holds the runtime's lock file."""
        path = self.lock_path(runtime_id)
        try:
            with path.open("rb+") as file:
                if not _try_lock(file):
                    return True
        except OSError:
            return False
        with contextlib.suppress(OSError):
            path.unlink()
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
