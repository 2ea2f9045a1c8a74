"""What a scripted model can do in one answer: the acts a script is made of."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec

from understudy.actors.models.protocol import (
    Finish,
    FinishReason,
    ModelEvent,
    ModelRequest,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    Usage,
    UserText,
    UserTurn,
)
from understudy.errors import CommandTimeout, InvalidInput, ModelError
from understudy.store.records import Tokens

CHARACTERS_PER_TOKEN = 4
CHARACTERS_PER_DELTA = 16


class Say(msgspec.Struct, frozen=True):
    """Text, streamed in about ``chunks`` deltas (by default one for 16 characters, at least 2)."""

    text: str
    chunks: int | None = None

    def __post_init__(self) -> None:
        _check_words(self)


class Think(msgspec.Struct, frozen=True):
    """Reasoning, streamed like ``Say``."""

    text: str
    chunks: int | None = None

    def __post_init__(self) -> None:
        _check_words(self)


class Call(msgspec.Struct, frozen=True):
    """A tool call. ``arguments`` given as a str go out as they are: write invalid JSON with it."""

    tool: str
    arguments: Mapping[str, Any] | str = {}
    call_id: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tool, str):
            raise InvalidInput(f"Call takes a tool's name, not {self.tool!r}", field="tool")
        if not isinstance(self.arguments, Mapping | str):
            raise InvalidInput(
                f"Call takes arguments by name, or JSON text, not {self.arguments!r}",
                field="arguments",
            )


class Use(msgspec.Struct, frozen=True):
    """What the answer cost: all of it, or only the input tokens (the output is estimated)."""

    tokens: Tokens | int
    cost: float = 0.0


class End(msgspec.Struct, frozen=True):
    """How the answer ends; with None the stream breaks off and has no ``Finish``."""

    reason: FinishReason | None


class Fail(msgspec.Struct, frozen=True):
    """Raise ``error``, an exception or its class."""

    error: BaseException | type[BaseException]

    def __post_init__(self) -> None:
        kind = self.error if isinstance(self.error, type) else type(self.error)
        if not issubclass(kind, BaseException):
            raise InvalidInput(f"Fail takes an exception, not {self.error!r}", field="error")

    def fresh(self) -> BaseException:
        """The error without the traceback and the context of its last use."""
        if isinstance(self.error, type):
            return self.error()
        self.error.__context__ = None
        return self.error.with_traceback(None)


class Gate:
    """Holds a model until it is opened, from any thread. ``reached`` by any number of calls.

    gate = Gate()
    model = ScriptedModel([[Say("One moment "), Wait(gate), Say("done.")]])
    ...
    gate.wait_reached()     # now the model stands there
    gate.open()
    """

    def __init__(self) -> None:
        self._reached: Future[None] = Future()
        self._opened: Future[None] = Future()

    def open(self) -> None:
        """Let everyone pass, now and later."""
        _resolve(self._opened)

    @property
    def reached(self) -> bool:
        return self._reached.done()

    def wait_reached(self, timeout_s: float = 30.0) -> None:
        """Block this thread until a model stands at the gate. Raises ``CommandTimeout``."""
        try:
            self._reached.result(timeout_s)
        except FutureTimeout:
            raise CommandTimeout("no model reached the gate", timeout_s=timeout_s) from None

    async def wait(self) -> None:
        """Report the arrival, then wait until the gate is open."""
        _resolve(self._reached)
        if not self._opened.done():
            # Shielded: a cancelled waiter must not cancel the gate for the others.
            await asyncio.shield(asyncio.wrap_future(self._opened))


class Wait(msgspec.Struct, frozen=True):
    """Wait for a number of seconds, a ``Gate``, or an ``asyncio.Event`` of the model's loop."""

    until: float | Gate | asyncio.Event

    def __post_init__(self) -> None:
        seconds = isinstance(self.until, int | float) and self.until >= 0
        if not seconds and not isinstance(self.until, Gate | asyncio.Event):
            raise InvalidInput(f"Wait takes seconds, a Gate or an asyncio.Event: {self.until!r}")

    async def wait(self) -> None:
        if isinstance(self.until, int | float):
            await asyncio.sleep(self.until)
        else:
            await self.until.wait()


class Stall(msgspec.Struct, frozen=True):
    """Say nothing more until cancelled."""

    async def wait(self) -> None:
        await asyncio.get_running_loop().create_future()


Act: TypeAlias = Say | Think | Call | Use | End | Fail | Wait | Stall


