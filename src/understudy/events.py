"""Events: their payloads by name, for ``match`` and for type checkers.

    for event in session.events():
        match event.data:
            case MessageUpdated(info=info):
                ...
            case PartDelta(delta=text):
                ...

``understudy.errors`` has errors of the same names as ``ActorCrashed`` and ``SessionQuarantined``.
"""

from understudy.store.events import (
    ActorCrashed,
    ActorRestarted,
    Event,
    EventDamaged,
    EventData,
    EventsGap,
    EventsOverflow,
    MessageRemoved,
    MessageUpdated,
    PartDelta,
    PartRemoved,
    PartUpdated,
    PermissionAsked,
    PermissionReplied,
    PromptAccepted,
    PromptSettled,
    PromptStarted,
    QuestionAsked,
    QuestionReplied,
    SessionCompacted,
    SessionCreated,
    SessionDeleted,
    SessionFailed,
    SessionIdle,
    SessionQuarantined,
    SessionReset,
    SessionStatus,
    SessionUpdated,
)

__all__ = [
    "ActorCrashed",
    "ActorRestarted",
    "Event",
    "EventDamaged",
    "EventData",
    "EventsGap",
    "EventsOverflow",
    "MessageRemoved",
    "MessageUpdated",
    "PartDelta",
    "PartRemoved",
    "PartUpdated",
    "PermissionAsked",
    "PermissionReplied",
    "PromptAccepted",
    "PromptSettled",
    "PromptStarted",
    "QuestionAsked",
    "QuestionReplied",
    "SessionCompacted",
    "SessionCreated",
    "SessionDeleted",
    "SessionFailed",
    "SessionIdle",
    "SessionQuarantined",
    "SessionReset",
    "SessionStatus",
    "SessionUpdated",
]
