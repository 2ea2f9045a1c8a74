"""Session, Turn and Compaction: the handles of the public API."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from understudy.actors import given
from understudy.actors.core.commands import (
    Abort,
    EditTranscript,
    RequestCompaction,
    RevertTo,
    Unrevert,
    UpdateSession,
)
from understudy.actors.handles import Done, Handle, Records, Snapshot, TranscriptMessage
from understudy.actors.hooks import inside_hook
from understudy.actors.messages import Crash
from understudy.actors.pending import Pending
from understudy.actors.turn import Compaction, Turn
from understudy.errors import InvalidInput
from understudy.store.ids import check_id
from understudy.store.records import (
    Ask,
    FilePart,
    Prompt,
    TextPart,
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
            tools: which of the runtime's tools this turn may use, by name;
                ``{"*": False, "read": True}``.
            model: "provider/model" of one of the runtime's models.
            agent: a label kept on the messages.
            timeout_s: how long to wait for the acceptance, if not the runtime's usual time.

        Raises:
            InvalidInput, SessionNotFound, SessionBusy, SessionQuarantined, SessionClaimed,
            PromptConflict, StoreError, RuntimeClosed, CommandTimeout.
        """
        runtime = self._runtime
        if timeout_s is not None:
            timeout_s = given.duration("timeout_s", timeout_s)
        command = given.prompt_command(
            prompt,
            limit_bytes=runtime.engine.rules.limits.prompt_bytes,
            message_id=message_id,
            when_busy=when_busy,
            system=system,
            tools=tools,
            known_tools=runtime.engine.tools,
            model=runtime.engine.model_ref(model),
            agent=agent,
        )
        turn = Turn(self, message_id)
        accepted: Pending[Any] = Pending()
        accepted.then(turn._expect)
        runtime.engine.ask(self.id, command, accepted)
        return turn._begin(accepted, runtime.engine.timeout_s(timeout_s))

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
            self._runtime.engine.record_of(self.id)
            raise given.no_message(self.id, message_id, what="prompt")
        return prompt

    def prompts(self) -> Records[Prompt]:
        """Every prompt the session accepted, with its outcome, oldest first."""

        def read() -> Any:
            prompts = self._runtime.engine.store.read.prompts(self.id)
            if not prompts:
                self._runtime.engine.record_of(self.id)
            return prompts

        return self._read(Records(), read)

    # --- commands ------------------------------------------------------------------------------

    def abort(self, *, queued: bool = False) -> Done:
        """End the running turn, its tools and their processes, and those of child sessions.

        What waits in the queue runs next, unless ``queued`` ends it too. True if anything ran.
        """
        return self._command(Done(), Abort(queued=given.switch("queued", queued)))

    def compact(self, *, model: str | None = None) -> Compaction:
        """Summarise the history; merges into a compaction that is already wanted.

        Args:
            model: "provider/model" of one of the runtime's models, instead of the session's.
        """
        ref = self._runtime.engine.model_ref(model)
        return self._command(Compaction(self), RequestCompaction(model=ref))

    def revert(self, message_id: str) -> Session:
        """Mark ``message_id`` and all after it, in ``record.revert``, for a view to hide.

        ``messages()`` still gives them. The next prompt removes them for good.
        """
        return self._command(self, RevertTo(message_id=check_id("message_id", message_id)))

    def edit(self, message_id: str, *, part_id: str | None = None, text: str | None = None) -> Done:
        """Take a message out of the transcript, or one of its parts, or rewrite a part's ``text``.

        The value is the part as it is now. For idle sessions: raises ``SessionBusy`` otherwise;
        ``MessageNotFound``, and ``InvalidInput`` for a part that has no text.
        """
        if text is not None and part_id is None:
            raise InvalidInput("a text belongs to a part: name it", field="part_id")
        command = EditTranscript(
            message_id=check_id("message_id", message_id),
            part_id=None if part_id is None else check_id("part_id", part_id),
            text=None if text is None else given.text("text", text),
        )
        return self._command(Done(), command)

    def unrevert(self) -> Session:
        """Take the mark of ``revert`` away."""
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
        engine.lifecycle.fork(
            self.id, fork_id, pending, before=before, title=name, internal=internal
        )
        return Session(self._runtime, fork_id)._begin(pending, engine.timeout_s(None))

    def update(
        self,
        *,
        title: str | msgspec.UnsetType = msgspec.UNSET,
        directory: str | os.PathLike[str] | msgspec.UnsetType = msgspec.UNSET,
        metadata: Mapping[str, Any] | msgspec.UnsetType = msgspec.UNSET,
        model: str | msgspec.UnsetType | None = msgspec.UNSET,
        permissions: given.Permissions | msgspec.UnsetType = msgspec.UNSET,
    ) -> Session:
        """Change what is named; ``metadata`` is replaced whole."""
        command = UpdateSession(
            title=title if title is msgspec.UNSET else given.title(title),
            directory=directory if directory is msgspec.UNSET else given.directory(directory),
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
        given.switch("archived", archived)
        now = self._runtime.engine.clock.wall_ms() if archived else None
        return self._command(self, UpdateSession(archived=now))

    def delete(self, *, missing_ok: bool = False) -> Done:
        """Delete the session and its children, all or nothing. Gone when this returns.

        Raises ``SessionNotFound`` if it is not there, unless ``missing_ok``; ``SessionClaimed``
        if another live runtime works on it or a child.
        """
        engine = self._runtime.engine
        given.switch("missing_ok", missing_ok)
        pending: Pending[int] = Pending()
        engine.lifecycle.delete(self.id, pending, missing_ok=missing_ok)
        return Done()._begin(pending, engine.timeout_s(None))

    def reset(self) -> Done:
        """Let a quarantined session run again. True if it was quarantined."""
        engine = self._runtime.engine
        engine.must_be_open()
        pending: Pending[bool] = Pending()
        engine.lifecycle.reset(self.id, pending)
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

    def snapshot(self, *, limit: int | None = None) -> Snapshot:
        """The transcript together with the cursor it is as of.

        ``session.events(after=snapshot.cursor)`` goes on from there with no gap and no duplicate.
        """
        limit = None if limit is None else given.whole("limit", limit)
        return self._read(
            Snapshot(), lambda: self._runtime.engine.store.read.snapshot(self.id, limit=limit)
        )

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
        return Done()._begin(self._runtime.engine.outcomes.idle_of(self.id), timeout_s)

    # --- plumbing ------------------------------------------------------------------------------

    def _command(self, handle: H, command: Any) -> H:
        runtime = self._runtime
        return handle._begin(runtime.engine.ask(self.id, command), runtime.engine.timeout_s(None))

    def _read(self, handle: H, work: Callable[[], Any]) -> H:
        runtime = self._runtime
        return handle._begin(runtime.engine.background(work), runtime.engine.timeout_s(None))
