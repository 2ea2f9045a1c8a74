"""An independent audit of a database: plain SQL and JSON, none of the store's code.

Checks what the project promises: every accepted prompt has one outcome, nothing happened twice,
nothing is left open, the journal has no gap, and the tables are what the events say.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec

from understudy.gateway.fold import Row, fold, is_open
from understudy.gateway.rows import Rows, decoded, rows_of, session_ids
from understudy.store.database import legible

Kind: TypeAlias = Literal[
    "damaged", "lost", "duplicated", "stuck", "orphan", "journal", "mismatch", "outcome"
]
Named: TypeAlias = tuple[str, str]
"""(session id, id of a message or a call)."""

_QUEUED: Final = 1 << 62


class Violation(msgspec.Struct, frozen=True):
    """A broken promise: of which kind, where, and what was found."""

    kind: Kind
    session_id: str
    what: str


class Audit(msgspec.Struct):
    """What was counted, and what was found broken.

    Attributes:
        outcomes: prompts by outcome; "open" are those without one.
        answers: the text of each answer, by (session id, message id of the prompt).
        events: how many of each type the journal holds.
    """

    sessions: int = 0
    prompts: int = 0
    outcomes: Counter[str] = msgspec.field(default_factory=Counter)
    answers: dict[Named, str] = {}
    events: Counter[str] = msgspec.field(default_factory=Counter)
    violations: list[Violation] = []

    def of(self, *kinds: Kind) -> list[Violation]:
        return [each for each in self.violations if each.kind in kinds]

    def found(self, kind: Kind, session_id: str, what: str) -> None:
        self.violations.append(Violation(kind, session_id, what))


def audit(
    database: str | PathLike[str],
    *,
    accepted: Iterable[Named] = (),
    effects: Iterable[Named] = (),
    effect_tool: str = "",
    resting: bool = True,
) -> Audit:
    """Examine a database, which may be in use.

    Args:
        database: the file; it is opened read-only and read as of one moment.
        accepted: prompts somebody was told are accepted, by a record kept elsewhere.
        effects: what tool calls did outside, one entry each time: (session id, call id).
        effect_tool: the tool that leaves ``effects``, once for each completed call.
        resting: nothing runs, so whatever is open is stuck.

    Raises ``sqlite3.OperationalError`` when the file cannot be opened, or is no store.
    """
    result = Audit()
    uri = f"{Path(database).absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as c:
        c.row_factory = sqlite3.Row
        c.text_factory = legible
        c.execute("BEGIN")
        checks: tuple[Callable[[], None], ...] = (
            lambda: _check_file(c, result),
            lambda: _check_sessions(c, Counter(effects), effect_tool, result, resting=resting),
            lambda: _check_accepted(c, accepted, result),
        )
        for check in checks:
            try:
                check()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                if Violation("damaged", "", str(error)) not in result.violations:
                    result.found("damaged", "", str(error))
    return result


def _check_file(c: sqlite3.Connection, result: Audit) -> None:
    for (line,) in c.execute("PRAGMA integrity_check"):
        if line != "ok":
            result.found("damaged", "", f"integrity_check: {line}")


def _check_sessions(
    c: sqlite3.Connection, done: Counter[Named], tool: str, result: Audit, *, resting: bool
) -> None:
    calls: set[Named] = set()
    for session_id in session_ids(c):
        rows = rows_of(c, session_id)
        for what in rows.damaged:
            result.found("damaged", session_id, what)
        _count(rows, result)
        _check_journal(c, rows, result)
        _check_links(rows, result)
        _check_fold(rows, result)
        _check_prompts(rows, result)
        _check_turns(rows, result)
        calls |= _check_calls(rows, result, done, tool)
        if resting:
            _check_rest(rows, result)
    for (session_id, call_id), times in done.items():
        if times > 1:
            result.found("duplicated", session_id, f"call {call_id} took effect {times} times")
        if (session_id, call_id) not in calls:
            result.found("lost", session_id, f"call {call_id} took effect and is nowhere recorded")


# --- the checks --------------------------------------------------------------------------------


def _count(rows: Rows, result: Audit) -> None:
    result.sessions += len(rows.columns["session"])
    result.prompts += len(rows.columns["inbox"])
    result.outcomes.update(p.get("outcome", "open") for p in rows.tables["inbox"].values())
    result.events.update(kind for _, _, kind, _ in rows.events)
    for message_id, prompt in rows.tables["inbox"].items():
        if prompt.get("outcome") == "answered":
            result.answers[rows.id, message_id] = "".join(
                part["text"]
                for part in rows.tables["part"].values()
                if part["messageID"] == prompt.get("reply_id") and part["type"] == "text"
            )


def _check_journal(c: sqlite3.Connection, rows: Rows, result: Audit) -> None:
    """No gap, one order, and the claim knows the last number."""
    events = rows.events
    for (seq, cursor, _, _), (next_seq, next_cursor, _, _) in itertools.pairwise(events):
        if rows.whole and next_seq != seq + 1:
            result.found("journal", rows.id, f"event {next_seq} follows event {seq}")
        if next_cursor <= cursor:
            result.found("journal", rows.id, f"event {next_seq} was committed before {seq}")
    last = c.execute(
        "SELECT seq FROM claim WHERE session_id = ?1 "
        "UNION ALL SELECT seq FROM tombstone WHERE session_id = ?1",
        (rows.id,),
    ).fetchall()
    if len(last) > 1:
        result.found("journal", rows.id, "both deleted and claimed")
    if events and last and last[0][0] != events[-1][0]:
        result.found(
            "journal", rows.id, f"{last[0][0]} events were counted, {events[-1][0]} are there"
        )
    if not rows.columns["session"] and events and events[-1][2] != "session.deleted":
        result.found("journal", rows.id, f"{events[-1][2]} follows the deletion")


def _check_links(rows: Rows, result: Audit) -> None:
    """What belongs to something has it; columns repeat their records."""
    columns = rows.columns
    if not columns["session"]:
        for table in ("message", "part", "inbox", "ask"):
            if columns[table]:
                result.found("orphan", rows.id, f"{len(columns[table])} {table} rows of no session")
    for part_id, part in columns["part"].items():
        if part["message_id"] not in columns["message"]:
            result.found("orphan", rows.id, f"part {part_id} of no message")
    for message_id in columns["inbox"].keys() - columns["message"].keys():
        if not _removed(rows, message_id):
            result.found("orphan", rows.id, f"prompt {message_id} of no message")
    for table, key, what in _wrong_columns(rows):
        result.found("mismatch", rows.id, f"{table} {key}: the column {what} is wrong")


def _check_fold(rows: Rows, result: Audit) -> None:
    """The tables are what the events say, where the journal reaches back to the beginning."""
    if not _reaches_back(rows):
        return
    told = fold((kind, fact) for _, _, kind, fact in rows.events)
    for table, records in rows.tables.items():
        damaged = rows.columns[table].keys() - records.keys()
        for key in sorted((records.keys() | told[table].keys()) - damaged):
            if records.get(key) != told[table].get(key):
                result.found("mismatch", rows.id, f"{table} {key} is not what its events say")


def _reaches_back(rows: Rows) -> bool:
    return rows.whole and bool(rows.events) and rows.events[0][2] == "session.created"


def _this_life(rows: Rows) -> list[tuple[int, int, str, Row]]:
    """The events since the session's last creation: a deleted id may be used again."""
    births = [n for n, (_, _, kind, _) in enumerate(rows.events) if kind == "session.created"]
    return rows.events[births[-1] if births else 0 :]


