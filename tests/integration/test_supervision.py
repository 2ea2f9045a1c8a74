"""What happens when things die, hang or cannot be stored: callers are answered, work goes on."""

import asyncio
import contextlib
import gc
import logging
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import pykka
import pytest
from fold import stored

from understudy import (
    Limits,
    RestartPolicy,
    Runtime,
    ScriptedModel,
    ToolContext,
    errors,
    tool,
)
from understudy.actors import loading, session_actor
from understudy.actors.batch import Batch
from understudy.actors.core.commands import UpdateSession
from understudy.actors.messages import Crash
from understudy.actors.models.scripted import Call, Gate, Say, Wait, steps_taken
from understudy.actors.pending import Pending
from understudy.actors.session_actor import SessionActor
from understudy.errors import (
    CommandTimeout,
    RuntimeClosed,
    SessionNotFound,
    StoreBusy,
    StoreFull,
)

QUICK = RestartPolicy(backoff_s=0.001, quarantine_after=3)


def crash(session):
    with pytest.raises((errors.ActorCrashed, errors.SessionQuarantined)):
        session._crash()


def gated(gate, text="done"):
    """Holds the first answer until the gate opens; echoes the rest."""
    first = [True]

    def play(request):
        if first:
            first.clear()
            return [Wait(gate), Say(text)]
        users = [turn for turn in request.turns if hasattr(turn, "content")]
        return Say("said " + users[-1].content[-1].text)

    return ScriptedModel(play)


# --- crashes -----------------------------------------------------------------------------------


def test_a_session_that_crashed_idle_goes_on_as_if_nothing_had_been(opened, watching):
    runtime = opened(restart=QUICK)
    session = runtime.create_session(title="kept")
    assert session.prompt("one").result(timeout_s=10).text == "one"
    watch = watching(session)
    crash(session)
    watch.until("actor.crashed")
    watch.until("actor.restarted")
    assert session.prompt("two").result(timeout_s=10).text == "two"
    assert session.refresh().title == "kept"
    assert [prompt.outcome for prompt in session.prompts()] == ["answered", "answered"]
    assert runtime.restarts == 1


def test_a_turn_that_waits_for_people_over_a_crash_keeps_to_its_steps(opened, watching):
    @tool(permission="dig")
    def dig() -> str:
        """Dig."""
        return "a hole"

    model, rules = ScriptedModel([Call("dig")] * 9), {"dig": "ask"}
    runtime = opened(model, tools=[dig], permissions=rules, limits=Limits(steps=2), restart=QUICK)
    session = runtime.create_session()
    watch = watching(session)
    turn = session.prompt("dig")
    runtime.reply(watch.until("permission.asked").data.info.id, "once")
    ask = watch.until("permission.asked").data.info
    crash(session)
    watch.until("actor.restarted")
    runtime.reply(ask.id, "once")
    with pytest.raises(errors.TurnFailed, match="No answer within 2 steps"):
        turn.result(timeout_s=15)


def test_a_crash_in_a_turn_ends_it_and_the_queue_goes_on(opened):
    gate = Gate()
    runtime = opened(gated(gate), restart=QUICK)
    session = runtime.create_session()
    first, second, third = (session.prompt(str(n)) for n in range(3))
    gate.wait_reached()
    crash(session)
    with pytest.raises(errors.TurnAborted) as caught:
        first.result(timeout_s=10)
    assert caught.value.reason == "crash"
    assert second.result(timeout_s=10).text == "said 1"
    assert third.result(timeout_s=10).text == "said 2"
    gate.open()
    assert session.wait_idle(timeout_s=10) is not None
    assert [prompt.outcome for prompt in session.prompts()] == ["interrupted"] + ["answered"] * 2


