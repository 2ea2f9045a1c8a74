"""The scripted model: what it plays, where it stands in its script, and what it never does."""

import asyncio
import threading
from itertools import pairwise

import msgspec
import pytest

from understudy.actors.models.configured import model_from
from understudy.actors.models.protocol import (
    AssistantTurn,
    Finish,
    Model,
    ModelRequest,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolUse,
    Usage,
    UserText,
    UserTurn,
)
from understudy.actors.models.scripted import (
    Call,
    End,
    Fail,
    Gate,
    Say,
    ScriptedModel,
    Stall,
    Think,
    Use,
    Wait,
    echo,
    steps_taken,
)
from understudy.errors import (
    CommandTimeout,
    InvalidInput,
    ModelError,
    ModelOverflow,
    ModelUnavailable,
)
from understudy.store.records import Tokens


def user(text="hi"):
    return UserTurn((UserText(text),))


def ask(*turns, session_id="ses_1", **rest):
    return ModelRequest(session_id=session_id, system="", turns=turns or (user(),), **rest)


async def events(model, request):
    return [event async for event in model.stream(request)]


def play(model, *requests):
    """Each request's events."""

    async def all_of_them():
        return [await events(model, request) for request in requests or (ask(),)]

    return asyncio.run(all_of_them())


def text(answer):
    return "".join(event.text for event in answer if isinstance(event, TextDelta))


def calls(answer):
    return [event for event in answer if isinstance(event, ToolCall)]


def test_it_is_a_model():
    assert isinstance(ScriptedModel("x"), Model)


def test_a_str_is_always_the_answer():
    model = ScriptedModel("Hello.")
    assert [text(a) for a in play(model, ask(), ask(), ask(session_id="ses_2"))] == ["Hello."] * 3


def test_a_list_is_played_one_item_for_each_call_and_its_end_is_an_error():
    model = ScriptedModel([[Say("Let me look."), Call("ls", {"path": "."})], "Empty."])
    first, second = play(model, ask(), ask())
    assert text(first) == "Let me look."
    assert [(c.tool, c.arguments) for c in calls(first)] == [("ls", '{"path":"."}')]
    assert first[-1] == Finish("tool-calls")
    assert text(second) == "Empty."
    assert second[-1] == Finish("stop")
    with pytest.raises(ModelError, match="ended after 2 steps"):
        play(model)


def test_a_repeated_list_starts_again():
    answers = play(ScriptedModel(["a", "b"], repeat=True), *[ask()] * 5)
    assert [text(a) for a in answers] == ["a", "b", "a", "b", "a"]


def test_an_empty_list_has_nothing_to_repeat():
    with pytest.raises(ModelError, match="ended after 0 steps"):
        play(ScriptedModel([], repeat=True))


def test_each_session_plays_its_own_copy():
    requests = [ask(session_id=s) for s in ("ses_1", "ses_2", "ses_1", "ses_2")]
    assert [text(a) for a in play(ScriptedModel(["a", "b"]), *requests)] == ["a", "a", "b", "b"]


def test_a_new_process_reads_the_position_off_the_request():
    history = (user(), AssistantTurn("a"), user("again"))
    assert text(play(ScriptedModel(["a", "b", "c"]), ask(*history))[0]) == "b"


def test_a_failure_uses_its_item_up_and_what_came_before_it_was_said():
    model = ScriptedModel([[Say("half"), Fail(ModelUnavailable("gone", retry_after_s=2))], "all"])
    said = []

    async def interrupted():
        async for event in model.stream(ask()):
            said.append(event)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(ModelUnavailable) as caught:
        asyncio.run(interrupted())
    assert caught.value.retry_after_s == 2
    assert text(said) == "half"
    assert text(play(model)[0]) == "all"


def test_a_failure_used_twice_does_not_drag_its_past_along():
    model = ScriptedModel([Fail(ModelUnavailable("gone"))], repeat=True)
    depths = []
    for _ in range(3):
        with pytest.raises(ModelUnavailable) as caught:
            play(model)
        depths.append(len(caught.traceback))
    assert depths[0] == depths[2]


def test_a_callable_is_asked_every_time_and_may_be_asynchronous():
    async def later(request):
        await asyncio.sleep(0)
        return [Say("later")]

    async def streamed(request):
        yield "one "
        await asyncio.sleep(0)
        yield Say("two")

    for script, wanted in (
        (lambda request: f"{len(request.turns)} turns", "1 turns"),
        (lambda request: iter([TextDelta("raw"), Finish("other")]), "raw"),
        (later, "later"),
        (streamed, "one two"),
        ([later, lambda request: "x"], "later"),
    ):
        assert text(play(ScriptedModel(script))[0]) == wanted


def test_raw_events_keep_their_own_usage_and_finish():
    given = [TextDelta("raw"), Usage(Tokens(total=3)), Finish("other")]
    assert play(ScriptedModel(lambda request: given))[0] == given


