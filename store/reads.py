"""Reads: short queries on a small pool of read-only connections.

Hot queries read tuples; a row that cannot be decoded is reported and left out, so that one bad
row does not hide its session.
"""

from __future__ import annotations

import logging
import os
import queue
import sqlite3
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeAlias, TypeVar

import msgspec
import peewee

from understudy.errors import InvalidInput, RuntimeClosed, StoreError, StoreUnreadable
from understudy.store.claims import Orphan
from understudy.store.database import Durability, check_existing, connect, translate
from understudy.store.events import Event, read_event
from understudy.store.records import (
    AnyPart,
    Ask,
    AssistantMessage,
    CompactionPart,
    Message,
    Prompt,
    Session,
    ToolPart,
    UserMessage,
)
from understudy.store.schema import QUEUED

if TYPE_CHECKING:
    from pathlib import Path

    from peewee import SqliteDatabase

logger = logging.getLogger("understudy.store")

T = TypeVar("T")
Pair: TypeAlias = tuple[Message, tuple[AnyPart, ...]]
Order: TypeAlias = Literal["updated", "created"]


class _Kind(Generic[T]):
    """Rows of one kind to records: all in one go, or one by one when any of them is damaged."""

    def __init__(self, name: str, record: Any) -> None:
        self._name = name
        self.decode: Callable[[bytes], T] = msgspec.json.Decoder(record).decode
        self._decode_all: Callable[[bytes], list[T]] = msgspec.json.Decoder(list[record]).decode

    def decoded(self, rows: Sequence[tuple[Any, ...]]) -> list[T]:
        """The records in the rows' last columns; a damaged one is reported and left out."""
        records = self._together(rows)
        return [each for _, each in self._one_by_one(rows)] if records is None else records

    def by_session(self, rows: Sequence[tuple[Any, ...]]) -> defaultdict[str, list[T]]:
        """The same of many sessions; their ids are in the rows' first columns."""
        records = self._together(rows)
        pairs = self._one_by_one(rows) if records is None else zip(rows, records, strict=True)
        found: defaultdict[str, list[T]] = defaultdict(list)
        for row, record in pairs:
            found[row[0]].append(record)
        return found

    def _together(self, rows: Sequence[tuple[Any, ...]]) -> list[T] | None:
        try:
            records = self._decode_all(b"[%b]" % b",".join([row[-1] for row in rows]))
        except (msgspec.DecodeError, TypeError):
            return None
        # Two damaged rows can be one record between them.
        return records if len(records) == len(rows) else None

    def _one_by_one(self, rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], T]]:
        for row in rows:
            try:
                yield row, self.decode(row[-1])
            except (msgspec.DecodeError, TypeError):
                logger.exception("A damaged %s row was left out: %.80r", self._name, row)


_session: Final = _Kind[Session]("session", Session)
_message: Final = _Kind[Message]("message", Message)
_part: Final = _Kind[AnyPart]("part", AnyPart)
_prompt: Final = _Kind[Prompt]("prompt", Prompt)
_ask: Final = _Kind[Ask]("ask", Ask)

_READERS: Final = 4
_UNFINISHED: Final = """
    SELECT session_id FROM message WHERE open = 1
    UNION SELECT session_id FROM part WHERE open = 1
    UNION SELECT session_id FROM inbox WHERE open = 1
    UNION SELECT session_id FROM ask WHERE open = 1
"""
# Of many sessions at once: a join that starts from their ids, and reads what is open only.
_OPEN: Final = """
    SELECT o.session_id, 'message', o.seq, o.data FROM json_each(?1) j
    CROSS JOIN message o INDEXED BY message_open ON o.session_id = j.value AND o.open = 1
    UNION ALL SELECT o.session_id, 'part', o.seq, o.data FROM json_each(?1) j
    CROSS JOIN part o INDEXED BY part_open ON o.session_id = j.value AND o.open = 1
    UNION ALL SELECT o.session_id, 'inbox', o.seq, o.data FROM json_each(?1) j
    CROSS JOIN inbox o INDEXED BY inbox_open ON o.session_id = j.value AND o.open = 1
    UNION ALL SELECT o.session_id, 'ask', o.seq, o.data FROM json_each(?1) j
    CROSS JOIN ask o INDEXED BY ask_open ON o.session_id = j.value AND o.open = 1
    ORDER BY 3
"""
_PROMPTED: Final = """
    SELECT m.session_id, m.data FROM json_each(?1) j
    CROSS JOIN inbox i INDEXED BY inbox_open ON i.session_id = j.value AND i.open = 1
    CROSS JOIN message m ON m.session_id = i.session_id AND m.id = i.message_id
"""
_STEP_PARTS: Final = """
    SELECT p.session_id, p.data FROM json_each(?1) j
    CROSS JOIN message m INDEXED BY message_open ON m.session_id = j.value AND m.open = 1
    CROSS JOIN part p ON p.session_id = m.session_id AND p.message_id = m.id
    ORDER BY m.seq, p.seq
"""
_ORPHANS: Final = """
    SELECT c.session_id, c.owner, c.epoch, c.seq, s.data FROM json_each(?) j
    CROSS JOIN claim c ON c.session_id = j.value JOIN session s ON s.id = c.session_id
    WHERE NOT EXISTS (
        SELECT 1 FROM restart r WHERE r.session_id = c.session_id AND r.consecutive > 0
    )
"""


