"""Handles: what callers hold. Every call gives one.

One rule serves threads and event loops: in a thread a call blocks until its result is ready and
returns it; in a thread that runs an event loop it returns at once, and ``await`` gives the same
result. ``session = runtime.create_session()`` in a thread is
``session = await runtime.create_session()`` in a coroutine, and so on for every call.
"""

from __future__ import annotations

import asyncio
import logging
import reprlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Generic, Self, TypeVar, overload

import msgspec

from understudy.actors.pending import Pending
from understudy.actors.workers import stand_aside
from understudy.errors import CommandTimeout, ResultNotReady
from understudy.store.records import (
    AnyPart,
    AssistantMessage,
    Message,
    TextPart,
    Tokens,
    ToolPart,
)

logger = logging.getLogger("understudy")

T = TypeVar("T")


def in_event_loop() -> bool:
    """Whether this thread runs an event loop, which must not be blocked."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Handle:
    """The result of a call: ready when returned in a thread, awaited in an event loop."""

    _pending: Pending[Any] | None = None
    _timeout_s: float | None = None
    _looked = False
    _given_up: Callable[[], None] | None = None  # called when the wait timed out

    def _begin(self, pending: Pending[Any], timeout_s: float | None) -> Self:
        """Wait for the answer here, or leave it to ``await``."""
        if in_event_loop():
            self._pending = pending
            self._timeout_s = timeout_s
        else:
            try:
                with stand_aside():
                    value = pending.get(timeout=timeout_s)
            except CommandTimeout:
                self._give_up()
                raise
            self._arrive(value)
        return self

    def _give_up(self) -> None:
        if self._given_up is not None:
            self._given_up()

    def _arrive(self, value: Any) -> None:
        """Take the answer over. Subclasses keep what they need of it."""

    def _ready(self) -> None:
        """Make sure that the answer is there before its content is used."""
        if self._pending is not None:
            if not self._pending.done:
                raise ResultNotReady("this result is not there yet: await it first")
            self._looked = True
            pending, self._pending = self._pending, None
            self._arrive(pending.result())

    async def _wait(self) -> Self:
        if self._pending is not None:
            self._looked = True
            try:
                value = await self._pending.wait(timeout_s=self._timeout_s)
            except CommandTimeout:
                self._give_up()
                raise
            if self._pending is not None:
                self._pending = None
                self._arrive(value)
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self._wait().__await__()

    def __del__(self) -> None:
        if self._pending is not None and not self._looked:
            self._pending.then(_report(type(self).__name__))


def _report(name: str) -> Callable[[Pending[Any]], None]:
    def report(pending: Pending[Any]) -> None:
        if pending.error is not None:
            logger.error("A %s was never awaited, and failed: %s", name, pending.error)

    return report


class Done(Handle):
    """The call was carried out. ``value`` says what came of it, where there is something to say."""

    def __init__(self) -> None:
        self._value: Any = None

    def _arrive(self, value: Any) -> None:
        self._value = value

    @property
    def value(self) -> Any:
        self._ready()
        return self._value

    def __bool__(self) -> bool:
        return bool(self.value)

    def __repr__(self) -> str:
        return f"<Done: {self._value!r}>" if self._pending is None else "<Done: await me>"


class Records(Handle, Sequence[T], Generic[T]):
    """A list of results."""

    def __init__(self, make: Callable[[Any], T] | None = None) -> None:
        self._items: list[T] = []
        self._make = make

    def _arrive(self, value: Any) -> None:
        self._items = list(value) if self._make is None else [self._make(each) for each in value]

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        self._ready()
        return self._items[index]

    def __len__(self) -> int:
        self._ready()
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        self._ready()
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        self._ready()
        return self._items == (list(other) if isinstance(other, Records) else other)

    __hash__ = None  # type: ignore[assignment]  # equal by content, like the list it is

    def __repr__(self) -> str:
        return repr(self._items) if self._pending is None else "<Records: await me>"


class TranscriptMessage(msgspec.Struct, frozen=True):
    """A message with its parts, in order."""

    info: Message
    parts: tuple[AnyPart, ...]

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def role(self) -> str:
        return self.info.role

    @property
    def text(self) -> str:
        """Its text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def tools(self) -> tuple[ToolPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ToolPart))


class Snapshot(Handle):
    """A transcript and the cursor of the last event in it.

    Attributes:
        messages: the messages in order.
        cursor: events after it are news.
    """

    def __init__(self) -> None:
        self._messages: tuple[TranscriptMessage, ...] = ()
        self._cursor = 0

    def _arrive(self, value: Any) -> None:
        pairs, self._cursor = value
        self._messages = tuple(TranscriptMessage(*pair) for pair in pairs)

    @property
    def messages(self) -> tuple[TranscriptMessage, ...]:
        self._ready()
        return self._messages

    @property
    def cursor(self) -> int:
        self._ready()
        return self._cursor


class Reply(Handle):
    """The answer to a prompt.

    Attributes:
        text: the text of the last assistant message.
        message: that message.
        parts: its parts.
        messages: every assistant message of the turn with its parts, in order.
        usage: tokens of the whole turn.
        cost: its cost, as far as the model says.
    """

    def __init__(self) -> None:
        self._messages: tuple[TranscriptMessage, ...] = ()
        self._last: TranscriptMessage | None = None

    def _arrive(self, value: Any) -> None:
        reply_id, pairs = value
        self._messages = tuple(
            TranscriptMessage(message, parts)
            for message, parts in pairs
            if isinstance(message, AssistantMessage) and not message.summary
        )
        for each in self._messages:
            if each.id == reply_id:
                self._last = each

    @property
    def messages(self) -> tuple[TranscriptMessage, ...]:
        self._ready()
        return self._messages

    @property
    def message(self) -> AssistantMessage:
        self._ready()
        assert self._last is not None, "an answered turn has its answer"
        assert isinstance(self._last.info, AssistantMessage), "answers come from assistants"
        return self._last.info

    @property
    def parts(self) -> tuple[AnyPart, ...]:
        self._ready()
        return self._last.parts if self._last is not None else ()

    @property
    def text(self) -> str:
        self._ready()
        return self._last.text if self._last is not None else ""

    @property
    def usage(self) -> Tokens:
        total = Tokens()
        for each in self.messages:
            if isinstance(each.info, AssistantMessage):
                total = total + each.info.tokens
        return total

    @property
    def cost(self) -> float:
        return sum(
            each.info.cost for each in self.messages if isinstance(each.info, AssistantMessage)
        )

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return (
            f"<Reply: {reprlib.repr(self.text)}>" if self._pending is None else "<Reply: await me>"
        )
