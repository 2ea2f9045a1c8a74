"""The runtime: the embedded entry point."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from understudy.actors import given
from understudy.actors.clock import Clock, SystemClock
from understudy.actors.core.commands import Reply
from understudy.actors.core.state import CompactionRules, Limits, Rules
from understudy.actors.engine import Config, Engine
from understudy.actors.handles import Done, Records
from understudy.actors.hooks import Hook, inside_hook
from understudy.actors.models.configured import model_from
from understudy.actors.pending import Pending
from understudy.actors.platform import Platform, Threads
from understudy.actors.recovery_report import RecoveryHook, RecoveryReport
from understudy.actors.session import Session
from understudy.actors.subscription import Subscription
from understudy.actors.supervisor import RestartPolicy
from understudy.actors.tools.tool import Tool, toolbox
from understudy.actors.tracker import SessionTracker
from understudy.errors import InvalidInput
from understudy.store.database import Durability
from understudy.store.ids import check_id
from understudy.store.journal import Retention
from understudy.store.lease import LEASE_S
from understudy.store.records import Ask, ModelRef, SessionTime
from understudy.store.records import Session as SessionRecord

if TYPE_CHECKING:
    from understudy.actors.models.protocol import Model
    from understudy.store.writer import FaultHook

OnRestart: TypeAlias = Literal["interrupt", "resume"]
Answered: TypeAlias = Literal["once", "always", "reject", "answered"]


class Runtime:
    """Sessions on one database file, whole again when this has started.

    A context manager, in a thread or with ``async with``; or call ``start`` and ``close``.

    Args:
        path: the database file; made if it is not there.
        model: what answers prompts: a ``Model``, or a name for ``model_from``.
        models: further models that prompts may name.
        tools: tools or plain typed functions.
        system: the system prompt.
        permissions: rules by permission, for example ``{"bash": "ask"}``; calls that no
            rule is about run, and a tool's own ``ask`` that none is about asks.
        limits: bounds on turns and tools.
        compaction: when and how sessions are compacted.
        restart: how crashed session actors are restarted.
        on_restart: what becomes of a turn that a restart interrupted.
        hooks: the app's own code at fixed points, see ``actors.hooks``.
        hook_s: how long a hook is waited for, and how long one that nobody waits for may keep a
            thread from the others; both are reported.
        recovery_hook: called with runtime, session and ``RecoveryReport`` after a recovery that
            changed something, in a worker thread. What it raises is logged and changes nothing.
        durability: "full" survives power loss; "normal" survives a killed process.
        retention: how much of the journal is kept.
        passivate_after_s: how long an idle session stays in memory.
        handler_limit_s: how long an actor may take over one batch before it counts as hung.
        command_timeout_s: how long a call waits for its answer.
        agent: the label of assistant messages.
        directory: the directory of sessions that name none.
        lease_s: how long a runtime that cannot renew its lease is still believed to be alive.
        threads: dispatcher threads.
        clock, seed, fault, platform: for tests: virtual time, fixed chance, failures of the store,
            a place to run without threads.

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
        on_restart: OnRestart = "interrupt",
        hooks: Mapping[str, Hook | Iterable[Hook]] | None = None,
        hook_s: float = 30.0,
        recovery_hook: RecoveryHook | None = None,
        durability: Durability = "full",
        retention: Retention | None = None,
        passivate_after_s: float = 300.0,
        handler_limit_s: float = 30.0,
        command_timeout_s: float = 60.0,
        lease_s: float = LEASE_S,
        agent: str = "build",
        directory: str | os.PathLike[str] = "",
        threads: int = 2,
        clock: Clock | None = None,
        seed: int | None = None,
        fault: FaultHook | None = None,
        platform: Platform | None = None,
    ) -> None:
        made = model_from(model) if model is None or isinstance(model, str) else model
        (first,) = given.models("model", (made,))
        if recovery_hook is not None and (
            not callable(recovery_hook) or inspect.iscoroutinefunction(recovery_hook)
        ):
            raise InvalidInput("recovery_hook must be a plain function", field="recovery_hook")
        rules = Rules(
            limits=given.settings("limits", limits, Limits()),
            compaction=given.settings("compaction", compaction, CompactionRules()),
            permissions=given.permission_rules(permissions),
            on_restart=given.choice("on_restart", on_restart, OnRestart),
            agent=given.text("agent", agent),
            model=ModelRef(provider_id=first.provider_id, model_id=first.model_id),
            context_limit=first.context_limit,
            output_limit=first.output_limit,
        )
        self.engine = Engine(
            self,
            Config(
                path=path,
                models=(first, *given.models("models", models)),
                tools=toolbox(tools),
                system=given.text("system", system),
                directory=given.directory(directory),
                rules=rules,
                restart=given.restart_policy(restart),
                hooks=hooks,
                hook_s=given.duration("hook_s", hook_s),
                recovery_hook=recovery_hook,
                durability=given.choice("durability", durability, Durability),
                retention=given.settings("retention", retention, Retention()),
                passivate_after_s=given.duration("passivate_after_s", passivate_after_s),
                handler_limit_s=given.duration("handler_limit_s", handler_limit_s),
                command_timeout_s=given.duration("command_timeout_s", command_timeout_s),
                lease_s=given.duration("lease_s", lease_s, least=1),
                threads=given.whole("threads", threads, least=1),
                clock=clock or SystemClock(),
                seed=seed,
                fault=fault,
                platform=platform or Threads(),
            ),
        )

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> Self:
        """Open the store and make every session whole. Returns self.

        Raises ``StoreUnreadable``, ``StoreTooNew``, ``StoreBusy``, ``StoreFull``; and
        ``RuntimeClosed`` if it was started before, or is closed meanwhile.
        """
        self.engine.start()
        return self

    def close(self, *, drain_s: float = 0.0, timeout_s: float = 5.0) -> bool:
        """Stop: let turns finish for ``drain_s``, interrupt the rest, answer everybody, end.

        Queued prompts stay in the inbox and run after the next start. Bounded by ``timeout_s``
        beyond the draining; False if a thread would not end in time. Safe to repeat. It blocks:
        in an event loop use ``async with``. Not for a signal handler, which may have interrupted
        the very code it would wait for: let that set an event, or raise, and close from outside.
        """
        return self.engine.close(
            drain_s=given.duration("drain_s", drain_s),
            timeout_s=given.duration("timeout_s", timeout_s),
        )

    def __repr__(self) -> str:
        return f"<Runtime {os.fspath(self.engine.store.path)}>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        pending: Pending[None] = Pending()

        def close(_: Pending[None]) -> None:
            self._close_elsewhere()

        self.engine.in_background(self.engine.start, pending)
        try:
            await pending.wait()
        except asyncio.CancelledError:
            # Nobody will leave what was not entered: close it, but not before it has started.
            pending.then(close)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close_elsewhere().wait()

    def _close_elsewhere(self) -> Pending[bool]:
        """Close in a thread of its own: it blocks."""
        pending: Pending[bool] = Pending()
        closer = threading.Thread(
            target=lambda: pending.set(self.close()), name="understudy-close", daemon=True
        )
        closer.start()
        return pending

    # --- sessions ------------------------------------------------------------------------------

    def create_session(
        self,
        *,
        title: str | None = None,
        session_id: str | None = None,
        parent_id: str | None = None,
        directory: str | os.PathLike[str] | None = None,
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
        engine = self.engine
        engine.must_be_open()
        now = engine.clock.wall_ms()
        info = SessionRecord(
            id=engine.new_id("ses") if session_id is None else check_id("session_id", session_id),
            title="New session" if title is None else given.title(title),
            time=SessionTime(created=now, updated=now),
            directory=engine.config.directory if directory is None else given.directory(directory),
            parent_id=None if parent_id is None else check_id("parent_id", parent_id),
            agent=None if agent is None else given.text("agent", agent),
            model=engine.model_ref(model),
            internal=given.switch("internal", internal) or inside_hook() is not None,
            metadata={} if metadata is None else given.metadata(metadata),
            permission=given.permission_rules(permissions),
        )
        pending: Pending[SessionRecord] = Pending()
        engine.lifecycle.create(info, pending)
        return Session(self, info.id)._begin(pending, engine.timeout_s(None))

    def session(self, session_id: str) -> Session:
        """A session that exists. Raises ``SessionNotFound``."""
        handle = Session(self, check_id("session_id", session_id))
        return handle._begin(
            self.engine.background(lambda: self.engine.record_of(session_id)),
            self.engine.timeout_s(None),
        )

    def sessions(
        self,
        *,
        parent_id: str | None = None,
        roots: bool = False,
        directory: str | os.PathLike[str] | None = None,
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
        limit = None if limit is None else given.whole("limit", limit)
        offset = given.whole("offset", offset)
        if parent_id is not None:
            check_id("parent_id", parent_id)
        given.switch("roots", roots)
        if archived is not None:
            given.switch("archived", archived)
        if internal is not None:
            given.switch("internal", internal)
        within = None if directory is None else given.directory(directory)
        search = None if search is None else given.text("search", search)
        records: Records[Session] = Records(self.engine.handle_of)
        return records._begin(
            self.engine.background(
                lambda: self.engine.store.read.sessions(
                    parent_id=parent_id,
                    roots=roots,
                    directory=within,
                    search=search,
                    archived=archived,
                    internal=internal,
                    order=order,
                    limit=limit,
                    offset=offset,
                )
            ),
            self.engine.timeout_s(None),
        )

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
        Raises ``SessionNotFound`` for a session that is not there, in an event loop when the first
        event is taken; with ``after`` what was told of a deleted one is replayed up to its end.
        """
        self.engine.must_be_open()
        events = Subscription(
            self.engine.publisher,
            after=None if after is None else given.whole("after", after),
            session_id=None if session_id is None else check_id("session_id", session_id),
            types=None if types is None else given.event_types(types),
            deltas=given.switch("deltas", deltas),
            limit=given.whole("buffer", buffer, least=1),
        )
        if session_id is not None and after is None:
            # Looked up once it follows: what is deleted later is heard of.
            found = self.engine.background(lambda: self.engine.record_of(session_id))
            found.then(lambda done: events.fail(done.error) if done.error is not None else None)
            if found.done and found.error is not None:
                found.result()
        return events

    @property
    def cursor(self) -> int:
        """The cursor of the last published event."""
        return self.engine.publisher.cursor

    def asks(self) -> Records[Ask]:
        """Permissions and questions of all sessions that wait for a person, oldest first."""
        records: Records[Ask] = Records()
        return records._begin(
            self.engine.background(self.engine.store.read.asks), self.engine.timeout_s(None)
        )

    def reply(
        self,
        ask_id: str,
        reply: Answered | None = None,
        *,
        feedback: str | None = None,
        answers: Sequence[Sequence[str]] | None = None,
    ) -> Done:
        """Answer a permission request ("once", "always", "reject") or a question (``answers``).

        A rejection with ``feedback`` lets the turn go on with it; without, it ends the turn. Raises
        ``AskNotFound``; ``AskClosed`` if it was answered before or what asked is gone.
        """
        kind = ("once" if answers is None else "answered") if reply is None else reply
        given.choice("reply", kind, Answered)
        command = Reply(
            ask_id=check_id("ask_id", ask_id),
            reply=kind,
            feedback=None if feedback is None else given.text("feedback", feedback),
            answers=() if answers is None else given.answers(answers),
        )
        pending: Pending[Any] = Pending()
        self.engine.reply(command, pending)
        return Done()._begin(pending, self.engine.timeout_s(None))

    @property
    def tracker(self) -> SessionTracker:
        """Claims by outside integrations and bypasses; durable in this runtime's store."""
        return self.engine.tracker

    # --- health --------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Who this runtime is to others on the same file."""
        return self.engine.id

    @property
    def recovered(self) -> Sequence[RecoveryReport]:
        """What recoveries did since the start, the latest 10,000."""
        return tuple(self.engine.reports.latest)

    @property
    def restarts(self) -> int:
        """How many actors the supervisor has restarted."""
        return self.engine.supervisor.restarts

    def quarantined(self) -> dict[str, str]:
        """Quarantined sessions and why."""
        return dict(self.engine.registry.quarantined)

    def live_sessions(self) -> int:
        """How many sessions are in memory."""
        return len(self.engine.registry)

    def statuses(self) -> dict[str, str]:
        """Sessions that are not idle, by id: "busy" or "retry"."""
        return {
            actor.session_id: actor.state.status.type
            for actor in self.engine.registry.actors()
            if actor.state is not None and actor.state.status.type != "idle"
        }
