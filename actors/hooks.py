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
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from understudy.actors.handles import TranscriptMessage
from understudy.actors.pending import Pending
from understudy.actors.workers import LOST_MAX
from understudy.errors import InvalidInput
from understudy.store.events import EventData, PromptSettled

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
        self._running: dict[int, tuple[HookCall, float]] = {}  # by thread, if nobody waits
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
            self.workers.submit(lambda: self._fire_with_answer(call))

    def _fire_with_answer(self, call: HookCall) -> None:
        if call.message_id is not None:
            prompt, _ = self._engine.store.read.prompt(call.session.id, call.message_id)
            if prompt is not None and prompt.reply_id is not None:
                pair = self._engine.store.read.message(call.session.id, prompt.reply_id)
                text = TranscriptMessage(*pair).text if pair is not None else ""
                call = msgspec.structs.replace(call, text=text)
        self.fire(call, internal=False)

    def after_turn(self, info: SessionRecord, fact: EventData) -> None:
        if isinstance(fact, PromptSettled) and not fact.info.quiet:
            settled = fact.info
            self.later("after_turn", info, message_id=settled.message_id, outcome=settled.outcome)

    def fire(self, call: HookCall, *, internal: bool) -> None:
        """Run a hook that nobody waits for, as ``let_go`` does in the end."""
        if self.passes(call.hook, call.session.id, internal=internal):
            for hook in self._hooks[call.hook]:
                self._start(hook, call, None)

    def let_go(self) -> None:
        """Report the hooks that take more than ``hook_s``; their threads are made up for."""
        late = self._engine.clock.monotonic_s() - self._hook_s
        for thread_id, entry in list(self._running.items()):
            call, since_s = entry
            if since_s < late and self._running.get(thread_id) is entry:
                self._running.pop(thread_id, None)
                logger.error("Hook %s took more than %g s", call.hook, self._hook_s)
                self.workers.abandon(thread_id)

    async def gather(self, call: HookCall, *, internal: bool) -> list[str]:
        """Run a hook before something goes on; returns the texts it gives."""
        if not self.passes(call.hook, call.session.id, internal=internal):
            return []
        texts = []
        for hook in self._hooks[call.hook]:
            thread_ids: list[int] = []
            done = self._start(hook, call, thread_ids)
            try:
                async with asyncio.timeout(self._hook_s):
                    value = await done.wait()
            except TimeoutError:
                logger.error("Hook %s took more than %g s", call.hook, self._hook_s)  # noqa: TRY400 - no news in it
                continue
            finally:
                if thread_ids and not done.done:
                    self.workers.abandon(thread_ids[0])
            if isinstance(value, str) and value.strip():
                texts.append(value)
        return texts

    def _start(self, hook: Hook, call: HookCall, thread_ids: list[int] | None) -> Pending[Any]:
        """Call a hook: a function on a worker, else on the tools' loop.

        ``thread_ids`` gets the worker's, for who waits; of the others it is noted here.
        """
        done: Pending[Any] = Pending()
        context = contextvars.copy_context()
        context.run(_inside.set, call.hook)
        if inspect.iscoroutinefunction(hook):
            loop = self._engine.executor.tools_loop()
            coroutine = _guarded_async(hook, call, done)
            loop.call_soon_threadsafe(
                lambda: loop.create_task(coroutine, context=context), context=context
            )
        elif self.workers.lost >= LOST_MAX:
            logger.error("Hook %s was not run: %d others never returned", call.hook, LOST_MAX)
            done.set(None)
        else:

            def job() -> None:
                me = threading.get_ident()
                if thread_ids is not None:
                    thread_ids.append(me)
                    context.run(_guarded, hook, call, done)
                    return
                self._running[me] = entry = (call, self._engine.clock.monotonic_s())
                context.run(_guarded, hook, call, done)
                if self._running.get(me) is entry:
                    self._running.pop(me, None)

            self.workers.submit(job)
        return done

    def close(self) -> None:
        """Let idle threads end now; a hook that runs is not waited for."""
        self.workers.close()


def _guarded(hook: Hook, call: HookCall, done: Pending[Any]) -> None:
    try:
        done.set(hook(call))
    except BaseException:
        logger.exception("Hook %s failed for session %s", call.hook, call.session.id)
        done.set(None)


async def _guarded_async(hook: Hook, call: HookCall, done: Pending[Any]) -> None:
    try:
        done.set(await hook(call))
    except BaseException:
        logger.exception("Hook %s failed for session %s", call.hook, call.session.id)
        done.set(None)
