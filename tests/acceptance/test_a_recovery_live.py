"""A: recovery without the death of the process: streams, aborts, crashes, the watchdog."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cast import Tools, obedient
from plant import open_counts, query, records

from understudy import Limits, RestartPolicy, Runtime, ScriptedModel, Session, Turn
from understudy.actors.models.scripted import Call, End, Fail, Gate, Say, Stall, Wait
from understudy.errors import ModelError, ModelUnavailable, TurnAborted, TurnFailed
from understudy.store.records import ToolCompleted, ToolFailed

FAST = RestartPolicy(backoff_s=0.001)


def last_calls(session: Session) -> list[Any]:
    return [part for message in session.messages() for part in message.tools]


def wait_for_result(session: Session, tool: str) -> None:
    """Wait until the result of a call is in the store."""
    with session.events(after=0) as events:
        for event in events:
            part = getattr(event.data, "part", None)
            if getattr(part, "tool", "") == tool and isinstance(
                part.state, ToolCompleted | ToolFailed
            ):
                return


def assert_closed(path: Path, *, asks: int = 0) -> None:
    counts = open_counts(path)
    assert counts == {"message": 0, "part": 0, "inbox": 0, "ask": asks}


# --- the ends of a stream ----------------------------------------------------------------------


@pytest.mark.parametrize("finish", ["stop", "length", "content-filter", "other"])
def test_a13_a_normal_end_of_the_stream_leaves_no_call_open(
    path: Path, tools: Tools, finish: Any
) -> None:
    """Calls that can never run are errors at once, whatever the stream calls its end."""
    model = ScriptedModel(
        [
            [Call("nosuch"), Call("quick", "{cut off"), Call("quick", {"n": 1}), End(finish)],
            "done",
        ]
    )
    with Runtime(path, model=model, tools=tools.all()) as runtime:
        session = runtime.create_session()
        session.prompt("go").result(timeout_s=30)
        states = [part.state for part in last_calls(session)]
        assert [type(state) for state in states] == [ToolFailed, ToolFailed, ToolCompleted]
        assert_closed(path)


@pytest.mark.parametrize(
    "end",
    [
        Fail(ModelError("the model is gone")),
        Fail(ModelUnavailable("the stream broke")),
        Fail(RuntimeError("a bug in the adapter")),
        End(None),
    ],
    ids=["error", "transient", "bug", "no finish"],
)
def test_a14_an_end_by_error_leaves_nothing_open(path: Path, tools: Tools, end: Any) -> None:
    model = ScriptedModel([[Say("Let me "), Call("quick"), end]])
    limits = Limits(model_attempts=1)
    with Runtime(path, model=model, tools=tools.all(), limits=limits) as runtime:
        session = runtime.create_session()
        with pytest.raises(TurnFailed):
            session.prompt("go").result(timeout_s=30)
        assert_closed(path)
        message = session.messages()[-1]
        assert message.text == "Let me "
        assert message.info.error is not None
        assert session.status().type == "idle"
        assert tools.runs == [], "a call of a broken answer does not run"


def test_a15_an_abort_ends_running_and_waiting_calls(path: Path, tools: Tools) -> None:
    with Runtime(
        path, model=obedient(), tools=tools.all(), permissions={"guarded": "ask"}
    ) as runtime:
        session = runtime.create_session()
        turn = session.prompt("call quick {}\ncall block {}\ncall guarded {}")
        wait_for_result(session, "quick")
        assert tools.started.wait(30)
        assert session.abort()
        with pytest.raises(TurnAborted):
            turn.result(timeout_s=30)
        quick, block, guarded = (part.state for part in last_calls(session))
        assert isinstance(quick, ToolCompleted)
        assert block.error == guarded.error == "Tool execution was interrupted (aborted)"
        assert_closed(path)
        assert not session.asks()


def test_a16_a_stream_that_goes_silent_ends_in_a_finished_message(path: Path) -> None:
    limits = Limits(stream_idle_s=0.05, model_attempts=1)
    model = ScriptedModel([[Say("Half a sen"), Stall()]])
    with Runtime(path, model=model, limits=limits) as runtime:
        session = runtime.create_session()
        with pytest.raises(TurnFailed):
            session.prompt("go").result(timeout_s=30)
        message = session.messages()[-1]
        assert (message.text, message.info.finish) == ("Half a sen", None)
        assert message.info.error is not None
        assert_closed(path)


# --- one routine -------------------------------------------------------------------------------


def _shape(session: Session) -> list[Any]:
    """The last answer as it was left, without ids, times and the words of the reason."""
    shapes: list[Any] = []
    message = session.messages()[1]
    for part in message.parts:
        record = msgspec.to_builtins(part)
        state = record.get("state", {})
        metadata = {k: v for k, v in state.get("metadata", {}).items() if k != "reason"}
        shapes.append(
            (
                record["type"],
                record.get("text"),
                state.get("status"),
                state.get("interrupted"),
                metadata,
                state.get("error", "").partition(" (")[0],
            )
        )
    return [*shapes, message.info.error is not None, message.info.finish]


def _reasons(session: Session) -> set[str]:
    return {part.state.error for part in last_calls(session) if isinstance(part.state, ToolFailed)}


def test_a17_live_cleanup_and_startup_recovery_leave_the_same_states(
    path: Path, tmp_path: Path
) -> None:
    text = "say Let me \ncall quick {}\ncall block {}"
    shapes, reasons = {}, {}

    def run(name: str, end: Any, **options: Any) -> None:
        tools = Tools()
        try:
            with Runtime(
                tmp_path / f"{name}.db",
                model=obedient(),
                tools=tools.all(),
                restart=FAST,
                **options,
            ) as runtime:
                session = runtime.create_session()
                turn = session.prompt(text)
                wait_for_result(session, "quick")
                assert tools.started.wait(30)
                end(runtime, session, turn)
                session.wait_idle(timeout_s=30)
                shapes[name], reasons[name] = _shape(session), _reasons(session)
        finally:
            tools.release.set()

    def crash(_: Runtime, session: Session, turn: Turn) -> None:
        with pytest.raises(Exception, match="crash"):
            session._crash()
        with pytest.raises(TurnAborted):
            turn.result(timeout_s=30)

    def time_out(_: Runtime, session: Session, turn: Turn) -> None:
        with pytest.raises((TurnAborted, TurnFailed)):
            turn.result(timeout_s=30)

    run("abort", lambda runtime, session, turn: session.abort())
    run("crash", crash)
    run("timeout", time_out, limits=Limits(turn_s=0.2))
    restarted = tmp_path / "restart.db"
    tools = Tools()
    first = Runtime(restarted, model=obedient(), tools=tools.all()).start()
    session_id = first.create_session().id
    first.session(session_id).prompt(text)
    wait_for_result(first.session(session_id), "quick")
    assert tools.started.wait(30)
    _pull_the_plug(first)
    with Runtime(restarted, model=obedient()) as runtime:
        session = runtime.session(session_id)
        shapes["restart"], reasons["restart"] = _shape(session), _reasons(session)
    tools.release.set()
    assert shapes["abort"] == shapes["crash"] == shapes["timeout"] == shapes["restart"]
    assert len(set(map(frozenset, reasons.values()))) == 4, "only the reason tells them apart"


def _pull_the_plug(runtime: Runtime) -> None:
    """End a runtime as a crash would: nothing more is written, nothing is let go in the store."""
    runtime.engine.upkeep.stop()
    assert runtime.engine.store._writer is not None
    runtime.engine.store._writer.close(5)
    runtime.engine.store.lease.let_go()
    runtime.close()


# --- what is alive is left alone ---------------------------------------------------------------


def test_a20_and_f035_a_quiet_tool_is_not_failed_by_the_watchdog(path: Path, tools: Tools) -> None:
    with Runtime(path, model=obedient(), tools=tools.all(), handler_limit_s=0.001) as runtime:
        session = runtime.create_session()
        turn = session.prompt("call block {}")
        assert tools.started.wait(30)
        cursor = runtime.cursor
        for _ in range(200):
            runtime.engine.upkeep._lost_executions()
            runtime.engine.upkeep._orphans()
            runtime.engine.upkeep._hung_handlers()
        assert runtime.cursor == cursor, "the watchdog changed nothing"
        tools.release.set()
        assert turn.result(timeout_s=30).text == "done"
        assert [part.state.output for part in last_calls(session)] == ["late"]


def test_a20_a_quiet_stream_is_not_failed_by_the_watchdog(path: Path) -> None:
    gate = Gate()
    model = ScriptedModel([[Wait(gate), Say("at last")]])
    with Runtime(path, model=model) as runtime:
        turn = runtime.create_session().prompt("go")
        gate.wait_reached()
        for _ in range(200):
            runtime.engine.upkeep._lost_executions()
            runtime.engine.upkeep._orphans()
        gate.open()
        assert turn.result(timeout_s=30).text == "at last"


@pytest.mark.parametrize("loss", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
def test_a22_a_busy_session_with_no_live_executor_is_found_and_finished(
    path: Path, loss: type[BaseException]
) -> None:
    """The model's task dies without a word; nobody restarts anything."""
    model = ScriptedModel([[Say("Half "), Fail(loss)], "whole"])
    with Runtime(path, model=model) as runtime:
        session = runtime.create_session()
        turn = session.prompt("go")
        with pytest.raises((TurnAborted, TurnFailed)):
            turn.result(timeout_s=30)
        assert_closed(path)
        assert session.status().type == "idle"
        assert session.prompt("again").result(timeout_s=30).text == "whole"


