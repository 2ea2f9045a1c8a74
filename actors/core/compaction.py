"""Compaction: one active marker per session, which owns one summary.

A marker is requested → summarising → committed, or failed, or stale. Summary, tail boundary,
marker and follow-up become effective in one change, so there is no moment to crash in between.
"""

from __future__ import annotations

from understudy.store.events import PartRemoved, SessionCompacted, SessionFailed
from understudy.store.records import (
    AssistantMessage,
    CompactionPart,
    Failure,
    MessageTime,
    Prompt,
    StepFinishPart,
    StepStartPart,
    TextPart,
    Tokens,
    UserMessage,
)

from . import prompts, turns
from .commands import Reason, RequestCompaction, StepFailed, StepFinished
from .draft import Draft, replace
from .effects import Cancel, RunSummary
from .state import Compaction, Entry, Step

AGENT = "compaction"
FOLLOW_UP = (
    "The conversation so far was summarised. Continue with what you were asked to do, "
    "or say so if it is done."
)


# --- requests ----------------------------------------------------------------------------------


def may_run(d: Draft) -> bool:
    """Whether automatic compaction is on and has not paused after failures."""
    rules = d.rules.compaction
    return rules.auto and d.info.compaction_failures < rules.failures


def request_command(d: Draft, command: RequestCompaction) -> str:
    """A caller's request: runs at once when idle, else after the running turn."""
    marker_id = request(d, auto=command.auto, resume=command.resume)
    if d.turn is None or (d.turn.step is None and command.auto):
        turns.advance(d)
    return marker_id


def request(d: Draft, *, auto: bool, resume: bool, overflow: bool = False) -> str:
    """The active marker's id: a new one, or the one that is there with the intents united."""
    active = d.compaction
    if active is not None:
        part = replace(
            active.part,
            auto=active.part.auto or auto,
            resume=active.part.resume or resume,
            overflow=active.part.overflow or overflow,
        )
        if part != active.part:
            d.put_part(part)
            d.compaction = replace(active, part=part)
        return active.message.id
    message = UserMessage(
        id=d.new_id("msg"),
        session_id=d.session_id,
        time=MessageTime(created=d.now),
        agent=AGENT,
        synthetic=True,
    )
    part = CompactionPart(
        id=d.new_id("prt"),
        session_id=d.session_id,
        message_id=message.id,
        auto=auto,
        resume=resume,
        overflow=overflow,
    )
    d.put_message(message)
    d.put_part(part)
    d.compaction = Compaction(part, message)
    return message.id


def after_step(d: Draft, total: int, *, resume: bool) -> None:
    """Request a compaction when the step that just finished passed the limit."""
    turn = d.turn
    assert turn is not None, "a step belongs to a turn"
    if total < d.rules.usable_tokens:
        return
    if turn.compacted:
        # The last compaction did not bring the context below the limit: no progress.
        _count_failure(d)
    if may_run(d):
        request(d, auto=True, resume=resume)


# --- running -----------------------------------------------------------------------------------


def start(d: Draft) -> None:
    """Open the marker's summary; the unfinished one of an earlier attempt is used again."""
    active = d.compaction
    assert active is not None, "only an active marker starts"
    message = active.message
    if message.turn is None:
        message = replace(message, turn=d.turn.number if d.turn is not None else d.next_seq)
        d.put_message(message)
    assert message.turn is not None
    summary_id = active.part.summary_id or d.new_id("msg")
    if active.summary is not None:
        for part in active.summary.parts.values():
            d.emit(PartRemoved(session_id=d.session_id, message_id=summary_id, part_id=part.id))
    marker = replace(
        active.part,
        state="summarising",
        attempts=active.part.attempts + 1,
        summary_id=summary_id,
    )
    model = d.info.model or d.rules.model
    summary = AssistantMessage(
        id=summary_id,
        session_id=d.session_id,
        parent_id=message.id,
        turn=message.turn,
        time=MessageTime(created=d.now),
        tokens=Tokens(),
        agent=AGENT,
        mode=AGENT,
        provider_id=model.provider_id,
        model_id=model.model_id,
        summary=True,
    )
    begin = StepStartPart(id=d.new_id("prt"), session_id=d.session_id, message_id=summary_id)
    d.put_part(marker)
    d.set_busy()
    d.put_message(summary)
    d.put_part(begin)
    d.compaction = Compaction(marker, message, Step(summary, {begin.id: begin}))
    d.start(RunSummary(message_id=summary_id, marker_id=message.id))


def restart(d: Draft) -> None:
    """Run the marker's summary again, or fail the marker when its attempts are used up."""
    active = d.compaction
    assert active is not None, "only an active marker restarts"
    if active.part.attempts >= d.rules.compaction.attempts + d.rules.limits.resume_attempts:
        _fail(d, Failure(name="CompactionError", data={"message": "The summary never finished"}))
    else:
        start(d)


