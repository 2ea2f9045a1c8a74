"""Field failures that are in no list of ours: what else breaks in the wild, with a report each."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path

import plant
import pytest
from cast import Tools, last_text, obedient
from compacting import WAIT_S, together, until
from processes import Child

from understudy import FilePart, Limits, Runtime, ToolContext, tool
from understudy.actors.models.protocol import AssistantTurn, Finish, TextDelta, UserFile, UserTurn
from understudy.actors.models.scripted import (
    Call,
    Fail,
    Gate,
    Say,
    ScriptedModel,
    Think,
    Wait,
    steps_taken,
)
from understudy.errors import (
    AskClosed,
    ModelError,
    ModelOverflow,
    PromptConflict,
    RuntimeClosed,
    SessionClaimed,
    StoreUnreadable,
    TurnAborted,
    TurnError,
    TurnFailed,
    UnderstudyError,
)

SETTLED = {"message": 0, "part": 0, "inbox": 0, "ask": 0}
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class Strict:
    """A model that plays one item after the other, and refuses what some provider refuses.

    Its history would bring the same refusal for ever: the session would be lost.
    """

    def __init__(self, *items, **options):
        self.requests = []
        self._items = list(items)
        self.model = ScriptedModel(self._play, **options)

    def _play(self, request):
        if request.purpose == "summary":
            return None
        self.requests.append(request)
        refusal = "; ".join(_refusals(request))
        if refusal:
            return Fail(ModelError(f"400: {refusal}"))
        return self._items.pop(0) if self._items else Say("done")

    @property
    def outputs(self):
        return [call.output for call in _calls(self.requests[-1])]


def _calls(request):
    answers = [turn for turn in request.turns if isinstance(turn, AssistantTurn)]
    return [call for answer in answers for call in answer.calls]


def _refusals(request):
    calls = _calls(request)
    ids = [call.call_id for call in calls]
    if len(ids) != len(set(ids)) or not all(ids):
        yield f"tool_use ids must be unique: {ids}"
    for call in calls:
        if not NAME.fullmatch(call.tool):
            yield f"{call.tool!r} does not match {NAME.pattern}"
        if not isinstance(call.input, dict):
            yield f"{call.input!r} is not an object"
    for turn in request.turns:
        if isinstance(turn, AssistantTurn) and not (turn.text.strip() or turn.calls):
            yield "the message with role 'assistant' must not be empty"
    try:
        json.dumps(str(request.turns), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        yield "no low surrogate in string"


def asked(session, words="call guarded"):
    """A turn that waits for permission, and its request."""
    with session.events() as events:
        turn = session.prompt(words)
        return turn, until(events, lambda each: each.type == "permission.asked")[-1].data.info


# --- what providers send and refuse ------------------------------------------------------------


@pytest.mark.parametrize("call_id", ["call_0", ""])
def test_a_provider_that_repeats_its_call_ids_loses_no_result(path, tools, call_id):
    """QwenLM/qwen-code#8382, HKUDS/nanobot#4442, NousResearch/hermes-agent#11722."""
    calls = [Call("quick", {"n": n}, call_id=call_id) for n in range(3)]
    strict = Strict(calls[:2], calls[2])
    with Runtime(path, model=strict.model, tools=tools.all()) as runtime:
        session = runtime.create_session()
        for _ in range(2):
            assert session.prompt("go").result(timeout_s=WAIT_S).text == "done"
        assert strict.outputs == ["quick 0", "quick 1", "quick 2"]


@pytest.mark.parametrize("name", ["", "functions.quick:0", "naïve<|x|>", "a" * 99, "\ud83d"])
def test_the_name_of_a_tool_that_is_not_there_poisons_no_history(path, tools, name):
    """MoonshotAI/kimi-cli#2165 and its kin: a history is sent again with every request."""
    strict = Strict(Call(name))
    with Runtime(path, model=strict.model, tools=tools.all()) as runtime:
        session = runtime.create_session()
        assert session.prompt("go").result(timeout_s=WAIT_S).text == "done"
        assert "There is no tool called" in strict.outputs[0]