def _removed(rows: Rows, message_id: str) -> bool:
    """Whether a revert took the message away, as far as the journal still says."""
    return not _reaches_back(rows) or any(
        kind == "message.removed" and fact["messageID"] == message_id
        for _, _, kind, fact in rows.events
    )


def _wrong_columns(rows: Rows) -> Iterator[tuple[str, str, str]]:
    for table in ("message", "part", "inbox", "ask"):
        for key, record in rows.tables[table].items():
            row = rows.columns[table][key]
            if bool(row["open"]) != is_open(table, record):
                yield table, key, "open"
            if table == "message" and row["turn"] != record.get("turn", _QUEUED):
                yield table, key, "turn"
            if table == "part" and row["message_id"] != record["messageID"]:
                yield table, key, "message_id"


def _check_prompts(rows: Rows, result: Audit) -> None:
    """Each prompt is accepted once and settled once, with an answer if it says so."""
    for kind in ("prompt.accepted", "prompt.settled"):
        told = Counter(f["info"]["messageID"] for _, _, k, f in _this_life(rows) if k == kind)
        for message_id, times in told.items():
            if times > 1:
                result.found("duplicated", rows.id, f"{kind} {times} times for {message_id}")
    messages = rows.tables["message"]
    for message_id, prompt in rows.tables["inbox"].items():
        if prompt.get("outcome") != "answered":
            continue
        reply_id = prompt.get("reply_id", "")
        reply = messages.get(reply_id)
        if reply is None and (reply_id in rows.columns["message"] or _removed(rows, reply_id)):
            continue  # damaged and reported as that, or reverted
        if reply is None or reply["role"] != "assistant" or "error" in reply:
            result.found("outcome", rows.id, f"prompt {message_id} is answered by nothing")


