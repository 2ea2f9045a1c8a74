"""Orphans: sessions that died with their runtime in the middle of something.

At the start they are made whole many at a time: read together, decided by the routine with which
an actor recovers, and written as one change, all or none. A kill leaves those not yet written as
they were. Who cannot rest afterwards, has crashed before, or cannot be read, decided or written is
left to an actor of its own: it goes on with the work, and its supervisor counts what goes wrong.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from understudy.actors.core.commands import Recover
from understudy.actors.core.decide import decide
from understudy.actors.core.draft import Decision
from understudy.actors.core.state import Moment, State
from understudy.actors.loading import loaded_of
from understudy.actors.pending import Pending, settled
from understudy.errors import SessionClaimed, UnderstudyError

if TYPE_CHECKING:
    from understudy.actors.engine import Engine
    from understudy.store.claims import Orphan
    from understudy.store.unfinished import Unfinished

logger = logging.getLogger("understudy")

AT_ONCE: Final = 2_000  # some 20 MB of records while they are decided

Decided: TypeAlias = "list[tuple[Orphan, Decision]]"


class Orphans:
    """Finds them, and makes them whole."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._recovered = False

    def recover_all(self) -> None:
        """Make whole every session that has anything unfinished and no live owner. At the start."""
        with _rare_collections():
            for session_id, pending in self._wake(self._settle(self._ids())):
                try:
                    pending.get(timeout=self._engine.config.command_timeout_s)
                except SessionClaimed:
                    continue  # somebody took it in the meantime: theirs to recover
                except UnderstudyError as error:
                    logger.error("Session %s could not be recovered: %s", session_id, error)  # noqa: TRY400
        self._recovered = True

    def wake(self) -> None:
        """Give each an actor, which recovers it: what others leave while this runtime lives."""
        if self._recovered:
            self._wake(self._ids())

    def _wake(self, session_ids: Sequence[str]) -> list[tuple[str, Pending[Any]]]:
        wake = self._engine.registry.wake
        return [(session_id, wake(session_id)) for session_id in session_ids]

    def _ids(self) -> list[str]:
        """Unfinished sessions that no live runtime owns and that are not live here."""
        store, registry = self._engine.store, self._engine.registry
        unfinished = [
            (session_id, owner)
            for session_id, owner in store.read.unfinished_sessions()
            if session_id not in registry.quarantined and registry.actor(session_id) is None
        ]
        owners = {owner for _, owner in unfinished if owner is not None}
        alive = store.run(lambda tx: {each for each in owners if store.alive(tx, each)})
        return [
            session_id
            for session_id, owner in unfinished
            if owner not in alive or owner == self._engine.id
        ]

    # --- many at a time ------------------------------------------------------------------------

    def _settle(self, session_ids: Sequence[str]) -> list[str]:
        """Make whole who can rest afterwards. Returns who is left to an actor.

        While one chunk is written, the next is decided.
        """
        left: list[str] = []
        before: tuple[Sequence[str], Pending[list[str]]] = ((), settled([]))
        for start in range(0, len(session_ids), AT_ONCE):
            chunk = session_ids[start : start + AT_ONCE]
            now = (chunk, self._begin(chunk))
            left += self._left_by(*before)
            before = now
        return left + self._left_by(*before)

    def _left_by(self, chunk: Sequence[str], pending: Pending[list[str]]) -> list[str]:
        try:
            return pending.get(timeout=self._engine.config.command_timeout_s)
        except Exception as error:  # noqa: BLE001 - one of them: each alone finds out which
            logger.warning("%d sessions are recovered one by one: %s", len(chunk), error)
            return list(chunk)

    def _begin(self, chunk: Sequence[str]) -> Pending[list[str]]:
        """Decide and write a chunk, in a thread that may hang; answers who is left."""
        pending: Pending[list[str]] = Pending()

        def work() -> None:
            try:
                self._write(chunk, self._decide(chunk), pending)
            except BaseException as error:  # noqa: BLE001 - told to whoever waits
                pending.fail(error)

        try:
            self._engine.hooks.workers.submit(work)
        except RuntimeError as error:  # no thread for it
            pending.fail(error)
        return pending

    def _decide(self, chunk: Sequence[str]) -> Decided:
        read = self._engine.store.read
        orphans = read.orphans(chunk)  # before what is open: a claim tells what changed since
        found = read.unfinished([orphan.info.id for orphan in orphans])
        decided = ((orphan, self._decision(orphan, found[orphan.info.id])) for orphan in orphans)
        return [
            (orphan, decision)
            for orphan, decision in decided
            if decision is not None and decision.facts and decision.state.idle
        ]

    def _decision(self, orphan: Orphan, found: Unfinished) -> Decision | None:
        """None when it takes an actor: to give up what is damaged, to look back, or to crash."""
        if found.damaged or found.summarised:
            return None
        engine = self._engine
        state = State(info=orphan.info, seq=orphan.seq)
        moment = Moment(engine.clock.wall_ms(), engine.entropy())
        try:
            return decide(state, Recover(loaded=loaded_of(found)), moment, engine.rules)
        except BaseException:  # noqa: BLE001 - its actor will meet it again, and be counted
            return None

    def _write(self, chunk: Sequence[str], decided: Decided, pending: Pending[list[str]]) -> None:
        def done(moved: list[str] | None, _: Any, error: BaseException | None) -> None:
            if moved is None:
                pending.fail(error or RuntimeError("nothing was written"))
                return
            whole = {orphan.info.id for orphan, _ in decided}.difference(moved)
            for orphan, decision in decided:
                if orphan.info.id in whole:
                    self._engine.reports.orphan_recovered(decision.state.info, decision.facts)
            pending.set([session_id for session_id in chunk if session_id not in whole])

        facts = [(orphan, decision.facts) for orphan, decision in decided]
        self._engine.store.settle_orphans(facts, done)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage less often: of thousands of new actors none is, and looking takes a third."""
    often, *others = gc.get_threshold()
    if often:  # the app may have turned it off
        gc.set_threshold(max(often, 20_000), *others)
    try:
        yield
    finally:
        if often:
            gc.set_threshold(often, *others)
