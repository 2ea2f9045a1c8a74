"""Session, Turn and Compaction: the handles of the public API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from understudy.actors import given
from understudy.actors.core.commands import (
    Abort,
    RequestCompaction,
    RevertTo,
    Unrevert,
    UpdateSession,
)
from understudy.actors.handles import Done, Handle, Records, Reply, TranscriptMessage
from understudy.actors.hooks import inside_hook
from understudy.actors.pending import Pending, failing
from understudy.actors.session_actor import Crash
from understudy.errors import (
    CommandTimeout,
    CompactionFailed,
    SessionNotFound,
    TurnAborted,
    TurnFailed,
)
from understudy.store.events import Event, PromptSettled, PromptStarted, SessionDeleted
from understudy.store.ids import check_id
from understudy.store.records import (
    Ask,
    CompactionPart,
    FilePart,
    Prompt,
    TextPart,
    UserMessage,
    WhenBusy,
)
from understudy.store.records import Session as SessionRecord

if TYPE_CHECKING:
    from understudy.actors.runtime import Runtime
    from understudy.actors.subscription import Subscription

H = TypeVar("H", bound=Handle)


class SessionStatus(Handle):
    """What a session is doing.

    Attributes:
        type: "idle", "busy", "retry" (see ``attempt``, ``message``, ``next_ms``), or
            "quarantined" (see ``message``).
        queued: prompts that wait.
        asks: permissions and questions that wait for a person.
    """

    type: str = "idle"
    attempt: int | None = None
    message: str | None = None
    next_ms: int | None = None
    queued: int = 0
    asks: int = 0

    def _arrive(self, value: Any) -> None:
        for name, each in value.items():
            setattr(self, name, each)

    def __repr__(self) -> str:
        return f"<SessionStatus {self.type}>"


class Session(Handle):
    """A durable conversation, and everything that can be done with it.

    ``record`` is the session as last seen by this handle; ``refresh()`` looks again.
    """

    def __init__(self, runtime: Runtime, session_id: str) -> None:
        self._runtime = runtime
        self._record: SessionRecord | None = None
        self.id = session_id

    def _arrive(self, value: Any) -> None:
        self._record = value

    def __repr__(self) -> str:
        return f"<Session {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Session) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def runtime(self) -> Runtime:
        """The runtime this handle belongs to."""
        return self._runtime

    @property
    def record(self) -> SessionRecord:
        self._ready()
        assert self._record is not None, "a session handle has its record"
        return self._record

    @property
    def title(self) -> str:
        return self.record.title

    @property
    def parent_id(self) -> str | None:
        return self.record.parent_id

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.record.metadata

    # --- prompts -------------------------------------------------------------------------------

    def prompt(
        self,
        prompt: str | Sequence[str | TextPart | FilePart | Path],
        *,
        message_id: str | None = None,
        when_busy: WhenBusy = "queue",
        system: str | None = None,
        tools: Mapping[str, bool] | None = None,
        model: str | None = None,
        agent: str | None = None,
        timeout_s: float | None = None,
    ) -> Turn:
        """Accept a prompt; it is durable when this returns.

        Args:
            prompt: text, or a sequence of texts, paths of files, and file parts.
            message_id: makes the prompt idempotent: the same id with the same content gives the
                same turn again, also at the same time and after a restart.
            when_busy: "queue" waits its turn, "steer" joins the running turn at its next step,
                "interrupt" ends the running turn first, "reject" raises ``SessionBusy``.
            system: the system prompt of this turn instead of the runtime's.
            tools: which tools this turn may use, by name; ``{"*": False, "read": True}``.
            model: "provider/model" of one of the runtime's models.
            agent: a label kept on the messages.
            timeout_s: how long to wait for the acceptance, if not the runtime's usual time.

        Raises:
            InvalidInput, SessionNotFound, SessionBusy, SessionQuarantined, SessionClaimed,
            PromptConflict, StoreError, RuntimeClosed, CommandTimeout.
        """
        runtime = self._runtime
        given.seconds("timeout_s", timeout_s)
        command = given.prompt_command(
            prompt,
            limit_bytes=runtime.engine.rules.limits.prompt_bytes,
            message_id=message_id,
            when_busy=when_busy,
            system=system,
            tools=tools,
            model=runtime.engine.model_ref(model),
            agent=agent,
        )
        turn = Turn(self, message_id)
        return turn._begin(
            runtime.engine.send(self.id, command), runtime.engine.timeout_s(timeout_s)
        )

    def turn(self, message_id: str) -> Turn:
        """The turn of a prompt that was accepted before."""
        runtime = self._runtime
        check_id("message_id", message_id)
        return Turn(self, message_id)._begin(
            runtime.engine.background(lambda: self._known_prompt(message_id)),
            runtime.engine.timeout_s(None),
        )

    def _known_prompt(self, message_id: str) -> Prompt:
        prompt, _ = self._runtime.engine.store.read.prompt(self.id, message_id)
        if prompt is None:
            raise given.no_message(self.id, message_id)
        return prompt

    def prompts(self) -> Records[Prompt]:
        """Every prompt the session accepted, with its outcome, oldest first."""
        return self._read(Records(), lambda: self._runtime.engine.store.read.prompts(self.id))

    # --- commands ------------------------------------------------------------------------------

    def abort(self, *, queued: bool = False) -> Done:
        """End the running turn, its tools and their processes, and those of child sessions.

        What waits in the queue runs next, unless ``queued`` ends it too. True if anything ran.
        """
        return self._command(Done(), Abort(queued=queued))

    def compact(self) -> Compaction:
        """Summarise the history; merges into a compaction that is already wanted."""
        return self._command(Compaction(self), RequestCompaction())

    def revert(self, message_id: str) -> Session:
        """Hide ``message_id`` and all after it. The next prompt removes them for good."""
        return self._command(self, RevertTo(message_id=check_id("message_id", message_id)))

    def unrevert(self) -> Session:
        """Show again what ``revert`` hid."""
        return self._command(self, Unrevert())

    def fork(self, *, before: str | None = None, title: str | None = None) -> Session:
        """A new session with a copy of the history, up to a message."""
        engine = self._runtime.engine
        fork_id = engine.new_id("ses")
        pending: Pending[SessionRecord] = Pending()
        name = None if title is None else given.title(title)
        if before is not None:
            check_id("before", before)
        internal = inside_hook() is not None
        engine.fork(self.id, fork_id, pending, before=before, title=name, internal=internal)
        return Session(self._runtime, fork_id)._begin(pending, engine.timeout_s(None))

    def update(
        self,
        *,
        title: str | msgspec.UnsetType = msgspec.UNSET,
        directory: str | msgspec.UnsetType = msgspec.UNSET,
        metadata: Mapping[str, Any] | msgspec.UnsetType = msgspec.UNSET,
        model: str | msgspec.UnsetType | None = msgspec.UNSET,
        permissions: given.Permissions | msgspec.UnsetType = msgspec.UNSET,
    ) -> Session:
        """Change what is named; ``metadata`` is replaced whole."""
        command = UpdateSession(
            title=title if title is msgspec.UNSET else given.title(title),
            directory=directory
            if directory is msgspec.UNSET
            else given.text("directory", directory),
            metadata=msgspec.UNSET if metadata is msgspec.UNSET else given.metadata(metadata),
            model=model if model is msgspec.UNSET else self._runtime.engine.model_ref(model),
            permission=(
                msgspec.UNSET
                if permissions is msgspec.UNSET
                else given.permission_rules(permissions)
            ),
        )
        return self._command(self, command)

    def archive(self, archived: bool = True) -> Session:  # noqa: FBT001, FBT002 - reads as said
        """Take the session out of the usual listing, or put it back."""
        now = self._runtime.engine.clock.wall_ms() if archived else None
        return self._command(self, UpdateSession(archived=now))

    def delete(self, *, missing_ok: bool = False) -> Done:
        """Delete the session and its children, all or nothing. Gone when this returns.

        Raises ``SessionNotFound`` if it is not there, unless ``missing_ok``; ``SessionClaimed``
        if another live runtime works on it or a child.
        """
        engine = self._runtime.engine
        pending: Pending[int] = Pending()
        engine.delete(self.id, pending, missing_ok=missing_ok)
        return Done()._begin(pending, engine.timeout_s(None))

    def reset(self) -> Done:
        """Let a quarantined session run again. True if it was quarantined."""
        engine = self._runtime.engine
        engine.must_be_open()
        pending: Pending[bool] = Pending()
        engine.reset(self.id, pending)
        return Done()._begin(pending, engine.timeout_s(None))

    def _crash(self, reason: str = "crash on request") -> Done:
        """Make the session's actor die, as a bug would. For chaos and tests."""
        return self._command(Done(), Crash(reason))

    # --- reading -------------------------------------------------------------------------------

    def refresh(self) -> Session:
        """Look at the session again. Raises ``SessionNotFound``."""
        return self._read(self, lambda: self._runtime.engine.record_of(self.id))

    def messages(
        self, *, limit: int | None = None, before: str | None = None
    ) -> Records[TranscriptMessage]:
        """The transcript in order: the newest ``limit`` messages, before a message if given."""
        limit = None if limit is None else given.whole("limit", limit)
        if before is not None:
            check_id("before", before)
        records: Records[TranscriptMessage] = Records(lambda pair: TranscriptMessage(*pair))

        def read() -> Any:
            reads = self._runtime.engine.store.read
            pairs = reads.messages(self.id, limit=limit, before=before)
            if not pairs:
                self._runtime.engine.record_of(self.id)
            if before is not None and reads.message(self.id, before) is None:
                raise given.no_message(self.id, before)
            return pairs

        return self._read(records, read)

    def status(self) -> SessionStatus:
        """What the session is doing. Agrees with its transcript."""
        return self._read(SessionStatus(), lambda: self._runtime.engine.status_of(self.id))

    def children(self) -> Records[Session]:
        """Sessions whose parent this is."""
        return self._runtime.sessions(parent_id=self.id, internal=None, archived=None, limit=None)

    def asks(self) -> Records[Ask]:
        """Permissions and questions of this session that wait for a person."""
        return self._read(Records(), lambda: self._runtime.engine.store.read.asks(self.id))

    def events(self, *, after: int | None = None, deltas: bool = True) -> Subscription:
        """This session's events: from a cursor, or from now on."""
        return self._runtime.events(after=after, session_id=self.id, deltas=deltas)

    def wait_idle(self, *, timeout_s: float | None = None) -> Done:
        """Wait until the session has nothing left to do."""
        timeout_s = given.seconds("timeout_s", timeout_s)
        return Done()._begin(self._runtime.engine.idle_of(self.id), timeout_s)

    # --- plumbing ------------------------------------------------------------------------------

    def _command(self, handle: H, command: Any) -> H:
        runtime = self._runtime
        return handle._begin(runtime.engine.send(self.id, command), runtime.engine.timeout_s(None))

    def _read(self, handle: H, work: Callable[[], Any]) -> H:
        runtime = self._runtime
        return handle._begin(runtime.engine.background(work), runtime.engine.timeout_s(None))


