"""Prompts: accepted once, answered in order, each with exactly one outcome."""

from __future__ import annotations

import msgspec

from understudy.actors.core import compaction, turns
from understudy.actors.core.commands import Abort, Reason, RevertTo, SubmitPrompt, UpdateSession
from understudy.actors.core.draft import Draft, replace
from understudy.actors.core.effects import Cancel
from understudy.actors.core.state import Entry, Turn
from understudy.errors import (
    MessageNotFound,
    PromptConflict,
    SessionBusy,
)
from understudy.store.events import (
    MessageRemoved,
    PromptAccepted,
    PromptSettled,
    PromptStarted,
    SessionIdle,
)
from understudy.store.records import (
    IDLE,
    FilePart,
    MessageTime,
    Outcome,
    Pair,
    Prompt,
    Revert,
    Session,
    TextPart,
    UserMessage,
)


def submit(d: Draft, command: SubmitPrompt) -> Prompt:
    """Accept a prompt, or return the one that already has this message id."""
    if command.known is not None or command.foreign:
        return _same_again(d, command)
    busy = d.turn is not None or d.compaction is not None or bool(d.queue)
    if busy and command.when_busy == "reject":
        raise SessionBusy(f"Session {d.session_id} is busy", session_id=d.session_id)
    if len(d.queue) >= d.rules.limits.queue:
        raise SessionBusy(
            f"Session {d.session_id} has {len(d.queue)} prompts waiting", session_id=d.session_id
        )
    remove_reverted(d, command.reverted)
    follows = d.follows
    entry, parts = _accept(d, command, start=not busy)
    if not busy:
        _begin(d, entry, follows=follows, said=(entry.message, parts))
        return entry.prompt
    enqueue(d, entry)
    if command.when_busy == "interrupt" and d.turn is not None:
        compaction.abandon_running(d, "interrupt")
        turns.close_turn(d, "interrupt")
        start_turn(d)
    return entry.prompt


def _same_again(d: Draft, command: SubmitPrompt) -> Prompt:
    known = command.known
    if known is not None and known.session_id == d.session_id and known.digest == command.digest:
        return known
    raise PromptConflict(
        f"Message id {command.message_id} was used before with other content",
        session_id=d.session_id,
        message_id=command.message_id,
    )


def _accept(
    d: Draft, command: SubmitPrompt, *, start: bool
) -> tuple[Entry, tuple[TextPart | FilePart, ...]]:
    """Write the message, its parts and its inbox row."""
    message_id = command.message_id or d.new_id("msg")
    message = UserMessage(
        id=message_id,
        session_id=d.session_id,
        time=MessageTime(created=d.now),
        turn=d.next_seq if start else None,
        agent=command.agent,
        model=command.model,
    )
    prompt = Prompt(
        message_id=message_id,
        session_id=d.session_id,
        digest=command.digest,
        accepted=d.now,
        when_busy=command.when_busy,
        system=command.system,
        tools=command.tools,
        quiet=command.quiet,
    )
    d.put_message(message)
    parts = tuple(_owned(d, part, message_id) for part in command.parts)
    for part in parts:
        d.put_part(part)
    d.emit(PromptAccepted(session_id=d.session_id, info=prompt))
    return Entry(prompt, message), parts


def _owned(d: Draft, part: TextPart | FilePart, message_id: str) -> TextPart | FilePart:
    part_id = part.id or d.new_id("prt")
    return replace(part, id=part_id, session_id=d.session_id, message_id=message_id)


def enqueue(d: Draft, *entries: Entry) -> None:
    """Let prompts wait: those that interrupt before the others, each kind in order."""
    d.queue = (*d.queue, *entries)
    if any(entry.prompt.when_busy == "interrupt" for entry in entries):
        d.queue = tuple(sorted(d.queue, key=lambda entry: entry.prompt.when_busy != "interrupt"))


def start_turn(d: Draft) -> None:
    """Start the first waiting prompt: only now does it get its place in the transcript."""
    entry, d.queue = d.queue[0], d.queue[1:]
    entry = replace(entry, message=replace(entry.message, turn=d.next_seq))
    d.put_message(entry.message)
    _begin(d, entry)


def _begin(d: Draft, entry: Entry, *, follows: str | None = None, said: Pair | None = None) -> None:
    """See ``RunStep`` for ``follows`` and ``said``."""
    prompt = replace(entry.prompt, turn=entry.message.turn, attempts=entry.prompt.attempts + 1)
    d.emit(PromptStarted(session_id=d.session_id, info=prompt))
    turn = join_steering(d, Turn(entry=replace(entry, prompt=prompt), whole=True))
    turns.open_step(d, turn, follows=follows, said=said)


def accept_own(d: Draft, entry: Entry) -> None:
    """Queue a prompt the runtime itself makes."""
    d.emit(PromptAccepted(session_id=d.session_id, info=entry.prompt))
    enqueue(d, entry)


def count_attempt(d: Draft, turn: Turn) -> Turn:
    """Count, durably and beforehand, that a turn is continued after a restart."""
    prompt = replace(turn.entry.prompt, attempts=turn.entry.prompt.attempts + 1)
    d.emit(PromptStarted(session_id=d.session_id, info=prompt))
    return replace(turn, entry=replace(turn.entry, prompt=prompt))


