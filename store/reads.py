"""Reads: short queries on a small pool of read-only connections."""

from __future__ import annotations

import bisect
import logging
import math
import os
import queue
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

import msgspec
import peewee

from understudy.errors import InvalidInput, RuntimeClosed, StoreError
from understudy.store import journal
from understudy.store.claims import Orphan
from understudy.store.database import Durability, check_existing, connect, translate
from understudy.store.events import Event
from understudy.store.records import (
    Ask,
    CompactionPart,
    Pair,
    Prompt,
    Session,
    ToolPart,
)
from understudy.store.rows import asks as ask_rows
from understudy.store.rows import parts as part_rows
from understudy.store.rows import prompts as prompt_rows
from understudy.store.rows import sessions as session_rows
from understudy.store.schema import QUEUED
from understudy.store.transcripts import history_start, transcript, with_parts
from understudy.store.turnstile import OneAtATime
from understudy.store.unfinished import Unfinished, unfinished

if TYPE_CHECKING:
    from pathlib import Path

    from peewee import SqliteDatabase

logger = logging.getLogger("understudy.store")

T = TypeVar("T")
Order: TypeAlias = Literal["updated", "created"]


_READERS: Final = 4
_ABOVE: Final = """
    WITH RECURSIVE above (id) AS (
        SELECT parent_id FROM session WHERE id = ? AND parent_id IS NOT NULL
        UNION SELECT s.parent_id FROM above JOIN session s ON s.id = above.id
        WHERE s.parent_id IS NOT NULL
    ) SELECT count(*) FROM above
"""
_UNFINISHED: Final = """
    SELECT session_id FROM message WHERE open = 1
    UNION SELECT session_id FROM part WHERE open = 1
    UNION SELECT session_id FROM inbox INDEXED BY inbox_open WHERE open = 1
    UNION SELECT session_id FROM ask WHERE open = 1
"""
_ORPHANS: Final = """
    SELECT c.session_id, c.owner, c.epoch, c.seq, s.data FROM json_each(?) j
    CROSS JOIN claim c ON c.session_id = j.value JOIN session s ON s.id = c.session_id
    WHERE NOT EXISTS (
        SELECT 1 FROM restart r WHERE r.session_id = c.session_id AND r.consecutive > 0
    )
"""


def open_readonly(path: str | os.PathLike[str]) -> Reads:
    """The queries of a database that is there, without opening a store. Close it when done.

    Safe beside a live runtime. Raises ``StoreUnreadable``, ``StoreTooNew``, ``InvalidInput``.
    """
    return Reads(check_existing(path), readonly=True)


class _Reader(OneAtATime):
    """One snapshot for all statements of a block.

    A delete that commits in between must not leave a message without its parts. A class, because a
    generator takes several times as long and this is around every read.
    """

    __slots__ = ("_connection", "_database", "_reads")

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def __enter__(self) -> sqlite3.Connection:
        super().__enter__()
        try:
            self._database = self._reads.take()
            try:
                connection: sqlite3.Connection = self._database.connection()
                connection.execute("BEGIN")
            except BaseException:
                try:
                    self._database.close()  # one that was interrupted may be in its transaction
                finally:
                    self._reads.give_back(self._database)
                raise
        except BaseException as error:
            super().__exit__(None, None, None)
            if (ours := self._reads.translated(error)) is not None:
                raise ours from error
            raise
        self._connection = connection
        return connection

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                # Whoever keeps the error keeps its frames, and their cursors this snapshot open.
                self._database.close()
            else:
                self._connection.rollback()
        finally:
            try:
                self._reads.give_back(self._database)
            finally:
                super().__exit__(None, None, None)
        if (ours := self._reads.translated(error)) is not None:
            raise ours from error


