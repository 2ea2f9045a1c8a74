"""The executor: runs effects outside the actors, on one event loop.

Model streams are tasks of its loop; synchronous tools run on workers, coroutine tools on a loop of
their own. Everything an execution learns goes back to its session as a command.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from understudy.actors.calls import CallContext, CallRun
from understudy.actors.core.commands import Abort, Command
from understudy.actors.core.effects import (
    Answered,
    Cancel,
    Effect,
    ResolveAsk,
    RunStep,
    RunSummary,
    RunTool,
)
from understudy.actors.coroutines import Coroutines
from understudy.actors.kept import Kept
from understudy.actors.live_text import LiveTexts
from understudy.actors.pace import Pace
from understudy.actors.pending import Pending, failing
from understudy.actors.silence import Silences
from understudy.actors.steps import StepRun, SummaryRun
from understudy.errors import InvalidInput, RuntimeClosed, SessionNotFound, UnderstudyError
from understudy.store.records import Ask

if TYPE_CHECKING:
    from understudy.actors.clock import Clock
    from understudy.actors.core.context import Conversation
    from understudy.actors.core.state import Rules
    from understudy.actors.hooks import Hooks
    from understudy.actors.models.protocol import Model
    from understudy.actors.platform import Platform
    from understudy.actors.publisher import Publisher
    from understudy.actors.session import Session as SessionHandle
    from understudy.actors.tools.tool import Tool
    from understudy.actors.tracker import SessionTracker
    from understudy.store.records import ModelRef, Session
    from understudy.store.store import Store

logger = logging.getLogger("understudy.turns")

T = TypeVar("T")

_READERS = 2
_TOOL_THREADS = 64
_PROOF_S = 30.0
_PROOF_PAUSE_S = 0.5


class Host(Protocol):
    """What the executor needs of its runtime."""

    platform: Platform
    store: Store
    publisher: Publisher
    clock: Clock
    chance: random.Random
    rules: Rules
    system: str
    tools: Mapping[str, Tool]
    models: tuple[Model, ...]
    hooks: Hooks

    @property
    def tracker(self) -> SessionTracker: ...

    def tell_live(
        self, session_id: str, command: Command, done: Pending[Any] | None = None
    ) -> None:
        """Send to the session's live actor; dropped when there is none."""
        ...

    def abort_children(self, session_id: str, reason: str) -> None: ...

    def prove(self, session_id: str, proven: Pending[Any]) -> None:
        """Settle ``proven`` in the writer's lane once the session's claim was seen to hold."""
        ...

    def info(self, session_id: str) -> Session: ...

    def handle(self, session_id: str) -> SessionHandle: ...

    def new_id(self, prefix: str) -> str: ...


class Execution:
    """What runs for one session: tasks by the id of the message or part they work for.

    ``turn`` is the prompt it works for, until the session is deleted or passivated; ``left_s`` is
    what that still had of its time when the timer was last set, and ``recalled`` what its
    ``before_prompt`` hooks added. ``asking`` are tools that wait for a person.
    """

    __slots__ = ("asking", "contexts", "left_s", "recalled", "tasks", "timer", "turn")

    def __init__(self) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.contexts: dict[str, CallContext] = {}
        self.turn = ""
        self.left_s = 0.0
        self.recalled: Sequence[str] | None = None
        self.asking = 0
        self.timer: asyncio.TimerHandle | None = None

    def stop_timer(self, now_s: float) -> None:
        if self.timer is not None:
            self.left_s = max(0.0, self.timer.when() - now_s)
            self.timer.cancel()
            self.timer = None