def test_a_crash_in_a_tool_interrupts_the_call_and_runs_it_no_second_time(opened):
    started, go = threading.Event(), threading.Event()
    runs = []

    @tool
    def work() -> str:
        """Work."""
        runs.append(1)
        started.set()
        go.wait(10)
        return "done"

    def play(request):
        return Say("after") if steps_taken(request) or len(runs) else Call("work")

    runtime = opened(ScriptedModel(play), tools=[work], restart=QUICK)
    session = runtime.create_session()
    turn = session.prompt("go")
    assert started.wait(10)
    crash(session)
    with pytest.raises(errors.TurnAborted):
        turn.result(timeout_s=10)
    go.set()
    (call,) = session.messages()[1].tools
    assert call.state.interrupted and call.state.metadata["reason"] == "crash"
    assert session.prompt("next").result(timeout_s=10).text == "after"
    assert runs == [1]


def test_fifty_waiting_callers_are_all_answered_after_a_crash(opened, crew, eventually):
    gate = Gate()
    runtime = opened(gated(gate), restart=QUICK)
    session = runtime.create_session()
    session.prompt("first")
    gate.wait_reached()
    calls = crew().call(lambda: session.prompt("x").result(timeout_s=10).text, times=50).start()
    eventually(lambda: len(session.prompts()) == 51)
    crash(session)
    assert calls.outcomes() == ["said x"] * 50
    assert {prompt.outcome for prompt in session.prompts()[1:]} == {"answered"}


def test_the_mailboxs_order_outlives_its_actor(opened, monkeypatch):
    """Commands that wait while an actor dies are handled by the next one, in their order."""
    hold, held = threading.Event(), threading.Event()
    real = session_actor.decide

    def decide(state, command, moment, rules):
        if type(command).__name__ == "UpdateSession" and command.title == "hold":
            held.set()
            hold.wait(10)
        return real(state, command, moment, rules)

    runtime = opened(restart=QUICK)
    session = runtime.create_session()
    monkeypatch.setattr(session_actor, "decide", decide)
    send = runtime.engine.send
    first = send(session.id, UpdateSession(title="hold"))
    assert held.wait(10)
    died = send(session.id, Crash("between"))
    replies = [send(session.id, UpdateSession(title=f"title {n}")) for n in range(20)]
    hold.set()
    with pytest.raises(errors.ActorCrashed):
        died.get(timeout=10)
    assert [reply.get(timeout=10).title for reply in replies] == [f"title {n}" for n in range(20)]
    assert first.done
    assert session.refresh().title == "title 19"


def test_restarts_are_counted_durably_and_forgiven_by_an_answer(opened, path):
    runtime = opened(restart=RestartPolicy(backoff_s=0.001, quarantine_after=3))
    session = runtime.create_session()
    for _ in range(2):
        crash(session)
        session.update(title="a barrier: crashes are counted before this")
    reads = runtime.engine.store.read
    assert reads.restarts(session.id)[1:3] == (2, 2)
    runtime.close()
    runtime = opened(restart=RestartPolicy(backoff_s=0.001, quarantine_after=3))
    session = runtime.session(session.id)
    reads = runtime.engine.store.read
    assert reads.restarts(session.id)[1:3] == (2, 2)
    session.prompt("hi").result(timeout_s=10)
    assert reads.restarts(session.id)[1:3] == (2, 0)
    crash(session)
    assert session.prompt("hi").result(timeout_s=10).text == "hi"
    assert runtime.quarantined() == {}


def corrupt(path, session_id, data=b"{not json"):
    connection = sqlite3.connect(path, timeout=10)
    with connection:
        (old,) = connection.execute(
            "SELECT data FROM session WHERE id = ?", (session_id,)
        ).fetchone()
        connection.execute("UPDATE session SET data = ? WHERE id = ?", (data, session_id))
    connection.close()
    return old


