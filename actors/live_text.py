"""Live text: handed on to listeners once a tick for all streams, and written down in groups."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from understudy.actors.surrogates import cut_half, storable
from understudy.store.events import PartDelta

if TYPE_CHECKING:
    from understudy.actors.core.commands import StreamedPart
    from understudy.actors.publisher import Publisher

OPENING_AT_ONCE: Final = 32
FLUSH_AFTER_S: Final = 1.0
FLUSH_EVERY_S: Final = 0.1
FLUSHES_AT_ONCE: Final = 40


class Stream(Protocol):
    """A model's stream, which writes texts."""

    session_id: str
    message_id: str

    def text_so_far(self) -> list[PartDelta]:
        """What listeners have of every open text, each from offset 0."""
        ...

    def hand_on(self) -> None:
        """Publish what came for its open texts."""
        ...

    def flush(self) -> bool:
        """Commit what came for its texts. False if there is nothing to, or a flush is under way."""
        ...


class OpenText:
    """One open text or reasoning part. Only its stream's loop writes to it.

    ``pieces`` are what listeners have, and move under the publisher's lock, so that who joins
    misses nothing; ``news`` is what came after that: all of it, where nobody listens.
    """

    __slots__ = (
        "due",
        "half",
        "kind",
        "news",
        "opened",
        "part_id",
        "pieces",
        "shown",
        "start",
        "stream",
    )

    def __init__(self, stream: Stream, part_id: str, kind: type[StreamedPart], start: int) -> None:
        self.stream = stream
        self.part_id = part_id
        self.kind = kind
        self.start = start
        self.pieces: list[str] = []
        self.news: list[str] = []
        self.half = ""  # of a character, until the other half comes
        self.shown = 0  # characters in pieces
        self.opened = False  # its row is committed, deltas may follow
        self.due = False  # it waits to be handed on

    def add(self, text: str) -> bool:
        """Take what came. False if nothing of it can be shown yet."""
        if self.half or not text.isascii():
            text, self.half = cut_half(self.half + text)
            if not text:
                return False
            text = storable(text)
        self.news.append(text)
        return True

    def end(self) -> None:
        """Nothing more comes: half a character is not waited for any longer."""
        if self.half:
            self.news.append(storable(self.half))
            self.half = ""

    def text(self) -> str:
        """All of it. For the loop that writes."""
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return "".join((*self.pieces, *self.news))

    def so_far(self) -> PartDelta:
        """What listeners have. Under the publisher's lock, in any thread."""
        return self._delta("".join(self.pieces), 0)

    def grown(self) -> PartDelta:
        """What listeners do not have yet."""
        return self._delta("".join(self.news), self.shown)

    def show(self) -> None:
        """Listeners have it all. Under the publisher's lock, unless its row is not there yet."""
        self.pieces += self.news
        self.shown += sum(map(len, self.news))
        self.news.clear()

    def _delta(self, text: str, offset: int) -> PartDelta:
        return PartDelta(
            session_id=self.stream.session_id,
            message_id=self.stream.message_id,
            part_id=self.part_id,
            field="text",
            delta=text,
            offset=offset,
        )


class LiveTexts:
    """The live texts of one event loop, in which all of this is called.

    A text opens with a commit of its own. When thousands of answers begin in one moment, their
    commits would take the interpreter from the loop that reads the streams: so only
    ``OPENING_AT_ONCE`` are under way, and the others wait, in order. What comes for open texts is
    written down ``FLUSH_AFTER_S`` later, or when it is their turn: as many together as commit well.
    """

    def __init__(self, publisher: Publisher, soon: Callable[[Callable[[], None]], None]) -> None:
        self._publisher = publisher
        self._soon = soon
        publisher.joined = self._joined
        self._due: list[OpenText] = []
        self._to_open: dict[Stream, None] = {}
        self._opening: set[Stream] = set()
        self._looking = False
        self._to_flush: dict[Stream, float] = {}
        self._waiting = False

    def hand_on_soon(self, text: OpenText) -> None:
        """Publish what came for an open text, with what comes for others in the same tick."""
        if not text.due:
            text.due = True
            if not self._due:
                asyncio.get_running_loop().call_soon(self._hand_on)
            self._due.append(text)
            self.flush_later(text.stream)

    def _hand_on(self) -> None:
        texts, self._due = self._due, []
        for text in texts:
            text.due = False
        self._publisher.hand_on(texts)

    def _joined(self, streams: Sequence[Stream]) -> None:
        """Somebody follows these from now on: tell them what nobody heard. In any thread."""

        def hand_on() -> None:
            for stream in streams:
                stream.hand_on()

        self._soon(hand_on)

    def open_soon(self, stream: Stream) -> None:
        """Have a stream flush new texts, as soon as it may.

        Not before this tick is over: an answer that is there at once is committed whole.
        """
        self._to_open[stream] = None
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._open)

    def _open(self) -> None:
        self._looking = False
        while self._to_open and len(self._opening) < OPENING_AT_ONCE:
            stream = next(iter(self._to_open))
            del self._to_open[stream]
            if stream.flush():
                self._opening.add(stream)

    def flush_later(self, stream: Stream) -> None:
        """Have a stream flush its texts in a while."""
        if stream in self._to_flush:
            return
        due_s = asyncio.get_running_loop().time() + FLUSH_AFTER_S
        self._to_flush[stream] = due_s
        self._wait_until(due_s)

    def _wait_until(self, due_s: float) -> None:
        if not self._waiting:
            self._waiting = True
            asyncio.get_running_loop().call_at(due_s, self._flush)

    def _flush(self) -> None:
        self._waiting = False
        now_s, room = asyncio.get_running_loop().time(), FLUSHES_AT_ONCE
        try:
            while room > 0 and self._to_flush:
                stream, due_s = next(iter(self._to_flush.items()))
                if due_s > now_s:
                    break
                del self._to_flush[stream]
                if stream.flush():
                    room -= 1
        finally:
            if self._to_flush:
                due_s = next(iter(self._to_flush.values()))
                self._wait_until(max(due_s, now_s + FLUSH_EVERY_S))

    def flushed(self, stream: Stream) -> None:
        """A flush of the stream is over: if that opened its texts, it is the next one's turn."""
        if stream in self._opening:
            self._opening.remove(stream)
            self._open()

    def forget(self, stream: Stream) -> None:
        """The stream has ended: nothing of it is flushed any more."""
        self._to_open.pop(stream, None)
        self._to_flush.pop(stream, None)
        self.flushed(stream)
