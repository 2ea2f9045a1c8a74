"""Threads for synchronous tools: bounded, daemons, and not held up by a tool that never returns."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, Protocol

from understudy.actors.coroutines import GiveUp

logger = logging.getLogger("understudy.tools")

_LINGER_S: Final = 10.0

LOST_MAX: Final = 1000
"""Functions that were given up on and still run, beyond which no more may be started."""


_here = threading.local()


def stand_aside() -> AbstractContextManager[None]:
    """Inside, this thread waits for others. If it is a worker's, they may need its place."""
    workers: Workers | None = getattr(_here, "workers", None)
    return nullcontext() if workers is None else workers.waiting()


class Workers(Protocol):
    """Who runs functions that may take long, or for ever."""

    @property
    def lost(self) -> int:
        """How many functions run that were given up on."""
        ...

    def submit(self, job: Callable[[], None]) -> GiveUp:
        """Run ``job`` soon; it must not raise. Call the result when nobody waits for it any more.

        One that has not begun by then never does, so it must not be what answers others. Raises
        ``RuntimeError`` where there is no thread for it, and none can be started.
        """
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Inside, the job that runs in this thread waits for others, and takes no one's place."""
        ...

    def close(self) -> None: ...


class _Run:
    """One job. ``runs`` from its beginning to its end."""

    __slots__ = ("given_up", "job", "runs")

    def __init__(self, job: Callable[[], None]) -> None:
        self.job = job
        self.runs = self.given_up = False


class WorkerThreads:
    """Runs functions on up to ``limit`` threads, made on demand and ended when idle.

    Threads are called one at a time, each by the one before as it begins. Where functions take no
    time the first has done them all before a second is there, and few are woken for nothing.

    A function its caller gave up on no longer counts against the limit: the thread
    under it ends when the function does, and does not keep the process alive. Nor does one that is
    ``waiting``; when it goes on there may be more threads than the limit, until one is done.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._jobs: deque[_Run] = deque()
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._called = False  # a thread is on its way
        self._idle = 0  # threads that may be called
        self._threads = 0
        self._lost = 0
        self._closed = False

    @property
    def lost(self) -> int:
        return self._lost

    def submit(self, job: Callable[[], None]) -> GiveUp:
        run = _Run(job)
        with self._lock:
            self._jobs.append(run)
            try:
                self._call_one()
            except RuntimeError:
                if not self._threads:
                    self._jobs.pop()
                    raise
        return lambda: self._give_up(run)

    def _call_one(self) -> None:
        """Have a thread come for what waits. Raises ``RuntimeError`` where it has no room."""
        if self._called or not self._jobs:
            return
        if self._idle:
            self._idle -= 1
            self._called = True
            self._calls.put(None)
        elif self._threads < self._limit:
            self._threads += 1
            self._called = True
            try:
                threading.Thread(target=self._run, name="understudy-tool", daemon=True).start()
            except RuntimeError:
                self._threads -= 1
                self._called = False
                raise

    def _run(self) -> None:
        _here.workers = self
        with self._lock:
            self._called = False
        while (run := self._next()) is not None:
            try:
                run.job()
            except BaseException:
                logger.exception("A job let an exception escape")
            with self._lock:
                run.runs = False
                if run.given_up:
                    self._lost -= 1
                    self._call_another()
                    return
                if self._threads > self._limit:
                    self._threads -= 1
                    return

    def _next(self) -> _Run | None:
        """The next job for this thread; None once there was none for long, or none will come."""
        while True:
            with self._lock:
                if (run := self._taken()) is not None:
                    return run
                if self._closed:
                    self._threads -= 1
                    return None
                self._idle += 1
            if not self._wait():
                return None

    def _taken(self) -> _Run | None:
        while self._jobs:
            run = self._jobs.popleft()
            if not run.given_up:
                run.runs = True
                self._call_another()
                return run
        return None

    def _call_another(self) -> None:
        try:
            self._call_one()
        except RuntimeError as error:  # whoever is done, or is handed in next, lets it go on
            logger.warning("No thread for %d jobs that wait: %s", len(self._jobs), error)

    def _wait(self) -> bool:
        """Wait to be called. False if nobody did for long."""
        try:
            self._calls.get(timeout=_LINGER_S)
        except queue.Empty:
            with self._lock:
                try:
                    self._calls.get_nowait()  # it came at this very moment
                except queue.Empty:
                    self._idle -= 1
                    self._threads -= 1
                    return False
        with self._lock:
            self._called = False
        return True

    def _give_up(self, run: _Run) -> None:
        """Stop counting the thread under a job, unless that has ended: it may run another one.

        One that still waits is passed over when its turn comes.
        """
        with self._lock:
            if run.runs and not run.given_up:
                self._lost += 1
                self._leave()
            run.given_up = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        with self._lock:
            self._leave()
        try:
            yield
        finally:
            with self._lock:
                self._threads += 1

    def _leave(self) -> None:
        """Stop counting a thread, and let another do what waits."""
        self._threads -= 1
        self._call_another()

    def close(self) -> None:
        """Let idle threads end now."""
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._calls.put(None)
            self._idle = 0
