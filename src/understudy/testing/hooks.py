"""Hooks as a memory has them: they use the runtime they are called by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from understudy.actors.hooks import HOOKS, HookCall

if TYPE_CHECKING:
    from understudy.testing.process import Process
    from understudy.testing.stage import Stage

_TITLE = "memory"


class MemoryHooks:
    """Every hook there is. None may run for a session that is internal, or bypassed."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._told: set[tuple[str, int, str]] = set()
        self._expected: dict[tuple[str, int, str], Process] = {}

    def functions(self) -> dict[str, Callable[[HookCall], Any]]:
        plain = {hook: self._look for hook in HOOKS if hook != "after_turn"}
        return {**plain, "before_prompt": self._recall, "after_turn": self._remember}

    def expect(self, process: Process, ends: Iterable[tuple[str, int, str]]) -> None:
        """A process has ended turns: its hooks, and those of no other, are to be told."""
        if self._stage.settings.hooks:
            self._expected.update(dict.fromkeys(ends, process))

    def excuse(self) -> None:
        """Time passes at once: a hook that was to begin by now may be given up before it did."""
        self._expected.clear()

    def check(self) -> None:
        """At rest every end was told, if whoever was to tell it is still there."""
        stage = self._stage
        for (session_id, life, message_id), process in self._expected.items():
            sure = process.alive and not process.life.was_frozen
            sure &= stage.watch.life(session_id) == life and not stage.tracking.knew(session_id)
            if sure and (session_id, life, message_id) not in self._told:
                stage.found("a turn's end is told", f"{message_id} of {session_id}")

    def _look(self, call: HookCall) -> None:
        self._stage.seen[f"hook {call.hook}"] += 1
        if call.session.record.internal or call.session.title == _TITLE:
            self._stage.found("hooks do not loop", f"{call.hook} of {call.session.id}")
        self._stage.tracking.hooked(call.session.id)

    def _recall(self, call: HookCall) -> str:
        self._look(call)
        return f"recalled for {call.message_id}"

    async def _remember(self, call: HookCall) -> None:
        self._look(call)
        stage = self._stage
        end = (call.session.id, stage.watch.stories[call.session.id].number, call.message_id or "")
        if end in self._told:
            stage.found("a turn ends once", f"after_turn again for {end}")
        self._told.add(end)
        session = await call.session.runtime.create_session(title=_TITLE)
        turn = await session.prompt("remember this")
        try:
            await turn.result(timeout_s=5.0)
        finally:
            await session.delete(missing_ok=True)
