"""What clients are told of open texts: a client that appends and replaces has the text, always."""

import random

import pytest

from understudy.gateway.http.texts import Texts
from understudy.store.events import (
    Event,
    EventsGap,
    MessageUpdated,
    PartDelta,
    PartUpdated,
    SessionDeleted,
)
from understudy.store.records import (
    AssistantMessage,
    MessageTime,
    Session,
    SessionTime,
    Span,
    Tokens,
)
from understudy.store.records import TextPart as Part

TEXT = "The whole answer, letter by letter."


def opened(upto, *, end=None):
    part = Part(
        id="prt_1",
        session_id="ses_1",
        message_id="msg_1",
        text=TEXT[:upto],
        time=Span(start=1, end=end),
    )
    return event(PartUpdated(session_id="ses_1", part=part, time=1), cursor=1)


def delta(start, stop):
    fact = PartDelta(
        session_id="ses_1",
        message_id="msg_1",
        part_id="prt_1",
        field="text",
        delta=TEXT[start:stop],
        offset=start,
    )
    return event(fact)


def event(fact, cursor=None):
    return Event(fact.type, "ses_1", cursor, cursor, 1, fact)


def shown(events, text=""):
    """What a client shows that knows of no offsets, after each event."""
    for each in events:
        if each is not None:
            fact = each.data
            text = text + fact.delta if isinstance(fact, PartDelta) else fact.part.text
            yield text


def test_a_part_that_was_written_down_before_the_last_deltas_takes_none_of_them_back():
    texts = Texts()
    told = [texts.told(each) for each in (opened(3), delta(3, 9), opened(5), delta(9, 12))]
    assert list(shown(told)) == [TEXT[:3], TEXT[:9], TEXT[:9], TEXT[:12]]
    assert [each.cursor for each in told] == [1, None, 1, None]


def test_what_is_told_again_is_told_once():
    texts = Texts()
    told = [texts.told(each) for each in (opened(0), delta(0, 9), delta(0, 12), delta(4, 12))]
    assert list(shown(told)) == ["", TEXT[:9], TEXT[:12]]
    assert told[-1] is None


@pytest.mark.parametrize("seed", range(50))
def test_a_client_has_the_text_whenever_it_joins(seed):
    chance = random.Random(seed)
    texts, told, size = Texts(), [], 0
    joined, begins = None, chance.randrange(1, 20)
    for number in range(20):
        if number == 0 or chance.random() < 0.3:
            size = max(size, written := chance.randrange(size + 1))
            told.append(texts.told(opened(written)))
        else:
            start, size = chance.randrange(size + 1), min(len(TEXT), size + chance.randrange(4))
            told.append(texts.told(delta(start, size)))
        if number == begins:
            joined = len(told), [each.data.part.text for each in texts.open()]
        assert list(shown(told))[-1] == TEXT[:size]
    place, (text,) = joined
    assert [text, *shown(told[place:], text)][-1] == TEXT[:size]


MESSAGE = AssistantMessage(
    id="msg_1",
    session_id="ses_1",
    parent_id="msg_0",
    turn=1,
    agent="build",
    mode="build",
    tokens=Tokens(),
    provider_id="p",
    model_id="m",
    time=MessageTime(created=1, completed=2),
)
GONE = Session(id="ses_1", title="", time=SessionTime(created=1, updated=1))


@pytest.mark.parametrize(
    "last",
    [
        opened(9, end=2),
        event(MessageUpdated(session_id="ses_1", info=MESSAGE), cursor=2),
        event(SessionDeleted(session_id="ses_1", info=GONE), cursor=2),
        event(EventsGap(session_id="", after=1, oldest=5)),
    ],
    ids=lambda last: last.type,
)
def test_what_has_ended_is_no_open_text(last):
    texts = Texts()
    assert [texts.told(each) for each in (opened(0), delta(0, 9))][1] is not None
    assert len(list(texts.open())) == 1
    assert texts.told(last) is last
    assert list(texts.open()) == []


def test_a_text_whose_beginning_nobody_saw_is_not_told_as_a_whole():
    texts = Texts()
    assert texts.told(delta(5, 9)).data.delta == TEXT[5:9]
    assert texts.told(delta(5, 9)) is None
    assert list(texts.open()) == []
