"""What the model sees: the only place that decides it.

A history is a list of ``(message, parts)`` in transcript order. Every tool call in a request has
exactly one result, whatever happened to the call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import msgspec

from understudy.actors.models.protocol import (
    AssistantTurn,
    ToolUse,
    Turn,
    UserFile,
    UserText,
    UserTurn,
)
from understudy.store.records import (
    AnyPart,
    AssistantMessage,
    CompactionPart,
    FilePart,
    Message,
    Pair,
    Revert,
    SubtaskPart,
    TextPart,
    ToolCompleted,
    ToolFailed,
    ToolPart,
    UserMessage,
    summary_text,
)

History: TypeAlias = Sequence[Pair]

INTERRUPTED: Final = "[Tool execution was interrupted]"
CLEARED: Final = "[Old tool result content cleared]"
SUMMARY_HEADING: Final = "[Summary of the conversation so far]\n\n"
CUT_SHORT: Final = frozenset({"MessageAbortedError", "InterruptedError", "TurnTimeoutError"})
_NO_NAME: Final = re.compile(r"[^a-zA-Z0-9_-]")
_ROOM: Final = 400  # what a turn takes beside its text
_PRUNE_KEEPS: Final = 10  # latest answers whose tool outputs are never pruned

SUMMARY_SYSTEM: Final = (
    "You summarise a conversation between a user and an assistant so that the assistant can go on "
    "without it. State what was asked, what was done and found, decisions and their reasons, files "
    "and names that matter, what is unfinished, and what comes next. Be specific and brief. Answer "
    "with the summary only."
)


def tokens_of(text: str) -> int:
    """An estimate for models that do not say: four characters a token."""
    return len(text) // 4 + 1


def tokens_of_turns(turns: Sequence[Turn]) -> int:
    total = 0
    for turn in turns:
        total += 4
        if isinstance(turn, UserTurn):
            total += sum(
                tokens_of(item.text) if isinstance(item, UserText) else 1_000
                for item in turn.content
            )
        else:
            total += tokens_of(turn.text)
            for call in turn.calls:
                total += tokens_of(str(call.input)) + tokens_of(call.output) + 8
    return total


# --- what is visible ---------------------------------------------------------------------------


class Visible(msgspec.Struct, frozen=True):
    """A history cut down to what may be shown: the last summary, then messages verbatim."""

    summary: str | None
    messages: tuple[Pair, ...]


def visible(
    history: History, *, revert: Revert | None = None, before: str | None = None
) -> Visible:
    """Apply the revert and the last committed compaction.

    ``before`` ends the history at that message: the open answer.
    """
    shown = []
    for message, parts in history:
        if message.id == before or (revert is not None and message.id == revert.message_id):
            break
        withdrawn = isinstance(message, UserMessage) and message.withdrawn
        if message.turn is not None and not withdrawn:
            shown.append((message, parts))
    boundary = _last_compaction(shown)
    if boundary is None:
        return Visible(None, tuple(pair for pair in shown if not _is_machinery(*pair)))
    marker, text, place = boundary
    tail = _tail_start(shown, marker, place)
    return Visible(text, tuple(pair for pair in shown[tail:] if not _is_machinery(*pair)))


def _last_compaction(
    shown: Sequence[Pair],
) -> tuple[CompactionPart, str, int] | None:
    """The newest committed marker whose summary is there, its text, and the marker's place."""
    texts = {message.id: summary_text(message, parts) for message, parts in shown}
    for place in range(len(shown) - 1, -1, -1):
        for part in shown[place][1]:
            if isinstance(part, CompactionPart) and part.state == "committed":
                text = texts.get(part.summary_id or "", "")
                if text:
                    return part, text, place
    return None


def _tail_start(shown: Sequence[Pair], marker: CompactionPart, place: int) -> int:
    """Where the verbatim tail begins. A boundary that is gone is absent, not "drop everything".

    It may lie after the marker: steps can finish between a request and its summary.
    """
    places = {message.id: index for index, (message, _) in enumerate(shown)}
    if (start := places.get(marker.tail_start_id or "")) is not None:
        return start
    if (end := places.get(marker.head_end_id or "")) is not None:
        return end + 1
    return place


