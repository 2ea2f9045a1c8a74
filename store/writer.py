"""The one writer: a lane that owns the write connection, commits and checkpoints.

Jobs that wait together share a transaction (group commit). A job that is refused fails alone; when
the transaction fails, it is rolled back and each of its jobs is tried alone.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

from understudy.errors import RuntimeClosed, StoreBusy, StoreFull, UnderstudyError
from understudy.store.changes import Change, Transaction, groups, statements
from understudy.store.database import BUSY_TIMEOUT_S, translate
from understudy.store.events import Event
from understudy.store.lanes import Lane, MakeLane, ThreadLane
from understudy.store.turnstile import OneAtATime

if TYPE_CHECKING:
    from peewee import SqliteDatabase

logger = logging.getLogger("understudy.store")

MAX_GROUP: Final = 512
CHECKPOINT_EVERY: Final = 2_000  # commits between checkpoints that truncate the log
LOG_PAGES: Final = 4_000
"""Pages of log after which a commit brings it back into the database: some 16 MB.

A page that many commits change is then brought back once; one table of the log's index holds so
many, so that readers look in one.
"""
LOG_PAGES_MIN: Final = 100
LOG_SHARE: Final = 4
"""The log takes no more than this part of the room there is.

To bring a log back may take as much room as the log has: one that has filled the disk by itself
could never be brought back, and nothing could be written again.
"""

Events: TypeAlias = list[Event]
Work: TypeAlias = Callable[[Transaction], tuple[Any, Events]]
Done: TypeAlias = Callable[[Any, Events, BaseException | None], None]
FaultHook: TypeAlias = Callable[[str], None]


class Job:
    """One thing to commit. ``done(result, events, error)`` is called afterwards, exactly once.

    ``change`` is the fast path; ``work`` is any other write, run inside a savepoint. ``clean``
    work needs none: it refuses before it has written anything, and reads no rows that a change
    may have collected. With neither, there is nothing to write. ``applied()`` is called when it is
    committed and before anybody hears of it.
    """

    __slots__ = ("applied", "change", "clean", "done", "events", "result", "work")

    def __init__(
        self,
        done: Done,
        change: Change | None = None,
        work: Work | None = None,
        applied: Callable[[], None] | None = None,
        *,
        clean: bool = False,
    ) -> None:
        self.done = done
        self.clean = clean
        self.change = change
        self.work = work
        self.applied = applied
        self.result: Any = None
        self.events: Events = []

    def apply(self, tx: Transaction, *, fenced: bool) -> None:
        if self.change is not None:
            self.events = tx.add(self.change, fenced=fenced)
            return
        if self.work is None:
            return
        if self.clean:
            self.result, self.events = self.work(tx)
            return
        tx.flush()
        tx.connection.execute("SAVEPOINT job")
        cursor = tx.cursor
        try:
            self.result, self.events = self.work(tx)
            tx.flush()
        except BaseException:
            tx.discard()
            tx.cursor = cursor
            tx.connection.execute("ROLLBACK TO job")
            tx.connection.execute("RELEASE job")
            raise
        tx.connection.execute("RELEASE job")


class Writer:
    """Commits jobs in order of submission.

    ``published(events)`` is called after each commit with its events in cursor order, before
    the jobs' own callbacks; both run in the writer's lane and must not block.
    ``room_bytes()`` is how much room the disk has, ``in_place()`` raises when the file is gone.
    ``fault(point)`` is called before "begin", "commit" and after "committed": a test hook that
    may raise or kill.
    """

    def __init__(
        self,
        database: SqliteDatabase,
        *,
        published: Callable[[Events], None],
        room_bytes: Callable[[], int],
        in_place: Callable[[], None],
        fault: FaultHook | None = None,
        lane: MakeLane = ThreadLane,
    ) -> None:
        self._connection: sqlite3.Connection = database.connection()
        self._room_bytes = room_bytes
        self._in_place = in_place
        self._page_bytes: int = database.pragma("page_size")
        self._log_pages = 0
        self._statements = statements()
        self._published = published
        self._fault = fault
        self._commits = 0
        self._lane: Lane[Job] = lane(
            "understudy-writer", self.commit, most=MAX_GROUP, ended=self._checkpoint
        )

    def submit(self, job: Job) -> None:
        """Queue a job. After close, its ``done`` gets ``RuntimeClosed`` at once."""
        if not self._lane.put(job):
            job.done(None, [], RuntimeClosed("The store is closed"))

    def close(self, timeout_s: float) -> bool:
        """Commit what was submitted, then stop. False if that took too long."""
        return self._lane.close(timeout_s)

    # --- in the lane ---------------------------------------------------------------------------

    def commit(self, jobs: Sequence[Job], *, again: bool = False) -> None:
        """Commit jobs in one transaction, and call back. ``again`` after they failed together."""
        try:
            outcome = self._attempt(jobs)
        except Exception as error:  # noqa: BLE001 - every failure is told to whoever waits
            self._recover(jobs, error, again=again)
            return
        with OneAtATime():
            self._tell(outcome)
        self._commits += 1
        if self._commits % CHECKPOINT_EVERY == 0:
            self._checkpoint()

    def _tell(self, outcome: Sequence[tuple[Job, Exception | None]]) -> None:
        """What follows a commit, in the order that callers rely on."""
        events = [event for job, failed in outcome if failed is None for event in job.events]
        self._fire("committed")
        for job, failed in outcome:
            if failed is None and job.applied is not None:
                self._call(job.applied)
        if events:
            self._call(self._published, events)
        for job, failed in outcome:
            if failed is None:
                self._call(job.done, job.result, job.events, None)
            else:
                self._call(job.done, None, [], failed)

    def _attempt(self, jobs: Sequence[Job]) -> list[tuple[Job, Exception | None]]:
        """One transaction over all jobs; refused ones are left out."""
        if all(job.change is None and job.work is None for job in jobs):
            return [(job, None) for job in jobs]
        self._in_place()
        self._bound_log()
        self._fire("begin")
        for attempt in _busy_policy():
            with attempt:
                self._connection.execute("BEGIN IMMEDIATE")
        try:
            with OneAtATime():
                outcome = self._apply(jobs)
            self._fire("commit")
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return outcome

    def _apply(self, jobs: Sequence[Job]) -> list[tuple[Job, Exception | None]]:
        outcome: list[tuple[Job, Exception | None]] = []
        tx = Transaction(self._connection, self._statements)
        for together in _groups(jobs):
            # Right before they are added: one may be refused by what the ones before it did.
            fenced = tx.fence([job.change for job in together if job.change is not None])
            for job in together:
                try:
                    job.apply(tx, fenced=fenced)
                except UnderstudyError as refusal:
                    outcome.append((job, refusal))
                else:
                    outcome.append((job, None))
        tx.flush()
        return outcome

    def _recover(self, jobs: Sequence[Job], error: Exception, *, again: bool) -> None:
        """Nothing was written. Try each job alone, so that a bad one fails alone."""
        failure = error if isinstance(error, UnderstudyError) else _as_ours(error)
        if isinstance(failure, StoreFull) and not again:
            self._checkpoint("PASSIVE")  # where the log cannot grow, it can still begin anew
        if len(jobs) == 1:
            self._call(jobs[0].done, None, [], failure)
            return
        logger.warning("A group of %d changes failed (%s); trying each alone", len(jobs), error)
        for job in jobs:
            self.commit([job], again=True)

    def _bound_log(self) -> None:
        """Say at which size the next commit brings the log back."""
        share = self._room_bytes() // (self._page_bytes * LOG_SHARE)
        pages = max(LOG_PAGES_MIN, min(share, LOG_PAGES))
        if pages != self._log_pages:
            self._connection.execute(f"PRAGMA wal_autocheckpoint = {pages}").fetchall()
            self._log_pages = pages

    def _checkpoint(self, mode: Literal["PASSIVE", "TRUNCATE"] = "TRUNCATE") -> None:
        """Bring the log back into the database and, unless ``PASSIVE``, give its room back."""
        try:
            # Never wait for a reader: what cannot be truncated now is truncated next time.
            self._connection.execute("PRAGMA busy_timeout = 0")
            self._connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        except sqlite3.Error as error:
            logger.info("Checkpoint put off: %s", error)
        finally:
            timeout_ms = int(BUSY_TIMEOUT_S * 1000)
            self._connection.execute(f"PRAGMA busy_timeout = {timeout_ms}")

    def _call(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            callback(*args)
        except Exception:
            logger.exception("A callback after a commit failed")

    def _fire(self, point: str) -> None:
        if self._fault is not None:
            self._fault(point)


def _groups(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """Jobs in order, changes apart from other work: as many as are fenced at once."""
    for _, run in groupby(jobs, key=lambda job: job.change is not None):
        yield from groups(list(run))


def _as_ours(error: Exception) -> Exception:
    if isinstance(error, sqlite3.Error | OSError):
        return translate(error)
    return error


def _busy_policy() -> Retrying:
    """Wait for another process's lock beyond SQLite's own timeout, within bounds."""
    return Retrying(
        retry=retry_if_exception(
            lambda error: (
                isinstance(error, sqlite3.OperationalError)
                and isinstance(translate(error), StoreBusy)
            )
        ),
        wait=wait_random_exponential(multiplier=0.02, max=0.5),
        stop=stop_after_delay(20.0),
        reraise=True,
    )
