"""Doubles of what goes wrong, for the tests of apps."""

from understudy.actors.handles import Done
from understudy.actors.session import Session


def crash(session: Session) -> Done:
    """Make a session's actor die, as a bug in it would.

    The call itself fails with ``ActorCrashed``; the supervisor restarts the actor.
    """
    return session._crash()  # noqa: SLF001 - this is its public name
