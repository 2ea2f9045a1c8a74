"""Apps, models, hooks and people that do what they should not: it stays their own trouble."""

import asyncio
import contextlib
import os
import sqlite3
import sys
import threading
import time

import pytest

from understudy import Limits, RestartPolicy, Runtime, ScriptedModel, errors, signals, tool
from understudy.actors.models.protocol import Finish, ReasoningDelta, TextDelta, ToolCall, UserTurn
from understudy.actors.models.scripted import Call, Gate, Say, Wait
from understudy.store.events import SessionIdle


class Foreign:
    """A model that somebody else wrote."""

    provider_id = "foreign"
    context_limit = 100_000
    output_limit = 1_000

    def __init__(self, model_id, stream):
        self.model_id = model_id
        self._stream = stream

    def stream(self, request):
        return self._stream(request)


# --- models ------------------------------------------------------------------------------------


def test_a_silent_model_that_will_not_be_cancelled_fails_its_turn(opened):
    release = threading.Event()

    async def stubborn(_):
        while not release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        yield Finish("stop")

    model = Foreign("stubborn", stubborn)
    runtime = opened(models=[model], limits=Limits(stream_idle_s=0.05, model_attempts=3))
    session = runtime.create_session(model="foreign/stubborn")
    with pytest.raises(errors.TurnFailed, match="silent"):
        session.prompt("go").result(timeout_s=10)
    assert session.prompt("next", model="scripted").result(timeout_s=10).text == "next"
    release.set()


def test_a_model_that_never_pauses_holds_up_no_other_session_and_can_be_aborted(opened):
    async def flood(_):
        while True:
            yield TextDelta("")  # no word, so that the store is not what is measured

    runtime = opened(models=[Foreign("flood", flood)])
    noisy = runtime.create_session(model="foreign/flood")
    other = runtime.create_session()
    turn = noisy.prompt("go")
    # It competes for the interpreter all the same: others are slowed down, not stopped.
    assert other.prompt("meanwhile").result(timeout_s=60).text == "meanwhile"
    assert noisy.abort()
    with pytest.raises(errors.TurnAborted):
        turn.result(timeout_s=60)


def sync_stream(_):
    yield Finish("stop")


async def no_stream(_):
    return [Finish("stop")]


@pytest.mark.parametrize("stream", [sync_stream, no_stream])
def test_a_model_whose_stream_is_none_is_told_how_to_write_it(opened, stream):
    runtime = opened(models=[Foreign("plain", stream)])
    session = runtime.create_session(model="foreign/plain")
    with pytest.raises(errors.TurnFailed, match=r"Foreign\.stream\(\) gave a .*`async def` with"):
        session.prompt("go").result(timeout_s=15)


PIECES = {
    "text": TextDelta("x" * 100),
    "reasoning": ReasoningDelta("x" * 100),
    "calls": ToolCall("call", "tool", "x" * 100),
}


@pytest.mark.parametrize("kind", PIECES)
def test_an_answer_without_end_fails_its_turn_at_the_limit_and_is_kept_up_to_it(opened, kind):
    async def endless(_):
        while True:
            yield PIECES[kind]

    limits = Limits(answer_chars=10_050)
    runtime = opened(models=[Foreign("endless", endless)], limits=limits)
    session = runtime.create_session(model="foreign/endless")
    turn = session.prompt("go")
    with pytest.raises(errors.TurnFailed, match="longer than 10050 characters"):
        turn.result(timeout_s=15)
    session.wait_idle()
    _, answer = session.messages()
    assert answer.info.time.completed is not None
    kept = [len(part.text) for part in answer.parts if part.type in ("text", "reasoning")]
    assert kept == ([] if kind == "calls" else [10_000])
    assert answer.tools == ()
    assert session.prompt("next", model="scripted").result(timeout_s=15).text == "next"