def test_a_call_that_cannot_be_played_is_a_typed_error():
    for nonsense in (lambda request: None, [[7]], [object()]):
        with pytest.raises(ModelError, match="cannot play"):
            play(ScriptedModel(nonsense))
    for unusable in (None, 7, b"bytes"):
        with pytest.raises(InvalidInput):
            ScriptedModel(unusable)
    with pytest.raises(InvalidInput, match="Gate"):
        Wait(threading.Event())


def test_text_streams_in_several_deltas_that_add_up():
    long = "word " * 200
    answer = play(ScriptedModel([[Say(long), Think("Hm, " * 9), Say("abcdef", chunks=3)]]))[0]
    said = [e.text for e in answer if isinstance(e, TextDelta)]
    assert "".join(said) == long + "abcdef"
    assert said[-3:] == ["ab", "cd", "ef"]
    assert len(said) > 50
    assert "".join(e.text for e in answer if isinstance(e, ReasoningDelta)) == "Hm, " * 9
    short = play(ScriptedModel("Hi"))[0]
    assert [e.text for e in short if isinstance(e, TextDelta)] == ["H", "i"]


def test_usage_is_estimated_and_can_be_said():
    answer = play(ScriptedModel([[Say("x" * 40), Think("y" * 20)]]), ask(user("z" * 400)))[0]
    usage = answer[-2]
    assert usage == Usage(Tokens(total=115, input=100, output=10, reasoning=5))
    said = play(ScriptedModel([[Use(150_000), Say("x" * 40)]]))[0][-2]
    assert said.tokens == Tokens(total=150_010, input=150_000, output=10)
    tokens = Tokens(total=7, input=5, output=2)
    assert play(ScriptedModel([[Use(tokens, cost=0.5)]]))[0][-2] == Usage(tokens, 0.5)


def test_an_end_can_be_said_or_left_out():
    assert play(ScriptedModel([[Say("cut"), End("length")]]))[0][-1] == Finish("length")
    broken = play(ScriptedModel([[Say("cut"), End(None)]]))[0]
    assert not [e for e in broken if isinstance(e, Finish)]


def test_call_ids_are_deterministic_and_unique_within_a_session():
    def ids_of_a_life():
        model = ScriptedModel([[Call("a"), Call("b")]], repeat=True)
        turns, ids = [user("go")], []
        for _ in range(20):
            answer = play(model, ask(*turns))[0]
            ids += [c.call_id for c in calls(answer)]
            uses = tuple(ToolUse(c.call_id, c.tool, {}, "ok") for c in calls(answer))
            turns += [AssistantTurn("", uses)]
        compacted = ask(user("summary"), AssistantTurn(), user("go"))
        restarted = ScriptedModel([[Call("a"), Call("b")]], repeat=True)
        return ids + [c.call_id for c in calls(play(restarted, compacted)[0])]

    ids = ids_of_a_life()
    assert len(set(ids)) == len(ids) == 42
    assert ids == ids_of_a_life()


def test_call_ids_and_invalid_arguments_can_be_said():
    answer = play(ScriptedModel([Call("ls", "{not json", call_id="call_x")]))[0]
    assert calls(answer) == [ToolCall("call_x", "ls", "{not json")]


def test_summaries_do_not_use_the_script_up_and_are_short():
    model = ScriptedModel(["a", "b"])
    summary = ask(user("Build " * 100), AssistantTurn("ok"), user("Summarise."), purpose="summary")
    first, second, third = play(model, ask(), summary, ask())
    assert (text(first), text(third)) == ("a", "b")
    assert text(second).startswith("Summary of 3 turns, from: Build")
    assert len(text(second)) < 100


def test_a_summary_can_be_scripted():
    summary = ask(purpose="summary")
    scripts = (
        ScriptedModel("x", summary=[Fail(ModelUnavailable), "The gist."]),
        ScriptedModel(lambda r: "The gist." if r.purpose == "summary" else "x"),
    )
    with pytest.raises(ModelUnavailable):
        play(scripts[0], summary)
    for model in scripts:
        assert [text(a) for a in play(model, summary, ask())] == ["The gist.", "x"]


def test_echo_answers_with_the_last_user_text():
    model = echo(model_id="parrot")
    history = (user("first"), AssistantTurn("", (ToolUse("c", "ls", {}, "out"),)))
    answers = play(model, ask(user("Hello")), ask(*history), ask(purpose="summary"))
    assert [text(a) for a in answers] == ["Hello", "first", "Summary of 1 turns, from: hi"]
    assert model.model_id == "parrot"


def test_requests_are_recorded_up_to_a_bound():
    model = ScriptedModel("x", record=3)
    requests = [ask(user(str(n))) for n in range(5)]
    play(model, *requests)
    assert list(model.requests) == requests[2:]
    assert model.calls == 5
    forgetful = ScriptedModel("x", record=0)
    play(forgetful)
    assert list(forgetful.requests) == []


