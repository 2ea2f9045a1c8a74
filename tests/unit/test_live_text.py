"""Live text: a few texts open at a time, and what comes in one tick is handed on together."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from understudy.actors.live_text import (
    FLUSH_AFTER_S,
    FLUSH_EVERY_S,
    FLUSHES_AT_ONCE,
    OPENING_AT_ONCE,
    LiveTexts,
    OpenText,
)
from understudy.actors.publisher import Publisher
from understudy.actors.subscription import Subscription
from understudy.store.records import TextPart


def soon(call: Any) -> None:
    asyncio.get_running_loop().call_soon(call)


class Streaming:
    """A stream with one text."""

    def __init__(self, name: str, opening: list[str], *, wanted: bool = True) -> None:
        self.session_id = f"ses_{name}"
        self.message_id = f"msg_{name}"
        self.text = OpenText(self, f"prt_{name}", TextPart, 0)
        self._opening = opening
        self._wanted = wanted

    def flush(self) -> bool:
        if self._wanted:
            self._opening.append(self.session_id)
        return self._wanted

    def hand_on(self) -> None:
        raise NotImplementedError

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
        live = LiveTexts(Publisher(None, wall_ms=lambda: 0), soon)
        streams = [Streaming(f"{n:03d}", opening) for n in range(3 * OPENING_AT_ONCE)]
        for stream in streams:
            live.open_soon(stream)
        assert not opening  # an answer that is there at once is committed whole
        await asyncio.sleep(0)
        assert opening == [each.session_id for each in streams[:OPENING_AT_ONCE]]
        for count in range(1, len(streams) - OPENING_AT_ONCE + 1):
            live.flushed(streams[count - 1])
            assert opening == [each.session_id for each in streams[: OPENING_AT_ONCE + count]]

    asyncio.run(play())


def test_a_stream_that_has_ended_gives_its_place_to_the_next():
    async def play() -> None:
        opening: list[str] = []
        live = LiveTexts(Publisher(None, wall_ms=lambda: 0), soon)
        for n in range(OPENING_AT_ONCE):
            live.open_soon(Streaming(f"gone{n}", opening, wanted=False))
        live.open_soon(Streaming("next", opening))
        await asyncio.sleep(0)
        assert opening == ["ses_next"]

    asyncio.run(play())


def test_a_stream_that_ended_before_its_turn_opens_nothing():
    async def play() -> None:
        opening: list[str] = []
        live = LiveTexts(Publisher(None, wall_ms=lambda: 0), soon)
        gone = Streaming("gone", opening)
        live.open_soon(gone)
        live.forget(gone)
        live.open_soon(Streaming("next", opening))
        await asyncio.sleep(0)
        assert opening == ["ses_next"]

    asyncio.run(play())


def test_a_half_of_a_character_is_kept_for_the_other_and_else_replaced():
    text = Streaming("a", []).text
    assert text.add("x\ud83d")
    assert text.text() == "x"
    assert text.add("y")
    assert text.text() == "x?y"
    assert not text.add("\ud83d")
    assert text.add("\ude00")
    assert not text.add("\ud83d")
    for _ in range(2):
        text.end()
        assert text.text() == "x?y\U0001f600?"


def test_what_comes_in_one_tick_is_handed_on_together_and_in_order():
    async def play() -> None:
        publisher = opened_publisher()
        live = LiveTexts(publisher, soon)
        streams = [Streaming(name, []) for name in "ab"]
        everything = Subscription(publisher)
        one = Subscription(publisher, session_id="ses_b")
        quiet = Subscription(publisher, deltas=False)
        for stream in streams:
            publisher.attach(stream)
        for word in ("to ", "be "):
            for stream in streams:
                stream.text.add(word)
                live.hand_on_soon(stream.text)
        assert everything.poll() is None
        await asyncio.sleep(0)
        told = [(e.session_id, e.data.offset, e.data.delta) for e in _all(everything)]
        assert told == [("ses_a", 0, "to be "), ("ses_b", 0, "to be ")]
        streams[1].text.add("or not")
        live.hand_on_soon(streams[1].text)
        await asyncio.sleep(0)
        told = [(e.session_id, e.data.offset, e.data.delta) for e in _all(one)]
        assert told == [("ses_b", 0, "to be "), ("ses_b", 6, "or not")]
        assert not _all(quiet)
        publisher.close(15)

    asyncio.run(play())


def test_text_of_a_stream_that_was_detached_is_not_handed_on():
    async def play() -> None:
        publisher = opened_publisher()
        live = LiveTexts(publisher, soon)
        stream = Streaming("a", [])
        everything = Subscription(publisher)
        publisher.attach(stream)
        stream.text.add("late")
        live.hand_on_soon(stream.text)
        publisher.detach(stream)
        await asyncio.sleep(0)
        assert not _all(everything)
        assert stream.text.so_far().delta == ""
        publisher.close(15)

    asyncio.run(play())


class Timers:
    """A loop in which time passes as the test says."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.due: list[tuple[float, Any]] = []
        loop: Any = asyncio.get_running_loop()
        loop.time = lambda: self.now_s
        loop.call_at = lambda due_s, call: self.due.append((due_s, call))

    def next(self) -> float:
        """Let time pass to the one timer there is."""
        [(self.now_s, call)] = self.due
        self.due.clear()
        call()
        return self.now_s

    def give_back(self) -> None:
        loop: Any = asyncio.get_running_loop()
        del loop.time, loop.call_at


