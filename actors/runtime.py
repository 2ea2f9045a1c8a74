"""The runtime: the embedded entry point. Owns store, dispatcher, supervisor and publisher."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import msgspec
from pykka._envelope import Envelope

from understudy.actors import given
from understudy.actors.clock import Clock, SystemClock
from understudy.actors.core.commands import Abort, Command, Reason, Reply
from understudy.actors.core.forking import fork_facts
from understudy.actors.core.state import CompactionRules, Limits, Moment, Rules, State
from understudy.actors.executor import Executor
from understudy.actors.handles import Done, Records, TranscriptMessage, in_event_loop
from understudy.actors.hooks import Hook, HookCall, Hooks, inside_hook
from understudy.actors.models.configured import model_from
from understudy.actors.outcomes import Outcomes
from understudy.actors.pending import Pending
from understudy.actors.pool import Mailbox, ThreadPool
from understudy.actors.publisher import Publisher
from understudy.actors.recovery_report import RecoveryHook, RecoveryReport, report_of
from understudy.actors.registry import Registry
from understudy.actors.session import Session
from understudy.actors.session_actor import Delete
from understudy.actors.subscription import Subscription
from understudy.actors.supervisor import Died, RestartPolicy, Supervisor
from understudy.actors.tools.tool import Tool, toolbox
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
from understudy.store.claims import Claimed
from understudy.store.events import (
    AnyFact,
    Event,
    PromptSettled,
    SessionCreated,
    SessionReset,
)
from understudy.store.ids import check_id, make_id
from understudy.store.journal import Retention
from understudy.store.records import Ask, ModelRef, SessionTime
from understudy.store.records import Session as SessionRecord
from understudy.store.store import Store
from understudy.store.tracker_rows import TrackerRows

if TYPE_CHECKING:
    from understudy.actors.models.protocol import Model
    from understudy.store.database import Durability
    from understudy.store.writer import FaultHook

logger = logging.getLogger("understudy")

T = TypeVar("T")


class Runtime:
    """Sessions on one database file, whole again when this has started.

    A context manager, in a thread or with ``async with``; or call ``start`` and ``close``.

    Args:
        path: the database file; made if it is not there.
        model: what answers prompts: a ``Model``, or a name for ``model_from``.
        models: further models that prompts may name.
        tools: tools or plain typed functions.
        system: the system prompt.
        permissions: rules by permission, for example ``{"bash": "ask"}``; no rule allows.
        limits: bounds on turns and tools.
        compaction: when and how sessions are compacted.
        restart: how crashed session actors are restarted.
        on_restart: what becomes of a turn that a restart interrupted.
        hooks: the app's own code at fixed points, see ``actors.hooks``.
        hook_s: how long a hook is waited for.
        recovery_hook: called after a session was recovered, see ``RecoveryHook``.
        durability: "full" survives power loss; "normal" survives a killed process.
        retention: how much of the journal is kept.
        passivate_after_s: how long an idle session stays in memory.
        handler_limit_s: how long an actor may take over one batch before it counts as hung.
        command_timeout_s: how long a call waits for its answer.
        agent: the label of assistant messages.
        directory: the directory of sessions that name none.
        threads: dispatcher threads.
        clock, seed, fault: for tests: virtual time, fixed chance, failures of the store.

    Raises:
        InvalidInput: now. StoreError and its kin: from ``start``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: Model | str | None = None,
        models: Sequence[Model] = (),
        tools: Iterable[Tool | Callable[..., Any]] = (),
        system: str = "",
        permissions: given.Permissions | None = None,
        limits: Limits | None = None,
        compaction: CompactionRules | None = None,
        restart: RestartPolicy | None = None,
        on_restart: Literal["interrupt", "resume"] = "interrupt",
        hooks: Mapping[str, Hook | Iterable[Hook]] | None = None,
        hook_s: float = 30.0,
        recovery_hook: RecoveryHook | None = None,
        durability: Durability = "full",
        retention: Retention | None = None,
        passivate_after_s: float = 300.0,
        handler_limit_s: float = 30.0,
        command_timeout_s: float = 60.0,
        agent: str = "build",
        directory: str = "",
        threads: int = 2,
        clock: Clock | None = None,
        seed: int | None = None,
        fault: FaultHook | None = None,
    ) -> None:
        if on_restart not in ("interrupt", "resume"):
            raise InvalidInput("on_restart is 'interrupt' or 'resume'", field="on_restart")
        first = model_from(model) if model is None or isinstance(model, str) else model
        self.models: tuple[Model, ...] = (first, *models)
        self.tools: Mapping[str, Tool] = toolbox(tools)
        self.system = given.text("system", system)
        self.directory = directory
        self.restart = restart or RestartPolicy()
        self.rules = Rules(
            limits=limits or Limits(),
            compaction=compaction or CompactionRules(),
            permissions=given.permission_rules(permissions),
            on_restart=on_restart,
            agent=agent,
            model=ModelRef(provider_id=first.provider_id, model_id=first.model_id),
            context_limit=first.context_limit,
            output_limit=first.output_limit,
        )
        self.clock: Clock = clock or SystemClock()
        self.recovered: deque[RecoveryReport] = deque(maxlen=10_000)
        self._chance = random.Random(seed)
        self._count = 0
        self.id = self.new_id("rtm")
        self.publisher = Publisher(self, wall_ms=self.clock.wall_ms)
        self.store = Store(
            path,
            runtime_id=self.id,
            wall_ms=self.clock.wall_ms,
            published=self.publisher.committed,
            durability=durability,
            fault=fault,
        )
        self.outcomes = Outcomes()
        self.publisher.observe(self.outcomes.observe)
        self.executor = Executor(self)
        self.hooks = Hooks(self, hooks, hook_s=hook_s)
        self.publisher.observe(self._after_turn)
        self._tracker: SessionTracker | None = None
        self._pool = ThreadPool(threads, monotonic_s=self.clock.monotonic_s)
        self._registry = Registry(self, self._pool, monotonic_s=self.clock.monotonic_s)
        self._supervisor = Supervisor(Mailbox(self._pool), self, self.restart, self._chance)
        self._background = ThreadPoolExecutor(4, thread_name_prefix="understudy-calls")
        self._hook = recovery_hook
        self._command_timeout_s = command_timeout_s
        self._upkeep = Upkeep(
            self,
            self._registry,
            self._pool,
            passivate_after_s=passivate_after_s,
            handler_limit_s=handler_limit_s,
            retention=retention or Retention(),
        )
        self._lock = threading.Lock()
        self._state: Literal["new", "open", "closing", "closed"] = "new"

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> Runtime:
        """Open the store and make every session whole. Returns self.

        Raises ``StoreUnreadable``, ``StoreTooNew``, ``StoreBusy``, ``StoreFull``.
        """
        with self._lock:
            if self._state != "new":
                raise RuntimeClosed("A runtime starts once")
            self._state = "open"
        try:
            self.store.open()
            self.publisher.open(self.store.read)
            self.executor.start_loop()
            self._pool.start()
            self._tracker = SessionTracker(store=TrackerRows(self.store), clock=self.clock)
            self._registry.quarantined.update(self.store.read.quarantined())
            self._recover_all()
            self._upkeep.start()
        except BaseException:
            self.close(timeout_s=2.0)
            raise
        return self

    def _recover_all(self) -> None:
        """Recover every session that has anything unfinished and no live owner."""
        for session_id, pending in self.recover_orphans():
            try:
                pending.get(timeout=self._command_timeout_s)
            except SessionClaimed:
                continue  # somebody took it in the meantime: theirs to recover
            except UnderstudyError as error:
                logger.error("Session %s could not be recovered: %s", session_id, error)  # noqa: TRY400

    def recover_orphans(self) -> list[tuple[str, Pending[Any]]]:
        """Wake every unfinished session that no live runtime owns and that is not live here."""
        unfinished = [
            (session_id, owner)
            for session_id, owner in self.store.read.unfinished_sessions()
            if session_id not in self._registry.quarantined
            and self._registry.actor(session_id) is None
        ]
        owners = {owner for _, owner in unfinished if owner is not None}
        alive = self.store.run(lambda tx: {each for each in owners if self.store.alive(tx, each)})
        return [
            (session_id, self._registry.wake(session_id))
            for session_id, owner in unfinished
            if owner not in alive or owner == self.id
        ]

    def close(self, *, drain_s: float = 0.0, timeout_s: float = 5.0) -> bool:
        """Stop: let turns finish for ``drain_s``, interrupt the rest, answer everybody, end.

        Queued prompts stay in the inbox and run after the next start. Bounded by ``timeout_s``
        beyond the draining; False if a thread would not end in time. Safe to repeat.
        """
        with self._lock:
            if self._state in ("closing", "closed"):
                return True
            started, self._state = self._state == "open", "closing"
        deadline = time.monotonic() + drain_s + timeout_s
        if started:
            self._upkeep.stop()
            self._drain(drain_s)
            self._interrupt(max(0.1, (deadline - time.monotonic()) / 2))
        self._registry.close()
        clean = True
        if started:
            clean &= self.executor.close(max(0.5, deadline - time.monotonic()))
            clean &= self._pool.stop(max(0.5, deadline - time.monotonic()))
            self.publisher.close(max(0.5, deadline - time.monotonic()))
        self.outcomes.close()
        self._background.shutdown(wait=False, cancel_futures=True)
        clean &= self.store.close(timeout_s=max(1.0, deadline - time.monotonic()))
        self._state = "closed"
        return clean

    def _drain(self, drain_s: float) -> None:
        """Let running turns come to their end."""
        deadline = time.monotonic() + drain_s
        for actor in self._registry.actors():
            left = deadline - time.monotonic()
            if left <= 0:
                return
            if not actor.idle:
                try:
                    self.idle_of(actor.session_id).get(timeout=left)
                except UnderstudyError:
                    continue

    def _interrupt(self, timeout_s: float) -> None:
        """End what still runs; durable, so that nothing is left to recover."""
        deadline = time.monotonic() + timeout_s
        waiting = [
            self._registry.send(actor.session_id, Abort(reason="close"))
            for actor in self._registry.actors()
            if not actor.idle
        ]
        for pending in waiting:
            try:
                pending.get(timeout=max(0.01, deadline - time.monotonic()))
            except UnderstudyError as error:
                logger.warning("A turn could not be ended at close: %s", error)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        pending: Pending[Runtime] = Pending()
        self.in_background(self.start, pending)
        await pending.wait()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pending: Pending[bool] = Pending()
        closer = threading.Thread(
            target=lambda: pending.set(self.close()), name="understudy-close", daemon=True
        )
        closer.start()
        await pending.wait()

    # --- sessions ------------------------------------------------------------------------------

    def create_session(
        self,
        *,
        title: str | None = None,
        session_id: str | None = None,
        parent_id: str | None = None,
        directory: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        model: str | None = None,
        agent: str | None = None,
        permissions: given.Permissions | None = None,
        internal: bool = False,
    ) -> Session:
        """A new session, durable when this returns.

        ``session_id`` may be chosen; after a delete it starts empty. Raises ``SessionExists``,
        ``SessionNotFound`` (of the parent), ``InvalidInput``, ``StoreError``.
        """
        self._must_be_open()
        now = self.clock.wall_ms()
        internal = internal or inside_hook() is not None
        info = SessionRecord(
            id=self.new_id("ses") if session_id is None else check_id("session_id", session_id),
            title="New session" if title is None else given.title(title),
            time=SessionTime(created=now, updated=now),
            directory=self.directory if directory is None else given.text("directory", directory),
            parent_id=None if parent_id is None else check_id("parent_id", parent_id),
            agent=agent,
            model=self.model_ref(model),
            internal=internal,
            metadata={} if metadata is None else given.metadata(metadata),
            permission=given.permission_rules(permissions),
        )
        pending: Pending[SessionRecord] = Pending()
        facts = (SessionCreated(session_id=info.id, info=info),)
        if internal:
            # Bypassed, durably, before its first prompt can go out.
            bypassed = self.background(lambda: self.tracker.bypass(info.id, allow_unknown=True))
            bypassed.then(
                lambda done: (
                    pending.fail(done.error)
                    if done.error is not None
                    else self._create(info, facts, pending)
                )
            )
        else:
            self._create(info, facts, pending)
        return Session(self, info.id)._begin(pending, self.timeout_s(None))

    def _create(
        self,
        info: SessionRecord,
        facts: tuple[AnyFact, ...],
        pending: Pending[SessionRecord],
    ) -> None:

        def done(claimed: Claimed | None, _: list[Event], error: BaseException | None) -> None:
            if claimed is None:
                pending.fail(error or RuntimeError("no claim"))
                return
            self._registry.born(info.id, State(info=info, seq=claimed.seq), claimed.epoch)
            pending.set(info)
            self._fire("session_start", info)

        self.store.create(info, facts, done)

    def fork_session(
        self, session_id: str, *, before: str | None = None, title: str | None = None
    ) -> Session:
        """See ``Session.fork``."""
        fork_id = self.new_id("ses")
        pending: Pending[SessionRecord] = Pending()

        def work() -> None:
            source = self.record_of(session_id)
            now = self.clock.wall_ms()
            info = msgspec.structs.replace(
                source,
                id=fork_id,
                title=_fork_title(source.title) if title is None else given.title(title),
                time=SessionTime(created=now, updated=now),
                revert=None,
                compaction_failures=0,
            )
            facts = fork_facts(
                self.store.read.messages(session_id),
                source_id=session_id,
                info=info,
                before=before or (source.revert.message_id if source.revert else None),
                moment=Moment(now, self.entropy()),
            )
            self._create(info, facts, pending)

        failed: Pending[None] = Pending()
        failed.then(lambda _: pending.fail(failed.error) if failed.error is not None else None)
        self.in_background(work, failed)
        return Session(self, fork_id)._begin(pending, self.timeout_s(None))

    def session(self, session_id: str) -> Session:
        """A session that exists. Raises ``SessionNotFound``."""
        handle = Session(self, check_id("session_id", session_id))
        return handle._begin(
            self.background(lambda: self.record_of(session_id)), self.timeout_s(None)
        )

    def sessions(
        self,
        *,
        parent_id: str | None = None,
        roots: bool = False,
        directory: str | None = None,
        search: str | None = None,
        archived: bool | None = False,
        internal: bool | None = False,
        order: Literal["updated", "created"] = "updated",
        limit: int | None = 100,
        offset: int = 0,
    ) -> Records[Session]:
        """Sessions, newest first, a page at a time.

        ``archived`` and ``internal`` choose those that are, those that are not, or (None) either.
        """
        if (limit is not None and limit < 0) or offset < 0:
            raise InvalidInput("limit and offset are not negative", field="limit")
        records: Records[Session] = Records(self._handle_of)
        return records._begin(
            self.background(
                lambda: self.store.read.sessions(
                    parent_id=parent_id,
                    roots=roots,
                    directory=directory,
                    search=search,
                    archived=archived,
                    internal=internal,
                    order=order,
                    limit=limit,
                    offset=offset,
                )
            ),
            self.timeout_s(None),
        )

    def _handle_of(self, record: SessionRecord) -> Session:
        handle = Session(self, record.id)
        handle._arrive(record)
        return handle

    def delete_session(self, session_id: str, *, missing_ok: bool = False) -> Done:
        """See ``Session.delete``."""
        pending: Pending[Any] = Pending()
        self._delete(session_id, pending, missing_ok=missing_ok)
        return Done()._begin(pending, self.timeout_s(None))

    def _delete(self, session_id: str, pending: Pending[Any], *, missing_ok: bool) -> None:
        def answered(error: BaseException | None, ids: Any) -> None:
            if error is None:
                pending.set(len(ids))
            elif isinstance(error, SessionNotFound) and missing_ok:
                pending.set(0)
            else:
                pending.fail(error)

        def unowned(ids: Any, events: list[Event], error: BaseException | None) -> None:
            if error is None:
                self.sessions_deleted([event.data.info for event in events])
            answered(error, ids)

        self._must_be_open()
        if self._registry.actor(session_id) is None or session_id in self._registry.quarantined:
            # Nobody works on it here: its rows go without bringing it to life first.
            self.store.delete_tree(session_id, None, unowned)
            return
        reply = self._registry.send(session_id, Delete())
        reply.then(lambda done: answered(done.error, done.result() if done.error is None else None))

    def reset_session(self, session_id: str) -> Done:
        """See ``Session.reset``."""
        self._must_be_open()
        pending: Pending[Any] = Pending()

        def done(lifted: Any, _: list[Event], error: BaseException | None) -> None:
            if error is not None:
                pending.fail(error)
                return
            self._registry.quarantined.pop(session_id, None)
            if lifted:
                self._registry.wake(session_id).then(lambda _: pending.set(True))
            else:
                pending.set(False)

        facts = (SessionReset(session_id=session_id),)
        self.store.lift_quarantine(session_id, facts, done)
        return Done()._begin(pending, self.timeout_s(None))

    # --- events, asks, health ------------------------------------------------------------------

    def events(
        self,
        *,
        after: int | None = None,
        session_id: str | None = None,
        types: Iterable[str] | None = None,
        deltas: bool = True,
        buffer: int = 10_000,
    ) -> Subscription:
        """Events in order: everything after a cursor (0 is the beginning), then live.

        Without ``after`` from now on. ``buffer`` bounds what waits for a slow reader, in events.
        """
        self._must_be_open()
        return Subscription(
            self.publisher,
            after=after,
            session_id=session_id,
            types=None if types is None else frozenset(types),
            deltas=deltas,
            limit=buffer,
        )

    @property
    def cursor(self) -> int:
        """The cursor of the last published event."""
        return self.publisher.cursor

    def asks(self) -> Records[Ask]:
        """Permissions and questions of all sessions that wait for a person, oldest first."""
        records: Records[Ask] = Records()
        return records._begin(self.background(self.store.read.asks), self.timeout_s(None))

    def reply(
        self,
        ask_id: str,
        reply: Literal["once", "always", "reject", "answered"] | None = None,
        *,
        feedback: str | None = None,
        answers: Sequence[Sequence[str]] | None = None,
    ) -> Done:
        """Answer a permission request ("once", "always", "reject") or a question (``answers``).

        A rejection with ``feedback`` lets the turn go on with it; without, it ends the turn. Raises
        ``AskNotFound``; ``AskClosed`` if it was answered before or what asked is gone.
        """
        kind = reply or ("answered" if answers is not None else "once")
        command = Reply(
            ask_id=check_id("ask_id", ask_id),
            reply=kind,
            feedback=feedback,
            answers=tuple(tuple(map(str, each)) for each in answers or ()),
        )
        pending: Pending[Any] = Pending()

        def work() -> None:
            ask = self.store.read.find_ask(ask_id)
            if ask is None:
                raise AskNotFound(f"No such request: {ask_id}", session_id="", ask_id=ask_id)
            self.send(ask.session_id, command).then(_pass_on(pending))

        failed: Pending[None] = Pending()
        failed.then(lambda _: pending.fail(failed.error) if failed.error is not None else None)
        self.in_background(work, failed)
        return Done()._begin(pending, self.timeout_s(None))

    def quarantined(self) -> dict[str, str]:
        """Quarantined sessions and why."""
        return dict(self._registry.quarantined)

    def live_sessions(self) -> int:
        """How many sessions are in memory."""
        return len(self._registry)

    @property
    def restarts(self) -> int:
        """How many actors the supervisor has restarted."""
        return self._supervisor.restarts

    # --- for handles ---------------------------------------------------------------------------

    def send(self, session_id: str, command: Command) -> Pending[Any]:
        self._must_be_open()
        return self._registry.send(session_id, command)

    def timeout_s(self, wanted: float | None) -> float:
        return self._command_timeout_s if wanted is None else wanted

    def background(self, work: Callable[[], T]) -> Pending[T]:
        """Do a read: here in a thread, elsewhere when this thread runs an event loop."""
        self._must_be_open()
        pending: Pending[T] = Pending()
        if in_event_loop():
            self.in_background(work, pending)
        else:
            _settle(pending, work)
        return pending

    def in_background(self, work: Callable[[], T], pending: Pending[T]) -> None:
        """Settle ``pending`` with what ``work`` gives or raises, in a thread of ours."""
        try:
            self._background.submit(_settle, pending, work)
        except RuntimeError:
            pending.fail(RuntimeClosed("The runtime is closed"))

    def record_of(self, session_id: str) -> SessionRecord:
        record = self.store.read.session(session_id)
        if record is None:
            raise SessionNotFound(f"No session {session_id}", session_id=session_id)
        return record

    def status_of(self, session_id: str) -> dict[str, Any]:
        reason = self._registry.quarantined.get(session_id)
        if reason is not None:
            return {"type": "quarantined", "message": reason}
        actor = self._registry.actor(session_id)
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

    def statuses(self) -> dict[str, str]:
        """Sessions that are not idle, by id: "busy" or "retry"."""
        return {
            actor.session_id: actor.state.status.type
            for actor in self._registry.actors()
            if actor.state is not None and actor.state.status.type != "idle"
        }

    def idle_of(self, session_id: str) -> Pending[Any]:
        """Settled when the session has nothing to do."""
        pending = self.outcomes.expect_idle(session_id)

        def look() -> None:
            if self.status_of(session_id)["type"] in ("idle", "quarantined"):
                self.outcomes.forget(session_id, "", pending)
                pending.set(None)

        failed: Pending[None] = Pending()
        failed.then(lambda _: pending.fail(failed.error) if failed.error is not None else None)
        self.in_background(look, failed)
        return pending

    def model_ref(self, name: str | None) -> ModelRef | None:
        """A model of this runtime by ``provider/model``. Raises ``InvalidInput``."""
        if name is None:
            return None
        for model in self.models:
            if name in (f"{model.provider_id}/{model.model_id}", model.model_id):
                return ModelRef(provider_id=model.provider_id, model_id=model.model_id)
        known = ", ".join(f"{model.provider_id}/{model.model_id}" for model in self.models)
        raise InvalidInput(f"no model {name!r} here; there is {known}", field="model")

    def _must_be_open(self) -> None:
        if self._state != "open":
            raise RuntimeClosed(f"The runtime is {self._state}")

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
        return self._chance.getrandbits(96)

    def info(self, session_id: str) -> SessionRecord:
        actor = self._registry.actor(session_id)
        if actor is not None and actor.state is not None:
            return actor.state.info
        return self.record_of(session_id)

    @property
    def tracker(self) -> SessionTracker:
        """Claims by outside integrations and bypasses; durable in this runtime's store."""
        if self._tracker is None:
            raise RuntimeClosed("The runtime is not open")
        return self._tracker

    def handle(self, session_id: str) -> Session:
        """A handle with what is known of the session here and now."""
        return self._handle_of(self.info(session_id))

    def _fire(
        self,
        hook: str,
        info: SessionRecord,
        *,
        message_id: str | None = None,
        outcome: str | None = None,
    ) -> None:
        """Run a hook that nobody waits for, off this thread."""
        if self.hooks.wanted(hook) and not info.internal:
            call = HookCall(
                hook=hook, session=self._handle_of(info), message_id=message_id, outcome=outcome
            )
            self.executor.workers.submit(lambda: self._fire_now(call))

    def _fire_now(self, call: HookCall) -> None:
        if call.message_id is not None:
            prompt, _ = self.store.read.prompt(call.session.id, call.message_id)
            if prompt is not None and prompt.reply_id is not None:
                pair = self.store.read.message(call.session.id, prompt.reply_id)
                text = TranscriptMessage(*pair).text if pair is not None else ""
                call = msgspec.structs.replace(call, text=text)
        self.hooks.fire(call, internal=False)

    def _after_turn(self, event: Event) -> None:
        fact = event.data
        if type(fact) is PromptSettled:
            actor = self._registry.actor(event.session_id)
            wanted = self.hooks.wanted("after_turn") and not fact.info.quiet
            if wanted and actor is not None and actor.state is not None:
                self._fire(
                    "after_turn",
                    actor.state.info,
                    message_id=fact.info.message_id,
                    outcome=fact.info.outcome,
                )

    def tell_live(
        self, session_id: str, command: Command, done: Pending[Any] | None = None
    ) -> None:
        self._registry.tell_live(session_id, command, done)

    def abort_children(self, session_id: str, reason: str) -> None:
        """Abort the live children of a session whose turn ended early."""
        if self._state == "closed":
            return
        for child_id in self.store.read.children(session_id):
            actor = self._registry.actor(child_id)
            if actor is not None and not actor.idle:
                self._registry.send(child_id, Abort(queued=reason != "close", reason="abort"))

    def actor_died(
        self, session_id: str, mailbox: Mailbox, error: BaseException, culprit: str | None
    ) -> None:
        self._supervisor.actor_inbox.put(Envelope(Died(session_id, mailbox, error, culprit)))

    def actor_ended(self, session_id: str, mailbox: Mailbox, error: UnderstudyError | None) -> None:
        self._registry.ended(session_id, mailbox, error)

    def sessions_deleted(self, infos: Sequence[SessionRecord]) -> None:
        for info in infos:
            session_id = info.id
            self.executor.cancel(session_id, "delete")
            self.executor.forget(session_id)
            if not info.internal:
                # An internal session keeps its bypass until that expires: its late hooks
                # must not run.
                self._forget_tracked(session_id)
            self._registry.quarantined.pop(session_id, None)
            self._registry.remove(
                session_id,
                SessionNotFound(f"Session {session_id} was deleted", session_id=session_id),
            )
            self._fire("session_end", info)

    def _forget_tracked(self, session_id: str) -> None:
        """Drop a session's claim and bypass, off the writer's thread."""
        if self.tracker.knows(session_id):
            self.in_background(lambda: self.tracker.forget(session_id), Pending())

    def session_recovered(
        self, session_id: str, reason: Reason, facts: tuple[AnyFact, ...]
    ) -> None:
        """Keep the report, and call the app's hook in a thread of its own."""
        report = report_of(session_id, reason, facts)
        if report is None:
            return
        self.recovered.append(report)
        if self._hook is not None:
            self.executor.workers.submit(lambda: self._call_hook(report))

    def _call_hook(self, report: RecoveryReport) -> None:
        assert self._hook is not None, "only called with a hook"
        try:
            self._hook(self, self._handle_of(self.record_of(report.session_id)), report)
        except Exception:
            logger.exception("The recovery hook failed for session %s", report.session_id)

    def revive(self, session_id: str, mailbox: Mailbox, reason: Reason) -> None:
        self._registry.revive(session_id, mailbox, reason)

    def quarantined_now(self, session_id: str, reason: str) -> None:
        self._registry.quarantined[session_id] = reason

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.executor.call_later(delay_s, callback)


def _settle(pending: Pending[T], work: Callable[[], T]) -> None:
    try:
        pending.set(work())
    except BaseException as error:  # noqa: BLE001 - told to whoever waits
        pending.fail(error)


def _fork_title(title: str) -> str:
    head, _, tail = title.rpartition(" (fork #")
    if head and tail.endswith(")") and tail[:-1].isdigit():
        return f"{head} (fork #{int(tail[:-1]) + 1})"
    return f"{title} (fork #1)"


def _pass_on(pending: Pending[Any]) -> Callable[[Pending[Any]], None]:
    def pass_on(done: Pending[Any]) -> None:
        if done.error is not None:
            pending.fail(done.error)
        else:
            pending.set(done.result())

    return pass_on
