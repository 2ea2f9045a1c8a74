"""Subscriptions to a journal that is trimmed under their hands."""

from __future__ import annotations

from typing import Any

from understudy.actors.publisher import Publisher
from understudy.actors.subscription import Subscription
from understudy.store.events import Event, EventsGap, PartDelta, SessionDeleted


class Trimmed:
    """A journal of deletions with these cursors; ``trim_after_page`` is its oldest from then on."""

    def __init__(self, oldest: int, newest: int) -> None:
        self.oldest = oldest
        self.newest = newest
        self.trim_after_page: int | None = None

    def cursors(self) -> tuple[int, int]:
        return self.oldest, self.newest

    def events(self, *, after: int, upto: int | None, limit: int, **_: Any) -> list[Event]:
        page = range(max(after + 1, self.oldest), (upto or self.newest) + 1)[:limit]
        self.oldest = self.trim_after_page or self.oldest
        return [deletion(cursor) for cursor in page]


def deletion(cursor: int) -> Event:
    fact = SessionDeleted(session_id="ses_a", info=None)  # type: ignore[arg-type]
    return Event(fact.type, "ses_a", cursor, cursor, 0, fact)


def published(journal: Trimmed, upto: int) -> Publisher:
    publisher = Publisher(None, wall_ms=lambda: 0)
    publisher.open(journal)  # type: ignore[arg-type]
    publisher.cursor = upto
    return publisher


def told(subscription: Subscription) -> list[Any]:
    """What there is to take: cursors, and a gap as what it is between."""
    events = iter(subscription.poll, None)
    return [
        (e.data.after, e.data.oldest) if type(e.data) is EventsGap else e.cursor for e in events
    ]


def test_a_gap_that_grows_before_its_first_event_comes_is_told_again():
    journal = Trimmed(61, 120)
    publisher = published(journal, upto=31)  # others wrote since, and trimmed
    subscription = Subscription(publisher, after=23)
    assert told(subscription) == [(23, 61)]
    assert subscription.cursor == 60
    journal.oldest = 73
    publisher.poll()
    assert told(subscription) == [(60, 73), *range(73, 121)]
    subscription.close()
    subscription._publisher.close(15)


def test_what_was_read_before_it_was_trimmed_is_no_gap():
    journal = Trimmed(1, 20)
    journal.trim_after_page = 15
    subscription = Subscription(published(journal, upto=20), after=0)
    assert told(subscription) == list(range(1, 21))
    subscription.close()
    subscription._publisher.close(15)


class Writing:
    """A stream that has written this of one text."""

    message_id = "msg_a"

    def __init__(self, session_id: str, text: str) -> None:
        self.session_id = session_id
        self.text = text

    def text_so_far(self) -> list[PartDelta]:
        return [
            PartDelta(
                session_id=self.session_id,
                message_id=self.message_id,
                part_id="prt_a",
                field="text",
                offset=0,
                delta=self.text,
            )
        ]

    def event(self) -> Event:
        return Event(PartDelta.type, self.session_id, None, None, 0, self.text_so_far()[0])


def texts(subscription: Subscription) -> list[str]:
    return [e.data.delta for e in iter(subscription.poll, None) if type(e.data) is PartDelta]


def test_who_follows_from_a_snapshot_is_told_no_text_that_ended_before_it():
    publisher = published(Trimmed(1, 5), upto=3)
    over, open_ = Writing("ses_a", "over"), Writing("ses_b", "open")
    publisher.attach(over)  # type: ignore[arg-type]
    publisher.attach(open_)  # type: ignore[arg-type]
    with Subscription(publisher, after=5) as subscription:
        assert texts(subscription) == []
        subscription.push([over.event()])
        assert texts(subscription) == []
        publisher.poll()  # the news of what the snapshot knows
        assert texts(subscription) == ["open"]
        subscription.push([open_.event()])
        assert texts(subscription) == ["open"]
    publisher.close(15)


def test_who_follows_from_a_snapshot_is_told_what_is_open_with_the_next_piece_of_it():
    publisher = published(Trimmed(1, 5), upto=3)
    with Subscription(publisher, after=5, session_id="ses_b") as subscription:
        assert texts(subscription) == []
        publisher.poll()  # nothing of ses_b
        stream = Writing("ses_b", "open")
        publisher.attach(stream)  # type: ignore[arg-type]
        subscription.push([stream.event()])
        assert texts(subscription) == ["open"]
    publisher.close(15)
