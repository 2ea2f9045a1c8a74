"""Compaction: one active marker per session, which owns one summary.

A marker is requested → summarising → committed, or failed, or stale. Summary, tail boundary,
marker and follow-up become effective in one change, so there is no moment to crash in between.
"""

from __future__ import annotations

from typing import Literal

from understudy.actors.core import open_parts, prompts, turns
from understudy.actors.core.commands import (
    Reason,
    RequestCompaction,
    StepFailed,
    StepFinished,
    StepProgress,
)
from understudy.actors.core.draft import Draft, replace
from understudy.actors.core.effects import Cancel, RunSummary
from understudy.actors.core.state import Compaction, Entry, Step
from understudy.store.events import MessageRemoved, SessionCompacted, SessionFailed
from understudy.store.records import (
    AssistantMessage,
    CompactionPart,
    Failure,
    MessageTime,
    ModelRef,
    Prompt,
    StepFinishPart,
    StepStartPart,
    TextPart,
    Tokens,
    UserMessage,
)

AGENT = "compaction"
FOLLOW_UP = (
    "The conversation so far was summarised. Continue with what you were asked to do, "
    "or say so if it is done."
)


# --- requests ----------------------------------------------------------------------------------


def request_command(d: Draft, command: RequestCompaction) -> str:
    """A caller's request: runs at once when idle, else after the running turn."""
    prompts.remove_reverted(d, command.reverted)
    marker_id = request(d, auto=command.auto, resume=command.resume, model=command.model)
    if d.turn is None:
        turns.advance(d)
    return marker_id


def request(
    d: Draft,
    *,
    auto: bool,
    resume: bool,
    overflow: bool = False,
    model: ModelRef | None = None,
) -> str:
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
        model=model,
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
    """Request a compaction if the step that just finished passed the limit of ``total`` tokens."""
    if total >= d.rules.usable_tokens:
        make_room(d, resume=resume)
    elif d.info.compaction_failures:
        d.info = replace(d.info, compaction_failures=0)
    d.compacted = False


def make_room(d: Draft, *, resume: bool, overflow: bool = False) -> bool:
    """Request automatic compaction: False if it is off, or has paused after failures."""
    rules = d.rules.compaction
    if d.compacted:
        # The last compaction did not bring the context below the limit: no progress.
        d.compacted = False
        _count_failure(d)
    if not rules.auto or d.info.compaction_failures >= rules.failures:
        return False
    request(d, auto=True, resume=resume, overflow=overflow)
    return True


# --- running -----------------------------------------------------------------------------------


def summarising(d: Draft, message_id: str) -> Step | None:
    """The open summary, if it is this one."""
    summary = d.compaction.summary if d.compaction is not None else None
    return summary if summary is not None and summary.message.id == message_id else None


def start(d: Draft) -> None:
    """Open the marker's summary. It replaces the unfinished one of an earlier attempt."""
    active = d.compaction
    assert active is not None, "only an active marker starts"
    message = active.message
    if message.turn is None:
        message = replace(message, turn=d.turn.number if d.turn is not None else d.next_seq)
        d.put_message(message)
    assert message.turn is not None, "a marker that runs has its place"
    if active.summary is not None:
        d.emit(MessageRemoved(session_id=d.session_id, message_id=active.summary.message.id))
    summary_id = d.new_id("msg")
    marker = replace(
        active.part,
        state="summarising",
        attempts=active.part.attempts + 1,
        summary_id=summary_id,
    )
    model = message.model or d.info.model or d.rules.model
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
    d.start(RunSummary(message_id=summary_id, marker_id=message.id, model=model))


def restart(d: Draft) -> None:
    """Run the marker's summary again, or fail the marker when its attempts are used up."""
    active = d.compaction
    assert active is not None, "only an active marker restarts"
    if active.part.attempts >= d.rules.compaction.attempts + d.rules.limits.resume_attempts:
        _fail(d, _failure("The summary never finished"))
    else:
        start(d)


def summary_progress(d: Draft, command: StepProgress | StepFinished) -> Step:
    active = d.compaction
    assert active is not None and active.summary is not None, "a summary belongs to its marker"
    step = open_parts.put_texts(d, active.summary, command.parts)
    d.compaction = replace(active, summary=step)
    return step


