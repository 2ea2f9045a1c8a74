"""Odd ends: a drain that is too short, a tool that is gone, a wait for what is deleted."""

import gc
import threading

from understudy import ToolContext, tool
from understudy.actors.models.scripted import Call, Gate, Say, ScriptedModel, Wait, steps_taken


def calls_once(tool_name, **arguments):
    return lambda request: Say("after") if steps_taken(request) else Call(tool_name, arguments)


def test_a_drain_that_is_too_short_interrupts_what_still_runs(opened):
    gate = Gate()
    runtime = opened(ScriptedModel([[Say("one "), Wait(gate)]] * 2))
    sessions = [runtime.create_session() for _ in range(2)]
    for session in sessions:
        session.prompt("go")
    gate.wait_reached()
    assert runtime.close(drain_s=0.1)
    runtime = opened()
    assert not runtime.engine.reports.latest, "nothing was left to recover"
    for session in sessions:
        (prompt,) = runtime.session(session.id).prompts()
        assert prompt.outcome == "interrupted"


def test_an_app_that_collects_no_garbage_is_left_to_it(opened, path):
    runtime = opened()
    runtime.create_session().prompt("Hello").result(timeout_s=10)
    runtime.close()
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        opened()
        assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_a_call_that_was_allowed_after_its_tool_was_taken_away_fails_and_says_so(opened, watching):
    @tool(permission="deploy")
    def deploy() -> str:
        """Deploy."""
        return "deployed"

    model = ScriptedModel(calls_once("deploy"))
    runtime = opened(model, tools=[deploy], permissions={"deploy": "ask"})
    session = runtime.create_session()
    session.prompt("go", message_id="msg_go")
    ask = watching(session, after=0).until("permission.asked").data.info
    runtime.close()
    runtime = opened(model, permissions={"deploy": "ask"})
    session = runtime.session(session.id)
    runtime.reply(ask.id, "once")
    session.wait_idle(timeout_s=10)
    (call,) = session.messages()[1].tools
    assert call.state.status == "error" and "no tool called deploy" in call.state.error
    assert session.prompts()[0].outcome == "answered"


def test_a_tool_whose_patterns_cannot_be_told_does_not_run(opened):
    runs = []

    @tool(permission="write", patterns=lambda arguments: 1 / 0)
    def write(name: str) -> str:
        """Write."""
        runs.append(name)
        return "written"

    runtime = opened(ScriptedModel(calls_once("write", name="a")), tools=[write])
    session = runtime.create_session()
    assert session.prompt("go").result(timeout_s=10).text == "after"
    (call,) = session.messages()[1].tools
    assert call.state.status == "error" and "ZeroDivisionError" in call.state.error
    assert runs == []


def test_who_waits_for_rest_is_told_when_the_session_is_deleted(opened, crew, eventually):
    gate = Gate()
    runtime = opened(ScriptedModel([[Wait(gate), Say("done")]]))
    session = runtime.create_session()
    session.prompt("go")
    gate.wait_reached()
    calls = crew().call(lambda: session.wait_idle(timeout_s=10)).start()
    eventually(lambda: len(runtime.engine.outcomes) >= 1)
    session.delete()
    (outcome,) = calls.outcomes()
    assert not isinstance(outcome, AssertionError)


def test_a_tool_that_waits_for_a_person_is_told_that_the_runtime_closes(opened, watching):
    told, over = [], threading.Event()

    @tool
    def wonder(ctx: ToolContext) -> str:
        """Wonder."""
        try:
            ctx.ask("deploy")
        except BaseException as error:
            told.append(type(error))
            raise
        finally:
            over.set()
        return "allowed"

    model = ScriptedModel(calls_once("wonder"))
    runtime = opened(model, tools=[wonder], permissions={"deploy": "ask"})
    turn = runtime.create_session().prompt("go")
    watching(turn).until("permission.asked")
    assert runtime.close()
    assert over.wait(15)
    assert len(told) == 1
