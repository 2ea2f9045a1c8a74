"""The platform: where a runtime's work runs, and in what order.

Everything a runtime does happens in one of these places: actors on a dispatcher, commits and
signals in lanes, turns and coroutine tools on event loops, reads and calls on executors, tools on
workers, upkeep by a ticker. ``Threads`` gives each its threads. A simulator gives the same places
with no thread at all, and decides itself what runs next.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor as Calls
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from understudy.actors.pool import Pool, ThreadPool
from understudy.actors.workers import Workers, WorkerThreads
from understudy.store.lanes import Lane, ThreadLane


class Loop(Protocol):
    """An event loop that runs somewhere."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    def start(self) -> None: ...

    def stop(
        self,
        timeout_s: float,
        *,
        first: Callable[[], None] | None = None,
        last: Callable[[], Awaitable[None]] | None = None,
    ) -> bool:
        """Call ``first`` in the loop, cancel its tasks, await ``last``, end.

        False if that took too long. Only closes a loop that was never started.
        """
        ...


class Ticker(Protocol):
    """Something that is done every now and then."""

    def stop(self) -> None: ...


class Platform(Protocol):
    """Where everything runs. Its places start at once, but for dispatcher and loops."""

    def dispatcher(self, threads: int, *, monotonic_s: Callable[[], float]) -> Pool: ...

    def lane(
        self,
        name: str,
        handle: Callable[[list[Any]], None],
        *,
        most: int,
        ended: Callable[[], None],
    ) -> Lane[Any]:
        """See ``store.lanes.MakeLane``."""
        ...

    def loop(self, name: str) -> Loop: ...

    def calls(self, name: str, threads: int) -> Calls:
        """For short calls that may wait."""
        ...

    def workers(self, limit: int) -> Workers:
        """For functions that may never return."""
        ...

    def every(self, period_s: float, tick: Callable[[], None], *, name: str) -> Ticker: ...


class Threads:
    """The platform of a real runtime."""

    def dispatcher(self, threads: int, *, monotonic_s: Callable[[], float]) -> Pool:
        return ThreadPool(threads, monotonic_s=monotonic_s)

    def lane(
        self,
        name: str,
        handle: Callable[[list[Any]], None],
        *,
        most: int,
        ended: Callable[[], None],
    ) -> Lane[Any]:
        return ThreadLane(name, handle, most=most, ended=ended)

    def loop(self, name: str) -> Loop:
        return LoopThread(name)

    def calls(self, name: str, threads: int) -> Calls:
        return ThreadPoolExecutor(threads, thread_name_prefix=name)

    def workers(self, limit: int) -> Workers:
        return WorkerThreads(limit)

    def every(self, period_s: float, tick: Callable[[], None], *, name: str) -> Ticker:
        return TickerThread(period_s, tick, name=name)


class LoopThread:
    """An event loop with a daemon thread under it."""

    def __init__(self, name: str) -> None:
        self._made: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Made when it is first asked for: what never starts has no sockets to give back."""
        if self._made is None:
            self._made = asyncio.new_event_loop()
        return self._made

    def start(self) -> None:
        _ = self.loop
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()  # also when whoever stopped it has given up waiting

    def stop(
        self,
        timeout_s: float,
        *,
        first: Callable[[], None] | None = None,
        last: Callable[[], Awaitable[None]] | None = None,
    ) -> bool:
        async def wind_up() -> None:
            await end_tasks(first, last, timeout_s)
            await self.loop.shutdown_asyncgens()
            self.loop.stop()

        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(lambda: self.loop.create_task(wind_up()))
            if self._thread is not threading.current_thread():
                self._thread.join(timeout_s)
        if self._thread.ident is None and self._made is not None:
            self._made.close()  # it was never started
        return not self._thread.is_alive()


async def end_tasks(
    first: Callable[[], None] | None, last: Callable[[], Awaitable[None]] | None, timeout_s: float
) -> None:
    """What comes before a loop's end."""
    if first is not None:
        first()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=min(1.0, timeout_s))
    if last is not None:
        await last()


class TickerThread:
    """Ticks in a daemon thread."""

    def __init__(self, period_s: float, tick: Callable[[], None], *, name: str) -> None:
        self._period_s = period_s
        self._tick = tick
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stopping.wait(self._period_s):
            self._tick()
