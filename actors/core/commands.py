"""Commands: everything that can happen to a session."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from understudy.actors.core.state import Entry
from understudy.store.records import (
    AnyPart,
    Ask,
    AssistantMessage,
    CompactionPart,
    Failure,
    FilePart,
    ModelRef,
    PermissionRule,
    Prompt,
    ReasoningPart,
    TextPart,
    Tokens,
    UserMessage,
    WhenBusy,
)

Reason: TypeAlias = Literal[
    "abort", "interrupt", "restart", "crash", "lost", "close", "timeout", "error", "rejected"
]


# --- from callers ------------------------------------------------------------------------------


class SubmitPrompt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Accept a prompt. Parts come without ids unless the caller chose them.

    ``known`` is the inbox row that already has this message id; ``foreign`` says that the id is
    taken by something that is not a prompt. ``reverted`` are the messages a pending revert hides.
    """

    parts: tuple[TextPart | FilePart, ...]
    digest: str
    message_id: str | None = None
    when_busy: WhenBusy = "queue"
    system: str | None = None
    tools: dict[str, bool] | None = None
    agent: str | None = None
    model: ModelRef | None = None
    quiet: bool = False
    known: Prompt | None = None
    foreign: bool = False
    reverted: tuple[str, ...] = ()


class Abort(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """End the running turn and compaction; with ``queued`` also what waits.

    ``message_id`` names one prompt instead, running or queued.
    """

    message_id: str | None = None
    queued: bool = False
    reason: Reason = "abort"


class RequestCompaction(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Ask for a compaction; merges into an active one.

    ``model`` writes the summary, instead of the session's; of one that is under way it stays.
    ``reverted`` are the messages a pending revert hides: they are removed first.
    """

    auto: bool = False
    resume: bool = False
    model: ModelRef | None = None
    reverted: tuple[str, ...] = ()


class UpdateSession(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Change what is given. ``archived`` is a time in milliseconds, or None to unarchive."""

    title: str | msgspec.UnsetType = msgspec.UNSET
    directory: str | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    archived: int | msgspec.UnsetType | None = msgspec.UNSET
    model: ModelRef | msgspec.UnsetType | None = msgspec.UNSET
    permission: tuple[PermissionRule, ...] | msgspec.UnsetType = msgspec.UNSET


class RevertTo(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Hide messages from ``message_id`` on; ``found`` says whether it exists."""

    message_id: str
    found: bool = True


class EditTranscript(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Take a message out, or one of its parts, or give a text part another ``text``.

    ``found`` says whether the message exists; ``parts`` are its parts. ``hidden`` are the messages
    that a revert hides, if it is the first of them.
    """

    message_id: str
    part_id: str | None = None
    text: str | None = None
    found: bool = False
    parts: tuple[AnyPart, ...] = ()
    hidden: tuple[str, ...] = ()


class Unrevert(msgspec.Struct, frozen=True, gc=False):
    """Show again what a revert hides, as long as no prompt has removed it."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Answer a permission request or a question. ``known`` is its row, when it is closed."""

    ask_id: str
    reply: Literal["once", "always", "reject", "answered"]
    feedback: str | None = None
    answers: tuple[tuple[str, ...], ...] = ()
    known: Ask | None = None


# --- from the runtime --------------------------------------------------------------------------


class Loaded(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the store says is unfinished in a session, each in order of creation.

    ``later`` are the ids of active markers that a finished assistant message follows;
    ``summarised`` maps active markers to a finished summary they already have, and ``tails`` those
    markers to the ``(head_end_id, tail_start_id)`` such a summary leaves. ``lost`` are prompts
    without a message that can be read. ``steps`` counts the finished steps of turns, by number.
    """

    prompts: tuple[Entry, ...] = ()
    messages: tuple[AssistantMessage, ...] = ()
    parts: tuple[AnyPart, ...] = ()
    markers: tuple[tuple[CompactionPart, UserMessage], ...] = ()
    asks: tuple[Ask, ...] = ()
    later: frozenset[str] = frozenset()
    summarised: dict[str, str] = {}
    tails: dict[str, tuple[str | None, str | None]] = {}
    lost: tuple[Prompt, ...] = ()
    steps: dict[int, int] = {}


class Recover(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Make the session whole again: nothing in ``loaded`` has a live executor.

    ``set_aside`` is a prompt that keeps crashing its actor; it is settled as failed.
    """

    loaded: Loaded
    reason: Reason = "restart"
    epoch: int = 0
    restarted: bool = False
    set_aside: str | None = None


# --- from executors ----------------------------------------------------------------------------

StreamedPart: TypeAlias = TextPart | ReasoningPart


class StepProgress(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Open text of a streaming step, to be flushed to its rows."""

    message_id: str
    parts: tuple[StreamedPart, ...]


class StepRetrying(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The model call failed in passing and is tried again at ``next_ms``."""

    message_id: str
    attempt: int
    failure: Failure
    next_ms: int


class CallDraft(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A tool call as the model made it; ``problem`` says why it cannot run."""

    part_id: str
    call_id: str
    tool: str
    input: dict[str, Any]
    signature: str
    problem: str | None = None
    permission: str | None = None
    patterns: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    idempotent: bool = False


class StepFinished(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The model's stream ended. For a summary: where the tail starts, and the sizes in tokens."""

    message_id: str
    parts: tuple[StreamedPart, ...]
    calls: tuple[CallDraft, ...]
    finish: str
    tokens: Tokens
    cost: float = 0.0
    head_end_id: str | None = None
    tail_start_id: str | None = None
    before: int = 0
    after: int = 0


class StepFailed(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The model's stream ended badly, its retries used up.

    ``transient`` says that a new step may work; ``overflow`` that the request was too long.
    """

    message_id: str
    parts: tuple[StreamedPart, ...]
    failure: Failure
    transient: bool = False
    overflow: bool = False


class ToolProgress(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    part_id: str
    title: str | None
    metadata: dict[str, Any]


class ToolFinished(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A tool call's outcome: ``output``, or ``error`` (``interrupted`` if cut short)."""

    part_id: str
    output: str | None = None
    title: str = ""
    metadata: dict[str, Any] = {}
    error: str | None = None
    interrupted: bool = False


class OpenAsk(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A running tool wants a person's permission or answers."""

    part_id: str
    ask: Ask


class ExecutionLost(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The watchdog found no live executor for this open step."""

    message_id: str


Command: TypeAlias = (
    SubmitPrompt
    | Abort
    | RequestCompaction
    | UpdateSession
    | RevertTo
    | EditTranscript
    | Unrevert
    | Reply
    | Recover
    | StepProgress
    | StepRetrying
    | StepFinished
    | StepFailed
    | ToolProgress
    | ToolFinished
    | OpenAsk
    | ExecutionLost
)
