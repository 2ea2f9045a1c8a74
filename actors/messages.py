"""What a session's mailbox carries: commands, and what actors are told about themselves."""

from __future__ import annotations

from typing import Any

import msgspec

from understudy.actors.core.commands import Reason
from understudy.actors.pending import Pending
from understudy.store.claims import Claimed, RestartRecord


class Request(msgspec.Struct, frozen=True):
    """A command with whoever waits for its answer.

    ``again`` says that an executor sent it: it must get through, so it is tried again when the
    store cannot write. The collector looks at it: an error that was its answer leads back to it, by
    way of the frames in which that was raised.
    """

    command: Any
    reply: Pending[Any] | None = None
    again: bool = False


class Activate(msgspec.Struct, frozen=True, gc=False):
    """Claim the session and make it whole."""

    reason: Reason = "restart"
    restarted: bool = False


class Activated(msgspec.Struct, frozen=True, gc=False):
    """The claim was taken."""

    claimed: Claimed
    record: RestartRecord | None
    reason: Reason
    restarted: bool


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Delete the session and its descendants."""


class Wake(msgspec.Struct, frozen=True, gc=False):
    """Be alive: answered once the session has recovered."""


class Prove(msgspec.Struct, frozen=True, gc=False):
    """Prove that the claim holds; answered if so. An actor that lost it finds out, and ends."""


class Crash(msgspec.Struct, frozen=True, gc=False):
    """Die at once, as if a handler had failed. For chaos and tests."""

    reason: str = "crash on request"


class InjectedCrash(Exception):
    """What ``Crash`` raises."""