def _is_machinery(message: Message, parts: tuple[AnyPart, ...]) -> bool:
    if isinstance(message, AssistantMessage):
        return message.summary
    return any(isinstance(part, CompactionPart) for part in parts)


# --- as turns of a request ---------------------------------------------------------------------


def conversation(
    history: History,
    *,
    revert: Revert | None = None,
    before: str | None = None,
    prune: bool = False,
    tool_output: int = 50_000,
) -> Conversation:
    """What a history shows of itself, up to the answer ``before``."""
    view = visible(history, revert=revert, before=before)
    return Conversation(before, tool_output=tool_output).show(view, prune=prune)


class Conversation:
    """What a model is shown before it gives the answer ``before``; it grows by what is said then.

    ``tokens`` is an estimate of what the turns take, ``size`` of the room that they take here, in
    characters.
    """

    __slots__ = ("_taken", "_tool_output", "before", "size", "tokens", "turns")

    def __init__(self, before: str | None = None, *, tool_output: int = 50_000) -> None:
        self.before = before
        self.turns: list[Turn] = []
        self.tokens = self.size = 0
        self._taken: dict[str, int] = {}
        self._tool_output = tool_output

    def show(self, view: Visible, *, prune: bool = False) -> Conversation:
        if view.summary is not None:
            self._append(UserTurn((UserText(SUMMARY_HEADING + view.summary),)))
        recent = len(view.messages) - _PRUNE_KEEPS if prune else 0
        for place, pair in enumerate(view.messages):
            self.add(*pair, old=place < recent)
        return self

    def add(self, message: Message, parts: tuple[AnyPart, ...], *, old: bool = False) -> None:
        if isinstance(message, UserMessage):
            self._append(_user_turn(parts))
        else:
            uses = self._tool_uses(parts, old=old)
            self._append(_assistant_turn(message, parts, uses))

    def _append(self, turn: Turn | None) -> None:
        if turn is not None:
            tokens = tokens_of_turns((turn,))
            self.turns.append(turn)
            self.tokens += tokens
            self.size += 4 * tokens + _ROOM + (_files(turn) if isinstance(turn, UserTurn) else 0)

    def _tool_uses(self, parts: tuple[AnyPart, ...], *, old: bool) -> tuple[ToolUse, ...]:
        return tuple(
            _tool_use(part, self._taken, old=old, tool_output=self._tool_output)
            for part in parts
            if isinstance(part, ToolPart)
        )


def _files(turn: UserTurn) -> int:
    """The characters of a turn's files, whose data may be in their addresses."""
    return sum(len(item.url) for item in turn.content if isinstance(item, UserFile))


def _user_turn(parts: tuple[AnyPart, ...]) -> UserTurn | None:
    content: list[UserText | UserFile] = []
    for part in parts:
        if isinstance(part, TextPart) and part.text:
            content.append(UserText(part.text))
        elif isinstance(part, FilePart):
            content.append(UserFile(part.mime, part.url, part.filename))
        elif isinstance(part, SubtaskPart):
            content.append(UserText(part.prompt))
    return UserTurn(tuple(content)) if content else None


def _assistant_turn(
    message: AssistantMessage, parts: tuple[AnyPart, ...], calls: tuple[ToolUse, ...]
) -> AssistantTurn | None:
    # What a broken stream said was never finished and is asked for again; what a person
    # saw before an abort or a restart is part of the conversation.
    told = message.error is None or message.error.name in CUT_SHORT
    text = "".join(part.text for part in parts if isinstance(part, TextPart)) if told else ""
    return AssistantTurn(text, calls) if text.strip() or calls else None


def _tool_use(part: ToolPart, taken: dict[str, int], *, old: bool, tool_output: int) -> ToolUse:
    call_id = distinct_id(part.call_id, taken)
    state, tool = part.state, _name(part.tool)
    given = _copied(state.input)
    if isinstance(state, ToolCompleted):
        output = CLEARED if old or state.compacted is not None else _cut(state.output, tool_output)
        return ToolUse(call_id, tool, given, output)
    if isinstance(state, ToolFailed) and not state.interrupted:
        return ToolUse(call_id, tool, given, _cut(state.error, tool_output), True)
    if isinstance(state, ToolFailed) and "timed out" in state.error:
        return ToolUse(call_id, tool, given, state.error, True)
    return ToolUse(call_id, tool, given, INTERRUPTED, True)


