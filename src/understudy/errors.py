"""Every error understudy raises, in one tree.

    UnderstudyError
    ├── InvalidInput            the caller's argument is unusable (also a ValueError)
    ├── SessionError            carries ``session_id``
    │   ├── SessionNotFound     no such session, or it was deleted (also a LookupError)
    │   ├── SessionExists       a caller-chosen session id is already in use
    │   ├── SessionClaimed      another live process owns the session
    │   ├── SessionBusy         ``when_busy="reject"`` or an operation that needs an idle session
    │   ├── SessionQuarantined  its actor keeps dying; read, delete or reset it
    │   ├── SessionFenced       a newer incarnation took the session over
    │   ├── ActorCrashed        the session's actor died while it handled this command
    │   ├── PromptConflict      the same message id was used with other content
    │   ├── MessageNotFound     no such message in this session (also a LookupError)
    │   ├── AskNotFound         no such permission request or question (also a LookupError)
    │   ├── AskClosed           it was answered, or what asked is gone
    │   └── CompactionFailed    the summary failed or would not shrink the context
    ├── TurnError               carries ``session_id`` and ``message_id``
    │   ├── TurnAborted         aborted, interrupted by a restart, or settled by close
    │   └── TurnFailed          the turn ended in an error (model, limits, context)
    ├── ModelError              the model adapter failed (also carried by TurnFailed)
    │   ├── ModelOverflow       the request does not fit the model's context
    │   └── ModelUnavailable    transient: rate limit, server error, connection, stall
    ├── ToolError               a tool refuses its input or cannot do its job
    ├── StoreError              the database cannot be opened, read or written
    │   ├── StoreFull           no space left; nothing was written
    │   ├── StoreBusy           another process held the write lock for too long
    │   ├── StoreUnreadable     not a database, damaged, gone, or not writable
    │   └── StoreTooNew         written by a newer version of understudy
    ├── RuntimeClosed           the runtime is closed or closing
    ├── CommandTimeout          no answer in time; the command may still be carried out
    │                           (also a TimeoutError)
    ├── ResultNotReady          in an event loop, a result was used before it was awaited
    │                           (also a RuntimeError)
    └── InternalError           our bug: please report it

Errors carry their data as attributes, survive pickling, and never hide their cause.
"""

from __future__ import annotations

from typing import Any, Final

_WORDS: Final = 2_000  # characters of an error that are kept


class UnderstudyError(Exception):
    """The base of every error raised by understudy."""

    def __init__(self, message: str = "", **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.data = data

    def __getattr__(self, name: str) -> Any:
        # Data given by keyword is readable as an attribute: ``error.session_id``.
        if name in ("data", "message") or name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.data)


def _rebuild(cls: type[UnderstudyError], message: str, data: dict[str, Any]) -> UnderstudyError:
    return cls(message, **data)


def described(error: BaseException) -> str:
    """An error's type and words, cut to what is worth storing; never fails, whatever it is."""
    try:
        words = str(error)
    except Exception:  # noqa: BLE001 - its own fault, and we still have its type
        words = "(it cannot be printed)"
    if len(words) > _WORDS:
        words = f"{words[:_WORDS]}…"
    return f"{type(error).__name__}: {words}".encode(errors="replace").decode()


class InvalidInput(UnderstudyError, ValueError):
    """The caller's argument is unusable. Nothing was stored; correct it and call again."""


class SessionError(UnderstudyError):
    """Something about one session. ``session_id`` names it."""

    session_id: str


class SessionNotFound(SessionError, LookupError):
    """There is no such session, or it has been deleted."""


class SessionExists(SessionError):
    """A caller-chosen session id is already in use."""


class SessionClaimed(SessionError):
    """Another live process owns the session (``owner``); ask it, or wait until it lets go."""

    owner: str


class SessionBusy(SessionError):
    """The session is answering a prompt and this call does not wait."""


class SessionQuarantined(SessionError):
    """The session's actor keeps dying (``reason``). Read it, delete it, or reset it."""

    reason: str


class SessionFenced(SessionError):
    """A newer incarnation owns the session; this write was refused and changed nothing."""


class ActorCrashed(SessionError):
    """The session's actor died while it handled this command. The command was not carried out."""


class PromptConflict(SessionError):
    """This message id was used before with other content (``message_id``)."""

    message_id: str


class MessageNotFound(SessionError, LookupError):
    """There is no such message in this session (``message_id``)."""

    message_id: str


class AskNotFound(SessionError, LookupError):
    """There is no such permission request or question (``ask_id``)."""

    ask_id: str


class AskClosed(SessionError):
    """The permission request or question (``ask_id``) is closed (``reason``)."""

    ask_id: str
    reason: str


class CompactionFailed(SessionError):
    """The compaction ended without replacing history (``reason``)."""

    reason: str


class TurnError(UnderstudyError):
    """A turn ended without an answer. ``session_id`` and ``message_id`` name it."""

    session_id: str
    message_id: str


class TurnAborted(TurnError):
    """The turn was interrupted (``reason``: abort, restart, interrupt, close, delete, crash, …)."""

    reason: str


class TurnFailed(TurnError):
    """The turn ended in an error (``name`` and ``message`` as stored on the assistant message)."""

    name: str


class ModelError(UnderstudyError):
    """The model could not answer and retrying as it is will not help."""


class ModelOverflow(ModelError):
    """The request does not fit the model's context window."""


class ModelUnavailable(ModelError):
    """A transient failure. ``retry_after_s`` is the provider's wish, or None."""

    def __init__(
        self, message: str = "", *, retry_after_s: float | None = None, **data: Any
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s, **data)


class ToolError(UnderstudyError):
    """Raise it in a tool to tell the model what went wrong."""


class StoreError(UnderstudyError):
    """The database cannot be opened, read or written. Nothing is half-written."""


class StoreFull(StoreError):
    """No space is left on the device. Nothing was written."""


class StoreBusy(StoreError):
    """Another process held the write lock for longer than we wait."""


class StoreUnreadable(StoreError):
    """The file is not a database of ours, damaged, not writable, or gone since (``path``)."""


class StoreTooNew(StoreError):
    """The database was written by a newer version of understudy; it was left untouched."""


class RuntimeClosed(UnderstudyError):
    """The runtime is closed, or closing."""


class CommandTimeout(UnderstudyError, TimeoutError):
    """No answer came in time (``timeout_s``). The command may still be carried out."""


class ResultNotReady(UnderstudyError, RuntimeError):
    """In an event loop calls return at once: await this result before you use it.

    Events and text are iterated with ``async for`` there: ``for`` would block the loop.
    """


class InternalError(UnderstudyError):
    """A bug in understudy. Please report it with its traceback."""
