"""Changes: facts that commit together, and how facts become rows.

The tables are a projection of the facts; this is the one place that knows it.
"""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Final, TypeVar

import msgspec
from peewee import Database, SqliteDatabase

from understudy.errors import SessionFenced
from understudy.store import journal, schema
from understudy.store.events import (
    AnyFact,
    Event,
    Fact,
    MessageRemoved,
    MessageUpdated,
    PartRemoved,
    PartUpdated,
    PermissionAsked,
    PermissionReplied,
    PromptAccepted,
    PromptSettled,
    PromptStarted,
    QuestionAsked,
    QuestionReplied,
    SessionCreated,
    SessionUpdated,
)
from understudy.store.records import (
    AnyPart,
    Ask,
    AssistantMessage,
    CompactionPart,
    Message,
    Prompt,
    ReasoningPart,
    Record,
    Session,
    Span,
    TextPart,
    ToolPart,
    ToolPending,
    ToolRunning,
)

_encode: Final = msgspec.json.Encoder().encode

T = TypeVar("T")


class Change(msgspec.Struct, frozen=True, gc=False):
    """Facts about one session, refused unless ``owner`` still holds the claim at ``epoch``.

    ``seq`` is the number of the session's last event before them. ``progress``: crashes are
    counted from one again.
    """

    session_id: str
    owner: str
    epoch: int
    seq: int
    time_ms: int
    facts: tuple[AnyFact, ...]
    progress: bool = False


def statement(database: Database, query: Any) -> str:
    """The SQL of a peewee query, compiled once; its values are placeholders."""
    sql, _ = database.get_sql_context().sql(query).query()
    return str(sql)


def upsert(database: Database, model: Any, *, keep: Iterable[str] = ()) -> str:
    """``INSERT … ON CONFLICT DO UPDATE`` over all columns in declared order.

    A row that is there keeps its ``keep`` columns.
    """
    fields = model._meta.sorted_fields  # noqa: SLF001 - peewee's documented Model._meta
    keys = [field.name for field in model._meta.get_primary_keys()]  # noqa: SLF001
    kept = {*keep, *keys}
    query = model.insert(dict.fromkeys(fields)).on_conflict(
        conflict_target=keys,
        preserve=[field for field in fields if field.name not in kept],
    )
    return statement(database, query)


class Statements:
    """The hot statements, compiled once from the models."""

    def __init__(self, database: SqliteDatabase) -> None:
        self.session = upsert(database, schema.Session)
        self.message = upsert(database, schema.Message, keep=("seq",))
        self.part = upsert(database, schema.Part, keep=("message_id", "seq", "kind"))
        self.inbox = upsert(database, schema.Inbox, keep=("seq",))
        self.ask = upsert(database, schema.Ask, keep=("seq",))
        fields = schema.Journal._meta.sorted_fields  # noqa: SLF001
        self.journal = statement(database, schema.Journal.insert(dict.fromkeys(fields)))


@functools.cache
def statements() -> Statements:
    """The statements of any store: they are the same for all, and take a while to compile."""
    return Statements(SqliteDatabase(None))


@functools.cache
def for_rows(sql: str, count: int) -> str:
    """An ``INSERT`` of one row, for ``count`` rows."""
    before, values, after = re.split(r"(?<=VALUES )(\([?, ]+\))", sql)
    return f"{before}{', '.join([values] * count)}{after}"


@functools.cache
def _fences(count: int) -> str:
    """The fence of ``count`` changes of as many sessions."""
    given = ", ".join(["(?, ?, ?, ?)"] * count)
    return (
        f"UPDATE claim SET seq = given.column1 FROM (VALUES {given}) AS given "  # noqa: S608 - marks
        "WHERE session_id = given.column2 AND epoch = given.column3 AND owner = given.column4"
    )


_AT_ONCE: Final = (64, 16, 4, 1)
"""How many rows one statement writes: each costs two switches to SQLite and back."""
_FENCE: Final = "UPDATE claim SET seq = ? WHERE session_id = ? AND epoch = ? AND owner = ?"
_FORGIVE: Final = (
    "UPDATE restart SET consecutive = 0, culprit = NULL, culprit_count = 0 "
    "WHERE session_id = ? AND quarantined_ms IS NULL"
)
_LAST_CURSOR: Final = "SELECT coalesce(max(cursor), 0) FROM journal"


