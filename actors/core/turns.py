"""Turns: steps, tool calls, and the one way a turn ends."""

from __future__ import annotations

from typing import TypeGuard

from understudy.store.events import MessageRemoved, PartRemoved, PromptSettled, SessionFailed
from understudy.store.records import (
    AnyPart,
    AssistantMessage,
    Failure,
    MessageTime,
    Outcome,
    ReasoningPart,
    RetryPart,
    Span,
    Status,
    StepFinishPart,
    StepStartPart,
    TextPart,
    Tokens,
    ToolCompleted,
    ToolFailed,
    ToolPart,
    ToolPending,
    ToolRunning,
)

from . import asks, compaction, prompts
from .commands import (
    CallDraft,
    ExecutionLost,
    Reason,
    StepFailed,
    StepFinished,
    StepProgress,
    StepRetrying,
    StreamedPart,
    ToolFinished,
    ToolProgress,
)
from .draft import Draft, replace
from .effects import Cancel, RunStep, RunTool
from .state import Step, Turn

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


# --- steps -------------------------------------------------------------------------------------


def open_step(d: Draft, turn: Turn, *, delay_s: float = 0.0) -> None:
    """Start the turn's next model call."""
    model = turn.entry.message.model or d.info.model or d.rules.model
    message = AssistantMessage(
        id=d.new_id("msg"),
        session_id=d.session_id,
        parent_id=turn.entry.prompt.message_id,
        turn=turn.number,
        time=MessageTime(created=d.now),
        tokens=Tokens(),
        agent=turn.entry.message.agent or d.info.agent or d.rules.agent,
        mode=turn.entry.message.agent or d.info.agent or d.rules.agent,
        provider_id=model.provider_id,
        model_id=model.model_id,
    )
    start = StepStartPart(id=d.new_id("prt"), session_id=d.session_id, message_id=message.id)
    d.set_busy()
    d.put_message(message)
    d.put_part(start)
    d.turn = replace(turn, step=Step(message, {start.id: start}))
    d.start(RunStep(message_id=message.id, prompt=turn.entry.prompt, delay_s=delay_s))


def step_progress(d: Draft, command: StepProgress) -> None:
    if d.compaction is not None and is_open(d.compaction.summary, command.message_id):
        step = _put_texts(d, d.compaction.summary, command.parts)
        d.compaction = replace(d.compaction, summary=step)
        d.set_busy()
    elif d.turn is not None and is_open(d.turn.step, command.message_id):
        d.turn = replace(d.turn, step=_put_texts(d, d.turn.step, command.parts))
        d.set_busy()


def step_retrying(d: Draft, command: StepRetrying) -> None:
    summary = d.compaction.summary if d.compaction is not None else None
    step = d.turn.step if d.turn is not None else None
    if not is_open(summary, command.message_id) and not is_open(step, command.message_id):
        return
    if d.turn is not None and is_open(step, command.message_id):
        part = RetryPart(
            id=d.new_id("prt"),
            session_id=d.session_id,
            message_id=command.message_id,
            attempt=command.attempt,
            error=command.failure,
            time=MessageTime(created=d.now),
        )
        d.turn = replace(d.turn, step=put_part(d, step, part))
    d.set_status(
        Status(
            type="retry",
            attempt=command.attempt,
            message=command.failure.message,
            next=command.next_ms,
        )
    )


def step_finished(d: Draft, command: StepFinished) -> None:
    if d.compaction is not None and is_open(d.compaction.summary, command.message_id):
        compaction.summary_finished(d, command)
        return
    turn = d.turn
    if turn is None or not is_open(turn.step, command.message_id):
        return
    if turn.step.message.finish is not None:
        return
    d.set_busy()
    step = _put_texts(d, turn.step, command.parts)
    # A crash from here on leaves a message whose calls are known: ``finish`` says so.
    message = replace(
        step.message,
        finish="tool-calls" if command.calls else command.finish,
        tokens=command.tokens,
        cost=command.cost,
    )
    if command.calls:
        d.put_message(message)
    d.turn = replace(turn, step=replace(step, message=message), failures=0)
    for place, call in enumerate(command.calls):
        _start_call(d, call, place)
    if d.turn is not None:
        settle_step(d)