# --- steering ----------------------------------------------------------------------------------


def steering(d: Draft) -> bool:
    return any(entry.prompt.when_busy == "steer" for entry in d.queue)


def join_steering(d: Draft, turn: Turn) -> Turn:
    """Let waiting steering prompts join the running turn: the next step answers them too."""
    joining = tuple(entry for entry in d.queue if entry.prompt.when_busy == "steer")
    if not joining:
        return turn
    d.queue = tuple(entry for entry in d.queue if entry.prompt.when_busy != "steer")
    joined = []
    for entry in joining:
        message = replace(entry.message, turn=turn.number)
        prompt = replace(entry.prompt, turn=turn.number, attempts=1)
        d.put_message(message)
        d.emit(PromptStarted(session_id=d.session_id, info=prompt))
        joined.append(Entry(prompt, message))
    return replace(turn, joined=(*turn.joined, *joined))


# --- abort -------------------------------------------------------------------------------------


def abort(d: Draft, command: Abort) -> bool:
    """End what runs (and what waits, if asked). True if anything was ended.

    When the runtime closes, nothing new starts: what waits runs after the next start, and a call
    that waits for a person's permission goes on waiting for it.
    """
    if command.message_id is not None:
        return _abort_one(d, command.message_id, command.reason)
    d.closing = d.closing or command.reason == "close"
    if command.reason == "close" and turns.waits_for_person(d):
        turns.interrupt_work(d, "close")
        return True
    ends_queue = command.queued and bool(d.queue)
    did = d.turn is not None or d.compaction is not None or ends_queue
    if not did:
        d.start(Cancel(reason=command.reason))  # its children may be at work
    compaction.abandon(d, command.reason)
    turns.close_turn(d, command.reason, outcome=_outcome_of(command.reason))
    if ends_queue:
        for entry in d.queue:
            settle_waiting(d, entry, "interrupted", command.reason)
        d.queue = ()
        _queue_ended(d)
    turns.advance(d)
    return did


def _abort_one(d: Draft, message_id: str, reason: Reason) -> bool:
    for entry in d.queue:
        if entry.prompt.message_id == message_id:
            d.queue = tuple(other for other in d.queue if other is not entry)
            settle_waiting(d, entry, _outcome_of(reason), reason)
            _queue_ended(d)
            return True
    turn = d.turn
    if turn is not None and message_id in (
        entry.prompt.message_id for entry in (turn.entry, *turn.joined)
    ):
        compaction.abandon_running(d, reason)
        turns.close_turn(d, reason, outcome=_outcome_of(reason))
        turns.advance(d)
        return True
    return False


def _queue_ended(d: Draft) -> None:
    """A runtime that closes is idle while prompts wait: that it is done is told with their end."""
    if d.status == IDLE and not d.queue:
        d.emit(SessionIdle(session_id=d.session_id))


def _outcome_of(reason: Reason) -> Outcome:
    """A turn that passed its limit has failed; any other end from outside interrupts it."""
    return "failed" if reason == "timeout" else "interrupted"


def settle_waiting(d: Draft, entry: Entry, outcome: Outcome, reason: str) -> None:
    """End a prompt that never started. Its message stays in the transcript; no model sees it."""
    d.put_message(replace(entry.message, turn=d.next_seq, withdrawn=True))
    prompt = replace(entry.prompt, outcome=outcome, reason=reason)
    d.emit(PromptSettled(session_id=d.session_id, info=prompt))


# --- revert ------------------------------------------------------------------------------------


def revert(d: Draft, command: RevertTo) -> Session:
    """Hide messages from one on. What runs or waits is ended first: its ground is going away."""
    if not command.found:
        raise MessageNotFound(
            f"No message {command.message_id} in session {d.session_id}",
            session_id=d.session_id,
            message_id=command.message_id,
        )
    abort(d, Abort(queued=True))
    d.put_info(replace(d.info, revert=Revert(message_id=command.message_id), compaction_failures=0))
    return d.info


def unrevert(d: Draft) -> Session:
    if d.info.revert is not None:
        d.put_info(replace(d.info, revert=None))
    return d.info


def remove_reverted(d: Draft, message_ids: tuple[str, ...]) -> None:
    """Make a pending revert final, answers before what they answer. Only idle sessions have one."""
    if d.info.revert is None:
        return
    for message_id in reversed(message_ids):
        d.emit(MessageRemoved(session_id=d.session_id, message_id=message_id))
    d.put_info(replace(d.info, revert=None))


# --- update ------------------------------------------------------------------------------------


def update(d: Draft, command: UpdateSession) -> Session:
    changes: dict[str, object] = {
        name: value
        for name in ("title", "directory", "metadata", "model", "permission")
        if (value := getattr(command, name)) is not msgspec.UNSET
    }
    info: Session = replace(d.info, **changes)
    if command.archived is not msgspec.UNSET:
        info = replace(info, time=replace(info.time, archived=command.archived))
    if command.model is not msgspec.UNSET:
        info = replace(info, compaction_failures=0)
    if info != d.info:
        d.put_info(info)
    return d.info