class Turn(Handle):
    """An accepted prompt: iterate it for its events, ask for its result.

    Attributes:
        message_id: the prompt's user message, and the turn's name.
    """

    def __init__(self, session: Session, message_id: str | None) -> None:
        self.session = session
        self._runtime = session._runtime
        self._message_id = message_id
        self._prompt: Prompt | None = None
        self._named = message_id is not None  # then it may have been accepted long ago
        self._after = self._runtime.engine.publisher.cursor

    def _arrive(self, value: Any) -> None:
        self._prompt = value
        self._message_id = value.message_id

    def __repr__(self) -> str:
        return f"<Turn {self._message_id} of {self.session.id}>"

    @property
    def message_id(self) -> str:
        self._ready()
        assert self._message_id is not None, "an accepted prompt has its id"
        return self._message_id

    # --- the result ----------------------------------------------------------------------------

    def result(self, *, timeout_s: float | None = None) -> Reply:
        """Wait for the answer.

        Raises:
            TurnAborted: it was interrupted (``reason`` says by what).
            TurnFailed: it ended in an error (``name``, ``message``).
            CommandTimeout: not within ``timeout_s``; the turn goes on.
        """
        timeout_s = given.seconds("timeout_s", timeout_s)
        done: Pending[Any] = Pending()
        if self._pending is not None and not self._pending.done:
            self._looked = True
            self._pending.then(lambda accepted: self._outcome(accepted, done))
            return Reply()._begin(done, timeout_s)
        settled = self._expect(self.message_id, done)
        try:
            return Reply()._begin(done, timeout_s)
        except CommandTimeout:
            self._runtime.engine.outcomes.forget(self.session.id, self.message_id, settled)
            raise

    def _outcome(self, accepted: Pending[Any], done: Pending[Any]) -> None:
        if accepted.error is not None:
            done.fail(accepted.error)
            return
        self._expect(accepted.result().message_id, done)

    def _expect(self, message_id: str, done: Pending[Any]) -> Pending[Any]:
        """Wait for the outcome, which may be there already."""
        settled = self._runtime.engine.outcomes.expect(self.session.id, message_id)
        settled.then(
            lambda _: self._runtime.engine.in_background(lambda: self._answer(settled), done)
        )

        def look() -> None:
            prompt, _ = self._runtime.engine.store.read.prompt(self.session.id, message_id)
            if prompt is None:
                settled.fail(_deleted(self.session.id))
            elif prompt.outcome is not None:
                settled.set(prompt)
            if settled.done:
                self._runtime.engine.outcomes.forget(self.session.id, message_id, settled)

        self._runtime.engine.in_background(look, failing(settled))
        return settled

    def _answer(self, settled: Pending[Any]) -> tuple[str | None, Any]:
        prompt: Prompt = settled.result()
        if prompt.outcome == "answered" and prompt.turn is not None:
            pairs = self._runtime.engine.store.read.turn(self.session.id, prompt.turn)
            if not pairs:
                raise _deleted(self.session.id)
            return prompt.reply_id, pairs
        raise self._error(prompt)

    def _error(self, prompt: Prompt) -> Exception:
        where = {"session_id": self.session.id, "message_id": prompt.message_id}
        reason = prompt.reason or prompt.outcome or "unknown"
        if prompt.outcome == "failed":
            name = "TurnFailed"
            if prompt.reply_id is not None:
                pair = self._runtime.engine.store.read.message(self.session.id, prompt.reply_id)
                error = getattr(pair[0], "error", None) if pair is not None else None
                name = error.name if error is not None else name
            return TurnFailed(reason, name=name, reason=reason, **where)
        return TurnAborted(f"The turn was interrupted: {reason}", reason=reason, **where)

    # --- events --------------------------------------------------------------------------------

    def events(self) -> Subscription:
        """The session's events from this prompt's acceptance on, not filtered."""
        after = self._after
        if self._named:
            reads = self._runtime.engine.store.read
            after = min(after, reads.accepted_after(self.session.id, self.message_id))
        return self._runtime.events(after=after, session_id=self.session.id)

    def _open(self, events: Subscription) -> Subscription:
        """A turn that is over is in the journal: what comes after is not waited for."""
        prompt, _ = self._runtime.engine.store.read.prompt(self.session.id, self.message_id)
        if prompt is None or prompt.outcome is not None:
            events.close()
        return events

    def __iter__(self) -> Iterator[Event]:
        """The turn's events as they happen, up to its ``prompt.settled``."""
        self._ready()
        follow = _Follow(self.message_id)
        with self.events() as events:
            for event in self._open(events):
                if follow.shows(event):
                    yield event
                if follow.over:
                    return

    async def __aiter__(self) -> AsyncIterator[Event]:
        await self
        follow = _Follow(self.message_id)
        async with self.events() as events:
            await asyncio.to_thread(self._open, events)
            async for event in events:
                if follow.shows(event):
                    yield event
                if follow.over:
                    return

    def abort(self) -> Done:
        """End this turn, running or waiting. False if it is over."""
        command = Abort(message_id=self.message_id)
        return self.session._command(Done(), command)