def _start_call(d: Draft, call: CallDraft, place: int) -> None:
    """Refuse, ask, or run one call of the answer."""
    turn = d.turn
    assert turn is not None and turn.step is not None, "calls belong to an open step"
    last, count = turn.repeats
    count = count + 1 if call.signature == last else 1
    problem = call.problem
    if place >= d.rules.limits.calls_per_step:
        problem = f"Refused: more than {d.rules.limits.calls_per_step} calls in one answer"
    elif count >= d.rules.limits.repeated_calls:
        problem = f"Refused: this exact call was made {count} times in a row. Try another way."
    d.turn = turn = replace(turn, repeats=(call.signature, count))
    base = ToolPart(
        id=call.part_id,
        session_id=d.session_id,
        message_id=turn.step.message.id,
        tool=call.tool,
        call_id=call.call_id,
        state=ToolPending(input=call.input, idempotent=call.idempotent),
    )
    if problem is None:
        action = asks.action_for(d, call.permission, call.patterns)
        if action == "deny":
            problem = f"Permission denied by rule: {call.permission}"
        elif action == "ask":
            d.turn = replace(turn, step=put_part(d, turn.step, base))
            asks.ask_before(d, base, call)
            return
    if problem is not None:
        state = ToolFailed(input=call.input, error=problem, time=Span(start=d.now, end=d.now))
        d.turn = replace(turn, step=put_part(d, turn.step, replace(base, state=state)))
        return
    d.turn = replace(turn, step=put_part(d, turn.step, base, publish=False))
    run_call(d, base)


def run_call(d: Draft, part: ToolPart, *, attempt: int = 1) -> None:
    """Commit the call's start, and run it afterwards."""
    assert d.turn is not None and d.turn.step is not None, "calls belong to an open step"
    state = ToolRunning(
        input=part.state.input,
        time=Span(start=d.now),
        idempotent=isinstance(part.state, ToolPending | ToolRunning) and part.state.idempotent,
    )
    running = replace(part, state=state)
    d.turn = replace(d.turn, step=put_part(d, d.turn.step, running))
    d.start(RunTool(part=running, attempt=attempt))


def tool_progress(d: Draft, command: ToolProgress) -> None:
    step = d.turn.step if d.turn is not None else None
    part = step.parts.get(command.part_id) if step is not None else None
    if d.turn is None or not isinstance(part, ToolPart) or not isinstance(part.state, ToolRunning):
        return
    state = replace(
        part.state,
        title=command.title or part.state.title,
        metadata={**part.state.metadata, **command.metadata},
    )
    d.turn = replace(d.turn, step=put_part(d, step, replace(part, state=state)))


def tool_finished(d: Draft, command: ToolFinished) -> None:
    step = d.turn.step if d.turn is not None else None
    part = step.parts.get(command.part_id) if step is not None else None
    if d.turn is None or not isinstance(part, ToolPart) or not isinstance(part.state, ToolRunning):
        return
    start = part.state.time.start
    span = Span(start=start, end=max(d.now, start))
    state: ToolCompleted | ToolFailed
    if command.error is not None:
        state = ToolFailed(
            input=part.state.input,
            error=command.error,
            time=span,
            metadata={**part.state.metadata, **command.metadata},
            interrupted=command.interrupted,
        )
    else:
        state = ToolCompleted(
            input=part.state.input,
            output=command.output or "",
            title=command.title or part.state.title or part.tool,
            metadata={**part.state.metadata, **command.metadata},
            time=span,
        )
    asks.close_of_call(d, part.message_id, part.call_id)
    d.turn = replace(d.turn, step=put_part(d, step, replace(part, state=state)))
    settle_step(d)


def settle_step(d: Draft) -> None:
    """Complete the step once the stream has ended and every call has its result."""
    turn = d.turn
    if turn is None or turn.step is None or turn.step.message.finish is None:
        return
    calls = [part for part in turn.step.parts.values() if isinstance(part, ToolPart)]
    if any(isinstance(part.state, ToolPending | ToolRunning) for part in calls):
        return
    message = turn.step.message
    finish = StepFinishPart(
        id=d.new_id("prt"),
        session_id=d.session_id,
        message_id=message.id,
        reason=message.finish or "other",
        tokens=message.tokens,
        cost=message.cost,
    )
    d.put_part(finish)
    _complete(d, message)
    d.info = replace(d.info, tokens=d.info.tokens + message.tokens, cost=d.info.cost + message.cost)
    turn = replace(turn, step=None, steps=turn.steps + 1)
    d.turn = turn
    if turn.repeats[1] >= 2 * d.rules.limits.repeated_calls:
        fail_turn(
            d, "RepeatedCallError", f"The same call was made {turn.repeats[1]} times in a row"
        )
        return
    more = bool(calls)
    compaction.after_step(d, message.tokens.total, resume=more or prompts.steering(d))
    turn = replace(turn, compacted=False)
    d.turn = turn
    if more and turn.steps >= d.rules.limits.steps:
        fail_turn(d, "StepLimitError", f"No answer within {d.rules.limits.steps} steps")
    elif more or prompts.steering(d):
        advance(d)
    else:
        end_turn(d, "answered", reply_id=message.id)