def _check_turns(rows: Rows, result: Audit) -> None:
    """A turn is one prompt's and those that joined it, and has no more answers than prompts."""
    turns: defaultdict[int, list[Row]] = defaultdict(list)
    for prompt in rows.tables["inbox"].values():
        if "turn" in prompt:
            turns[prompt["turn"]].append(prompt)
    answers = Counter(m["turn"] for m in rows.tables["message"].values() if _is_final(m))
    for turn, prompts in turns.items():
        hosts = [p["messageID"] for p in prompts if p.get("when_busy") != "steer"]
        if len(hosts) > 1:
            result.found("duplicated", rows.id, f"{', '.join(hosts)} share a turn")
        if answers[turn] > len(prompts):
            first = prompts[0]["messageID"]
            result.found("duplicated", rows.id, f"{first} has {answers[turn]} answers")


def _is_final(message: Row) -> bool:
    return (
        message["role"] == "assistant"
        and message.get("finish") == "stop"
        and "error" not in message
        and not message.get("summary")
    )


def _check_calls(rows: Rows, result: Audit, done: Counter[Named], tool: str) -> set[Named]:
    """Every call is recorded once in its message; a completed one took effect. Gives all calls."""
    tools = [part for part in rows.tables["part"].values() if part["type"] == "tool"]
    for (_, call_id), times in Counter((p["messageID"], p["callID"]) for p in tools).items():
        if times > 1:
            result.found("duplicated", rows.id, f"call {call_id} is recorded {times} times")
    for part in tools:
        finished = part["tool"] == tool and part["state"]["status"] == "completed"
        if finished and not done[rows.id, part["callID"]]:
            result.found("lost", rows.id, f"call {part['callID']} completed without effect")
    return {(rows.id, part["callID"]) for part in tools}


def _check_rest(rows: Rows, result: Audit) -> None:
    for table, records in rows.tables.items():
        for key, record in records.items():
            if is_open(table, record):
                result.found("stuck", rows.id, f"{table} {key} is open and nothing runs")


def _check_accepted(c: sqlite3.Connection, accepted: Iterable[Named], result: Audit) -> None:
    """What somebody was told is accepted is there, with its outcome."""
    sql = "SELECT data FROM inbox WHERE session_id = ? AND message_id = ?"
    for session_id, message_id in dict.fromkeys(accepted):
        row = c.execute(sql, (session_id, message_id)).fetchone()
        if row is None:
            result.found("lost", session_id, f"prompt {message_id} was accepted and is gone")
        elif "outcome" not in (decoded(row["data"]) or {}):
            result.found("lost", session_id, f"prompt {message_id} has no outcome")