def summary_finished(d: Draft, command: StepFinished) -> None:
    """Commit the compaction, if the summary says something and shrinks the context."""
    text = "".join(part.text for part in command.parts if isinstance(part, TextPart))
    if not text.strip():
        _attempt_failed(d, "The summary is empty")
    elif command.after >= command.before:
        _attempt_failed(d, f"The summary would not shrink the context ({command.before} tokens)")
    else:
        _commit(d, command)


def _commit(d: Draft, command: StepFinished) -> None:
    active = d.compaction
    assert active is not None and active.summary is not None, "a summary belongs to its marker"
    for part in command.parts:
        d.put_part(part)
    message = active.summary.message
    d.put_part(
        StepFinishPart(
            id=d.new_id("prt"),
            session_id=d.session_id,
            message_id=message.id,
            reason="stop",
            tokens=command.tokens,
            cost=command.cost,
        )
    )
    created = message.time.created
    d.put_message(
        replace(
            message,
            finish="stop",
            tokens=command.tokens,
            cost=command.cost,
            time=MessageTime(created=created, completed=max(d.now, created)),
        )
    )
    commit_marker(
        d,
        replace(
            active.part,
            head_end_id=command.head_end_id,
            tail_start_id=command.tail_start_id,
        ),
        message.id,
    )
    d.put_info(
        replace(
            d.info,
            tokens=d.info.tokens + command.tokens,
            cost=d.info.cost + command.cost,
            compaction_failures=0,
        )
    )
    turns.advance(d)


def commit_marker(d: Draft, part: CompactionPart, summary_id: str) -> None:
    """Make the summary effective, and let the interrupted work go on."""
    d.put_part(replace(part, state="committed", summary_id=summary_id))
    d.emit(
        SessionCompacted(session_id=d.session_id, marker_id=part.message_id, summary_id=summary_id)
    )
    d.compaction = None
    if d.turn is not None:
        d.turn = replace(d.turn, compacted=True)
    if part.resume:
        _follow_up(d)


def _follow_up(d: Draft) -> None:
    """Ask the model to go on: inside the running turn, or as a prompt of its own."""
    turn = d.turn
    message = UserMessage(
        id=d.new_id("msg"),
        session_id=d.session_id,
        time=MessageTime(created=d.now),
        turn=turn.number if turn is not None else None,
        synthetic=True,
    )
    text = TextPart(
        id=d.new_id("prt"),
        session_id=d.session_id,
        message_id=message.id,
        text=FOLLOW_UP,
        synthetic=True,
    )
    d.put_message(message)
    d.put_part(text)
    if turn is None:
        prompt = Prompt(message_id=message.id, session_id=d.session_id, digest="", accepted=d.now)
        prompts.accept_own(d, Entry(prompt, message))


# --- failures ----------------------------------------------------------------------------------


def summary_failed(d: Draft, command: StepFailed) -> None:
    _attempt_failed(d, command.failure.message, command.failure)


def _attempt_failed(d: Draft, words: str, failure: Failure | None = None) -> None:
    active = d.compaction
    assert active is not None, "an attempt belongs to an active marker"
    if active.part.attempts < d.rules.compaction.attempts:
        start(d)
    else:
        _fail(d, failure or Failure(name="CompactionError", data={"message": words}))


def _fail(d: Draft, failure: Failure) -> None:
    """End the marker without touching history, and keep the session usable."""
    active = d.compaction
    assert active is not None, "only an active marker fails"
    _end(d, "error", failure)
    d.emit(SessionFailed(session_id=d.session_id, error=failure))
    _count_failure(d)
    if d.turn is not None and active.part.overflow:
        turns.fail_turn(d, "ContextOverflowError", f"The context is full: {failure.message}")
    else:
        turns.advance(d)


def _count_failure(d: Draft) -> None:
    failures = d.info.compaction_failures + 1
    d.put_info(replace(d.info, compaction_failures=failures))
    if failures == d.rules.compaction.failures:
        words = f"Automatic compaction is paused after {failures} failures in a row"
        d.emit(
            SessionFailed(
                session_id=d.session_id,
                error=Failure(name="CompactionPaused", data={"message": words}),
            )
        )


def abandon(d: Draft, reason: Reason) -> None:
    """End the active marker because its session was aborted or reverted."""
    if d.compaction is not None:
        d.start(Cancel(reason=reason))
        _end(d, reason, turns.failure_of(reason))


def _end(d: Draft, reason: Reason, failure: Failure) -> None:
    """Make the marker and its summary terminal."""
    active = d.compaction
    assert active is not None, "only an active marker ends"
    if active.summary is not None:
        close_summary(d, active.summary, reason, failure)
    message = active.message
    if message.turn is None:
        d.put_message(replace(message, turn=d.next_seq))
    d.put_part(replace(active.part, state="failed", reason=failure.message))
    d.compaction = None


def close_summary(d: Draft, step: Step, reason: Reason, failure: Failure) -> None:
    """An errored summary is terminal: it has both an error and a finish."""
    message = replace(step.message, finish="error")
    turns.close_step(d, replace(step, message=message), reason, failure)
