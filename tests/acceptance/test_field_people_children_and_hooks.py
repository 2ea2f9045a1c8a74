"""Field failures: permissions, children, clocks, hooks, the actor library (numbers 128 to 146)."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest
from cast import last_text, obedient
from compacting import WAIT_S, together, until
from processes import Child

from understudy import Runtime, ToolContext, tool
from understudy.actors.clock import VirtualClock
from understudy.actors.models.scripted import Call, Fail, Gate, Say, ScriptedModel, Stall, Wait
from understudy.errors import (
    ActorCrashed,
    AskClosed,
    ModelError,
    SessionError,
    SessionNotFound,
    TurnAborted,
    TurnError,
    TurnFailed,
    UnderstudyError,
)

ASK = {"guarded": "ask"}


def asked(runtime):
    """The one request that waits for a person, once it is there."""
    with runtime.events(after=0, types=["permission.asked"]) as events:
        next(iter(events))
    [ask] = runtime.asks()
    return ask


def killed_while_asking(path):
    with Child() as child:
        child.do(
            "tools = Tools()\n"
            f"runtime = Runtime({str(path)!r}, model=obedient(), tools=tools.all(), "
            "permissions={'guarded': 'ask'}).start()\n"
            "session = runtime.create_session(session_id='ses_asks')\n"
            "session.prompt('call guarded')\n"
            "with runtime.events(after=0, types=['permission.asked']) as events: next(iter(events))"
        )
        child.kill()


# --- permissions -------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", ["once", "always", "reject"])
def test_f128_a_request_outlives_its_process_and_can_be_answered(path, tools, reply):
    killed_while_asking(path)
    with Runtime(path, model=obedient(), tools=tools.all(), permissions=ASK) as runtime:
        session = runtime.session("ses_asks")
        [ask] = runtime.asks()
        assert session.status().asks == 1
        runtime.reply(ask.id, reply, feedback="no, thanks" if reply == "reject" else None)
        [prompt] = session.prompts()
        assert session.turn(prompt.message_id).result(timeout_s=WAIT_S).text == "done"
        assert tools.runs == ([] if reply == "reject" else ["guarded"])
        assert list(runtime.asks()) == []


def test_f130_whoever_comes_back_finds_the_request_and_answers_it(path, tools):
    with Runtime(path, model=obedient(), tools=tools.all(), permissions=ASK) as runtime:
        session = runtime.create_session()
        with runtime.events() as events:
            turn = session.prompt("call guarded")
            until(events, lambda event: event.type == "permission.asked")
        # The first watcher is gone; nothing was denied and nothing lost.
        again = runtime.session(session.id)
        [ask] = again.asks()
        runtime.reply(ask.id, "once")
        assert turn.result(timeout_s=WAIT_S).text == "done"
        with pytest.raises(AskClosed):
            runtime.reply(ask.id, "once")


def test_f131_a_crashed_asker_has_its_request_answerable_or_closed(path, tools):
    with Runtime(path, model=obedient(), tools=tools.all(), permissions=ASK) as runtime:
        session = runtime.create_session()
        turn = session.prompt("call guarded")
        ask = asked(runtime)
        with pytest.raises(ActorCrashed):
            session._crash()
        runtime.reply(ask.id, "once")
        assert turn.result(timeout_s=WAIT_S).text == "done"
        assert list(runtime.asks()) == []


@pytest.mark.parametrize("end", ["abort", "delete", "revert"])
def test_f131_what_ends_the_asker_closes_its_request(path, tools, end):
    with Runtime(path, model=obedient(), tools=tools.all(), permissions=ASK) as runtime:
        session = runtime.create_session()
        turn = session.prompt("call guarded")
        ask = asked(runtime)
        if end == "revert":
            session.revert(turn.message_id)
        else:
            getattr(session, end)()
        assert list(runtime.asks()) == []
        with pytest.raises((AskClosed, LookupError)):
            runtime.reply(ask.id, "once")
        assert tools.runs == []


def test_f133_an_answer_after_a_restart_reaches_the_turn_at_once(path, tools):
    killed_while_asking(path)
    with Runtime(path, model=obedient(), tools=tools.all(), permissions=ASK) as runtime:
        session = runtime.session("ses_asks")
        [ask] = runtime.asks()
        began = time.monotonic()
        runtime.reply(ask.id, "once")
        session.wait_idle(timeout_s=WAIT_S)
        assert time.monotonic() - began < 5.0
        assert tools.runs == ["guarded"]


# --- children ----------------------------------------------------------------------------------


@pytest.fixture
def family(path):
    """Four generations; ``idle`` ones have nothing to do."""
    with Runtime(path, model=obedient()) as runtime:

        def make(idle=()):
            parent_id, members = None, []
            for generation in range(4):
                session = runtime.create_session(parent_id=parent_id)
                parent_id = session.id
                turn = None if generation in idle else session.prompt("stall")
                members.append((session, turn))
            return runtime, members

        yield make


@pytest.mark.parametrize("idle", [(), (1,), (1, 2), (0,)], ids=lambda each: f"idle {each}")
@pytest.mark.parametrize("how", ["abort", "delete"])
def test_f134_what_ends_the_root_ends_all_generations(family, how, idle):
    runtime, members = family(idle)
    getattr(members[0][0], how)()
    for session, turn in members:
        if turn is not None:
            with pytest.raises((TurnError, SessionNotFound)):
                turn.result(timeout_s=5.0)
        if how == "abort":
            session.wait_idle(timeout_s=WAIT_S)
            assert session.status().type == "idle"
    assert runtime.statuses() == {}
    assert len(runtime.sessions(limit=None)) == (4 if how == "abort" else 0)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX's")
def test_f136_an_abort_ends_the_processes_of_the_tools(path):
    started = threading.Event()
    processes = []

    @tool
    def sleeper(context: ToolContext) -> str:
        """Start a process and wait for it."""
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
        )
        processes.append(process)
        context.track(process)
        started.set()
        process.wait()
        return "over"

    with Runtime(path, model=obedient(), tools=[sleeper]) as runtime:
        turn = runtime.create_session().prompt("call sleeper")
        assert started.wait(WAIT_S)
        turn.abort()
        with pytest.raises(TurnAborted):
            turn.result(timeout_s=WAIT_S)
        assert processes[0].wait(WAIT_S) != 0


@pytest.mark.parametrize("end", ["ok", "fail", "abort", "crash", "delete"])
def test_f137_a_child_s_outcome_reaches_its_parent_once_and_truly(path, end):
    gate, told = Gate(), []

    def script(request):
        text = last_text(request)
        if text == "child work":
            return [Wait(gate), Fail(ModelError("no")) if end == "fail" else Say("child done")]
        if request.turns and text == "delegate" and not told:
            return Call("delegate")
        return Say("parent done")

    @tool
    def delegate(context: ToolContext) -> str:
        """Let a child session do it."""
        child = runtime.create_session(parent_id=context.session_id)
        children.append(child)
        try:
            told.append(child.prompt("child work").result(timeout_s=WAIT_S).text)
        except UnderstudyError as error:
            told.append(type(error).__name__)
        return told[-1]

    children = []
    with Runtime(path, model=ScriptedModel(script), tools=[delegate]) as runtime:
        turn = runtime.create_session().prompt("delegate")
        gate.wait_reached()
        [child] = children
        if end == "abort":
            child.abort()
        elif end == "delete":
            child.delete()
        elif end == "crash":
            with pytest.raises(ActorCrashed):
                child._crash()
        gate.open()
        assert turn.result(timeout_s=WAIT_S).text == "parent done"
        wanted = {
            "ok": ["child done"],
            "fail": ["TurnFailed"],
            "abort": ["TurnAborted"],
            "crash": ["TurnAborted"],
            "delete": [told[0] if told[0] in ("SessionNotFound", "TurnAborted") else None],
        }
        assert told == wanted[end]
        [call] = [part for m in turn.session.messages() for part in m.tools]
        assert call.state.output == told[0]


def test_f137_after_a_kill_both_have_an_outcome(path):
    with Child() as child:
        child.do(
            "def script(request):\n"
            "    if last_text(request) == 'child work': return Stall()\n"
            "    return Call('delegate')\n"
            "@tool\n"
            "def delegate(context: ToolContext) -> str:\n"
            "    'Let a child session do it.'\n"
            "    mine = runtime.create_session(parent_id=context.session_id)\n"
            "    turn = mine.prompt('child work')\n"
            "    note('working')\n"
            "    return turn.result().text\n"
            "model = ScriptedModel(script)\n"
            f"runtime = Runtime({str(path)!r}, model=model, tools=[delegate]).start()\n"
            "session = runtime.create_session(session_id='ses_parent').prompt('go')"
        )
        child.wait_note("working")
        child.kill()
    with Runtime(path, model=obedient()) as runtime:
        parent = runtime.session("ses_parent")
        [mine] = parent.children()
        for session in (parent, mine):
            session.wait_idle(timeout_s=WAIT_S)
            assert [prompt.outcome for prompt in session.prompts()] == ["interrupted"]


# --- clocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew_s", [-600, 600])
def test_f139_a_skewed_clock_changes_neither_the_order_nor_who_answers_whom(path, skew_s):
    clock = VirtualClock()
    with Runtime(path, model=obedient(), clock=clock) as runtime:
        session = runtime.create_session()
        for number in range(6):
            clock.jump_wall(skew_s if number % 2 else -skew_s)
            # Ids that sort the wrong way round, as a caller's may.
            turn = session.prompt(f"say {number}", message_id=f"msg_{9 - number}")
            assert turn.result(timeout_s=WAIT_S).text == str(number)
        messages = list(session.messages())
        assert [m.text for m in messages[1::2]] == [str(n) for n in range(6)]
        for user, answer in zip(messages[::2], messages[1::2], strict=True):
            assert answer.info.parent_id == user.id
            assert answer.info.time.completed >= answer.info.time.created


@pytest.mark.parametrize("jump_s", [-3600, 86_400])
def test_f140_a_clock_that_jumps_expires_nothing_and_keeps_nothing_for_ever(path, jump_s):
    clock, gate = VirtualClock(), Gate()
    model = ScriptedModel(lambda request: [Wait(gate), Say("healthy")])
    with Runtime(path, model=model, clock=clock) as runtime:
        internal = runtime.create_session(internal=True)
        turn = runtime.create_session().prompt("go")
        gate.wait_reached()
        clock.jump_wall(jump_s)
        runtime.engine.upkeep.tick()
        assert runtime.tracker.is_bypassed(internal.id)
        gate.open()
        assert turn.result(timeout_s=WAIT_S).text == "healthy"
        clock.advance(5 * 3600)
        assert not runtime.tracker.is_bypassed(internal.id)


# --- hooks -------------------------------------------------------------------------------------


def test_f142_the_end_of_a_session_starts_one_session_not_six_thousand(path):
    calls, done = [], threading.Event()

    def on_end(call):
        calls.append(call.session.id)
        if len(calls) < 20:
            inner = call.session.runtime.create_session(title="diary")
            inner.prompt("say it ended").result(timeout_s=WAIT_S)
            inner.delete()
        done.set()

    with Runtime(path, model=obedient(), hooks={"session_end": on_end}) as runtime:
        session = runtime.create_session()
        session.delete()
        assert done.wait(WAIT_S)
        runtime.create_session().prompt("say a").result(timeout_s=WAIT_S)
        assert calls == [session.id]


def test_f143_a_stop_hook_that_prompts_its_session_is_not_called_for_that(path):
    calls = []

    def on_stop(call):
        calls.append(call.message_id)
        if len(calls) < 20:
            call.session.prompt("say checked").result(timeout_s=WAIT_S)

    with Runtime(path, model=obedient(), hooks={"after_turn": on_stop}) as runtime:
        session = runtime.create_session()
        with session.events() as events:
            turn = session.prompt("say a")
            for _ in range(2):
                until(events, lambda event: event.type == "prompt.settled")
        session.wait_idle(timeout_s=WAIT_S)
        assert calls == [turn.message_id]
        assert [m.text for m in session.messages() if m.role == "assistant"] == ["a", "checked"]


# --- the actor library -------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["session_start", "before_prompt", "after_turn"])
def test_f145_a_session_may_be_deleted_from_its_own_hook(path, hook):
    deleted = threading.Event()

    def on_hook(call):
        call.session.delete(missing_ok=True)
        deleted.set()

    with Runtime(path, model=obedient(), hooks={hook: on_hook}) as runtime:
        session = runtime.create_session()
        with contextlib.suppress(SessionError, TurnError):
            session.prompt("say a").result(timeout_s=WAIT_S)
        assert deleted.wait(WAIT_S)
        assert list(runtime.sessions()) == []


def test_f145_a_tool_may_delete_the_session_it_works_for(path):
    @tool
    def end(context: ToolContext) -> str:
        """End this session."""
        runtime.session(context.session_id).delete()
        return "gone"

    with Runtime(path, model=obedient(), tools=[end]) as runtime:
        turn = runtime.create_session().prompt("call end")
        with pytest.raises((SessionNotFound, TurnAborted)):
            turn.result(timeout_s=WAIT_S)
        assert list(runtime.sessions()) == []


def test_f146_every_caller_that_waits_is_answered_when_the_actor_crashes(path):
    model = ScriptedModel(lambda r: Stall() if last_text(r) == "hang" else Say("answered"))
    with Runtime(path, model=model) as runtime:
        session = runtime.create_session()
        session.prompt("hang")

        def ask(number):
            if number == 25:
                return session._crash()
            return session.prompt(f"say {number}")

        given = together(50, ask)
        session.wait_idle(timeout_s=WAIT_S)
        for each in given:
            if isinstance(each, Exception):
                assert isinstance(each, ActorCrashed | TurnFailed), each
            else:
                assert each.result(timeout_s=WAIT_S).text == "answered"
        accepted = [p for p in session.prompts() if p.outcome == "answered"]
        assert len(accepted) == sum(not isinstance(each, Exception) for each in given)
