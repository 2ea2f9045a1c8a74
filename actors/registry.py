"""The registry: which sessions are live here, and how a command finds its actor.

A session comes to life with its first command and is passivated after a while without one. Our
own dictionary, not pykka's global list.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pykka._envelope import Envelope

from understudy.actors.core.commands import Abort, Reason
from understudy.actors.core.state import State
from understudy.actors.messages import Activate, Delete, Request, Wake
from understudy.actors.pending import Pending
from understudy.actors.pool import Dispatcher, Mailbox
from understudy.actors.session_actor import SessionActor, Surroundings
from understudy.actors.supervisor import deleted_error, quarantine_error
from understudy.errors import RuntimeClosed, UnderstudyError


class Registry:
    """Live session actors by session id. Safe from any thread."""

    def __init__(
        self,
        around: Surroundings,
        dispatcher: Dispatcher,
        *,
        monotonic_s: Callable[[], float],
    ) -> None:
        self._around = around
        self._dispatcher = dispatcher
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._live: dict[str, Mailbox] = {}
        self._closing = False
        self._closed = False
        self.quarantined: dict[str, str] = {}

    # --- sending -------------------------------------------------------------------------------

    def send(
        self,
        session_id: str,
        command: Any,
        reply: Pending[Any] | None = None,
        *,
        lend: bool = False,
    ) -> Pending[Any]:
        """Send a command, bringing the session to life if need be. The answer is durable.

        With ``lend`` the session's actor, if it is idle, handles it in this thread.
        """
        reply = Pending() if reply is None else reply
        self._deliver(session_id, Request(command, reply), activate=True, lend=lend)
        return reply

    def tell_live(self, session_id: str, command: Any, done: Pending[Any] | None = None) -> None:
        """Send what an executor learned; nobody is there any more: dropped."""
        self._deliver(session_id, Request(command, done, again=True), activate=False)

    def wake(self, session_id: str) -> Pending[Any]:
        """Bring a session to life, so that it recovers. Answers when it has."""
        return self.send(session_id, Wake())

    def _deliver(
        self, session_id: str, request: Request, *, activate: bool, lend: bool = False
    ) -> None:
        while True:
            with self._lock:
                refusal = self._refusal(session_id, request)
                mailbox = self._live.get(session_id)
                if refusal is None and mailbox is None and activate and not self._closing:
                    mailbox = self._activate(session_id)
            if refusal is not None or mailbox is None:
                if request.reply is not None:
                    request.reply.fail(refusal or RuntimeClosed("The session is not live"))
                return
            mailbox.touched_s = self._monotonic_s()
            if mailbox.put(Envelope(request), lend=lend):
                return
            with self._lock:
                if self._live.get(session_id) is mailbox:
                    del self._live[session_id]

    def _refusal(self, session_id: str, request: Request) -> UnderstudyError | None:
        if self._closed:
            return RuntimeClosed("The runtime is closed")
        if self._closing and not request.again and type(request.command) is not Abort:
            return RuntimeClosed("The runtime is closing")
        reason = self.quarantined.get(session_id)
        if reason is not None and type(request.command) is not Delete:
            return quarantine_error(session_id, reason)
        return None

    # --- lives ---------------------------------------------------------------------------------

    def _activate(self, session_id: str) -> Mailbox:
        mailbox = Mailbox(self._dispatcher)
        SessionActor(mailbox, session_id, self._around)
        self._live[session_id] = mailbox
        mailbox.put(Envelope(Activate()))
        return mailbox

    def born(self, session_id: str, state: State, epoch: int) -> None:
        """Enter a session that was just created here: it needs no recovery."""
        self._bury(session_id, epoch)
        mailbox = Mailbox(self._dispatcher)
        SessionActor(mailbox, session_id, self._around, state=state, epoch=epoch)
        mailbox.touched_s = self._monotonic_s()
        with self._lock:
            self._live.setdefault(session_id, mailbox)

    def _bury(self, session_id: str, epoch: int) -> None:
        """End the actor of an earlier life of this id, which another process deleted."""
        actor = self.actor(session_id)
        if actor is not None and actor.state is not None and actor.epoch < epoch:
            self._around.executor.cancel(session_id, "delete")
            self.remove(session_id, deleted_error(session_id))

    def revive(self, session_id: str, mailbox: Mailbox, reason: Reason) -> None:
        """Put a new actor on a mailbox whose actor died."""
        with self._lock:
            if self._closed or self._live.get(session_id) is not mailbox:
                return
            SessionActor(mailbox, session_id, self._around)
        mailbox.put_first(Activate(reason, restarted=True))

    def replace(self, mailbox: Mailbox) -> tuple[str, Mailbox] | None:
        """Give a hung actor's session a fresh mailbox with what waits in the old one."""
        actor = mailbox.actor
        if not isinstance(actor, SessionActor):
            return None
        fresh = Mailbox(self._dispatcher)
        with self._lock:
            if self._live.get(actor.session_id) is not mailbox:
                return None
            mailbox.hand_over(fresh)  # before anybody finds it: what waits keeps its place
            self._live[actor.session_id] = fresh
        return actor.session_id, fresh

    def ended(self, session_id: str, mailbox: Mailbox, error: UnderstudyError | None) -> None:
        """Remove a session; what waits is answered with ``error``, or sent again without one."""
        with self._lock:
            if self._live.get(session_id) is mailbox:
                del self._live[session_id]
        for envelope in mailbox.close():
            request = envelope.message
            if not isinstance(request, Request):
                continue
            if error is None and not request.again:
                self._deliver(session_id, request, activate=True)
            elif request.reply is not None:
                request.reply.fail(error or RuntimeClosed("The session moved away"))

    def remove(self, session_id: str, error: UnderstudyError) -> None:
        """End a live session from outside, because it was deleted."""
        with self._lock:
            mailbox = self._live.get(session_id)
        if mailbox is not None:
            if isinstance(mailbox.actor, SessionActor):
                mailbox.actor.retire(error)
            self.ended(session_id, mailbox, error)

    def passivate(self, idle_s: float) -> list[tuple[str, int]]:
        """Drop sessions that have been idle for long; returns the claims to let go."""
        now = self._monotonic_s()
        dropped = []
        with self._lock:
            for session_id, mailbox in list(self._live.items()):
                actor = mailbox.actor
                if now - mailbox.touched_s < idle_s or not isinstance(actor, SessionActor):
                    continue
                if _close_if_idle(mailbox, actor):
                    del self._live[session_id]
                    dropped.append((session_id, actor.epoch))
        return dropped

    # --- looking -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._live)

    def actor(self, session_id: str) -> SessionActor | None:
        mailbox = self._live.get(session_id)
        actor = mailbox.actor if mailbox is not None else None
        return actor if isinstance(actor, SessionActor) else None

    def actors(self) -> list[SessionActor]:
        with self._lock:
            mailboxes = list(self._live.values())
        return [each.actor for each in mailboxes if isinstance(each.actor, SessionActor)]

    # --- the end -------------------------------------------------------------------------------

    def wind_down(self) -> list[str]:
        """Begin nothing more and let go of who is idle. Returns who is not, to be ended.

        A message that waits is work: who has one is not idle, whatever its state says. Who died
        idle and is to be restarted has nothing to end.
        """
        with self._lock:
            self._closing = True
            for session_id, mailbox in list(self._live.items()):
                actor = mailbox.actor
                if isinstance(actor, SessionActor) and _close_if_idle(mailbox, actor):
                    del self._live[session_id]
            return [each for each, mailbox in self._live.items() if not _died_idle(mailbox)]

    def close(self) -> list[SessionActor]:
        """Take no more commands; whoever waits gets ``RuntimeClosed``. Returns who still works."""
        with self._lock:
            self._closed = True
            live = list(self._live.items())
        for session_id, mailbox in live:
            self.ended(session_id, mailbox, RuntimeClosed("The runtime is closed"))
        return [mailbox.actor for _, mailbox in live if isinstance(mailbox.actor, SessionActor)]


def _died_idle(mailbox: Mailbox) -> bool:
    actor = mailbox.actor
    if not isinstance(actor, SessionActor) or not actor.actor_stopped.is_set():
        return False
    return actor.idle and mailbox.empty()


def _close_if_idle(mailbox: Mailbox, actor: SessionActor) -> bool:
    return mailbox.close_if_idle(lambda: actor.idle)
