"""The simulated platform: every place of a runtime is a queue of the scheduler's."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from understudy.actors.coroutines import GiveUp
from understudy.actors.platform import end_tasks
from understudy.actors.pool import BATCH, Mailbox
from understudy.testing.loop import SimulatedLoop
from understudy.testing.scheduler import Life, Scheduler, Source


class Simulated:
    """A ``Platform`` of one process, in the thread of its scheduler."""

    def __init__(self, scheduler: Scheduler, life: Life) -> None:
        self.scheduler = scheduler
        self.life = life
        self.loops: list[SimulatedLoopPlace] = []
        self.pool: SimulatedPool | None = None
        self._calls = SimulatedCalls(self._source("calls", shuffled=True, may_wait=True))

    def problems(self) -> list[str]:
        """What the loops were told that nobody handled."""
        return [str(each) for place in self.loops for each in place.loop.problems]

    def _source(self, name: str, *, shuffled: bool = False, may_wait: bool = False) -> Source:
        name = name.removeprefix("understudy-")
        return Source(self.scheduler, self.life, name, shuffled=shuffled, may_wait=may_wait)

    def dispatcher(self, threads: int, *, monotonic_s: Callable[[], float]) -> SimulatedPool:
        self.pool = SimulatedPool(self._source("actors", shuffled=True), self.scheduler)
        return self.pool

    def lane(
        self,
        name: str,
        handle: Callable[[list[Any]], None],
        *,
        most: int,
        ended: Callable[[], None],
    ) -> SimulatedLane:
        source = self._source(name)
        return SimulatedLane(source, self.scheduler, handle, most=most, ended=ended)

    def loop(self, name: str) -> SimulatedLoopPlace:
        place = SimulatedLoopPlace(self.scheduler, self._source(name), self._calls)
        self.loops.append(place)
        return place

    def calls(self, name: str, threads: int) -> SimulatedCalls:
        return SimulatedCalls(self._source(name, shuffled=True, may_wait=True))

    def workers(self, limit: int) -> SimulatedWorkers:
        return SimulatedWorkers(self._source("tools", shuffled=True, may_wait=True))

    def every(self, period_s: float, tick: Callable[[], None], *, name: str) -> SimulatedTicker:
        return SimulatedTicker(self._source(name, may_wait=True), period_s, tick)


_BATCHES: Final = (1, 1, 2, 3, BATCH)
_LENT: Final = 0.3  # how often a caller lends its thread


class SimulatedPool:
    """Runs any busy mailbox next, for any number of messages."""

    def __init__(self, source: Source, scheduler: Scheduler) -> None:
        self._source = source
        self._scheduler = scheduler
        self._running: dict[Mailbox, float] = {}

    def start(self) -> None:
        """There is no thread to start."""

    def schedule(self, mailbox: Mailbox) -> None:
        self._source.add(lambda: self._run(mailbox, self._scheduler.chance.choice(_BATCHES)))

    def may_lend(self) -> bool:
        """Any caller might be a thread."""
        return self._scheduler.chance.random() < _LENT

    def run_here(self, mailbox: Mailbox) -> None:
        with self._scheduler.inside():
            self._run(mailbox, 1)

    def _run(self, mailbox: Mailbox, batch: int) -> None:
        self._running[mailbox] = self._scheduler.clock.monotonic_s()
        again = mailbox.run(batch)
        if self._running.pop(mailbox, None) is not None and again:
            self.schedule(mailbox)

    def hung(self, limit_s: float) -> list[Mailbox]:
        now_s = self._scheduler.clock.monotonic_s()
        found = [each for each, since_s in self._running.items() if now_s - since_s > limit_s]
        for mailbox in found:
            del self._running[mailbox]
        return found

    def stop(self, timeout_s: float) -> bool:
        self._source.rest()
        return True


class SimulatedLane:
    """A lane whose groups are as large as chance has it."""

    def __init__(
        self,
        source: Source,
        scheduler: Scheduler,
        handle: Callable[[list[Any]], None],
        *,
        most: int,
        ended: Callable[[], None],
    ) -> None:
        self._source = source
        self._scheduler = scheduler
        self._handle = handle
        self._most = most
        self._ended = ended
        self._items: deque[Any] = deque()
        self._closed = False

    def put(self, item: Any) -> bool:
        if self._closed:
            return False
        self._items.append(item)
        self._source.add(self._run)
        return True

    def _run(self) -> None:
        size = min(len(self._items), self._most, self._size(self._scheduler.chance))
        group = [self._items.popleft() for _ in range(size)]
        if group:
            self._handle(group)

    def _size(self, chance: random.Random) -> int:
        return chance.choice((1, 2, 3, self._most))

    def close(self, timeout_s: float) -> bool:
        if not self._closed:
            self._closed = True
            while self._items and not self._source.life.dead:
                self._run()
            if not self._source.life.dead:
                self._ended()
        return True


class SimulatedCalls(Executor):
    """Any call that waits may be next."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._waiting: list[Future[Any]] = []
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        self._waiting.append(future)

        def run() -> None:
            self._waiting.remove(future)
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - told to whoever waits
                future.set_exception(error)

        self._source.add(run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - the library's signature
        self._closed = True
        if cancel_futures:
            self._source.rest()
            for future in self._waiting:
                future.cancel()


class SimulatedWorkers:
    """Any job that waits may be next."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def lost(self) -> int:
        return 0

    def submit(self, job: Callable[[], None]) -> GiveUp:
        """One that runs cannot be given up on: nothing else runs meanwhile."""
        waiting = [job]

        def begin() -> None:
            if waiting:
                waiting.pop()()

        self._source.add(begin)
        return waiting.clear

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        """There is no thread to end."""


class SimulatedTicker:
    """Ticks in virtual time."""

    def __init__(self, source: Source, period_s: float, tick: Callable[[], None]) -> None:
        self._source = source
        self._period_s = period_s
        self._tick = tick
        self._stopped = False
        source.add_later(period_s, self._run)

    def _run(self) -> None:
        if not self._stopped:
            self._source.add_later(self._period_s, self._run)
            self._tick()

    def stop(self) -> None:
        self._stopped = True


class SimulatedLoopPlace:
    """An event loop that is stepped."""

    def __init__(self, scheduler: Scheduler, source: Source, calls: Executor) -> None:
        self._scheduler = scheduler
        self._source = source
        self.loop = SimulatedLoop(scheduler, source, calls)  # type: ignore[abstract]  # no network

    def start(self) -> None:
        """Steps come from the scheduler."""

    def stop(
        self,
        timeout_s: float,
        *,
        first: Callable[[], None] | None = None,
        last: Callable[[], Awaitable[None]] | None = None,
    ) -> bool:
        if self._source.life.dead:
            return True
        task = self.loop.create_task(end_tasks(first, last, timeout_s))
        ended = self._scheduler.run_until(task.done, steps=100_000, limit_s=timeout_s)
        self.loop.close()
        return ended

    def reap(self) -> None:
        """End the tasks of a dead process, in which nothing they do has any effect."""
        rest = deque(self._source.rest())

        def later(callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.Handle:
            handle = asyncio.Handle(callback, args, self.loop, context)
            rest.append(lambda: self.loop.run_handle(handle))
            return handle

        self.loop.call_soon = later  # type: ignore[method-assign, assignment]
        for _ in range(3):
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            for _ in range(10_000):
                if not rest:
                    break
                rest.popleft()()
        self.loop.close()
