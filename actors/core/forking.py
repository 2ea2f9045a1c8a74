"""Forking: a session's history, copied under new ids into a session of its own."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from understudy.actors.core.state import Moment
from understudy.errors import MessageNotFound
from understudy.store.events import AnyFact, MessageUpdated, PartUpdated, SessionCreated
from understudy.store.ids import make_id
from understudy.store.records import (
    AnyPart,
    AssistantMessage,
    CompactionPart,
    Message,
    Session,
    ToolPart,
    ToolPending,
    ToolRunning,
)

replace = msgspec.structs.replace

History = Sequence[tuple[Message, tuple[AnyPart, ...]]]


def fork_facts(
    history: History, *, source_id: str, info: Session, before: str | None, moment: Moment
) -> tuple[AnyFact, ...]:
    """The facts that make ``info`` a session with a copy of ``history`` up to ``before``.

    Only turns that are over are copied; a marker without its summary stays behind. Turns are
    numbered anew, below the fork's first ``seq``: what comes next comes after them. Raises
    ``MessageNotFound`` when ``before`` is not in the history.
    """
    kept = _kept(history, source_id, before)
    ids = _new_ids(kept, moment)
    turns = {turn: number for number, turn in enumerate(_turns(kept), 1)}
    facts: list[AnyFact] = [SessionCreated(session_id=info.id, info=info)]
    for message, parts in kept:
        assert message.turn is not None, "what waits is not copied"
        turn = turns[message.turn]
        copied = replace(message, id=ids[message.id], session_id=info.id, turn=turn)
        if isinstance(copied, AssistantMessage):
            copied = replace(copied, parent_id=ids.get(copied.parent_id, copied.parent_id))
        facts.append(MessageUpdated(session_id=info.id, info=copied))
        for part in parts:
            copy = _copy_part(part, info.id, ids)
            facts.append(PartUpdated(session_id=info.id, part=copy, time=moment.now_ms))
    return tuple(facts)


def _kept(
    history: History, source_id: str, before: str | None
) -> list[tuple[Message, tuple[AnyPart, ...]]]:
    shown = []
    for message, parts in history:
        if message.id == before:
            break
        shown.append((message, parts))
    else:
        if before is not None:
            raise MessageNotFound(
                f"No message {before} in session {source_id}",
                session_id=source_id,
                message_id=before,
            )
    running = {message.turn for message, parts in shown if _unfinished(message, parts)}
    return [
        (message, parts)
        for message, parts in shown
        if message.turn is not None
        and message.turn not in running
        and not any(isinstance(p, CompactionPart) and p.state != "committed" for p in parts)
    ]


def _unfinished(message: Message, parts: tuple[AnyPart, ...]) -> bool:
    if isinstance(message, AssistantMessage) and message.time.completed is None:
        return True
    return any(
        isinstance(part, ToolPart) and isinstance(part.state, ToolPending | ToolRunning)
        for part in parts
    )


def _turns(kept: History) -> list[int]:
    """The turns of a history, in order."""
    return list(dict.fromkeys(message.turn for message, _ in kept if message.turn is not None))


def _new_ids(kept: History, moment: Moment) -> dict[str, str]:
    ids: dict[str, str] = {}
    counter = 0
    for message, parts in kept:
        for prefix, old in (("msg", message.id), *(("prt", part.id) for part in parts)):
            counter += 1
            # A long copy moves on in time, so that its ids stay in order past the counter.
            ids[old] = make_id(
                prefix,
                now_ms=moment.now_ms + counter // 4096,
                counter=counter,
                entropy=moment.entropy,
            )
    return ids


def _copy_part(part: AnyPart, session_id: str, ids: dict[str, str]) -> AnyPart:
    copy = replace(part, id=ids[part.id], session_id=session_id, message_id=ids[part.message_id])
    if isinstance(copy, CompactionPart):
        named = {
            name: ids.get(old)
            for name in ("summary_id", "head_end_id", "tail_start_id")
            if (old := getattr(copy, name)) is not None
        }
        copy = replace(copy, **named)
    return copy
