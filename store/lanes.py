"""Lanes: work done one after the other, somewhere else; and waiting for what is done elsewhere.

The threads under a runtime come from here and from ``actors.platform``, and so do their waits: a
simulator puts its own in their place, and then nothing runs or waits but by its choice.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

LOOK_S: Final = 0.5

T = TypeVar("T")
Item_contra = TypeVar("Item_contra", contravariant=True)


class Lane(Protocol[Item_contra]):
    """Items that are handled in the order they came, in groups, one group at a time."""

    def put(self, item: Item_contra) -> bool:
        """Hand an item in, from any thread. False once closed: nobody will handle it."""
        ...

    def close(self, timeout_s: float) -> bool:
        """Handle what was handed in, then end. False if that took too long. Safe to repeat."""
        ...


class MakeLane(Protocol):
    """Makes a running lane: ``ended`` is called in it, after the last group."""

    def __call__(
        self,
        name: str,
        handle: Callable[[list[Any]], None],
        *,
        most: int,
        ended: Callable[[], None],
    ) -> Lane[Any]: ...


class ThreadLane(Generic[T]):
    """A lane with a thread of its own: whatever waits makes the next group, up to ``most``."""

    def __init__(
        self,
        name: str,
        handle: Callable[[list[T]], None],
        *,
        most: int,
        ended: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._most = most
        self._ended = ended
        self._items: queue.SimpleQueue[tuple[T] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T) -> bool:
        with self._lock:
            if not self._closed:
                self._items.put((item,))
            return not self._closed

    def close(self, timeout_s: float) -> bool:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._items.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._group():
            pass
        self._ended()

    def _group(self) -> bool:
        """Wait for items and handle what there is. False at the end."""
        entry = self._items.get()
        group: list[T] = []
        while entry is not None:
            group.append(entry[0])
            if len(group) >= self._most:
                break
            try:
                entry = self._items.get_nowait()
            except queue.Empty:
                break
        if group:
            self._handle(group)
        return entry is not None


# --- waiting -----------------------------------------------------------------------------------

Wait: TypeAlias = Callable[[threading.Lock, float | None], bool]

waits: Final[ContextVar[Wait | None]] = ContextVar("waits", default=None)
"""How a wait is spent here instead of blocking: a simulator runs what is waited for."""


def wait_released(gate: threading.Lock, timeout_s: float | None) -> bool:
    """Take a lock that somebody else releases. False after ``timeout_s``; None waits for ever.

    The main thread looks up every ``LOOK_S``: Python hears of a Ctrl-C that came just before it
    began to wait only when it is awake.
    """
    instead = waits.get()
    if instead is not None:
        return instead(gate, timeout_s)
    if threading.current_thread() is not threading.main_thread():
        return gate.acquire(timeout=-1 if timeout_s is None else timeout_s)
    until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while not gate.acquire(timeout=max(0.0, min(LOOK_S, until_s - time.monotonic()))):
        if time.monotonic() >= until_s:
            return False
    return True
