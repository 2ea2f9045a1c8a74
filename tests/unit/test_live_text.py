"""Live text: a few texts open at a time, and what comes in one tick is handed on together."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from understudy.actors.live_text import OPENING_AT_ONCE, LiveTexts, OpenText
from understudy.actors.publisher import Publisher
from understudy.actors.subscription import Subscription
from understudy.store.records import TextPart


class Streaming:
    """A stream with one text."""

    def __init__(self, name: str, opening: list[str], *, wanted: bool = True) -> None:
        self.session_id = f"ses_{name}"
        self.message_id = f"msg_{name}"
        self.text = OpenText(self, f"prt_{name}", TextPart, 0)
        self._opening = opening
        self._wanted = wanted

    def open_texts(self) -> bool:
        if self._wanted:
            self._opening.append(self.session_id)
        return self._wanted

    def text_so_far(self) -> list[Any]:
        return [self.text.so_far()]


def opened_publisher() -> Publisher:
    journal = SimpleNamespace(cursors=lambda: (0, 0), events=lambda **_: [])
    publisher = Publisher(None, wall_ms=lambda: 0)
    publisher.open(journal)  # type: ignore[arg-type]
    return publisher


def test_only_a_few_texts_open_at_a_time_and_the_others_follow_in_order():
    async def play() -> None:
        opening: list[str] = []
        live = LiveTexts(Publisher(None, wall_ms=lambda: 0))
        streams = [Streaming(f"{n:03d}", opening) for n in range(3 * OPENING_AT_ONCE)]
        for stream in streams:
            live.open(stream)
        assert not opening  # an answer that is there at once is committed whole
        await asyncio.sleep(0)
        assert opening == [each.session_id for each in streams[:OPENING_AT_ONCE]]
        for count in range(1, len(streams) - OPENING_AT_ONCE + 1):
            live.opened()
            assert opening == [each.session_id for each in streams[: OPENING_AT_ONCE + count]]

    asyncio.run(play())


def test_a_stream_that_has_ended_gives_its_place_to_the_next():
    async def play() -> None:
        opening: list[str] = []
        live = LiveTexts(Publisher(None, wall_ms=lambda: 0))
        for n in range(OPENING_AT_ONCE):
            live.open(Streaming(f"gone{n}", opening, wanted=False))
        live.open(Streaming("next", opening))
        await asyncio.sleep(0)
        assert opening == ["ses_next"]

    asyncio.run(play())


def test_what_comes_in_one_tick_is_handed_on_together_and_in_order():
    async def play() -> None:
        publisher = opened_publisher()
        live = LiveTexts(publisher)
        streams = [Streaming(name, []) for name in "ab"]
        everything = Subscription(publisher)
        one = Subscription(publisher, session_id="ses_b")
        quiet = Subscription(publisher, deltas=False)
        for stream in streams:
            publisher.attach(stream)
        for word in ("to ", "be "):
            for stream in streams:
                stream.text.add(word)
                live.hand_on(stream.text)
        assert everything.poll() is None
        await asyncio.sleep(0)
        told = [(e.session_id, e.data.offset, e.data.delta) for e in _all(everything)]
        assert told == [("ses_a", 0, "to be "), ("ses_b", 0, "to be ")]
        streams[1].text.add("or not")
        live.hand_on(streams[1].text)
        await asyncio.sleep(0)
        told = [(e.session_id, e.data.offset, e.data.delta) for e in _all(one)]
        assert told == [("ses_b", 0, "to be "), ("ses_b", 6, "or not")]
        assert not _all(quiet)
        publisher.close(15)

    asyncio.run(play())


def test_text_of_a_stream_that_was_detached_is_not_handed_on():
    async def play() -> None:
        publisher = opened_publisher()
        live = LiveTexts(publisher)
        stream = Streaming("a", [])
        everything = Subscription(publisher)
        publisher.attach(stream)
        stream.text.add("late")
        live.hand_on(stream.text)
        publisher.detach(stream)
        await asyncio.sleep(0)
        assert not _all(everything)
        assert stream.text.so_far().delta == ""
        publisher.close(15)

    asyncio.run(play())


def _all(subscription: Subscription) -> list[Any]:
    return list(iter(subscription.poll, None))