def test_a_session_that_cannot_be_loaded_is_quarantined_reset_and_deleted(
    opened, path, watching, crew
):
    runtime = opened(restart=QUICK)
    session = runtime.create_session(title="sick")
    healthy = runtime.create_session()
    session.prompt("hi").result(timeout_s=10)
    watch = watching(runtime)
    good = corrupt(path, session.id)
    crash(session)
    outcomes = crew().call(session.prompt, "x", times=10).start().outcomes()
    assert {type(each) for each in outcomes} == {errors.SessionQuarantined}
    assert list(runtime.quarantined()) == [session.id]
    watch.until("session.quarantined")
    assert watch.types().count("actor.crashed") == QUICK.quarantine_after
    assert session.status().type == "quarantined"
    assert len(session.messages()) == 2  # it can be read
    assert [each.id for each in runtime.sessions()] == [healthy.id]  # what can be read is listed
    assert healthy.prompt("hello").result(timeout_s=10).text == "hello"
    # Still sick after a reset: quarantined again. Mended: it runs.
    session.reset()
    with pytest.raises(errors.SessionQuarantined):
        session.prompt("x")
    corrupt(path, session.id, good)
    assert session.reset()
    assert not session.reset()
    assert session.prompt("back").result(timeout_s=10).text == "back"
    assert runtime.quarantined() == {}
    # And what is beyond repair can still be deleted, also after a restart.
    corrupt(path, session.id)
    crash(session)
    with pytest.raises(errors.SessionQuarantined):
        session.prompt("x")
    runtime.close()
    runtime = opened(restart=QUICK)
    assert list(runtime.quarantined()) == [session.id]
    with pytest.raises(errors.UnderstudyError):
        runtime.session(session.id)
    session = type(session)(runtime, session.id)
    with pytest.raises(errors.SessionQuarantined):
        session.prompt("x")
    assert session.delete()
    assert runtime.quarantined() == {}
    assert stored(path)[0]["session"].keys() == {healthy.id}
    assert runtime.create_session(session_id=session.id).prompt("new").result(timeout_s=10)


def test_whoever_waits_for_a_session_that_is_quarantined_is_told(opened, path, eventually, crew):
    gate = Gate()
    runtime = opened(gated(gate), restart=QUICK)
    session = runtime.create_session()
    turns = [session.prompt(str(n)) for n in range(3)]
    gate.wait_reached()
    calls = crew()
    for turn in turns:
        calls.call(lambda turn=turn: turn.result(timeout_s=10))
    calls.call(lambda: session.wait_idle(timeout_s=10))
    calls.start()
    eventually(lambda: len(runtime.engine.outcomes) >= 4)
    corrupt(path, session.id)
    crash(session)
    *results, idle = calls.outcomes()
    assert [type(each) for each in results] == [errors.SessionQuarantined] * 3
    assert not isinstance(idle, BaseException)
    for turn in (turns[0], session.turn(turns[1].message_id)):  # and who asks only now
        with pytest.raises(errors.SessionQuarantined):
            turn.result(timeout_s=10)
    gate.open()


def test_a_session_is_busy_until_its_recovery_is_committed(opened):
    told: list[str] = []

    def look(point: str) -> None:
        if point == "commit" and watching.is_set():
            told.append(runtime.engine.status_of(session.id)["type"])

    gate, watching = Gate(), threading.Event()
    runtime = opened(gated(gate), restart=QUICK, fault=look)
    session = runtime.create_session()
    turn = session.prompt("x")
    gate.wait_reached()
    watching.set()
    crash(session)
    with pytest.raises(errors.TurnAborted):
        turn.result(timeout_s=15)
    watching.clear()
    assert told
    assert set(told) == {"busy"}
    gate.open()


def test_waiting_for_a_session_that_is_not_there_leaves_nothing_behind(opened):
    runtime = opened(ScriptedModel([]))
    session = runtime.create_session()
    session.delete()
    with pytest.raises(SessionNotFound):
        session.wait_idle(timeout_s=15)
    assert len(runtime.engine.outcomes) == 0


def test_a_prompt_that_keeps_crashing_its_actor_is_set_aside(opened, monkeypatch, path):
    real = session_actor.decide

    def decide(state, command, moment, rules):
        if type(command).__name__ == "StepFinished" and any(
            "poison" in part.text for part in command.parts
        ):
            raise RuntimeError("poisoned")
        return real(state, command, moment, rules)

    monkeypatch.setattr(session_actor, "decide", decide)
    gate = Gate()

    def play(request):
        text = request.turns[-1].content[-1].text
        return [Wait(gate), Say(text)]

    runtime = opened(
        ScriptedModel(play),
        on_restart="resume",
        restart=RestartPolicy(backoff_s=0.001, quarantine_after=9),
    )
    session = runtime.create_session()
    bad, good = session.prompt("poison"), session.prompt("food")
    gate.open()
    with pytest.raises(errors.TurnFailed) as caught:
        bad.result(timeout_s=10)
    assert "keeps crashing" in str(caught.value)
    assert good.result(timeout_s=10).text == "food"
    assert runtime.engine.store.read.restarts(session.id)[1] == loading.SET_ASIDE_AT
    assert runtime.quarantined() == {}


