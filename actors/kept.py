"""Kept conversations: what a model was shown last, for the step that goes on from there."""

from __future__ import annotations

from typing import Final

from understudy.actors.core.context import Conversation
from understudy.store.records import Pair

MOST: Final = 8_000_000


class Kept:
    """Conversations by session, those used last; the others are read again. For one thread.

    ``most`` is how much is kept, in characters. ``in`` may be asked by any thread.
    """

    def __init__(self, *, most: int = MOST) -> None:
        self._most = most
        self._shown: dict[str, Conversation] = {}
        self._size = 0

    def put(self, session_id: str, shown: Conversation) -> None:
        """Keep it. From here on it grows only by what ``answered`` adds."""
        self.take(session_id)
        self._shown[session_id] = shown
        self._size += shown.size
        while self._size > self._most:
            self.take(next(iter(self._shown)))

    def take(self, session_id: str) -> Conversation | None:
        """What was kept, once."""
        shown = self._shown.pop(session_id, None)
        if shown is not None:
            self._size -= shown.size
        return shown

    def answered(self, session_id: str, last: Pair) -> None:
        """Add the answer that a turn ended with, if this is what was shown for it."""
        shown = self.take(session_id)
        if shown is not None and shown.before == last[0].id:
            shown.add(*last)
            self.put(session_id, shown)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._shown

    def __len__(self) -> int:
        return len(self._shown)