class Transaction:
    """One write transaction: collects the rows of many changes and writes them table by table."""

    def __init__(self, connection: sqlite3.Connection, statements: Statements) -> None:
        self.connection = connection
        self.statements = statements
        self.cursor: int = connection.execute(_LAST_CURSOR).fetchone()[0]
        self._sessions: dict[str, tuple[Any, ...]] = {}
        self._messages: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._parts: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._inbox: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._asks: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._journal: list[tuple[Any, ...]] = []

    def fence(self, changes: Sequence[Change]) -> bool:
        """Fence changes at once that are added next, each of them. False: each is to be by itself.

        As many changes as ``groups`` puts together.
        """
        if len(changes) <= 1:
            return False
        values = list(chain.from_iterable(map(_claimed, changes)))
        done = self.connection.execute(_fences(len(changes)), values)
        return bool(done.rowcount == len(changes))

    def add(self, change: Change, *, fenced: bool = False) -> list[Event]:
        """Fence a change, unless it is, and collect its rows.

        Raises ``SessionFenced`` and has done nothing.
        """
        if not fenced and self.connection.execute(_FENCE, _claimed(change)).rowcount != 1:
            raise SessionFenced(
                f"Session {change.session_id} moved past epoch {change.epoch}",
                session_id=change.session_id,
                epoch=change.epoch,
            )
        if change.progress:
            self.connection.execute(_FORGIVE, (change.session_id,))
        return self.append(change.session_id, change.seq, change.time_ms, change.facts)

    def append(
        self, session_id: str, seq: int, time_ms: int, facts: Sequence[AnyFact]
    ) -> list[Event]:
        """Give facts their numbers and collect their rows."""
        self._journal += journal.rows_of(
            facts, session_id=session_id, cursor=self.cursor, seq=seq, time_ms=time_ms
        )
        events = []
        for fact in facts:
            seq += 1
            self.cursor += 1
            projector = _PROJECTORS.get(type(fact))
            if projector is not None:
                projector(self, fact, seq)
            events.append(Event(fact.type, session_id, self.cursor, seq, time_ms, fact))
        return events

    def flush(self) -> None:
        """Write what was collected."""
        write = self._write
        for sql, rows in (
            (self.statements.session, self._sessions),
            (self.statements.message, self._messages),
            (self.statements.part, self._parts),
            (self.statements.inbox, self._inbox),
            (self.statements.ask, self._asks),
        ):
            if rows:
                write(sql, list(rows.values()))
                rows.clear()
        if self._journal:
            write(self.statements.journal, self._journal)
            self._journal.clear()

    def _write(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        for group in groups(rows):
            self.connection.execute(for_rows(sql, len(group)), list(chain.from_iterable(group)))

    def discard(self) -> None:
        """Forget what was collected and not yet written."""
        for rows in (self._sessions, self._messages, self._parts, self._inbox, self._asks):
            rows.clear()
        self._journal.clear()

    # --- projection ----------------------------------------------------------------------------

    def put_session(self, info: Session) -> None:
        self._sessions[info.id] = (
            info.id,
            info.parent_id,
            info.title,
            info.directory,
            info.time.created,
            info.time.updated,
            info.time.archived,
            int(info.internal),
            _blob(info),
        )

    def put_message(self, message: Message, seq: int) -> None:
        key = (message.session_id, message.id)
        row = self._messages.get(key)
        self._messages[key] = (
            *key,
            schema.QUEUED if message.turn is None else message.turn,
            row[3] if row is not None else seq,
            message.role,
            int(isinstance(message, AssistantMessage) and message.time.completed is None),
            _blob(message),
        )

    def put_part(self, part: AnyPart, seq: int) -> None:
        key = (part.session_id, part.id)
        row = self._parts.get(key)
        self._parts[key] = (
            *key,
            part.message_id,
            row[3] if row is not None else seq,
            part.__struct_config__.tag,
            int(is_open(part)),
            _blob(part),
        )

    def put_prompt(self, prompt: Prompt, seq: int) -> None:
        key = (prompt.session_id, prompt.message_id)
        row = self._inbox.get(key)
        self._inbox[key] = (
            *key,
            row[2] if row is not None else seq,
            int(prompt.outcome is None),
            _blob(prompt),
        )

    def put_ask(self, ask: Ask, seq: int) -> None:
        key = (ask.session_id, ask.id)
        row = self._asks.get(key)
        self._asks[key] = (
            *key,
            row[2] if row is not None else seq,
            int(ask.replied is None),
            _blob(ask),
        )

    def remove_message(self, session_id: str, message_id: str) -> None:
        self.flush()
        key = (session_id, message_id)
        self.connection.execute("DELETE FROM part WHERE session_id = ? AND message_id = ?", key)
        self.connection.execute("DELETE FROM message WHERE session_id = ? AND id = ?", key)

    def remove_part(self, session_id: str, part_id: str) -> None:
        self.flush()
        self.connection.execute(
            "DELETE FROM part WHERE session_id = ? AND id = ?", (session_id, part_id)
        )


def groups(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many as one statement takes, in order."""
    start = 0
    for size in _AT_ONCE:
        while len(rows) - start >= size:
            yield rows[start : start + size]
            start += size


def _blob(record: Record) -> bytearray:
    """A record as its row has it.

    No bytes: for those, as for a bool, sqlite3 first looks for an adapter, in vain, which takes
    longer than a copy.
    """
    return bytearray(_encode(record))


def _claimed(change: Change) -> tuple[Any, ...]:
    """The values of a fence."""
    return change.seq + len(change.facts), change.session_id, change.epoch, change.owner


def is_open(part: AnyPart) -> bool:
    """Whether a part is unfinished: a call without a result, text without an end, a live marker."""
    if isinstance(part, ToolPart):
        return isinstance(part.state, ToolPending | ToolRunning)
    if isinstance(part, TextPart | ReasoningPart):
        return isinstance(part.time, Span) and part.time.end is None
    return isinstance(part, CompactionPart) and part.active


def _project_ask(tx: Transaction, fact: Any, seq: int) -> None:
    tx.put_ask(fact.info, seq)


def _project_prompt(tx: Transaction, fact: Any, seq: int) -> None:
    tx.put_prompt(fact.info, seq)


def _project_session(tx: Transaction, fact: Any, _: int) -> None:
    tx.put_session(fact.info)


_PROJECTORS: Final[dict[type[Fact], Any]] = {
    SessionCreated: _project_session,
    SessionUpdated: _project_session,
    MessageUpdated: lambda tx, fact, seq: tx.put_message(fact.info, seq),
    MessageRemoved: lambda tx, fact, _: tx.remove_message(fact.session_id, fact.message_id),
    PartUpdated: lambda tx, fact, seq: tx.put_part(fact.part, seq),
    PartRemoved: lambda tx, fact, _: tx.remove_part(fact.session_id, fact.part_id),
    PromptAccepted: _project_prompt,
    PromptStarted: _project_prompt,
    PromptSettled: _project_prompt,
    PermissionAsked: _project_ask,
    PermissionReplied: _project_ask,
    QuestionAsked: _project_ask,
    QuestionReplied: _project_ask,
}
