"""Turns: steps, tool calls, and the one way a turn ends."""

from __future__ import annotations

from collections.abc import Container

from understudy.actors.core import asks, compaction, prompts
from understudy.actors.core.commands import (
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
from understudy.actors.core.context import distinct_id
from understudy.actors.core.draft import Draft, replace
from understudy.actors.core.effects import Cancel, RunStep, RunTool
from understudy.actors.core.state import Step, Turn
from understudy.store.events import MessageRemoved, PromptSettled, SessionFailed
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


def streaming(d: Draft, message_id: str) -> Step | None:
    """The turn's step, if this is the model call it waits for: late reports change nothing."""
    step = d.turn.step if d.turn is not None else None
    if step is None or step.message.id != message_id or step.message.finish is not None:
        return None
    return step


def step_progress(d: Draft, command: StepProgress) -> None:
    if compaction.summarising(d, command.message_id):
        compaction.summary_progress(d, command)
    elif step := streaming(d, command.message_id):
        _put_step(d, put_texts(d, step, command.parts))
    else:
        return
    d.set_busy()


def step_retrying(d: Draft, command: StepRetrying) -> None:
    if step := streaming(d, command.message_id):
        part = RetryPart(
            id=d.new_id("prt"),
            session_id=d.session_id,
            message_id=command.message_id,
            attempt=command.attempt,
            error=command.failure,
            time=MessageTime(created=d.now),
        )
        _put_step(d, put_part(d, step, part))
    elif not compaction.summarising(d, command.message_id):
        return
    d.set_status(
        Status(
            type="retry",
            attempt=command.attempt,
            message=command.failure.message,
            next=command.next_ms,
        )
    )


def step_finished(d: Draft, command: StepFinished) -> None:
    if compaction.summarising(d, command.message_id):
        compaction.summary_finished(d, command)
        return
    step = streaming(d, command.message_id)
    if d.turn is None or step is None:
        return
    d.set_busy()
    step = end_texts(d, put_texts(d, step, command.parts))
    # A crash from here on leaves a message whose calls are known: ``finish`` says so.
    message = replace(
        step.message,
        finish="tool-calls" if command.calls else command.finish,
        tokens=command.tokens,
        cost=command.cost,
    )
    if command.calls:
        d.put_message(message)
    d.turn = replace(d.turn, step=replace(step, message=message), failures=0)
    taken: dict[str, int] = {}
    for place, call in enumerate(command.calls):
        # Results and asks are told apart by the call's id, and models repeat them.
        call_id = distinct_id(call.call_id or call.part_id, taken)
        _start_call(d, replace(call, call_id=call_id), place)
    settle_step(d)


def _start_call(d: Draft, call: CallDraft, place: int) -> None:
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
        if action == "deny":
            problem = f"Permission denied by rule: {call.permission}"
        elif action == "ask":
            _put_step(d, put_part(d, step, base))
            asks.ask_before(d, base, call)
            return
    if problem is not None:
        state = ToolFailed(input=call.input, error=problem, time=Span(start=d.now, end=d.now))
        _put_step(d, put_part(d, step, replace(base, state=state)))
        return
    _put_step(d, put_part(d, step, base, publish=False))
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
    _count(d, message)
    turn = d.turn = replace(turn, step=None, steps=turn.steps + 1)
    more = bool(calls) or prompts.steering(d)
    failure = _limit_passed(d, turn, more=bool(calls))
    compaction.after_step(d, message.tokens.total, resume=more and failure is None)
    if failure is not None:
        fail_turn(d, failure)
    elif more:
        d.put_info(d.info)
        advance(d)
    else:
        end_turn(d, "answered", reply_id=message.id)
        advance(d)


def _limit_passed(d: Draft, turn: Turn, *, more: bool) -> Failure | None:
    limits = d.rules.limits
    if turn.repeats[1] >= 2 * limits.repeated_calls:
        words = f"The same call was made {turn.repeats[1]} times in a row"
        return Failure(name="RepeatedCallError", data={"message": words})
    if more and turn.steps >= limits.steps:
        words = f"No answer within {limits.steps} steps"
        return Failure(name="StepLimitError", data={"message": words})
    return None


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


def _count(d: Draft, message: AssistantMessage) -> None:
    """Add what a step has used to its session's; published with the turn's next change of it."""
    tokens, cost = d.info.tokens + message.tokens, d.info.cost + message.cost
    d.info = replace(d.info, tokens=tokens, cost=cost)


def step_failed(d: Draft, command: StepFailed) -> None:
    if compaction.summarising(d, command.message_id):
        compaction.summary_failed(d, command)
        return
    turn, step = d.turn, streaming(d, command.message_id)
    if turn is None or step is None:
        return
    step = put_texts(d, step, command.parts)
    turn = d.turn = replace(turn, step=step)
    if command.overflow and compaction.make_room(d, resume=True, overflow=True):
        _take_back(d, step, command.failure)
        d.turn = replace(turn, step=None)
        advance(d)
    elif command.transient and turn.failures + 1 < d.rules.limits.model_attempts:
        close_step(d, step, "error", command.failure)
        d.turn = replace(turn, step=None, failures=turn.failures + 1)
        advance(d, delay_s=min(30.0, 0.5 * 2.0**turn.failures))
    else:
        fail_turn(d, command.failure)


def _take_back(d: Draft, step: Step, failure: Failure) -> None:
    """Take an answer that never began out of the transcript; what was said stays."""
    if any(isinstance(part, TextPart | ReasoningPart) for part in step.parts.values()):
        close_step(d, step, "error", failure)
    else:
        d.emit(MessageRemoved(session_id=d.session_id, message_id=step.message.id))


# --- ends --------------------------------------------------------------------------------------


def fail_turn(d: Draft, failure: Failure) -> None:
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
        _count(d, turn.step.message)
    asks.close_all(d)
    reply_id = turn.step.message.id if turn.step is not None else None
    d.turn = replace(turn, step=None)
    words = failure.message if failure is not None else REASONS[reason][1]
    end_turn(d, outcome, reason=reason if failure is None else words, reply_id=reply_id)


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
    if isinstance(part, TextPart | ReasoningPart) and isinstance(part.time, Span):
        start, end = part.time.start, part.time.end
        return replace(part, time=Span(start=start, end=max(now, start))) if end is None else part
    return part


def interrupt_calls(d: Draft, reason: Reason, *, spare: Container[str] = ()) -> None:
    """Close the open step's calls in flight; those that wait for a person go on waiting."""
    step = d.turn.step if d.turn is not None else None
    assert step is not None, "calls belong to an open step"
    parts = {}
    for part in step.parts.values():
        keep = part.id in spare or asks.is_parked(d, part)
        parts[part.id] = part if keep else close_part(d, part, reason)
        if isinstance(part, ToolPart) and not keep:
            asks.close_of_call(d, part.message_id, part.call_id)
    _put_step(d, replace(step, parts=parts))


def end_turn(
    d: Draft, outcome: Outcome, *, reason: str | None = None, reply_id: str | None = None
) -> None:
    """Give the turn's prompts their one outcome."""
    turn = d.turn
    assert turn is not None, "only a running turn ends"
    for entry in (turn.entry, *turn.joined):
        prompt = replace(entry.prompt, outcome=outcome, reason=reason, reply_id=reply_id)
        d.emit(PromptSettled(session_id=d.session_id, info=prompt))
    d.turn = None
    d.put_info(d.info)


def advance(d: Draft, *, delay_s: float = 0.0) -> None:
    """Start whatever comes next, unless a stream or a tool is at work already."""
    turn, pending = d.turn, d.compaction
    if (turn is not None and turn.step is not None) or (
        pending is not None and pending.summary is not None
    ):
        return
    if turn is not None and (pending is None or not pending.part.auto):
        open_step(d, prompts.join_steering(d, turn), delay_s=delay_s)
    elif pending is not None:
        compaction.start(d)
    elif d.queue:
        prompts.start_turn(d)
    else:
        d.set_idle()


def execution_lost(d: Draft, command: ExecutionLost) -> None:
    """Close what nobody works on any more, as recovery would."""
    step = d.turn.step if d.turn is not None else None
    if compaction.summarising(d, command.message_id):
        d.start(Cancel(reason="lost"))
        compaction.restart(d)
    elif step is None or step.message.id != command.message_id:
        return
    elif any(asks.is_parked(d, part) for part in step.parts.values()):
        d.start(Cancel(reason="lost"))
        interrupt_calls(d, "lost")
    else:
        close_turn(d, "lost")
        advance(d)


# --- parts of an open step ---------------------------------------------------------------------


def put_part(d: Draft, step: Step | None, part: AnyPart, *, publish: bool = True) -> Step:
    assert step is not None, "a part belongs to an open step"
    if publish:
        d.put_part(part)
    return replace(step, parts={**step.parts, part.id: part})


def _put_step(d: Draft, step: Step) -> None:
    assert d.turn is not None, "a step belongs to a turn"
    d.turn = replace(d.turn, step=step)


def put_texts(d: Draft, step: Step, parts: tuple[StreamedPart, ...]) -> Step:
    """Write what has grown. Reports may come late or twice: text never shrinks or opens again."""
    changed: dict[str, AnyPart] = {}
    for part in parts:
        old = step.parts.get(part.id)
        if isinstance(old, TextPart | ReasoningPart):
            ended = isinstance(old.time, Span) and old.time.end is not None
            if ended or old == part or len(part.text) < len(old.text):
                continue
        d.put_part(part)
        changed[part.id] = part
    return replace(step, parts={**step.parts, **changed}) if changed else step


def end_texts(d: Draft, step: Step) -> Step:
    """End the texts of a stream that has ended, also those its last report left out."""
    parts = {part.id: close_part(d, part, "error") for part in step.parts.values()}
    return replace(step, parts=parts)