class Unfinished(msgspec.Struct, frozen=True):
    """What a session has open, each in order of creation; see ``commands.Loaded``.

    ``damaged``: some of it cannot be read.
    """

    prompts: tuple[tuple[Prompt, UserMessage], ...] = ()
    messages: tuple[AssistantMessage, ...] = ()
    parts: tuple[AnyPart, ...] = ()
    markers: tuple[tuple[CompactionPart, UserMessage], ...] = ()
    asks: tuple[Ask, ...] = ()
    later: frozenset[str] = frozenset()
    summarised: dict[str, str] = {}
    damaged: bool = False


def open_readonly(path: str | os.PathLike[str]) -> Reads:
    """The queries of a database that is there, without opening a store. Close it when done.

    Safe beside a live runtime. Raises ``StoreUnreadable``, ``StoreTooNew``, ``InvalidInput``.
    """
    return Reads(check_existing(path), readonly=True)


class _Reader:
    """One snapshot for all statements of a block.

    A delete that commits in between must not leave a message without its parts. A class, because a
    generator takes several times as long and this is around every read.
    """

    __slots__ = ("_connection", "_database", "_reads")

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def __enter__(self) -> sqlite3.Connection:
        self._database = self._reads.take()
        try:
            connection: sqlite3.Connection = self._database.connection()
            connection.execute("BEGIN")
        except BaseException as error:
            self._reads.give_back(self._database)
            if (ours := self._reads.translated(error)) is not None:
                raise ours from error
            raise
        self._connection = connection
        return connection

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self._connection.rollback()
        finally:
            self._reads.give_back(self._database)
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
        self._idle.append(database)
        self._slots.put(True)

    def translated(self, error: BaseException | None) -> StoreError | None:
        """The error of ours for one of the database's."""
        if isinstance(error, sqlite3.Error | peewee.PeeweeException | OSError):
            return translate(error, self._path)
        return None

    def close(self) -> None:
        """Close every reader; one in use is waited for."""
        for _ in range(_READERS):
            self._slots.get()
        self._closed = True
        while self._idle:
            self._idle.pop().close()
        for _ in range(_READERS):
            self._slots.put(True)

    # --- sessions ------------------------------------------------------------------------------

    def session(self, session_id: str) -> Session | None:
        with self.connection() as c:
            row = c.execute("SELECT data FROM session WHERE id = ?", (session_id,)).fetchone()
        try:
            return _session.decode(row[0]) if row else None
        except msgspec.DecodeError as error:
            raise StoreUnreadable(f"The record of session {session_id} is damaged") from error

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
        return _session.decoded(rows)

    def session_count(self) -> int:
        with self.connection() as c:
            return int(c.execute("SELECT count(*) FROM session").fetchone()[0])

    def children(self, session_id: str) -> list[str]:
        with self.connection() as c:
            rows = c.execute("SELECT id FROM session WHERE parent_id = ?", (session_id,))
            return [row[0] for row in rows]

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
            return _transcript(c, session_id, limit=limit, before=before)

    def snapshot(self, session_id: str, *, limit: int | None) -> tuple[list[Pair], int]:
        """The transcript and the cursor it is as of, in one read transaction."""
        with self.connection() as c:
            pairs = _transcript(c, session_id, limit=limit, before=None)
            cursor = c.execute("SELECT coalesce(max(cursor), 0) FROM journal").fetchone()[0]
        return pairs, cursor

    def message(self, session_id: str, message_id: str) -> Pair | None:
        with self.connection() as c:
            rows = c.execute(
                "SELECT id, data FROM message WHERE session_id = ? AND id = ?",
                (session_id, message_id),
            ).fetchall()
            pairs = _with_parts(c, session_id, rows)
        return pairs[0] if pairs else None

    def turn(self, session_id: str, turn: int) -> list[Pair]:
        """The messages of one turn, in order."""
        with self.connection() as c:
            rows = c.execute(
                "SELECT id, data FROM message WHERE session_id = ? AND turn = ? ORDER BY seq",
                (session_id, turn),
            ).fetchall()
            return _with_parts(c, session_id, rows)

    def tool_parts(self, session_id: str, names: Sequence[str]) -> list[ToolPart]:
        """A session's calls of these tools, in the order they were made."""
        with self.connection() as c:
            rows = c.execute(
                "SELECT data FROM part WHERE session_id = ? AND kind = 'tool' ORDER BY seq",
                (session_id,),
            ).fetchall()
        wanted = [b'"tool":"%s"' % name.encode() for name in names]
        rows = [row for row in rows if any(each in row[0] for each in wanted)]
        found = _part.decoded(rows)
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
            start = _history_start(c, session_id)
            rows = c.execute(
                "SELECT id, data FROM message WHERE session_id = ? AND turn < ? "
                "AND (turn, seq) >= (?, ?) ORDER BY turn, seq",
                (session_id, QUEUED, *start),
            ).fetchall()
            return _with_parts(c, session_id, rows)

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
            return (_prompt.decode(row[0]) if row else None, taken.fetchone() is not None)

    def prompts(self, session_id: str) -> list[Prompt]:
        """Every prompt a session ever accepted, oldest first."""
        with self.connection() as c:
            rows = c.execute(
                "SELECT data FROM inbox WHERE session_id = ? ORDER BY seq", (session_id,)
            ).fetchall()
        return _prompt.decoded(rows)

    def accepted_after(self, session_id: str, message_id: str) -> int:
        """The cursor before a prompt's first event; 0 when the journal does not know it."""
        with self.connection() as c:
            row = c.execute(
                "SELECT j.cursor - 1 FROM inbox i LEFT JOIN message m "
                "ON m.session_id = i.session_id AND m.id = i.message_id JOIN journal j "
                "ON j.session_id = i.session_id AND j.seq = coalesce(m.seq, i.seq) "
                "WHERE i.session_id = ? AND i.message_id = ?",
                (session_id, message_id),
            ).fetchone()
        return row[0] if row else 0

    def ask(self, session_id: str, ask_id: str) -> Ask | None:
        with self.connection() as c:
            row = c.execute(
                "SELECT data FROM ask WHERE session_id = ? AND id = ?", (session_id, ask_id)
            ).fetchone()
        return _ask.decode(row[0]) if row else None

    def find_ask(self, ask_id: str) -> Ask | None:
        """A request by its id alone, open or closed."""
        with self.connection() as c:
            row = c.execute("SELECT data FROM ask WHERE id = ?", (ask_id,)).fetchone()
        return _ask.decode(row[0]) if row else None

    def asks(self, session_id: str | None = None) -> list[Ask]:
        """Open requests, oldest first."""
        sql = "SELECT data FROM ask WHERE open = 1"
        values: tuple[str, ...] = ()
        if session_id is not None:
            sql += " AND session_id = ?"
            values = (session_id,)
        with self.connection() as c:
            rows = c.execute(sql + " ORDER BY session_id, seq", values).fetchall()
        return sorted(_ask.decoded(rows), key=lambda ask: ask.created)

    # --- recovery ------------------------------------------------------------------------------

    def unfinished(self, session_ids: Sequence[str]) -> dict[str, Unfinished]:
        """What recovery needs of each session. It costs what is open, not what the history is."""
        ids = (msgspec.json.encode(session_ids).decode(),)
        with self.connection() as c:
            rows = c.execute(_OPEN, ids).fetchall()
            found = {session_id: Unfinished() for session_id in session_ids}
            if not rows:
                return found
            kinds: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
            for row in rows:
                kinds[row[1]].append(row)
            parts, asks = _part.by_session(kinds["part"]), _ask.by_session(kinds["ask"])
            messages = _message.by_session(kinds["message"])
            prompts = _prompt.by_session(kinds["inbox"])
            prompted = _message.by_session(c.execute(_PROMPTED, ids).fetchall() if prompts else ())
            inside = _part.by_session(c.execute(_STEP_PARTS, ids).fetchall() if messages else ())
            readable: tuple[Mapping[str, Sequence[Any]], ...] = (messages, parts, prompts, asks)
            for session_id, count in Counter([row[0] for row in rows]).items():
                markers = tuple(_with_markers(c, parts[session_id]))
                found[session_id] = Unfinished(
                    damaged=sum(len(each[session_id]) for each in readable) < count,
                    prompts=tuple(_with_messages(prompts[session_id], prompted[session_id])),
                    messages=(steps := tuple(_assistants(messages[session_id]))),
                    parts=tuple(_all_parts(steps, inside[session_id], parts[session_id])),
                    markers=markers,
                    asks=tuple(asks[session_id]),
                    later=_later(c, session_id, markers),
                    summarised=_summarised(c, session_id, markers),
                )
        return found

    def orphans(self, session_ids: Sequence[str]) -> list[Orphan]:
        """Those of these sessions that can be read and have not crashed, with their claims."""
        with self.connection() as c:
            rows = c.execute(_ORPHANS, (msgspec.json.encode(session_ids).decode(),)).fetchall()
        infos = _session.by_session(rows)
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
        sql = "SELECT type, session_id, cursor, seq, time_ms, data FROM journal WHERE cursor > ?"
        values: list[Any] = [after]
        if session_id is not None:
            sql += " AND session_id = ?"
            values.append(session_id)
        if upto is not None:
            sql += " AND cursor <= ?"
            values.append(upto)
        with self.connection() as c:
            rows = c.execute(f"{sql} ORDER BY cursor LIMIT ?", (*values, limit)).fetchall()
        return [read_event(row) for row in rows]

    def cursors(self) -> tuple[int, int]:
        """The oldest and the newest cursor of the journal; (0, 0) when it is empty."""
        with self.connection() as c:
            row = c.execute(
                "SELECT coalesce((SELECT min(cursor) FROM journal), 0), "
                "coalesce((SELECT max(cursor) FROM journal), 0)"
            ).fetchone()
        return row[0], row[1]

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