@pytest.mark.parametrize(
    "arguments", ['{"n": ', "[1]", "\0", "{'n': 1}", '{"n":' * 1500, '{"n": "a\\ud92c"}']
)
def test_arguments_that_are_no_object_poison_no_history(path, tools, arguments):
    """charmbracelet/crush#1169, openai/openai-agents-python#2283, openclaw/openclaw#18105."""
    strict = Strict(Call("quick", arguments))
    with Runtime(path, model=strict.model, tools=tools.all()) as runtime:
        session = runtime.create_session()
        for _ in range(2):
            assert session.prompt("go").result(timeout_s=WAIT_S).text == "done"


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00 low", "nul \0 byte", "\x1b[2J\u202e"])
def test_text_that_breaks_json_and_databases_breaks_no_session(path, text):
    """anthropics/claude-code#69927, ginlix-ai/LangAlpha#190, THU-MAIC/OpenMAIC#1502."""

    @tool
    def look() -> str:
        """Look."""
        return text

    strict = Strict([Say(f"x{text}"), Call("look")], Say(text))
    with Runtime(path, model=strict.model, tools=[look]) as runtime:
        session = runtime.create_session()
        session.prompt("go").result(timeout_s=WAIT_S)
        for action in (lambda: session.prompt(text), lambda: session.update(title=text)):
            with suppress(UnderstudyError):
                action()
        assert session.prompt("on").result(timeout_s=WAIT_S).text
        session.wait_idle(timeout_s=WAIT_S)
        assert session.prompt("on").result(timeout_s=WAIT_S).text == "done"


@pytest.mark.parametrize("answer", [[], [Think("hm")], [Say(" \n")]])
def test_an_answer_without_words_leaves_no_empty_message_behind(path, answer):
    """anomalyco/opencode#45839, dirge-code/dirge#757, MoonshotAI/kimi-code#1968."""
    strict = Strict(answer)
    with Runtime(path, model=strict.model) as runtime:
        session = runtime.create_session()
        with suppress(TurnError):
            session.prompt("go").result(timeout_s=WAIT_S)
        assert session.prompt("on").result(timeout_s=WAIT_S).text == "done"


def test_an_abort_before_the_first_word_leaves_no_empty_message_behind(path):
    """damianvtran/local-operator#189."""
    gate = Gate()
    strict = Strict([Wait(gate), Say("late")])
    with Runtime(path, model=strict.model) as runtime:
        session = runtime.create_session()
        turn = session.prompt("go")
        gate.wait_reached()
        assert turn.abort()
        assert session.prompt("on").result(timeout_s=WAIT_S).text == "done"


def test_an_image_that_the_provider_refuses_can_be_taken_out(path):
    """anthropics/claude-code#13480, boldsoftware/shelley#213."""

    def play(request):
        users = [turn for turn in request.turns if isinstance(turn, UserTurn)]
        images = [each for turn in users for each in turn.content if isinstance(each, UserFile)]
        return Fail(ModelError("400: image exceeds 5 MB maximum")) if images else Say("done")

    url = "data:image/png;base64,AAAA"
    with Runtime(path, model=ScriptedModel(play)) as runtime:
        session = runtime.create_session()
        image = FilePart(id="", session_id="", message_id="", mime="image/png", url=url)
        turn = session.prompt(["look", image])
        with pytest.raises(TurnFailed, match="5 MB"):
            turn.result(timeout_s=WAIT_S)
        session.edit(turn.message_id)
        assert session.prompt("on").result(timeout_s=WAIT_S).text == "done"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_a_model_that_raises_what_ends_loops_ends_its_turn_only(path, error):
    """livekit/agents#1386, jd/tenacity#529."""

    class Ending:
        provider_id, model_id, context_limit, output_limit = "foreign", "ending", 10_000, 100

        def __init__(self):
            self._calls = 0

        async def stream(self, request):
            self._calls += 1
            if self._calls == 1:
                raise error
            yield TextDelta("done")
            yield Finish("stop")

    with Runtime(path, model=Ending()) as runtime:
        session = runtime.create_session()
        with pytest.raises(TurnError):
            session.prompt("go").result(timeout_s=WAIT_S)
        assert session.prompt("on").result(timeout_s=WAIT_S).text == "done"


@pytest.mark.parametrize("form", ["thread", "coroutine"])
@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), RecursionError()])
def test_a_tool_that_raises_what_ends_loops_ends_its_call_only(path, error, form):
    """harbor-framework/harbor#1223."""

    @tool(name="burst")
    def burst() -> str:
        """Burst."""
        raise error

    @tool(name="burst")
    async def burst_async() -> str:
        """Burst."""
        raise error

    strict = Strict(Call("burst"))
    chosen = burst if form == "thread" else burst_async
    with Runtime(path, model=strict.model, tools=[chosen]) as runtime:
        session = runtime.create_session()
        for _ in range(2):
            assert session.prompt("go").result(timeout_s=WAIT_S).text == "done"