# --- threads that callers lend -----------------------------------------------------------------


def in_thread(work):
    """Run in a thread that is not the main one; what it gives or raises."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(15)


@pytest.fixture
def deciders(monkeypatch):
    """The threads in which updates are decided. One called "die" is the end of its actor."""
    seen = []
    real = session_actor.decide

    def decide(state, command, moment, rules):
        if isinstance(command, UpdateSession):
            seen.append(threading.get_ident())
            if command.title == "die":
                raise ZeroDivisionError
        return real(state, command, moment, rules)

    monkeypatch.setattr(session_actor, "decide", decide)
    return seen


def test_a_thread_that_would_wait_does_the_actors_work_itself(opened, deciders):
    session = opened().create_session()

    def rename():
        session.update(title="mine")
        return threading.get_ident()

    assert in_thread(rename) == deciders.pop()
    assert session.refresh().title == "mine"
    session.update(title="in the main thread, where signals could break in")
    assert deciders.pop() != threading.get_ident()

    async def rename_in_a_loop():
        await session.update(title="in a loop")
        return threading.get_ident()

    assert in_thread(lambda: asyncio.run(rename_in_a_loop())) != deciders.pop()


def test_an_actor_that_dies_in_its_callers_thread_is_restarted_and_borrows_none_again(
    opened, deciders
):
    runtime = opened(restart=QUICK)
    session, other = runtime.create_session(), runtime.create_session()
    callers = []

    def rename(title):
        callers.append(threading.get_ident())
        session.update(title=title)

    with pytest.raises(errors.ActorCrashed, match="ZeroDivisionError"):
        in_thread(lambda: rename("die"))
    assert deciders.pop() == callers.pop()
    in_thread(lambda: rename("alive"))
    assert deciders.pop() != callers.pop(), "who knows what it does next"
    assert session.refresh().title == "alive"
    assert other.prompt("unharmed").result(timeout_s=10).text == "unharmed"
    assert in_thread(lambda: session.prompt("as before").result(timeout_s=10)).text == "as before"
    in_thread(lambda: rename("well"))
    assert deciders.pop() == callers.pop(), "it answered a prompt"


# --- hangs -------------------------------------------------------------------------------------


def test_a_handler_that_hangs_is_replaced_and_fenced_out(opened, monkeypatch):
    hold, held = threading.Event(), threading.Event()
    real = session_actor.decide

    def decide(state, command, moment, rules):
        if getattr(command, "title", None) == "hang":
            held.set()
            hold.wait(20)
        return real(state, command, moment, rules)

    monkeypatch.setattr(session_actor, "decide", decide)
    runtime = opened(restart=QUICK, handler_limit_s=0.1, threads=1)
    session, other = runtime.create_session(), runtime.create_session()
    hung = runtime.engine.send(session.id, UpdateSession(title="hang"))
    assert held.wait(10)
    waiting = runtime.engine.send(session.id, UpdateSession(title="after"))
    with pytest.raises(errors.ActorCrashed):
        hung.get(timeout=10)
    assert waiting.get(timeout=10).title == "after"
    assert other.prompt("alive").result(timeout_s=10).text == "alive"  # one thread, and it was lost
    hold.set()
    assert session.prompt("mine").result(timeout_s=10).text == "mine"
    assert session.refresh().title == "after"
    assert runtime.restarts == 1


def test_a_close_while_a_handler_hangs_answers_who_waits_for_it(opened, monkeypatch):
    hold, held = threading.Event(), threading.Event()
    real = session_actor.decide

    def decide(state, command, moment, rules):
        if getattr(command, "title", None) == "hang":
            held.set()
            hold.wait(20)
        return real(state, command, moment, rules)

    monkeypatch.setattr(session_actor, "decide", decide)
    runtime = opened()
    session = runtime.create_session()
    before = runtime.engine.send(session.id, UpdateSession(title="before"))
    hung = runtime.engine.send(session.id, UpdateSession(title="hang"))
    assert held.wait(10)
    waiting = runtime.engine.send(session.id, UpdateSession(title="after"))
    assert not runtime.close(timeout_s=0.5), "a thread did not end"
    for each in (hung, waiting):
        with pytest.raises(RuntimeClosed):
            each.get(timeout=0)
    assert before.done
    hold.set()


def test_work_that_is_lost_is_noticed_and_closed(opened, eventually):
    gate = Gate()
    runtime = opened(gated(gate))
    session = runtime.create_session()
    turn = session.prompt("go")
    gate.wait_reached()
    execution = runtime.engine.executor._executions[session.id]
    for task in list(execution.tasks.values()):
        runtime.engine.executor._loop.call_soon_threadsafe(task.cancel)
    with pytest.raises(errors.TurnAborted) as caught:
        turn.result(timeout_s=10)
    assert caught.value.reason == "lost"
    assert session.prompt("next").result(timeout_s=10).text == "said next"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_no_thread_dies_with_a_session_whatever_it_dies_of(opened, monkeypatch, error):
    """Neither of ours nor, as pykka's own loop would have it, every actor of the app."""
    real = session_actor.decide

    def decide(state, command, moment, rules):
        if getattr(command, "title", None) == "die":
            raise error
        return real(state, command, moment, rules)

    monkeypatch.setattr(session_actor, "decide", decide)
    runtime = opened(restart=RestartPolicy(backoff_s=0.001, quarantine_after=99, intensity=99))
    apps = pykka.ThreadingActor.start()
    session, other = runtime.create_session(), runtime.create_session()
    assert session.prompt("warm").result(timeout_s=10).text == "warm"
    threads = {thread.ident for thread in ours()}
    for _ in range(5):
        with pytest.raises(errors.ActorCrashed):
            session.update(title="die")
        assert session.update(title="lives").title == "lives"
    assert {thread.ident for thread in ours()} == threads
    assert runtime.restarts == 5
    assert apps.is_alive()
    apps.stop()
    assert other.prompt("hi").result(timeout_s=10).text == "hi"


