"""What recovery did to a session, for apps: the report and the hook that gets it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from understudy.actors.core.commands import Reason
from understudy.store.events import (
    ActorRestarted,
    AnyFact,
    MessageUpdated,
    PartUpdated,
    PromptSettled,
)
from understudy.store.records import AssistantMessage, ToolFailed, ToolPart
from understudy.store.records import Session as SessionRecord

if TYPE_CHECKING:
    from understudy.actors.engine import Engine
    from understudy.actors.runtime import Runtime
    from understudy.actors.session import Session

logger = logging.getLogger("understudy")


class RecoveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found unfinished and closed.

    Attributes:
        session_id: whose recovery it was.
        reason: "restart" of the process, "crash" of the actor, …
        messages: assistant messages that were closed as interrupted.
        calls: names of tools whose calls were closed as interrupted.
        prompts: prompts that were settled without an answer.
        restarted: whether the supervisor replaced an actor.
    """

    session_id: str
    reason: Reason
    messages: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    restarted: bool = False


RecoveryHook: TypeAlias = "Callable[[Runtime, Session, RecoveryReport], None]"
"""Called once after each recovery that changed something, in a worker thread.

The session is whole and usable by then; the hook may prompt it. What it raises is logged and
changes nothing.
"""


def report_of(session_id: str, reason: Reason, facts: tuple[AnyFact, ...]) -> RecoveryReport | None:
    """The report of a recovery's facts; None if it changed nothing."""
    if not facts:
        return None
    messages: list[str] = []
    calls: list[str] = []
    prompts: list[str] = []
    for fact in facts:
        if isinstance(fact, MessageUpdated) and isinstance(fact.info, AssistantMessage):
            if fact.info.error is not None:
                messages.append(fact.info.id)
        elif isinstance(fact, PartUpdated) and isinstance(fact.part, ToolPart):
            if isinstance(fact.part.state, ToolFailed) and fact.part.state.interrupted:
                calls.append(fact.part.tool)
        elif isinstance(fact, PromptSettled):
            prompts.append(fact.info.message_id)
    return RecoveryReport(
        session_id=session_id,
        reason=reason,
        messages=tuple(messages),
        calls=tuple(calls),
        prompts=tuple(prompts),
        restarted=any(isinstance(fact, ActorRestarted) for fact in facts),
    )


class Reports:
    """Keeps the latest reports, and calls the app's hook with each in a thread of its own."""

    def __init__(self, engine: Engine, hook: RecoveryHook | None) -> None:
        self.latest: deque[RecoveryReport] = deque(maxlen=10_000)
        self._engine = engine
        self._hook = hook

    def recovered(self, session_id: str, reason: Reason, facts: tuple[AnyFact, ...]) -> None:
        report = report_of(session_id, reason, facts)
        if report is None:
            return
        self.latest.append(report)
        if self._hook is not None:
            try:
                self._engine.hooks.workers.submit(lambda: self._call_hook(report))
            except RuntimeError:
                logger.exception("The recovery hook was not run for session %s", session_id)

    def orphan_recovered(self, info: SessionRecord, facts: tuple[AnyFact, ...]) -> None:
        """A session is whole again, and rests: there is no actor of it."""
        self.recovered(info.id, "restart", facts)
        self._engine.session_changed(info, facts)

    def _call_hook(self, report: RecoveryReport) -> None:
        assert self._hook is not None, "only called with a hook"
        engine = self._engine
        try:
            session = engine.handle_of(engine.record_of(report.session_id))
            self._hook(engine.front, session, report)
        except Exception:
            logger.exception("The recovery hook failed for session %s", report.session_id)
