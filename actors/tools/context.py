"""What a running tool knows about the call it serves.

A tool function may declare one parameter annotated ``ToolContext``; the model never sees it.
``Cancellation`` is the part that ends a call, ``DetachedContext`` a context of no runtime.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

from understudy.errors import InvalidInput, ToolError, TurnAborted
from understudy.store.records import Question

KILL_AFTER_S = 0.5
"""How long a cancelled process may take to end by itself."""

Process: TypeAlias = subprocess.Popen[Any] | asyncio.subprocess.Process

_logger = logging.getLogger(__name__)


class ToolContext(Protocol):
    """One tool call, seen from inside. Its methods are safe from the tool's own thread or task.

    Attributes:
        session_id, message_id, call_id: what this call belongs to.
        attempt: 1, or more when an ``idempotent`` tool is run again after a restart.
        directory: the session's directory, or "".
    """

    session_id: str
    message_id: str
    call_id: str
    attempt: int
    directory: str

    @property
    def cancelled(self) -> bool:
        """True once the turn was aborted, timed out, or the session deleted."""
        ...

    def check(self) -> None:
        """Raise ``TurnAborted`` if the call is cancelled."""
        ...

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` once when the call is cancelled (at once if it already is).

        It runs in the thread that cancels and must not block. Returns a function that
        forgets the callback.
        """
        ...

    def track(self, process: Process) -> Callable[[], None]:
        """End ``process`` and its whole process group when the call is cancelled.

        Start it with ``start_new_session=True``. Returns a function that forgets it: call that
        when the process has ended. Raises ``InvalidInput`` if it shares our process group.
        """
        ...

    def progress(self, *, title: str | None = None, **metadata: Any) -> None:
        """Publish what the tool is doing on its part. Cheap; late ones may be merged."""
        ...

    def ask(
        self,
        permission: str,
        *,
        patterns: Sequence[str] = ("*",),
        always: Sequence[str] = (),
        **metadata: Any,
    ) -> None:
        """Wait for a person's permission (from a tool running in a thread).

        A rule that allows or denies it answers at once; without a rule a person is asked. Raises
        ``ToolError`` with the feedback when refused, ``TurnAborted`` when cancelled.
        """
        ...

    def ask_async(
        self,
        permission: str,
        *,
        patterns: Sequence[str] = ("*",),
        always: Sequence[str] = (),
        **metadata: Any,
    ) -> Awaitable[None]:
        """Like ``ask``, for coroutine tools."""
        ...

    def question(self, questions: Sequence[Question]) -> tuple[tuple[str, ...], ...]:
        """Wait for a person's answers, one tuple per question (from a tool in a thread)."""
        ...

    def question_async(
        self, questions: Sequence[Question]
    ) -> Awaitable[tuple[tuple[str, ...], ...]]:
        """Like ``question``, for coroutine tools."""
        ...


def signal_group(process: Process, number: int) -> None:
    """Send a signal to the process group that ``process`` leads, whether or not it still lives."""
    # While any member lives the kernel gives the group's number to nobody else. When none does,
    # nothing is there to be hit until the whole range of numbers has been used once.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


