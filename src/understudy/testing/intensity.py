"""Restart intensity: how many crashes within its period a runtime forgives, and no more.

A crash is counted when its supervisor first tells the store of it, however long that takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from understudy.testing.rules import Finding

if TYPE_CHECKING:
    from understudy.actors.clock import Clock
    from understudy.store.store import Store
    from understudy.testing.watch import Told

PERIOD_S: Final = 30.0


class Intensity:
    """The crashes that one runtime has counted, by session, since it quarantined it last."""

    def __init__(self, store: Store, clock: Clock, *, allowed: int, in_a_row: int) -> None:
        self._clock = clock
        self._allowed = allowed
        self._in_a_row = in_a_row
        self._counted: dict[str, list[float]] = {}
        self._under_way: dict[str, float] = {}
        self._unsure: set[str] = set()  # gone meanwhile, or somebody else's: perhaps forgotten
        self._record = store.record_crash
        store.record_crash = self._recording  # type: ignore[method-assign]

    def _recording(self, session_id: str, *, done: Any, **options: Any) -> None:
        self._under_way.setdefault(session_id, self._clock.monotonic_s())

        def recorded(record: Any, events: Any, error: Any) -> None:
            if record is None:
                self._unsure.add(session_id)
            done(record, events, error)

        self._record(session_id, done=recorded, **options)

    def deleted(self, session_id: str) -> None:
        """By anybody: whoever has been told so has forgotten its crashes, if it comes back."""
        self._unsure.add(session_id)

    def committed(self, events: Iterable[Told], crashes: dict[str, int]) -> Iterator[Finding]:
        """What is wrong with events of one commit; ``crashes`` are those in a row, by session."""
        kinds: dict[str, set[str]] = {}
        for session_id, _, kind in events:
            kinds.setdefault(session_id, set()).add(kind)
        for session_id, told in kinds.items():
            if "actor.crashed" in told and session_id in self._under_way:
                at_s = self._under_way.pop(session_id)
                counted = self._counted.setdefault(session_id, [])
                counted.append(at_s)
                recent = [each for each in counted if at_s - each <= PERIOD_S]
                ended = "session.quarantined" in told
                due = len(recent) > self._allowed or crashes[session_id] >= self._in_a_row
                sure = session_id not in self._unsure and "session.reset" not in told
                if ended != due and sure:
                    said = f"{len(recent)} crashes in {PERIOD_S:g} s, quarantined: {ended}"
                    yield "restart intensity is kept", f"{session_id}: {said}"
                if ended:
                    del self._counted[session_id]
