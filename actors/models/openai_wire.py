"""What goes over the wire to a chat completions endpoint, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import msgspec

from understudy.actors.models.content import CONTINUE, data_of, text_of
from understudy.actors.models.protocol import (
    AssistantTurn,
    Finish,
    FinishReason,
    ModelEvent,
    ModelRequest,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    Usage,
    UserFile,
    UserText,
    UserTurn,
)
from understudy.actors.surrogates import joined
from understudy.store.records import CacheTokens, Tokens

COST_LIMIT = 1_000_000  # dollars: what costs more is no cost, but a mistake of the server

# --- the answer --------------------------------------------------------------------------------


class _Call:
    def __init__(self, call_id: str) -> None:
        self.call_id = call_id
        self.tool = ""
        self.arguments = ""

    def followed_by(self, call_id: str, name: str, arguments: str) -> bool:
        """True if a delta with the same index starts another call: some number them all 0."""
        if not (self.tool and name):
            return False
        return bool(call_id and call_id != self.call_id) or bool(arguments and self._whole())

    def _whole(self) -> bool:
        try:
            msgspec.json.decode(joined(self.arguments))
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            return False
        return True


class Answer:
    """Puts the chunks of one answer together. Calls come out at the end, when they are whole."""

    def __init__(self, request: ModelRequest) -> None:
        self.reason: str | None = None
        self.silent = True
        self._usage: Usage | None = None
        self._calls: list[_Call] = []
        self._by_index: dict[Any, _Call] = {}
        self._taken = {
            call.call_id
            for turn in request.turns
            if isinstance(turn, AssistantTurn)
            for call in turn.calls
        }

    def take(self, chunk: Any) -> Iterator[ModelEvent]:
        self.silent = False
        if usage := getattr(chunk, "usage", None):
            self._usage = _usage(usage)
        for choice in (chunk.choices or ())[:1]:
            if (delta := choice.delta) is not None:
                reasoning = getattr(delta, "reasoning_content", None)
                if text := _text(reasoning or getattr(delta, "reasoning", None)):
                    yield ReasoningDelta(text)
                for words in (delta.content, getattr(delta, "refusal", None)):
                    if text := _text(words):
                        yield TextDelta(text)
                for piece in delta.tool_calls or ():
                    self._take_call(piece)
            if choice.finish_reason:
                self.reason = _text(choice.finish_reason)

    def _take_call(self, piece: Any) -> None:
        function = piece.function
        call_id = _text(piece.id)
        name = _text(function and function.name)
        arguments = function and function.arguments
        if isinstance(arguments, dict):
            arguments = msgspec.json.encode(arguments).decode()
        arguments = _text(arguments)
        call = self._by_index.get(piece.index)
        if piece.index is None and not (call_id or name) and self._calls:
            call = self._calls[-1]
        if call is None or call.followed_by(call_id, name, arguments):
            call = _Call(call_id)
            self._calls.append(call)
            self._by_index[piece.index] = call
        call.call_id = call.call_id or call_id
        call.tool = call.tool or name
        call.arguments += arguments

    def closing(self) -> Iterator[ModelEvent]:
        reason: FinishReason = _REASONS.get(self.reason or "", "other")
        for call in self._calls:
            arguments = call.arguments
            if not arguments.strip() and reason != "length":
                arguments = "{}"
            yield ToolCall(self._unique(call.call_id), call.tool, arguments)
        if self._usage is not None:
            yield self._usage
        if self._calls and reason in ("stop", "other"):
            reason = "tool-calls"
        elif not self._calls and reason == "tool-calls":
            reason = "other"
        yield Finish(reason)

    def _unique(self, call_id: str) -> str:
        if not call_id or call_id in self._taken:
            call_id = f"call_{uuid4().hex[:24]}"
        self._taken.add(call_id)
        return call_id


_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "tool_calls": "tool-calls",
    "function_call": "tool-calls",
    "length": "length",
    "content_filter": "content-filter",
}


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise TypeError(f"text expected: {value!r}")


def _usage(usage: Any) -> Usage:
    """Our counts are disjoint: theirs hold cached tokens in the input, reasoning in the output."""
    prompt = _count(usage.prompt_tokens)
    completion = _count(usage.completion_tokens)
    cached = _count(
        getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None)
        or getattr(usage, "prompt_cache_hit_tokens", None)
    )
    reasoning = _count(
        getattr(getattr(usage, "completion_tokens_details", None), "reasoning_tokens", None)
    )
    cached, reasoning = min(cached, prompt), min(reasoning, completion)
    tokens = Tokens(
        total=prompt + completion,
        input=prompt - cached,
        output=completion - reasoning,
        reasoning=reasoning,
        cache=CacheTokens(read=cached),
    )
    return Usage(tokens, _cost(getattr(usage, "cost", None)))


def _cost(value: object) -> float:
    """What an answer cost; 0 for what nobody pays: a session adds it up, and JSON has no NaN."""
    if isinstance(value, int | float) and 0 <= value <= COST_LIMIT:
        return float(value)
    return 0.0


def _count(value: object) -> int:
    return max(0, value) if isinstance(value, int) else 0


# --- the request -------------------------------------------------------------------------------


def messages(request: ModelRequest) -> list[dict[str, Any]]:
    built: list[dict[str, Any]] = []
    if request.system:
        built.append({"role": "system", "content": request.system})
    for turn in request.turns:
        if isinstance(turn, UserTurn):
            built.append({"role": "user", "content": _user_content(turn)})
        elif turn.text or turn.calls:
            built.extend(_assistant(turn))
    if built and built[-1]["role"] == "assistant":
        built.append({"role": "user", "content": CONTINUE})
    return built


def _assistant(turn: AssistantTurn) -> Iterator[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.text or None}
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {
                    "name": call.tool,
                    "arguments": msgspec.json.encode(call.input).decode(),
                },
            }
            for call in turn.calls
        ]
    yield message
    for call in turn.calls:
        yield {"role": "tool", "tool_call_id": call.call_id, "content": call.output}


def _user_content(turn: UserTurn) -> str | list[dict[str, Any]]:
    parts = [_user_part(part) for part in turn.content]
    if all(part["type"] == "text" for part in parts):
        return "\n\n".join(part["text"] for part in parts)  # many local servers take only this
    return parts


def _user_part(part: UserText | UserFile) -> dict[str, Any]:
    if isinstance(part, UserText):
        return {"type": "text", "text": part.text}
    data = data_of(part.url)
    url = f"data:{part.mime};base64,{data[1]}" if data else part.url
    if part.mime.startswith("image/") and (data or _remote(url)):
        return {"type": "image_url", "image_url": {"url": url}}
    if part.mime == "application/pdf" and data:
        name = part.filename or "file.pdf"
        return {"type": "file", "file": {"filename": name, "file_data": url}}
    return {"type": "text", "text": text_of(part)}


def _remote(url: str) -> bool:
    return url.startswith(("http://", "https://"))