def summary_finished(d: Draft, command: StepFinished) -> None:
    """Commit the compaction, if the summary says something and shrinks the context."""
    active = d.compaction
    assert active is not None, "a summary belongs to its marker"
    step = open_parts.end_texts(d, summary_progress(d, command))
    d.compaction = replace(active, summary=step)
    text = "".join(part.text for part in step.parts.values() if isinstance(part, TextPart))
    if not text.strip():
        _attempt_failed(d, _failure("The summary is empty"))
    elif command.after >= command.before:
        words = f"The summary would not shrink the context ({command.before} tokens)"
        _attempt_failed(d, _failure(words))
    else:
        _commit(d, command, active.part, step.message)


def _commit(
    d: Draft, command: StepFinished, marker: CompactionPart, message: AssistantMessage
) -> None:
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
    commit_marker(d, marker, message.id, command.head_end_id, command.tail_start_id)
    # An automatic compaction has helped when the next step says so, not before.
    failures = d.info.compaction_failures if marker.auto else 0
    tokens, cost = d.info.tokens + command.tokens, d.info.cost + command.cost
    d.put_info(replace(d.info, tokens=tokens, cost=cost, compaction_failures=failures))
    turns.advance(d)


def commit_marker(
    d: Draft,
    marker: CompactionPart,
    summary_id: str,
    head_end_id: str | None,
    tail_start_id: str | None,
) -> None:
    """Make the summary effective, and let the interrupted work go on."""
    d.put_part(
        replace(
            marker,
            state="committed",
            summary_id=summary_id,
            head_end_id=head_end_id,
            tail_start_id=tail_start_id,
        )
    )
    d.emit(
        SessionCompacted(
            session_id=d.session_id, marker_id=marker.message_id, summary_id=summary_id
        )
    )
    d.compaction = None
    d.compacted = True
    if marker.resume:
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
        prompt = Prompt(
            message_id=message.id,
            session_id=d.session_id,
            digest="",
            accepted=d.now,
            when_busy="interrupt",
        )
        prompts.accept_own(d, Entry(prompt, message))


# --- failures ----------------------------------------------------------------------------------


def _failure(words: str) -> Failure:
    return Failure(name="CompactionError", data={"message": words})


def summary_failed(d: Draft, command: StepFailed) -> None:
    _attempt_failed(d, command.failure)


def _attempt_failed(d: Draft, failure: Failure) -> None:
    active = d.compaction
    assert active is not None, "an attempt belongs to an active marker"
    if active.part.attempts < d.rules.compaction.attempts:
        start(d)
    else:
        _fail(d, failure)


def _fail(d: Draft, failure: Failure) -> None:
    """End the marker without touching history, and keep the session usable."""
    active = d.compaction
    assert active is not None, "only an active marker fails"
    _end(d, "error", failure)
    d.emit(SessionFailed(session_id=d.session_id, error=failure))
    _count_failure(d)
    if d.turn is not None and active.part.overflow:
        words = f"The context is full: {failure.message}"
        turns.fail_turn(d, Failure(name="ContextOverflowError", data={"message": words}))
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
        _end(d, reason, open_parts.failure_of(reason))


def abandon_running(d: Draft, reason: Reason) -> None:
    """End a compaction inside a turn that ends; one that waits for its end still runs."""
    if d.compaction is not None and d.compaction.summary is not None:
        abandon(d, reason)


def close_stale(d: Draft) -> None:
    """Close a marker that a newer one, or an answer, has made pointless. Never executed later."""
    _close_marker(d, "stale", "A newer marker or answer made it pointless")


def _end(d: Draft, reason: Reason, failure: Failure) -> None:
    """Make the marker and its summary terminal."""
    active = d.compaction
    assert active is not None, "only an active marker ends"
    if active.summary is not None:
        close_summary(d, active.summary, reason, failure)
    _close_marker(d, "failed", failure.message)


def _close_marker(d: Draft, state: Literal["failed", "stale"], words: str) -> None:
    active = d.compaction
    assert active is not None, "only an active marker ends"
    if active.message.turn is None:
        d.put_message(replace(active.message, turn=d.next_seq))
    d.put_part(replace(active.part, state=state, reason=words))
    d.compaction = None


def close_unreadable(d: Draft, part: CompactionPart, failure: Failure) -> None:
    """Close a marker whose message is gone."""
    if part.active:
        d.put_part(replace(part, state="failed", reason=failure.message))


def close_summary(d: Draft, step: Step, reason: Reason, failure: Failure) -> None:
    """An errored summary is terminal: it has both an error and a finish."""
    message = replace(step.message, finish="error")
    open_parts.close_step(d, replace(step, message=message), reason, failure)