# --- what is too large, too deep, too many -----------------------------------------------------


def test_a_hundred_megabytes_of_output_reach_neither_the_model_nor_the_file(path):
    """anomalyco/opencode#9699, anthropics/claude-code#11155."""

    @tool
    def flood() -> str:
        """Flood."""
        return "x" * 100_000_000

    strict = Strict(Call("flood"))
    with Runtime(path, model=strict.model, tools=[flood]) as runtime:
        session = runtime.create_session()
        assert session.prompt("go").result(timeout_s=WAIT_S).text == "done"
        assert len(strict.outputs[0]) < 100_000
    assert sum(file.stat().st_size for file in path.parent.glob("a.db*")) < 5_000_000


def test_a_message_larger_than_the_context_costs_few_calls_and_no_session(path):
    """anomalyco/opencode#27924, docker/docker-agent#2235."""
    strict = Strict(context_limit=2_000, output_limit=100)
    with Runtime(path, model=strict.model) as runtime:
        session = runtime.create_session()
        with suppress(TurnError):
            session.prompt("word " * 20_000).result(timeout_s=WAIT_S)
        assert session.prompt("on").result(timeout_s=WAIT_S).text == "done"
        assert len(strict.requests) < 5


def test_an_output_larger_than_the_context_costs_few_calls_and_no_session(path):
    """anomalyco/opencode#10634, openclaw/openclaw#78562."""
    purposes = []

    @tool
    def flood() -> str:
        """Flood."""
        return "word " * 9_000

    def play(request):
        purposes.append(request.purpose)
        if request.purpose == "summary":
            return Say("short")
        done = "short" in str(request.turns) or steps_taken(request)
        return Say("done") if done else Call("flood")

    model = ScriptedModel(play, context_limit=4_000, output_limit=100)
    with Runtime(path, model=model, tools=[flood]) as runtime:
        session = runtime.create_session()
        with suppress(TurnError):
            session.prompt("go").result(timeout_s=WAIT_S)
        assert session.prompt("on").result(timeout_s=WAIT_S).text == "done"
    assert len(purposes) < 20


def test_a_provider_that_says_overflow_to_everything_ends_each_turn(path):
    """anomalyco/opencode#31152."""
    purposes = []

    def play(request):
        purposes.append(request.purpose)
        summary = request.purpose == "summary"
        return Say("short") if summary else Fail(ModelOverflow("too long"))

    with Runtime(path, model=ScriptedModel(play)) as runtime:
        session = runtime.create_session()
        for _ in range(3):
            with pytest.raises(TurnFailed):
                session.prompt("hi").result(timeout_s=WAIT_S)
    assert len(purposes) < 20


def test_tools_that_wait_for_children_leave_their_tools_a_thread(path, monkeypatch):
    """nearai/ironclaw#4084 and its kin: whoever delegates waits for who waits for its thread."""
    monkeypatch.setattr("understudy.actors.executor._TOOL_THREADS", 2)

    @tool
    def delegate(depth: int, ctx: ToolContext) -> str:
        """Delegate."""
        child = runtime.create_session(parent_id=ctx.session_id)
        turn = child.prompt(f"depth {depth}")
        return "".join(turn.text()) if depth % 2 else turn.result(timeout_s=WAIT_S).text

    def play(request):
        if steps_taken(request):
            return Say("done")
        depth = int(last_text(request).split()[1])
        return Call("delegate", {"depth": depth - 1}) if depth else Say("bottom")

    with Runtime(path, model=ScriptedModel(play), tools=[delegate]) as runtime:
        turns = [runtime.create_session().prompt("depth 3") for _ in range(4)]
        assert [turn.result(timeout_s=WAIT_S).text for turn in turns] == ["done"] * 4