def _copied(given: dict[str, Any]) -> dict[str, Any]:
    """A call's input for the model alone: who reads the part in a reply may change what it has."""
    copy: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(given))
    return copy


def _name(tool: str) -> str:
    """The name as a provider takes it back: it refuses a history with any other, for ever."""
    return _NO_NAME.sub("_", tool)[:64] or "unknown"


def distinct_id(wanted: str, taken: dict[str, int]) -> str:
    """``wanted``, or the first of ``wanted-2``, ``wanted-3``, … that is not in ``taken`` yet."""
    count = taken.get(wanted, 0) + 1
    name = wanted if count == 1 else f"{wanted}-{count}"
    while count > 1 and name in taken:
        count += 1
        name = f"{wanted}-{count}"
    taken[wanted] = count
    taken.setdefault(name, 1)
    return name


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters cut …]\n{text[-half:]}"


# --- compaction --------------------------------------------------------------------------------


class Plan(msgspec.Struct, frozen=True):
    """What a compaction summarises and what it keeps. ``chunks`` fit one summariser call each."""

    chunks: tuple[str, ...]
    head_end_id: str | None
    tail_start_id: str | None
    before: int
    tail: int


def plan_compaction(
    history: History, *, tail: int, chunk: int, revert: Revert | None = None
) -> Plan | None:
    """Divide what a marker finds into a head to summarise and a tail to keep.

    It finds all that is visible when it runs, also what finished after it was requested. ``tail``
    and ``chunk`` are in tokens. None if there is nothing to summarise. A message holds its calls
    with their results, so every boundary between messages is safe.
    """
    view = visible(history, revert=revert)
    if not view.messages and view.summary is None:
        return None
    sizes = [Conversation().show(Visible(None, (pair,))).tokens for pair in view.messages]
    before = sum(sizes) + (tokens_of(view.summary) if view.summary else 0)
    budget = min(tail, before // 4)
    start, kept_size = len(sizes), 0
    while start > 0 and kept_size + sizes[start - 1] <= budget:
        start -= 1
        kept_size += sizes[start]
    head, kept = view.messages[:start], view.messages[start:]
    if not head:
        return None
    return Plan(
        chunks=_chunks(view.summary, head, chunk),
        head_end_id=head[-1][0].id,
        tail_start_id=kept[0][0].id if kept else None,
        before=before,
        tail=kept_size,
    )


def boundary(
    history: History, marker_id: str, *, tail: int, revert: Revert | None = None
) -> tuple[str | None, str | None]:
    """The last message before a marker that its summary covers, and the first that it does not.

    For a summary that is there while its bookkeeping is not.
    """
    ids = [message.id for message, _ in history]
    end = ids.index(marker_id) if marker_id in ids else len(ids)
    plan = plan_compaction(history[:end], tail=tail, chunk=tail + 1, revert=revert)
    return (plan.head_end_id, plan.tail_start_id) if plan is not None else (None, None)


def _chunks(
    summary: str | None,
    head: Sequence[Pair],
    chunk: int,
) -> tuple[str, ...]:
    """The head as text, cut at message boundaries; one message never exceeds a chunk."""
    limit = chunk * 4
    texts = [f"Summary of what came before:\n{summary}\n"] if summary else []
    texts += [
        _cut(_as_text(turn), limit // 2)
        for turn in Conversation(tool_output=4_000).show(Visible(None, tuple(head))).turns
    ]
    chunks: list[str] = []
    current = ""
    for text in texts:
        if current and len(current) + len(text) > limit:
            chunks.append(current)
            current = ""
        current += text + "\n"
    return (*chunks, current) if current else tuple(chunks)


def _as_text(turn: Turn) -> str:
    if isinstance(turn, UserTurn):
        words = "\n".join(
            item.text if isinstance(item, UserText) else f"[file {item.filename or item.mime}]"
            for item in turn.content
        )
        return f"User: {words}"
    lines = [f"Assistant: {turn.text}"] if turn.text else []
    lines += [f"Tool {call.tool}({call.input}) -> {call.output}" for call in turn.calls]
    return "\n".join(lines)