# --- closing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["model", "coroutine tool", "coroutine hook"])
def test_a_runtime_closed_from_its_own_event_loops_is_closed(path, place, eventually):
    closed = []

    def close():
        closed.append(runtime.close())

    @tool
    async def shut() -> str:
        """Close the runtime."""
        close()
        return "never told"

    async def hook(_):
        close()

    def play(_):
        if place == "model":
            close()
        return Call("shut", {}) if place == "coroutine tool" else Say("hi")

    runtime = Runtime(
        path,
        model=ScriptedModel(play),
        tools=[shut],
        hooks={"before_prompt": hook} if place == "coroutine hook" else None,
        durability="normal",
    ).start()
    session = runtime.create_session()
    session.prompt("go", timeout_s=10)
    eventually(lambda: closed)
    assert not list(path.parent.glob("*.lock"))
    with Runtime(path, durability="normal") as again:
        assert again.session(session.id).prompt("mine").result(timeout_s=10).text == "mine"


def test_whoever_closes_second_returns_when_it_is_closed(path, crew):
    reached, release = threading.Event(), threading.Event()

    def fault(point):
        if point == "begin" and reached.is_set():
            release.wait(10)

    runtime = Runtime(path, durability="normal", fault=fault).start()
    runtime.create_session()
    reached.set()
    closers = crew().call(lambda: (runtime.close(), list(path.parent.glob("*.lock"))), times=2)
    closers.start()
    release.set()
    assert closers.outcomes() == [(True, [])] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_refused_and_takes_nothing_from_its_parent(opened, path):
    runtime = opened()
    session = runtime.create_session()
    child = os.fork()
    if child == 0:
        try:
            with pytest.raises(errors.RuntimeClosed, match="process"):
                runtime.create_session()
            with pytest.raises(errors.RuntimeClosed):
                session.messages()
            runtime.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    other = opened()
    with pytest.raises(errors.SessionClaimed):
        other.session(session.id).prompt("stolen")
    assert session.prompt("mine").result(timeout_s=10).text == "mine"


# --- hooks and receivers -----------------------------------------------------------------------


def test_hooks_that_nobody_waits_for_may_hang_and_are_reported(
    opened, eventually, caplog, monkeypatch
):
    monkeypatch.setattr("understudy.actors.hooks._HOOK_THREADS", 1)
    release, ran = threading.Event(), []

    def hang(call):
        ran.append(call.session.id)
        if len(ran) == 1:
            release.wait(60)

    runtime = opened(hooks={"after_turn": hang}, hook_s=0.05)
    made = [runtime.create_session() for _ in range(2)]
    for session in made:
        session.prompt("go").result(timeout_s=15)
    eventually(lambda: len(ran) == 2)
    assert "Hook after_turn took more than 0.05 s" in caplog.text
    release.set()


def test_hooks_that_hang_keep_no_tool_from_running(opened):
    release = threading.Event()

    def hang(call):
        if call.text == "hang":
            release.wait(30)

    @tool
    def work() -> str:
        """Work."""
        return "worked"

    runtime = opened(
        ScriptedModel([Call("work", {}), "done"], repeat=True),
        tools=[work],
        hooks={"before_prompt": hang},
        hook_s=0.05,
        limits=Limits(tool_s=5.0),
    )
    turns = [runtime.create_session().prompt("hang") for _ in range(70)]
    assert [turn.result(timeout_s=15).text for turn in turns] == ["done"] * 70
    session = runtime.create_session()
    assert session.prompt("go").result(timeout_s=15).text == "done"
    assert [part.state.output for m in session.messages() for part in m.tools] == ["worked"]
    release.set()


def test_hooks_that_never_return_are_bounded(opened, caplog, monkeypatch, eventually):
    monkeypatch.setattr("understudy.actors.hooks.LOST_MAX", 2)
    release, hung = threading.Event(), []

    def hang(call):
        hung.append(call.message_id)
        release.wait(60)

    runtime = opened(hooks={"before_prompt": hang}, hook_s=0.05)
    session = runtime.create_session()
    for _ in range(4):
        session.prompt("go").result(timeout_s=15)
    assert len(hung) == 2
    assert caplog.text.count("Hook before_prompt was not run: 2 others never returned") == 2
    release.set()
    eventually(lambda: runtime.engine.hooks.workers.lost == 0)
    session.prompt("go").result(timeout_s=15)
    assert len(hung) == 3


