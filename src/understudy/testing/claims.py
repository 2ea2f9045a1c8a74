"""Claims, as their rows have them: who may write a session, and who did."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from understudy.testing.rules import Finding

# What a runtime may say of a session that it does not hold.
_OF_ANYBODY: Final = {"session.deleted", "session.reset", "session.quarantined"}


class Held(NamedTuple):
    """A claim; of a deleted session its tombstone, held by nobody."""

    owner: str | None
    epoch: int
    deleted: bool


class Claims:
    """Follows claims and tombstones from commit to commit.

    ``steady`` says whether a runtime is alive, was so all the time, and has a lease that holds.
    """

    def __init__(self, steady: Callable[[str], bool] = lambda _: False) -> None:
        self._steady = steady
        self._held: dict[str, Held] = {}

    def committed(
        self, connection: sqlite3.Connection, runtime_id: str | None, kinds: Mapping[str, set[str]]
    ) -> Iterator[Finding]:
        """What the commit of a runtime, which told ``kinds`` by session, broke."""
        rows = connection.execute(
            "SELECT session_id, owner, epoch, 0 FROM claim "
            "UNION ALL SELECT session_id, NULL, epoch, 1 FROM tombstone"
        ).fetchall()
        now = {row[0]: Held(row[1], row[2], bool(row[3])) for row in rows}
        before, self._held = self._held, now
        if len(now) != len(rows):
            yield "epoch", "a session is both claimed and deleted"
        for session_id, old in before.items():
            new = now.get(session_id)
            if new is None or new.epoch < old.epoch:
                yield "epoch", f"{session_id} went from {old.epoch} to {new and new.epoch}"
            elif new.epoch == old.epoch and (new.owner or old.owner) != old.owner:
                yield "epoch", f"{session_id} went to {new.owner} at the same epoch {new.epoch}"
            elif new.epoch == old.epoch and "actor.crashed" in kinds.get(session_id, ()):
                yield "epoch", f"the actor of {session_id} crashed, and epoch {new.epoch} goes on"
            elif old.owner not in (None, new.owner, runtime_id) and self._steady(old.owner or ""):
                yield "who lives keeps its sessions", f"{session_id} was taken from {old.owner}"
        for session_id, told in kinds.items():
            owner = now[session_id].owner if session_id in now else None
            if runtime_id is None or told <= _OF_ANYBODY:
                continue
            if owner not in (None, runtime_id):
                yield "only its owner writes", f"{runtime_id} wrote {session_id} of {owner}"
            last, held = before.get(session_id), now.get(session_id)
            if last and held and last.owner != runtime_id and last.epoch == held.epoch:
                yield "epoch", f"{runtime_id} wrote {session_id} of {last.owner} at {last.epoch}"
