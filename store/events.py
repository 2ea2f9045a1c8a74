"""Events: immutable facts about a session, as committed to the journal and published.

A change is a list of facts; the tables are their projection, so a reader who folds the events
arrives at what the tables say. Names and payloads are OpenCode's where the meaning is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import msgspec

from understudy.store.records import (
    AnyPart,
    Ask,
    Failure,
    Message,
    Prompt,
    Record,
    Session,
    Status,
)


class Fact(Record, frozen=True, kw_only=True):
    """The payload of an event. ``type`` is its public name."""

    type: ClassVar[str]
    session_id: str


class SessionCreated(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "session.created"
    info: Session


class SessionUpdated(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "session.updated"
    info: Session


class SessionDeleted(Fact, frozen=True, kw_only=True):
    """The last event of a session; nothing of it is published afterwards."""

    type: ClassVar[str] = "session.deleted"
    info: Session


class SessionStatus(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "session.status"
    status: Status


class SessionIdle(Fact, frozen=True, kw_only=True):
    """The session has nothing left to do. Published once, after everything else."""

    type: ClassVar[str] = "session.idle"


class SessionFailed(Fact, frozen=True, kw_only=True):
    """Something a person should see went wrong (``session.error``)."""

    type: ClassVar[str] = "session.error"
    error: Failure


class SessionCompacted(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "session.compacted"
    marker_id: str
    summary_id: str


class MessageUpdated(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "message.updated"
    info: Message


class MessageRemoved(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "message.removed"
    message_id: str


class PartUpdated(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "message.part.updated"
    part: AnyPart
    time: int


class PartRemoved(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "message.part.removed"
    message_id: str
    part_id: str


class PromptAccepted(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "prompt.accepted"
    info: Prompt


class PromptStarted(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "prompt.started"
    info: Prompt


class PromptSettled(Fact, frozen=True, kw_only=True):
    """The prompt's one outcome."""

    type: ClassVar[str] = "prompt.settled"
    info: Prompt


class PermissionAsked(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "permission.asked"
    info: Ask


class PermissionReplied(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "permission.replied"
    info: Ask


class QuestionAsked(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "question.asked"
    info: Ask


class QuestionReplied(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "question.replied"
    info: Ask


class ActorCrashed(Fact, frozen=True, kw_only=True):
    """A session's actor died; ``consecutive`` crashes without progress in between."""

    type: ClassVar[str] = "actor.crashed"
    reason: str
    consecutive: int


class ActorRestarted(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "actor.restarted"
    epoch: int
    reason: str


class SessionQuarantined(Fact, frozen=True, kw_only=True):
    type: ClassVar[str] = "session.quarantined"
    reason: str


class SessionReset(Fact, frozen=True, kw_only=True):
    """A quarantined session may run again."""

    type: ClassVar[str] = "session.reset"


class PartDelta(Fact, frozen=True, kw_only=True):
    """Live text, never stored. ``offset`` is where ``delta`` starts in the part's text."""

    type: ClassVar[str] = "message.part.delta"
    message_id: str
    part_id: str
    field: str
    delta: str
    offset: int


AnyFact: TypeAlias = (
    SessionCreated
    | SessionUpdated
    | SessionDeleted
    | SessionStatus
    | SessionIdle
    | SessionFailed
    | SessionCompacted
    | MessageUpdated
    | MessageRemoved
    | PartUpdated
    | PartRemoved
    | PromptAccepted
    | PromptStarted
    | PromptSettled
    | PermissionAsked
    | PermissionReplied
    | QuestionAsked
    | QuestionReplied
    | ActorCrashed
    | ActorRestarted
    | SessionQuarantined
    | SessionReset
    | PartDelta
)

FACTS: dict[str, type[AnyFact]] = {cls.type: cls for cls in AnyFact.__args__}


class EventDamaged(Fact, frozen=True, kw_only=True):
    """An event that cannot be read; ``was`` is the type it had. Never written or published."""

    type: ClassVar[str] = "events.damaged"
    was: str


class EventsOverflow(Fact, frozen=True, kw_only=True):
    """The subscriber fell behind; live deltas after ``cursor`` were dropped, facts follow."""

    type: ClassVar[str] = "events.overflow"
    cursor: int
    dropped: int


class EventsGap(Fact, frozen=True, kw_only=True):
    """The journal no longer reaches back to the cursor asked for; ``oldest`` comes next."""

    type: ClassVar[str] = "events.gap"
    after: int
    oldest: int


NOTES: dict[str, type[Fact]] = {cls.type: cls for cls in (EventDamaged, EventsOverflow, EventsGap)}
"""What is told of the events themselves, by name; not stored."""

EventData: TypeAlias = AnyFact | EventDamaged | EventsOverflow | EventsGap
"""What an event may carry: ``match event.data: case MessageUpdated(info=info): …``."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """A committed fact, or a live delta.

    Attributes:
        type: the event's name, for example ``message.updated``.
        session_id: what it is about.
        cursor: its place in the store's journal; None for a live delta.
        seq: its place in the session; None for a live delta.
        time_ms: wall-clock milliseconds when it was decided.
        data: the payload.
    """

    type: str
    session_id: str
    cursor: int | None
    seq: int | None
    time_ms: int
    data: EventData


def deleted_by(events: Sequence[Event]) -> list[Session]:
    """The sessions that were deleted, children first, their root last."""
    return [event.data.info for event in events if isinstance(event.data, SessionDeleted)]


_decoders = {name: msgspec.json.Decoder(cls).decode for name, cls in FACTS.items()}


def decode_fact(event_type: str, data: bytes) -> AnyFact:
    """An event's payload, from JSON in OpenCode's shape.

    Raises ``ValueError``, or ``KeyError`` for a type that this version does not know.
    """
    return _decoders[event_type](data)
