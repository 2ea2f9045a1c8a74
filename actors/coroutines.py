"""The event loop of coroutine tools and hooks, not held up by one of them that does not end.

A coroutine may swallow its cancellation, or block the loop under all others. Nobody waits for it
then: it is reported and counted while it goes on, and who comes after a blocked loop gets another.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from understudy.actors.platform import Loop, Platform

logger = logging.getLogger("understudy.tools")

GRACE_S: Final = 5.0
"""How long a coroutine may take to end after it was cancelled, before that is reported."""

LOOPS_MAX: Final = 16
"""Loops that may be blocked, beyond which coroutines wait for the last one."""

GiveUp: TypeAlias = Callable[[], None]


class _Run:
    """One coroutine. ``heard``: its loop has run since it was given up on."""

    def __init__(self, name: str, place: Loop) -> None:
        self.name = name
        self.place = place
        self.task: asyncio.Task[None] | None = None
        self.given_up = self.heard = self.ended = False


class Coroutines:
    """Runs coroutines of the app's own code. Safe from any thread.

    ``call_later`` is for looking back at what was given up on.
    """

    def __init__(
        self,
        platform: Platform,
        call_later: Callable[[float, Callable[[], None]], None],
        *,
        monotonic_s: Callable[[], float],
    ) -> None:
        self._platform = platform
        self._call_later = call_later
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._places: list[Loop] = []
        self._lost: set[_Run] = set()

    @property
    def lost(self) -> int:
        """How many go on though they were given up on and cancelled."""
        return len(self._lost)

    def submit(
        self, name: str, job: Callable[[], Awaitable[None]], *, context: contextvars.Context
    ) -> GiveUp:
        """Run ``job`` soon; it must not raise. Call the result when nobody waits for it any more.

        ``name`` is for the report of one that then does not end.
        """
        with self._lock:
            if not self._places:
                self._begin_place()
            run = _Run(name, self._places[-1])

        async def work() -> None:
            await job()

        def start() -> None:
            if not run.given_up:
                run.task = run.place.loop.create_task(work(), context=context)

        run.place.loop.call_soon_threadsafe(start)
        return lambda: self._give_up(run)

    def _begin_place(self) -> None:
        place = self._platform.loop("understudy-async-tools")
        place.start()
        self._places.append(place)

    def _give_up(self, run: _Run) -> None:
        run.given_up = True

        def cancel() -> None:
            run.heard = True
            if run.task is None:
                self._ended(run)
            else:
                run.task.add_done_callback(lambda _: self._ended(run))
                run.task.cancel()

        with suppress(RuntimeError):  # the runtime closed meanwhile: its loops are gone
            run.place.loop.call_soon_threadsafe(cancel)
            self._call_later(GRACE_S, lambda: self._look(run))

    def _ended(self, run: _Run) -> None:
        with self._lock:
            run.ended = True
            self._lost.discard(run)

    def _look(self, run: _Run) -> None:
        """Count and report one that goes on after its grace, and leave the loop that it blocks."""
        with self._lock:
            if run.ended:
                return
            self._lost.add(run)
            newest = bool(self._places) and self._places[-1] is run.place
            if blocked := not run.heard and newest and len(self._places) < LOOPS_MAX:
                self._begin_place()
        if blocked:
            logger.error("The event loop under %s is blocked: others get a new one", run.name)
        else:
            logger.error("%s goes on %g s after it was cancelled", run.name, GRACE_S)

    def stop(self, timeout_s: float) -> bool:
        """End the loops. False if one would not end in time."""
        with self._lock:
            places, self._places = self._places, []
        until_s = self._monotonic_s() + timeout_s
        ended = [each.stop(max(0.1, until_s - self._monotonic_s())) for each in places]
        return all(ended)