def test_a_chain_of_hundreds_of_generations_is_aborted_and_deleted_from_its_root(path):
    """anomalyco/opencode#18100, #25681."""
    limits = Limits(depth=300)
    with Runtime(path, model=obedient(), durability="normal", limits=limits) as runtime:
        chain = [runtime.create_session()]
        for _ in range(limits.depth):
            chain.append(runtime.create_session(parent_id=chain[-1].id))
        turn = chain[-1].prompt("stall")
        chain[0].abort()
        with pytest.raises(TurnAborted):
            turn.result(timeout_s=WAIT_S)
        assert chain[0].delete().value == len(chain)
        assert not list(runtime.sessions())


def test_a_storm_of_prompts_and_aborts_leaves_each_prompt_one_outcome(path):
    """can1357/oh-my-pi#4508."""

    def one(number):
        if number % 2:
            return session.abort(queued=bool(number % 3))
        words = "stall" if number % 4 else f"say {number}"
        return session.prompt(words, when_busy=("queue", "steer", "interrupt")[number % 3])

    with Runtime(path, model=obedient(), durability="normal") as runtime:
        session = runtime.create_session()
        assert not [each for each in together(60, one) if isinstance(each, Exception)]
        session.abort(queued=True)
        session.wait_idle(timeout_s=WAIT_S)
        assert None not in [prompt.outcome for prompt in session.prompts()]
        assert session.prompt("say on").result(timeout_s=WAIT_S).text == "on"


# --- people ------------------------------------------------------------------------------------


def test_of_many_answers_to_one_request_one_counts(path, tools):
    """langchain-ai/langgraph#6108."""
    rules = {"guarded": "ask"}
    with Runtime(path, model=obedient(), tools=tools.all(), permissions=rules) as runtime:
        turn, ask = asked(runtime.create_session())

        def answer(number):
            if number % 2:
                return runtime.reply(ask.id, "once")
            return runtime.reply(ask.id, "reject", feedback="no")

        said = together(8, answer)
        assert sum(isinstance(each, AskClosed) for each in said) == 7
        assert turn.result(timeout_s=WAIT_S).text == "done"
        assert len(tools.runs) <= 1


@pytest.mark.parametrize("when", ["queue", "steer", "interrupt"])
def test_a_message_instead_of_an_answer_silences_nobody(path, tools, when):
    """openJiuwen-ai/agent-core#959."""
    rules = {"guarded": "ask"}
    with Runtime(path, model=obedient(), tools=tools.all(), permissions=rules) as runtime:
        session = runtime.create_session()
        first, ask = asked(session)
        second = session.prompt("say never mind", when_busy=when)
        if when == "interrupt":
            with pytest.raises(TurnAborted):
                first.result(timeout_s=WAIT_S)
        else:
            runtime.reply(ask.id, "once")
            first.result(timeout_s=WAIT_S)
        assert second.result(timeout_s=WAIT_S).text
        assert not list(runtime.asks())


def test_one_prompt_sent_by_twenty_at_once_is_one_turn(path):
    """Other words under the same id are a conflict: NorthlandPositronics/Cogtrix#1293."""
    strict = Strict()

    def send(number):
        words = "same" if number else "other"
        return session.prompt(words, message_id="msg_one").result(timeout_s=WAIT_S)

    with Runtime(path, model=strict.model) as runtime:
        session = runtime.create_session()
        said = together(20, send)
        assert sum(isinstance(each, PromptConflict) for each in said) in (1, 19)
        assert len(strict.requests) == 1


def test_ctrl_c_ends_the_wait_and_not_the_session(path):
    """letta-ai/letta#709, agno-agi/agno#6089, kagent-dev/kagent#2277."""
    with Child() as child:
        child.do(
            f"runtime = Runtime({str(path)!r}, model=obedient()).start()\n"
            "session = runtime.create_session()\n"
            "turn = session.prompt('stall')"
        )
        child.send(
            "caught = False\n"
            "try:\n"
            "    note('waiting')\n"
            "    turn.result()\n"
            "except KeyboardInterrupt: caught = True\n"
            "caught"
        )
        child.wait_note("waiting")
        os.kill(child.pid, signal.SIGINT)
        assert child.answer() is True
        assert child.do("turn.abort(); session.prompt('say on').result(timeout_s=10).text") == "on"
        assert child.do("runtime.close()") is True


