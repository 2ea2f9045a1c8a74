"""Points at which a worker can die: seams of store and actors, wrapped in the worker's process.

Nothing of this is in the runtime. A point is passed again and again; armed, the process kills
itself there, in whatever thread passes it, with SIGKILL: nothing is flushed, closed or said.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from playhouse.migrations import Runner

from understudy.actors import calls
from understudy.actors.publisher import Publisher
from understudy.store import claims, database, journal, store
from understudy.store.changes import Transaction
from understudy.store.lease import Lease
from understudy.store.writer import Writer

WORKING: Final = (
    "begin",  # a transaction is about to begin
    "commit",  # everything is written and not committed
    "committed",  # it is committed, and nobody knows
    "publishing",
    "published",  # subscribers know, callers do not
    "accepting",  # a prompt, just before the commit
    "accepted",  # and just after
    "settling",  # an outcome, just before the commit
    "settled",
    "tool",  # a tool has started and has done nothing yet
    "effect",  # it has, and nobody knows
    "deleting",  # rows are gone, in a transaction
    "buried",  # and just after its commit
    "summarising",  # half of a summary is there
    "compacting",  # a summary takes effect, just before the commit
    "compacted",
    "trimming",  # the journal, in a transaction
)
CLOSING: Final = ("closing", "released", "checkpoint")
STARTING: Final = ("opening", "registered", "recovering", "recovered")
CREATING: Final = ("creating", "migrating", "migrated")

_BEFORE: Final = {
    "prompt.accepted": "accepting",
    "prompt.settled": "settling",
    "session.compacted": "compacting",
}
_AFTER: Final = {
    "accepting": "accepted",
    "settling": "settled",
    "compacting": "compacted",
    "deleting": "buried",
    "registering": "registered",
    "releasing": "released",
}


class Points:
    """``phase`` is "starting", "working" or "closing"; ``pass_by`` dies where it is armed to."""

    def __init__(self) -> None:
        self.phase = "starting"
        self._lock = threading.Lock()
        self._armed = ""
        self._left = 0
        self._noted: set[str] = set()  # of the transaction under way

    def arm(self, point: str, nth: int) -> None:
        with self._lock:
            self._armed, self._left = point, nth

    def pass_by(self, point: str) -> None:
        if not point or point != self._armed:
            return
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    # --- the seams -----------------------------------------------------------------------------

    def fault(self, point: str) -> None:
        """The writer's: before "begin" and "commit", and after "committed"."""
        if point == "begin":
            self._noted.clear()
        self.pass_by(point)
        if point == "commit":
            for noted in self._noted:
                self.pass_by(noted)
        elif point == "committed":
            for noted in self._noted & _AFTER.keys():
                self.pass_by(_AFTER[noted])
        if self.phase == "starting" and point != "begin":
            self.pass_by("recovering" if point == "commit" else "recovered")
        elif self.phase == "closing" and point == "commit":
            self.pass_by("closing")

    def note(self, what: str) -> None:
        """The transaction under way does this."""
        self._noted.add(what)

    def install(self) -> None:
        """Wrap the seams, for the rest of this process."""
        self._around(Publisher, "committed", before="publishing", after="published")
        self._around(Writer, "_checkpoint", before="checkpoint")
        self._around(store, "prepare", before="opening")
        self._around(database, "_migrate", before="creating", after="migrated")
        self._around(journal, "trim", after="trimming")
        self._around(claims, "delete_tree", after="deleting", noted="deleting")
        self._around(claims, "release_all", noted="releasing")
        self._around(Lease, "register", noted="registering")
        self._around(Runner, "up", after="migrating")
        self._wrap_add()
        stamp_checks()

    def _around(
        self, where: Any, name: str, *, before: str = "", after: str = "", noted: str = ""
    ) -> None:
        wrapped: Callable[..., Any] = getattr(where, name)

        @functools.wraps(wrapped)
        def passing(*args: Any, **options: Any) -> Any:
            self.pass_by(before)
            result = wrapped(*args, **options)
            if noted:
                self.note(noted)
            self.pass_by(after)
            return result

        setattr(where, name, passing)

    def _wrap_add(self) -> None:
        add = Transaction.add

        @functools.wraps(add)
        def adding(*args: Any, **options: Any) -> Any:
            events = add(*args, **options)
            self._noted.update(_BEFORE[each.type] for each in events if each.type in _BEFORE)
            return events

        setattr(Transaction, "add", adding)  # noqa: B010 - a method, as mypy sees it


# --- tools ---------------------------------------------------------------------------------------

_checked = threading.local()


def stamp_checks() -> None:
    """Remember when a tool's thread last looked whether its call may start.

    A process can be frozen between that look and the tool's first line. What was looked at before
    nobody can hold back.
    """
    is_over = calls.CallRun._is_over  # noqa: SLF001 - there is no other way to know

    def looking(run: calls.CallRun) -> bool:
        _checked.at_ms = wall_ms()
        return is_over(run)

    setattr(calls.CallRun, "_is_over", looking)  # noqa: B010 - as above


def wall_ms() -> int:
    """The wall clock, which all processes of a machine share."""
    return time.time_ns() // 1_000_000


def checked_ms() -> int:
    """When the tool that runs in this thread was allowed to start."""
    return int(getattr(_checked, "at_ms", None) or wall_ms())
