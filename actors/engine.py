"""The engine: what lies under a runtime, and what actors, supervisor and executor need of it.

``Runtime`` is what callers see; this is how it works. One engine owns one store, publisher,
dispatcher, executor, registry and supervisor, and wires them together.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
from pykka._envelope import Envelope

from understudy.actors.clock import Clock
from understudy.actors.core.commands import Abort, Command, Reason, Reply
from understudy.actors.core.state import Rules
from understudy.actors.executor import Executor
from understudy.actors.handles import in_event_loop
from understudy.actors.hooks import Hooks
from understudy.actors.lifecycle import Lifecycle
from understudy.actors.messages import Prove
from understudy.actors.orphans import Orphans
from understudy.actors.outcomes import OUTCOMES, Outcomes
from understudy.actors.pending import Pending
from understudy.actors.platform import Platform
from understudy.actors.pool import Mailbox
from understudy.actors.publisher import Publisher
from understudy.actors.recovery_report import Reports
from understudy.actors.registry import Registry
from understudy.actors.session import Session
from understudy.actors.supervisor import Died, RestartPolicy, Supervisor
from understudy.actors.tools.tool import Tool
from understudy.actors.tracker import SessionTracker
from understudy.actors.upkeep import Upkeep
from understudy.errors import (
    AskNotFound,
    InvalidInput,
    RuntimeClosed,
    SessionClaimed,
    SessionNotFound,
    UnderstudyError,
)
from understudy.store.events import (
    AnyFact,
    Event,
    PromptSettled,
    SessionDeleted,
    SessionReset,
)
from understudy.store.ids import make_id
from understudy.store.journal import Retention
from understudy.store.records import ModelRef, Pair
from understudy.store.records import Session as SessionRecord
from understudy.store.store import Store
from understudy.store.tracker_rows import TrackerRows

if TYPE_CHECKING:
    from understudy.actors.models.protocol import Model
    from understudy.actors.runtime import Runtime
    from understudy.store.database import Durability

logger = logging.getLogger("understudy")

T = TypeVar("T")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A runtime's settings, checked; see ``Runtime`` for what they mean."""

    path: str | os.PathLike[str]
    models: tuple[Any, ...]
    tools: dict[str, Any]
    system: str
    directory: str
    rules: Rules
    restart: RestartPolicy
    hooks: Mapping[str, Any] | None
    hook_s: float
    recovery_hook: Any
    durability: Durability
    retention: Retention
    passivate_after_s: float
    handler_limit_s: float
    command_timeout_s: float
    lease_s: float
    threads: int
    clock: Any
    seed: int | None
    fault: Any
    platform: Platform


