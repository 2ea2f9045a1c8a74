"""Recovery: what makes a session whole again after its actor or its process died.

Decided before anything else of a new incarnation, from what the store says is unfinished. It
touches only what has no live executor: nothing in ``Recover.loaded`` has one. What waits for a
person, or for a compaction, is not work in flight and goes on; the rest is closed by the routine
that closes a turn on abort or error. Run twice, the second run finds nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final, TypeAlias

from understudy.actors.core import asks, calls, compaction, open_parts, prompts, turns
from understudy.actors.core.commands import Reason, Recover
from understudy.actors.core.draft import Draft, replace
from understudy.actors.core.effects import Cancel
from understudy.actors.core.state import Compaction, Entry, Step, Turn
from understudy.store.events import ActorRestarted, PromptSettled, SessionFailed
from understudy.store.records import (
    BUSY,
    IDLE,
    AnyPart,
    CompactionPart,
    Failure,
    Prompt,
    Status,
    ToolPart,
    ToolRunning,
)

Steps: TypeAlias = dict[str, Step]

# What the last incarnation published is unknown: busy and idle are both news.
_UNKNOWN: Final = Status(type="busy", message="recovering")
SET_ASIDE: Final = Failure(
    name="DeadLetter", data={"message": "Set aside: it keeps crashing its actor"}
)
UNREADABLE: Final = Failure(
    name="PromptUnreadable", data={"message": "Its message is damaged and cannot be read"}
)
# Not one of the names that say "a person cut this short": the new step says it again.
_STEP_RESTARTED: Final = Failure(
    name="StepRestarted", data={"message": "Continued in a new step after a restart"}
)


def recover(d: Draft, command: Recover) -> None:
    loaded, reason = command.loaded, command.reason
    d.closing = d.rules.rest
    if command.restarted:
        d.emit(ActorRestarted(session_id=d.session_id, epoch=command.epoch, reason=reason))
    parts: dict[str, dict[str, AnyPart]] = defaultdict(dict)
    for part in loaded.parts:
        parts[part.message_id][part.id] = part
    steps = {message.id: Step(message, parts.pop(message.id, {})) for message in loaded.messages}
    if steps or parts or loaded.prompts or loaded.markers or loaded.lost:
        d.status = _UNKNOWN

    _give_up(d, loaded.lost)
    _take_waiting(d, command)
    _take_turns(d, command, steps)
    d.asks = {ask.id: ask for ask in loaded.asks}
    compacting = _take_marker(d, command, steps)
    if d.turn is not None and not _continue(d, command, compacting=compacting):
        turns.close_turn(d, reason)
    for step in steps.values():
        _close_orphan(d, step, reason)
    owned = {part.id for part, _ in loaded.markers}
    for dangling in parts.values():
        for part in dangling.values():
            if isinstance(part, CompactionPart) and part.id not in owned:
                compaction.close_unreadable(d, part, UNREADABLE)
            else:
                open_parts.close_part(d, part, reason)
    _close_asks(d)
    _go_on(d, reason)
    if d.status is _UNKNOWN:
        d.status = BUSY  # it waits for a person, as it did before
    # Whoever ended the last incarnation has cancelled what it ran; a dead process runs nothing.
    d.effects = [effect for effect in d.effects if type(effect) is not Cancel]


def _close_orphan(d: Draft, step: Step, reason: Reason) -> None:
    failure = open_parts.failure_of(reason)
    if step.message.summary:
        compaction.close_summary(d, step, reason, failure)
    else:
        open_parts.close_step(d, step, reason, failure)


def _close_asks(d: Draft) -> None:
    """Close what nobody waits for any more."""
    for ask in list(d.asks.values()):
        part = asks.find_call(d, ask)
        if part is None or not asks.is_parked(d, part):
            asks.close(d, ask)


def _go_on(d: Draft, reason: Reason) -> None:
    if d.rules.rest:
        _rest(d, reason)
    elif d.turn is not None and d.turn.step is not None:
        turns.settle_step(d)
    elif d.compaction is not None and d.compaction.summary is not None:
        compaction.restart(d)
    else:
        turns.advance(d)


def _rest(d: Draft, reason: Reason) -> None:
    """Leave a session as a runtime that closes does."""
    if turns.waits_for_person(d):
        return
    compaction.abandon(d, reason)
    turns.close_turn(d, reason)
    if not d.queue:
        d.set_idle()
    elif d.facts:
        d.set_status(IDLE)
    else:
        d.status = IDLE


# --- prompts -----------------------------------------------------------------------------------


def _give_up(d: Draft, lost: tuple[Prompt, ...]) -> None:
    """Settle prompts that nobody can answer: what they asked is gone."""
    for prompt in lost:
        settled = replace(prompt, outcome="failed", reason=UNREADABLE.message)
        d.emit(SessionFailed(session_id=d.session_id, error=UNREADABLE))
        d.emit(PromptSettled(session_id=d.session_id, info=settled))


def _take_waiting(d: Draft, command: Recover) -> None:
    waiting = []
    for entry in command.loaded.prompts:
        if entry.prompt.turn is not None:
            continue
        if entry.prompt.message_id == command.set_aside:
            prompts.settle_waiting(d, entry, "failed", SET_ASIDE.message)
        else:
            waiting.append(entry)
    prompts.enqueue(d, *waiting)


def _take_turns(d: Draft, command: Recover, steps: Steps) -> None:
    """Rebuild the turn that was running. Close what is set aside, and all turns but the last."""
    entries: dict[int, list[Entry]] = defaultdict(list)
    for entry in command.loaded.prompts:
        if entry.prompt.turn is not None:
            entries[entry.prompt.turn].append(entry)
    for number in sorted(entries):
        host, *joined = sorted(entries[number], key=lambda entry: entry.prompt.when_busy == "steer")
        open_ids = [
            step.message.id
            for step in steps.values()
            if step.message.turn == number and not step.message.summary
        ]
        step = steps.pop(open_ids[-1]) if open_ids else None
        done = command.loaded.steps.get(number, 0)
        d.turn = Turn(entry=host, joined=tuple(joined), steps=done, step=step)
        if any(entry.prompt.message_id == command.set_aside for entry in entries[number]):
            turns.close_turn(d, command.reason, failure=SET_ASIDE, outcome="failed")
        elif number != max(entries):
            turns.close_turn(d, command.reason)


# --- compaction --------------------------------------------------------------------------------


def _take_marker(d: Draft, command: Recover, steps: Steps) -> bool:
    """Keep the newest active marker that is not stale; close every other.

    True if the running turn waits for it: that turn goes on.
    """
    loaded = command.loaded
    number = d.turn.number if d.turn is not None else None
    kept: Compaction | None = None
    for part, message in reversed(loaded.markers):
        # A turn that waits for its compaction may have finished steps since it was requested.
        stale = message.id in loaded.later and message.turn != number
        if kept is not None or stale:
            d.compaction = Compaction(part, message)
            compaction.close_stale(d)
        else:
            kept = Compaction(part, message)
    d.compaction = kept
    if kept is None:
        return False
    inside = kept.message.turn is not None and kept.message.turn == number
    finished = loaded.summarised.get(kept.message.id)
    if finished is not None:
        # The summary is whole, its bookkeeping is not: complete it, call no model.
        head_end_id, tail_start_id = loaded.tails.get(kept.message.id, (None, None))
        compaction.commit_marker(d, kept.part, finished, head_end_id, tail_start_id)
        return inside
    summary_ids = [key for key, step in steps.items() if step.message.parent_id == kept.message.id]
    if summary_ids and (d.turn is None or inside):
        d.compaction = replace(kept, summary=steps.pop(summary_ids[-1]))
    closed = {entry.prompt.turn for entry in loaded.prompts} - {None, number}
    if kept.message.turn in closed:
        compaction.abandon(d, command.reason)  # it was part of a turn that is set aside
    return inside


# --- continuing --------------------------------------------------------------------------------


def _continue(d: Draft, command: Recover, *, compacting: bool) -> bool:
    """Keep the turn if it waits for a person or a compaction, or if the policy resumes it."""
    turn = d.turn
    assert turn is not None, "only a running turn continues"
    step = turn.step
    if step is None and compacting:
        return True
    attempts = turn.entry.prompt.attempts
    resumes = (
        d.rules.on_restart == "resume"
        and attempts <= d.rules.limits.resume_attempts
        and not d.rules.rest  # a runtime that closes runs nothing again
    )
    parts = tuple(step.parts.values()) if step is not None else ()
    repeats = resumes and any(_may_repeat(part) for part in parts)
    if any(asks.is_parked(d, part) for part in parts) and not repeats:
        calls.interrupt_calls(d, command.reason)
        return True
    if resumes:
        _resume(d, turn, command.reason)
    return resumes


def _may_repeat(part: AnyPart) -> bool:
    return (
        isinstance(part, ToolPart) and isinstance(part.state, ToolRunning) and part.state.idempotent
    )


def _resume(d: Draft, turn: Turn, reason: Reason) -> None:
    """Continue from the last durable step: calls that may be repeated are, the rest is closed."""
    turn = d.turn = prompts.count_attempt(d, turn)
    step = turn.step
    if step is None:
        return
    if step.message.finish is None:
        open_parts.close_step(d, step, reason, _STEP_RESTARTED)
        d.turn = replace(turn, step=None)
        return
    again = {part.id: part for part in step.parts.values() if _may_repeat(part)}
    calls.interrupt_calls(d, reason, spare=again)
    for part in again.values():
        assert isinstance(part, ToolPart), "only calls are repeated"
        calls.run_call(d, part, attempt=turn.entry.prompt.attempts)
