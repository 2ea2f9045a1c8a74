"""Sessions come and go: what is done to one from outside its actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from understudy.actors.core.forking import fork_facts
from understudy.actors.core.state import Moment, State
from understudy.actors.messages import Delete
from understudy.actors.pending import Pending, settled
from understudy.actors.supervisor import deleted_error
from understudy.errors import InvalidInput, SessionNotFound
from understudy.store.claims import Claimed
from understudy.store.events import AnyFact, Event, SessionCreated, SessionReset, deleted_by
from understudy.store.records import Session as SessionRecord
from understudy.store.records import SessionTime

if TYPE_CHECKING:
    from understudy.actors.engine import Engine


class Lifecycle:
    """Creates, copies, deletes and resets sessions. Safe from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._forgetting: dict[str, Pending[Any]] = {}

    def create(self, info: SessionRecord, pending: Pending[SessionRecord]) -> None:
        """A new, empty session. A child of an internal session is internal too."""
        if not info.internal and info.parent_id is None:
            self._insert(info, (SessionCreated(session_id=info.id, info=info),), pending)
            return

        def work() -> None:
            read, parent_id = self._engine.store.read, info.parent_id
            parent = None if parent_id is None else read.session(parent_id)
            if parent is not None:
                self._check_depth(parent.id)
            internal = info.internal or (parent is not None and parent.internal)
            final = msgspec.structs.replace(info, internal=internal)
            self._insert(final, (SessionCreated(session_id=info.id, info=final),), pending)

        self._engine.attempt(work, pending)

    def _check_depth(self, parent_id: str) -> None:
        limit = self._engine.rules.limits.depth
        if self._engine.store.read.depth(parent_id) >= limit:
            raise InvalidInput(
                f"Session {parent_id} is as deep as a session may be below others: {limit} "
                "(limits.depth)",
                field="parent_id",
                limit=limit,
            )

    def _insert(
        self,
        info: SessionRecord,
        facts: tuple[AnyFact, ...],
        pending: Pending[SessionRecord],
    ) -> None:
        """Bypass an internal session, durably, before anybody hears of it; then create it."""
        tracker = self._engine.tracker
        known = not info.internal or tracker.is_bypassed(info.id)
        if info.internal:
            tracker.bypass(info.id, allow_unknown=True)

        def done(claimed: Claimed | None, _: list[Event], error: BaseException | None) -> None:
            if claimed is None:
                if not known:
                    self._engine.in_background(lambda: tracker.unbypass(info.id), Pending())
                pending.fail(error or RuntimeError("no claim"))
                return
            answer = "" if len(facts) == 1 else None  # a fork has a history
            state = State(info=info, seq=claimed.seq, answer=answer)
            self._engine.registry.born(info.id, state, claimed.epoch)
            pending.set(info)
            self._engine.hooks.later("session_start", info)

        self._engine.store.create(info, facts, done)

    def delete(self, session_id: str, pending: Pending[Any], *, missing_ok: bool) -> None:
        def answered(error: BaseException | None, ids: Any) -> None:
            if error is None:
                # Gone means all of it: whoever makes it again must not find, or lose, a bypass.
                forgotten = self._forgetting.pop(session_id, None) or settled(None)
                forgotten.then(lambda _: pending.set(len(ids)))
            elif isinstance(error, SessionNotFound) and missing_ok:
                pending.set(0)
            else:
                pending.fail(error)

        def unowned(ids: Any, events: list[Event], error: BaseException | None) -> None:
            if error is None:
                self.ended(deleted_by(events))
            answered(error, ids)

        self._engine.must_be_open()
        registry = self._engine.registry
        if registry.actor(session_id) is None or session_id in registry.quarantined:
            # Nobody works on it here: its rows go without bringing it to life first.
            self._engine.store.delete_tree(session_id, None, unowned)
            return
        reply = registry.send(session_id, Delete())
        reply.then(lambda done: answered(done.error, done.result() if done.error is None else None))

    def fork(
        self,
        session_id: str,
        fork_id: str,
        pending: Pending[SessionRecord],
        *,
        before: str | None,
        title: str | None,
        internal: bool,
    ) -> None:
        """Copy a session's settled history into a new one."""

        def work() -> None:
            source = self._engine.record_of(session_id)
            now = self._engine.clock.wall_ms()
            info = msgspec.structs.replace(
                source,
                id=fork_id,
                title=_fork_title(source.title) if title is None else title,
                time=SessionTime(created=now, updated=now),
                internal=source.internal or internal,
                revert=None,
                compaction_failures=0,
            )
            facts = fork_facts(
                self._engine.store.read.messages(session_id),
                source_id=session_id,
                info=info,
                before=before or (source.revert.message_id if source.revert else None),
                moment=Moment(now, self._engine.entropy()),
            )
            self._insert(info, facts, pending)

        self._engine.attempt(work, pending)

    def reset(self, session_id: str, pending: Pending[bool]) -> None:
        """Lift a quarantine, and recover the session."""

        def done(lifted: Any, _: list[Event], error: BaseException | None) -> None:
            if error is not None:
                pending.fail(error)
                return
            self._engine.registry.quarantined.pop(session_id, None)
            if lifted:
                self._engine.registry.wake(session_id).then(lambda _: pending.set(True))
            else:
                pending.set(False)

        facts = (SessionReset(session_id=session_id),)
        self._engine.store.lift_quarantine(session_id, facts, done)

    def ended(self, infos: Sequence[SessionRecord]) -> None:
        """Drop what is kept of deleted sessions, children first, their root last."""
        self._forget_tracked(infos)
        engine = self._engine
        for info in infos:
            session_id = info.id
            engine.registry.quarantined.pop(session_id, None)  # its id may be used again at once
            engine.executor.cancel(session_id, "delete")
            engine.registry.remove(session_id, deleted_error(session_id))
            # A prompt accepted in the same transaction is waited for since after its events.
            engine.outcomes.tell_deleted(session_id)
            engine.hooks.later("session_end", info)

    def _forget_tracked(self, infos: Sequence[SessionRecord]) -> None:
        """Drop claims and bypasses, off the writer's thread; the delete's answer waits for it.

        An internal session keeps its bypass until that expires: its late hooks must not run.
        """
        tracker = self._engine.tracker
        known = [each.id for each in infos if not each.internal and tracker.knows(each.id)]
        if known:
            forgotten: Pending[Any] = Pending()
            self._forgetting[infos[-1].id] = forgotten

            def forget() -> None:
                for session_id in known:
                    tracker.forget(session_id)

            self._engine.in_background(forget, forgotten)


def _fork_title(title: str) -> str:
    head, _, tail = title.rpartition(" (fork #")
    if head and tail.endswith(")") and tail[:-1].isdigit():
        return f"{head} (fork #{int(tail[:-1]) + 1})"
    return f"{title} (fork #1)"
