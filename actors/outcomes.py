"""Outcomes: whoever waits for the end of a prompt or a compaction."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from understudy.actors.pending import Pending
from understudy.actors.supervisor import deleted_error, quarantine_error
from understudy.errors import RuntimeClosed, TurnAborted
from understudy.store.events import (
    Event,
    PartUpdated,
    PromptSettled,
    SessionDeleted,
    SessionIdle,
    SessionQuarantined,
)
from understudy.store.records import CompactionPart

if TYPE_CHECKING:
    from understudy.store.store import Store

_IDLE = ""

Waiting: TypeAlias = Pending[Any] | list[Pending[Any]]
"""Who waits for one thing: hardly ever two, and a list for each would be half of what is kept."""

OUTCOMES: Final = (PartUpdated, PromptSettled, SessionDeleted, SessionIdle, SessionQuarantined)
"""The facts an ``Outcomes`` observes."""


class Host(Protocol):
    """What looking for an outcome takes of a runtime."""

    store: Store

    def status_of(self, session_id: str) -> dict[str, Any]: ...

    def attempt(self, work: Callable[[], None], pending: Pending[Any]) -> None: ...


class Outcomes:
    """Waiters by session and by the id of the message they wait for. Told by the publisher."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[str, Waiting]] = {}
        self._closed = False

    def expect(self, session_id: str, message_id: str) -> Pending[Any]:
        """The settled ``Prompt``, or the terminal ``CompactionPart``, of a message."""
        return self._wait(session_id, message_id)

    def _wait(self, session_id: str, key: str) -> Pending[Any]:
        pending: Pending[Any] = Pending()
        with self._lock:
            if not self._closed:
                group = self._waiting.setdefault(session_id, {})
                group[key] = [*_each(group[key]), pending] if key in group else pending
                return pending
        pending.fail(RuntimeClosed("The runtime is closed"))
        return pending

    def forget(self, session_id: str, message_id: str, pending: Pending[Any]) -> None:
        with self._lock:
            group = self._waiting.get(session_id, {})
            left = [each for each in _each(group.pop(message_id, [])) if each is not pending]
            if left:
                group[message_id] = left
            if not group:
                self._waiting.pop(session_id, None)

    def end_of(self, session_id: str, message_id: str) -> Pending[Any]:
        """The end of a prompt or compaction accepted who knows when: it may be there already."""
        ended = self.expect(session_id, message_id)
        ended.then(lambda _: self.forget(session_id, message_id, ended))
        self._host.attempt(lambda: self._look(session_id, message_id), ended)
        return ended

    def idle_of(self, session_id: str) -> Pending[Any]:
        """Settled when the session has nothing to do."""
        pending = self._wait(session_id, _IDLE)
        pending.then(lambda _: self.forget(session_id, _IDLE, pending))
        self._host.attempt(lambda: self._look_idle(session_id, (pending,)), pending)
        return pending

    def look_again(self) -> None:
        """Answer from the rows: the events that would have answered are gone."""
        with self._lock:
            waited = [
                (session_id, key, _each(waiting))
                for session_id, group in self._waiting.items()
                for key, waiting in group.items()
            ]
        for session_id, key, waiting in waited:
            if key != _IDLE:
                self._look(session_id, key)
            elif self._host.store.read.session(session_id) is None:
                self.tell_deleted(session_id)
            else:
                self._look_idle(session_id, waiting)

    def _look_idle(self, session_id: str, waiting: Sequence[Pending[Any]]) -> None:
        """Answer who waits for rest. An actor here may not know that others ended its turn.

        Nobody else: when they are told, the next prompt may be at work that others wait for.
        """
        status = self._host.status_of(session_id)
        rests = status["type"] == "quarantined" or (
            status["type"] == "idle" and not status.get("queued")  # what a close leaves waits
        )
        if rests or not self._host.store.read.is_unfinished(session_id):
            # What was read may be news that nobody was told yet.
            self._host.store.between_commits(lambda: _tell_rest(waiting))

    def _look(self, session_id: str, message_id: str) -> None:
        """Answer who waits for a prompt or a compaction by what its rows say of its end."""
        read = self._host.store.read
        prompt, _ = read.prompt(session_id, message_id)
        part = read.marker(session_id, message_id) if prompt is None else None
        if prompt is not None and prompt.outcome is not None:
            self._tell(session_id, message_id, prompt)
        elif part is not None and not part.active:
            self._tell(session_id, message_id, part)
        elif prompt is None and part is None:
            self._fail(session_id, message_id, deleted_error(session_id))
        elif (reason := read.quarantined().get(session_id)) is not None:
            self._fail(session_id, message_id, quarantine_error(session_id, reason))

    def observe(self, event: Event) -> None:
        """Look at a committed event. Cheap when it is nobody's business."""
        if event.session_id not in self._waiting:
            return
        fact = event.data
        if type(fact) is PromptSettled:
            self._tell(event.session_id, fact.info.message_id, fact.info)
        elif type(fact) is PartUpdated and type(fact.part) is CompactionPart:
            if not fact.part.active:
                self._tell(event.session_id, fact.part.message_id, fact.part)
        elif type(fact) is SessionIdle:
            self._tell(event.session_id, _IDLE, None)
        elif type(fact) is SessionDeleted:
            self.tell_deleted(event.session_id)
        elif type(fact) is SessionQuarantined:
            self._tell_quarantined(event.session_id, fact.reason)

    def _tell(self, session_id: str, key: str, value: Any) -> None:
        for pending in self._taken(session_id, key):
            pending.set(value)

    def _fail(self, session_id: str, key: str, error: Exception) -> None:
        for pending in self._taken(session_id, key):
            pending.fail(error)

    def _taken(self, session_id: str, key: str) -> Sequence[Pending[Any]]:
        with self._lock:
            group = self._waiting.get(session_id, {})
            waiting = group.pop(key, [])
            if not group:
                self._waiting.pop(session_id, None)
        return _each(waiting)

    def tell_deleted(self, session_id: str) -> None:
        """The session is gone: nobody's wait for it will end otherwise."""
        with self._lock:
            group = self._waiting.pop(session_id, {})
        for key, waiting in group.items():
            for pending in _each(waiting):
                if key == _IDLE:
                    pending.set(None)
                    continue
                pending.fail(
                    TurnAborted(
                        f"Session {session_id} was deleted",
                        session_id=session_id,
                        message_id=key,
                        reason="delete",
                    )
                )

    def _tell_quarantined(self, session_id: str, reason: str) -> None:
        """Nobody can say when, or whether, the session will run again."""
        with self._lock:
            group = self._waiting.pop(session_id, {})
        for key, waiting in group.items():
            for pending in _each(waiting):
                if key == _IDLE:
                    pending.set(None)
                else:
                    pending.fail(quarantine_error(session_id, reason))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            groups = list(self._waiting.values())
            self._waiting.clear()
        for group in groups:
            for waiting in group.values():
                for pending in _each(waiting):
                    pending.fail(RuntimeClosed("The runtime closed"))

    def __len__(self) -> int:
        return sum(len(group) for group in self._waiting.values())


def _tell_rest(waiting: Sequence[Pending[Any]]) -> None:
    for pending in waiting:
        pending.set(None)


def _each(waiting: Waiting) -> Sequence[Pending[Any]]:
    return waiting if isinstance(waiting, list) else (waiting,)
