"""For the tests of apps: scripts for ``ScriptedModel``, tool contexts, crashes, virtual time."""

from understudy.actors.clock import Clock, SystemClock, VirtualClock
from understudy.actors.handles import Done
from understudy.actors.models.scripted import (
    Call,
    End,
    Fail,
    Gate,
    Say,
    ScriptedModel,
    Stall,
    Think,
    Use,
    Wait,
    echo,
)
from understudy.actors.session import Session
from understudy.actors.tools.context import DetachedContext

__all__ = [
    "Call",
    "Clock",
    "DetachedContext",
    "Done",
    "End",
    "Fail",
    "Gate",
    "Say",
    "ScriptedModel",
    "Stall",
    "SystemClock",
    "Think",
    "Use",
    "VirtualClock",
    "Wait",
    "crash",
    "echo",
]


def crash(session: Session) -> Done:
    """Make a session's actor die, as a bug in it would.

    The call itself fails with ``ActorCrashed``; the supervisor restarts the actor.
    """
    return session._crash()  # noqa: SLF001 - this is its public name
