"""Tools in a running runtime: whatever they do, the turn goes on or ends, and nothing is left."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from understudy import (
    Limits,
    Question,
    Runtime,
    ScriptedModel,
    ToolContext,
    ToolResult,
    errors,
    tool,
)
from understudy.actors.core.effects import RunTool
from understudy.actors.models.scripted import Call, Gate, Say, Wait, steps_taken
from understudy.store.records import Span, ToolPart, ToolRunning

AT_ONCE_S = 1.0


def calling(*calls):
    """A model that makes these calls in one answer, then says what came of them."""

    def play(request):
        if steps_taken(request):
            return Say(" | ".join(call.output for call in request.turns[-1].calls))
        return list(calls)

    return ScriptedModel(play)


def states(session):
    return [part.state for message in session.messages() for part in message.tools]


def elapsed_s(call):
    started = time.monotonic()
    call()
    return time.monotonic() - started


# --- results -----------------------------------------------------------------------------------


def test_parallel_calls_run_at_once_and_are_kept_in_call_order(opened):
    both = threading.Barrier(3)
    second = threading.Event()

    @tool
    def first() -> str:
        """Wait for the others, end last."""
        both.wait(10)
        second.wait(10)
        return "1"

    @tool
    def other() -> str:
        """Wait for the others, end first."""
        both.wait(10)
        second.set()
        return "2"

    @tool
    async def third() -> str:
        """Wait for the others."""
        await asyncio.to_thread(both.wait, 10)
        return "3"

    runtime = opened(
        calling(Call("first"), Call("other"), Call("third")), tools=[first, other, third]
    )
    session = runtime.create_session()
    assert session.prompt("go").result(timeout_s=10).text == "1 | 2 | 3"
    assert [part.tool for part in session.messages()[1].tools] == ["first", "other", "third"]


class Stubborn(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Odd:
    def __repr__(self):
        raise RuntimeError("no words")


def raising(error):
    def misbehave() -> str:
        """Raise."""
        raise error

    return misbehave


def returning(value):
    def misbehave() -> str:
        """Return."""
        return value

    return misbehave


JUNK = {
    "an exception": raising(ValueError("bad")),
    "a tool error": raising(errors.ToolError("say it")),
    "an exception without words": raising(Stubborn()),
    "an exception with a surrogate": raising(ValueError("\ud800")),
    "a tool error with a surrogate": raising(errors.ToolError("\ud800")),
    "an error of ours": raising(errors.SessionNotFound("x", session_id="s")),
    "a model error": raising(errors.ModelUnavailable("x")),
    "StopIteration": raising(StopIteration("x")),
    "SystemExit": raising(SystemExit(3)),
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "GeneratorExit": raising(GeneratorExit()),
    "CancelledError": raising(asyncio.CancelledError()),
    "TimeoutError": raising(TimeoutError("x")),
    "RecursionError": raising(RecursionError("x")),
    "an object": returning(object()),
    "an object without words": returning(Odd()),
    "an exception returned": returning(ValueError("returned")),
    "a tool error returned": returning(errors.ToolError("returned")),
    "metadata that is a list": returning(ToolResult("x", metadata=[1])),
    "metadata of an object": returning(ToolResult("x", metadata={"a": object()})),
    "metadata of a surrogate": returning(ToolResult("x", metadata={"a": "\ud800"})),
    "a coroutine": returning(asyncio.sleep),
    "a lock": returning(threading.Lock()),
}
FINE = {
    "nothing": returning(None),
    "a result of a number": returning(ToolResult(5)),
    "a result of None": returning(ToolResult(None)),
    "a title that is a number": returning(ToolResult("x", title=5)),
    "metadata with keys of numbers": returning(ToolResult("x", metadata={1: 2})),
    "a number": returning(7),
    "a surrogate": returning("\ud800"),
    "NUL": returning("a\0b"),
    "bytes": returning(b"abc"),
    "a great deal": returning("x" * 1_000_000),
}


@pytest.mark.parametrize("case", [*JUNK, *FINE])
@pytest.mark.parametrize("form", ["thread", "coroutine"])
def test_what_a_tool_raises_or_returns_is_its_result_and_the_turn_goes_on(opened, case, form):
    function = JUNK.get(case) or FINE[case]
    if form == "coroutine":

        async def misbehave() -> str:
            """Do it."""
            return function()
    else:
        misbehave = function
    runtime = opened(calling(Call("misbehave")), tools=[tool(misbehave)])
    session = runtime.create_session()
    reply = session.prompt("go").result(timeout_s=10)
    (state,) = states(session)
    assert type(state).__name__ == ("ToolCompleted" if case in FINE else "ToolFailed"), state
    assert reply.text or case in FINE
    assert runtime.restarts == 0
    assert session.prompt("and again").result(timeout_s=10)


def test_a_call_of_no_tool_or_of_bad_arguments_is_told_to_the_model(opened):
    @tool
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    runtime = opened(
        calling(
            Call("nothing"),
            Call("add", "{not json"),
            Call("add", {"a": "x", "b": 1}),
            Call("add", {"a": 1}),
            Call("add", '"\ud800"'),
            Call("add", {"a": 1, "b": 2}),
        ),
        tools=[add],
    )
    session = runtime.create_session()
    text = session.prompt("go").result(timeout_s=10).text
    assert text.endswith("| 3")
    assert "no tool called 'nothing'" in text
    assert runtime.restarts == 0


JUNK_PROGRESS = {
    "an object": {"value": object()},
    "a surrogate": {"value": "\ud800"},
    "a circle": {"value": (circle := [])},
    "a title of a number": {"title": 5},
    "a surrogate title": {"title": "\ud800"},
}
circle.append(circle)


@pytest.mark.parametrize("case", JUNK_PROGRESS)
def test_junk_as_progress_is_the_tools_own_problem(opened, case):
    @tool
    def work(ctx: ToolContext) -> str:
        """Report."""
        ctx.progress(**JUNK_PROGRESS[case])
        return "done"

    runtime = opened(calling(Call("work")), tools=[work])
    session = runtime.create_session()
    assert "cannot be stored" in session.prompt("go").result(timeout_s=10).text
    assert runtime.restarts == 0


@pytest.mark.parametrize(
    "ask",
    [
        {"permission": 5},
        {"permission": "\ud800"},
        {"permission": "x", "patterns": [5]},
        {"permission": "x", "patterns": 5},
        {"permission": "x", "value": object()},
    ],
    ids=["number", "surrogate", "pattern", "patterns", "metadata"],
)
def test_junk_as_an_ask_is_the_tools_own_problem(opened, ask):
    @tool
    def work(ctx: ToolContext) -> str:
        """Ask."""
        ctx.ask(ask["permission"], **{k: v for k, v in ask.items() if k != "permission"})
        return "done"

    runtime = opened(calling(Call("work")), tools=[work])
    session = runtime.create_session()
    assert "cannot be stored" in session.prompt("go").result(timeout_s=10).text
    assert runtime.restarts == 0


def test_progress_is_published_and_kept(opened, watching):
    go = threading.Event()

    @tool
    def work(ctx: ToolContext) -> str:
        """Report."""
        ctx.progress(title="halfway", percent=50)
        go.wait(10)
        return "done"

    runtime = opened(calling(Call("work")), tools=[work])
    session = runtime.create_session()
    watch = watching(session, after=0)
    turn = session.prompt("go")
    event = watch.until(
        lambda e: (
            e.type == "message.part.updated"
            and e.data.part.__struct_config__.tag == "tool"
            and getattr(e.data.part.state, "title", None) == "halfway"
        )
    )
    assert event.data.part.state.metadata["percent"] == 50
    go.set()
    assert turn.result(timeout_s=10).text == "done"


# --- tools that do not end ---------------------------------------------------------------------


@tool
def hang(ctx: ToolContext) -> str:
    """Never return by itself."""
    ctx.progress(title="hanging")
    HANGING.wait(30)
    return "too late"


@tool
async def hang_async(ctx: ToolContext) -> str:
    """Never return by itself."""
    ctx.progress(title="hanging")
    await asyncio.sleep(30)
    return "too late"


@tool
async def block(ctx: ToolContext) -> str:
    """Block the loop it runs on, as nobody should."""
    ctx.progress(title="hanging")
    HANGING.wait(30)
    return "too late"


HANGING = threading.Event()
HANGS = {"thread": hang, "coroutine": hang_async, "blocked loop": block}


@pytest.fixture(autouse=True)
def _release(opened):
    HANGING.clear()
    yield
    HANGING.set()


def running(watch):
    return watch.until(
        lambda e: (
            e.type == "message.part.updated"
            and getattr(getattr(e.data.part, "state", None), "title", None) == "hanging"
        )
    )


@pytest.mark.parametrize("form", HANGS)
def test_a_tool_that_never_returns_is_aborted_at_once(opened, watching, form):
    function = HANGS[form]
    runtime = opened(calling(Call(function.name)), tools=[function])
    session = runtime.create_session()
    watch = watching(session, after=0)
    turn = session.prompt("go")
    running(watch)
    assert elapsed_s(session.abort) < AT_ONCE_S
    with pytest.raises(errors.TurnAborted) as caught:
        turn.result(timeout_s=AT_ONCE_S)
    assert caught.value.reason == "abort"
    (state,) = states(session)
    assert state.interrupted and "interrupted" in state.error
    assert session.status().type == "idle"


@pytest.mark.parametrize("form", HANGS)
def test_a_tool_that_never_returns_has_a_deadline(opened, form):
    function = HANGS[form]
    runtime = opened(calling(Call(function.name)), tools=[function], limits=Limits(tool_s=0.2))
    session = runtime.create_session()
    assert "timed out" in session.prompt("go").result(timeout_s=10).text
    (state,) = states(session)
    assert state.interrupted


def test_a_tools_own_deadline_counts_before_the_runtimes(opened):
    @tool(timeout_s=0.1)
    def slow() -> str:
        """Wait."""
        HANGING.wait(30)
        return ""

    runtime = opened(calling(Call("slow")), tools=[slow])
    session = runtime.create_session()
    assert "timed out after 0.1 s" in session.prompt("go").result(timeout_s=10).text


@pytest.mark.parametrize("form", HANGS)
def test_closing_is_bounded_while_a_tool_hangs(path, watching, form):
    function = HANGS[form]
    runtime = Runtime(
        path, model=calling(Call(function.name)), tools=[function], durability="normal"
    ).start()
    session = runtime.create_session()
    watch = watching(session, after=0)
    turn = session.prompt("go")
    running(watch)
    assert elapsed_s(lambda: runtime.close(timeout_s=2.0)) < 4.0
    with pytest.raises((errors.RuntimeClosed, errors.TurnAborted)):
        turn.result(timeout_s=1)
    with Runtime(path, model="scripted", durability="normal") as again:
        (prompt,) = again.session(session.id).prompts()
        assert (prompt.outcome, prompt.reason) == ("interrupted", "close")


def test_a_blocked_tools_loop_holds_up_no_stream_and_no_other_session(opened, watching):
    def play(request):
        if "block" in str(request.turns[0].content):
            return Call("block")
        return Say("fine")

    runtime = opened(ScriptedModel(play), tools=[block])
    stuck, free = runtime.create_session(), runtime.create_session()
    watch = watching(stuck, after=0)
    turn = stuck.prompt("block")
    running(watch)
    for _ in range(5):
        assert free.prompt("hi").result(timeout_s=5).text == "fine"
    assert turn.abort()


def test_a_process_whose_tools_hang_can_still_exit(tmp_path):
    program = f"""