@pytest.fixture
def crowded(opened, monkeypatch):
    """A runtime with hooks in a process that can start no thread for them."""

    def refuse(job):
        raise RuntimeError("can't start new thread")

    def open_crowded(**options):
        runtime = opened(**options)
        monkeypatch.setattr(runtime.engine.hooks.workers, "submit", refuse)
        return runtime

    return open_crowded


@pytest.mark.parametrize("hook", ["session_start", "before_prompt", "after_turn"])
def test_a_hook_without_a_thread_to_run_on_is_logged_and_changes_nothing(crowded, caplog, hook):
    runtime = crowded(hooks={hook: lambda call: None})
    session = runtime.create_session()
    assert session.prompt("go").result(timeout_s=15).text == "go"
    assert session.prompt("on").result(timeout_s=15).text == "on"
    session.wait_idle(timeout_s=15)
    assert f"Hook {hook} was not run" in caplog.text
    assert runtime.engine.supervisor.restarts == 0


def test_a_recovery_hook_without_a_thread_to_run_on_is_logged(crowded, caplog):
    runtime = crowded(recovery_hook=lambda *_: None)
    session = runtime.create_session()
    runtime.engine.reports.recovered(session.id, "restart", (SessionIdle(session_id=session.id),))
    assert f"The recovery hook was not run for session {session.id}" in caplog.text
    assert [each.session_id for each in runtime.engine.reports.latest] == [session.id]


def test_tools_that_never_return_are_bounded_and_reported(opened, monkeypatch, eventually, caplog):
    monkeypatch.setattr("understudy.actors.calls.LOST_MAX", 2)
    monkeypatch.setattr("understudy.actors.calls.GRACE_S", 0.05)
    release, hung = threading.Event(), []

    @tool(timeout_s=0.05)
    def hang(n: int) -> str:
        """Hang."""
        hung.append(n)
        release.wait(60)
        return "back"

    runtime = opened(
        ScriptedModel([*(Call("hang", {"n": n}) for n in range(3)), "done"]), tools=[hang]
    )
    session = runtime.create_session()
    session.prompt("go").result(timeout_s=15)
    *_, last = [part.state.error for m in session.messages() for part in m.tools]
    assert last == "Not run: 2 calls that were given up on never returned"
    assert hung == [0, 1]
    words = f"Tool hang of session {session.id} goes on 0.05 s after it was given up on"
    eventually(lambda: caplog.text.count(words) == 2)
    release.set()
    eventually(lambda: runtime.engine.executor.workers.lost == 0)


class Deaf:
    """Awaits until it is released, whatever cancels it."""

    def __init__(self):
        self.begun, self._released = [], threading.Event()

    async def __call__(self, about):
        self.begun.append(about)
        while not self._released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        return "back"

    def release(self):
        self._released.set()


@pytest.fixture
def deaf(monkeypatch):
    monkeypatch.setattr("understudy.actors.coroutines.GRACE_S", 0.05)
    deaf = Deaf()
    yield deaf
    deaf.release()


def test_coroutine_tools_deaf_to_their_cancellation_are_left_reported_and_bounded(
    opened, deaf, caplog, monkeypatch, eventually
):
    monkeypatch.setattr("understudy.actors.calls.LOST_MAX", 2)

    @tool(timeout_s=0.5)
    async def listen(n: int) -> str:
        """Listen to nobody."""
        return await deaf(n)

    calls = [Call("listen", {"n": n}) for n in range(3)]
    runtime = opened(ScriptedModel([*calls[:2], "two", calls[2], "done"]), tools=[listen])
    session = runtime.create_session()
    assert session.prompt("go").result(timeout_s=15).text == "two"
    eventually(lambda: runtime.engine.executor.coroutines.lost == 2)
    assert caplog.text.count(f"Tool listen of session {session.id} goes on 0.05 s after") == 2
    assert session.prompt("go").result(timeout_s=15).text == "done"
    *_, last = [part.state.error for m in session.messages() for part in m.tools]
    assert last == "Not run: 2 calls that were cancelled do not end"
    assert deaf.begun == [0, 1]
    deaf.release()
    eventually(lambda: runtime.engine.executor.coroutines.lost == 0)


