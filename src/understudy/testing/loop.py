"""An event loop without a thread, a selector or a clock of its own: the scheduler steps it."""

from __future__ import annotations

import asyncio
import contextvars
from asyncio import events
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor
from typing import Any, TypeVarTuple, Unpack

from understudy.testing.scheduler import Scheduler, Source

_Ts = TypeVarTuple("_Ts")


class SimulatedLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as tasks, futures, timeouts and executors need.

    Callbacks run in the order they were scheduled, as they do in asyncio; what happens elsewhere in
    between is chance.
    """

    def __init__(self, scheduler: Scheduler, source: Source, calls: Executor) -> None:
        self._scheduler = scheduler
        self._source = source
        self._calls = calls
        self._closed = False
        self.problems: list[dict[str, Any]] = []

    # --- callbacks -----------------------------------------------------------------------------

    def call_soon(
        self,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        self._check_closed()
        handle = asyncio.Handle(callback, args, self, context)
        self._source.add(lambda: self.run_handle(handle))
        return handle

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        self._check_closed()
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._scheduler.at(when, self._source, lambda: self.run_handle(handle))
        return handle

    def run_handle(self, handle: asyncio.Handle) -> None:
        """One callback, as asyncio's own loop would run it."""
        if handle.cancelled():
            return
        before = events._get_running_loop()  # noqa: SLF001 - asyncio's, for event loops
        events._set_running_loop(self)  # noqa: SLF001
        try:
            handle._run()  # noqa: SLF001
        finally:
            events._set_running_loop(before)  # noqa: SLF001

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer stays until it is due, and does nothing then."""

    # --- futures, tasks, executors -------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def run_in_executor(  # type: ignore[override]  # as BaseEventLoop: a future, no coroutine
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        return asyncio.wrap_future((executor or self._calls).submit(func, *args), loop=self)

    # --- state ---------------------------------------------------------------------------------

    def time(self) -> float:
        return self._scheduler.clock.monotonic_s()

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return events._get_running_loop() is self  # noqa: SLF001

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True

    def _check_closed(self) -> None:
        if self._closed:
            raise RuntimeError("Event loop is closed")

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._source.life.dead:
            self.problems.append(context)
