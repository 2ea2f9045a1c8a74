"""A model's stream beside its commits, which the test makes when it likes: no time passes."""

import asyncio
import itertools
from types import SimpleNamespace

import pytest

from understudy.actors import live_text
from understudy.actors.core.state import Limits
from understudy.actors.live_text import LiveTexts
from understudy.actors.models.protocol import Finish, ReasoningDelta, TextDelta
from understudy.actors.pace import Pace
from understudy.actors.publisher import Publisher
from understudy.actors.silence import Silences
from understudy.actors.streams import ModelStream
from understudy.actors.subscription import Subscription
from understudy.errors import StoreBusy


def soon(call):
    asyncio.get_running_loop().call_soon(call)


class Executor:
    """What a stream needs of one. What it sends waits to be committed."""

    def __init__(self):
        self.publisher = Publisher(None, wall_ms=lambda: 0)
        self.live = LiveTexts(self.publisher, soon)
        self.silences = Silences(60.0)
        self.pace = Pace()
        self.rules = SimpleNamespace(limits=Limits())
        self.clock = SimpleNamespace(wall_ms=lambda: 1)
        self.numbers = itertools.count(1)
        self.sent = []
        self.rows = {}

    def new_id(self, prefix):
        return f"{prefix}_{next(self.numbers)}"

    def send(self, session_id, command, done=None):
        self.sent.append((session_id, command, done))

    async def commit(self, error=None):
        """The oldest that was sent; or it fails."""
        _, command, done = self.sent.pop(0)
        if error is not None:
            done.fail(error)
        else:
            self.rows.update({part.id: part.text for part in command.parts})
            done.set(None)
        await settled()


class Said:
    """A model that says what it is told to."""

    model_id = "said"

    def __init__(self, executor, name):
        self.words = asyncio.Queue()
        self.of = ModelStream(executor, self, session_id=f"ses_{name}", message_id=f"msg_{name}")
        self.call = asyncio.ensure_future(self.of.call(SimpleNamespace()))

    async def stream(self, _):
        while (word := await self.words.get()) is not None:
            yield word
        yield Finish("stop")

    async def say(self, *words):
        for word in words:
            self.words.put_nowait(TextDelta(word) if isinstance(word, str) else word)
        await settled()

    async def end(self):
        await self.say(None)
        await self.call


async def settled():
    for _ in range(12):
        await asyncio.sleep(0)


def heard(subscription):
    """All live text by part, as (offset, text); without a gap."""
    texts = {}
    for event in iter(subscription.poll, None):
        fact = event.data
        begin, text = texts.get(fact.part_id, (fact.offset, ""))
        assert fact.offset == begin + len(text), "a delta beyond what was told"
        texts[fact.part_id] = (begin, text + fact.delta)
    return texts


@pytest.fixture
def play(monkeypatch):
    """Run a scene in a loop where what is due later is due at once."""
    monkeypatch.setattr(live_text, "FLUSH_AFTER_S", 0.0)
    monkeypatch.setattr(live_text, "FLUSH_EVERY_S", 0.0)

    def run(scene):
        async def begin():
            await asyncio.wait_for(scene(Executor()), 15)

        asyncio.run(begin())

    return run


@pytest.mark.parametrize("listens", [True, False])
def test_what_is_said_during_a_flush_is_flushed_next_though_nothing_follows(play, listens):
    async def scene(executor):
        listener = Subscription(executor.publisher) if listens else None
        model = Said(executor, "a")
        await model.say("first ")
        await executor.commit()
        await model.say("second ")
        assert len(executor.sent) == 1
        await model.say("third")  # while that is under way
        await executor.commit()
        assert len(executor.sent) == 1
        await executor.commit()
        assert executor.rows == {"prt_1": "first second third"}
        assert not executor.sent
        if listener is not None:
            assert heard(listener) == {"prt_1": (6, "second third")}
        await model.end()

    play(scene)


def test_one_flush_of_a_stream_is_under_way_though_a_new_text_waits_to_be_opened(play, monkeypatch):
    monkeypatch.setattr(live_text, "OPENING_AT_ONCE", 1)

    async def scene(executor):
        listener = Subscription(executor.publisher)
        one, other = Said(executor, "one"), Said(executor, "other")
        await one.say(ReasoningDelta("hm"))
        await executor.commit()
        await other.say("b")  # its opening is under way: nobody else's may begin
        await one.say("12")  # waits to be opened, and is flushed with what came before
        await one.say("34")
        for _ in range(6):
            under_way = [session_id for session_id, _, _ in executor.sent]
            assert len(under_way) == len(set(under_way))
            if executor.sent:
                await executor.commit()
        await one.say("56")
        while executor.sent:
            await executor.commit()
        assert executor.rows == {"prt_1": "hm", "prt_2": "b", "prt_3": "123456"}
        assert set(heard(listener)) <= set(executor.rows)
        await one.end()
        await other.end()

    play(scene)


