"""The turnstile: threads that would only be in each other's way go one after the other."""

from __future__ import annotations

import sys
import threading
from typing import ClassVar, Final

PATIENCE_S: Final = 0.01
_NEEDED: Final[bool] = getattr(sys, "_is_gil_enabled", lambda: True)()


class OneAtATime:
    """``with OneAtATime():`` while others of the process stay out of blocks like it, if they can.

    One thread at a time has the interpreter, and SQLite lets go of it for every row: where others
    wait for it, each row is a switch of threads, which costs more than the row. They wait here
    instead, until a piece of work is done.

    Nothing depends on it. Nobody waits longer than ``PATIENCE_S``, and once somebody has, nobody
    waits for the same one: what hangs inside, or waits for another, holds nobody up.
    """

    __slots__ = ("_entered",)

    _lock: ClassVar = threading.Lock()
    _inside: ClassVar[int | None] = None  # the thread that is
    _slow: ClassVar[bool] = False  # somebody has waited for it in vain

    def __enter__(self) -> object:
        cls, me = OneAtATime, threading.get_ident()
        self._entered = False
        if _NEEDED and cls._inside != me and not (cls._slow and cls._lock.locked()):
            self._entered = cls._lock.acquire(timeout=PATIENCE_S)
            cls._slow = not self._entered
        if self._entered:
            cls._inside = me
        return None

    def __exit__(self, _: object, __: BaseException | None, ___: object) -> None:
        if self._entered:
            OneAtATime._inside = None
            OneAtATime._lock.release()
