"""What a recovery needs to know: everything a session has open, for many sessions at once."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from understudy.store.records import (
    AnyPart,
    Ask,
    AssistantMessage,
    CompactionPart,
    Message,
    Prompt,
    UserMessage,
)
from understudy.store.rows import asks as ask_rows
from understudy.store.rows import messages as message_rows
from understudy.store.rows import parts as part_rows
from understudy.store.rows import prompts as prompt_rows
from understudy.store.schema import QUEUED

# Of many sessions at once: a join that starts from their ids, and reads what is open only.
_OPEN: Final = """
    SELECT o.session_id, 'message', o.seq, o.data FROM json_each(?1) j
    CROSS JOIN message o INDEXED BY message_open ON o.session_id = j.value AND o.open = 1
    UNION ALL SELECT o.session_id, 'part', o.seq, o.data FROM json_each(?1) j
    CROSS JOIN part o INDEXED BY part_open ON o.session_id = j.value AND o.open = 1
    UNION ALL SELECT o.session_id, 'inbox', o.seq, o.data FROM json_each(?1) j
    CROSS JOIN inbox o INDEXED BY inbox_session ON o.session_id = j.value AND o.open = 1
    UNION ALL SELECT o.session_id, 'ask', o.seq, o.data FROM json_each(?1) j
    CROSS JOIN ask o INDEXED BY ask_open ON o.session_id = j.value AND o.open = 1
    ORDER BY 3
"""
_PROMPTED: Final = """
    SELECT m.session_id, m.data FROM json_each(?1) j
    CROSS JOIN inbox i INDEXED BY inbox_session ON i.session_id = j.value AND i.open = 1
    CROSS JOIN message m ON m.session_id = i.session_id AND m.id = i.message_id
"""
_STEP_PARTS: Final = """
    SELECT p.session_id, p.data FROM json_each(?1) j
    CROSS JOIN message m INDEXED BY message_open ON m.session_id = j.value AND m.open = 1
    CROSS JOIN part p ON p.session_id = m.session_id AND p.message_id = m.id
    ORDER BY m.seq, p.seq
"""


# A step that has failed, and a summary, are none; no text of theirs is in a message's own record.
_STEPS: Final = """
    SELECT i.session_id, a.turn, count(DISTINCT a.id) FROM json_each(?1) j
    CROSS JOIN inbox i INDEXED BY inbox_session ON i.session_id = j.value AND i.open = 1
    CROSS JOIN message m ON m.session_id = i.session_id AND m.id = i.message_id
    CROSS JOIN message a INDEXED BY message_order
      ON a.session_id = m.session_id AND a.turn = m.turn AND a.role = 'assistant' AND a.open = 0
    WHERE instr(a.data, CAST('"error":{' AS BLOB)) + instr(a.data, CAST('"summary":true' AS BLOB))
      = 0
    GROUP BY 1, 2
"""


class Unfinished(msgspec.Struct, frozen=True):
    """What a session has open, each in order of creation; see ``commands.Loaded``.

    ``lost``: prompts without a message that can be read. ``steps``: how many steps the turns of
    prompts have finished, by number. ``damaged``: some of it cannot be read.
    """

    prompts: tuple[tuple[Prompt, UserMessage], ...] = ()
    messages: tuple[AssistantMessage, ...] = ()
    parts: tuple[AnyPart, ...] = ()
    markers: tuple[tuple[CompactionPart, UserMessage], ...] = ()
    asks: tuple[Ask, ...] = ()
    later: frozenset[str] = frozenset()
    summarised: dict[str, str] = {}
    lost: tuple[Prompt, ...] = ()
    steps: dict[int, int] = {}
    damaged: bool = False


def unfinished(c: sqlite3.Connection, session_ids: Sequence[str]) -> dict[str, Unfinished]:
    """What recovery needs of each session. It costs what is open, not what the history is."""
    ids = (msgspec.json.encode(session_ids).decode(),)
    rows = c.execute(_OPEN, ids).fetchall()
    found = {session_id: Unfinished() for session_id in session_ids}
    if not rows:
        return found
    kinds: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for row in rows:
        kinds[row[1]].append(row)
    parts, asks = part_rows.by_session(kinds["part"]), ask_rows.by_session(kinds["ask"])
    messages = message_rows.by_session(kinds["message"])
    prompts = prompt_rows.by_session(kinds["inbox"])
    prompted = message_rows.by_session(c.execute(_PROMPTED, ids).fetchall() if prompts else ())
    steps: dict[str, dict[int, int]] = defaultdict(dict)
    for session_id, turn, count in c.execute(_STEPS, ids) if prompts else ():
        steps[session_id][turn] = count
    inside = part_rows.by_session(c.execute(_STEP_PARTS, ids).fetchall() if messages else ())
    readable: tuple[Mapping[str, Sequence[Any]], ...] = (messages, parts, prompts, asks)
    for session_id, count in Counter([row[0] for row in rows]).items():
        markers = tuple(_with_markers(c, parts[session_id]))
        entries = tuple(_with_messages(prompts[session_id], prompted[session_id]))
        kept = {prompt.message_id for prompt, _ in entries}
        found[session_id] = Unfinished(
            damaged=sum(len(each[session_id]) for each in readable) < count,
            prompts=entries,
            lost=tuple(each for each in prompts[session_id] if each.message_id not in kept),
            steps=steps[session_id],
            messages=(answers := tuple(_assistants(messages[session_id]))),
            parts=tuple(_all_parts(answers, inside[session_id], parts[session_id])),
            markers=markers,
            asks=tuple(asks[session_id]),
            later=_later(c, session_id, markers),
            summarised=_summarised(c, session_id, markers),
        )
    return found


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
    for message in message_rows.decoded(rows):
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
        answers = message_rows.decoded(rows)
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
        for answer in message_rows.decoded(rows):
            if (
                isinstance(answer, AssistantMessage)
                and answer.summary
                and answer.parent_id == message.id
                and answer.error is None
            ):
                found[message.id] = answer.id
    return found
