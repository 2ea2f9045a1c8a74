"""The store: everything durable, behind one door.

Writes are jobs of one writer thread and answer by callback, in that thread; reads are short
queries on a small pool. The store knows sessions and their rows, and nothing of actors.
"""

from __future__ import annotations

import functools
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from understudy.errors import CommandTimeout, StoreError
from understudy.store import claims, damage, journal
from understudy.store.changes import Change, Transaction
from understudy.store.database import (
    Durability,
    check_path,
    guard,
    prepare,
    room_bytes,
    translated,
)
from understudy.store.events import AnyFact, Event
from understudy.store.lanes import MakeLane, ThreadLane, wait_released
from understudy.store.lease import LEASE_S, Lease
from understudy.store.reads import Reads
from understudy.store.records import Session
from understudy.store.writer import Done, FaultHook, Job, Writer

if TYPE_CHECKING:
    from peewee import SqliteDatabase

logger = logging.getLogger("understudy.store")

T = TypeVar("T")

SOUND_SQLITE: Final = (3, 51, 3)

TOMBSTONES_KEPT_MS = 30 * 24 * 3600 * 1000  # far longer than any writer can be late


class Store:
    """One database file, opened by one runtime.

    Args:
        path: the file; made if it is not there.
        runtime_id: who claims sessions through this store.
        wall_ms: the wall clock, in milliseconds.
        published: called in the writer's thread after each commit, with its events in order.
        durability: "full" survives power loss; "normal" survives a killed process.
        lease_s: how long this runtime is believed alive without a renewal.
        fault: a test hook, see ``Writer``.
        lane: where the writer runs.

    Raises (from ``open``):
        StoreUnreadable, StoreTooNew, StoreBusy, StoreFull.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        runtime_id: str,
        wall_ms: Callable[[], int],
        published: Callable[[list[Event]], None],
        durability: Durability = "full",
        lease_s: float = LEASE_S,
        fault: FaultHook | None = None,
        lane: MakeLane = ThreadLane,
    ) -> None:
        self.path = check_path(path)
        self.runtime_id = runtime_id
        self.lease = Lease(self.path, runtime_id, lease_s=lease_s)
        self._wall_ms = wall_ms
        self._published = published
        self._durability: Durability = durability
        self._fault = fault
        self._lane = lane
        self._database: SqliteDatabase | None = None
        self._writer: Writer | None = None
        self._reads: Reads | None = None

    def open(self) -> None:
        self._database = prepare(self.path, durability=self._durability)
        try:
            with translated(self.path):
                self.lease.hold()
                self.lease.sweep()
            self._reads = Reads(self.path, durability=self._durability)
            self._writer = Writer(
                self._database,
                published=self._published,
                room_bytes=functools.partial(room_bytes, self.path),
                in_place=guard(self.path),
                fault=self._fault,
                lane=self._lane,
            )
            self.lease.extend(self.run(lambda tx: self.lease.register(tx, now_ms=self._wall_ms())))
            if sqlite3.sqlite_version_info < SOUND_SQLITE and self.run(self.lease.is_shared):
                logger.warning(
                    "SQLite %s can damage a file that several processes write, as they do %s: "
                    "3.51.3 and newer cannot",
                    sqlite3.sqlite_version,
                    self.path,
                )
        except BaseException:
            self.close(timeout_s=1.0)
            raise

    def close(self, *, timeout_s: float = 10.0) -> bool:
        """Commit what was submitted, let go of every claim, close. False if time ran out."""
        until_s = time.monotonic() + timeout_s
        stopped = at_rest = True
        if self._writer is not None:
            self.submit(self._let_go, _ignore)
            stopped = self._writer.close(timeout_s)
        if self._reads is not None:
            at_rest = self._reads.close(timeout_s=max(0.0, until_s - time.monotonic()))
        if stopped and self._database is not None:
            self._database.close()
        self.lease.let_go()
        return stopped and at_rest

    def _let_go(self, tx: Transaction) -> tuple[None, list[Event]]:
        claims.release_all(tx, owner=self.runtime_id)
        return None, []

    @property
    def read(self) -> Reads:
        if self._reads is None:
            raise StoreError("The store is not open")
        return self._reads

    # --- writes --------------------------------------------------------------------------------

    def commit(
        self, change: Change, done: Done, *, applied: Callable[[], None] | None = None
    ) -> None:
        """Commit a change; ``done(None, events, error)`` tells how it went.

        The error is ``SessionFenced`` when somebody else owns the session by now. ``applied`` is
        called after the commit and before its events are published.
        """
        self._submit(Job(done, change=change, applied=applied))

    def submit(
        self,
        work: Callable[[Transaction], tuple[Any, list[Event]]],
        done: Done,
        *,
        clean: bool = False,
    ) -> None:
        """Run other work inside the next transaction; it fails alone. ``clean``: see ``Job``."""
        self._submit(Job(done, work=work, clean=clean))

    def between_commits(self, callback: Callable[[], None]) -> None:
        """Call back in the writer's lane: never between a commit and the news of it."""

        def done(_: None, _events: list[Event], error: BaseException | None) -> None:
            if error is None:
                callback()

        self._submit(Job(done))

    def run(self, work: Callable[[Transaction], T], *, timeout_s: float = 30.0) -> T:
        """``submit`` and wait. Not for the writer's own thread."""
        finished = threading.Lock()
        finished.acquire()
        outcome: list[Any] = []

        def done(result: Any, _: Sequence[Event], error: BaseException | None) -> None:
            outcome.extend((result, error))
            finished.release()

        self.submit(lambda tx: (work(tx), []), done)
        if not wait_released(finished, timeout_s):
            raise CommandTimeout("The store did not answer in time", timeout_s=timeout_s)
        result, error = outcome
        if error is not None:
            raise error
        value: T = result
        return value

    def _submit(self, job: Job) -> None:
        if self._writer is None:
            raise StoreError("The store is not open")
        self._writer.submit(job)

    # --- claims --------------------------------------------------------------------------------

    def alive(self, tx: Transaction, runtime_id: str) -> bool:
        return self.lease.alive(tx, runtime_id, now_ms=self._wall_ms())

    def create(self, info: Session, facts: tuple[AnyFact, ...], done: Done) -> None:
        """Create and claim a session; the result is ``Claimed``."""
        self.submit(
            functools.partial(
                claims.create,
                owner=self.runtime_id,
                info=info,
                facts=facts,
                time_ms=self._wall_ms(),
            ),
            done,
            clean=True,
        )

    def acquire(self, session_id: str, done: Done) -> None:
        """Claim a session; the result is ``(Claimed, RestartRecord | None)``."""

        def work(tx: Transaction) -> tuple[Any, list[Event]]:
            claimed = claims.acquire(
                tx,
                session_id=session_id,
                owner=self.runtime_id,
                alive=functools.partial(self.alive, tx),
            )
            return (claimed, claims.restart_record(tx, session_id)), []

        self.submit(work, done, clean=True)

    def settle_orphans(
        self, settled: Sequence[tuple[claims.Orphan, tuple[AnyFact, ...]]], done: Done
    ) -> None:
        """Write what makes sessions whole that nobody holds; the result: ids of those that moved.

        All of them or, when the store cannot write, none.
        """

        def work(tx: Transaction) -> tuple[list[str], list[Event]]:
            return claims.settle_orphans(
                tx,
                settled=settled,
                time_ms=self._wall_ms(),
                alive=functools.partial(self.alive, tx),
            )

        self.submit(work, done)

    def release(self, held: Sequence[tuple[str, int]]) -> None:
        """Let go of sessions by ``(session_id, epoch)``."""

        def work(tx: Transaction) -> tuple[None, list[Event]]:
            claims.release(tx, owner=self.runtime_id, held=held)
            return None, []

        self.submit(work, _ignore)

    def delete_tree(self, session_id: str, epoch: int | None, done: Done) -> None:
        """Delete a session and its descendants; the result is their ids."""

        def work(tx: Transaction) -> tuple[Any, list[Event]]:
            return claims.delete_tree(
                tx,
                session_id=session_id,
                owner=self.runtime_id,
                epoch=epoch,
                alive=functools.partial(self.alive, tx),
                now_ms=self._wall_ms(),
            )

        self.submit(work, done)

    def record_crash(
        self,
        session_id: str,
        *,
        reason: str,
        culprit: str | None,
        quarantine_at: int,
        done: Done,
    ) -> None:
        """Count a crash durably; the result is its ``RestartRecord``."""
        self.submit(
            functools.partial(
                claims.record_crash,
                session_id=session_id,
                owner=self.runtime_id,
                reason=reason,
                culprit=culprit,
                quarantine_at=quarantine_at,
                now_ms=self._wall_ms(),
            ),
            done,
        )

    def lift_quarantine(self, session_id: str, facts: tuple[AnyFact, ...], done: Done) -> None:
        self.submit(
            functools.partial(
                claims.lift_quarantine,
                session_id=session_id,
                facts=facts,
                now_ms=self._wall_ms(),
            ),
            done,
        )

    def give_up_damaged(self, session_id: str) -> None:
        """Keep unreadable rows from holding a session up; see ``damage``."""

        def work(tx: Transaction) -> tuple[int, list[Event]]:
            return damage.give_up_damaged(tx, session_id), []

        self.submit(work, _ignore)

    # --- upkeep --------------------------------------------------------------------------------

    def renew_lease(self, renewed: Callable[[], None]) -> None:
        """Renew it; ``renewed`` is called afterwards, in the writer's thread."""

        def work(tx: Transaction) -> tuple[int, list[Event]]:
            return self.lease.renew(tx, now_ms=self._wall_ms()), []

        def done(until_ms: int, _events: list[Event], error: BaseException | None) -> None:
            if error is None:
                self.lease.extend(until_ms)
                renewed()

        self.submit(work, done)

    def trim_journal(self, retention: journal.Retention) -> None:
        """Trim to retention, piece by piece, between other work."""

        def work(tx: Transaction) -> tuple[bool, list[Event]]:
            now_ms = self._wall_ms()
            journal.trim_tombstones(tx, older_than_ms=now_ms - TOMBSTONES_KEPT_MS)
            return journal.trim(tx, retention=retention, now_ms=now_ms), []

        def done(more: Any, _: list[Event], error: BaseException | None) -> None:
            if error is None and more:
                self.submit(work, done)

        self.submit(work, done)


def _ignore(_result: Any, _events: list[Event], _error: BaseException | None) -> None:
    """For jobs nobody waits for; the writer has logged what matters."""
