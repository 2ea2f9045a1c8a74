"""What a store keeps, as frozen structs: sessions, messages, parts, prompts and asks.

Attribute names are Python's; encoded with ``msgspec.json`` they are OpenCode's wire shapes, the
same in the table, the journal and the network. Times are wall-clock milliseconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import msgspec

_WIRE_NAMES = {
    "session_id": "sessionID",
    "message_id": "messageID",
    "parent_id": "parentID",
    "part_id": "partID",
    "call_id": "callID",
    "ask_id": "askID",
    "provider_id": "providerID",
    "model_id": "modelID",
    "project_id": "projectID",
    "marker_id": "markerID",
    "request_id": "requestID",
    "tail_start_id": "tailStartID",
    "summary_id": "summaryID",
    "head_end_id": "headEndID",
    "status_code": "statusCode",
    "is_retryable": "isRetryable",
}


class Record(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename=_WIRE_NAMES, gc=False
):
    """The base of everything stored. Frozen; equal by value; compact on the wire."""


# --- shared pieces -----------------------------------------------------------------------------


class CacheTokens(Record, frozen=True, kw_only=True, omit_defaults=False):
    read: int = 0
    write: int = 0


class Tokens(Record, frozen=True, kw_only=True, omit_defaults=False):
    """Token counts of a message or a session. ``total`` is what the model saw and wrote."""

    total: int = 0
    input: int = 0
    output: int = 0
    reasoning: int = 0
    cache: CacheTokens = CacheTokens()

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            total=self.total + other.total,
            input=self.input + other.input,
            output=self.output + other.output,
            reasoning=self.reasoning + other.reasoning,
            cache=CacheTokens(
                read=self.cache.read + other.cache.read,
                write=self.cache.write + other.cache.write,
            ),
        )


class Span(Record, frozen=True, kw_only=True):
    """When something started and, once it has, ended."""

    start: int
    end: int | None = None


class Failure(Record, frozen=True, kw_only=True):
    """Why something ended badly: a stable ``name`` and ``data`` with at least a ``message``."""

    name: str
    data: dict[str, Any]

    @property
    def message(self) -> str:
        return str(self.data.get("message", self.name))


class ModelRef(Record, frozen=True, kw_only=True):
    provider_id: str
    model_id: str


# --- session -----------------------------------------------------------------------------------


class SessionTime(Record, frozen=True, kw_only=True):
    created: int
    updated: int
    archived: int | None = None


class Revert(Record, frozen=True, kw_only=True):
    """Messages from ``message_id`` on are hidden until the next prompt removes them."""

    message_id: str


class PermissionRule(Record, frozen=True, kw_only=True):
    """``action`` for a permission whose pattern matches; the last matching rule wins."""

    permission: str
    pattern: str
    action: Literal["allow", "ask", "deny"]


class Session(Record, frozen=True, kw_only=True):
    """A durable conversation."""

    id: str
    title: str
    time: SessionTime
    directory: str = ""
    parent_id: str | None = None
    agent: str | None = None
    model: ModelRef | None = None
    internal: bool = False
    metadata: dict[str, Any] = {}
    permission: tuple[PermissionRule, ...] = ()
    tokens: Tokens = Tokens()
    cost: float = 0.0
    revert: Revert | None = None
    compaction_failures: int = 0


# --- messages ----------------------------------------------------------------------------------


class MessageTime(Record, frozen=True, kw_only=True):
    created: int
    completed: int | None = None


class UserMessage(Record, frozen=True, kw_only=True, tag_field="role", tag="user"):
    """A prompt's message, or a compaction's marker. ``turn`` is set when its turn starts.

    ``withdrawn`` marks a prompt that was aborted before it started: no model sees it.

    Transcript order is ``(turn, order of creation)``; messages with no turn yet come last.
    """

    id: str
    session_id: str
    time: MessageTime
    turn: int | None = None
    agent: str | None = None
    model: ModelRef | None = None
    synthetic: bool = False
    withdrawn: bool = False

    @property
    def role(self) -> Literal["user"]:
        return "user"


class AssistantMessage(Record, frozen=True, kw_only=True, tag_field="role", tag="assistant"):
    """One step's answer. Open until ``time.completed`` is set.

    ``finish`` is set when the model's stream has ended and tools may still be running.
    """

    id: str
    session_id: str
    parent_id: str
    turn: int
    time: MessageTime
    tokens: Tokens
    agent: str
    mode: str
    provider_id: str
    model_id: str
    cost: float = 0.0
    finish: str | None = None
    error: Failure | None = None
    summary: bool = False

    @property
    def role(self) -> Literal["assistant"]:
        return "assistant"


Message: TypeAlias = UserMessage | AssistantMessage


# --- parts -------------------------------------------------------------------------------------


class Part(Record, frozen=True, kw_only=True, tag_field="type"):
    id: str
    session_id: str
    message_id: str

    @property
    def type(self) -> str:
        """Its kind, as on the wire: ``text``, ``tool``, ``compaction`` and so on."""
        return str(self.__struct_config__.tag)


class TextPart(Part, frozen=True, kw_only=True, tag="text", omit_defaults=False):
    text: str = ""
    time: Span | msgspec.UnsetType = msgspec.UNSET
    synthetic: bool | msgspec.UnsetType = msgspec.UNSET


class ReasoningPart(Part, frozen=True, kw_only=True, tag="reasoning", omit_defaults=False):
    text: str = ""
    time: Span | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class FilePart(Part, frozen=True, kw_only=True, tag="file"):
    """A file given with a prompt. ``url`` may be a ``data:`` or ``file:`` URL."""

    mime: str
    url: str
    filename: str | None = None


class _ToolState(Record, frozen=True, kw_only=True, tag_field="status"):
    @property
    def status(self) -> str:
        """As on the wire: ``pending``, ``running``, ``completed`` or ``error``."""
        return str(self.__struct_config__.tag)


class ToolPending(_ToolState, frozen=True, kw_only=True, tag="pending", omit_defaults=False):
    input: dict[str, Any] = {}
    raw: str = ""
    idempotent: bool = False


class ToolRunning(_ToolState, frozen=True, kw_only=True, tag="running"):
    """``idempotent`` calls may be run again after a restart; no other call ever is."""

    input: dict[str, Any]
    time: Span
    metadata: dict[str, Any] = {}
    title: str | None = None
    idempotent: bool = False


class ToolCompleted(_ToolState, frozen=True, kw_only=True, tag="completed"):
    input: dict[str, Any]
    output: str
    title: str
    metadata: dict[str, Any]
    time: Span
    compacted: int | None = None


class ToolFailed(_ToolState, frozen=True, kw_only=True, tag="error"):
    """``interrupted`` marks a call whose own outcome is unknown: abort, restart, crash, timeout."""

    input: dict[str, Any]
    error: str
    time: Span
    metadata: dict[str, Any] = {}
    interrupted: bool = False


ToolState: TypeAlias = ToolPending | ToolRunning | ToolCompleted | ToolFailed


class ToolPart(Part, frozen=True, kw_only=True, tag="tool"):
    tool: str
    call_id: str
    state: ToolState


class StepStartPart(Part, frozen=True, kw_only=True, tag="step-start"):
    pass


class StepFinishPart(Part, frozen=True, kw_only=True, tag="step-finish"):
    reason: str
    tokens: Tokens
    cost: float = 0.0


class CompactionPart(Part, frozen=True, kw_only=True, tag="compaction", omit_defaults=False):
    """The marker that owns a compaction. Active while ``state`` is requested or summarising."""

    auto: bool = False
    resume: bool = False
    state: Literal["requested", "summarising", "committed", "failed", "stale"] = "requested"
    overflow: bool = False
    attempts: int = 0
    summary_id: str | None = None
    head_end_id: str | None = None
    tail_start_id: str | None = None
    reason: str | None = None

    @property
    def active(self) -> bool:
        return self.state in ("requested", "summarising")


class SubtaskPart(Part, frozen=True, kw_only=True, tag="subtask"):
    prompt: str
    description: str = ""
    agent: str = ""


class PatchPart(Part, frozen=True, kw_only=True, tag="patch"):
    hash: str
    files: tuple[str, ...] = ()


class RetryPart(Part, frozen=True, kw_only=True, tag="retry"):
    attempt: int
    error: Failure
    time: MessageTime


AnyPart: TypeAlias = (
    TextPart
    | ReasoningPart
    | FilePart
    | ToolPart
    | StepStartPart
    | StepFinishPart
    | CompactionPart
    | SubtaskPart
    | PatchPart
    | RetryPart
)
Pair: TypeAlias = tuple[Message, tuple[AnyPart, ...]]
"""A message with its parts, in order."""


def summary_text(message: Message | None, parts: Iterable[AnyPart]) -> str:
    """What a finished summary says. Empty for all else: it stands for no history."""
    if (
        not isinstance(message, AssistantMessage)
        or not message.summary
        or message.error is not None
        or message.time.completed is None
    ):
        return ""
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    return text if text.strip() else ""


# --- prompts and asks --------------------------------------------------------------------------

Outcome: TypeAlias = Literal["answered", "interrupted", "failed"]
WhenBusy: TypeAlias = Literal["queue", "steer", "interrupt", "reject"]


class Prompt(Record, frozen=True, kw_only=True):
    """An accepted prompt: a row of the inbox, named by its user message.

    ``turn`` is the turn's number, set when it starts; a steering prompt takes its host's number.
    A ``quiet`` prompt was made inside a hook and fires no hooks.
    ``outcome`` is set exactly once.
    """

    message_id: str
    session_id: str
    digest: str
    accepted: int
    when_busy: WhenBusy = "queue"
    attempts: int = 0
    turn: int | None = None
    outcome: Outcome | None = None
    reason: str | None = None
    reply_id: str | None = None
    system: str | None = None
    tools: dict[str, bool] | None = None
    quiet: bool = False


class Question(Record, frozen=True, kw_only=True):
    text: str
    options: tuple[str, ...] = ()
    multiple: bool = False


class Ask(Record, frozen=True, kw_only=True):
    """A durable question to a person: a permission request, or a question of a tool.

    ``replied`` is set exactly once: ``once``, ``always``, ``reject``, ``answered``, or
    ``closed`` when what asked is gone.
    """

    id: str
    session_id: str
    kind: Literal["permission", "question"]
    created: int
    message_id: str | None = None
    call_id: str | None = None
    permission: str = ""
    patterns: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}
    questions: tuple[Question, ...] = ()
    replied: str | None = None
    feedback: str | None = None
    answers: tuple[tuple[str, ...], ...] = ()


class Status(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What a session is doing. ``retry`` says when the next attempt starts."""

    type: Literal["idle", "busy", "retry"]
    attempt: int | None = None
    message: str | None = None
    next: int | None = None


IDLE = Status(type="idle")
BUSY = Status(type="busy")
