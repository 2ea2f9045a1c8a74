"""Hooks as a memory has them: they use the runtime they are called by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from understudy.actors.hooks import HOOKS, HookCall

if TYPE_CHECKING:
    from understudy.testing.stage import Stage

_TITLE = "memory"


class MemoryHooks:
    """Every hook there is. None may run for a session that is internal, or bypassed."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._ended: set[tuple[str, str, str]] = set()

    def functions(self) -> dict[str, Callable[[HookCall], Any]]:
        plain = {hook: self._look for hook in HOOKS if hook != "after_turn"}
        return {**plain, "before_prompt": self._recall, "after_turn": self._remember}

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
        stage, process = self._stage, self._stage.running()
        life = stage.watch.stories[call.session.id].number
        once = (process.name if process else "", f"{call.session.id}/{life}", call.message_id or "")
        if once in self._ended:
            stage.found("a turn ends once", f"after_turn again for {once}")
        self._ended.add(once)
        session = await call.session.runtime.create_session(title=_TITLE)
        turn = await session.prompt("remember this")
        try:
            await turn.result(timeout_s=5.0)
        finally:
            await session.delete(missing_ok=True)