class Cancellation:
    """Ends a call: once, from any thread, without blocking whoever says so.

    A tracked process group gets SIGTERM at once and SIGKILL ``KILL_AFTER_S`` later, so that
    nothing of it is left within a second. That second step runs in a short-lived thread which is
    not a daemon: the interpreter does not exit and leave a stubborn process behind.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._settled = threading.Event()
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._processes: dict[object, Process] = {}

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until cancelled. False when ``timeout_s`` passed first."""
        return self._cancelled.wait(timeout_s)

    def cancel(self, reason: str = "abort") -> None:
        """Cancel, run the callbacks, end the tracked processes. Only the first call counts.

        A callback that raises is logged and does not stop the others.
        """
        with self._lock:
            if self.cancelled:
                return
            self.reason = reason
            self._cancelled.set()
            callbacks, self._callbacks = list(self._callbacks.values()), {}
            processes = list(self._processes.values())
        self._end(processes)
        for callback in callbacks:
            _run(callback)

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        key = object()
        with self._lock:
            late = self.cancelled
            if not late:
                self._callbacks[key] = callback
        if late:
            _run(callback)
        return lambda: _discard(self._callbacks, key)

    def track(self, process: Process) -> Callable[[], None]:
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == os.getpgrp():
                raise InvalidInput("track() needs a process started with start_new_session=True")
        key = object()
        with self._lock:
            self._processes[key] = process
            self._settled.clear()
            late = self.cancelled
        if late:
            self._end([process])
        return lambda: self._forget(key)

    def _forget(self, key: object) -> None:
        with self._lock:
            process = self._processes.pop(key, None)
            if not self._processes:
                self._settled.set()
        if process is not None and self.cancelled:
            signal_group(process, signal.SIGKILL)  # its children may have outlived it

    def _end(self, processes: list[Process]) -> None:
        if not processes:
            return
        for process in processes:
            signal_group(process, signal.SIGTERM)
        threading.Thread(target=self._kill_rest, name="understudy-kill", daemon=False).start()

    def _kill_rest(self) -> None:
        self._settled.wait(KILL_AFTER_S)
        with self._lock:
            rest = list(self._processes.values())
        for process in rest:
            signal_group(process, signal.SIGKILL)


def _discard(held: dict[object, Any], key: object) -> None:
    held.pop(key, None)


def _run(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:
        _logger.exception("a callback of on_cancel raised")


class CancellableCall(Cancellation):
    """The part of a ``ToolContext`` that says which call it is, and whether it is over."""

    def __init__(
        self, *, session_id: str, message_id: str, call_id: str, attempt: int, directory: str
    ) -> None:
        super().__init__()
        self.session_id = session_id
        self.message_id = message_id
        self.call_id = call_id
        self.attempt = attempt
        self.directory = directory

    def aborted(self) -> TurnAborted:
        """What to raise once the call is cancelled."""
        return TurnAborted(
            f"The call was cancelled: {self.reason}",
            session_id=self.session_id,
            message_id=self.message_id,
            reason=self.reason,
        )

    def check(self) -> None:
        if self.cancelled:
            raise self.aborted()


class DetachedContext(CancellableCall):
    """A ``ToolContext`` of no runtime: for tests, and for calling a tool by hand.

    ``allow`` answers permission requests (all are allowed by default), ``answers`` the first
    ``question``. What the tool said is kept: the latest ``title``, the merged ``metadata`` and the
    ``asked`` permissions with their patterns.
    """

    def __init__(
        self,
        *,
        session_id: str = "",
        message_id: str = "",
        call_id: str = "",
        attempt: int = 1,
        directory: str = "",
        allow: Callable[[str, tuple[str, ...]], bool] | None = None,
        answers: tuple[tuple[str, ...], ...] | None = None,
    ) -> None:
        super().__init__(
            session_id=session_id,
            message_id=message_id,
            call_id=call_id,
            attempt=attempt,
            directory=directory,
        )
        self.title: str | None = None
        self.metadata: dict[str, Any] = {}
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self._allow = allow
        self._answers = answers

    def progress(self, *, title: str | None = None, **metadata: Any) -> None:
        self.title = self.title if title is None else title
        self.metadata = {**self.metadata, **metadata}

    def ask(
        self,
        permission: str,
        *,
        patterns: Sequence[str] = ("*",),
        always: Sequence[str] = (),
        **metadata: Any,
    ) -> None:
        self.check()
        self.asked.append((permission, tuple(patterns)))
        if self._allow is not None and not self._allow(permission, tuple(patterns)):
            raise ToolError(f"permission refused: {permission} {', '.join(patterns)}")

    async def ask_async(
        self,
        permission: str,
        *,
        patterns: Sequence[str] = ("*",),
        always: Sequence[str] = (),
        **metadata: Any,
    ) -> None:
        self.ask(permission, patterns=patterns, always=always, **metadata)

    def question(self, questions: Sequence[Question]) -> tuple[tuple[str, ...], ...]:
        self.check()
        if self._answers is None:
            raise ToolError("nobody is here to answer a question")
        return self._answers

    async def question_async(self, questions: Sequence[Question]) -> tuple[tuple[str, ...], ...]:
        return self.question(questions)