@pytest.mark.parametrize("hook", ["before_prompt", "after_turn"])
def test_coroutine_hooks_deaf_to_their_cancellation_are_left_and_reported(
    opened, deaf, caplog, hook, eventually
):
    async def listen(call):
        await deaf(call.hook)

    runtime = opened(hooks={hook: listen}, hook_s=0.5)
    session = runtime.create_session()
    session.prompt("go").result(timeout_s=15)
    eventually(lambda: runtime.engine.executor.coroutines.lost == 1)
    assert f"Hook {hook} took more than 0.5 s" in caplog.text
    assert f"Hook {hook} of session {session.id} goes on 0.05 s after" in caplog.text
    deaf.release()
    eventually(lambda: runtime.engine.executor.coroutines.lost == 0)


def test_a_coroutine_tool_that_blocks_its_loop_holds_up_no_other_for_good(
    opened, monkeypatch, caplog, eventually
):
    monkeypatch.setattr("understudy.actors.coroutines.GRACE_S", 0.05)
    release = threading.Event()

    @tool(timeout_s=0.5)
    async def block() -> str:
        """Block."""
        release.wait(60)
        return "back"

    @tool
    async def work() -> str:
        """Work."""
        return "worked"

    model = ScriptedModel([Call("block"), "left", Call("work"), "done"])
    runtime = opened(model, tools=[block, work])
    session = runtime.create_session()
    assert session.prompt("go").result(timeout_s=15).text == "left"
    eventually(lambda: "others get a new one" in caplog.text)
    assert session.prompt("go").result(timeout_s=15).text == "done"
    assert [part.state.status for m in session.messages() for part in m.tools] == [
        "error",
        "completed",
    ]
    release.set()
    eventually(lambda: runtime.engine.executor.coroutines.lost == 0)


def test_a_receiver_that_would_exit_ends_no_signals(opened, eventually):
    seen = []

    def leave(_, event):
        sys.exit(f"at {event.type}")

    def look(_, event):
        seen.append(event.session_id)

    runtime = opened()
    with signals.prompt_settled.connected_to(leave), signals.prompt_settled.connected_to(look):
        session = runtime.create_session()
        for _ in range(3):
            session.prompt("x").result(timeout_s=10)
        eventually(lambda: seen == [session.id] * 3)


# --- the store ---------------------------------------------------------------------------------


def test_one_crash_that_is_hard_to_count_is_one_crash(opened, monkeypatch):
    full = threading.Event()
    tries = []

    def fault(point):
        if point == "commit" and full.is_set():
            tries.append(point)
            if len(tries) > 8:
                full.clear()
            raise sqlite3.OperationalError("database or disk is full")

    runtime = opened(fault=fault, restart=RestartPolicy(intensity=2, backoff_s=0.001))
    executor = runtime.engine.executor
    soon = executor.call_later
    monkeypatch.setattr(executor, "call_later", lambda s, call: soon(min(s, 0.01), call))
    session = runtime.create_session()
    full.set()
    with pytest.raises(errors.ActorCrashed):
        session._crash()
    assert session.prompt("still here").result(timeout_s=10).text == "still here"
    assert runtime.quarantined() == {}