def test_a22_a_lost_tool_is_found_and_finished(path: Path, tools: Tools) -> None:
    with Runtime(path, model=obedient(), tools=tools.all()) as runtime:
        session = runtime.create_session()
        turn = session.prompt("call block {}")
        assert tools.started.wait(30)
        execution = runtime.engine.executor._executions[session.id]
        (task,) = execution.tasks.values()
        runtime.engine.executor._loop.call_soon_threadsafe(task.cancel)
        with pytest.raises(TurnAborted) as caught:
            turn.result(timeout_s=30)
        assert caught.value.reason in ("lost", "execution lost")
        assert_closed(path)


# --- one actor ---------------------------------------------------------------------------------


def test_a25_the_restart_of_one_actor_recovers_its_session_only(path: Path) -> None:
    gate = Gate()
    model = ScriptedModel(lambda request: [Wait(gate), Say("One two")])
    with Runtime(path, model=model, restart=FAST) as runtime:
        crashing, other, idle = (runtime.create_session() for _ in range(3))
        crashed, whole = crashing.prompt("go"), other.prompt("go")
        gate.wait_reached()
        events = runtime.events(deltas=False)
        rows = query(path, "SELECT epoch FROM claim WHERE session_id != ?", crashing.id)
        with pytest.raises(Exception, match="crash"):
            crashing._crash()
        with pytest.raises(TurnAborted):
            crashed.result(timeout_s=30)
        crashing.wait_idle(timeout_s=30)
        heard = []
        for event in events:
            heard.append(event.session_id)
            if event.type == "session.idle":
                break
        assert set(heard) == {crashing.id}
        assert query(path, "SELECT epoch FROM claim WHERE session_id != ?", crashing.id) == rows
        gate.open()
        assert whole.result(timeout_s=30).text == "One two"
        assert idle.status().type == "idle"