# --- rows to records ---------------------------------------------------------------------------


def _transcript(
    c: sqlite3.Connection, session_id: str, *, limit: int | None, before: str | None
) -> list[Pair]:
    bound = (QUEUED + 1, 0)
    if before is not None:
        row = c.execute(
            "SELECT turn, seq FROM message WHERE session_id = ? AND id = ?",
            (session_id, before),
        ).fetchone()
        bound = row or bound
    rows = c.execute(
        "SELECT id, data FROM message WHERE session_id = ? AND (turn, seq) < (?, ?) "
        "ORDER BY turn DESC, seq DESC LIMIT ?",
        (session_id, *bound, -1 if limit is None else limit),
    ).fetchall()
    rows.reverse()
    return _with_parts(c, session_id, rows)


def _with_parts(
    c: sqlite3.Connection, session_id: str, rows: Sequence[tuple[str, bytes]]
) -> list[Pair]:
    """Messages of one session with their parts."""
    parts: dict[str, list[AnyPart]] = {row[0]: [] for row in rows}
    if len(rows) == 1:
        found = c.execute(
            "SELECT message_id, data FROM part WHERE session_id = ? AND message_id = ? "
            "ORDER BY seq",
            (session_id, rows[0][0]),
        )
    else:
        found = c.execute(
            "SELECT p.message_id, p.data FROM json_each(?) m "
            "JOIN part p ON p.session_id = ? AND p.message_id = m.value ORDER BY m.key, p.seq",
            (msgspec.json.encode([row[0] for row in rows]).decode(), session_id),
        )
    for part in _part.decoded(found.fetchall()):
        parts.setdefault(part.message_id, []).append(part)
    return [(message, tuple(parts.get(message.id, ()))) for message in _message.decoded(rows)]