import threading
from understudy import Runtime, ScriptedModel, tool
from understudy.actors.models.scripted import Call

started = threading.Event()

@tool
def hang() -> str:
    "Never return."
    started.set()
    threading.Event().wait()

runtime = Runtime({str(tmp_path / "a.db")!r}, model=ScriptedModel([Call("hang")]), tools=[hang])
runtime.start()
runtime.create_session().prompt("go")
assert started.wait(10)
runtime.close(timeout_s=1.0)
print("closed")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "closed", done.stderr
    assert done.returncode == 0


def alive(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] not in ("Z", "X")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["abort", "delete", "close", "timeout", "crash"])
def test_the_processes_of_a_tool_end_with_it(opened, watching, eventually, tmp_path, how):
    pids = tmp_path / "pids"

    @tool
    def spawn(ctx: ToolContext) -> str:
        """Start a stubborn tree of processes."""
        child = subprocess.Popen(
            ["sh", "-c", f"trap '' TERM; sleep 60 & echo $$ $! > {pids}; wait"],
            start_new_session=True,
        )
        forget = ctx.track(child)
        try:
            child.wait()
        finally:
            forget()
        return "ended"

    limits = Limits(tool_s=0.5) if how == "timeout" else Limits()
    runtime = opened(calling(Call("spawn")), tools=[spawn], limits=limits)
    session = runtime.create_session()
    turn = session.prompt("go")
    eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    numbers = [int(each) for each in pids.read_text().split()]
    started = time.monotonic()
    if how == "abort":
        session.abort()
    elif how == "delete":
        session.delete()
    elif how == "close":
        runtime.close(timeout_s=2.0)
    elif how == "crash":
        with pytest.raises(errors.ActorCrashed):
            session._crash()
    else:
        turn.result(timeout_s=10)
    eventually(lambda: not any(map(alive, numbers)), timeout_s=3.0)
    assert time.monotonic() - started < 2.5


