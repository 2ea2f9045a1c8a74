"""Subscriptions: the event stream as an iterator, from any cursor, without gap or duplicate.

A subscription replays the journal from its cursor, then follows live. Its buffer is bounded: one
that falls behind drops the buffer, is told so by an ``events.overflow`` event with its last cursor,
and catches up from the journal. It never slows a session.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from understudy.actors.handles import in_event_loop
from understudy.actors.wakeups import set_if_waiting
from understudy.actors.workers import stand_aside
from understudy.errors import InvalidInput, ResultNotReady, RuntimeClosed
from understudy.store.events import (
    NOTES,
    Event,
    EventsGap,
    EventsOverflow,
    SessionDeleted,
)
from understudy.store.lanes import wait_released

if TYPE_CHECKING:
    from understudy.actors.publisher import Publisher

OVERFLOW: Final = EventsOverflow.type
GAP: Final = EventsGap.type
ALWAYS_TOLD: Final = frozenset(NOTES)
_PAGE: Final = 500


class Subscription:
    """Events in order. Iterate it in a thread or with ``async for``; close it when done.

    Iteration ends when it is closed, when the runtime closes, and with one session's
    ``session.deleted`` if it follows only that session. One that is behind when the runtime closes
    ends with ``events.overflow``: the journal has the rest, after its cursor.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        after: int | None = None,
        session_id: str | None = None,
        types: frozenset[str] | None = None,
        deltas: bool = True,
        limit: int = 10_000,
    ) -> None:
        if limit < 1:
            raise InvalidInput("a buffer holds at least one event", field="limit")
        self.session_id = session_id
        self.types = types
        self.deltas = deltas
        self._publisher = publisher
        self._limit = limit
        # Raw, and no Condition: one whose entry is interrupted by Ctrl-C stays locked, and nothing
        # could be published any more.
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._buffer: deque[Event] = deque()
        self._replay: deque[Event] = deque()
        self._dropped = 0
        self._closed = False
        self._deleted = False  # the last event said so
        self._error: BaseException | None = None
        self._wakers: list[Callable[[], None]] = []
        self.cursor = publisher.cursor if after is None else after
        self._behind = after is not None
        self._ahead = after is not None and after > publisher.cursor
        self._catching_up = False
        publisher.add(self)

    # --- from the publisher --------------------------------------------------------------------

    @property
    def wants_deltas(self) -> bool:
        """Whether live text is for it."""
        return self.deltas

    def push(self, events: Sequence[Event]) -> None:
        """Take events that were just committed, or a live delta. Never blocks."""
        with self._lock:
            if self._closed or self._is_ahead():
                return
            if not self._behind:
                if len(self._buffer) + len(events) > self._limit:
                    self._dropped = len(self._buffer) + len(events)
                    self._buffer.clear()
                    self._behind = True
                else:
                    self._buffer.extend(events)
            self._wake()

    def _is_ahead(self) -> bool:
        """Its cursor, of a snapshot it may be, is not published yet: a text may be over by then."""
        if self._ahead and self.cursor <= self._publisher.cursor:
            self._ahead, self._behind = False, True
        return self._ahead

    def _wake(self) -> None:
        wakers, self._wakers = self._wakers, []
        for waker in wakers:
            waker()

    @property
    def _has_to_catch_up(self) -> bool:
        """The journal comes first; whoever asked for it may be gone before it is there."""
        return self._behind or self._catching_up

    @property
    def _ended(self) -> bool:
        return self._closed or (self._deleted and self.session_id is not None)

    # --- taking --------------------------------------------------------------------------------

    def poll(self) -> Event | None:
        """The next event, or None if there is none yet. May read the journal.

        Raises ``SessionNotFound`` if there is no such session to follow, as taking always does.
        """
        while True:
            event = self._take()
            if event is not None or not self._has_to_catch_up:
                return event
            self._catch_up()

    def _take(self) -> Event | None:
        """The next event at hand."""
        if self._error is not None:
            raise self._error.with_traceback(None)
        while True:
            if self._replay:
                event = self._replay.popleft()
            else:
                with self._lock:
                    if self._has_to_catch_up or not self._buffer:
                        return None
                    event = self._buffer.popleft()
            if event.cursor is not None:
                if event.cursor <= self.cursor:
                    continue
                self.cursor = event.cursor
                self._deleted = type(event.data) is SessionDeleted
            elif type(event.data) is EventsGap:
                self.cursor = max(self.cursor, event.data.oldest - 1)
            if self.types is None or event.type in self.types or event.type in ALWAYS_TOLD:
                return event

    def _catch_up(self) -> None:
        """Read a page of the journal; when the end is near, follow live again."""
        with self._reading:
            with self._lock:
                if not self._behind:
                    return
                # From here on live events are buffered; what the page also has is skipped later.
                self._behind, self._catching_up = False, True
            try:
                self._read_on()
            finally:
                self._catching_up = False

    def _read_on(self) -> None:
        try:
            page = self._page()
        except RuntimeClosed:
            if self.cursor < self._publisher.cursor:
                self._replay.append(self._overflow())
            return  # that is the end of it
        except BaseException:
            self.fall_behind()
            raise
        self._replay.extend(page)
        if len(page) >= _PAGE:
            self.fall_behind()
        else:
            self._publisher.join(self)

    def _page(self) -> list[Event]:
        """What comes next in the journal, after what has to be said about it.

        Only what was published: past that, a text may be told that ended there.
        """
        journal, upto = self._publisher.journal, self._publisher.cursor
        page = journal.events(after=self.cursor, upto=upto, limit=_PAGE, session_id=self.session_id)
        session_id = self.session_id or ""
        notes = [self._overflow()] if self._dropped else []
        oldest, _ = journal.cursors()
        if page:  # what it has is not gone, though it may have been trimmed by now
            oldest = min(oldest, page[0].cursor or oldest)
        if 0 <= self.cursor < oldest - 1:
            gap = EventsGap(session_id=session_id, after=self.cursor, oldest=oldest)
            notes.append(Event(gap.type, session_id, None, None, 0, gap))
        return [*notes, *page]

    def _overflow(self) -> Event:
        session_id, dropped = self.session_id or "", self._dropped
        self._dropped = 0
        note = EventsOverflow(session_id=session_id, cursor=self.cursor, dropped=dropped)
        return Event(note.type, session_id, None, None, 0, note)

    def fall_behind(self) -> None:
        """Read the journal from its cursor on; what is gone from there is told as a gap."""
        with self._lock:
            self._buffer.clear()
            self._behind = True
            self._wake()

    def joined(self, live: Sequence[Event]) -> None:
        """Follow live from here. Called by the publisher, under its lock.

        ``live`` says where every open text stands: the deltas buffered so far are part of it.
        """
        with self._lock:
            if self._is_ahead():
                return
            facts = [event for event in self._buffer if event.cursor is not None]
            self._buffer = deque([*facts, *live])

    def next(self, timeout_s: float | None = None) -> Event | None:
        """Wait for the next event; None after ``timeout_s``, or at the end.

        Raises ``ResultNotReady`` in an event loop, which it would block, as ``for`` does.
        """
        if in_event_loop():
            raise ResultNotReady(
                "waiting here would block the event loop: use `async for`, "
                "await `next_async()`, or `poll()`"
            )
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            event = self.poll()
            if event is not None:
                return event
            gate = threading.Lock()
            gate.acquire()
            with self._lock:
                if self._buffer or self._has_to_catch_up or self._error:
                    continue
                left_s = None if deadline is None else deadline - time.monotonic()
                if self._ended or (left_s is not None and left_s <= 0):
                    return None
                self._wakers.append(gate.release)
            try:
                with stand_aside():
                    wait_released(gate, left_s)
            finally:
                self._forget(gate.release)

    async def next_async(self) -> Event | None:
        """Wait for the next event in this event loop; None at the end."""
        loop = asyncio.get_running_loop()
        while True:
            event = self._take()
            if event is not None:
                return event
            if self._has_to_catch_up:
                await asyncio.to_thread(self._catch_up)
                continue
            woken = loop.create_future()
            waker = partial(_wake_loop, loop, woken)
            with self._lock:
                if self._buffer or self._has_to_catch_up or self._error:
                    continue
                if self._ended:
                    return None
                self._wakers.append(waker)
            try:
                await woken
            finally:
                self._forget(waker)

    def _forget(self, waker: Callable[[], None]) -> None:
        """Whoever waited does so no more: nothing came, or they were interrupted."""
        with self._lock:
            if waker in self._wakers:
                self._wakers.remove(waker)

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next()) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self.next_async()) is not None:
            yield event

    # --- the end -------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """End the stream with an error for whoever takes from it."""
        self._error = error
        self.close()

    def close(self) -> None:
        """End the stream; what is buffered can still be taken. Safe to repeat."""
        self._publisher.remove(self)
        self.end()

    def end(self) -> None:
        """From here on nothing comes. Called by the publisher, which has forgotten it."""
        with self._lock:
            self._closed = True
            self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _wake_loop(loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> None:
    with suppress(RuntimeError):  # the loop that waited is closed
        loop.call_soon_threadsafe(set_if_waiting, woken)
