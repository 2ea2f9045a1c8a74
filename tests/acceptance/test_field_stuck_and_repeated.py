"""Field failures: stuck sessions, orphan calls, double execution, crash loops."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cast import Tools, obedient
from plant import assistant, call, open_counts, query, records, write
from processes import Child

from understudy import Limits, RestartPolicy, Runtime, ScriptedModel, Session, Turn, tool
from understudy.actors.clock import VirtualClock
from understudy.actors.models.protocol import AssistantTurn, ModelRequest
from understudy.actors.models.scripted import Call, Fail, Gate, Say, Stall, Wait, steps_taken
from understudy.errors import (
    ActorCrashed,
    ModelError,
    ModelUnavailable,
    SessionQuarantined,
    TurnAborted,
    TurnFailed,
)

FAST = RestartPolicy(backoff_s=0.001)


def opened(path: Path, options: str = "") -> str:
    return (
        "tools = Tools(note=note)\n"
        f"runtime = Runtime({str(path)!r}, model=obedient(), tools=tools.all(){options}).start()\n"
    )


def assert_pairs(request: ModelRequest) -> list[Any]:
    """Every call of a request has an id of its own and a result; gives the calls."""
    calls = [c for t in request.turns if isinstance(t, AssistantTurn) for c in t.calls]
    assert len({each.call_id for each in calls}) == len(calls)
    assert all(each.output for each in calls)
    return calls


def until(session: Session, event_type: str, count: int = 1) -> None:
    with session.events(after=0) as events:
        for event in events:
            count -= event.type == event_type
            if not count:
                return


def results(session: Session, count: int) -> None:
    """Wait until ``count`` calls have their result in the store."""
    ended: set[str] = set()
    with session.events(after=0) as events:
        for event in events:
            state = getattr(getattr(event.data, "part", None), "state", None)
            if hasattr(state, "output") or hasattr(state, "error"):
                ended.add(event.data.part.id)
            if len(ended) == count:
                return


# --- 1: stuck ----------------------------------------------------------------------------------


def test_f001_and_f002_after_a_kill_no_row_is_open_and_status_says_the_same(path: Path) -> None:
    with Child() as child:
        child.do(opened(path))
        for _ in range(2):
            child.do("runtime.create_session().prompt('call block {}')")
            child.wait_note("block started")
        child.kill()
    with Runtime(path, model=obedient()) as runtime:
        for session in runtime.sessions():
            assert session.status().type == "idle"
            assert all(p.state.interrupted for m in session.messages() for p in m.tools)
        assert not any(open_counts(path).values())


@pytest.mark.parametrize("end", ["abort", "delete"])
def test_f004_and_f005_a_planted_orphan_stops_neither_abort_nor_delete(
    path: Path, end: str
) -> None:
    with Runtime(path, model=obedient()) as runtime:
        session_id = runtime.create_session().id
    with Runtime(path, model=obedient()) as runtime:
        # Planted while a server lives, in a session it has not touched: no start recovers it.
        assistant(path, session_id, "msg_planted", turn=900)
        call(path, session_id, "msg_planted", "prt_running", running=True)
        session = Session(runtime, session_id)
        getattr(session, end)()
        if end == "abort":
            assert records(path, "part")["prt_running"]["state"]["status"] == "error"
            assert session.prompt("say on").result(timeout_s=30).text == "on"
        assert not any(open_counts(path).values())


@pytest.mark.slow
def test_f007_five_hundred_tools_in_a_row_finish(path: Path) -> None:
    chance = random.Random(7)

    @tool
    def work(n: int) -> str:
        """Take a moment, or none."""
        time.sleep(chance.choice((0, 0, 0, 0.001)))
        return str(n)

    model = ScriptedModel(
        lambda request: (
            Call("work", {"n": steps_taken(request)}) if steps_taken(request) < 500 else Say("done")
        )
    )
    limits = Limits(steps=600)
    with Runtime(path, model=model, tools=[work], limits=limits, durability="normal") as runtime:
        session = runtime.create_session()
        assert session.prompt("go").result(timeout_s=60).text == "done"
        assert sum(len(message.tools) for message in session.messages()) == 500


def test_f008_idle_follows_every_answer_under_load(path: Path) -> None:
    def work(session: Session) -> None:
        for n in range(15):
            turn = session.prompt(f"say {n}")
            session.wait_idle(timeout_s=30)
            assert session.status().type == "idle"
            assert turn.result(timeout_s=30).text == str(n)

    with (
        Runtime(path, model=obedient(), durability="normal") as runtime,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(work, [runtime.create_session() for _ in range(8)]))


def test_f010_a_dead_run_releases_the_lane_at_once(path: Path, tools: Tools) -> None:
    with Runtime(path, model=obedient(), tools=tools.all(), restart=FAST) as runtime:
        session = runtime.create_session()
        turn = session.prompt("call block {}")
        assert tools.started.wait(30)
        with pytest.raises(ActorCrashed):
            session._crash()
        began = time.monotonic()
        assert session.prompt("say next").result(timeout_s=30).text == "next"
        assert time.monotonic() - began < 1
        with pytest.raises(TurnAborted):
            turn.result(timeout_s=30)


def test_f011_and_f017_what_was_running_when_the_machine_froze_is_usable_again(
    path: Path,
) -> None:
    with Child() as child:
        child.do(opened(path))
        session_id = child.do("session = runtime.create_session()\nsession.id")
        child.do("session.prompt('call block {}')")
        child.wait_note("block started")
        child.stop()
        child.kill()
    for answer in ("one", "two"):
        with Runtime(path, model=obedient()) as runtime:
            session = runtime.session(session_id)
            assert session.status().type == "idle"
            assert session.prompt(f"say {answer}").result(timeout_s=30).text == answer


@pytest.mark.parametrize("name", ["block", "wait"])
def test_f013_a_tool_that_never_returns_meets_its_deadline(
    path: Path, tools: Tools, name: str
) -> None:
    with Runtime(path, model=obedient(), tools=tools.all(), limits=Limits(tool_s=0.1)) as runtime:
        session = runtime.create_session()
        assert session.prompt(f"call {name} {{}}").result(timeout_s=30).text == "done"
        (part,) = [p for m in session.messages() for p in m.tools]
        assert part.state.interrupted
        assert "timed out" in part.state.error


def test_f014_a_silent_stream_ends_and_the_queue_goes_on(path: Path) -> None:
    limits = Limits(stream_idle_s=0.05, model_attempts=1)
    model = ScriptedModel([[Say("Half"), Stall()], "whole"])
    with Runtime(path, model=model, limits=limits) as runtime:
        session = runtime.create_session()
        stalled, queued = session.prompt("one"), session.prompt("two")
        with pytest.raises(TurnFailed):
            stalled.result(timeout_s=30)
        assert queued.result(timeout_s=30).text == "whole"


def test_f016_sleep_of_the_host_is_not_idleness(path: Path, tools: Tools) -> None:
    clock = VirtualClock()
    with Runtime(path, model=obedient(), tools=tools.all(), clock=clock) as runtime:
        session = runtime.create_session()
        turn = session.prompt("call block {}")
        assert tools.started.wait(30)
        for _ in range(5):
            clock.advance(7200)
            runtime.engine.upkeep.tick()
        clock.jump_wall(7200)
        runtime.engine.upkeep.tick()
        tools.release.set()
        assert turn.result(timeout_s=30).text == "done"


def test_f019_a_session_whose_stuck_part_was_deleted_by_hand_listens(path: Path) -> None:
    with Child() as child:
        child.do(opened(path))
        session_id = child.do("session = runtime.create_session()\nsession.id")
        child.do("session.prompt('call block {}')")
        child.wait_note("block started")
        child.kill()
    write(path, "DELETE FROM part WHERE kind = 'tool'")
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.session(session_id)
        assert session.prompt("say heard").result(timeout_s=30).text == "heard"
    write(path, "DELETE FROM message WHERE role = 'assistant'")
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.session(session_id)
        assert session.prompt("say heard").result(timeout_s=30).text == "heard"


# --- 2: orphan calls ---------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 3])
def test_f020_and_f023_after_an_abort_every_call_has_its_result(
    path: Path, tools: Tools, done: int
) -> None:
    model = obedient()
    with Runtime(path, model=model, tools=tools.all()) as runtime:
        session = runtime.create_session()
        quick = "".join(f'call quick {{"n": {n}}}\n' for n in range(done))
        turn = session.prompt(f"{quick}call block {{}}" + "\ncall wait {}" * (done > 0))
        results(session, done) if done else tools.started.wait(30)
        session.abort()
        with pytest.raises(TurnAborted):
            turn.result(timeout_s=30)
        assert session.prompt("say next").result(timeout_s=30).text == "next"
    calls = assert_pairs(model.requests[-1])
    assert len(calls) == (5 if done else 1)
    assert sum(each.is_error for each in calls) == len(calls) - done


def test_f022_a_result_later_than_the_compaction_does_not_dangle(path: Path, tools: Tools) -> None:
    model = obedient()
    with Runtime(path, model=model, tools=tools.all()) as runtime:
        session = runtime.create_session()
        for n in range(6):
            session.prompt(f"say {n} {'word ' * 400}").result(timeout_s=30)
        session.prompt("call block {}")
        assert tools.started.wait(30)
        session.abort()
        session.compact().result(timeout_s=30)
        tools.release.set()
        assert tools.ended.wait(30)
        assert session.prompt("say next").result(timeout_s=30).text == "next"
    assert_pairs(model.requests[-1])


def test_f025_reading_tolerates_a_part_without_its_message(path: Path) -> None:
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        session.prompt("say hello").result(timeout_s=30)
    call(path, session.id, "msg_nowhere", "prt_orphan", running=True)
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.session(session.id)
        assert [m.text for m in session.messages()] == ["say hello", "hello"]
        assert session.prompt("say next").result(timeout_s=30).text == "next"
        assert not any(open_counts(path).values())


def test_f026_a_session_is_not_reaped_between_a_call_and_its_result(
    path: Path, tools: Tools
) -> None:
    with Runtime(path, model=obedient(), tools=tools.all(), passivate_after_s=0.0) as runtime:
        session = runtime.create_session()
        turn = session.prompt("call block {}")
        assert tools.started.wait(30)
        for _ in range(50):
            runtime.engine.upkeep._passivate()
        tools.release.set()
        assert turn.result(timeout_s=30).text == "done"
        assert_pairs(runtime.engine.models[0].requests[-1])


def test_f028_and_f040_an_approval_over_a_restart_runs_each_call_once(
    path: Path, tools: Tools
) -> None:
    with Child() as child:
        child.do(opened(path, ", permissions={'guarded': 'ask'}"))
        session_id = child.do("session = runtime.create_session()\nsession.id")
        child.do("session.prompt('call quick {}\\ncall guarded {}')")
        child.wait_note("quick started")
        child.do(
            "with session.events(after=0) as events:\n"
            "    for event in events:\n"
            "        state = getattr(getattr(event.data, 'part', None), 'state', None)\n"
            "        if hasattr(state, 'output'): break\n"
        )
        child.kill()
    model = obedient()
    with Runtime(path, model=model, tools=tools.all(), permissions={"guarded": "ask"}) as runtime:
        session = runtime.session(session_id)
        (ask,) = session.asks()
        runtime.reply(ask.id, "once")
        session.wait_idle(timeout_s=30)
        assert tools.runs == ["guarded"]
    assert [each.output for each in assert_pairs(model.requests[-1])] == ["quick 0", "guarded 0"]


def test_f029_a_retry_keeps_the_user_s_message_once(path: Path) -> None:
    model = ScriptedModel([Fail(ModelUnavailable("busy", retry_after_s=0.01)), "hello"])
    with Runtime(path, model=model) as runtime:
        session = runtime.create_session()
        assert session.prompt("hi").result(timeout_s=30).text == "hello"
        assert [m.text for m in session.messages() if m.role == "user"] == ["hi"]


def test_f031_part_of_a_batch_cancelled_again_and_again(path: Path) -> None:
    model = obedient()
    tools = Tools()
    try:
        with Runtime(path, model=model, tools=tools.all()) as runtime:
            session = runtime.create_session()
            for n in range(8):
                session.prompt(f'call quick {{"n": {n}}}\ncall block {{"n": {n}}}')
                results(session, 2 * n + 1)
                session.abort()
            session.prompt("say next").result(timeout_s=30)
        calls = assert_pairs(model.requests[-1])
        assert [each.tool for each in calls] == ["quick", "block"] * 8
        assert [each.is_error for each in calls] == [False, True] * 8
    finally:
        tools.release.set()


# --- 3: double execution -----------------------------------------------------------------------


@pytest.mark.slow
def test_f037_killed_at_any_step_boundary_the_turn_ends_and_the_queue_goes_on(
    tmp_path: Path,
) -> None:
    for kill_at in (1, 3, 5, 6, 8, 9, 11):
        path, ledger = tmp_path / f"{kill_at}.db", tmp_path / f"{kill_at}"
        with Child() as child:
            session_id = child.do(
                "armed, count = False, 0\n"
                "def fault(point):\n"
                "    global count\n"
                "    count += armed\n"
                f"    if count >= {kill_at}: os.kill(os.getpid(), signal.SIGKILL)\n"
                f"tools = Tools(ledger=Path({str(ledger)!r}))\n"
                f"runtime = Runtime({str(path)!r}, model=obedient(), tools=tools.all(),"
                " fault=fault).start()\n"
                "session = runtime.create_session(session_id='ses_mine')\n"
                "session.id"
            )
            child.send(
                "armed = True\n"
                "turn = session.prompt('call quick {}', message_id='msg_one')\n"
                "session.prompt('say queued', message_id='msg_two')\n"
                "turn.result()\n"
                "for n in range(20): session.update(title=str(n))"
            )
            child.wait_dead()
        tools = Tools(ledger=ledger)
        with Runtime(path, model=obedient(), tools=tools.all(), on_restart="resume") as runtime:
            session = runtime.session(session_id)
            session.wait_idle(timeout_s=30)
            turn = session.prompt("call quick {}", message_id="msg_one")
            assert turn.result(timeout_s=30).text == "done"
            other = session.prompt("say queued", message_id="msg_two")
            assert other.result(timeout_s=30).text == "queued"
            assert [m.text for m in session.messages() if m.role == "user"] == [
                "call quick {}",
                "say queued",
            ]
        # Killed between the start of the call and its run, or its first word, it did nothing.
        assert not ledger.exists() or ledger.read_text().split() in ([], ["quick"])
        assert not any(open_counts(path).values())


def test_f038_completed_calls_are_not_repeated_when_the_model_fails(
    path: Path, tools: Tools
) -> None:
    fail = Fail(ModelUnavailable("busy", retry_after_s=0.01))
    model = ScriptedModel([Call("quick"), [Say("So "), fail], fail, "charged"])
    with Runtime(path, model=model, tools=tools.all()) as runtime:
        session = runtime.create_session()
        assert session.prompt("charge").result(timeout_s=30).text == "charged"
        assert tools.runs == ["quick"]


def test_f041_equal_prompts_at_once_are_one_prompt(path: Path) -> None:
    model = obedient()
    with Runtime(path, model=model) as runtime, ThreadPoolExecutor(20) as pool:
        session = runtime.create_session()
        start = threading.Barrier(20)

        def send(_: int) -> str:
            start.wait(30)
            turn = session.prompt("say once", message_id="msg_same")
            return turn.result(timeout_s=30).text

        assert list(pool.map(send, range(20))) == ["once"] * 20
        assert len(session.prompts()) == 1
        assert len(session.messages()) == 2
    assert model.calls == 1


def test_f043_a_stream_that_breaks_is_not_shown_twice(path: Path) -> None:
    model = ScriptedModel([[Say("Hello "), Fail(ModelUnavailable("broken"))], "Hello world"])
    with Runtime(path, model=model) as runtime:
        session = runtime.create_session()
        assert session.prompt("hi").result(timeout_s=30).text == "Hello world"
        broken, whole = [m for m in session.messages() if m.role == "assistant"]
        assert broken.info.error is not None
        assert whole.text == "Hello world"


@pytest.mark.parametrize(
    ("error", "calls"),
    [(ModelUnavailable("429", retry_after_s=0.01), 3), (ModelError("quota is used up"), 1)],
)
def test_f044_attempts_are_bounded_and_permanent_errors_not_retried(
    path: Path, error: Exception, calls: int
) -> None:
    model = ScriptedModel([Fail(error)], repeat=True)
    with Runtime(path, model=model, limits=Limits(model_attempts=3)) as runtime:
        session = runtime.create_session()
        with pytest.raises(TurnFailed):
            session.prompt("hi").result(timeout_s=30)
        assert model.calls == calls
        assert session.status().type == "idle"


def test_f046_an_abort_in_backoff_is_prompt_and_final(path: Path) -> None:
    model = ScriptedModel([Fail(ModelUnavailable("busy", retry_after_s=60))], repeat=True)
    with Runtime(path, model=model) as runtime:
        session = runtime.create_session()
        turn = session.prompt("hi")
        until(session, "session.status", 2)
        status = session.status()
        assert status.type == "retry"
        assert status.next_ms is not None
        assert status.next_ms >= session.prompts()[0].accepted + 60_000
        _abort_at_once(session, turn)
        assert model.calls == 1


def test_f047_an_abort_during_a_model_call_is_prompt_and_not_retried(path: Path) -> None:
    gate = Gate()
    model = ScriptedModel([[Wait(gate)]], repeat=True)
    with Runtime(path, model=model) as runtime:
        session = runtime.create_session()
        turn = session.prompt("hi")
        gate.wait_reached()
        _abort_at_once(session, turn)
        assert model.calls == 1


def _abort_at_once(session: Session, turn: Turn) -> None:
    began = time.monotonic()
    session.abort()
    with pytest.raises(TurnAborted):
        turn.result(timeout_s=30)
    assert time.monotonic() - began < 1
    assert session.prompts()[0].outcome == "interrupted"


# --- 4: crash loops ----------------------------------------------------------------------------


@pytest.mark.slow
def test_f049_attempts_are_counted_before_they_run_though_every_one_is_killed(
    path: Path,
) -> None:
    options = ", on_restart='resume', limits=Limits(resume_attempts=2)"
    for n in range(4):
        with Child() as child:
            child.do(opened(path, options))
            if n == 0:
                child.do("runtime.create_session(session_id='ses_mine').prompt('stall')")
            (row,) = query(path, "SELECT json_extract(data, '$.attempts'), open FROM inbox")
            child.kill()
        assert row == ((n + 1, 1) if n < 3 else (3, 0))


def test_f050_slow_crashes_are_counted_as_well(path: Path) -> None:
    clock = VirtualClock()
    policy = RestartPolicy(intensity=50, quarantine_after=3, backoff_s=0.001)
    with Runtime(path, model=obedient(), clock=clock, restart=policy) as runtime:
        session = runtime.create_session()
        for _ in range(3):
            with pytest.raises(ActorCrashed):
                session._crash()
            clock.advance(3600)
        with pytest.raises(SessionQuarantined):
            session.prompt("say no")
        assert session.reset()
        assert session.prompt("say yes").result(timeout_s=30).text == "yes"


def test_f052_what_was_ended_or_deleted_is_not_recovered(path: Path) -> None:
    with Child() as child:
        child.do(opened(path))
        child.do(
            "gone, ended = runtime.create_session(), runtime.create_session()\n"
            "for session in (gone, ended):\n"
            "    turn = session.prompt('call block {}')\n"
            "gone.delete()\n"
            "ended.abort()\n"
        )
        ended = child.do("ended.id")
        child.kill()
    model = obedient()
    with Runtime(path, model=model) as runtime:
        assert not runtime.recovered
        assert [session.id for session in runtime.sessions()] == [ended]
        assert model.calls == 0


def test_f053_killed_while_it_drained_it_is_recovered(path: Path) -> None:
    with Child() as child:
        child.do(opened(path))
        session_id = child.do("session = runtime.create_session()\nsession.id")
        child.do("session.prompt('call block {}')\nsession.prompt('say queued')")
        child.wait_note("block started")
        child.do(
            "began = threading.Event()\n"
            "def close():\n"
            "    began.set()\n"
            "    runtime.close(drain_s=60)\n"
            "spawn(close)\n"
            "began.wait()"
        )
        child.kill()
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.session(session_id)
        session.wait_idle(timeout_s=30)
        assert [prompt.outcome for prompt in session.prompts()] == ["interrupted", "answered"]


def test_f055_an_actor_that_dies_at_every_start_is_restarted_a_bounded_number_of_times(
    path: Path,
) -> None:
    with Runtime(path, model=obedient()) as runtime:
        session_id = runtime.create_session().id
    assistant(path, session_id, "msg_planted", turn=900)
    write(path, "UPDATE session SET data = x'00' WHERE id = ?", session_id)
    policy = RestartPolicy(quarantine_after=4, backoff_s=0.001)
    with Runtime(path, model=obedient(), restart=policy) as runtime:
        assert runtime.restarts == 3
        assert session_id in runtime.quarantined()
        session = Session(runtime, session_id)
        with pytest.raises(SessionQuarantined):
            session.prompt("say no")
        session.delete()
        assert runtime.restarts == 3
