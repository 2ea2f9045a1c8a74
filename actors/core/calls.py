"""Tool calls: refused, asked about or run; each with one result, in call order."""

from __future__ import annotations

from collections.abc import Container

from understudy.actors.core import asks, open_parts, turns
from understudy.actors.core.commands import (
    CallDraft,
    Reason,
    ToolFinished,
    ToolProgress,
)
from understudy.actors.core.draft import Draft, replace
from understudy.actors.core.effects import RunTool
from understudy.store.records import (
    Span,
    ToolCompleted,
    ToolFailed,
    ToolPart,
    ToolPending,
    ToolRunning,
)


def start_call(d: Draft, call: CallDraft, place: int) -> None:
    """Refuse, ask, or run one call of the answer."""
    turn = d.turn
    assert turn is not None and turn.step is not None, "calls belong to an open step"
    step = turn.step
    last, count = turn.repeats
    count = count + 1 if call.signature == last else 1
    problem = call.problem
    if place >= d.rules.limits.calls_per_step:
        problem = f"Refused: more than {d.rules.limits.calls_per_step} calls in one answer"
    elif count >= d.rules.limits.repeated_calls:
        problem = f"Refused: this exact call was made {count} times in a row. Try another way."
    d.turn = replace(turn, repeats=(call.signature, count))
    base = ToolPart(
        id=call.part_id,
        session_id=d.session_id,
        message_id=step.message.id,
        tool=call.tool,
        call_id=call.call_id,
        state=ToolPending(input=call.input, idempotent=call.idempotent),
    )
    if problem is None:
        action = asks.action_for(d, call.permission, call.patterns)
        if action == "ask":
            open_parts.put_part(d, base)
            asks.ask_before(d, base, call)
        elif action == "allow":
            run_call(d, base)
        else:
            problem = f"Permission denied by rule: {call.permission}"
    if problem is not None:
        refuse_call(d, base, problem)


def refuse_call(d: Draft, part: ToolPart, error: str) -> None:
    """Give a call that has not run its result."""
    state = ToolFailed(input=part.state.input, error=error, time=Span(start=d.now, end=d.now))
    open_parts.put_part(d, replace(part, state=state))


def run_call(d: Draft, part: ToolPart, *, attempt: int = 1) -> None:
    """Commit the call's start, and run it afterwards."""
    assert isinstance(part.state, ToolPending | ToolRunning), "a call runs until it has a result"
    state = ToolRunning(
        input=part.state.input, time=Span(start=d.now), idempotent=part.state.idempotent
    )
    running = replace(part, state=state)
    open_parts.put_part(d, running)
    assert d.turn is not None, "calls belong to a turn"
    quiet = d.info.internal or d.turn.entry.prompt.quiet
    d.start(RunTool(part=running, attempt=attempt, quiet=quiet))


def running_call(d: Draft, part_id: str) -> tuple[ToolPart, ToolRunning] | None:
    """A call of the open step that runs: late reports of any other change nothing."""
    step = d.turn.step if d.turn is not None else None
    part = step.parts.get(part_id) if step is not None else None
    if isinstance(part, ToolPart) and isinstance(part.state, ToolRunning):
        return part, part.state
    return None


def tool_progress(d: Draft, command: ToolProgress) -> None:
    found = running_call(d, command.part_id)
    if found is None:
        return
    part, running = found
    metadata = {**running.metadata, **command.metadata}
    state = replace(running, title=command.title or running.title, metadata=metadata)
    open_parts.put_part(d, replace(part, state=state))


def tool_finished(d: Draft, command: ToolFinished) -> None:
    found = running_call(d, command.part_id)
    if found is None:
        return
    part, running = found
    start = running.time.start
    span = Span(start=start, end=max(d.now, start))
    metadata = {**running.metadata, **command.metadata}
    state: ToolCompleted | ToolFailed
    if command.error is not None:
        state = ToolFailed(
            input=running.input,
            error=command.error,
            time=span,
            metadata=metadata,
            interrupted=command.interrupted,
        )
    else:
        state = ToolCompleted(
            input=running.input,
            output=command.output or "",
            title=command.title or running.title or part.tool,
            metadata=metadata,
            time=span,
        )
    asks.close_of_call(d, part.message_id, part.call_id)
    open_parts.put_part(d, replace(part, state=state))
    turns.settle_step(d)


def interrupt_calls(d: Draft, reason: Reason, *, spare: Container[str] = ()) -> None:
    """Close the open step's calls in flight; those that wait for a person go on waiting."""
    step = d.turn.step if d.turn is not None else None
    assert step is not None, "calls belong to an open step"
    parts = {}
    for part in step.parts.values():
        keep = part.id in spare or asks.is_parked(d, part)
        parts[part.id] = part if keep else open_parts.close_part(d, part, reason)
        if isinstance(part, ToolPart) and not keep:
            asks.close_of_call(d, part.message_id, part.call_id)
    open_parts.put_step(d, replace(step, parts=parts))
