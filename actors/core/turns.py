"""Turns: model calls in steps, and the one way a turn ends."""

from __future__ import annotations

from typing import Final

from understudy.actors.core import asks, calls, compaction, open_parts, prompts
from understudy.actors.core.commands import (
    ExecutionLost,
    Reason,
    StepFailed,
    StepFinished,
    StepProgress,
    StepRetrying,
)
from understudy.actors.core.context import distinct_id
from understudy.actors.core.draft import Draft, replace
from understudy.actors.core.effects import Answered, Cancel, RunStep
from understudy.actors.core.state import Step, Turn
from understudy.store.events import MessageRemoved, PromptSettled, SessionFailed
from understudy.store.records import (
    IDLE,
    AssistantMessage,
    Failure,
    MessageTime,
    Outcome,
    Pair,
    ReasoningPart,
    RetryPart,
    Status,
    StepFinishPart,
    StepStartPart,
    TextPart,
    Tokens,
    ToolPart,
    ToolPending,
    ToolRunning,
)

SAID_MOST: Final = 12
"""Messages that a running turn remembers of itself; the reply of a longer one is read."""

# --- steps -------------------------------------------------------------------------------------


def open_step(
    d: Draft,
    turn: Turn,
    *,
    follows: str | None = None,
    said: Pair | None = None,
    delay_s: float = 0.0,
) -> None:
    """Start the turn's next model call; see ``RunStep`` for ``follows`` and ``said``."""
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
    d.start(
        RunStep(
            message_id=message.id,
            prompt=turn.entry.prompt,
            model=model,
            follows=follows,
            said=said,
            delay_s=delay_s,
        )
    )


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
        open_parts.put_step(d, open_parts.put_texts(d, step, command.parts))
    else:
        return
    d.set_busy()


def step_retrying(d: Draft, command: StepRetrying) -> None:
    step = streaming(d, command.message_id)
    if step is not None:
        if any(type(part) not in (StepStartPart, RetryPart) for part in step.parts.values()):
            return  # late: the next attempt has begun to answer
        part = RetryPart(
            id=d.new_id("prt"),
            session_id=d.session_id,
            message_id=command.message_id,
            attempt=command.attempt,
            error=command.failure,
            time=MessageTime(created=d.now),
        )
        open_parts.put_part(d, part)
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
    step = open_parts.end_texts(d, open_parts.put_texts(d, step, command.parts))
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
        calls.start_call(d, replace(call, call_id=call_id), place)
    settle_step(d)


def settle_step(d: Draft) -> None:
    """Complete the step once the stream has ended and every call has its result."""
    turn = d.turn
    if turn is None or turn.step is None or turn.step.message.finish is None:
        return
    made = [part for part in turn.step.parts.values() if isinstance(part, ToolPart)]
    if any(isinstance(part.state, ToolPending | ToolRunning) for part in made):
        return
    step, message = turn.step, turn.step.message
    finish = StepFinishPart(
        id=d.new_id("prt"),
        session_id=d.session_id,
        message_id=message.id,
        reason=message.finish or "other",
        tokens=message.tokens,
        cost=message.cost,
    )
    d.put_part(finish)
    said = open_parts.complete(d, message), (*step.parts.values(), finish)
    _count(d, message)
    turn = d.turn = replace(_with(turn, said), steps=turn.steps + 1)
    more = bool(made) or prompts.steering(d)
    failure = _limit_passed(d, turn, more=bool(made))
    compaction.after_step(d, message.tokens.total, resume=more and failure is None)
    if failure is not None:
        fail_turn(d, failure)
    elif more:
        # Now, not after a compaction: what the turn goes on for must not be taken from it.
        d.turn = prompts.join_steering(d, turn)
        d.put_info(d.info)
        advance(d, last=said if d.turn is turn else None)
    else:
        d.start(Answered(said=turn.said, whole=turn.whole))
        d.answer = message.id
        end_turn(d, "answered", reply_id=message.id)
        advance(d)


