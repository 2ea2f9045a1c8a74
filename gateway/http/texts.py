"""Texts that are being written, as clients have them.

Clients append what a delta brings, wherever it begins, and take a part for all of its text. So each
piece is told once and in order, and no part comes with less than was told of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from understudy.store.events import (
    Event,
    EventsGap,
    MessageUpdated,
    PartDelta,
    PartUpdated,
    SessionDeleted,
)
from understudy.store.records import ReasoningPart, Span, TextPart


class Text:
    """One text: the event that opened it, if that was seen, and all that came since."""

    __slots__ = ("opening", "pieces", "size")

    def __init__(self, opening: Event | None, said: str, size: int) -> None:
        self.opening = opening
        self.pieces = [said]
        self.size = size

    def add(self, said: str) -> None:
        self.pieces.append(said)
        self.size += len(said)

    def whole(self) -> Event | None:
        """The part with all of its text, as an event of no journal; None if that is not known."""
        if self.opening is None:
            return None
        self.pieces = ["".join(self.pieces)]
        fact = self.opening.data
        assert isinstance(fact, PartUpdated), "a part opens a text"
        part = msgspec.structs.replace(fact.part, text=self.pieces[0])
        grown = msgspec.structs.replace(fact, part=part)
        return msgspec.structs.replace(self.opening, cursor=None, seq=None, data=grown)


class Texts:
    """The open texts of all sessions. ``told`` is shown every event, in order."""

    def __init__(self) -> None:
        self._open: dict[str, dict[str, Text]] = {}

    def told(self, event: Event) -> Event | None:
        """The event as clients are to be told it; None for a delta that they have."""
        fact = event.data
        if type(fact) is PartDelta:
            return self._grown(event, fact)
        if type(fact) is PartUpdated and isinstance(fact.part, TextPart | ReasoningPart):
            return self._written(event, fact, fact.part)
        if type(fact) is EventsGap:
            self._open.clear()  # nobody says any more what has ended
        elif type(fact) is SessionDeleted or (
            type(fact) is MessageUpdated and fact.info.time.completed is not None
        ):
            self._open.pop(event.session_id, None)
        return event

    def open(self) -> Iterator[Event]:
        """Every open text as it stands, after all that was shown to ``told``."""
        for texts in self._open.values():
            for text in texts.values():
                if (whole := text.whole()) is not None:
                    yield whole

    def _grown(self, event: Event, fact: PartDelta) -> Event | None:
        texts = self._open.setdefault(event.session_id, {})
        text = texts.get(fact.part_id)
        if text is None or fact.offset > text.size:
            text = texts[fact.part_id] = Text(None, "", fact.offset)
        known = text.size - fact.offset
        if fact.delta and known >= len(fact.delta):
            return None
        text.add(fact.delta[known:])
        if not known:
            return event
        rest = msgspec.structs.replace(fact, delta=fact.delta[known:], offset=fact.offset + known)
        return msgspec.structs.replace(event, data=rest)

    def _written(self, event: Event, fact: PartUpdated, part: TextPart | ReasoningPart) -> Event:
        if not (isinstance(part.time, Span) and part.time.end is None):
            self._open.get(event.session_id, {}).pop(part.id, None)
            return event
        texts = self._open.setdefault(event.session_id, {})
        before = texts.get(part.id)
        if before is not None and before.size > len(part.text):
            # It was written down before the last deltas came, and is told after them.
            whole = before.whole()
            return event if whole is None else msgspec.structs.replace(event, data=whole.data)
        texts[part.id] = Text(event, part.text, len(part.text))
        return event