def _complete(
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


def step_failed(d: Draft, command: StepFailed) -> None:
    if d.compaction is not None and is_open(d.compaction.summary, command.message_id):
        compaction.summary_failed(d, command)
        return
    turn = d.turn
    if turn is None or not is_open(turn.step, command.message_id):
        return
    step = _put_texts(d, turn.step, command.parts)
    turn = replace(turn, step=step)
    if command.overflow and not turn.compacted and compaction.may_run(d):
        _discard(d, step)
        d.turn = replace(turn, step=None)
        compaction.request(d, auto=True, resume=True, overflow=True)
        advance(d)
        return
    if command.transient and turn.failures + 1 < d.rules.limits.model_attempts:
        close_step(d, step, "error", command.failure)
        turn = replace(turn, step=None, failures=turn.failures + 1)
        open_step(d, turn, delay_s=min(30.0, 0.5 * 2.0**turn.failures))
        return
    d.turn = turn
    fail_turn(d, command.failure.name, command.failure.message, command.failure)


def _discard(d: Draft, step: Step) -> None:
    """Take an answer that never began out of the transcript."""
    for part in step.parts.values():
        d.emit(PartRemoved(session_id=d.session_id, message_id=step.message.id, part_id=part.id))
    d.emit(MessageRemoved(session_id=d.session_id, message_id=step.message.id))


# --- ends --------------------------------------------------------------------------------------


def fail_turn(d: Draft, name: str, message: str, failure: Failure | None = None) -> None:
    failure = failure or Failure(name=name, data={"message": message})
    d.emit(SessionFailed(session_id=d.session_id, error=failure))
    close_turn(d, "error", failure=failure, outcome="failed")
    advance(d)


def close_turn(
    d: Draft,
    reason: Reason,
    *,
    failure: Failure | None = None,
    outcome: Outcome = "interrupted",
) -> None:
    """End the running turn early: the same for abort, error, restart, crash and close.

    Every open part and message is finalised, what waits for a person is closed, the prompt gets
    its outcome, and whatever runs is cancelled. Only the reason differs.
    """
    turn = d.turn
    if turn is None:
        return
    d.start(Cancel(reason=reason))
    if turn.step is not None:
        close_step(d, turn.step, reason, failure)
    asks.close_all(d)
    reply_id = turn.step.message.id if turn.step is not None else None
    d.turn = replace(turn, step=None)
    words = failure.message if failure is not None else REASONS[reason][1]
    end_turn(d, outcome, reason=reason if failure is None else words, reply_id=reply_id, go=False)


def close_step(d: Draft, step: Step, reason: Reason, failure: Failure | None = None) -> None:
    """Finalise an open message and its parts, whatever state they are in."""
    for part in step.parts.values():
        close_part(d, part, reason)
    if step.message.time.completed is None:
        _complete(d, step.message, error=failure or failure_of(reason))


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
    if isinstance(part, TextPart | ReasoningPart):
        if isinstance(part.time, Span) and part.time.end is None:
            end = max(now, part.time.start)
            return replace(part, time=Span(start=part.time.start, end=end))
    return part


def end_turn(
    d: Draft,
    outcome: Outcome,
    *,
    reason: str | None = None,
    reply_id: str | None = None,
    go: bool = True,
) -> None:
    """Give the turn's prompts their one outcome, and go on with what waits."""
    turn = d.turn
    assert turn is not None, "only a running turn ends"
    for entry in (turn.entry, *turn.joined):
        prompt = replace(entry.prompt, outcome=outcome, reason=reason, reply_id=reply_id)
        d.emit(PromptSettled(session_id=d.session_id, info=prompt))
    d.turn = None
    d.put_info(d.info)
    if go:
        advance(d)


def advance(d: Draft) -> None:
    """Start whatever comes next. Called when no stream and no tool of this session runs."""
    turn = d.turn
    pending = d.compaction
    if pending is not None and pending.summary is not None:
        return
    if turn is not None:
        if pending is not None and pending.part.auto:
            compaction.start(d)
        else:
            open_step(d, prompts.join_steering(d, turn))
    elif pending is not None:
        compaction.start(d)
    elif d.queue:
        entry, d.queue = d.queue[0], d.queue[1:]
        prompts.start_turn(d, entry)
    else:
        d.set_idle()


def execution_lost(d: Draft, command: ExecutionLost) -> None:
    """Close what nobody works on any more, as recovery would."""
    if d.compaction is not None and is_open(d.compaction.summary, command.message_id):
        compaction.restart(d)
    elif d.turn is not None and is_open(d.turn.step, command.message_id):
        close_turn(d, "lost")
        advance(d)


# --- parts of an open step ---------------------------------------------------------------------


def is_open(step: Step | None, message_id: str) -> TypeGuard[Step]:
    return step is not None and step.message.id == message_id


def put_part(d: Draft, step: Step | None, part: AnyPart, *, publish: bool = True) -> Step:
    assert step is not None, "a part belongs to an open step"
    if publish:
        d.put_part(part)
    return replace(step, parts={**step.parts, part.id: part})


def _put_texts(d: Draft, step: Step | None, parts: tuple[StreamedPart, ...]) -> Step:
    assert step is not None, "text belongs to an open step"
    changed: dict[str, AnyPart] = {}
    for part in parts:
        if step.parts.get(part.id) != part:
            d.put_part(part)
            changed[part.id] = part
    return replace(step, parts={**step.parts, **changed}) if changed else step