class Executor:
    """Starts, cancels and watches executions. ``start`` and ``send`` are safe from any thread."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.workers = host.platform.workers(_TOOL_THREADS)
        self._turns = host.platform.loop("understudy-turns")
        self.coroutines = Coroutines(
            host.platform, self.call_later, monotonic_s=host.clock.monotonic_s
        )
        self._readers = host.platform.calls("understudy-context", _READERS)
        self._lock = threading.Lock()
        self._todo: deque[tuple[str, Sequence[Effect], int]] = deque()
        self._unstarted: dict[str, deque[Sequence[Effect]]] = {}
        self._woken = False
        self.live = LiveTexts(host.publisher, self._soon)
        self.pace = Pace()
        self.silences = Silences(host.rules.limits.stream_idle_s)
        self.kept = Kept()
        self._executions: dict[str, Execution] = {}
        self._asks: dict[str, Pending[Ask]] = {}
        self._closed = False

    # --- what executions use -------------------------------------------------------------------

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return self._turns.loop

    @property
    def store(self) -> Store:
        return self.host.store

    @property
    def publisher(self) -> Publisher:
        return self.host.publisher

    @property
    def clock(self) -> Clock:
        return self.host.clock

    @property
    def chance(self) -> random.Random:
        return self.host.chance

    @property
    def rules(self) -> Rules:
        return self.host.rules

    @property
    def system(self) -> str:
        return self.host.system

    @property
    def tools(self) -> Mapping[str, Tool]:
        return self.host.tools

    def new_id(self, prefix: str) -> str:
        return self.host.new_id(prefix)

    def info(self, session_id: str) -> Session:
        return self.host.info(session_id)

    def send(self, session_id: str, command: Command, done: Pending[Any] | None = None) -> None:
        self.host.tell_live(session_id, command, done)

    async def read(self, work: Callable[[], T]) -> T:
        answer: Pending[T] = Pending()
        self._readers.submit(answer.settle, work)
        return await answer.wait()

    def model_for(self, ref: ModelRef) -> Model:
        """The runtime's model of this name."""
        for model in self.host.models:
            if (model.provider_id, model.model_id) == (ref.provider_id, ref.model_id):
                return model
        wanted = f"{ref.provider_id}/{ref.model_id}"
        raise InvalidInput(f"No model {wanted} in this runtime", field="model")

    def keep(self, session_id: str, message_id: str, shown: Conversation) -> None:
        """Keep what was shown for a message, if nobody has given up on that meanwhile.

        Where old results are cleared nothing is told from memory, and nothing kept.
        """
        if self.rules.compaction.prune:
            return
        execution = self._executions.get(session_id)
        if execution is not None and message_id in execution.tasks:
            self.kept.put(session_id, shown)

    def expect(self, session_id: str, ask_id: str) -> Pending[Ask]:
        """The answer to a running tool's ask, when a person gives it."""
        answer: Pending[Ask] = Pending()
        self._asks[ask_id] = answer
        self._soon(lambda: self._count_asking(session_id, 1))

        def forget(_: Pending[Ask]) -> None:
            self._asks.pop(ask_id, None)
            self._soon(lambda: self._count_asking(session_id, -1))

        answer.then(forget)
        return answer

    def recalled(self, session_id: str, message_id: str) -> Sequence[str] | None:
        """What ``before_prompt`` hooks added to this turn; None before they were asked."""
        execution = self._executions.get(session_id)
        if execution is None or execution.turn != message_id:
            return None
        return execution.recalled

    def remember(self, session_id: str, message_id: str, texts: Sequence[str]) -> None:
        """For the rest of the turn; it may be over by the time its hooks answer."""
        execution = self._executions.get(session_id)
        if execution is not None and execution.turn == message_id:
            execution.recalled = texts

    def sessions(self) -> list[str]:
        """Those whose turns are remembered."""
        return list(self._executions)

    def forget(self, session_id: str) -> None:
        """The session was deleted or passivated."""
        if session_id in self._executions or session_id in self.kept:
            self._soon(lambda: self._drop(session_id))

    def _drop(self, session_id: str) -> None:
        self.kept.take(session_id)
        execution = self._executions.get(session_id)
        if execution is None:
            return
        execution.stop_timer(self._loop.time())
        execution.turn = ""
        if not execution.tasks:
            del self._executions[session_id]

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call back on the loop; for timers of whoever has no loop."""
        self._soon(lambda: self._loop.call_later(delay_s, callback))

    # --- effects -------------------------------------------------------------------------------

    def start(self, session_id: str, effects: Sequence[Effect]) -> None:
        """Start effects of a committed decision, in order.

        Called where it was committed: no renewal of the lease can have come in between.
        """
        term = self.store.lease.term
        with self._lock:
            self._todo.append((session_id, effects, term))
            self._unstarted.setdefault(session_id, deque()).append(effects)
            if self._woken:
                return
            self._woken = True
        self._soon(self._drain)

    def _soon(self, callback: Callable[[], Any]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._closed:
                raise

    def _drain(self) -> None:
        with self._lock:
            todo = list(self._todo)
            self._todo.clear()
            self._woken = False
        for session_id, effects, term in todo:
            for effect in effects:
                try:
                    self._apply(session_id, effect, term)
                except SessionNotFound:
                    pass  # deleted meanwhile: nobody waits for it
                except Exception:
                    logger.exception("Could not start %r", effect)
            with self._lock:
                unstarted = self._unstarted[session_id]
                unstarted.popleft()
                if not unstarted:
                    del self._unstarted[session_id]

    def _apply(self, session_id: str, effect: Effect, term: int) -> None:
        match effect:
            case RunStep():
                self._begin_turn(session_id, effect.prompt.message_id)
                run = StepRun(self, session_id, effect, term=term).run
                self._spawn(session_id, effect.message_id, run)
            case RunSummary():
                summary = SummaryRun(self, session_id, effect).run
                self._spawn(session_id, effect.message_id, summary)
            case RunTool():
                self._run_tool(session_id, effect, term)
            case Cancel():
                self._cancel(session_id, effect)
            case ResolveAsk():
                answer = self._asks.get(effect.ask.id)
                if answer is not None:
                    answer.set(effect.ask)
            case Answered():
                self.kept.answered(session_id, effect.said[-1])

    def _run_tool(self, session_id: str, effect: RunTool, term: int) -> None:
        context = CallContext(
            self,
            effect.part,
            attempt=effect.attempt,
            directory=self.info(session_id).directory,
        )
        tool = self.tools.get(effect.part.tool)
        run = CallRun(self, tool, effect, context, term=term)
        self._spawn(session_id, effect.part.id, run.run)
        self._executions[session_id].contexts[effect.part.id] = context

    def _spawn(self, session_id: str, key: str, run: Callable[[], Any]) -> None:
        execution = self._executions.setdefault(session_id, Execution())
        task = self._loop.create_task(_contained(run))
        execution.tasks[key] = task
        task.add_done_callback(functools.partial(self._ended, session_id, execution, key))
        self._pace(session_id, execution)

    def _ended(
        self, session_id: str, execution: Execution, key: str, task: asyncio.Task[None]
    ) -> None:
        if execution.tasks.get(key) is task:
            del execution.tasks[key]
            execution.contexts.pop(key, None)
        self._pace(session_id, execution)
        over = not execution.tasks and not execution.turn
        if over and self._executions.get(session_id) is execution:
            del self._executions[session_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            # Whoever waits for this is told by the watchdog: the execution is gone.
            logger.error("An execution of session %s died", session_id, exc_info=error)

    # --- the turn's time limit -----------------------------------------------------------------

    def _begin_turn(self, session_id: str, message_id: str) -> None:
        """Count a turn's time from its first step on."""
        execution = self._executions.setdefault(session_id, Execution())
        if execution.turn != message_id:
            execution.stop_timer(self._loop.time())
            execution.turn, execution.recalled = message_id, None
            limit_s = self.rules.limits.turn_s
            execution.left_s = math.inf if limit_s is None else limit_s

    def _pace(self, session_id: str, execution: Execution) -> None:
        """Let the turn's time run while something works for it; time spent on people is free."""
        if not execution.turn:
            return
        if not execution.tasks or execution.asking:
            execution.stop_timer(self._loop.time())
        elif execution.timer is None and execution.left_s < math.inf:
            execution.timer = self._loop.call_later(
                execution.left_s, self._turn_expired, session_id, execution
            )

    def _count_asking(self, session_id: str, change: int) -> None:
        execution = self._executions.get(session_id)
        if execution is not None:
            execution.asking = max(0, execution.asking + change)
            self._pace(session_id, execution)

    def _turn_expired(self, session_id: str, execution: Execution) -> None:
        execution.timer = None
        message_id, execution.turn = execution.turn, ""
        self.send(session_id, Abort(message_id=message_id, reason="timeout"))

    # --- the end -------------------------------------------------------------------------------

    def cancel(self, session_id: str, reason: str) -> None:
        """Stop whatever runs for a session. Safe from any thread."""
        self.start(session_id, (Cancel(reason=reason, turn=False),))

    def _cancel(self, session_id: str, effect: Cancel) -> None:
        reason, ended = effect.reason, effect.turn
        self.kept.take(session_id)
        execution = self._executions.pop(session_id, None)
        if execution is not None:
            ended = ended or bool(execution.tasks)
            execution.stop_timer(self._loop.time())
            for context in list(execution.contexts.values()):
                context.cancel(reason)
            for task in list(execution.tasks.values()):
                task.cancel()
        if ended and not self._closed:
            self._loop.run_in_executor(self._readers, self.host.abort_children, session_id, reason)

    def is_cancelling(self, session_id: str) -> bool:
        """Whether what runs for a session is about to end: nothing more may begin."""
        with self._lock:
            return any(
                type(effect) is Cancel
                for effects in self._unstarted.get(session_id, ())
                for effect in effects
            )

    def lasts(self, term: int) -> bool:
        """Whether a claim that held in ``term`` holds: nobody can have taken it over since."""
        return self.store.lease.lasts(term, now_ms=self.clock.wall_ms())

    async def prove(self, session_id: str) -> int:
        """Wait until the session's claim was seen to hold, and give the term it held in.

        What runs for a session that was taken over is cancelled, this too.
        """
        while True:
            try:
                return await self._proof(session_id).wait(timeout_s=_PROOF_S)
            except UnderstudyError:  # the store failed, or the actor is being replaced
                await asyncio.sleep(_PROOF_PAUSE_S)

    def _proof(self, session_id: str) -> Pending[int]:
        term: Pending[int] = Pending()
        proven = failing(term)
        proven.then(lambda _: term.set(self.store.lease.term))
        self.host.prove(session_id, proven)
        return term

    def is_running(self, session_id: str, key: str) -> bool:
        """Whether something works for a message or part, or soon will. For the watchdog."""
        if session_id in self._unstarted:
            return True
        execution = self._executions.get(session_id)
        return execution is not None and key in execution.tasks

    def start_loop(self) -> None:
        self._turns.start()

    def close(self, timeout_s: float) -> bool:
        """Cancel everything and stop the threads. False if one would not stop in time."""
        self._closed = True
        for answer in list(self._asks.values()):
            answer.fail(RuntimeClosed("The runtime closed before anybody answered"))
        stopped = self._turns.stop(timeout_s, first=self._cancel_calls, last=self._close_models)
        stopped &= self.coroutines.stop(timeout_s)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self.workers.close()
        return stopped

    def _cancel_calls(self) -> None:
        for execution in self._executions.values():
            for context in list(execution.contexts.values()):
                context.cancel("close")

    async def _close_models(self) -> None:
        for model in self.host.models:
            aclose = getattr(model, "aclose", None)
            if aclose is not None:
                try:
                    await asyncio.wait_for(aclose(), 2.0)
                except Exception:
                    logger.exception("Model %s did not close", model.model_id)


async def _contained(run: Callable[[], Awaitable[None]]) -> None:
    """Run; what would end the loop, and every other session's turns with it, is an error."""
    try:
        await run()
    except (KeyboardInterrupt, SystemExit) as error:
        raise RuntimeError(f"An execution raised {type(error).__name__}") from error