# --- asking people -----------------------------------------------------------------------------


@tool(permission="launch")
def launch(target: str) -> str:
    """Launch."""
    LAUNCHED.append(target)
    return f"launched {target}"


LAUNCHED = []


@pytest.fixture(autouse=True)
def _landed():
    LAUNCHED.clear()


def asking(opened, watching, *calls, **options):
    options.setdefault("permissions", {"launch": "ask"})
    runtime = opened(
        calling(*(calls or (Call("launch", {"target": "moon"}),))), tools=[launch], **options
    )
    session = runtime.create_session()
    watch = watching(session, after=0)
    return runtime, session, session.prompt("go"), watch


def test_permission_once_runs_this_call_only(opened, watching):
    runtime, session, turn, watch = asking(opened, watching)
    ask = watch.until("permission.asked").data.info
    assert (ask.permission, ask.patterns) == ("launch", ("*",))
    assert ask.metadata["input"] == {"target": "moon"}
    assert LAUNCHED == []
    assert session.status().asks == 1
    assert runtime.reply(ask.id, "once").value.replied == "once"
    assert turn.result(timeout_s=10).text == "launched moon"
    session.prompt("again")
    assert watch.until("permission.asked").data.info.id != ask.id


def test_permission_always_covers_what_waits_and_what_comes(opened, watching):
    runtime, session, turn, watch = asking(
        opened, watching, Call("launch", {"target": "a"}), Call("launch", {"target": "b"})
    )
    first = watch.until("permission.asked").data.info
    second = watch.until("permission.asked").data.info
    runtime.reply(first.id, "always")
    assert turn.result(timeout_s=10).text == "launched a | launched b"
    with pytest.raises(errors.AskClosed):
        runtime.reply(second.id, "once")
    assert session.prompt("again").result(timeout_s=10).text == "launched a | launched b"
    assert list(runtime.asks()) == []