class Reads:
    """Every query of the store. Safe from any thread.

    ``readonly`` looks at a file that may be somebody else's without a trace.
    """

    def __init__(
        self, path: Path, *, durability: Durability = "full", readonly: bool = False
    ) -> None:
        self._path = path
        self._durability: Durability = durability
        self._readonly = readonly
        self._idle: deque[SqliteDatabase] = deque()
        self._slots: queue.SimpleQueue[bool] = queue.SimpleQueue()
        for _ in range(_READERS):
            self._slots.put(True)
        self._closed = False

    def connection(self) -> AbstractContextManager[sqlite3.Connection]:
        """A reader of its own for a moment; a read transaction never outlives the block."""
        return _Reader(self)

    def take(self) -> SqliteDatabase:
        """For ``_Reader``: an idle connection, or a new one."""
        self._slots.get()
        try:
            if self._closed:
                raise RuntimeClosed("The store is closed")
            with suppress(IndexError):
                return self._idle.pop()
            return connect(
                self._path, durability=self._durability, reader=True, readonly=self._readonly
            )
        except BaseException:
            self._slots.put(True)
            raise

    def give_back(self, database: SqliteDatabase) -> None:
        try:
            self._idle.append(database)
            if self._closed:  # the close did not wait any longer
                self._close_idle()
        finally:
            self._slots.put(True)

    def translated(self, error: BaseException | None) -> StoreError | None:
        """The error of ours for one of the database's."""
        if isinstance(error, sqlite3.Error | peewee.PeeweeException | OSError):
            return translate(error, self._path)
        return None

    def close(self, *, timeout_s: float = 10.0) -> bool:
        """Close every reader. False if one is in use for longer: that is closed when it is done."""
        until_s = time.monotonic() + timeout_s
        try:
            for _ in range(_READERS):
                self._slots.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            all_done = False
        else:
            all_done = True
        self._closed = True
        self._close_idle()
        for _ in range(_READERS):  # also those never given back: who waits for one is refused
            self._slots.put(True)
        return all_done

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    # --- sessions ------------------------------------------------------------------------------

    def session(self, session_id: str) -> Session | None:
        with self.connection() as c:
            row = c.execute("SELECT data FROM session WHERE id = ?", (session_id,)).fetchone()
        return session_rows.record(row[0], session_id) if row else None

    def sessions(
        self,
        *,
        parent_id: str | None = None,
        roots: bool = False,
        directory: str | None = None,
        search: str | None = None,
        archived: bool | None = False,
        internal: bool | None = False,
        order: Order = "updated",
        limit: int | None = 100,
        offset: int = 0,
    ) -> list[Session]:
        """Sessions, newest first. ``archived`` and ``internal``: None means either."""
        where: list[str] = []
        values: list[Any] = []
        if parent_id is not None:
            where.append("parent_id = ?")
            values.append(parent_id)
        if roots:
            where.append("parent_id IS NULL")
        if directory is not None:
            where.append("directory = ?")
            values.append(directory)
        if search:
            where.append("instr(lower(title), lower(?)) > 0")
            values.append(search)
        if archived is not None:
            where.append(f"archived_ms IS {'NOT ' if archived else ''}NULL")
        if internal is not None:
            where.append(f"internal = {int(internal)}")  # written out: a partial index knows it
        if order not in ("updated", "created"):
            raise InvalidInput(f"order is 'updated' or 'created', not {order!r}", field="order")
        sql = "SELECT data FROM session"
        if where:
            sql += f" WHERE {' AND '.join(where)}"
        by = "updated_ms DESC, id" if order == "updated" else "created_ms DESC, id"
        sql += f" ORDER BY {by} LIMIT ? OFFSET ?"
        values += [-1 if limit is None else limit, offset]
        with self.connection() as c:
            rows = c.execute(sql, values).fetchall()
        return session_rows.decoded(rows)

    def session_count(self) -> int:
        with self.connection() as c:
            return int(c.execute("SELECT count(*) FROM session").fetchone()[0])

    def children(self, session_id: str) -> list[str]:
        with self.connection() as c:
            rows = c.execute("SELECT id FROM session WHERE parent_id = ?", (session_id,))
            return [row[0] for row in rows]

    def depth(self, session_id: str) -> int:
        """How many sessions are above one: its parent, that one's parent, and so on."""
        with self.connection() as c:
            return int(c.execute(_ABOVE, (session_id,)).fetchone()[0])

    def unfinished_sessions(self) -> list[tuple[str, str | None]]:
        """Sessions with anything open, and who claims them."""
        with self.connection() as c:
            return c.execute(
                f"SELECT u.session_id, c.owner FROM ({_UNFINISHED}) u "  # noqa: S608 - a constant
                "JOIN claim c ON c.session_id = u.session_id"
            ).fetchall()

    def is_unfinished(self, session_id: str) -> bool:
        sql = " UNION ALL ".join(
            f"SELECT 1 FROM {table} WHERE open = 1 AND session_id = ?1"  # noqa: S608 - constants
            for table in ("message", "part", "inbox")
        )
        with self.connection() as c:
            return c.execute(f"{sql} LIMIT 1", (session_id,)).fetchone() is not None

    def runtimes(self) -> list[tuple[str, str, int, int]]:
        """Every runtime that has the store open: id, host, pid, lease end in milliseconds."""
        with self.connection() as c:
            return c.execute("SELECT id, host, pid, until_ms FROM runtime").fetchall()

    def claims(self, session_ids: Sequence[str]) -> dict[str, tuple[str | None, int]]:
        """Who claims each of these sessions, and at which epoch."""
        with self.connection() as c:
            rows = c.execute(
                "SELECT c.session_id, c.owner, c.epoch FROM json_each(?) j "
                "JOIN claim c ON c.session_id = j.value",
                (msgspec.json.encode(session_ids).decode(),),
            ).fetchall()
        return {session_id: (owner, epoch) for session_id, owner, epoch in rows}

    def owner(self, session_id: str) -> str | None:
        with self.connection() as c:
            row = c.execute(
                "SELECT owner FROM claim WHERE session_id = ?", (session_id,)
            ).fetchone()
        return row[0] if row else None

    # --- messages ------------------------------------------------------------------------------

    def messages(
        self, session_id: str, *, limit: int | None = None, before: str | None = None
    ) -> list[Pair]:
        """Messages with their parts in transcript order: the newest ``limit`` before a message."""
        with self.connection() as c:
            return transcript(c, session_id, limit=limit, before=before)

    def snapshot(self, session_id: str, *, limit: int | None) -> tuple[list[Pair], int]:
        """The transcript and the cursor it is as of, in one read transaction."""
        with self.connection() as c:
            pairs = transcript(c, session_id, limit=limit, before=None)
            cursor = c.execute("SELECT coalesce(max(cursor), 0) FROM journal").fetchone()[0]
        return pairs, cursor

    def message(self, session_id: str, message_id: str) -> Pair | None:
        with self.connection() as c:
            rows = c.execute(
                "SELECT id, data FROM message WHERE session_id = ? AND id = ?",
                (session_id, message_id),
            ).fetchall()
            pairs = with_parts(c, session_id, rows)
        return pairs[0] if pairs else None

    def turn(self, session_id: str, turn: int) -> list[Pair]:
        """The messages of one turn, in order."""
        with self.connection() as c:
            rows = c.execute(
                "SELECT id, data FROM message WHERE session_id = ? AND turn = ? ORDER BY seq",
                (session_id, turn),
            ).fetchall()
            return with_parts(c, session_id, rows)

    def tool_parts(self, session_id: str, names: Sequence[str]) -> list[ToolPart]:
        """A session's calls of these tools, in the order they were made."""
        with self.connection() as c:
            rows = c.execute(
                "SELECT data FROM part WHERE session_id = ? AND kind = 'tool' ORDER BY seq",
                (session_id,),
            ).fetchall()
        wanted = [b'"tool":"%s"' % name.encode() for name in names]
        rows = [row for row in rows if any(each in row[0] for each in wanted)]
        found = part_rows.decoded(rows)
        return [part for part in found if isinstance(part, ToolPart) and part.tool in names]

    def marker(self, session_id: str, marker_id: str) -> CompactionPart | None:
        """The compaction part of a marker message."""
        pair = self.message(session_id, marker_id)
        for part in pair[1] if pair is not None else ():
            if isinstance(part, CompactionPart):
                return part
        return None

    def history(self, session_id: str) -> list[Pair]:
        """What the model's context can be built from: back to the last compaction's tail."""
        with self.connection() as c:
            start = history_start(c, session_id)
            rows = c.execute(
                "SELECT id, data FROM message WHERE session_id = ? AND turn < ? "
                "AND (turn, seq) >= (?, ?) ORDER BY turn, seq",
                (session_id, QUEUED, *start),
            ).fetchall()
            return with_parts(c, session_id, rows)

    def positions(self, session_id: str, message_id: str) -> tuple[str, ...] | None:
        """The ids of a message and of all that follow it in the transcript, or None."""
        with self.connection() as c:
            row = c.execute(
                "SELECT turn, seq FROM message WHERE session_id = ? AND id = ?",
                (session_id, message_id),
            ).fetchone()
            if row is None:
                return None
            rows = c.execute(
                "SELECT id FROM message WHERE session_id = ? AND (turn, seq) >= (?, ?) "
                "ORDER BY turn, seq",
                (session_id, *row),
            ).fetchall()
        return tuple(row[0] for row in rows)

    # --- prompts and asks ----------------------------------------------------------------------

    def prompt(self, session_id: str, message_id: str) -> tuple[Prompt | None, bool]:
        """The inbox row with this message id, and whether a message has that id at all."""
        with self.connection() as c:
            key = (session_id, message_id)
            row = c.execute(
                "SELECT data FROM inbox WHERE session_id = ? AND message_id = ?", key
            ).fetchone()
            taken = c.execute("SELECT 1 FROM message WHERE session_id = ? AND id = ?", key)
            prompt = prompt_rows.record(row[0], message_id) if row else None
            return (prompt, taken.fetchone() is not None)

    def prompts(self, session_id: str) -> list[Prompt]:
        """Every prompt a session ever accepted, oldest first."""
        with self.connection() as c:
            rows = c.execute(
                "SELECT data FROM inbox WHERE session_id = ? ORDER BY seq", (session_id,)
            ).fetchall()
        return prompt_rows.decoded(rows)

    def accepted_after(self, session_id: str, message_id: str) -> int:
        """The cursor before a prompt's first event; 0 when the journal does not know it."""
        with self.connection() as c:
            row = c.execute(
                "SELECT coalesce(m.seq, i.seq) FROM inbox i LEFT JOIN message m "
                "ON m.session_id = i.session_id AND m.id = i.message_id "
                "WHERE i.session_id = ? AND i.message_id = ?",
                (session_id, message_id),
            ).fetchone()
            return cursor_before(c, session_id, row[0]) if row else 0

    def ask(self, session_id: str, ask_id: str) -> Ask | None:
        with self.connection() as c:
            row = c.execute(
                "SELECT data FROM ask WHERE session_id = ? AND id = ?", (session_id, ask_id)
            ).fetchone()
        return ask_rows.record(row[0], ask_id) if row else None

    def find_ask(self, ask_id: str) -> Ask | None:
        """A request by its id alone, open or closed."""
        with self.connection() as c:
            row = c.execute("SELECT data FROM ask WHERE id = ?", (ask_id,)).fetchone()
        return ask_rows.record(row[0], ask_id) if row else None

    def asks(self, session_id: str | None = None) -> list[Ask]:
        """Open requests, oldest first."""
        sql = "SELECT data FROM ask WHERE open = 1"
        values: tuple[str, ...] = ()
        if session_id is not None:
            sql += " AND session_id = ?"
            values = (session_id,)
        with self.connection() as c:
            rows = c.execute(sql + " ORDER BY session_id, seq", values).fetchall()
        return sorted(ask_rows.decoded(rows), key=lambda ask: ask.created)

    # --- recovery ------------------------------------------------------------------------------

    def unfinished(self, session_ids: Sequence[str]) -> dict[str, Unfinished]:
        """What recovery needs of each session. It costs what is open, not what the history is."""
        with self.connection() as c:
            return unfinished(c, session_ids)

    def orphans(self, session_ids: Sequence[str]) -> list[Orphan]:
        """Those of these sessions that can be read and have not crashed, with their claims."""
        with self.connection() as c:
            rows = c.execute(_ORPHANS, (msgspec.json.encode(session_ids).decode(),)).fetchall()
        infos = session_rows.by_session(rows)
        return [
            Orphan(info, owner, epoch, seq)
            for session_id, owner, epoch, seq, _ in rows
            for info in infos[session_id]
        ]

    # --- journal -------------------------------------------------------------------------------

    def events(
        self,
        *,
        after: int,
        limit: int = 1000,
        session_id: str | None = None,
        upto: int | None = None,
    ) -> list[Event]:
        """Events with a cursor above ``after``, in order."""
        sql = f"SELECT {journal.COLUMNS} FROM journal WHERE cursor > ?"  # noqa: S608 - constants
        values: list[Any] = [after]
        if session_id is not None:
            sql += " AND session_id = ?"
            values.append(session_id)
        last = math.inf if upto is None else upto
        rows: list[journal.Row] = []
        wanted = limit
        with self.connection() as c:
            for row in c.execute(f"{sql} ORDER BY cursor LIMIT ?", (*values, limit)):
                rows.append(row)
                wanted -= min(journal.size_of(row[-1]), row[0] - after)
                if wanted <= 0 or row[0] >= last:
                    break
        if wanted < 0:
            last = min(last, rows[-1][0] + wanted)
        found: list[Event] = []
        for row in rows:
            found += journal.events_of(row, after=after, upto=last)
            after = row[0]
        return found

    def cursors(self) -> tuple[int, int]:
        """The oldest and the newest cursor of the journal; (0, 0) when it is empty."""
        with self.connection() as c:
            return journal.cursors(c)

    # --- supervision ---------------------------------------------------------------------------

    def quarantined(self) -> dict[str, str]:
        """Quarantined sessions and why."""
        with self.connection() as c:
            rows = c.execute(
                "SELECT session_id, reason FROM restart WHERE quarantined_ms IS NOT NULL"
            ).fetchall()
        return dict(rows)

    def restarts(self, session_id: str) -> tuple[Any, ...] | None:
        """The supervisor's memory of a session as a row; see ``claims.RestartRecord``."""
        with self.connection() as c:
            row: tuple[Any, ...] | None = c.execute(
                "SELECT session_id, total, consecutive, last_ms, reason, culprit, culprit_count, "
                "quarantined_ms FROM restart WHERE session_id = ?",
                (session_id,),
            ).fetchone()
        return row


def cursor_before(c: sqlite3.Connection, session_id: str, seq: int) -> int:
    """The cursor before a session's event; 0 when the journal does not have it.

    A session's events are in the order of both numbers, so it is found by halving: an index by
    ``seq`` would cost every change more than this costs the few who ask.
    """

    def row_at(cursor: int) -> tuple[int, int]:
        row = c.execute(
            "SELECT seq, size FROM journal WHERE session_id = ? AND cursor <= ? "
            "ORDER BY cursor DESC LIMIT 1",
            (session_id, cursor),
        ).fetchone()
        return (row[0], journal.size_of(row[1])) if row else (-1, 0)

    oldest, newest = journal.cursors(c)
    cursors = range(newest + 1)
    place = bisect.bisect_left(cursors, seq, lo=oldest, key=lambda at: row_at(at)[0])
    last, size = row_at(place)
    is_here = place <= newest and last - size < seq
    return place - 1 - (last - seq) if is_here else 0