class _Follow:
    """Which of a session's events belong to one turn."""

    def __init__(self, message_id: str) -> None:
        self._message_id = message_id
        self._running = False
        self.over = False

    def shows(self, event: Event) -> bool:
        fact = event.data
        if type(fact) is SessionDeleted:
            self.over = True
            return True
        if type(fact) is PromptStarted and fact.info.message_id == self._message_id:
            self._running = True
        elif type(fact) is PromptSettled and fact.info.message_id == self._message_id:
            self.over = True
            return True
        return self._running or self._mine(fact)

    def _mine(self, fact: Any) -> bool:
        info = getattr(fact, "info", None)
        if isinstance(info, UserMessage):
            return info.id == self._message_id
        return getattr(info, "message_id", None) == self._message_id


class Compaction(Handle):
    """A compaction that was asked for. ``marker_id`` names it; all who asked share it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._runtime = session._runtime
        self._marker_id = ""

    def _arrive(self, value: Any) -> None:
        self._marker_id = value

    @property
    def marker_id(self) -> str:
        self._ready()
        return self._marker_id

    def result(self, *, timeout_s: float | None = None) -> Done:
        """Wait for its end; the value is the summary's message id.

        Raises ``CompactionFailed`` if history stays as it was.
        """
        timeout_s = given.seconds("timeout_s", timeout_s)
        done: Pending[Any] = Pending()
        marker_id = self.marker_id
        ended = self._runtime.engine.outcomes.expect(self.session.id, marker_id)
        ended.then(lambda _: self._runtime.engine.in_background(lambda: self._answer(ended), done))

        def look() -> None:
            part = self._runtime.engine.store.read.marker(self.session.id, marker_id)
            if part is None:
                ended.fail(_deleted(self.session.id))
            elif not part.active:
                ended.set(part)
            if ended.done:
                self._runtime.engine.outcomes.forget(self.session.id, marker_id, ended)

        self._runtime.engine.in_background(look, failing(ended))
        return Done()._begin(done, timeout_s)

    def _answer(self, ended: Pending[Any]) -> str:
        part: CompactionPart = ended.result()
        if part.state != "committed" or part.summary_id is None:
            reason = part.reason or part.state
            raise CompactionFailed(
                f"The compaction failed: {reason}", session_id=self.session.id, reason=reason
            )
        return part.summary_id


def _deleted(session_id: str) -> SessionNotFound:
    return SessionNotFound(f"Session {session_id} was deleted", session_id=session_id)
