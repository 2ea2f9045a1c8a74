"""Wake-ups: other threads wake what waits in an event loop, with one call for all at once."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress
from typing import Final
from weakref import WeakKeyDictionary, ref

_of_loops: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, ref[WakeUps]]] = WeakKeyDictionary()
_lock: Final = threading.Lock()
_LONG_S: Final = 5.0
_LOOK_EVERY_S: Final = 0.5


class WakeUps:
    """The futures of one loop that are to be woken.

    A call into a loop costs a system call and a look at every selector; a commit answers hundreds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._due: deque[asyncio.Future[None]] = deque()
        self._called = False
        self._timers: dict[asyncio.Future[None], asyncio.TimerHandle] = {}
        self._deadlines: dict[asyncio.Future[None], float] = {}
        self._looking = False

    def wake(self, future: asyncio.Future[None]) -> None:
        """Set ``future`` soon, if it still waits. Safe from any thread."""
        self._due.append(future)
        if not self._called:
            self._called = True
            loop = self._loop()
            with suppress(RuntimeError):  # the loop that waited is closed
                if loop is not None:
                    loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._called = False  # before looking: what comes from here on calls again
        while self._due:
            set_if_waiting(self._due.popleft())

    def limit(self, future: asyncio.Future[None], timeout_s: float | None) -> None:
        """Set ``future`` after that long, until ``unlimit``; what is long, to half a second.

        A timer for each wait would cost more than the rest of it, and hardly any ever fires.
        """
        if timeout_s is None:
            return
        loop = future.get_loop()
        if timeout_s < _LONG_S:
            self._timers[future] = loop.call_later(timeout_s, set_if_waiting, future)
        else:
            self._deadlines[future] = loop.time() + timeout_s
            self._look_later(loop)

    def unlimit(self, future: asyncio.Future[None]) -> None:
        self._deadlines.pop(future, None)
        timer = self._timers.pop(future, None)
        if timer is not None:
            timer.cancel()

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._looking:
            self._looking = True
            loop.call_later(_LOOK_EVERY_S, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set what waited long enough."""
        now = loop.time()
        for future, deadline in self._deadlines.items():
            if deadline <= now:
                set_if_waiting(future)
        self._looking = False
        if self._deadlines:
            self._look_later(loop)


def set_if_waiting(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def wake_ups_of(loop: asyncio.AbstractEventLoop) -> WakeUps:
    """Those of this loop, for as long as anything waits in it.

    Kept longer, a future that nobody woke would keep its loop, which was closed before.
    """
    with _lock:
        known = _of_loops.get(loop)
        found = known() if known is not None else None
        if found is None:
            found = WakeUps(loop)
            _of_loops[loop] = ref(found)
        return found