def test_whoever_stops_listening_stops_nothing_and_leaves_nothing(path):
    """huggingface/smolagents#2703, edly-io/sparkth#693, openai/openai-agents-python#4079."""
    gate = Gate()
    model = ScriptedModel([[Say("one two three " * 9), Wait(gate), Say("done")]])
    with Runtime(path, model=model) as runtime:
        before = runtime.engine.publisher.subscriptions()
        turn = runtime.create_session().prompt("go")

        async def listen():
            async for _ in turn:
                break
            async for _ in turn.text():
                break

        for _ in turn:
            break
        for _ in turn.text():
            break
        asyncio.run(listen())
        gate.open()
        assert turn.result(timeout_s=WAIT_S).text.endswith("done")
        assert runtime.engine.publisher.subscriptions() == before


def test_event_loops_may_close_while_they_wait(path):
    """Intelligent-Internet/opencode-a2a#308, apecloud/ApeRAG#1229."""
    gate = Gate()

    def play(request):
        return [Wait(gate), Say("done")] if last_text(request) == "wait" else Say("quick")

    async def leave():
        turn = await session.prompt("wait")
        waiting = asyncio.ensure_future(turn.result())
        await asyncio.sleep(0)
        assert not waiting.done()
        return turn

    async def come_back(turn):
        other = await session.prompt("x")
        return (await turn.result()).text, (await other.result()).text

    with Runtime(path, model=ScriptedModel(play)) as runtime:
        session = runtime.create_session()
        turn = asyncio.run(leave())
        gate.open()
        assert asyncio.run(come_back(turn)) == ("done", "quick")


# --- forks, compactions, deletes ---------------------------------------------------------------


def test_a_fork_of_a_session_at_work_is_at_rest(path, tools):
    """anomalyco/opencode#39656, damianvtran/local-operator#637."""
    with Runtime(path, model=obedient(), tools=tools.all()) as runtime:
        session = runtime.create_session()
        turn = session.prompt("call block")
        assert tools.started.wait(WAIT_S)
        copy = session.fork()
        assert copy.status().type == "idle"
        assert copy.prompt("say free").result(timeout_s=WAIT_S).text == "free"
        tools.release.set()
        assert turn.result(timeout_s=WAIT_S).text == "done"
    assert plant.open_counts(path) == SETTLED


def test_a_compaction_that_is_interrupted_or_forked_loses_no_history(path):
    """NousResearch/hermes-agent#79391, anomalyco/opencode#47178."""
    gate, seen = Gate(), []

    def play(request):
        if request.purpose == "summary":
            return [Wait(gate), Say("short")]
        seen.append(str(request.turns))
        return Say("word " * 300)

    with Runtime(path, model=ScriptedModel(play)) as runtime:
        session = runtime.create_session()
        for number in range(3):
            session.prompt(f"fact {number}").result(timeout_s=WAIT_S)
        session.compact()
        gate.wait_reached()
        copy = session.fork()
        session.abort()
        for each in (session, copy):
            assert each.prompt("on").result(timeout_s=WAIT_S).text
            assert all(f"fact {number}" in seen[-1] for number in range(3))
    assert plant.open_counts(path) == SETTLED


def test_no_model_is_called_for_a_deleted_session(path):
    """NousResearch/hermes-agent#102895, microsoft/vscode#286249."""
    calls = []

    def play(request):
        calls.append(request.session_id)
        return Call("fails", {"n": len(calls)})

    limits = Limits(repeated_calls=10**6, steps=10**6)
    with Runtime(path, model=ScriptedModel(play), tools=Tools().all(), limits=limits) as runtime:
        session, other = runtime.create_session(), runtime.create_session()
        with session.events() as events:
            session.prompt("go")
            until(events, lambda event: len(calls) > 3)
        session.delete()
        calls.clear()
        with other.events() as events:
            other.prompt("go")
            until(events, lambda event: len(calls) > 3)
        assert set(calls) == {other.id}


