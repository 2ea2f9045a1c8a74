"""The publisher: hands committed events, in cursor order, to whoever listens.

It publishes the journal, whoever wrote it: events another process committed are read from there, so
every subscriber of every runtime on a file sees the same sequence. Live text passes through it too,
under the same lock, so that no delta comes before its part's opening or after its end.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from understudy import signals
from understudy.actors.subscription import GAP, OVERFLOW, Subscription
from understudy.errors import StoreError
from understudy.store.events import Event, MessageUpdated, PartDelta, SessionDeleted
from understudy.store.lanes import Lane, MakeLane, ThreadLane

if TYPE_CHECKING:
    from understudy.actors.live_text import OpenText, Stream
    from understudy.store.reads import Reads

logger = logging.getLogger("understudy.events")

_PAGE: Final = 1000
_LAST_WORDS: Final = (SessionDeleted, MessageUpdated)


class Publisher:
    """Fans events out. ``committed`` runs in the writer's thread, and must not wait.

    Attributes:
        cursor: of the last event it published.
        lost: events were trimmed before it could publish them: what they said is in the rows only.
            Whoever looks there sets it back.
        joined: called with the streams that somebody follows from now on, in any thread.
    """

    def __init__(
        self, sender: Any, *, wall_ms: Callable[[], int], lane: MakeLane = ThreadLane
    ) -> None:
        self.cursor = 0
        self.lost = False
        self.joined: Callable[[Sequence[Stream]], None] = lambda _: None
        self._journal: Reads | None = None
        self._sender = sender
        self._wall_ms = wall_ms
        self._lane = lane
        self._lock = threading.RLock()
        self._all: list[Subscription] = []
        self._by_session: dict[str, list[Subscription]] = {}
        self._streams: dict[str, Stream] = {}
        self._observers: defaultdict[type, list[Callable[[Event], None]]] = defaultdict(list)
        self._pump: SignalPump | None = None
        self._closed = False

    @property
    def journal(self) -> Reads:
        assert self._journal is not None, "the publisher is open"
        return self._journal

    def open(self, journal: Reads) -> None:
        self._journal = journal
        self.cursor = journal.cursors()[1]
        self._pump = SignalPump(self, self._sender, self._lane)

    def close(self, timeout_s: float) -> None:
        """Deliver what is committed to signal receivers, then end every subscription."""
        if self._pump is not None:
            self._pump.stop(timeout_s)
        with self._lock:
            self._closed = True
            everyone = self._everyone()
        for subscription in everyone:
            subscription.close()

    def _everyone(self) -> list[Subscription]:
        return [*self._all, *(s for group in self._by_session.values() for s in group)]

    def observe(self, observer: Callable[[Event], None], *facts: type) -> None:
        """Call ``observer`` with durable events of these facts, or of all, when published."""
        for fact in facts or (Event,):
            self._observers[fact].append(observer)

    # --- subscriptions -------------------------------------------------------------------------

    def add(self, subscription: Subscription) -> None:
        with self._lock:
            if self._closed:
                subscription.end()
            elif subscription.session_id is None:
                self._all.append(subscription)
            else:
                self._by_session.setdefault(subscription.session_id, []).append(subscription)

    def remove(self, subscription: Subscription) -> None:
        with self._lock:
            if subscription.session_id is None:
                if subscription in self._all:
                    self._all.remove(subscription)
                return
            group = self._by_session.get(subscription.session_id, [])
            if subscription in group:
                group.remove(subscription)
            if not group:
                self._by_session.pop(subscription.session_id, None)

    def subscriptions(self) -> int:
        with self._lock:
            return len(self._everyone())

    # --- publishing ----------------------------------------------------------------------------

    def committed(self, events: Sequence[Event]) -> None:
        """Publish a commit's events, and before them what others committed in between."""
        with self._lock:
            if self._closed:
                return  # what was under way for longer than the close could wait: nobody listens
            first = events[0].cursor
            assert first is not None, "a committed event has a cursor"
            if first > self.cursor + 1:
                self._publish_missed(upto=first - 1)
            self._publish(events)

    def poll(self) -> None:
        """Publish what other processes committed since the last look."""
        with self._lock:
            if not self._closed:
                self._publish_missed(upto=None)

    def _publish_missed(self, *, upto: int | None) -> None:
        while missed := self.journal.events(after=self.cursor, upto=upto, limit=_PAGE):
            first = missed[0].cursor
            assert first is not None, "a committed event has a cursor"
            self._skip(first - 1)
            self._publish(missed)
        if upto is not None:
            self._skip(upto)

    def _skip(self, cursor: int) -> None:
        """Go on after ``cursor``; what should be there and was not published is lost."""
        if cursor <= self.cursor:
            return
        self.cursor, self.lost = cursor, True
        for subscription in self._everyone():
            subscription.fall_behind()

    def _publish(self, events: Sequence[Event]) -> None:
        last, first = events[-1].cursor, events[0].cursor
        assert last is not None and first is not None, "a committed event has a cursor"
        if first <= self.cursor:
            # A look at the journal may have come before the writer told of its own commit.
            events = [event for event in events if (event.cursor or 0) > self.cursor]
        if not events:
            return
        self.cursor = last
        for subscription in self._all:
            subscription.push(events)
        if self._by_session:
            self._push_by_session(events)
        for event in events:
            fact = type(event.data)
            if fact in _LAST_WORDS:
                self._hush(event.data)
            for observer in (*self._observers[Event], *self._observers[fact]):
                observer(event)

    def _hush(self, fact: Any) -> None:
        """Detach the stream of what is over: no text comes after the news of its end."""
        stream = self._streams.get(fact.session_id)
        if stream is None:
            return
        if type(fact) is SessionDeleted or (
            fact.info.id == stream.message_id and fact.info.time.completed is not None
        ):
            del self._streams[fact.session_id]

    def _push_by_session(self, events: Sequence[Event]) -> None:
        mine: dict[str, list[Event]] = defaultdict(list)
        for event in events:
            if event.session_id in self._by_session:
                mine[event.session_id].append(event)
        for session_id, group in mine.items():
            for subscription in self._by_session[session_id]:
                subscription.push(group)

    # --- live text -----------------------------------------------------------------------------

    def attach(self, stream: Stream) -> None:
        with self._lock:
            self._streams[stream.session_id] = stream

    def detach(self, stream: Stream) -> None:
        """No delta of the stream is published from here on."""
        with self._lock:
            if self._streams.get(stream.session_id) is stream:
                del self._streams[stream.session_id]

    def hand_on(self, texts: Sequence[OpenText], *, written: bool = False) -> None:
        """Publish what came for these open texts, but for those whose stream was detached.

        What nobody hears stays where it is, unless it is ``written`` to rows: who joins later is
        told nothing older than those.
        """
        with self._lock:
            everyone = [each for each in self._all if each.wants_deltas]
            if not (everyone or self._by_session or written):
                return
            events = []
            for text in texts:
                session_id = text.stream.session_id
                if not text.news or self._streams.get(session_id) is not text.stream:
                    continue
                if everyone or session_id in self._by_session:
                    events.append(self._live(text.grown()))
                elif not written:
                    continue
                text.show()
            if events:
                self._push_deltas(everyone, events)

    def _live(self, fact: PartDelta) -> Event:
        return Event(fact.type, fact.session_id, None, None, self._wall_ms(), fact)

    def _push_deltas(self, everyone: Sequence[Subscription], events: Sequence[Event]) -> None:
        for subscription in everyone:
            subscription.push(events)
        if self._by_session:
            for event in events:
                for subscription in self._by_session.get(event.session_id, ()):
                    if subscription.wants_deltas:
                        subscription.push((event,))

    def join(self, subscription: Subscription) -> None:
        """Let a subscriber that has caught up follow live, from where every open text stands."""
        with self._lock:
            session_id = subscription.session_id
            streams = (
                list(self._streams.values())
                if session_id is None
                else [s for s in (self._streams.get(session_id),) if s is not None]
            )
            live = [self._live(fact) for stream in streams for fact in stream.text_so_far()]
            subscription.joined(live if subscription.wants_deltas else ())
        if streams:
            self.joined(streams)


