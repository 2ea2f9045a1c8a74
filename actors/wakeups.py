"""Wake-ups: other threads wake what waits in an event loop, with one call for all at once."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress
from typing import Final
from weakref import WeakKeyDictionary, ref

_of_loops: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, WakeUps]] = WeakKeyDictionary()
_lock: Final = threading.Lock()


class WakeUps:
    """The futures of one loop that are to be woken.

    A call into a loop costs a system call and a look at every selector; a commit answers hundreds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._due: deque[asyncio.Future[None]] = deque()
        self._called = False

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


def set_if_waiting(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def wake_ups_of(loop: asyncio.AbstractEventLoop) -> WakeUps:
    """Those of this loop."""
    with _lock:
        found = _of_loops.get(loop)
        if found is None:
            found = _of_loops[loop] = WakeUps(loop)
        return found
