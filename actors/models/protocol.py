"""The seam between a turn and whatever answers it.

A model is anything with ``provider_id``, ``model_id``, ``context_limit``, ``output_limit`` and an
asynchronous ``stream(request)`` that yields events and ends with one ``Finish``. It does not retry:
the runtime owns retries. It raises ``ModelUnavailable`` for what may pass by itself (rate limits,
5xx, connection errors, streams that break), ``ModelOverflow`` when the request does not fit, and
``ModelError`` for the rest. Cancelling the task that iterates it must close the connection.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

import msgspec

from understudy.store.records import Tokens


class ToolSpec(msgspec.Struct, frozen=True, gc=False):
    """What the model is told about a tool. ``parameters`` is a JSON Schema object."""

    name: str
    description: str
    parameters: dict[str, Any]


# --- what the model is given -------------------------------------------------------------------


class UserText(msgspec.Struct, frozen=True, tag="text", gc=False):
    text: str


class UserFile(msgspec.Struct, frozen=True, tag="file", gc=False):
    """``url`` is a ``data:`` URL (images, PDFs) or an ``http(s):`` URL."""

    mime: str
    url: str
    filename: str | None = None


class UserTurn(msgspec.Struct, frozen=True, tag="user", gc=False):
    content: tuple[UserText | UserFile, ...]


class ToolUse(msgspec.Struct, frozen=True, gc=False):
    """A call the model made and its one result."""

    call_id: str
    tool: str
    input: dict[str, Any]
    output: str
    is_error: bool = False


class AssistantTurn(msgspec.Struct, frozen=True, tag="assistant", gc=False):
    """Text first, then the calls with their results, in call order."""

    text: str = ""
    calls: tuple[ToolUse, ...] = ()


Turn: TypeAlias = UserTurn | AssistantTurn


class ModelRequest(msgspec.Struct, frozen=True, gc=False):
    """One model call. ``session_id`` and ``purpose`` are for logs, scripts and routing.

    What is in it is shown again with the next one: look at it, and change copies.
    """

    session_id: str
    system: str
    turns: tuple[Turn, ...]
    tools: tuple[ToolSpec, ...] = ()
    max_output_tokens: int | None = None
    purpose: Literal["step", "summary"] = "step"


# --- what the model yields ---------------------------------------------------------------------


class TextDelta(msgspec.Struct, frozen=True, gc=False):
    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, gc=False):
    text: str


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A complete call. ``arguments`` is the JSON text as the model wrote it, valid or not."""

    call_id: str
    tool: str
    arguments: str


class Usage(msgspec.Struct, frozen=True, gc=False):
    """May be yielded more than once; the last one counts. ``cost`` is in dollars."""

    tokens: Tokens
    cost: Annotated[float, msgspec.Meta(ge=0.0, le=1e9)] = 0.0


FinishReason: TypeAlias = Literal["stop", "tool-calls", "length", "content-filter", "other"]


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The end of the stream. ``length`` means the output limit cut the answer."""

    reason: FinishReason


ModelEvent: TypeAlias = TextDelta | ReasoningDelta | ToolCall | Usage | Finish


@runtime_checkable
class Model(Protocol):
    """What a runtime needs of a model. Limits are in tokens."""

    @property
    def provider_id(self) -> str: ...

    @property
    def model_id(self) -> str: ...

    @property
    def context_limit(self) -> int: ...

    @property
    def output_limit(self) -> int: ...

    def stream(self, request: ModelRequest) -> AsyncIterator[ModelEvent]: ...
