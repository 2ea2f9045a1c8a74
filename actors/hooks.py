"""Hooks: an app's own code at fixed points of a session's life, behind the tracker's gate.

A hook may use the runtime: a memory hook prompts a session of its own, whose hooks would prompt
another, and so on for ever. So every hook passes the gate first. Internal sessions are bypassed
before their first prompt and for as long as they are used; what is made inside a hook, sessions and
prompts alike, is internal too, and so is what the tools of such turns make. No hook can loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from understudy.actors.coroutines import GiveUp
from understudy.actors.handles import TranscriptMessage
from understudy.actors.pending import Pending
from understudy.actors.workers import LOST_MAX
from understudy.errors import InvalidInput
from understudy.store.events import PromptSettled

if TYPE_CHECKING:
    from understudy.actors.engine import Engine
    from understudy.actors.session import Session
    from understudy.store.records import Session as SessionRecord

logger = logging.getLogger("understudy.hooks")

HOOKS: Final = (
    "session_start",
    "before_prompt",
    "after_turn",
    "before_compaction",
    "session_end",
)

_HOOK_THREADS: Final = 32

_inside: contextvars.ContextVar[str | None] = contextvars.ContextVar("inside", default=None)


class HookCall(msgspec.Struct, frozen=True, kw_only=True):
    """What a hook is called with.

    Attributes:
        hook: its name.
        session: the session it is about; deleted already for ``session_end``.
        message_id: the prompt's, for ``before_prompt`` and ``after_turn``; the marker's, for
            ``before_compaction``.
        text: the prompt's text, or the answer's for ``after_turn``.
        outcome: how the turn ended, for ``after_turn``.
    """

    hook: str
    session: Session
    message_id: str | None = None
    text: str = ""
    outcome: str | None = None


Hook: TypeAlias = Callable[[HookCall], Any]
"""A plain function or a coroutine function.

