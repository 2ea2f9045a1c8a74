"""Open messages and parts: what may still be written to them, and how each of them ends."""

from __future__ import annotations

from understudy.actors.core.commands import (
    Reason,
    StreamedPart,
)
from understudy.actors.core.draft import Draft, replace
from understudy.actors.core.state import Step
from understudy.store.records import (
    AnyPart,
    AssistantMessage,
    Failure,
    MessageTime,
    Pair,
    ReasoningPart,
    Span,
    TextPart,
    ToolFailed,
    ToolPart,
    ToolPending,
    ToolRunning,
)

INTERRUPTED = "Tool execution was interrupted ({})"

REASONS: dict[Reason, tuple[str, str]] = {
    # reason: (error name on the message, words for people)
    "abort": ("MessageAbortedError", "aborted"),
    "interrupt": ("MessageAbortedError", "interrupted by a newer prompt"),
    "close": ("MessageAbortedError", "runtime closed"),
    "rejected": ("MessageAbortedError", "permission rejected"),
    "restart": ("InterruptedError", "server restart"),
    "crash": ("InterruptedError", "session restarted after a crash"),
    "lost": ("InterruptedError", "execution lost"),
    "timeout": ("TurnTimeoutError", "turn time limit"),
    "error": ("UnknownError", "error"),
}


def failure_of(reason: Reason) -> Failure:
    name, words = REASONS[reason]
    return Failure(name=name, data={"message": words.capitalize(), "reason": reason})


def put_step(d: Draft, step: Step) -> None:
    assert d.turn is not None, "a step belongs to a turn"
    d.turn = replace(d.turn, step=step)


def put_part(d: Draft, part: AnyPart) -> None:
    """Write a part of the turn's open step."""
    assert d.turn is not None and d.turn.step is not None, "a part belongs to an open step"
    step = d.turn.step
    d.put_part(part)
    put_step(d, replace(step, parts={**step.parts, part.id: part}))


def put_texts(d: Draft, step: Step, parts: tuple[StreamedPart, ...]) -> Step:
    """Write what has grown. Late reports change nothing: ended text stays, open text only grows."""
    changed: dict[str, AnyPart] = {}
    for part in parts:
        old = step.parts.get(part.id)
        if isinstance(old, TextPart | ReasoningPart):
            late = not _has_ended(part) and len(part.text) < len(old.text)
            if late or old == part or _has_ended(old):
                continue
        d.put_part(part)
        changed[part.id] = part
    return replace(step, parts={**step.parts, **changed}) if changed else step


def _has_ended(part: StreamedPart) -> bool:
    return isinstance(part.time, Span) and part.time.end is not None


def end_texts(d: Draft, step: Step) -> Step:
    """End the texts of a stream that has ended, also those its last report left out."""
    parts = {part.id: close_part(d, part, "error") for part in step.parts.values()}
    return replace(step, parts=parts)


def complete(
    d: Draft, message: AssistantMessage, *, error: Failure | None = None
) -> AssistantMessage:
    created = message.time.created
    done = replace(
        message,
        time=MessageTime(created=created, completed=max(d.now, created)),
        error=error or message.error,
    )
    d.put_message(done)
    return done


def close_step(d: Draft, step: Step, reason: Reason, failure: Failure | None = None) -> Pair:
    """Finalise an open message and its parts, whatever state they are in."""
    parts = tuple(close_part(d, part, reason) for part in step.parts.values())
    if step.message.time.completed is not None:
        return step.message, parts
    return complete(d, step.message, error=failure or failure_of(reason)), parts


def close_part(d: Draft, part: AnyPart, reason: Reason) -> AnyPart:
    """Give an open part its end; a part that has one is left alone."""
    closed = closed_part(part, reason, d.now)
    if closed is not part:
        d.put_part(closed)
    return closed


def closed_part(part: AnyPart, reason: Reason, now: int) -> AnyPart:
    if isinstance(part, ToolPart) and isinstance(part.state, ToolPending | ToolRunning):
        started = isinstance(part.state, ToolRunning)
        start = part.state.time.start if isinstance(part.state, ToolRunning) else now
        metadata = part.state.metadata if isinstance(part.state, ToolRunning) else {}
        state = ToolFailed(
            input=part.state.input,
            error=INTERRUPTED.format(REASONS[reason][1]),
            time=Span(start=start, end=max(now, start)),
            metadata={**metadata, "interrupted": True, "reason": reason, "started": started},
            interrupted=True,
        )
        return replace(part, state=state)
    if isinstance(part, TextPart | ReasoningPart) and isinstance(part.time, Span):
        start, end = part.time.start, part.time.end
        return replace(part, time=Span(start=start, end=max(now, start))) if end is None else part
    return part