def test_permission_rejected_ends_the_turn_and_nothing_runs(opened, watching):
    runtime, session, turn, watch = asking(
        opened, watching, Call("launch", {"target": "a"}), Call("launch", {"target": "b"})
    )
    runtime.reply(watch.until("permission.asked").data.info.id, "reject")
    with pytest.raises(errors.TurnAborted) as caught:
        turn.result(timeout_s=10)
    assert caught.value.reason == "rejected"
    assert LAUNCHED == []
    assert list(runtime.asks()) == []
    assert session.status().type == "idle"


def test_permission_rejected_with_feedback_goes_on_with_it(opened, watching):
    runtime, _, turn, watch = asking(opened, watching)
    ask = watch.until("permission.asked").data.info
    runtime.reply(ask.id, "reject", feedback="use mars")
    assert "use mars" in turn.result(timeout_s=10).text
    assert LAUNCHED == []


def test_permissions_denied_and_allowed_by_rule_ask_nobody(opened, watching):
    runtime, session, turn, _ = asking(opened, watching, permissions={"launch": "deny"})
    assert "denied" in turn.result(timeout_s=10).text.lower()
    session.update(permissions={"launch": "allow"})
    assert session.prompt("again").result(timeout_s=10).text == "launched moon"
    assert list(runtime.asks()) == []


