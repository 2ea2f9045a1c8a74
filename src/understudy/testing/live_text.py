"""Live text: what a listener knows of texts that are being written, from rows and deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from understudy.store.events import (
    Event,
    MessageRemoved,
    MessageUpdated,
    PartDelta,
    PartRemoved,
    PartUpdated,
    SessionDeleted,
)
from understudy.store.records import AssistantMessage, ReasoningPart, TextPart


class _Text:
    """One text as known. ``joined`` is the last join at which it was told whole."""

    def __init__(self, session_id: str, message_id: str, text: str) -> None:
        self.session_id = session_id
        self.message_id = message_id
        self.text = text
        self.joined = -1


class LiveText:
    """Texts by part. Deltas come in order, without a gap, after their part and before its end.

    Who joins while a text is written is told it whole once: at the beginning if it ``joins``, and
    after each overflow or gap; or it goes on from its row, which ``row`` gives by session and part
    until that is gone.
    """

    def __init__(self, *, joins: bool, row: Callable[[str, str], str | None]) -> None:
        self._row_text = row
        self._texts: dict[str, _Text] = {}
        self._over: set[str] = set()  # messages that are finished, removed or deleted
        self._join = 0 if joins else -1

    def known(self, session_id: str) -> Iterator[tuple[str, str]]:
        """The texts of a session that are being written, by part."""
        for part_id, text in self._texts.items():
            if text.session_id == session_id:
                yield part_id, text.text

    def rejoin(self) -> None:
        self._join += 1

    def take(self, event: Event) -> Iterator[str]:
        """What is wrong with an event, held against those before it."""
        fact = event.data
        if isinstance(fact, PartDelta):
            yield from self._delta(fact)
        elif isinstance(fact, PartUpdated) and isinstance(fact.part, TextPart | ReasoningPart):
            yield from self._row(fact.part)
        elif isinstance(fact, MessageUpdated) and isinstance(fact.info, AssistantMessage):
            if fact.info.time.completed is not None:
                self._end(fact.info.id)
        elif isinstance(fact, MessageRemoved):
            self._end(fact.message_id)
        elif isinstance(fact, PartRemoved):
            self._texts.pop(fact.part_id, None)
        elif isinstance(fact, SessionDeleted):
            for text in list(self._texts.values()):
                if text.session_id == fact.session_id:
                    self._end(text.message_id)

    def _end(self, message_id: str) -> None:
        self._over.add(message_id)
        for part_id in [k for k, text in self._texts.items() if text.message_id == message_id]:
            del self._texts[part_id]

    def _row(self, part: TextPart | ReasoningPart) -> Iterator[str]:
        known = self._texts.get(part.id)
        if known is None:
            self._texts[part.id] = _Text(part.session_id, part.message_id, part.text)
            return
        if not (part.text.startswith(known.text) or known.text.startswith(part.text)):
            yield f"{part.id}: {known.text!r} became {part.text!r}"
        known.text = max(known.text, part.text, key=len)

    def _delta(self, delta: PartDelta) -> Iterator[str]:
        if delta.message_id in self._over:
            yield f"{delta.part_id}: text after the end of its message"
            return
        known = self._texts.get(delta.part_id)
        if known is None:
            row = self._row_text(delta.session_id, delta.part_id)
            if row is None and delta.offset:
                return  # gone since: what was before this is not known any more
            before = (row or "")[: delta.offset]
            if self._join < 0 or len(before) < delta.offset:
                yield f"{delta.part_id}: text at {delta.offset} before its part"
            known = _Text(delta.session_id, delta.message_id, before + delta.delta)
            known.joined = self._join
            self._texts[delta.part_id] = known
            return
        end = len(known.text)
        if delta.offset > end:
            yield f"{delta.part_id}: {end} characters, then text at {delta.offset}"
        elif delta.offset < end:
            if delta.offset != 0 or known.joined >= self._join:
                yield f"{delta.part_id}: {end} characters, then text at {delta.offset} again"
            known.joined = self._join
            if not (known.text.startswith(delta.delta) or delta.delta.startswith(known.text)):
                yield f"{delta.part_id}: {known.text!r}, told again as {delta.delta!r}"
            known.text = max(known.text, delta.delta, key=len)
            return
        if not delta.delta:
            yield f"{delta.part_id}: a delta without text"
        known.text += delta.delta