def test_what_comes_while_a_text_opens_is_told_as_soon_as_it_is_open(play, monkeypatch):
    monkeypatch.setattr(live_text, "FLUSH_AFTER_S", 1e6)

    async def scene(executor):
        listener = Subscription(executor.publisher)
        model = Said(executor, "a")
        await model.say("first ", ReasoningDelta("hm"))
        await model.say(" second", ReasoningDelta(" so"))
        assert len(executor.sent) == 1
        await executor.commit()  # and what began meanwhile is opened
        assert heard(listener) == {}
        await executor.commit()
        await model.say(ReasoningDelta("!"))
        assert heard(listener) == {"prt_4": (3, "!")}
        assert executor.rows == {
            "prt_1": "first ",
            "prt_2": "hm",
            "prt_3": " second",
            "prt_4": " so",
        }
        await model.say(ReasoningDelta("?"), "third")
        await model.say("fourth")
        await executor.commit()
        assert heard(listener) == {"prt_4": (4, "?"), "prt_5": (5, "fourth")}
        await model.end()

    play(scene)


def test_a_flush_tells_listeners_first_what_it_writes(play):
    async def scene(executor):
        listener = Subscription(executor.publisher)
        told = []

        class Flushing(Said):
            async def stream(self, _):
                async for word in super().stream(_):
                    yield word
                    if executor.rows:
                        self.of.flush()
                        told.append(heard(listener))

        model = Flushing(executor, "a")
        await model.say("first ")
        await executor.commit()
        await model.say("second")
        assert told == [{"prt_1": (6, "second")}]
        await executor.commit()
        assert heard(listener) == {}
        assert executor.rows == {"prt_1": "first second"}
        model.call.cancel()
        await asyncio.gather(model.call, return_exceptions=True)

    play(scene)


def test_a_flush_that_failed_is_made_again(play):
    async def scene(executor):
        model = Said(executor, "a")
        await model.say("first ")
        await executor.commit(StoreBusy("not now"))
        await executor.commit()
        await model.say("second")
        await executor.commit(StoreBusy("not now"))
        await executor.commit()
        assert executor.rows == {"prt_1": "first second"}
        await model.end()

    play(scene)


@pytest.mark.parametrize("opened", [True, False])
def test_nothing_is_flushed_after_the_end_and_the_next_text_opens(play, monkeypatch, opened):
    monkeypatch.setattr(live_text, "OPENING_AT_ONCE", 1)

    async def scene(executor):
        one, other = Said(executor, "one"), Said(executor, "other")
        await one.say("a")
        if opened:
            await executor.commit()
        await one.say("b")  # its flush is under way, or it waits
        await other.say("c")
        await one.say("d")
        await one.end()
        assert [session_id for session_id, _, _ in executor.sent] == ["ses_one", "ses_other"]
        await executor.commit()
        await executor.commit()
        assert not executor.sent
        assert executor.rows["prt_2"] == "c"
        await other.end()

    play(scene)


def test_a_half_of_a_character_is_flushed_when_the_other_comes(play):
    async def scene(executor):
        listener = Subscription(executor.publisher)
        model = Said(executor, "a")
        await model.say("x\ud83d")
        await executor.commit()
        assert executor.rows == {"prt_1": "x"}
        await model.say("\ude00")
        await executor.commit()
        assert executor.rows == {"prt_1": "x\U0001f600"}
        assert heard(listener) == {"prt_1": (1, "\U0001f600")}
        await model.end()

    play(scene)


def test_who_joins_while_the_model_pauses_is_told_all_that_it_said(play):
    async def scene(executor):
        model = Said(executor, "a")
        await model.say("first ")
        await executor.commit()
        await model.say("second ", "third")  # nobody hears it
        late = Subscription(executor.publisher, session_id="ses_a")
        executor.publisher.join(late)
        await settled()
        assert heard(late) == {"prt_1": (0, "first second third")}
        await model.say(" fourth")
        assert heard(late) == {"prt_1": (18, " fourth")}
        await model.end()

    play(scene)


@pytest.mark.parametrize("committed", [True, False])
def test_who_joins_is_told_nothing_older_than_what_was_written(play, committed):
    async def scene(executor):
        model = Said(executor, "a")
        await model.say("first ")
        await executor.commit()
        await model.say("second")  # its flush is under way
        if committed:
            await executor.commit()
        late = Subscription(executor.publisher)
        executor.publisher.join(late)
        assert heard(late) == {"prt_1": (0, "first second")}
        await model.end()

    play(scene)


def test_what_nobody_hears_waits_for_whoever_hears_it(play, monkeypatch):
    monkeypatch.setattr(live_text, "FLUSH_AFTER_S", 1e6)

    async def scene(executor):
        elsewhere = Subscription(executor.publisher, session_id="ses_other")
        model = Said(executor, "a")
        await model.say("first ")
        await executor.commit()
        await model.say("second ", "third")
        late = Subscription(executor.publisher)  # which a receiver of signals is: it never joins
        await model.say(" fourth")
        assert heard(late) == {"prt_1": (6, "second third fourth")}
        assert heard(elsewhere) == {}
        await model.end()

    play(scene)