def _with(turn: Turn, said: Pair) -> Turn:
    """A turn after its open step: that was said. Of a long one only the last is remembered."""
    whole = turn.whole and len(turn.said) < SAID_MOST
    return replace(turn, step=None, said=(*turn.said, said) if whole else (said,), whole=whole)


def _limit_passed(d: Draft, turn: Turn, *, more: bool) -> Failure | None:
    limits = d.rules.limits
    if turn.repeats[1] >= 2 * limits.repeated_calls:
        words = f"The same call was made {turn.repeats[1]} times in a row"
        return Failure(name="RepeatedCallError", data={"message": words})
    if more and turn.steps >= limits.steps:
        words = f"No answer within {limits.steps} steps"
        return Failure(name="StepLimitError", data={"message": words})
    return None


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
    step = open_parts.put_texts(d, step, command.parts)
    turn = d.turn = replace(turn, step=step)
    if command.overflow and compaction.make_room(d, resume=True, overflow=True):
        d.turn = _take_back(d, turn, step, command.failure)
        advance(d)
    elif command.transient and turn.failures + 1 < d.rules.limits.model_attempts:
        said = open_parts.close_step(d, step, "error", command.failure)
        d.turn = replace(_with(turn, said), failures=turn.failures + 1)
        advance(d, delay_s=min(30.0, 0.5 * 2.0**turn.failures))
    else:
        fail_turn(d, command.failure)


def _take_back(d: Draft, turn: Turn, step: Step, failure: Failure) -> Turn:
    """Take an answer that never began out of the transcript; what was said stays."""
    if any(isinstance(part, TextPart | ReasoningPart) for part in step.parts.values()):
        return _with(turn, open_parts.close_step(d, step, "error", failure))
    d.emit(MessageRemoved(session_id=d.session_id, message_id=step.message.id))
    return replace(turn, step=None)


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
        open_parts.close_step(d, turn.step, reason, failure)
        _count(d, turn.step.message)
    asks.close_all(d)
    reply_id = turn.step.message.id if turn.step is not None else None
    d.turn = replace(turn, step=None)
    words = failure.message if failure is not None else open_parts.REASONS[reason][1]
    end_turn(d, outcome, reason=reason if failure is None else words, reply_id=reply_id)


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


def advance(d: Draft, *, last: Pair | None = None, delay_s: float = 0.0) -> None:
    """Start whatever comes next, unless a stream or a tool is at work already.

    ``last`` is the answer that a step follows, if nothing else was said since that was begun.
    """
    turn, pending = d.turn, d.compaction
    if (turn is not None and turn.step is not None) or (
        pending is not None and pending.summary is not None
    ):
        return
    if turn is not None and (pending is None or not pending.part.auto):
        follows = last[0].id if last is not None else None
        turn = prompts.join_steering(d, turn)
        open_step(d, turn, follows=follows, said=last, delay_s=delay_s)
    elif pending is not None and not d.closing:
        compaction.start(d)
    elif d.queue and not d.closing:
        prompts.start_turn(d)
    else:
        _rest(d)


def _rest(d: Draft) -> None:
    """Nothing runs. Where the runtime closes, prompts may wait for the next start."""
    compaction.abandon(d, "close")
    if d.queue:
        d.set_status(IDLE)
    else:
        d.set_idle()


def waits_for_person(d: Draft) -> bool:
    """Whether a call of the open step has not run and waits for permission."""
    step = d.turn.step if d.turn is not None else None
    return step is not None and any(asks.is_parked(d, part) for part in step.parts.values())


def interrupt_work(d: Draft, reason: Reason) -> None:
    """End what runs for the turn; what waits for a person goes on waiting."""
    d.start(Cancel(reason=reason))
    calls.interrupt_calls(d, reason)


def execution_lost(d: Draft, command: ExecutionLost) -> None:
    """Close what nobody works on any more, as recovery would."""
    step = d.turn.step if d.turn is not None else None
    if compaction.summarising(d, command.message_id):
        d.start(Cancel(reason="lost"))
        compaction.restart(d)
    elif step is None or step.message.id != command.message_id:
        return
    elif waits_for_person(d):
        interrupt_work(d, "lost")
    else:
        close_turn(d, "lost")
        advance(d)
