"""Pending: the answer to a command, set once, waited for by threads or by event loops."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import pykka

from understudy.actors.wakeups import wake_ups_of
from understudy.errors import CommandTimeout
from understudy.store.lanes import wait_released

if TYPE_CHECKING:
    from pykka._types import OptExcInfo

T = TypeVar("T")

Callbacks: TypeAlias = "tuple[Callable[[Pending[T]], None], ...]"

_lock: Final = threading.RLock()
"""One for all: thousands wait at a time, and the collector looks at each lock as well. Nothing is
made while it is held, so that no finaliser runs, which might wait for another thread."""


class Pending(pykka.Future[T]):
    """A pykka future with callbacks.

    The first outcome counts; later ones are ignored, because a watchdog and a late handler may
    both answer.
    """

    __slots__ = ("_callbacks", "_done", "_error", "_value")

    _get_hook = None  # pykka's, which somebody else may set

    def __init__(self) -> None:
        self._callbacks: Callbacks[T] = ()
        self._done = False
        self._value: Any = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._done

    @property
    def error(self) -> BaseException | None:
        return self._error

    def set(self, value: T | None = None) -> None:
        self._settle(value, None)

    def set_exception(self, exc_info: OptExcInfo | None = None) -> None:
        _, error, _ = exc_info if exc_info is not None else sys.exc_info()
        self._settle(None, error)

    def fail(self, error: BaseException) -> None:
        self._settle(None, error)

    def settle(self, work: Callable[[], T]) -> None:
        """Set what ``work`` returns, or fail with what it raises."""
        try:
            self.set(work())
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            self.fail(error)

    def _settle(self, value: Any, error: BaseException | None) -> None:
        with _lock:
            if self._done:
                return
            self._value = value
            self._error = error
            self._done = True
            callbacks, self._callbacks = self._callbacks, ()
        for callback in callbacks:
            callback(self)

    def then(self, callback: Callable[[Pending[T]], None]) -> None:
        """Call ``callback(self)`` once settled: at once, or in the settling thread."""
        while not self._done:
            before = self._callbacks
            if self._swapped(before, (*before, callback)):
                return
        callback(self)

    def forget(self, callback: Callable[[Pending[T]], None]) -> None:
        """Do not call ``callback``, if it was not called yet."""
        while before := self._callbacks:
            if self._swapped(before, tuple(each for each in before if each != callback)):
                return

    def _swapped(self, before: Callbacks[T], after: Callbacks[T]) -> bool:
        """False if they are not, or no longer, those ``before``."""
        with _lock:
            if self._done or self._callbacks is not before:
                return False
            self._callbacks = after
            return True

    def get(self, *, timeout: float | None = None) -> T:
        """Wait in this thread. Raises ``CommandTimeout`` after ``timeout`` seconds."""
        if not self._done:
            gate = threading.Lock()
            gate.acquire()

            def open_gate(_: Pending[T]) -> None:
                gate.release()

            self.then(open_gate)
            if not wait_released(gate, timeout):
                self.forget(open_gate)
                raise CommandTimeout(f"No answer within {timeout} s", timeout_s=timeout)
        return self.result()

    def result(self) -> T:
        """The value, or the error raised. Only once settled."""
        assert self._done, "not settled yet"
        if self._error is not None:
            # A fresh traceback for every waiter: an error object may be raised by several.
            raise self._error.with_traceback(None)
        value: T = self._value
        return value

    async def wait(self, *, timeout_s: float | None = None) -> T:
        """Wait in this event loop without blocking it."""
        if not self._done:
            loop = asyncio.get_running_loop()
            settled = loop.create_future()
            wake_ups = wake_ups_of(loop)

            def wake(_: Pending[T]) -> None:
                wake_ups.wake(settled)

            self.then(wake)
            wake_ups.limit(settled, timeout_s)
            try:
                await settled
            finally:
                wake_ups.unlimit(settled)
                if not self._done:
                    self.forget(wake)
            if not self._done:
                raise CommandTimeout(f"No answer within {timeout_s} s", timeout_s=timeout_s)
        return self.result()


def failing(other: Pending[Any]) -> Pending[Any]:
    """A pending whose failure is that of ``other``; its value is nobody's."""
    pending: Pending[Any] = Pending()
    pending.then(lambda done: other.fail(done.error) if done.error is not None else None)
    return pending


def settled(value: T) -> Pending[T]:
    pending: Pending[T] = Pending()
    pending.set(value)
    return pending