def test_an_ask_is_answered_exactly_once_by_ten_threads(opened, watching, crew):
    runtime, _, turn, watch = asking(opened, watching)
    ask = watch.until("permission.asked").data.info
    outcomes = crew().call(runtime.reply, ask.id, "once", times=10).start().outcomes()
    closed = [each for each in outcomes if isinstance(each, errors.AskClosed)]
    assert len(closed) == 9
    assert {(each.ask_id, each.reason) for each in closed} == {(ask.id, "once")}
    assert turn.result(timeout_s=10).text == "launched moon"
    assert LAUNCHED == ["moon"]


def test_an_abort_closes_what_it_asked(opened, watching):
    runtime, session, turn, watch = asking(opened, watching)
    ask = watch.until("permission.asked").data.info
    assert session.abort()
    with pytest.raises(errors.TurnAborted):
        turn.result(timeout_s=10)
    with pytest.raises(errors.AskClosed) as caught:
        runtime.reply(ask.id, "once")
    assert caught.value.reason == "closed"
    assert LAUNCHED == []


@pytest.mark.parametrize("reply", ["answered", "perhaps", "", 5])
def test_a_reply_that_does_not_fit_leaves_the_ask_open(opened, watching, reply):
    runtime, _, turn, watch = asking(opened, watching)
    ask = watch.until("permission.asked").data.info
    if reply != "":
        with pytest.raises(errors.InvalidInput):
            runtime.reply(ask.id, reply)
    assert [each.id for each in runtime.asks()] == [ask.id]
    runtime.reply(ask.id, "once")
    assert turn.result(timeout_s=10).text == "launched moon"
    assert runtime.restarts == 0


def test_a_reply_to_what_never_was_is_not_found(opened):
    runtime = opened()
    with pytest.raises(errors.AskNotFound):
        runtime.reply("per_nothing", "once")


@pytest.mark.parametrize("how", ["closed", "crashed"])
def test_an_ask_outlives_its_runtime(opened, path, watching, how):
    runtime, session, turn, watch = asking(opened, watching)
    ask = watch.until("permission.asked").data.info
    if how == "closed":
        runtime.close()
        runtime = opened(
            calling(Call("launch", {"target": "moon"})),
            tools=[launch],
            permissions={"launch": "ask"},
        )
        session = runtime.session(session.id)
    else:
        with pytest.raises(errors.ActorCrashed):
            session._crash()
        session.update(title="awake")
    assert [each.id for each in runtime.asks()] == [ask.id]
    assert session.status().type == "busy"
    assert LAUNCHED == []
    runtime.reply(ask.id, "once")
    assert session.turn(turn.message_id).result(timeout_s=10).text == "launched moon"
    assert LAUNCHED == ["moon"]
    with pytest.raises(errors.AskClosed):
        runtime.reply(ask.id, "once")


