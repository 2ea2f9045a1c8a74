"""Threads for synchronous tools: bounded, daemons, and not held up by a tool that never returns."""

from __future__ import annotations

import logging
import queue
import threading
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

    A function its caller gave up on no longer counts against the limit: the thread
    under it ends when the function does, and does not keep the process alive. Nor does one that is
    ``waiting``; when it goes on there may be more threads than the limit, until one is done.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._waiting = 0
        self._lost = 0
        self._closed = False

    @property
    def lost(self) -> int:
        return self._lost

    def submit(self, job: Callable[[], None]) -> GiveUp:
        run = _Run(job)
        with self._lock:
            self._waiting += 1
            try:
                self._add_thread()
            except RuntimeError:
                if not self._threads:
                    self._waiting -= 1
                    raise
        self._jobs.put(run)
        return lambda: self._give_up(run)

    def _add_thread(self) -> None:
        """One more, if a job waits for it. Raises ``RuntimeError`` where it has no room."""
        if self._waiting > self._idle and self._threads < self._limit:
            self._threads += 1
            try:
                threading.Thread(target=self._run, name="understudy-tool", daemon=True).start()
            except RuntimeError:
                self._threads -= 1
                raise

    def _run(self) -> None:
        _here.workers = self
        while True:
            with self._lock:
                if self._closed and not self._waiting:
                    self._threads -= 1
                    return
                self._idle += 1
            try:
                run = self._jobs.get(timeout=_LINGER_S)
            except queue.Empty:
                run = None
            with self._lock:
                self._idle -= 1
                if run is None:
                    if self._waiting and not self._closed:
                        continue  # a job was handed in at this very moment
                    self._threads -= 1
                    return
                self._waiting -= 1
                run.runs = not run.given_up
            if not run.runs:
                continue
            try:
                run.job()
            except BaseException:
                logger.exception("A job let an exception escape")
            with self._lock:
                run.runs = False
                if run.given_up:
                    self._lost -= 1
                    return
                if self._threads > self._limit:
                    self._threads -= 1
                    return

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
        try:
            self._add_thread()
        except RuntimeError as error:  # whoever comes back, or is handed in next, lets it go on
            logger.warning("No thread for %d jobs that wait: %s", self._waiting, error)

    def close(self) -> None:
        """Let idle threads end now."""
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._jobs.put(None)
