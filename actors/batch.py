"""Batches: decisions of one session that commit as one change, and who is answered afterwards."""

from __future__ import annotations

from typing import Any

from understudy.actors.core import commands
from understudy.actors.core.draft import Decision
from understudy.actors.core.effects import Answered, Effect
from understudy.actors.core.state import State
from understudy.actors.messages import Request
from understudy.actors.pending import Pending
from understudy.errors import UnderstudyError
from understudy.store.events import AnyFact, PromptAccepted, PromptSettled
from understudy.store.records import Pair, Prompt


class Batch:
    """Decisions that will commit together, and the state they lead to.

    Most hold a single one, whose tuples they are: lists would be copies, and as many objects more
    for the collector to look at while the commit is under way.
    """

    __slots__ = ("effects", "facts", "replies", "requests", "reverted", "settled", "state")

    def __init__(self, state: State) -> None:
        self.state = state
        self.reverted = state.info.revert
        self.facts: tuple[AnyFact, ...] = ()
        self.effects: tuple[Effect, ...] = ()
        self.requests: tuple[Request, ...] = ()
        self.replies: tuple[tuple[Pending[Any], Any, BaseException | None], ...] = ()
        self.settled: dict[str, Prompt] = {}

    def add(self, request: Request, decision: Decision) -> None:
        self.state = decision.state
        self.facts += decision.facts
        self.effects += decision.effects
        self.requests += (request,)
        self._reply(request, decision.reply, None)
        for fact in decision.facts:
            if type(fact) is PromptSettled:
                self.settled[fact.info.message_id] = fact.info

    def prove(self, request: Request) -> None:
        self._reply(request, None, None)

    def refuse(self, request: Request, error: UnderstudyError) -> None:
        self.requests += (request,)
        self._reply(request, None, error)

    def _reply(self, request: Request, value: Any, error: UnderstudyError | None) -> None:
        if request.reply is not None:
            self.replies += ((request.reply, value, error),)

    def answer(self) -> None:
        for reply, value, error in self.replies:
            if error is not None:
                reply.fail(error)
            elif type(value) is Prompt:
                # Who listens from now on would miss an end that is told already.
                reply.set(self.settled.get(value.message_id, value))
            else:
                reply.set(value)

    def said(self, reply_id: str) -> tuple[Pair, ...] | None:
        """All messages of a turn that it ends with this answer, if they are known."""
        for effect in self.effects:
            if type(effect) is Answered and effect.whole and effect.said[-1][0].id == reply_id:
                return effect.said
        return None

    @property
    def answered(self) -> bool:
        """A prompt got its answer: the session makes progress."""
        return any(prompt.outcome == "answered" for prompt in self.settled.values())

    def holds_back(self, command: Any) -> bool:
        """Whether a command must wait for the commit: it reads rows that may still change."""
        reverted = self.state.info.revert != self.reverted
        if type(command) is commands.SubmitPrompt:
            return reverted or self._accepts(command.message_id)
        if type(command) is commands.RequestCompaction:
            return reverted
        return type(command) in (commands.RevertTo, commands.EditTranscript, commands.Reply)

    def _accepts(self, message_id: str | None) -> bool:
        return message_id is not None and any(
            type(fact) is PromptAccepted and fact.info.message_id == message_id
            for fact in self.facts
        )