class SignalPump:
    """Calls signal receivers in a lane of its own, from a bounded subscription."""

    def __init__(self, publisher: Publisher, sender: Any, lane: MakeLane) -> None:
        self._sender = sender
        self._told = False
        self._lane: Lane[None] = lane("understudy-signals", self._deliver, most=1, ended=self._end)
        self._subscription = _SignalSubscription(publisher, self._tell)

    def stop(self, timeout_s: float) -> None:
        """Deliver what is there, then end."""
        self._subscription.close()
        self._lane.close(timeout_s)

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._lane.put(None)

    def _deliver(self, _: list[None]) -> None:
        self._told = False
        try:
            while (event := self._subscription.poll()) is not None:
                self._send(event)
        except StoreError as error:  # it is still behind: the next event has it look again
            logger.warning("Signals wait for the journal: %s", error)

    def _end(self) -> None:
        self._deliver([])

    def _send(self, event: Event) -> None:
        signal = signals.BY_TYPE.get(event.type)
        if event.type in (OVERFLOW, GAP):
            logger.warning("Signal receivers fell behind: %s", event.data)
        if signal is None:
            return
        for receiver in list(signal.receivers_for(self._sender)):
            self._call(receiver, event)

    def _call(self, receiver: Callable[..., Any], event: Event) -> None:
        try:
            result = receiver(self._sender, event=event)
            if hasattr(result, "__await__"):
                result.close()
                raise TypeError("a signal receiver is a plain function, not a coroutine")
        except BaseException as error:  # SystemExit too: it would end the signals of everybody
            logger.exception("Receiver %r of %s failed", receiver, event.type)
            self._report(event, receiver, error)

    def _report(self, event: Event, receiver: Callable[..., Any], error: BaseException) -> None:
        for watcher in list(signals.receiver_failed.receivers_for(self._sender)):
            try:
                watcher(self._sender, event=event, receiver=receiver, error=error)
            except BaseException:
                logger.exception("A receiver of receiver_failed failed")


class _SignalSubscription(Subscription):
    """Costs nothing while nobody is connected to any signal."""

    @property
    def wants_deltas(self) -> bool:
        return bool(signals.message_part_delta.receivers)

    def __init__(self, publisher: Publisher, tell: Callable[[], None]) -> None:
        self._tell = tell
        super().__init__(publisher)

    def push(self, events: Sequence[Event]) -> None:
        if signals.wanted():
            super().push(events)
            self._tell()
        elif (cursor := events[-1].cursor) is not None:
            self.cursor = cursor  # who connects later is told what happens later
