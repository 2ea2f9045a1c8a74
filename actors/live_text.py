"""Live text: handed on to listeners once a tick for all streams, and opened a few at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from understudy.actors.surrogates import cut_half, storable
from understudy.store.events import PartDelta

if TYPE_CHECKING:
    from understudy.actors.core.commands import StreamedPart
    from understudy.actors.publisher import Publisher

OPENING_AT_ONCE: Final = 32


class Stream(Protocol):
    """A model's stream, which writes texts."""

    session_id: str
    message_id: str

    def text_so_far(self) -> list[PartDelta]:
        """What listeners have of every open text, each from offset 0."""
        ...

    def open_texts(self) -> bool:
        """Commit the rows of new texts. False if there is nothing to open any more."""
        ...


class OpenText:
    """One open text or reasoning part. Only its stream's loop writes to it.

    What listeners have, ``shown``, moves under the publisher's lock, so that who joins misses
    nothing. ``news`` is what came after that.
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
        "size",
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
        self.size = 0  # characters received
        self.shown = 0  # characters in rows or deltas
        self.opened = False  # its row is committed, deltas may follow
        self.due = False  # it waits to be handed on

    def add(self, text: str) -> bool:
        """Take what came. False if nothing of it can be shown yet."""
        text, self.half = cut_half(self.half + text)
        self._keep(storable(text))
        return bool(text)

    def end(self) -> None:
        """Nothing more comes: half a character is not waited for any longer."""
        half, self.half = self.half, ""
        self._keep(storable(half))

    def _keep(self, text: str) -> None:
        if not text:
            return
        self.pieces.append(text)
        self.news.append(text)
        self.size += len(text)

    def text(self) -> str:
        """All of it. For the loop that writes."""
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""

    def so_far(self) -> PartDelta:
        """What listeners have. Under the publisher's lock, in any thread."""
        return self._delta("".join(self.pieces)[: self.shown], 0)

    def grown(self) -> PartDelta:
        """What listeners do not have yet."""
        return self._delta("".join(self.news), self.shown)

    def show(self) -> None:
        """Listeners have it all."""
        self.news.clear()
        self.shown = self.size

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
    ``OPENING_AT_ONCE`` are under way, and the others wait, in order.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._due: list[OpenText] = []
        self._waiting: deque[Stream] = deque()
        self._opening = 0
        self._looking = False

    def hand_on(self, text: OpenText) -> None:
        """Publish what came for an open text, with what comes for others in the same tick."""
        if not text.due:
            text.due = True
            if not self._due:
                asyncio.get_running_loop().call_soon(self._hand_on)
            self._due.append(text)

    def _hand_on(self) -> None:
        texts, self._due = self._due, []
        for text in texts:
            text.due = False
        self._publisher.hand_on(texts)

    def open(self, stream: Stream) -> None:
        """Have a stream open its texts, as soon as it may. It says when it has ``opened``.

        Not before this tick is over: an answer that is there at once is committed whole.
        """
        self._waiting.append(stream)
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._open)

    def _open(self) -> None:
        self._looking = False
        while self._waiting and self._opening < OPENING_AT_ONCE:
            if self._waiting.popleft().open_texts():
                self._opening += 1

    def opened(self) -> None:
        """A stream's texts are open, or never will be: the next one's turn."""
        self._opening -= 1
        self._open()