class Answer:
    """What has been said so far, to derive call ids, usage and the finish reason from."""

    def __init__(self, request: ModelRequest, position: int) -> None:
        self.deltas = 0
        self._request = request
        self._position = position
        self._use: Use | None = None
        self._end: End | None = None
        self._calls = 0
        self._written = 0
        self._reasoned = 0
        self._finished = False
        self._used = False
        self._digest = ""

    def play(self, act: Any) -> Iterator[ModelEvent]:
        if isinstance(act, str):
            act = Say(act)
        if isinstance(act, Say):
            yield from map(self._note, map(TextDelta, _pieces(act)))
        elif isinstance(act, Think):
            yield from map(self._note, map(ReasoningDelta, _pieces(act)))
        elif isinstance(act, Call):
            yield self._note(self._tool_call(act))
        elif isinstance(act, TextDelta | ReasoningDelta | ToolCall | Usage | Finish):
            yield self._note(act)
        elif isinstance(act, Use):
            self._use = act
        elif isinstance(act, End):
            self._end = act
        elif isinstance(act, Fail):
            raise act.fresh()
        else:
            raise ModelError(f"a script cannot play {act!r}")

    def closing(self) -> Iterator[ModelEvent]:
        if self._use or not self._used:
            yield self._usage()
        if self._finished or (self._end and self._end.reason is None):
            return
        if self._end and self._end.reason:
            yield Finish(self._end.reason)
        else:
            yield Finish("tool-calls" if self._calls else "stop")

    def _note(self, event: ModelEvent) -> ModelEvent:
        self.deltas += 1
        if isinstance(event, TextDelta):
            self._written += len(event.text)
        elif isinstance(event, ReasoningDelta):
            self._reasoned += len(event.text)
        elif isinstance(event, ToolCall):
            self._calls += 1
            self._written += len(event.arguments)
        elif isinstance(event, Usage):
            self._used = True
        else:
            self._finished = True
        return event

    def _tool_call(self, act: Call) -> ToolCall:
        arguments = act.arguments
        if not isinstance(arguments, str):
            arguments = msgspec.json.encode(arguments).decode()
        return ToolCall(act.call_id or self._call_id(), act.tool, arguments)

    def _call_id(self) -> str:
        # The position alone repeats itself when a new process plays a compacted session, so the
        # ends of the history are mixed in: they differ for every step of a session.
        if not self._digest:
            turns = self._request.turns
            seed = (self._request.session_id, self._position, len(turns), turns[:1], turns[-1:])
            self._digest = hashlib.blake2b(msgspec.msgpack.encode(seed), digest_size=6).hexdigest()
        return f"call_{self._digest}_{self._calls + 1}"

    def _usage(self) -> Usage:
        use = self._use or Use(input_tokens(self._request))
        if isinstance(use.tokens, Tokens):
            return Usage(use.tokens, use.cost)
        output = -(-self._written // CHARACTERS_PER_TOKEN)
        reasoning = -(-self._reasoned // CHARACTERS_PER_TOKEN)
        total = use.tokens + output + reasoning
        tokens = Tokens(total=total, input=use.tokens, output=output, reasoning=reasoning)
        return Usage(tokens, use.cost)


def _check_words(act: Say | Think) -> None:
    name = type(act).__name__
    if not isinstance(act.text, str):
        raise InvalidInput(f"{name} takes text, not {act.text!r}", field="text")
    if act.chunks is not None and (not isinstance(act.chunks, int) or act.chunks < 1):
        raise InvalidInput(f"{name}: chunks is 1 or more, not {act.chunks!r}", field="chunks")


def _pieces(act: Say | Think) -> Iterator[str]:
    length = len(act.text)
    size = max(1, -(-length // (act.chunks or 2 + length // CHARACTERS_PER_DELTA)))
    return (act.text[start : start + size] for start in range(0, length, size))


def input_tokens(request: ModelRequest) -> int:
    """About how many tokens ``request`` has."""
    size = len(request.system)
    for tool in request.tools:
        size += len(tool.name) + len(tool.description) + 40 * len(tool.parameters)
    for turn in request.turns:
        if isinstance(turn, UserTurn):
            size += sum(len(c.text if isinstance(c, UserText) else c.url) for c in turn.content)
            continue
        size += len(turn.text)
        size += sum(len(c.tool) + len(str(c.input)) + len(c.output) for c in turn.calls)
    return -(-size // CHARACTERS_PER_TOKEN)


def _resolve(future: Future[None]) -> None:
    with suppress(InvalidStateError):  # resolved already, perhaps by another thread just now
        future.set_result(None)