# --- coming and going --------------------------------------------------------------------------


def test_an_idle_session_is_dropped_from_memory_and_comes_back(opened, eventually):
    runtime = opened(passivate_after_s=0.0)
    sessions = [runtime.create_session() for _ in range(20)]
    for session in sessions:
        session.prompt("one")
    for session in sessions:
        session.wait_idle(timeout_s=10)
    passivate = runtime.engine.upkeep._passivate
    eventually(lambda: passivate() or runtime.live_sessions() == 0)
    owners = {runtime.engine.store.read.owner(session.id) for session in sessions}
    eventually(
        lambda: {runtime.engine.store.read.owner(session.id) for session in sessions} == {None}
    )
    del owners
    assert [session.prompt("two").result(timeout_s=10).text for session in sessions] == ["two"] * 20
    assert all(len(session.messages()) == 4 for session in sessions)


def test_prompts_race_with_passivation_and_none_is_lost(opened, crew):
    runtime = opened(passivate_after_s=0.0)
    session = runtime.create_session()
    stop = threading.Event()

    def passivate():
        while not stop.is_set():
            runtime.engine.upkeep._passivate()

    def ask():
        return [session.prompt(f"{n}").result(timeout_s=10).text for n in range(15)]

    calls = crew().call(passivate).call(ask, times=3)
    calls.start()
    for thread in calls._threads[1:]:
        thread.join(30)
    stop.set()
    assert calls.outcomes()[1:] == [[f"{n}" for n in range(15)]] * 3


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def ours():
    return [t for t in threading.enumerate() if t.name.startswith("understudy")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_threads_and_descriptors_are_given_back_at_close(tmp_path, eventually):
    go = threading.Event()

    @tool
    async def sleepy() -> str:
        """Sleep."""
        return "ok"

    @tool
    def slow() -> str:
        """End after the runtime."""
        go.wait(10)
        return "late"

    def play(request):
        if steps_taken(request):
            return Say("ok")
        return Call("slow" if "slow" in str(request.turns[-1].content) else "sleepy")

    def cycle(number):
        runtime = Runtime(
            tmp_path / f"{number}.db",
            model=ScriptedModel(play),
            tools=[sleepy, slow],
            durability="normal",
        ).start()
        for _ in range(3):
            runtime.create_session().prompt("quick").result(timeout_s=10)
        events = runtime.events(after=0)
        events.poll()
        runtime.create_session().prompt("slow")
        assert runtime.close(timeout_s=5)

    eventually(lambda: not ours())
    cycle(0)
    go.set()
    eventually(lambda: not ours(), timeout_s=3.0)
    before = descriptors()
    for number in range(1, 6):
        go.clear()
        cycle(number)
        go.set()
    eventually(lambda: not ours(), timeout_s=3.0)
    assert descriptors() <= before


def test_everybody_who_waits_is_answered_when_the_runtime_closes(path, crew, eventually):
    gate = Gate()
    runtime = Runtime(path, model=gated(gate), durability="normal").start()
    session = runtime.create_session()
    turns = [session.prompt(str(n)) for n in range(50)]
    gate.wait_reached()
    calls = crew()
    for turn in turns:
        calls.call(turn.result)
    calls.call(session.wait_idle)
    calls.start()
    eventually(lambda: len(runtime.engine.outcomes._waiting.get(session.id, ())) == 51)
    started = time.monotonic()
    runtime.close()
    outcomes = calls.outcomes()
    assert time.monotonic() - started < 5
    assert {type(each) for each in outcomes} <= {errors.TurnAborted, errors.RuntimeClosed}
    with Runtime(path, model="scripted", durability="normal") as again:
        session = again.session(session.id)
        session.wait_idle(timeout_s=10)
        assert [prompt.outcome for prompt in session.prompts()] == ["interrupted"] + [
            "answered"
        ] * 49


def test_closing_can_let_turns_finish(path):
    gate = Gate()
    runtime = Runtime(path, model=gated(gate), durability="normal").start()
    session = runtime.create_session()
    turn = session.prompt("go")
    gate.wait_reached()
    closer = threading.Thread(target=lambda: runtime.close(drain_s=10))
    closer.start()
    gate.open()
    with contextlib.suppress(errors.RuntimeClosed):  # it may be told of the close first
        assert turn.result(timeout_s=10).text == "done"
    closer.join(10)
    with Runtime(path, durability="normal") as again:
        assert again.session(session.id).turn(turn.message_id).result(timeout_s=5).text == "done"


# --- a store that fails ------------------------------------------------------------------------


class Fault:
    """Raises what it is told to, at a point of the commit, as often as told."""

    def __init__(self):
        self.error = None
        self.point = "commit"
        self.left = 0
        self.fired = 0
        self.used_up = threading.Event()

    def arm(self, error, *, point="commit", times=1):
        self.used_up.clear()
        self.error, self.point, self.left = error, point, times
        return self

    def __call__(self, point):
        if self.left and point == self.point:
            self.left -= 1
            self.fired += 1
            if not self.left:
                self.used_up.set()
            raise self.error("the disk says no")


def quiet(runtime):
    """Keep upkeep from using up the faults."""
    runtime.engine.upkeep.stop()


@pytest.mark.parametrize("error", [StoreFull, StoreBusy])
@pytest.mark.parametrize("point", ["begin", "commit"])
def test_what_cannot_be_stored_is_refused_whole(opened, path, error, point):
    fault = Fault()
    runtime = opened(fault=fault)
    quiet(runtime)
    session = runtime.create_session()
    session.prompt("hi").result(timeout_s=10)
    session.wait_idle(timeout_s=10)
    before = stored(path)
    for call in (
        lambda: session.prompt("more", message_id="msg_more"),
        lambda: session.update(title="new"),
        lambda: runtime.create_session(session_id="ses_new"),
        session.delete,
        session.fork,
    ):
        fault.arm(error, point=point)
        with pytest.raises(error):
            call()
        assert fault.left == 0
        assert stored(path) == before
    assert session.prompt("more", message_id="msg_more").result(timeout_s=10).text == "more"
    assert runtime.create_session(session_id="ses_new").delete()
    assert runtime.restarts == 0


@pytest.mark.parametrize("error", [StoreFull, StoreBusy])
def test_what_executors_report_is_tried_again_until_it_is_stored(opened, error):
    fault = Fault()
    gate = Gate()
    runs = []

    @tool
    def work() -> str:
        """Work."""
        runs.append(1)
        fault.arm(error, times=2)
        return "worked"

    def play(request):
        return [Wait(gate), Say("done")] if steps_taken(request) else Call("work")

    runtime = opened(ScriptedModel(play), tools=[work], fault=fault)
    session = runtime.create_session()
    turn = session.prompt("go")
    gate.wait_reached()
    assert fault.fired >= 2
    fault.arm(error, times=2)
    gate.open()
    assert turn.result(timeout_s=10).text == "done"
    assert runs == [1]
    assert runtime.restarts == 0


def test_an_abort_that_could_not_be_stored_leaves_the_turn_whole(opened, watching):
    fault = Fault()
    gate, second = Gate(), Gate()
    model = ScriptedModel([[Say("one "), Wait(gate), Say("two "), Wait(second), Say("three")]])
    runtime = opened(model, fault=fault)
    quiet(runtime)
    session = runtime.create_session()
    watch = watching(session, after=0)
    turn = session.prompt("go")
    watch.until(
        lambda e: e.type == "message.part.updated" and getattr(e.data.part, "text", "") == "one "
    )
    fault.arm(StoreFull)
    with pytest.raises(StoreFull):
        session.abort()
    gate.open()
    second.wait_reached()
    second.open()
    assert turn.result(timeout_s=10).text == "one two three"


def test_recovery_that_could_not_be_stored_is_tried_again(opened, watching):
    fault = Fault()
    gate = Gate()
    runtime = opened(gated(gate), fault=fault, restart=QUICK)
    quiet(runtime)
    session = runtime.create_session()
    first, second = session.prompt("one"), session.prompt("two")
    gate.wait_reached()
    watch = watching(session)
    real = runtime.engine.revive

    def revive(*arguments):
        fault.arm(StoreFull, times=3)
        real(*arguments)

    runtime.engine.revive = revive
    crash(session)
    with pytest.raises(errors.TurnAborted):
        first.result(timeout_s=10)
    watch.until("actor.restarted")
    assert second.result(timeout_s=10).text == "said two"
    gate.open()


def test_a_crash_that_could_not_be_counted_is_counted_later(opened, caplog):
    fault = Fault()
    runtime = opened(fault=fault, restart=QUICK)
    quiet(runtime)
    session = runtime.create_session()
    with caplog.at_level(logging.CRITICAL, "understudy"):
        fault.arm(StoreFull)
        crash(session)
        assert session.prompt("after").result(timeout_s=10).text == "after"
    assert runtime.engine.store.read.restarts(session.id)[1] == 1


def test_a_bug_in_the_store_is_the_crash_of_one_session(opened):
    fault = Fault()
    runtime = opened(fault=fault, restart=QUICK)
    quiet(runtime)
    session, other = runtime.create_session(), runtime.create_session()
    fault.arm(ZeroDivisionError)
    with pytest.raises(errors.ActorCrashed):
        session.prompt("hi")
    assert other.prompt("hi").result(timeout_s=10).text == "hi"
    assert session.prompt("hi").result(timeout_s=10).text == "hi"


def test_the_limits_of_a_turn_hold_in_time(opened):
    gate = Gate()
    runtime = opened(gated(gate), limits=Limits(turn_s=0.2))
    session = runtime.create_session()
    with pytest.raises(errors.TurnFailed) as caught:
        session.prompt("go").result(timeout_s=10)
    assert caught.value.name == "TurnTimeoutError"
    assert session.prompt("next").result(timeout_s=10).text == "said next"


@pytest.mark.parametrize("table", ["part", "message"])
def test_an_unfinished_row_that_cannot_be_read_holds_nothing_up(opened, path, table):
    runtime = opened("scripted")
    session = runtime.create_session()
    session.prompt("hello").result(timeout_s=10)
    runtime.close()
    with sqlite3.connect(path) as connection:
        connection.execute(
            f"UPDATE {table} SET open = 1, data = x'7b' "
            f"WHERE rowid = (SELECT max(rowid) FROM {table})"
        )
    connection.close()
    again = opened("scripted")
    found = again.session(session.id)
    found.wait_idle(timeout_s=10)
    assert found.prompt("and again").result(timeout_s=10).text == "and again"
    again.close()
    last = opened("scripted")
    assert last.live_sessions() == 0, "nothing is left to recover"
    assert last.session(session.id).status().type == "idle"


@pytest.mark.parametrize("way", ["before the call", "in the call"])
def test_time_spent_waiting_for_a_person_is_not_the_turn_s(opened, watching, way):
    @tool(permission="deploy" if way == "before the call" else None)
    def deploy(ctx: ToolContext) -> str:
        """Deploy."""
        if way == "in the call":
            ctx.ask("deploy")
        return "deployed"

    runtime = opened(
        ScriptedModel([Call("deploy"), "done"]),
        tools=[deploy],
        permissions={"deploy": "ask"},
        limits=Limits(turn_s=0.3),
    )
    turn = runtime.create_session().prompt("go")
    watch = watching(turn)
    asked = watch.until("permission.asked")
    with pytest.raises(CommandTimeout):
        turn.result(timeout_s=0.6)  # twice what the turn may take
    runtime.reply(asked.data.info.id, "once")
    assert turn.result(timeout_s=10).text == "done"


def test_a_runtime_that_was_never_started_leaves_nothing_and_says_so(tmp_path):
    before = descriptors()
    runtime = Runtime(tmp_path / "a.db")
    assert descriptors() == before
    with pytest.raises(RuntimeClosed, match="start"):
        runtime.create_session()


def test_what_an_executor_had_to_say_to_a_dead_actor_is_answered(opened):
    """A newer incarnation drops it, and whoever waits for its end is told."""
    runtime = opened(restart=RestartPolicy(backoff_s=0.2))
    session = runtime.create_session()
    with pytest.raises(errors.ActorCrashed):
        session._crash()
    late = Pending()
    runtime.engine.prove(session.id, late)
    with pytest.raises(errors.SessionFenced):
        late.get(timeout=15)
    assert session.prompt("go").result(timeout_s=15)


def test_what_an_executor_had_to_say_to_an_actor_that_lost_its_session_is_answered(opened, path):
    runtime = opened()
    session = runtime.create_session()
    with sqlite3.connect(path) as c:
        c.execute("UPDATE claim SET owner = NULL, epoch = epoch + 1")
    c.close()
    proof = Pending()
    runtime.engine.prove(session.id, proof)
    with pytest.raises(errors.SessionFenced):
        proof.get(timeout=15)
    assert session.prompt("go").result(timeout_s=15)


# --- what is left ------------------------------------------------------------------------------


@pytest.fixture
def unlogged():
    """A record of an error keeps its frames."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def left_of(*kinds):
    """How many of these objects there are, once all that nobody can reach is gone."""
    for _ in range(3):
        gc.collect()
    return sum(isinstance(each, kinds) for each in gc.get_objects())


def test_nothing_is_left_of_sessions_that_crashed_and_are_gone(opened, unlogged):
    runtime = opened()
    before = left_of(SessionActor, Pending, FrameType)
    for _ in range(20):
        session = runtime.create_session()
        with pytest.raises(errors.ActorCrashed):
            session._crash()
        session.delete()
    del session
    assert left_of(SessionActor, Pending, FrameType) < before + 20


def test_nothing_is_left_of_refusals_that_nobody_awaited(opened, unlogged):
    async def refused():
        session = await runtime.create_session()
        await session.prompt("hello", message_id="msg_1")
        for number in range(60):
            session.prompt(f"hello {number}", message_id="msg_1")
        await session.prompt("last")

    runtime = opened()
    before = left_of(Pending, Batch, FrameType)
    asyncio.run(refused())
    assert left_of(Pending, Batch, FrameType) < before + 30
