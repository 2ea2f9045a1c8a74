"""Recovery: what makes a session whole again after its actor or its process died.

Decided before anything else of a new incarnation, from what the store says is unfinished. It
touches only what has no live executor: nothing in ``Recover.loaded`` has one. What waits for a
person, or for a compaction, is not work in flight and goes on; the rest is closed by the routine
that closes a turn on abort or error. Run twice, the second run finds nothing.
"""

from __future__ import annotations

from collections import defaultdict

from understudy.store.events import ActorRestarted
from understudy.store.records import (
    BUSY,
    AnyPart,
    CompactionPart,
    ToolPart,
    ToolPending,
    ToolRunning,
    UserMessage,
)

from . import asks, compaction, prompts, turns
from .commands import Reason, Recover
from .draft import Draft, replace
from .state import Compaction, Entry, Step, Turn


def recover(d: Draft, command: Recover) -> None:
    loaded = command.loaded
    if command.restarted:
        d.emit(ActorRestarted(session_id=d.session_id, epoch=command.epoch, reason=command.reason))
    parts: dict[str, dict[str, AnyPart]] = defaultdict(dict)
    for part in loaded.parts:
        parts[part.message_id][part.id] = part
    steps = {message.id: Step(message, parts.pop(message.id, {})) for message in loaded.messages}
    if steps or parts or any(entry.prompt.turn is not None for entry in loaded.prompts):
        d.status = BUSY  # what the last incarnation published; going idle is news again

    d.asks = {ask.id: ask for ask in loaded.asks}
    _take_marker(d, command, steps, parts)
    _take_prompts(d, command, steps)
    for step in steps.values():
        _close_orphan(d, step, command.reason)
    for dangling in parts.values():
        for part in dangling.values():
            turns.close_part(d, part, command.reason)
    _close_asks(d)
    if d.turn is None or d.turn.step is None:
        turns.advance(d)
    else:
        turns.settle_step(d)


def _close_orphan(d: Draft, step: Step, reason: Reason) -> None:
    failure = turns.failure_of(reason)
    if step.message.summary:
        compaction.close_summary(d, step, reason, failure)
    else:
        turns.close_step(d, step, reason, failure)


# --- compaction --------------------------------------------------------------------------------


def _take_marker(
    d: Draft, command: Recover, steps: dict[str, Step], parts: dict[str, dict[str, AnyPart]]
) -> None:
    """Keep the newest active marker that is not stale; close every other."""
    loaded = command.loaded
    markers = list(loaded.markers)
    kept: tuple[CompactionPart, UserMessage] | None = None
    while markers and kept is None:
        marker = markers.pop()
        parts.pop(marker[1].id, None)
        if marker[1].id in loaded.later:
            _stale(d, marker[0])
        else:
            kept = marker
    for part, message in markers:
        parts.pop(message.id, None)
        _stale(d, part)
    if kept is None:
        return
    part, message = kept
    finished = loaded.summarised.get(message.id)
    if finished is not None:
        # The summary is whole, its bookkeeping is not: complete it, call no model.
        d.compaction = Compaction(part, message)
        compaction.commit_marker(d, part, finished)
        return
    summaries = [step for step in steps.values() if step.message.parent_id == message.id]
    summary = summaries[-1] if summaries else None
    if summary is not None:
        del steps[summary.message.id]
        part = replace(part, summary_id=summary.message.id)
    d.compaction = Compaction(part, message, summary)
    if summary is not None:
        compaction.restart(d)


def _stale(d: Draft, part: CompactionPart) -> None:
    d.put_part(replace(part, state="stale", reason="A newer marker or answer made it pointless"))


# --- prompts -----------------------------------------------------------------------------------


def _take_prompts(d: Draft, command: Recover, steps: dict[str, Step]) -> None:
    """Rebuild the queue, and continue or close the turn that was running."""
    waiting = []
    turns_by_number: dict[int, list[Entry]] = defaultdict(list)
    for entry in command.loaded.prompts:
        if entry.prompt.message_id == command.set_aside:
            prompts.settle_waiting(d, entry, "failed", "dead letter: it keeps crashing its actor")
        elif entry.prompt.turn is None:
            waiting.append(entry)
        else:
            turns_by_number[entry.prompt.turn].append(entry)
    urgent = [entry for entry in waiting if entry.prompt.when_busy == "interrupt"]
    d.queue = (*urgent, *(entry for entry in waiting if entry not in urgent))
    for number in sorted(turns_by_number):
        host, *joined = sorted(
            turns_by_number[number], key=lambda entry: entry.prompt.when_busy == "steer"
        )
        open_steps = [
            step
            for step in steps.values()
            if step.message.turn == number and not step.message.summary
        ]
        step = steps.pop(open_steps[-1].message.id) if open_steps else None
        d.turn = Turn(entry=host, joined=tuple(joined), step=step)
        if number != max(turns_by_number) or not _continue(d, command):
            turns.close_turn(d, command.reason)


def _continue(d: Draft, command: Recover) -> bool:
    """Keep the turn if it waits for a person or a compaction, or if the policy resumes it."""
    turn = d.turn
    assert turn is not None, "only a running turn continues"
    if turn.step is None and d.compaction is not None and d.compaction.part.auto:
        return True
    if turn.step is None and d.compaction is None and command.loaded.summarised:
        return True
    if turn.step is not None and _parked(d, turn.step):
        _close_running(d, turn.step, command.reason)
        return True
    if d.rules.on_restart != "resume":
        return False
    if turn.entry.prompt.attempts > d.rules.limits.resume_attempts:
        return False
    _resume(d, turn, command.reason)
    return True


def _parked(d: Draft, step: Step) -> bool:
    """Whether the stream has ended and a call that never ran waits for a person."""
    return step.message.finish is not None and any(
        isinstance(part, ToolPart)
        and isinstance(part.state, ToolPending)
        and any(
            ask.message_id == part.message_id and ask.call_id == part.call_id
            for ask in d.asks.values()
        )
        for part in step.parts.values()
    )


def _close_running(d: Draft, step: Step, reason: Reason) -> None:
    for part in step.parts.values():
        if isinstance(part, ToolPart) and isinstance(part.state, ToolRunning):
            _close_call(d, part, reason)


def _close_call(d: Draft, part: ToolPart, reason: Reason) -> None:
    assert d.turn is not None and d.turn.step is not None, "a call belongs to an open step"
    closed = turns.close_part(d, part, reason)
    step = d.turn.step
    d.turn = replace(d.turn, step=replace(step, parts={**step.parts, closed.id: closed}))


def _resume(d: Draft, turn: Turn, reason: Reason) -> None:
    """Continue from the last durable step: calls that may be repeated are, the rest is closed."""
    turn = prompts.count_attempt(d, turn)
    step = turn.step
    if step is None:
        d.turn = turn
        return
    if step.message.finish is None:
        turns.close_step(d, step, reason)
        d.turn = replace(turn, step=None)
        return
    d.turn = turn
    for part in step.parts.values():
        if isinstance(part, ToolPart) and isinstance(part.state, ToolPending | ToolRunning):
            if isinstance(part.state, ToolRunning) and part.state.idempotent:
                turns.run_call(d, part, attempt=turn.entry.prompt.attempts)
            else:
                _close_call(d, part, reason)


def _close_asks(d: Draft) -> None:
    """Close what nobody waits for any more."""
    for ask in list(d.asks.values()):
        part = asks.find_call(d, ask)
        if part is None or not isinstance(part.state, ToolPending):
            asks.close(d, ask)