def test_an_input_larger_than_the_context_overflows_if_wanted():
    model = ScriptedModel("x", context_limit=100, overflow=True)
    play(model, ask(user("x" * 400)))
    with pytest.raises(ModelOverflow) as caught:
        play(model, ask(user("x" * 401)))
    assert caught.value.tokens == 101


def test_steps_taken_counts_since_the_last_prompt():
    step = AssistantTurn("a")
    assert steps_taken(ask(user(), step, step, user(), step)) == 1
    assert steps_taken(ask(user(), step, user())) == 0


def test_a_gate_holds_the_model_until_another_thread_opens_it():
    gate = Gate()
    model = ScriptedModel([[Say("One moment, "), Wait(gate), Say("done.")]])
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(play(model)))
    thread.start()
    gate.wait_reached()
    assert answers == []
    gate.open()
    gate.open()
    thread.join(30)
    assert text(answers[0]) == "One moment, done."
    assert text(play(ScriptedModel([[Wait(gate), "open stays open"]]))[0]) == "open stays open"


def test_a_gate_nobody_reaches_times_out():
    with pytest.raises(CommandTimeout):
        Gate().wait_reached(timeout_s=0.001)


def test_cancelling_one_waiter_leaves_the_gate_to_the_others():
    async def scene():
        gate = Gate()
        model = ScriptedModel([[Wait(gate), Say("through")]])
        one, two = (asyncio.create_task(events(model, ask(session_id=s))) for s in ("a", "b"))
        await asyncio.to_thread(gate.wait_reached)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        gate.open()
        return await two

    assert text(asyncio.run(scene())) == "through"


def test_waits_for_seconds_and_for_events():
    async def scene():
        event = asyncio.Event()
        model = ScriptedModel([[Wait(0.001), Wait(event), Say("now")]])
        asyncio.get_running_loop().call_later(0.002, event.set)
        return await events(model, ask())

    assert text(asyncio.run(scene())) == "now"


def test_a_stall_says_nothing_more_until_cancelled():
    async def scene():
        said = []
        stalled = asyncio.Event()

        async def listen():
            async for event in ScriptedModel([[Say("only this"), Stall()]]).stream(ask()):
                said.append(event)
                if text(said) == "only this":
                    stalled.set()

        task = asyncio.create_task(listen())
        await stalled.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return said

    assert text(asyncio.run(scene())) == "only this"


def test_an_instant_answer_does_not_wait_and_a_long_one_lets_others_run():
    async def scene(script):
        model, ticks, done = ScriptedModel(script), [0], False

        async def tick():
            while not done:
                ticks[0] += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        seen = [ticks[0] async for event in model.stream(ask())]
        done = True
        await ticker
        return seen

    instant = asyncio.run(scene([[Say("short"), Call("ls")]]))
    assert set(instant) == {0}
    seen = asyncio.run(scene([Say("x" * 10_000, chunks=10_000)]))
    assert seen[-1] > 100
    assert max(b - a for a, b in pairwise(seen)) <= 1


def test_an_asynchronous_script_is_closed_with_its_stream():
    closed = []

    async def script(request):
        try:
            yield Say("a")
            yield Stall()
        finally:
            closed.append(True)

    async def scene():
        stream = ScriptedModel(script).stream(ask())
        assert await anext(stream) == TextDelta("a")
        await stream.aclose()

    asyncio.run(scene())
    assert closed == [True]


def test_the_same_script_gives_the_same_bytes():
    def bytes_of():
        model = ScriptedModel([[Say("a" * 99), Call("ls", {"b": 1, "a": 2})], "done"])
        return msgspec.json.encode(play(model, ask(), ask()))

    assert bytes_of() == bytes_of()


BAD_ACTS = {
    "a number to say": lambda: Say(3),
    "no words": lambda: Think(None),
    "no pieces": lambda: Say("a", chunks=0),
    "half a piece": lambda: Say("a", chunks=1.5),
    "a tool for its name": lambda: Call(print),
    "arguments in a list": lambda: Call("ls", [1]),
    "a word for an error": lambda: Fail("broken"),
    "a time before now": lambda: Wait(-1),
    "no number of seconds": lambda: Wait(float("nan")),
}


@pytest.mark.parametrize("case", BAD_ACTS)
def test_an_act_that_cannot_be_played_is_refused_where_it_is_written(case):
    with pytest.raises(InvalidInput):
        BAD_ACTS[case]()


def test_a_model_is_made_from_its_name(monkeypatch):
    monkeypatch.delenv("UNDERSTUDY_MODEL", raising=False)
    assert text(play(model_from())[0]) == "hi"
    assert model_from("scripted", context_limit=5).context_limit == 5
    monkeypatch.setenv("UNDERSTUDY_MODEL", "nonsense/x")
    for spec in (None, "", " ", 5, "gpt-5", "openai", "openai/", "scripted/x", "/x"):
        with pytest.raises(InvalidInput, match="scripted, openai/<model> or anthropic/<model>"):
            model_from(spec)
    with pytest.raises(InvalidInput, match="no_such_option"):
        model_from("scripted", no_such_option=1)