def test_texts_are_flushed_in_order_a_while_later_and_a_group_at_a_time():
    async def play() -> None:
        timers, flushed = Timers(), []
        live = LiveTexts(Publisher(None, wall_ms=lambda: 0), soon)
        names = [f"{n:03d}" for n in range(FLUSHES_AT_ONCE + 1)]
        for name in names:
            stream = Streaming(name, flushed)
            live.flush_later(stream)
            live.flush_later(Streaming("nothing", flushed, wanted=False))
            live.flush_later(stream)  # it waits already
        timers.now_s += FLUSH_AFTER_S / 2
        live.flush_later(stream)
        live.flush_later(Streaming("later", flushed))
        seen = []
        while timers.due:
            due_s, before = timers.next(), len(flushed)
            seen.append((round(due_s, 6), before))
        timers.give_back()
        assert flushed == [*(f"ses_{name}" for name in names), "ses_later"]
        first_s = 1_000.0 + FLUSH_AFTER_S
        assert seen == [
            (first_s, FLUSHES_AT_ONCE),
            (first_s + FLUSH_EVERY_S, FLUSHES_AT_ONCE + 1),
            (first_s + FLUSH_AFTER_S / 2, FLUSHES_AT_ONCE + 2),
        ]

    asyncio.run(play())


def test_a_stream_that_has_ended_waits_for_nothing_and_leaves_one_timer():
    async def play() -> None:
        timers, flushed = Timers(), []
        live = LiveTexts(Publisher(None, wall_ms=lambda: 0), soon)
        for name in "abc":
            gone = Streaming(name, flushed)
            live.flush_later(gone)
            live.forget(gone)
        live.flush_later(Streaming("d", flushed))
        while timers.due:
            timers.next()
        timers.give_back()
        assert flushed == ["ses_d"]

    asyncio.run(play())


def test_a_flush_that_raises_stops_no_other():
    async def play() -> None:
        timers, flushed = Timers(), []
        live = LiveTexts(Publisher(None, wall_ms=lambda: 0), soon)
        broken = Streaming("broken", flushed)
        broken.flush = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        live.flush_later(broken)
        live.flush_later(Streaming("next", flushed))
        with pytest.raises(ZeroDivisionError):
            timers.next()
        timers.next()
        timers.give_back()
        assert flushed == ["ses_next"]
        assert not timers.due

    asyncio.run(play())


def _all(subscription: Subscription) -> list[Any]:
    return list(iter(subscription.poll, None))