def _history_start(c: sqlite3.Connection, session_id: str) -> tuple[int, int]:
    """The transcript position from which context is built: the last compaction and its tail.

    Either may come first: steps can finish between the request of a compaction and its summary.
    """

    def place(message_id: str | None) -> tuple[int, int] | None:
        row: tuple[int, int] | None = c.execute(
            "SELECT turn, seq FROM message WHERE session_id = ? AND id = ?",
            (session_id, message_id),
        ).fetchone()
        return row

    rows = c.execute(
        "SELECT data FROM part WHERE session_id = ? AND kind = 'compaction' "
        "ORDER BY seq DESC LIMIT 20",
        (session_id,),
    ).fetchall()
    for part in _part.decoded(rows):
        if isinstance(part, CompactionPart) and part.state == "committed":
            tail = place(part.tail_start_id) or place(part.head_end_id)
            places = [each for each in (tail, place(part.message_id)) if each is not None]
            if places:
                return min(places)
    return 0, 0


def _with_messages(
    prompts: Sequence[Prompt], messages: Sequence[Message]
) -> Iterator[tuple[Prompt, UserMessage]]:
    by_id = {message.id: message for message in messages}
    for prompt in prompts:
        message = by_id.get(prompt.message_id)
        if isinstance(message, UserMessage):
            yield prompt, message


