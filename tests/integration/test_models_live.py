"""Models that fail in every way: the turn says so, or goes on, and text is said once."""

import asyncio
import math
import threading
import time

import pytest

from understudy import CompactionRules, Limits, ScriptedModel, errors, tool
from understudy.actors.models.protocol import Finish, ReasoningDelta, TextDelta, ToolCall, Usage
from understudy.actors.models.scripted import (
    Call,
    End,
    Fail,
    Gate,
    Say,
    Stall,
    Think,
    Use,
    Wait,
)
from understudy.errors import ModelError, ModelOverflow, ModelUnavailable
from understudy.store.records import Tokens

AT_ONCE_S = 1.0
HASTY = Limits(model_attempts=2, stream_idle_s=0.15)


class Junk:
    """A model whose stream is whatever ``make`` gives."""

    provider_id = model_id = "junk"
    context_limit, output_limit = 200_000, 8_192

    def __init__(self, make):
        self.make = make
        self.calls = 0

    def stream(self, request):
        self.calls += 1
        return self.make(self.calls)


async def fine():
    yield TextDelta("fine")
    yield Finish("stop")


async def events(*items):
    for item in items:
        if isinstance(item, BaseException):
            raise item
        yield item


NONSENSE = {
    "an exception at once": lambda: 1 / 0,
    "None": lambda: None,
    "a list": lambda: [TextDelta("a")],
    "a coroutine function": lambda: asyncio.sleep,
    "no event": lambda: events("text"),
    "None as an event": lambda: events(None),
    "text that is a number": lambda: events(TextDelta(5), Finish("stop")),
    "text that is None": lambda: events(TextDelta(None), Finish("stop")),
    "a finish of a number": lambda: events(TextDelta("a"), Finish(5)),
    "a call without a name": lambda: events(ToolCall("1", None, "{}"), Finish("stop")),
    "a call with arguments of a number": lambda: events(ToolCall("1", "x", 5), Finish("stop")),
    "a call id of a number": lambda: events(ToolCall(7, "x", "{}"), Finish("stop")),
    "usage of nothing": lambda: events(TextDelta("a"), Usage(None, 0.0), Finish("stop")),
    "a cost that is no number": lambda: events(Usage(Tokens(), math.nan), Finish("stop")),
    "a cost without end": lambda: events(Usage(Tokens(), math.inf), Finish("stop")),
    "a cost below nothing": lambda: events(Usage(Tokens(), -0.1), Finish("stop")),
    "a surrogate in an error": lambda: events(ModelError("\ud800")),
    "an error without words": lambda: events(ValueError()),
    "SystemExit": lambda: events(SystemExit(1)),
    "KeyboardInterrupt": lambda: events(KeyboardInterrupt()),
    "GeneratorExit": lambda: events(GeneratorExit()),
    "GeneratorExit after text": lambda: events(TextDelta("a"), GeneratorExit()),
    "CancelledError": lambda: events(asyncio.CancelledError()),
    "a BaseException": lambda: events(BaseException("gone")),
    "StopAsyncIteration": lambda: events(StopAsyncIteration()),
    "RecursionError": lambda: events(RecursionError()),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_of_a_model_fails_the_turn_and_nothing_else(opened, case):
    model = Junk(lambda n: NONSENSE[case]() if n == 1 else fine())
    runtime = opened(model, limits=HASTY)
    session, other = runtime.create_session(), runtime.create_session()
    with pytest.raises(errors.TurnFailed):
        session.prompt("go").result(timeout_s=10)
    assert runtime.restarts == 0
    assert other.prompt("go").result(timeout_s=10).text == "fine"
    assert session.prompt("go").result(timeout_s=10).text == "fine"
    assert session.status().type == "idle"


@pytest.mark.parametrize("text", ["\ud800", "a\0b", "x" * 300_000, "\U0001f600"])
def test_any_text_of_a_model_is_kept_or_mended(opened, text):
    runtime = opened(Junk(lambda n: events(TextDelta(text), Finish("stop"))))
    session = runtime.create_session()
    said = session.prompt("go").result(timeout_s=10).text
    assert said == text.encode("utf-8", "replace").decode()
    assert runtime.restarts == 0


HIGH, LOW = "\ud83d", "\ude00"  # the halves of 😀 in UTF-16, as JSON's escapes have them
HALVES = {
    "in two deltas": ([TextDelta(f"a{HIGH}"), TextDelta(f"{LOW}b")], ["a😀b"]),
    "in deltas of their own": ([TextDelta(HIGH), TextDelta(LOW)], ["😀"]),
    "in one delta": ([TextDelta(f"a{HIGH}{LOW}b")], ["a😀b"]),
    "around an empty one": ([TextDelta(HIGH), TextDelta(""), TextDelta(LOW)], ["😀"]),
    "around usage": ([TextDelta(HIGH), Usage(Tokens(), 0.0), TextDelta(LOW)], ["😀"]),
    "two in a row": ([TextDelta(f"{HIGH}{LOW}{HIGH}"), TextDelta(f"{LOW}")], ["😀😀"]),
    "one without its second": ([TextDelta(f"a{HIGH}"), TextDelta("b")], ["a?b"]),
    "one without its first": ([TextDelta("a"), TextDelta(f"{LOW}b")], ["a?b"]),
    "one at the end": ([TextDelta(f"a{HIGH}")], ["a?"]),
    "one alone": ([TextDelta(HIGH)], ["?"]),
    "one of another text": ([ReasoningDelta(f"a{HIGH}"), TextDelta(f"{LOW}b")], ["a?", "?b"]),
}


@pytest.mark.parametrize("case", HALVES)
def test_a_character_that_comes_in_two_halves_is_one(opened, case):
    deltas, texts = HALVES[case]
    runtime = opened(Junk(lambda n: events(*deltas, Finish("stop"))))
    reply = runtime.create_session().prompt("go").result(timeout_s=15)
    assert [part.text for part in reply.parts if hasattr(part, "text")] == texts


def test_live_text_and_final_text_agree_on_a_character_in_two_halves(opened, watching):
    shown = threading.Event()

    async def halves():
        yield TextDelta(f"one {HIGH}")
        await asyncio.to_thread(shown.wait, 15)  # the row of the first words is committed
        for words in (LOW, " two ", HIGH, f"{LOW}{HIGH}", "three ", HIGH):
            yield TextDelta(words)
            await asyncio.sleep(0.001)
        yield Finish("stop")

    runtime = opened(Junk(lambda n: halves()))
    session = runtime.create_session()
    watch = watching(session, after=0)
    turn = session.prompt("go")
    first = watch.until(
        lambda e: e.type == "message.part.updated" and getattr(e.data.part, "text", "") == "one "
    )
    shown.set()
    assert turn.result(timeout_s=15).text == "one 😀 two 😀?three ?"
    watch.until("session.idle")
    text = "one "
    deltas = [e.data for e in watch.seen if e.type == "message.part.delta"]
    for fact in deltas:
        assert fact.part_id == first.data.part.id
        assert fact.delta
        text = text[: fact.offset] + fact.delta
    assert text == "one 😀 two 😀?three ?"


@pytest.mark.parametrize("written", [f"{HIGH}{LOW}", "😀", "\\ud83d\\ude00"])
def test_a_call_has_the_characters_that_the_text_has(opened, written):
    taken = []

    @tool
    def note(text: str) -> str:
        """Note it."""
        taken.append(text)
        return text

    call = ToolCall("1", "note", f'{{"text": "{written}"}}')
    runtime = opened(
        Junk(lambda n: events(call, Finish("tool-calls")) if n == 1 else fine()), tools=[note]
    )
    session = runtime.create_session()
    session.prompt("go").result(timeout_s=15)
    assert taken == ["😀"]
    (part,) = [part for part in session.messages()[1].parts if part.type == "tool"]
    assert part.state.input == {"text": "😀"}


async def blanks():
    while True:
        yield TextDelta("")
        yield ReasoningDelta("")


def test_empty_deltas_for_ever_are_silence(opened):
    model = Junk(lambda n: blanks())
    runtime = opened(model, limits=HASTY)
    session = runtime.create_session()
    with pytest.raises(errors.TurnFailed):
        session.prompt("go").result(timeout_s=15)
    assert model.calls == 2
    assert session.messages()[-1].text == ""


def test_empty_deltas_part_no_text(opened):
    said = [TextDelta("one "), ReasoningDelta(""), TextDelta(""), TextDelta("two")]
    runtime = opened(Junk(lambda n: events(ReasoningDelta(""), *said, Finish("stop"))))
    reply = runtime.create_session().prompt("go").result(timeout_s=15)
    assert [part.text for part in reply.parts if hasattr(part, "text")] == ["one two"]


def test_a_model_that_raises_fails_the_turn_with_its_words(opened):
    runtime = opened(ScriptedModel([[Say("well "), Fail(ModelError("no more"))], "next"]))
    session = runtime.create_session()
    with pytest.raises(errors.TurnFailed, match="no more") as caught:
        session.prompt("go").result(timeout_s=10)
    assert caught.value.name == "APIError"
    assert session.messages()[1].text == "well "
    assert session.messages()[1].info.error.message == "no more"
    assert session.prompt("go").result(timeout_s=10).text == "next"


def test_a_refused_call_is_tried_again_after_the_time_asked_for(opened, watching):
    busy = ModelUnavailable("429", retry_after_s=0.2)
    model = ScriptedModel([Fail(busy), "done"])
    runtime = opened(model)
    session = runtime.create_session()
    watch = watching(session, after=0)
    started = time.monotonic()
    turn = session.prompt("go")
    status = watch.until(lambda e: e.type == "session.status" and e.data.status.type == "retry")
    assert (status.data.status.attempt, status.data.status.message) == (1, "429")
    assert status.data.status.next > 0
    assert turn.result(timeout_s=10).text == "done"
    assert time.monotonic() - started >= 0.2
    assert model.calls == 2


def test_a_model_that_stays_away_fails_the_turn_after_its_attempts(opened):
    model = ScriptedModel([Fail(ModelUnavailable("down"))], repeat=True)
    runtime = opened(model, limits=Limits(model_attempts=2))
    session = runtime.create_session()
    with pytest.raises(errors.TurnFailed, match="down"):
        session.prompt("go").result(timeout_s=10)
    assert model.calls == 2


def test_a_model_that_stays_away_fails_the_turn_once_its_time_is_over(opened):
    model = ScriptedModel([Fail(ModelUnavailable("429", retry_after_s=0.2))], repeat=True)
    runtime = opened(model, limits=Limits(model_attempts=1_000, retry_s=1.0))
    with pytest.raises(errors.TurnFailed, match="429"):
        runtime.create_session().prompt("go").result(timeout_s=30)
    assert 1 < model.calls <= 6


def test_an_abort_while_waiting_to_try_again_is_at_once(opened, watching):
    model = ScriptedModel([Fail(ModelUnavailable("429", retry_after_s=60.0)), "next"])
    runtime = opened(model)
    session = runtime.create_session()
    watch = watching(session, after=0)
    turn = session.prompt("go")
    watch.until(lambda e: e.type == "session.status" and e.data.status.type == "retry")
    started = time.monotonic()
    assert turn.abort()
    with pytest.raises(errors.TurnAborted):
        turn.result(timeout_s=10)
    assert time.monotonic() - started < AT_ONCE_S
    assert session.prompt("go").result(timeout_s=10).text == "next"


@pytest.mark.parametrize("first", [[Stall()], [Wait(30.0), Say("late")], [End(None)]])
def test_a_stream_that_gives_nothing_is_tried_again(opened, first):
    model = ScriptedModel([first, "done"])
    runtime = opened(model, limits=HASTY)
    session = runtime.create_session()
    assert session.prompt("go").result(timeout_s=10).text == "done"
    assert model.calls == 2
    assert len(session.messages()) == 2


@pytest.mark.parametrize("end", [Stall(), Fail(ModelUnavailable("cut")), End(None)])
def test_a_stream_that_breaks_after_text_goes_on_in_a_new_step(opened, end):
    model = ScriptedModel([[Say("first half"), end], [Say("second half")]])
    runtime = opened(model, limits=Limits(model_attempts=3, stream_idle_s=0.15))
    session = runtime.create_session()
    reply = session.prompt("go").result(timeout_s=10)
    assert reply.text == "second half"
    texts = [message.text for message in session.messages()]
    assert texts == ["go", "first half", "second half"]
    assert session.messages()[1].info.error is not None
    assert model.calls == 2


def test_a_broken_stream_runs_no_call_it_had_begun(opened):
    ran = []

    @tool
    def work(n: int) -> str:
        """Work."""
        ran.append(n)
        return "ok"

    broken = [Say("I will "), Call("work", {"n": 1}), Fail(ModelUnavailable("cut"))]
    runtime = opened(
        ScriptedModel([broken, Call("work", {"n": 2}), "done"]), tools=[work], limits=HASTY
    )
    session = runtime.create_session()
    assert session.prompt("go").result(timeout_s=10).text == "done"
    assert ran == [2]


def test_live_text_and_final_text_are_the_same_once(opened, watching):
    gate = Gate()
    text = "The quick brown fox jumps over the lazy dog. " * 20
    model = ScriptedModel(
        [[Think("hm"), Say(text[:100]), Wait(gate), Say(text[100:], chunks=40)]],
    )
    runtime = opened(model)
    session = runtime.create_session()
    watch = watching(session, after=0)
    turn = session.prompt("go")
    watch.until(
        lambda e: (
            e.type == "message.part.updated" and getattr(e.data.part, "text", "") == text[:100]
        )
    )
    gate.open()
    assert turn.result(timeout_s=10).text == text
    watch.until("session.idle")
    shown = {}
    for event in watch.seen:
        if event.type == "message.part.delta":
            fact = event.data
            so_far = shown.setdefault(fact.part_id, {})
            so_far[fact.offset] = fact.delta
    assert any("lazy dog" in "".join(parts.values()) for parts in shown.values())


def test_an_overflow_is_compacted_and_the_turn_goes_on(opened):
    calls = []

    def play(request):
        calls.append(request.purpose)
        if request.purpose == "summary":
            return Say("we talked")
        if len(calls) == 3:
            return Fail(ModelOverflow("too long"))
        return Say("word " * 400)

    runtime = opened(ScriptedModel(play), compaction=CompactionRules(tail=10))
    session = runtime.create_session()
    session.prompt("one").result(timeout_s=10)
    session.prompt("two").result(timeout_s=10)
    assert session.prompt("three").result(timeout_s=10).text
    assert calls == ["step", "step", "step", "summary", "step"]
    kinds = [getattr(m.info, "summary", False) for m in session.messages()]
    assert kinds.count(True) == 1


def test_an_overflow_that_no_summary_helps_fails_the_turn(opened):
    model = ScriptedModel(
        lambda r: Say("short") if r.purpose == "summary" else Fail(ModelOverflow("too long"))
    )
    runtime = opened(model)
    session = runtime.create_session()
    with pytest.raises(errors.TurnFailed):
        session.prompt("go").result(timeout_s=10)
    assert session.status().type == "idle"
    assert model.calls < 12


def test_a_context_that_grows_full_is_compacted_by_itself(opened, watching):
    def play(request):
        if request.purpose == "summary":
            return Say("we talked")
        return [Say("word " * 400), Use(3_000)]

    model = ScriptedModel(play, context_limit=3_000, output_limit=500)
    runtime = opened(model, compaction=CompactionRules(tail=100))
    session = runtime.create_session()
    watch = watching(session, after=0)
    for number in range(3):
        assert session.prompt(f"prompt {number}").result(timeout_s=10).text
    watch.until("session.compacted")
    session.wait_idle(timeout_s=10)
    assert session.status().type == "idle"


def test_the_steps_of_a_turn_have_a_limit(opened):
    @tool
    def again(n: int) -> str:
        """Go on."""
        return "more"

    model = ScriptedModel(lambda r: Call("again", {"n": len(r.turns)}))
    runtime = opened(model, tools=[again], limits=Limits(steps=5))
    session = runtime.create_session()
    with pytest.raises(errors.TurnFailed) as caught:
        session.prompt("go").result(timeout_s=10)
    assert caught.value.name == "StepLimitError" or "5 steps" in str(caught.value)
    assert model.calls == 5


def test_a_call_repeated_over_and_over_is_refused_and_then_ends_the_turn(opened):
    ran = []

    @tool
    def again() -> str:
        """Go on."""
        ran.append(1)
        return "same"

    model = ScriptedModel(lambda r: Call("again"))
    runtime = opened(model, tools=[again], limits=Limits(repeated_calls=3))
    session = runtime.create_session()
    with pytest.raises(errors.TurnFailed, match="in a row"):
        session.prompt("go").result(timeout_s=10)
    assert len(ran) == 2
    assert model.calls == 6


def test_too_many_calls_in_one_answer_are_refused(opened):
    ran = []

    @tool
    def one(n: int) -> str:
        """Count."""
        ran.append(n)
        return str(n)

    model = ScriptedModel([[Call("one", {"n": n}) for n in range(8)], "done"])
    runtime = opened(model, tools=[one], limits=Limits(calls_per_step=5))
    session = runtime.create_session()
    assert session.prompt("go").result(timeout_s=10).text == "done"
    assert sorted(ran) == [0, 1, 2, 3, 4]


def test_a_model_that_will_not_be_cancelled_holds_nobody_up(opened):
    reached, release = threading.Event(), threading.Event()

    async def stubborn():
        reached.set()
        while not release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        yield TextDelta("too late")
        yield Finish("stop")

    runtime = opened(Junk(lambda n: stubborn() if n == 1 else fine()))
    session = runtime.create_session()
    turn = session.prompt("go")
    assert reached.wait(10)
    started = time.monotonic()
    assert session.abort()
    with pytest.raises(errors.TurnAborted):
        turn.result(timeout_s=10)
    assert time.monotonic() - started < AT_ONCE_S
    assert session.prompt("next").result(timeout_s=10).text == "fine"
    release.set()
    assert [m.text for m in session.messages()] == ["go", "", "next", "fine"]


def test_a_model_is_chosen_by_name_for_a_session_or_a_prompt(opened):
    first, second = ScriptedModel("first"), ScriptedModel("second", model_id="other")
    runtime = opened(first, models=[second])
    session = runtime.create_session(model="scripted/other")
    assert session.prompt("go").result(timeout_s=10).text == "second"
    assert session.prompt("go", model="scripted/scripted").result(timeout_s=10).text == "first"
    session.update(model=None)
    assert session.prompt("go").result(timeout_s=10).text == "first"


def test_a_summary_is_shown_though_what_it_keeps_began_after_its_request(opened):
    gate = Gate()
    seen = []

    def script(request):
        if request.purpose == "summary":
            return "what was said"
        seen.append(request)
        return [
            [Say("Let me look. "), Wait(gate), Call("look")],
            [Say("It says ", chunks=2), Wait(0.2), Fail(ModelOverflow("too long"))],
            "done",
        ][len(seen) - 1]

    @tool
    def look() -> str:
        """Look."""
        return "a page of text " * 50

    runtime = opened(ScriptedModel(script), tools=[look])
    session = runtime.create_session()
    turn = session.prompt("read this to me")
    gate.wait_reached()
    session.compact()  # runs after the turn, were it not for the overflow
    gate.open()
    assert turn.result(timeout_s=15).text == "done"
    words = [item.text for user in seen[-1].turns for item in getattr(user, "content", ())]
    assert "what was said" in words[0]
