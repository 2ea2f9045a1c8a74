"""Checkers: what must hold after every decision, written without a look at how it is decided."""

from __future__ import annotations

from core_stage import Rows, Stage, context, is_open_part

from understudy.actors.core.context import SUMMARY_HEADING, conversation
from understudy.actors.core.effects import RunStep, RunSummary, RunTool
from understudy.actors.models.protocol import AssistantTurn, UserText, UserTurn
from understudy.store.records import (
    AssistantMessage,
    CompactionPart,
    TextPart,
    ToolPart,
    ToolPending,
    ToolRunning,
    UserMessage,
)


def check_all(stage: Stage) -> None:
    check_transcript(stage.rows)
    check_state_is_rows(stage)
    check_nothing_is_stuck(stage)
    for key, effect in stage.running.items():
        if isinstance(effect, RunStep):
            check_request(stage, key, effect)


def check_transcript(rows: Rows) -> None:
    """Rows are whole: nothing open under what is closed, one active marker, honest status."""
    open_messages = []
    for message in rows.messages.values():
        if isinstance(message, AssistantMessage):
            if message.time.completed is None:
                open_messages.append(message)
                continue
            assert message.finish is not None or message.error is not None
            assert not message.summary or message.finish is not None
            if message.summary:
                parent = rows.parts[message.parent_id].values()
                assert any(isinstance(part, CompactionPart) for part in parent), "wrong parent"
        for part in rows.parts[message.id].values():
            assert not is_open_part(part), f"open {part} under a completed message"
            if isinstance(part, CompactionPart) and not part.active:
                assert isinstance(message, UserMessage) and message.turn is not None
    assert len(open_messages) <= 1
    markers = rows.markers()
    assert len(markers) <= 1
    waiting = [prompt for prompt in rows.prompts.values() if prompt.outcome is None]
    asks = [ask for ask in rows.asks.values() if ask.replied is None]
    busy = bool(open_messages or markers or waiting or asks)
    assert (rows.status.type == "idle") == (not busy), (rows.status, waiting, markers)
    assert rows.info.tokens.total == rows.spent
    assert rows.info.revert is None or not busy, "work on ground that is going away"
    running = {prompt.turn for prompt in waiting if prompt.turn is not None}
    assert len(running) <= 1
    for ask in asks:
        assert any(
            isinstance(part, ToolPart) and part.call_id == ask.call_id and is_open_part(part)
            for part in rows.parts[ask.message_id or ""].values()
        ), "an ask without its call"


def check_state_is_rows(stage: Stage) -> None:
    """What is in memory is what could be read back.

    Not compared, because not stored: a turn's counts (``steps``, ``failures``, ``compacted``,
    ``repeats``) and a step's ``asked``.
    """
    state, rows = stage.state, stage.rows
    assert state.info == rows.info
    assert state.status == rows.status
    assert state.asks == {ask.id: ask for ask in rows.asks.values() if ask.replied is None}
    waiting = [prompt for prompt in rows.prompts.values() if prompt.outcome is None]
    queue = [prompt for prompt in waiting if prompt.turn is None]
    queue.sort(key=lambda prompt: prompt.when_busy != "interrupt")
    assert [entry.prompt for entry in state.queue] == queue
    for entry in state.queue:
        assert entry.message == rows.messages[entry.prompt.message_id]
    started = [prompt for prompt in waiting if prompt.turn is not None]
    open_messages = [
        message
        for message in rows.messages.values()
        if isinstance(message, AssistantMessage) and message.time.completed is None
    ]
    if state.turn is None:
        assert not started
        assert all(message.summary for message in open_messages)
    else:
        entries = (state.turn.entry, *state.turn.joined)
        assert sorted(e.prompt.message_id for e in entries) == sorted(
            prompt.message_id for prompt in started
        )
        for entry in entries:
            assert entry.prompt == rows.prompts[entry.prompt.message_id]
            assert entry.message == rows.messages[entry.prompt.message_id]
            assert entry.message.turn == entry.prompt.turn == state.turn.number
    step = state.turn.step if state.turn is not None else None
    summary = state.compaction.summary if state.compaction is not None else None
    known = [s.message for s in (step, summary) if s is not None]
    assert known == open_messages
    for one in (step, summary):
        if one is not None:
            assert list(one.parts.items()) == list(rows.parts[one.message.id].items())
    if state.compaction is None:
        assert not rows.markers()
    else:
        assert rows.markers() == [(state.compaction.part, state.compaction.message)]