# --- hosts and files ---------------------------------------------------------------------------


def test_after_the_close_nothing_works_and_nothing_opens_again(path):
    """openai/openai-agents-python#3983, #4109, usestrix/strix#1012."""
    runtime = Runtime(path, model=obedient()).start()
    session = runtime.create_session()
    turn = session.prompt("stall")
    assert together(20, lambda _: runtime.close()) == [True] * 20
    with pytest.raises((RuntimeClosed, TurnAborted)):
        turn.result(timeout_s=WAIT_S)
    calls = [session.messages, session.delete, session.status, session.compact, session.fork]
    for call in [*calls, runtime.sessions, runtime.create_session, lambda: session.prompt("x")]:
        with pytest.raises(RuntimeClosed):
            call()
    assert plant.open_counts(path) == SETTLED


def test_an_error_of_the_host_is_its_own_and_its_sessions_are_closed(path):
    """usestrix/strix#1012."""

    def host():
        with Runtime(path, model=obedient()) as runtime:
            runtime.create_session().prompt("stall")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        host()
    assert plant.open_counts(path) == SETTLED


def test_a_process_that_ends_without_a_close_ends_and_the_next_is_whole(path):
    """strands-agents/harness-sdk#859, EvoScientist/EvoScientist#463."""
    code = (
        "from understudy import Runtime\n"
        "from cast import obedient\n"
        f"runtime = Runtime({str(path)!r}, model=obedient()).start()\n"
        "session = runtime.create_session(session_id='ses_left')\n"
        "session.prompt('stall'), session.prompt('say late')\n"
    )
    folders = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.session("ses_left")
        session.wait_idle(timeout_s=WAIT_S)
        assert [prompt.outcome for prompt in session.prompts()] == ["interrupted", "answered"]


def test_a_lock_of_another_program_delays_and_loses_nothing(path):
    """anomalyco/opencode#47566, #21215."""
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            said = []
            thread = threading.Thread(target=lambda: said.append(session.prompt("say on")))
            thread.start()
            thread.join(0.3)
            assert not said
            other.execute("ROLLBACK")
        thread.join(WAIT_S)
        assert said[0].result(timeout_s=WAIT_S).text == "on"


@pytest.mark.parametrize("fate", ["deleted", "moved", "replaced"])
def test_nothing_is_accepted_into_a_file_that_is_gone(path, fate):
    """openai/codex#22444: its disk is full of files that nobody sees."""
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        session.prompt("say before").result(timeout_s=WAIT_S)
        session.wait_idle(timeout_s=WAIT_S)
        aside = path.rename(path.with_name("aside.db"))
        if fate == "replaced":
            path.write_bytes(b"")
        elif fate == "deleted":
            aside.unlink()
        with pytest.raises(StoreUnreadable, match="moved, deleted or replaced"):
            session.prompt("say lost")
        if fate == "moved":
            aside.rename(path)
            assert session.prompt("say after").result(timeout_s=WAIT_S).text == "after"


def test_a_link_to_a_file_is_that_file(path, tmp_path):
    """QwenLM/qwen-code#7164, by another name: two owners of one session."""
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)
    with Runtime(path, model=obedient()) as runtime, Runtime(link, model=obedient()) as other:
        session = runtime.create_session()
        session.prompt("stall")
        with pytest.raises(SessionClaimed):
            other.session(session.id).prompt("say mine")
        [prompt] = session.prompts()
        assert prompt.outcome is None


@pytest.mark.parametrize("name", ["a b.db", "q?x=1#h.db", "p%20;&.db", "ü 🧩.db", "'q'.db"])
def test_a_file_may_have_any_name_and_its_process_move_about(tmp_path, monkeypatch, name):
    """Relative names and addresses: what is opened later is the same file."""
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    with Runtime(name, model=obedient()) as runtime:
        session = runtime.create_session()
        monkeypatch.chdir(tmp_path / "sub")
        said = together(6, lambda n: session.prompt(f"say {n}").result(timeout_s=WAIT_S).text)
        assert sorted(said) == [str(n) for n in range(6)]
    assert not list((tmp_path / "sub").iterdir())
    assert (tmp_path / name).exists()
