"""What a running tool knows about the call it serves.

A tool function may declare one parameter annotated ``ToolContext``; the model never sees it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import subprocess

    from understudy.store.records import Question


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

    def track(self, process: subprocess.Popen[Any]) -> Callable[[], None]:
        """End ``process`` and its whole process group when the call is cancelled.

        Start it with ``start_new_session=True``. Returns a function that forgets it.
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

        Raises ``ToolError`` with the feedback when refused, ``TurnAborted`` when cancelled.
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
        """Wait for a person's answers, one tuple per question."""
        ...