def _assistants(messages: Sequence[Message]) -> Iterator[AssistantMessage]:
    return (each for each in messages if isinstance(each, AssistantMessage))


def _with_markers(
    c: sqlite3.Connection, parts: Sequence[AnyPart]
) -> Iterator[tuple[CompactionPart, UserMessage]]:
    for part in parts:
        if isinstance(part, CompactionPart):
            message = _user_message(c, part.session_id, part.message_id)
            if message is not None:
                yield part, message


def _user_message(c: sqlite3.Connection, session_id: str, message_id: str) -> UserMessage | None:
    rows = c.execute(
        "SELECT data FROM message WHERE session_id = ? AND id = ?", (session_id, message_id)
    ).fetchall()
    for message in _message.decoded(rows):
        if isinstance(message, UserMessage):
            return message
    return None


def _all_parts(
    messages: Sequence[AssistantMessage], inside: Sequence[AnyPart], dangling: Sequence[AnyPart]
) -> Iterator[AnyPart]:
    """Every part of the open messages, and what else is open."""
    ids = {message.id for message in messages}
    yield from (part for part in inside if part.message_id in ids)
    yield from (part for part in dangling if part.message_id not in ids)


def _later(
    c: sqlite3.Connection, session_id: str, markers: Sequence[tuple[CompactionPart, UserMessage]]
) -> frozenset[str]:
    """Markers that a finished answer follows: nobody waits for them any more."""
    later = set()
    for _, message in markers:
        if message.turn is None:
            continue
        rows = c.execute(
            "SELECT a.data FROM message m JOIN message a ON a.session_id = m.session_id "
            "AND (a.turn, a.seq) > (m.turn, m.seq) AND a.turn < ? AND a.role = 'assistant' "
            "AND a.open = 0 WHERE m.session_id = ? AND m.id = ? ORDER BY a.turn DESC, a.seq DESC",
            (QUEUED, session_id, message.id),
        ).fetchall()
        answers = _message.decoded(rows)
        if any(isinstance(a, AssistantMessage) and not a.summary for a in answers):
            later.add(message.id)
    return frozenset(later)


def _summarised(
    c: sqlite3.Connection, session_id: str, markers: Sequence[tuple[CompactionPart, UserMessage]]
) -> dict[str, str]:
    """Markers that have a finished summary already."""
    found = {}
    for _, message in markers:
        rows = c.execute(
            "SELECT a.data FROM message m JOIN message a ON a.session_id = m.session_id "
            "AND a.turn >= m.turn AND a.role = 'assistant' AND a.open = 0 "
            "WHERE m.session_id = ? AND m.id = ?",
            (session_id, message.id),
        ).fetchall()
        for answer in _message.decoded(rows):
            if (
                isinstance(answer, AssistantMessage)
                and answer.summary
                and answer.parent_id == message.id
                and answer.error is None
            ):
                found[message.id] = answer.id
    return found