def test_a25_crashes_in_a_row_recover_and_the_queue_is_answered(path: Path) -> None:
    with Runtime(path, model=obedient(), restart=FAST) as runtime:
        session = runtime.create_session()
        for _ in range(3):
            with pytest.raises(Exception, match="crash"):
                session._crash()
            assert session.prompt("say hello").result(timeout_s=30).text == "hello"
        assert runtime.restarts == 3
        assert_closed(path)


# --- prompts around a start --------------------------------------------------------------------


def test_a23_and_f032_a_prompt_sent_during_start_up_is_answered_once(path: Path) -> None:
    tools = Tools()
    first = Runtime(path, model=obedient(), tools=tools.all()).start()
    session_id = first.create_session().id
    first.session(session_id).prompt("call block {}")
    assert tools.started.wait(30)
    _pull_the_plug(first)
    tools.release.set()

    model = obedient()
    reached, proceed = threading.Event(), threading.Event()

    def fault(point: str) -> None:
        # The first transaction of the start is held: the runtime stands in the middle of it.
        if point == "begin" and not reached.is_set():
            reached.set()
            proceed.wait(30)

    second = Runtime(path, model=model, fault=fault)
    starter = threading.Thread(target=second.start)
    starter.start()
    try:
        assert reached.wait(30)
        turns: list[Any] = []
        prompter = threading.Thread(
            target=lambda: turns.append(Session(second, session_id).prompt("say hello"))
        )
        prompter.start()
        proceed.set()
        prompter.join(30)
        starter.join(30)
        assert turns[0].result(timeout_s=30).text == "hello"
        prompts = second.session(session_id).prompts()
        assert [prompt.outcome for prompt in prompts] == ["interrupted", "answered"]
        assert model.calls == 1
        assert_closed(path)
    finally:
        proceed.set()
        starter.join(30)
        second.close()


def test_a23_an_accepted_prompt_that_waits_is_no_orphan(path: Path, tools: Tools) -> None:
    with Runtime(path, model=obedient(), tools=tools.all()) as runtime:
        session = runtime.create_session()
        session.prompt("call wait {}")
        assert tools.started.wait(30)
        session.prompt("say second")
    assert open_counts(path)["inbox"] == 1
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.session(session.id)
        session.wait_idle(timeout_s=30)
        assert [prompt.outcome for prompt in session.prompts()] == ["interrupted", "answered"]
    assert all(message["role"] for message in records(path, "message").values())
