"""Listeners: subscriptions of every kind and signal receivers, each held against the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from understudy import signals
from understudy.store.events import Event
from understudy.testing.live_text import LiveText

if TYPE_CHECKING:
    from understudy.testing.process import Process
    from understudy.testing.stage import Stage
    from understudy.testing.watch import Told

_RAISES_EVERY: Final = 5  # the events, by cursor, on which a receiver fails
_PAGE: Final = 500  # more than this at once is caught up with in pieces


class Listener:
    """What one listener was told, compared with what was to be told.

    Args:
        after: the cursor it begins after; None: whatever comes first.
        session_id, types: what it listens to; None is everything.
        buffer: how many events wait for it before it must be told of an overflow.
    """

    def __init__(
        self,
        stage: Stage,
        process: Process,
        name: str,
        *,
        after: int | None,
        session_id: str | None = None,
        types: frozenset[str] | None = None,
        buffer: int | None = None,
    ) -> None:
        self.name = f"{process.name}.{name}"
        self.cursor = after
        self._stage = stage
        self._process = process
        self._session_id = session_id
        self._types = types
        self._buffer = buffer
        self.texts: LiveText | None = None
        if types is None:
            self.texts = LiveText(joins=after is not None, row=stage.watch.text_of_part)
        self._caught_up_at: int | None = None
        self._since_join = 0
        self.follows: Callable[[], bool] = lambda: True
        self.deleted = False

    def wanted(self, told: Told) -> bool:
        return (self._session_id is None or told.session_id == self._session_id) and (
            self._types is None or told.kind in self._types
        )

    def take(self, event: Event) -> None:
        """One more event came."""
        self._stage.seen[f"told {event.type}"] += 1
        if event.type == "events.gap":
            self._gap(event.data)
        elif event.type == "events.overflow":
            self._overflow(event.data)
        elif event.cursor is not None:
            self._fact(event, event.cursor)
        if self.texts is not None:
            # Who was taken over goes on until it hears of it: its text is nobody's business.
            mine = self._stage.watch.owner(event.session_id) == self._process.engine.id
            problems = list(self.texts.take(event))
            for problem in problems if mine else ():
                self._found("live text is whole", problem)

    @property
    def follows_all(self) -> bool:
        """It is a subscriber to everything, from the beginning on."""
        return self.name.endswith(".all")

    def behind(self) -> int | None:
        """The cursor of an event that is still to come, or None."""
        if self.cursor is None or self.deleted:
            return None
        return self._stage.watch.next_of(self.cursor, self.wanted)

    # --- kinds of events -------------------------------------------------------------------------

    def _fact(self, event: Event, cursor: int) -> None:
        watch = self._stage.watch
        if cursor > watch.cursor:
            self._found("told means committed", f"event {cursor}")
            return
        if self.cursor is not None:
            expected = watch.next_of(self.cursor, self.wanted)
            if cursor != expected:
                self._found("subscribers see all", f"{cursor}, not {expected}")
        self._check_overflow(cursor)
        self.cursor = cursor
        self._since_join += 1
        published = self._process.engine.publisher.cursor
        self._caught_up_at = cursor if published == cursor and self.follows() else None
        self.deleted = self._session_id is not None and event.type == "session.deleted"

    def _check_overflow(self, cursor: int) -> None:
        """It had everything, then more than fits was published, and it was not told."""
        if self._buffer is None or self._caught_up_at is None or self._since_join >= _PAGE:
            return
        published = self._process.engine.publisher.cursor
        if published - self._caught_up_at > self._buffer:
            self._found(
                "an overflow is told",
                f"{published - self._caught_up_at} events in {self._buffer}, next is {cursor}",
            )

    def _overflow(self, fact: Any) -> None:
        if self._buffer is None:
            self._found("only the slow overflow", f"{fact}")
        elif self.cursor is not None and fact.cursor < self.cursor:
            self._found("an overflow says where", f"{fact.cursor}, it was told {self.cursor}")
        if fact.dropped < 1:
            self._found("an overflow says where", f"{fact.dropped} dropped")
        self._rejoin()

    def _gap(self, fact: Any) -> None:
        """What comes next is gone, by retention only; it is told where it goes on."""
        if self._stage.settings.keep is None:
            self._found("gaps come of retention", f"{fact}")
        if self.cursor is not None and fact.after < self.cursor:
            self._found("a gap says where", f"after {fact.after}, it was told {self.cursor}")
        self.cursor = max(self.cursor or 0, fact.oldest - 1)
        self._rejoin()

    def _rejoin(self) -> None:
        self._caught_up_at = None
        self._since_join = 0
        if self.texts is not None:
            self.texts.rejoin()

    def _found(self, guarantee: str, what: str) -> None:
        self._stage.found(guarantee, f"{self.name}: {what}")


class Listeners:
    """Everybody who listens on a stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._all: list[tuple[Process, Listener]] = []
        self._receivers: dict[Process, Listener] = {}
        self._raised: list[int] = []
        self._reported: list[int] = []
        self._connected = ExitStack()

    # --- signals ---------------------------------------------------------------------------------

    def connect(self) -> None:
        """Receive every signal, with one that raises now and then among the receivers."""
        for signal in signals.BY_TYPE.values():
            for receiver in (self._receive, self._raise):
                signal.connect(receiver, weak=False)
                self._connected.callback(signal.disconnect, receiver)
        signals.receiver_failed.connect(self._failed, weak=False)
        self._connected.callback(signals.receiver_failed.disconnect, self._failed)

    def expect(self, process: Process) -> None:
        """Signals of a process, from its start on."""
        self._receivers[process] = Listener(self._stage, process, "signals", after=None)
        self._all.append((process, self._receivers[process]))

    def disconnect(self) -> None:
        self._connected.close()

    def _receive(self, sender: Any, *, event: Event) -> None:
        for process, listener in self._receivers.items():
            if process.runtime is sender:
                listener.take(event)

    def _raise(self, _: Any, *, event: Event) -> None:
        if event.cursor is not None and event.cursor % _RAISES_EVERY == 0:
            self._raised.append(event.cursor)
            raise ValueError(event.type)

    def _failed(self, _: Any, *, event: Event, receiver: Any, error: BaseException) -> None:
        assert isinstance(error, ValueError), receiver
        self._reported.append(event.cursor or 0)

    # --- subscriptions ---------------------------------------------------------------------------

    def follow(self, process: Process) -> None:
        """Follow everything a process publishes, as subscriber and by signals."""
        after = process.runtime.cursor
        listener = Listener(self._stage, process, "all", after=after)
        subscription = process.runtime.events(after=after)
        self._all.append((process, listener))
        self._stage.spawn(process, self._listen(subscription, listener), counted=False)

    def join(self, process: Process, a: int, b: int, session_id: str) -> None:
        """One more subscriber: of a session, of some types, or a slow one; from now or before."""
        watch, kind = self._stage.watch, a % 3
        back = b % (50 if b % 3 else 1000)  # perhaps beyond what the journal keeps
        after = process.runtime.cursor if b % 2 else max(0, process.runtime.cursor - back)
        only = session_id if kind == 0 and watch.life(session_id) else None
        types = frozenset({"prompt.settled", "session.deleted"}) if kind == 1 else None
        buffer = 2 + b % 5 if kind == 2 else None
        pause_s = (0.0, 0.5, 2.0, 6.0)[b % 4] if kind == 2 else 0.0
        listener = Listener(
            self._stage,
            process,
            only or ("types" if types else "slow"),
            after=after,
            session_id=only,
            types=types,
            buffer=buffer,
        )
        subscription = process.runtime.events(
            after=after, session_id=only, types=types, buffer=buffer or 10_000
        )
        # What it read of the journal beforehand needs no buffer.
        listener.follows = lambda: not (subscription._behind or subscription._replay)  # noqa: SLF001
        if buffer is None:
            self._all.append((process, listener))
        self._stage.spawn(process, self._listen(subscription, listener, pause_s), counted=False)

    async def _listen(self, subscription: Any, listener: Listener, pause_s: float = 0.0) -> None:
        async for event in subscription:
            listener.take(event)
            if pause_s:
                await asyncio.sleep(pause_s)

    def shown(self, process: Process, session_id: str) -> Iterator[tuple[str, str]]:
        """The texts of a session that are being written, as a subscriber to all knows them."""
        for owner, listener in self._all:
            if owner is process and listener.texts is not None and listener.follows_all:
                yield from listener.texts.known(session_id)
                return

    # --- the end ---------------------------------------------------------------------------------

    def behind(self) -> list[str]:
        """Who has not been told everything: of processes that live, and not the slow ones."""
        late = [
            f"{listener.name} waits for event {cursor}"
            for process, listener in self._all
            if process.alive and (cursor := listener.behind()) is not None
        ]
        if sorted(self._raised) != sorted(self._reported):
            late.append("receiver_failed")
        return late