class Engine:
    """Everything a runtime is made of. Its methods are safe from any thread."""

    def __init__(self, front: Runtime, config: Config) -> None:
        self.front = front
        self.config = config
        self.models: tuple[Model, ...] = config.models
        self.tools: Mapping[str, Tool] = config.tools
        self.system = config.system
        self.rules = config.rules
        self.restart = config.restart
        self.clock: Clock = config.clock
        self.platform = config.platform
        self.chance = random.Random(config.seed)
        self._count = 0
        self.id = self.new_id("rtm")
        lane = self.platform.lane
        self.publisher = Publisher(front, wall_ms=self.clock.wall_ms, lane=lane)
        self.store = Store(
            config.path,
            runtime_id=self.id,
            wall_ms=self.clock.wall_ms,
            published=self.publisher.committed,
            durability=config.durability,
            lease_s=config.lease_s,
            fault=config.fault,
            lane=lane,
        )
        self.outcomes = Outcomes(self)
        self.publisher.observe(self.outcomes.observe, *OUTCOMES)
        self.publisher.observe(lambda e: self._forget_deleted(e.session_id), SessionDeleted)
        self.publisher.observe(self._lift_quarantine, SessionReset)
        self.hooks = Hooks(self, config.hooks, hook_s=config.hook_s)
        self.executor = Executor(self)
        self.pool = self.platform.dispatcher(config.threads, monotonic_s=self.clock.monotonic_s)
        self.registry = Registry(self, self.pool, monotonic_s=self.clock.monotonic_s)
        self.lifecycle = Lifecycle(self)
        self.reports = Reports(self, config.recovery_hook)
        self.orphans = Orphans(self)
        self.supervisor = Supervisor(Mailbox(self.pool), self, self.restart, self.chance)
        self.upkeep = Upkeep(
            self,
            passivate_after_s=config.passivate_after_s,
            handler_limit_s=config.handler_limit_s,
            retention=config.retention,
        )
        self._tracker: SessionTracker | None = None
        self._background = self.platform.calls("understudy-calls", 4)
        self._lock = threading.Lock()
        self._state: Literal["new", "open", "closing", "closed"] = "new"
        self._starting = False
        self._pid = os.getpid()
        self._closer: int | None = None
        self._ended = threading.Event()
        self._clean = True

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the store, start the threads, recover what is unfinished.

        Closed meanwhile from elsewhere, it ends what it began, and raises ``RuntimeClosed``.
        """
        with self._lock:
            if self._state != "new":
                raise RuntimeClosed("A runtime starts once")
            self._state, self._starting = "open", True
            self._closer = threading.get_ident()  # of whoever closes it before it is up
        try:
            self.store.open()
            self.publisher.open(self.store.read)
            self.executor.start_loop()
            self.pool.start()
            self._tracker = SessionTracker(store=TrackerRows(self.store), clock=self.clock)
            self.registry.quarantined.update(self.store.read.quarantined())
            self.upkeep.start()  # a recovery may take longer than the lease, or hang
            self.orphans.recover_all()
            with self._lock:
                if self._state != "open":
                    raise RuntimeClosed("The runtime was closed as it started")
                self._starting = False
        except BaseException:
            self._end(0.0, 2.0)
            raise

    def close(self, *, drain_s: float = 0.0, timeout_s: float = 5.0) -> bool:
        """Stop: let turns finish for ``drain_s``, interrupt the rest, answer everybody, end.

        Queued prompts stay in the inbox and run after the next start. Bounded by ``timeout_s``
        beyond the draining; False if a thread would not end in time. Safe to repeat.
        """
        if os.getpid() != self._pid:
            return True  # a fork's copy: threads, claims and lock are its parent's
        with self._lock:
            before = self._state
            if before in ("new", "open"):
                self._state = "closing"
            mine = before == "new" or (before == "open" and not self._starting)
            if mine:
                self._closer = threading.get_ident()
        if mine:
            self._end(drain_s, timeout_s, started=before == "open")
        elif self._closer != threading.get_ident() and not in_event_loop():
            return self._ended.wait(drain_s + timeout_s) and self._clean
        return self._clean

    def _end(self, drain_s: float, timeout_s: float, *, started: bool = True) -> None:
        """Close, once: for the first who closes it, or who starts it if it is not up yet."""
        self._state = "closing"
        try:
            self._clean = self._close(drain_s, timeout_s, started=started)
        finally:
            self._state = "closed"
            self._ended.set()

    def _close(self, drain_s: float, timeout_s: float, *, started: bool) -> bool:
        deadline = self.clock.monotonic_s() + drain_s + timeout_s
        if started:
            self.upkeep.stop()
            self._drain(drain_s)
            self._interrupt(max(0.1, (deadline - self.clock.monotonic_s()) / 2))
        working = self.registry.close()
        clean = True
        if started:
            clean &= self.executor.close(max(0.5, deadline - self.clock.monotonic_s()))
            clean &= self.pool.stop(max(0.5, deadline - self.clock.monotonic_s()))
            self.publisher.close(max(0.5, deadline - self.clock.monotonic_s()))
        self.outcomes.close()
        self.hooks.close()
        self._background.shutdown(wait=False, cancel_futures=True)
        clean &= self.store.close(timeout_s=max(1.0, deadline - self.clock.monotonic_s()))
        for actor in working:  # what was committed is answered; what hangs never will be
            actor.retire(RuntimeClosed("The runtime is closed"))
        return clean

    def _drain(self, drain_s: float) -> None:
        """Let running turns come to their end."""
        deadline = self.clock.monotonic_s() + drain_s
        for actor in self.registry.actors():
            left = deadline - self.clock.monotonic_s()
            if left <= 0:
                return
            if not actor.idle:
                try:
                    self.outcomes.idle_of(actor.session_id).get(timeout=left)
                except UnderstudyError:
                    continue

    def _interrupt(self, timeout_s: float) -> None:
        """End what still runs; durable, so that nothing is left to recover."""
        deadline = self.clock.monotonic_s() + timeout_s
        self.rules = msgspec.structs.replace(self.rules, rest=True)  # whose actor is restarted now
        waiting = [
            self.registry.send(session_id, Abort(reason="close"))
            for session_id in self.registry.wind_down()
        ]
        for pending in waiting:
            try:
                pending.get(timeout=max(0.01, deadline - self.clock.monotonic_s()))
            except (RuntimeClosed, SessionClaimed, SessionNotFound):
                continue  # nothing of it runs here any more
            except UnderstudyError as error:
                logger.warning("A turn could not be ended at close: %s", error)

    # --- calls ---------------------------------------------------------------------------------

    def reply(self, command: Reply, pending: Pending[Any]) -> None:
        """Find whose request it is, and answer it there."""

        def work() -> None:
            ask = self.store.read.find_ask(command.ask_id)
            if ask is None:
                raise AskNotFound(
                    f"No such request: {command.ask_id}", session_id="", ask_id=command.ask_id
                )
            self.send(ask.session_id, command).then(_pass_on(pending))

        self.attempt(work, pending)

    def send(
        self, session_id: str, command: Command, reply: Pending[Any] | None = None
    ) -> Pending[Any]:
        self.must_be_open()
        return self.registry.send(session_id, command, reply)

    def ask(
        self, session_id: str, command: Command, reply: Pending[Any] | None = None
    ) -> Pending[Any]:
        """Send what the caller waits for, if it can: then its thread may do the actor's work."""
        self.must_be_open()
        return self.registry.send(session_id, command, reply, lend=self.pool.may_lend())

    def timeout_s(self, wanted: float | None) -> float:
        return self.config.command_timeout_s if wanted is None else wanted

    def background(self, work: Callable[[], T]) -> Pending[T]:
        """Do a read: here in a thread, elsewhere when this thread runs an event loop."""
        self.must_be_open()
        pending: Pending[T] = Pending()
        if in_event_loop():
            self.in_background(work, pending)
        else:
            pending.settle(work)
        return pending

    def in_background(self, work: Callable[[], T], pending: Pending[T]) -> None:
        """Settle ``pending`` with what ``work`` gives or raises, in a thread of ours."""
        try:
            job = self._background.submit(pending.settle, work)
        except RuntimeError:
            pending.fail(RuntimeClosed("The runtime is closed"))
        else:
            # Closing cancels what has not begun: whoever waits for it is answered all the same.
            job.add_done_callback(
                lambda done: (
                    pending.fail(RuntimeClosed("The runtime closed")) if done.cancelled() else None
                )
            )

    def attempt(self, work: Callable[[], None], pending: Pending[Any]) -> None:
        """Do what will settle ``pending``, in a thread of ours; it fails if that raises."""
        begun: Pending[None] = Pending()
        begun.then(lambda _: pending.fail(begun.error) if begun.error is not None else None)
        self.in_background(work, begun)

    def must_be_open(self) -> None:
        if self._state == "new":
            raise RuntimeClosed("The runtime has not been started: use `with`, or call start()")
        if self._state != "open":
            raise RuntimeClosed(f"The runtime is {self._state}")
        if os.getpid() != self._pid:
            raise RuntimeClosed("The runtime stayed in the process that forked this one")

    # --- looking -------------------------------------------------------------------------------

    def record_of(self, session_id: str) -> SessionRecord:
        record = self.store.read.session(session_id)
        if record is None:
            raise SessionNotFound(f"No session {session_id}", session_id=session_id)
        return record

    def status_of(self, session_id: str) -> dict[str, Any]:
        reason = self.registry.quarantined.get(session_id)
        if reason is not None:
            return {"type": "quarantined", "message": reason}
        actor = self.registry.actor(session_id)
        state = actor.state if actor is not None else None
        if state is None:
            self.record_of(session_id)
            busy = self.store.read.is_unfinished(session_id)
            return {"type": "busy" if busy else "idle"}
        status = state.status
        return {
            "type": status.type,
            "attempt": status.attempt,
            "message": status.message,
            "next_ms": status.next,
            "queued": len(state.queue),
            "asks": len(state.asks),
        }

    def look_again(self) -> None:
        """Learn from the rows what events said that were trimmed before they came here."""
        quarantined = set(self.registry.quarantined)
        for session_id in quarantined.difference(self.store.read.quarantined()):
            self.registry.quarantined.pop(session_id, None)
        for session_id in {*self.executor.sessions(), *self.supervisor.sessions()}:
            if self.store.read.session(session_id) is None:
                self._forget_deleted(session_id)
        self.outcomes.look_again()

    def model_ref(self, name: str | None) -> ModelRef | None:
        """A model of this runtime by ``provider/model``. Raises ``InvalidInput``."""
        if name is None:
            return None
        for model in self.models:
            if name in (f"{model.provider_id}/{model.model_id}", model.model_id):
                return ModelRef(provider_id=model.provider_id, model_id=model.model_id)
        known = ", ".join(f"{model.provider_id}/{model.model_id}" for model in self.models)
        raise InvalidInput(f"no model {name!r} here; there is {known}", field="model")

    # --- for actors, supervisor and executor ---------------------------------------------------

    def new_id(self, prefix: str) -> str:
        self._count += 1
        return make_id(
            prefix,
            now_ms=self.clock.wall_ms(),
            counter=self._count,
            entropy=self.entropy(),
        )

    def entropy(self) -> int:
        return self.chance.getrandbits(96)

    def info(self, session_id: str) -> SessionRecord:
        actor = self.registry.actor(session_id)
        if actor is not None and actor.state is not None:
            return actor.state.info
        return self.record_of(session_id)

    def said(self, session_id: str, reply_id: str) -> Sequence[Pair] | None:
        """All messages of a turn up to its answer, if that is being told here and now."""
        actor = self.registry.actor(session_id)
        return actor.said(reply_id) if actor is not None else None

    @property
    def tracker(self) -> SessionTracker:
        """Claims by outside integrations and bypasses; durable in this runtime's store."""
        if self._tracker is None:
            raise RuntimeClosed("The runtime is not open")
        return self._tracker

    def handle(self, session_id: str) -> Session:
        """A handle with what is known of the session here and now."""
        return self.handle_of(self.info(session_id))

    def handle_of(self, record: SessionRecord) -> Session:
        handle = Session(self.front, record.id)
        handle._arrive(record)
        return handle

    def _forget_deleted(self, session_id: str) -> None:
        """Drop what is kept of a deleted session, whichever process deleted it."""
        self.executor.forget(session_id)
        self.supervisor.forget(session_id)
        self.registry.quarantined.pop(session_id, None)

    def _lift_quarantine(self, event: Event) -> None:
        """Let a session run again, whichever process reset it."""
        self.registry.quarantined.pop(event.session_id, None)

    def tell_live(
        self, session_id: str, command: Command, done: Pending[Any] | None = None
    ) -> None:
        self.registry.tell_live(session_id, command, done)

    def abort_children(self, session_id: str, reason: str) -> None:
        """Abort the live descendants of a session whose turn ended early.

        What runs aborts its own children; those of an idle child are looked for here. A runtime
        that closes ends them each by itself: what waits there is to wait on.
        """
        above = [session_id] if reason != "close" else []
        while above and self._state != "closed":
            for child_id in self.store.read.children(above.pop()):
                actor = self.registry.actor(child_id)
                if actor is None or actor.idle:
                    above.append(child_id)
                else:
                    self.registry.send(child_id, Abort(queued=True))

    def prove(self, session_id: str, proven: Pending[Any]) -> None:
        """Renew the lease, and see whether the session is still this runtime's."""
        self.store.renew_lease(self.publisher.poll)
        self.registry.tell_live(session_id, Prove(), proven)

    def actor_died(
        self, session_id: str, mailbox: Mailbox, error: BaseException, culprit: str | None
    ) -> None:
        self.supervisor.actor_inbox.put(Envelope(Died(session_id, mailbox, error, culprit)))

    def actor_ended(self, session_id: str, mailbox: Mailbox, error: UnderstudyError | None) -> None:
        self.registry.ended(session_id, mailbox, error)

    def sessions_deleted(self, infos: Sequence[SessionRecord]) -> None:
        self.lifecycle.ended(infos)

    def session_recovered(
        self, session_id: str, reason: Reason, facts: tuple[AnyFact, ...]
    ) -> None:
        self.reports.recovered(session_id, reason, facts)

    def session_changed(self, info: SessionRecord, facts: Sequence[AnyFact]) -> None:
        for fact in facts:
            if type(fact) is PromptSettled:
                self.hooks.after_turn(info, fact)

    def revive(self, session_id: str, mailbox: Mailbox, reason: Reason) -> None:
        self.registry.revive(session_id, mailbox, reason)

    def quarantined_now(self, session_id: str, reason: str) -> None:
        self.registry.quarantined[session_id] = reason

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.executor.call_later(delay_s, callback)


def _pass_on(pending: Pending[Any]) -> Callable[[Pending[Any]], None]:
    def pass_on(done: Pending[Any]) -> None:
        if done.error is not None:
            pending.fail(done.error)
        else:
            pending.set(done.result())

    return pass_on
