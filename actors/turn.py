"""Turn and Compaction: handles of what was asked of a session, up to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from understudy.actors import given
from understudy.actors.core.commands import (
    Abort,
)
from understudy.actors.handles import Done, Handle, Reply
from understudy.actors.pending import Pending, settled
from understudy.actors.supervisor import deleted_error
from understudy.errors import (
    CompactionFailed,
    TurnAborted,
    TurnFailed,
)
from understudy.store.events import (
    Event,
    MessageUpdated,
    PartDelta,
    PartUpdated,
    PromptSettled,
    PromptStarted,
    SessionDeleted,
)
from understudy.store.records import (
    AssistantMessage,
    CompactionPart,
    Prompt,
    TextPart,
    UserMessage,
)

if TYPE_CHECKING:
    from understudy.actors.session import Session
    from understudy.actors.subscription import Subscription


class Turn(Handle):
    """An accepted prompt: iterate it for its events, ask for its result.

    Attributes:
        message_id: the prompt's user message, and the turn's name.
    """

    def __init__(self, session: Session, message_id: str | None) -> None:
        self.session = session
        self._runtime = session._runtime
        self._message_id = message_id
        self._named = message_id is not None  # then it may have been accepted long ago
        self._settled: Pending[Any] | None = None
        self._after = self._runtime.engine.publisher.cursor

    def _arrive(self, value: Any) -> None:
        self._message_id = value.message_id

    def _expect(self, accepted: Pending[Any]) -> None:
        """Listen for the outcome from the acceptance on: so none is missed, or looked up."""
        if accepted.error is None and accepted.result().outcome is None:
            message_id = accepted.result().message_id
            self._settled = self._runtime.engine.outcomes.expect(self.session.id, message_id)

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
        self._ready()
        engine = self._runtime.engine
        ended = self._settled or engine.outcomes.end_of(self.session.id, self.message_id)

        def report(_: Pending[Any]) -> None:
            self._report(ended, done)

        def give_up() -> None:
            ended.forget(report)
            if ended is not self._settled:
                engine.outcomes.forget(self.session.id, self.message_id, ended)

        ended.then(report)
        reply = Reply()
        reply._given_up = give_up
        return reply._begin(done, timeout_s)

    def _outcome(self, accepted: Pending[Any], done: Pending[Any]) -> None:
        """Accepted, or not. What is over already was prompted with this id before."""
        if accepted.error is not None:
            done.fail(accepted.error)
            return
        ended = self._settled or settled(accepted.result())
        ended.then(lambda _: self._report(ended, done))

    def _report(self, ended: Pending[Any], done: Pending[Any]) -> None:
        engine = self._runtime.engine
        reply_id = ended.result().reply_id if ended.error is None else None
        said = engine.said(self.session.id, reply_id) if reply_id is not None else None
        if said is not None:
            done.set((reply_id, said))
        else:
            engine.in_background(lambda: self._answer(ended), done)

    def _answer(self, ended: Pending[Any]) -> tuple[str | None, Any]:
        prompt: Prompt = ended.result()
        if prompt.outcome == "answered" and prompt.turn is not None:
            pairs = self._runtime.engine.store.read.turn(self.session.id, prompt.turn)
            if not pairs:
                raise deleted_error(self.session.id)
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

    def text(self) -> TurnText:
        """The answer's text as it comes, in pieces, until the turn ends.

        ``for piece in turn.text(): print(piece, end="")``; ``async for`` works too.
        """
        return TurnText(self)

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


class TurnText:
    """New text of a turn, in order and once, whether it comes in parts or as live deltas."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._answers: set[str] = set()
        self._told: dict[str, int] = {}

    def __iter__(self) -> Iterator[str]:
        for event in self._turn:
            if piece := self._new(event.data):
                yield piece

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self._turn:
            if piece := self._new(event.data):
                yield piece

    def _new(self, fact: Any) -> str:
        if type(fact) is MessageUpdated and isinstance(fact.info, AssistantMessage):
            if not fact.info.summary:
                self._answers.add(fact.info.id)
        elif type(fact) is PartDelta and fact.part_id in self._told:
            return self._rest(fact.part_id, fact.offset, fact.delta)
        elif type(fact) is PartUpdated and type(fact.part) is TextPart:
            answers = fact.part.message_id in self._answers
            return self._rest(fact.part.id, 0, fact.part.text) if answers else ""
        return ""

    def _rest(self, part_id: str, offset: int, text: str) -> str:
        told = self._told.get(part_id, 0)
        self._told[part_id] = max(told, offset + len(text))
        return text[max(0, told - offset) :]


class Compaction(Handle):
    """A compaction that was asked for. ``marker_id`` names it; all who asked share it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._runtime = session._runtime
        self._marker_id = ""

    def __repr__(self) -> str:
        return f"<Compaction {self._marker_id} of {self.session.id}>"

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
        engine = self._runtime.engine
        ended = engine.outcomes.end_of(self.session.id, marker_id)
        ended.then(lambda _: engine.in_background(lambda: self._answer(ended), done))
        return Done()._begin(done, timeout_s)

    def _answer(self, ended: Pending[Any]) -> str:
        part: CompactionPart = ended.result()
        if part.state != "committed" or part.summary_id is None:
            reason = part.reason or part.state
            raise CompactionFailed(
                f"The compaction failed: {reason}", session_id=self.session.id, reason=reason
            )
        return part.summary_id