def test_a_delete_on_a_full_disk_is_refused_though_a_report_is_tried_again(opened, eventually):
    full, gate = threading.Event(), Gate()

    def fault(point):
        if point == "commit" and full.is_set():
            raise sqlite3.OperationalError("database or disk is full")

    runtime = opened(ScriptedModel([[Wait(gate), Say("done")]]), fault=fault)
    session = runtime.create_session()
    turn = session.prompt("go")
    gate.wait_reached()
    full.set()
    gate.open()
    eventually(lambda: runtime.engine.registry.actor(session.id)._store_failures)
    with pytest.raises(errors.StoreFull):
        session.delete()
    full.clear()
    assert turn.result(timeout_s=10).text == "done"
    assert session.delete().value == 1


def test_a_lock_file_that_was_deleted_is_back_with_the_next_renewal(opened, path, eventually):
    runtime = opened(lease_s=1.0)
    session = runtime.create_session()
    (lock,) = path.parent.glob("*.lock")
    lock.unlink()
    eventually(lock.exists)
    eventually(runtime.engine.store.lease._is_held)
    other = opened()
    with pytest.raises(errors.SessionClaimed):
        other.session(session.id).prompt("stolen")


def test_a_database_that_was_moved_is_not_made_anew_by_a_reader(opened, path):
    runtime = opened()
    session = runtime.create_session()
    path.rename(path.with_name("moved.db"))
    idle = runtime.engine.store.read._idle
    held = list(idle)
    idle.clear()
    with pytest.raises(errors.StoreUnreadable):
        session.messages()
    assert not path.exists()
    idle.extend(held)


# --- waiting -----------------------------------------------------------------------------------


def test_a_cancelled_wait_for_events_leaves_nothing_behind(opened):
    runtime = opened()

    async def wait_in_vain(events):
        for _ in range(20):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(events.next_async(), 0.001)

    with runtime.events() as events:
        asyncio.run(wait_in_vain(events))
        assert events._wakers == []
        runtime.create_session()
        assert events.next(timeout_s=10).type == "session.created"


def test_after_a_sleep_of_the_machine_nobody_takes_a_session_from_who_slept_too(opened):
    class Slept:
        """The system's clocks, after a nap that only the wall clock has noticed."""

        nap_s = 0.0

        def monotonic_s(self):
            return time.monotonic()

        def wall_ms(self):
            return int((time.time() + Slept.nap_s) * 1000)

    one, two = opened(clock=Slept()), opened(clock=Slept())
    for runtime in (one, two):
        runtime.engine.upkeep.stop()
    session = one.create_session()
    Slept.nap_s = 3600.0
    with pytest.raises(errors.SessionClaimed):
        two.session(session.id).prompt("stolen")
    for runtime in (two, one):
        runtime.engine.upkeep._renew()
    with pytest.raises(errors.SessionClaimed):
        two.session(session.id).prompt("stolen")
    assert session.prompt("mine").result(timeout_s=10).text == "mine"
    # Who then stays away is given up all the same.
    for _ in range(3):
        two.engine.upkeep._renew()
        two.engine.store.run(lambda tx: None)
    Slept.nap_s += 14.0
    two.engine.upkeep._renew()
    two.engine.store.run(lambda tx: None)
    Slept.nap_s += 14.0
    assert two.session(session.id).prompt("taken over").result(timeout_s=10).text == "taken over"


def test_a_tool_that_is_slow_to_say_what_it_asks_for_holds_up_no_other_session(opened):
    asked, release = threading.Event(), threading.Event()

    def patterns(given):
        asked.set()
        release.wait(15)
        return [given["word"]]

    @tool(permission="speak", patterns=patterns)
    def speak(word: str) -> str:
        """Speak."""
        return word

    def play(request):
        last = request.turns[-1]
        if not isinstance(last, UserTurn):
            return Say("done")
        return Call("speak", {"word": "x"}) if last.content[0].text == "speak" else Say("hello")

    runtime = opened(ScriptedModel(play), tools=[speak], permissions={"speak": "allow"})
    slow = runtime.create_session().prompt("speak")
    assert asked.wait(15)
    assert runtime.create_session().prompt("hi").result(timeout_s=10).text == "hello"
    release.set()
    assert slow.result(timeout_s=15).text == "done"