``before_prompt`` may return text that is added to the turn's system prompt. What a hook raises is
logged and changes nothing; one that takes longer than ``hook_s`` is not waited for.
"""


def enter_hook(name: str) -> None:
    """Count what this context does from here on as done inside a hook."""
    _inside.set(name)


def inside_hook() -> str | None:
    """The hook this code runs in, if any."""
    return _inside.get()


class Hooks:
    """The hooks of one runtime."""

    def __init__(
        self,
        engine: Engine,
        hooks: Mapping[str, Hook | Iterable[Hook]] | None,
        *,
        hook_s: float,
    ) -> None:
        self._engine = engine
        self._hook_s = hook_s
        self.workers = engine.platform.workers(_HOOK_THREADS)  # not the tools': hooks may hang
        self._running: dict[object, tuple[HookCall, float, GiveUp]] = {}  # if nobody waits
        self._hooks: dict[str, tuple[Hook, ...]] = {}
        if hooks is not None and not isinstance(hooks, Mapping):
            raise InvalidInput("hooks are functions by the name of their hook", field="hooks")
        for name, given in (hooks or {}).items():
            if name not in HOOKS:
                raise InvalidInput(
                    f"there is no hook {name!r}; there is {', '.join(HOOKS)}", field="hooks"
                )
            group = tuple(given) if isinstance(given, Iterable) else (given,)
            if not all(callable(each) for each in group):
                raise InvalidInput(f"hook {name!r} must be a function", field="hooks")
            self._hooks[name] = group

    def wanted(self, hook: str) -> bool:
        return hook in self._hooks

    def passes(self, hook: str, session_id: str, *, internal: bool) -> bool:
        """The gate: whether a hook of this session runs. Costs no write and no model call."""
        if hook not in self._hooks or internal:
            return False
        return self._engine.tracker.gate(hook, session_id).action == "run"

    def later(
        self,
        hook: str,
        info: SessionRecord,
        *,
        message_id: str | None = None,
        outcome: str | None = None,
    ) -> None:
        """Run a hook that nobody waits for, off this thread."""
        if self.wanted(hook) and not info.internal:
            call = HookCall(
                hook=hook,
                session=self._engine.handle_of(info),
                message_id=message_id,
                outcome=outcome,
            )
            try:
                self.workers.submit(lambda: self._fire_with_answer(call))
            except RuntimeError:
                logger.exception("Hook %s was not run", hook)

    def _fire_with_answer(self, call: HookCall) -> None:
        if call.message_id is not None:
            prompt, _ = self._engine.store.read.prompt(call.session.id, call.message_id)
            if prompt is not None and prompt.reply_id is not None:
                pair = self._engine.store.read.message(call.session.id, prompt.reply_id)
                text = TranscriptMessage(*pair).text if pair is not None else ""
                call = msgspec.structs.replace(call, text=text)
        self.fire(call, internal=False)

    def after_turn(self, info: SessionRecord, fact: PromptSettled) -> None:
        if not fact.info.quiet:
            settled = fact.info
            self.later("after_turn", info, message_id=settled.message_id, outcome=settled.outcome)

    def fire(self, call: HookCall, *, internal: bool) -> None:
        """Run a hook that nobody waits for, as ``let_go`` does in the end."""
        if self.passes(call.hook, call.session.id, internal=internal):
            for hook in self._hooks[call.hook]:
                self._start(hook, call, waited_for=False)

    def let_go(self) -> None:
        """Report the hooks that take more than ``hook_s``, and give up on them."""
        late = self._engine.clock.monotonic_s() - self._hook_s
        for key, (call, since_s, give_up) in list(self._running.items()):
            if since_s < late and self._running.pop(key, None) is not None:
                logger.error("Hook %s took more than %g s", call.hook, self._hook_s)
                give_up()

    async def gather(self, call: HookCall, *, internal: bool) -> list[str]:
        """Run a hook before something goes on; returns the texts it gives."""
        if not self.passes(call.hook, call.session.id, internal=internal):
            return []
        texts = []
        for hook in self._hooks[call.hook]:
            done, give_up = self._start(hook, call)
            try:
                async with asyncio.timeout(self._hook_s):
                    value = await done.wait()
            except TimeoutError:
                logger.error("Hook %s took more than %g s", call.hook, self._hook_s)  # noqa: TRY400 - no news in it
                continue
            finally:
                if not done.done:
                    give_up()
            if isinstance(value, str) and value.strip():
                texts.append(value)
        return texts

    def _start(
        self, hook: Hook, call: HookCall, *, waited_for: bool = True
    ) -> tuple[Pending[Any], GiveUp]:
        """Call a hook: a function on a worker, a coroutine function on the tools' loop.

        Gives its result and what to call when nobody waits for that any more; a hook that nobody
        ever waits for is noted while it runs.
        """
        done: Pending[Any] = Pending()
        context = contextvars.copy_context()
        context.run(_inside.set, call.hook)
        coroutines = self._engine.executor.coroutines
        is_coroutine = inspect.iscoroutinefunction(hook)
        if (coroutines if is_coroutine else self.workers).lost >= LOST_MAX:
            logger.error("Hook %s was not run: %d others never returned", call.hook, LOST_MAX)
            done.set(None)
            return done, _nothing
        if is_coroutine:
            name = f"Hook {call.hook} of session {call.session.id}"
            give_up = coroutines.submit(
                name, lambda: _guarded_async(hook, call, done), context=context
            )
            if not waited_for:
                self._note(call, give_up, done)
            return done, give_up

        def job() -> None:
            if not waited_for:
                self._note(call, lambda: give_up(), done)  # noqa: PLW0108 - it may not be there yet
            context.run(_guarded, hook, call, done)

        try:
            give_up = self.workers.submit(job)
        except RuntimeError:
            logger.exception("Hook %s was not run", call.hook)
            done.set(None)
            return done, _nothing
        return done, give_up

    def _note(self, call: HookCall, give_up: GiveUp, done: Pending[Any]) -> None:
        """Keep it among those that run until it is done, or given up on."""
        key = object()
        self._running[key] = (call, self._engine.clock.monotonic_s(), give_up)

        def forget(_: Pending[Any]) -> None:
            self._running.pop(key, None)

        done.then(forget)

    def close(self) -> None:
        """Let idle threads end now; a hook that runs is not waited for."""
        self.workers.close()


def _nothing() -> None:
    """Nobody waited for it in the first place."""


def _guarded(hook: Hook, call: HookCall, done: Pending[Any]) -> None:
    try:
        done.set(hook(call))
    except BaseException:
        logger.exception("Hook %s failed for session %s", call.hook, call.session.id)
        done.set(None)


async def _guarded_async(hook: Hook, call: HookCall, done: Pending[Any]) -> None:
    try:
        done.set(await hook(call))
    except asyncio.CancelledError:  # it took too long, which was said
        logger.info("Hook %s was cancelled for session %s", call.hook, call.session.id)
        done.set(None)
    except BaseException:
        logger.exception("Hook %s failed for session %s", call.hook, call.session.id)
        done.set(None)