@pytest.mark.parametrize("form", ["thread", "coroutine"])
def test_a_running_tool_asks_for_permission(opened, watching, form):
    @tool
    def dig(ctx: ToolContext) -> str:
        """Dig."""
        ctx.ask("dig", patterns=["garden"], always=["garden"], depth=3)
        return "a hole"

    @tool(name="dig")
    async def dig_async(ctx: ToolContext) -> str:
        """Dig."""
        await ctx.ask_async("dig", patterns=["garden"], always=["garden"], depth=3)
        return "a hole"

    chosen = dig if form == "thread" else dig_async
    runtime = opened(calling(Call("dig")), tools=[chosen])
    session = runtime.create_session()
    watch = watching(session, after=0)
    refused = session.prompt("one")
    ask = watch.until("permission.asked").data.info
    assert ask.metadata["depth"] == 3
    runtime.reply(ask.id, "reject", feedback="not there")
    assert "not there" in refused.result(timeout_s=10).text
    allowed = session.prompt("two")
    runtime.reply(watch.until("permission.asked").data.info.id, "always")
    assert allowed.result(timeout_s=10).text == "a hole"
    assert session.prompt("three").result(timeout_s=10).text == "a hole"


@pytest.mark.parametrize("form", ["thread", "coroutine"])
def test_a_tool_s_time_does_not_run_while_it_waits_for_a_person(opened, watching, form):
    waited = threading.Event()

    @tool
    def dig(ctx: ToolContext) -> str:
        """Dig."""
        ctx.ask("dig")
        return "a hole"

    @tool(name="dig")
    async def dig_async(ctx: ToolContext) -> str:
        """Dig, and then for too long."""
        await ctx.ask_async("dig")
        await asyncio.sleep(30)
        return "a hole"

    chosen = dig if form == "thread" else dig_async
    rules = {"dig": "ask"}
    limits = Limits(tool_s=0.3)
    runtime = opened(calling(Call("dig")), tools=[chosen], limits=limits, permissions=rules)
    session = runtime.create_session()
    watch = watching(session, after=0)
    turn = session.prompt("dig")
    ask = watch.until("permission.asked").data.info
    assert not waited.wait(0.6)  # longer than the tool has
    runtime.reply(ask.id, "once")
    answer = turn.result(timeout_s=15).text
    assert ("a hole" if form == "thread" else "timed out after 0.3 s") in answer


def test_tools_that_wait_for_people_keep_no_thread_from_the_others(opened, watching, monkeypatch):
    monkeypatch.setattr("understudy.actors.executor._TOOL_THREADS", 1)

    @tool
    def dig(ctx: ToolContext) -> str:
        """Dig."""
        ctx.ask("dig")
        return "a hole"

    @tool
    def look() -> str:
        """Look."""
        return "a garden"

    def play(request):
        last = request.turns[-1]
        return Call(last.content[0].text) if hasattr(last, "content") else last.calls[0].output

    runtime = opened(ScriptedModel(play), tools=[dig, look], permissions={"dig": "ask"})
    watch = watching(runtime, after=0)
    digging = [runtime.create_session().prompt("dig") for _ in range(3)]
    asks = [watch.until("permission.asked").data.info for _ in digging]
    other = runtime.create_session()
    assert other.prompt("look").result(timeout_s=15).text == "a garden"
    for ask in asks:
        runtime.reply(ask.id, "once")
    assert [turn.result(timeout_s=15).text for turn in digging] == ["a hole"] * 3
    assert other.prompt("look").result(timeout_s=15).text == "a garden"


@pytest.mark.parametrize("way", ["ask_async", "question_async"])
def test_a_plain_function_that_asks_without_awaiting_is_stopped_there(opened, way):
    done = []

    @tool
    def dig(ctx: ToolContext) -> str:
        """Dig."""
        getattr(ctx, way)("dig")
        done.append("a hole")
        return "done"

    runtime = opened(calling(Call("dig")), tools=[dig], permissions={"dig": "deny"})
    answer = runtime.create_session().prompt("dig").result(timeout_s=15).text
    assert f"call {way.removesuffix('_async')}() instead" in answer
    assert not done


