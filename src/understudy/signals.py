"""Signals: blinker signals of everything a session does, one per event type.

    from understudy import signals

    @signals.message_updated.connect
    def on_message(runtime, event): ...

Receivers are called as ``receiver(runtime, event=event)`` with a ``store.events.Event``, after its
commit, in cursor order, one at a time, in a thread of the runtime's own: a slow receiver delays
other receivers, never a session. What it raises is logged and told to ``receiver_failed``, and does
not stop the others. Receivers are weak by default (blinker's habit): keep a reference, or connect
with ``weak=False``.

Receivers that fall far behind are brought up to date from the journal. Live text is dropped then,
which ``events_overflow`` tells; if retention was quicker, ``events_gap`` tells what is missing.
"""

from __future__ import annotations

from typing import Final

from blinker import Namespace, Signal

from understudy.store.events import FACTS, NOTES

_namespace: Final = Namespace()
_DATA: Final = {**FACTS, **NOTES}


def _signal(event_type: str) -> Signal:
    return _namespace.signal(event_type, doc=_DATA[event_type].__doc__)


session_created: Final = _signal("session.created")
session_updated: Final = _signal("session.updated")
session_deleted: Final = _signal("session.deleted")
session_status: Final = _signal("session.status")
session_idle: Final = _signal("session.idle")
session_error: Final = _signal("session.error")
session_compacted: Final = _signal("session.compacted")
session_quarantined: Final = _signal("session.quarantined")
session_reset: Final = _signal("session.reset")
message_updated: Final = _signal("message.updated")
message_removed: Final = _signal("message.removed")
message_part_updated: Final = _signal("message.part.updated")
message_part_removed: Final = _signal("message.part.removed")
message_part_delta: Final = _signal("message.part.delta")
prompt_accepted: Final = _signal("prompt.accepted")
prompt_started: Final = _signal("prompt.started")
prompt_settled: Final = _signal("prompt.settled")
permission_asked: Final = _signal("permission.asked")
permission_replied: Final = _signal("permission.replied")
question_asked: Final = _signal("question.asked")
question_replied: Final = _signal("question.replied")
actor_crashed: Final = _signal("actor.crashed")
actor_restarted: Final = _signal("actor.restarted")
events_overflow: Final = _signal("events.overflow")
events_gap: Final = _signal("events.gap")
events_damaged: Final = _signal("events.damaged")

receiver_failed: Final = Signal("A receiver raised: called with event, receiver and error.")

BY_TYPE: Final[dict[str, Signal]] = {name: _namespace[name] for name in _DATA}

_RECEIVERS: Final = tuple(signal.receivers for signal in BY_TYPE.values())


def wanted() -> bool:
    """Whether anybody is connected to any signal. Asked at every commit."""
    return any(_RECEIVERS)