def check_nothing_is_stuck(stage: Stage) -> None:
    """What runs outside is exactly what the rows say is open; the rest waits for a person."""
    rows = stage.rows
    asked = {(a.message_id, a.call_id) for a in rows.asks.values() if a.replied is None}
    expected = _open_work(rows, asked)
    assert set(stage.running) == expected, "what runs is not what is open"
    if rows.status.type != "idle":
        assert expected or asked, "busy, and nothing will ever happen"
    for key, effect in stage.running.items():
        if isinstance(effect, RunTool):
            assert effect.part.id == key
        elif isinstance(effect, RunSummary):
            message = rows.messages[key]
            assert isinstance(message, AssistantMessage)
            assert message.parent_id == effect.marker_id


def _open_work(rows: Rows, asked: set[tuple[str | None, str | None]]) -> set[str]:
    """The streams and calls that must have an executor."""
    expected: set[str] = set()
    for message in rows.messages.values():
        if not isinstance(message, AssistantMessage) or message.time.completed is not None:
            continue
        if message.finish is None:
            expected.add(message.id)
        for part in rows.parts[message.id].values():
            if isinstance(part, ToolPart) and isinstance(part.state, ToolRunning):
                expected.add(part.id)
            if isinstance(part, ToolPart) and isinstance(part.state, ToolPending):
                assert (part.message_id, part.call_id) in asked, "a call nobody decides about"
    return expected


def check_request(stage: Stage, message_id: str, effect: RunStep) -> None:
    """A model request pairs calls and results, ends with something to answer, shows its prompt."""
    rows = stage.rows
    turns = context(rows.transcript(), revert=rows.info.revert, before=message_id)
    calls = [
        call.call_id for turn in turns if isinstance(turn, AssistantTurn) for call in turn.calls
    ]
    assert len(calls) == len(set(calls)), "two calls share an id"
    assert turns, "an empty request"
    last = turns[-1]
    assert isinstance(last, UserTurn) or last.calls, "nothing to answer"
    said = "\n".join(
        item.text
        for turn in turns
        if isinstance(turn, UserTurn)
        for item in turn.content
        if isinstance(item, UserText)
    )
    summarised = SUMMARY_HEADING in said
    for prompt in rows.prompts.values():
        if prompt.outcome is None:
            parts = rows.parts[prompt.message_id].values()
            texts = [part.text for part in parts if isinstance(part, TextPart)]
            shown = all(text in said.split("\n") for text in texts)
            assert shown == (prompt.turn is not None) or summarised, "a prompt is not in its place"
    assert effect.prompt == rows.prompts[effect.prompt.message_id]
    if effect.follows is not None:
        assert effect.said is not None, "what was said since is not told"
        first = effect.said[0].id
        shown = conversation(rows.transcript(), revert=rows.info.revert, before=first)
        shown.add(*effect.said)
        assert tuple(shown.turns) == turns, "more was said than by the answer before"


def check_fifo(rows: Rows) -> None:
    """Prompts of a kind start in the order they were accepted."""
    first_starts = list(dict.fromkeys(rows.started))
    accepted = list(rows.prompts)
    for kind in ("queue", "steer", "interrupt"):
        mine = [key for key in first_starts if rows.prompts[key].when_busy == kind]
        assert mine == [key for key in accepted if key in set(mine)], f"{kind} out of order"


def check_settled(stage: Stage) -> None:
    assert stage.rows.status.type == "idle"
    assert all(prompt.outcome is not None for prompt in stage.rows.prompts.values())
    assert not stage.state.queue
    assert not stage.running