@pytest.mark.parametrize("form", ["thread", "coroutine"])
def test_a_running_tool_that_asks_can_be_aborted_closed_and_deleted(opened, watching, form):
    ended = threading.Event()

    @tool
    def dig(ctx: ToolContext) -> str:
        """Dig."""
        try:
            ctx.ask("dig")
        finally:
            ended.set()
        return "a hole"

    @tool(name="dig")
    async def dig_async(ctx: ToolContext) -> str:
        """Dig."""
        try:
            await ctx.ask_async("dig")
        finally:
            ended.set()
        return "a hole"

    chosen = dig if form == "thread" else dig_async
    runtime = opened(calling(Call("dig")), tools=[chosen], permissions={"dig": "ask"})
    for end in ("abort", "delete"):
        ended.clear()
        session = runtime.create_session()
        watch = watching(session, after=0)
        turn = session.prompt("go")
        watch.until("permission.asked")
        getattr(session, end)()
        with pytest.raises((errors.TurnAborted, errors.SessionNotFound)):
            turn.result(timeout_s=10)
        assert ended.wait(AT_ONCE_S)
        assert list(runtime.asks()) == []
    session = runtime.create_session()
    watch = watching(session, after=0)
    ended.clear()
    session.prompt("go")
    watch.until("permission.asked")
    assert elapsed_s(runtime.close) < 3.0
    assert ended.wait(AT_ONCE_S)


def test_a_question_is_answered_or_declined(opened, watching):
    @tool
    def poll(ctx: ToolContext) -> str:
        """Ask."""
        answers = ctx.question(
            [Question(text="Which?", options=("a", "b"), multiple=True), Question(text="Why?")]
        )
        return str(answers)

    runtime = opened(calling(Call("poll")), tools=[poll])
    session = runtime.create_session()
    watch = watching(session, after=0)
    turn = session.prompt("go")
    ask = watch.until("question.asked").data.info
    assert [question.text for question in ask.questions] == ["Which?", "Why?"]
    with pytest.raises(errors.InvalidInput):
        runtime.reply(ask.id, answers=[["a"]])  # one is missing
    with pytest.raises(errors.InvalidInput):
        runtime.reply(ask.id, "once")
    runtime.reply(ask.id, answers=[["a", "b"], ["because"]])
    assert turn.result(timeout_s=10).text == "(('a', 'b'), ('because',))"
    declined = session.prompt("again")
    ask = watch.until("question.asked").data.info
    runtime.reply(ask.id, "reject", feedback="ask later")
    assert "ask later" in declined.result(timeout_s=10).text
    with pytest.raises(errors.AskClosed):
        runtime.reply(ask.id, answers=[["a"], ["b"]])


def test_a_call_of_a_session_that_was_just_deleted_is_dropped_without_a_word(opened, caplog):
    executor = opened().engine.executor
    part = ToolPart(
        id="prt_1",
        session_id="ses_gone",
        message_id="msg_1",
        tool="note",
        call_id="call_1",
        state=ToolRunning(input={}, time=Span(start=1)),
    )
    executor.start("ses_gone", [RunTool(part=part, attempt=1)])
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), executor._loop).result(15)
    assert caplog.records == []


def test_an_answer_that_ends_after_its_session_was_deleted_says_nothing(
    opened, caplog, monkeypatch, eventually
):
    def note() -> str:
        """Note it."""
        return "noted"

    gate = Gate()
    runtime = opened(ScriptedModel([[Wait(gate), Call("note")]]), tools=[note])
    executor = runtime.engine.executor
    session = runtime.create_session()
    session.prompt("go")
    gate.wait_reached()
    monkeypatch.setattr(executor, "cancel", lambda *_: None)  # it comes too late
    session.delete()
    gate.open()
    eventually(lambda: not executor._executions)
    assert caplog.records == []
