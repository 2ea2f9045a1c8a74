"""What goes over the wire to Anthropic's messages endpoint, and what comes back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from understudy.actors.models.content import CONTINUE, data_of, text_of
from understudy.actors.models.protocol import (
    AssistantTurn,
    Finish,
    FinishReason,
    ModelEvent,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    Turn,
    Usage,
    UserFile,
    UserTurn,
)
from understudy.store.records import CacheTokens, Tokens

Block: TypeAlias = dict[str, Any]
Thoughts: TypeAlias = Mapping[str, list[Block]]  # by the id of the step's first call

_IMAGES = {"image/jpeg", "image/png", "image/gif", "image/webp"}


# --- the answer --------------------------------------------------------------------------------


class Answer:
    """Puts the events of one answer together. Calls come out at the end, when they are whole."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.silent = True
        self._blocks: dict[int, dict[str, Any]] = {}
        self._counts: dict[str, int] = {}

    @property
    def thoughts(self) -> list[dict[str, Any]]:
        return [b for b in self._blocks.values() if b["type"] in ("thinking", "redacted_thinking")]

    @property
    def first_call_id(self) -> str | None:
        return next((call["id"] for call in self._calls()), None)

    def take(self, event: Any) -> Iterator[ModelEvent]:
        self.silent = False
        if event.type == "message_start":
            self._count(event.message.usage)
            yield self._usage()
        elif event.type == "content_block_start":
            block = event.content_block.to_dict()
            self._blocks[event.index] = block | {"json": ""}
            yield from _said(block.get("text"), block.get("thinking"))
        elif event.type == "content_block_delta":
            yield from self._take_delta(self._blocks[event.index], event.delta)
        elif event.type == "message_delta":
            self._count(event.usage)
            self.reason = event.delta.stop_reason or self.reason

    def _take_delta(self, block: dict[str, Any], delta: Any) -> Iterator[ModelEvent]:
        if delta.type == "text_delta":
            yield from _said(delta.text, None)
        elif delta.type == "thinking_delta":
            block["thinking"] += delta.thinking
            yield from _said(None, delta.thinking)
        elif delta.type == "signature_delta":
            block["signature"] = delta.signature
        elif delta.type == "input_json_delta":
            block["json"] += delta.partial_json

    def closing(self) -> Iterator[ModelEvent]:
        reason = _REASONS.get(self.reason or "", "other")
        for call in self._calls():
            arguments = call["json"]
            if not arguments.strip() and reason != "length":
                arguments = msgspec.json.encode(call.get("input") or {}).decode()
            yield ToolCall(call["id"], call["name"], arguments)
        yield self._usage()
        yield Finish(reason)

    def _calls(self) -> list[dict[str, Any]]:
        return [block for block in self._blocks.values() if block["type"] == "tool_use"]

    def _count(self, usage: Any) -> None:
        # Counts are cumulative; a later null means no news.
        for name in _COUNTS:
            if isinstance(count := getattr(usage, name, None), int):
                self._counts[name] = max(0, count)
        details = getattr(usage, "output_tokens_details", None)
        if isinstance(count := getattr(details, "thinking_tokens", None), int):
            self._counts["thinking"] = max(0, count)

    def _usage(self) -> Usage:
        """Our counts are disjoint, as theirs are, but for the thinking within the output."""
        fresh, output, read, write = (self._counts.get(name, 0) for name in _COUNTS)
        reasoning = min(self._counts.get("thinking", 0), output)
        tokens = Tokens(
            total=fresh + output + read + write,
            input=fresh,
            output=output - reasoning,
            reasoning=reasoning,
            cache=CacheTokens(read=read, write=write),
        )
        return Usage(tokens)


def _said(text: str | None, thinking: str | None) -> Iterator[ModelEvent]:
    for words in (text, thinking):
        if words is not None and not isinstance(words, str):
            raise TypeError(f"text expected: {words!r}")
    if text:
        yield TextDelta(text)
    if thinking:
        yield ReasoningDelta(thinking)


_COUNTS = (
    "input_tokens",
    "output_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
)
_REASONS: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool-calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content-filter",
}


# --- the request -------------------------------------------------------------------------------


def conversation(turns: Sequence[Turn], thoughts: Thoughts | None) -> tuple[list[Block], bool]:
    """The messages: roles alternate, and results directly follow their calls.

    Also whether ``thoughts`` has those of every step of the running turn.
    """
    messages: list[Block] = []
    complete = True
    used: set[str] = set()

    def add(role: str, blocks: list[Block]) -> None:
        if role == "assistant" and (not messages or messages[-1]["role"] == "assistant"):
            add("user", [_text(CONTINUE)])
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += blocks
        elif blocks:
            messages.append({"role": role, "content": blocks})

    results = False
    for turn in turns:
        if isinstance(turn, UserTurn):
            add("user", list(_user_blocks(turn)))
            # A prompt that shares its message with results does not end the turn for the API.
            complete = complete or not results
            continue
        results = bool(turn.calls)
        ids = [_call_id(call.call_id, used) for call in turn.calls]
        known = thoughts.get(turn.calls[0].call_id) if thoughts and turn.calls else None
        complete = complete and (known is not None or not turn.calls)
        if blocks := [*_stripped(known or ()), *_assistant_blocks(turn, ids)]:
            add("assistant", blocks)
        add("user", [_result(turn, number, call_id) for number, call_id in enumerate(ids)])
    if not messages or messages[-1]["role"] == "assistant":
        add("user", [_text(CONTINUE)])
    return messages, complete


def _assistant_blocks(turn: AssistantTurn, ids: list[str]) -> Iterator[Block]:
    if turn.text.strip():
        yield _text(turn.text)
    for call, call_id in zip(turn.calls, ids, strict=True):
        yield {"type": "tool_use", "id": call_id, "name": call.tool, "input": call.input}


def _result(turn: AssistantTurn, number: int, call_id: str) -> Block:
    call = turn.calls[number]
    block: Block = {"type": "tool_result", "tool_use_id": call_id, "content": call.output}
    return block | {"is_error": True} if call.is_error else block


def _user_blocks(turn: UserTurn) -> Iterator[Block]:
    for part in turn.content:
        if isinstance(part, UserFile):
            yield _file(part)
        elif part.text.strip():  # blank blocks are refused
            yield _text(part.text)


def _file(file: UserFile) -> Block:
    kind = "image" if file.mime in _IMAGES else "document"
    if kind == "image" or file.mime == "application/pdf":
        if data := data_of(file.url):
            source = {"type": "base64", "media_type": file.mime, "data": data[1]}
            return {"type": kind, "source": source}
        if file.url.startswith(("http://", "https://")):
            return {"type": kind, "source": {"type": "url", "url": file.url}}
    return _text(text_of(file))


def _call_id(call_id: str, used: set[str]) -> str:
    """The id in the characters that are allowed, and unlike every other in the conversation."""
    wanted = unique = re.sub(r"[^a-zA-Z0-9_-]", "_", call_id) or "call"
    while unique in used:
        unique = f"{wanted}_{len(used)}"
    used.add(unique)
    return unique


def _stripped(thoughts: Sequence[Block]) -> Iterator[Block]:
    for block in thoughts:
        yield {name: value for name, value in block.items() if name != "json"}


def _text(text: str) -> Block:
    return {"type": "text", "text": text}
