"""Hooks in a running runtime: no hook can loop (D; the tracker alone is in tests/unit)."""

import asyncio
import threading
import time

import pytest
from cast import last_text, obedient
from processes import Child

from understudy import HookCall, Runtime, tool
from understudy.actors.clock import VirtualClock
from understudy.actors.leases import DEFAULT_TTL_S
from understudy.actors.models.scripted import Fail, Say, ScriptedModel
from understudy.errors import ActorCrashed, InvalidInput, ModelError, SessionExists, TurnFailed

WAIT_S = 20.0  # a bound on hangs
ENOUGH = 12  # hooks that ran this often are in a loop


class Notes:
    """What hooks were called with; refuses to take part in a loop."""

    def __init__(self, act=None, name="a hook"):
        self.calls: list[HookCall] = []
        self._act = act
        self._lock = threading.Lock()

    def __call__(self, call):
        with self._lock:
            self.calls.append(call)
            looping = len(self.calls) > ENOUGH
        if self._act is not None and not looping:
            return self._act(call)
        return None

    def __len__(self):
        return len(self.calls)


def settled(runtime):
    """Wait until no session has work and no hook runs."""
    workers = runtime.engine.executor.workers
    deadline = time.monotonic() + WAIT_S
    calm = 0
    while calm < 3:
        assert time.monotonic() < deadline, "it does not come to rest"
        busy = runtime.statuses() or workers._jobs or workers._idle < workers._threads
        calm = 0 if busy else calm + 1
        threading.Event().wait(0.01)


@pytest.fixture
def clock():
    return VirtualClock()


# --- internal sessions -------------------------------------------------------------------------


def test_d01_an_internal_session_is_bypassed_before_its_first_prompt_goes_out(path):
    bypassed = []

    def script(request):
        bypassed.append(runtime.tracker.is_bypassed(request.session_id))
        return Say("done")

    with Runtime(path, model=ScriptedModel(script)) as runtime:
        session = runtime.create_session(internal=True)
        assert runtime.tracker.is_bypassed(session.id)
        session.prompt("extract").result(timeout_s=WAIT_S)
    assert bypassed == [True]


def test_d01_it_is_bypassed_before_anybody_hears_of_it(path):
    with Runtime(path, model=obedient()) as runtime:
        heard = []
        runtime.engine.publisher.observe(
            lambda event: heard.append(runtime.tracker.is_bypassed(event.session_id))
        )
        runtime.create_session(internal=True)
        assert heard == [True]


def test_d01_in_an_event_loop_too(path):
    async def main():
        async with Runtime(path, model=obedient()) as runtime:
            session = await runtime.create_session(internal=True)
            return runtime.tracker.is_bypassed(session.id)

    assert asyncio.run(main())


def test_d01_a_bypass_for_a_session_that_was_refused_does_not_silence_the_one_that_is_there(path):
    with Runtime(path, model=obedient()) as runtime:
        runtime.create_session(session_id="ses_mine")
        with pytest.raises(SessionExists):
            runtime.create_session(session_id="ses_mine", internal=True)
        settled(runtime)
        assert not runtime.tracker.is_bypassed("ses_mine")


@pytest.mark.parametrize(
    "hook", ["session_start", "before_prompt", "after_turn", "before_compaction", "session_end"]
)
def test_d02_no_hook_of_an_internal_session_runs_and_none_costs_anything(path, hook):
    notes = Notes()
    model = obedient()
    with Runtime(path, model=model, hooks={hook: notes}) as runtime:
        session = runtime.create_session(internal=True)
        session.prompt("say a " + "b " * 200).result(timeout_s=WAIT_S)
        session.compact().result(timeout_s=WAIT_S)
        cursor = runtime.cursor
        for name in ("session-start", "user-prompt-submit", "session-end"):
            began = time.monotonic()
            assert runtime.tracker.gate(name, session.id, "an outside harness").action == "no-op"
            assert time.monotonic() - began < 1.0
        assert (runtime.cursor, model.calls) == (cursor, 2)
        session.delete()
        settled(runtime)
        assert len(notes) == 0


def test_d02_the_same_hooks_run_for_an_ordinary_session(path):
    notes = Notes()
    names = ("session_start", "before_prompt", "after_turn", "before_compaction", "session_end")
    with Runtime(path, model=obedient(), hooks=dict.fromkeys(names, notes)) as runtime:
        session = runtime.create_session()
        session.prompt("say a " + "b " * 200).result(timeout_s=WAIT_S)
        settled(runtime)
        session.compact().result(timeout_s=WAIT_S)
        session.delete()
        settled(runtime)
        assert sorted(call.hook for call in notes.calls) == sorted(names)
        assert {call.session.id for call in notes.calls} == {session.id}
        after = next(call for call in notes.calls if call.hook == "after_turn")
        assert after.outcome == "answered"
        assert after.text.startswith("a b b")


def test_d03_the_bypass_of_an_internal_session_lapses_when_it_is_not_used(path, clock):
    with Runtime(path, model=obedient(), clock=clock) as runtime:
        session = runtime.create_session(internal=True)
        clock.advance(DEFAULT_TTL_S - 1)
        assert runtime.tracker.gate("stop", session.id).bypassed
        clock.advance(1)
        assert runtime.tracker.gate("stop", session.id).action == "run"


def test_d17_each_send_of_an_internal_session_applies_its_bypass_again(path, clock):
    with Runtime(path, model=obedient(), clock=clock) as runtime:
        session = runtime.create_session(internal=True)
        for number in range(6):
            clock.advance(DEFAULT_TTL_S * 0.9)
            assert runtime.tracker.is_bypassed(session.id), number
            session.prompt("say again").result(timeout_s=WAIT_S)


def test_d17_a_summary_is_a_send_too(path, clock):
    with Runtime(path, model=obedient(), clock=clock) as runtime:
        session = runtime.create_session(internal=True)
        session.prompt("say a " + "b " * 200).result(timeout_s=WAIT_S)
        clock.advance(DEFAULT_TTL_S * 0.9)
        session.compact().result(timeout_s=WAIT_S)
        clock.advance(DEFAULT_TTL_S * 0.9)
        assert runtime.tracker.is_bypassed(session.id)


@pytest.mark.parametrize("kind", ["prompt", "compact"])
def test_d18_it_is_applied_before_the_message_leaves_also_after_a_long_rest(path, clock, kind):
    bypassed = []

    def script(request):
        bypassed.append(runtime.tracker.is_bypassed(request.session_id))
        return Say("b")

    with Runtime(path, model=ScriptedModel(script), clock=clock) as runtime:
        session = runtime.create_session(internal=True)
        session.prompt("a " * 200).result(timeout_s=WAIT_S)
        clock.advance(DEFAULT_TTL_S * 3)
        assert not runtime.tracker.is_bypassed(session.id)
        if kind == "prompt":
            session.prompt("again").result(timeout_s=WAIT_S)
        else:
            session.compact().result(timeout_s=WAIT_S)
        assert bypassed == [True, True]


def test_d19_d25_only_what_one_ttl_uses_is_kept(path, clock):
    with Runtime(path, model=obedient(), clock=clock, durability="normal") as runtime:
        for _ in range(10):
            for _ in range(100):
                runtime.create_session(internal=True)
            clock.advance(DEFAULT_TTL_S / 2)
            runtime.tracker.sweep()
            assert runtime.tracker.counts().bypasses <= 200
        clock.advance(DEFAULT_TTL_S)
        runtime.tracker.sweep()
        assert runtime.tracker.counts().bypasses == 0
        assert not runtime.tracker._leases._bypasses


def rotating(runtime, session, work):
    """A provider: when its session is rejected it makes a new one; it never unbypasses."""
    try:
        return session, session.prompt(work).result(timeout_s=WAIT_S)
    except TurnFailed:
        fresh = runtime.create_session(internal=True)
        return fresh, fresh.prompt(work).result(timeout_s=WAIT_S)


@pytest.mark.parametrize("status", [404, 410, 422])
def test_d20_d21_d22_rotation_leaves_the_old_bypassed_and_bypasses_the_new(path, clock, status):
    failures = iter([Fail(ModelError(f"status {status}"))])
    model = ScriptedModel(lambda request: next(failures, Say("{}")))
    notes = Notes()
    hooks = {"after_turn": notes, "session_start": notes}
    with Runtime(path, model=model, clock=clock, hooks=hooks) as runtime:
        old = runtime.create_session(internal=True)
        new, reply = rotating(runtime, old, "extract as JSON")
        assert reply.text == "{}"
        assert new.id != old.id
        for late in ("stop", "session-end", "user-prompt-submit"):
            assert runtime.tracker.gate(late, old.id).action == "no-op"
            assert runtime.tracker.gate(late, new.id).action == "no-op"
        old.delete()  # a provider that cleans up does not unbypass either
        assert runtime.tracker.gate("stop", old.id).action == "no-op"
        settled(runtime)
        assert len(notes) == 0
        clock.advance(DEFAULT_TTL_S)
        assert runtime.tracker.gate("stop", old.id).action == "run"


def test_d28_d29_the_end_of_an_internal_session_releases_its_claim_and_keeps_its_bypass(path):
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session(internal=True)
        assert runtime.tracker.claim(session.id, "harness")
        end = runtime.tracker.gate("session-end", session.id, "harness")
        assert (end.action, end.released) == ("no-op", True)
        assert not runtime.tracker.claims()
        session.delete()
        for late in ("session-start", "stop", "pre-compaction"):
            assert runtime.tracker.gate(late, session.id, "harness").bypassed


def test_d33_hooks_keep_the_claim_of_a_session_that_is_in_use(path, clock):
    with Runtime(path, model=obedient(), clock=clock) as runtime:
        session = runtime.create_session()
        assert runtime.tracker.claim(session.id, "harness")
        for _ in range(5):
            clock.advance(DEFAULT_TTL_S * 0.9)
            assert runtime.tracker.gate("user-prompt-submit", session.id, "harness").action == "run"
        assert runtime.tracker.claims()[session.id].owner == "harness"
        clock.advance(DEFAULT_TTL_S)
        assert runtime.tracker.counts().claims == 0


def test_d39_the_bypass_survives_the_actor_and_the_runtime(path):
    notes = Notes()
    hooks = {"after_turn": notes, "before_prompt": notes}
    with Runtime(path, model=obedient(), hooks=hooks) as runtime:
        session = runtime.create_session(internal=True)
        with pytest.raises(ActorCrashed):
            session._crash()
        session.prompt("say one").result(timeout_s=WAIT_S)
        assert runtime.tracker.is_bypassed(session.id)
    with Runtime(path, model=obedient(), hooks=hooks) as runtime:
        assert runtime.tracker.is_bypassed(session.id)
        again = runtime.session(session.id)
        assert again.record.internal
        again.prompt("say two").result(timeout_s=WAIT_S)
        settled(runtime)
    assert len(notes) == 0


def test_d39_the_bypass_survives_a_killed_process(path):
    with Child() as child:
        session_id = child.do(
            f"runtime = Runtime({str(path)!r}, model=obedient()).start()\n"
            "runtime.create_session(internal=True).id"
        )
        child.kill()
    with Runtime(path, model=obedient()) as runtime:
        assert runtime.tracker.gate("stop", session_id).bypassed


def test_d41_a_bypassed_session_can_do_everything_else(path):
    @tool
    def count(n: int) -> int:
        """Count."""
        return n + 1

    with Runtime(path, model=obedient(), tools=[count], hooks={"after_turn": Notes()}) as runtime:
        session = runtime.create_session(internal=True)
        reply = session.prompt('call count {"n": 1}').result(timeout_s=WAIT_S)
        assert reply.text == "done"
        assert [part.state.output for part in reply.messages[0].parts if part.type == "tool"] == [
            "2"
        ]
        assert session.fork().messages()[0].text == session.messages()[0].text
        assert session.update(title="mine").title == "mine"
        assert session.compact().marker_id
        assert session in runtime.sessions(internal=True)
        assert session not in runtime.sessions()
        assert session.delete().value == 1


def test_d42_bypassing_one_session_leaves_the_others_hooks(path):
    notes = Notes()
    with Runtime(path, model=obedient(), hooks={"after_turn": notes}) as runtime:
        internal = runtime.create_session(internal=True)
        session = runtime.create_session()
        internal.prompt("say a").result(timeout_s=WAIT_S)
        session.prompt("say a").result(timeout_s=WAIT_S)
        settled(runtime)
        assert [call.session.id for call in notes.calls] == [session.id]


# --- hooks that use the runtime: no loop -------------------------------------------------------


def recall(call):
    """A memory: asks a session of its own what it remembers."""
    session = call.session.runtime.create_session(title="recall")
    return session.prompt(f"say what is known of {call.text}").result(timeout_s=WAIT_S).text


def inner_fork(call):
    call.session.fork().prompt("say in a fork").result(timeout_s=WAIT_S)


def inner_child(call):
    runtime = call.session.runtime
    child = runtime.create_session(parent_id=call.session.id)
    child.prompt("say in a child").result(timeout_s=WAIT_S)


def inner_prompt(call):
    call.session.prompt("say this too")


def inner_tool(call):
    """The tool, in turn, makes a session and prompts it."""
    call.session.runtime.create_session().prompt("call delegate").result(timeout_s=WAIT_S)


def inner_quiet_tool(call):
    call.session.prompt("call delegate")


async def inner_async(call):
    session = await call.session.runtime.create_session()
    turn = await session.prompt("say in a coroutine")
    await turn.result(timeout_s=WAIT_S)


ELSEWHERE = [recall, inner_tool, inner_async]  # also when the hook's session is gone
HERE = [inner_fork, inner_child, inner_prompt, inner_quiet_tool]
LOOPS = [
    *[(hook, act) for hook in ("session_start", "after_turn") for act in (*ELSEWHERE, *HERE)],
    *[("before_prompt", act) for act in (*ELSEWHERE, inner_fork, inner_child, inner_prompt)],
    *[("session_end", act) for act in ELSEWHERE],
]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync tools", "async tools"])
@pytest.mark.parametrize(("hook", "act"), LOOPS, ids=lambda each: getattr(each, "__name__", each))
def test_d02_a_hook_that_uses_the_runtime_does_not_call_itself(path, act, hook, is_async):
    notes = Notes(act)
    if act is inner_async:

        async def hooked(call):
            notes.calls.append(call)
            if len(notes) <= ENOUGH:
                await act(call)

    else:
        hooked = notes

    @tool
    def delegate() -> str:
        """Let another session do it."""
        other = runtime.create_session()
        return other.prompt("say delegated").result(timeout_s=WAIT_S).text

    if is_async:

        @tool(name="delegate")
        async def delegate_async() -> str:
            """Let another session do it."""
            other = await runtime.create_session()
            turn = await other.prompt("say delegated")
            return (await turn.result(timeout_s=WAIT_S)).text

        delegate = delegate_async

    with Runtime(path, model=obedient(), tools=[delegate], hooks={hook: hooked}) as runtime:
        session = runtime.create_session()
        settled(runtime)
        session.prompt("say hello").result(timeout_s=WAIT_S)
        settled(runtime)
        session.delete()
        settled(runtime)
        assert len(notes.calls) == 1, [call.session.id for call in notes.calls]


def test_d02_two_hooks_do_not_call_each_other(path):
    first, second = Notes(recall), Notes(recall)
    hooks = {"before_prompt": first, "after_turn": second}
    with Runtime(path, model=obedient(), hooks=hooks) as runtime:
        runtime.create_session().prompt("say hello").result(timeout_s=WAIT_S)
        settled(runtime)
        assert (len(first), len(second)) == (1, 1)


def test_a_hooks_text_is_added_to_the_system_prompt_once_for_all_steps_of_a_turn(path):
    @tool
    def look() -> str:
        """Look."""
        return "seen"

    notes = Notes(lambda call: f"They said {call.text}.")
    model = obedient()
    hooks = {"before_prompt": notes}
    with Runtime(path, model=model, system="Be kind.", tools=[look], hooks=hooks) as runtime:
        runtime.create_session().prompt("call look").result(timeout_s=WAIT_S)
        systems = [request.system for request in model.requests]
        assert systems == ["Be kind.\n\nThey said call look."] * 2
        assert len(notes) == 1


def test_a_hook_that_raises_or_hangs_changes_nothing(path, caplog):
    hold = threading.Event()
    hooks = {
        "before_prompt": [lambda call: 1 / 0, lambda call: hold.wait(WAIT_S), lambda call: "fact"],
        "after_turn": lambda call: 1 / 0,
    }
    model = obedient()
    with Runtime(path, model=model, hooks=hooks, hook_s=0.05) as runtime:
        assert runtime.create_session().prompt("say a").result(timeout_s=WAIT_S).text == "a"
        hold.set()
        settled(runtime)
    assert model.requests[0].system == "fact"
    assert "Hook before_prompt failed" in caplog.text
    assert "Hook before_prompt took more than" in caplog.text


@pytest.mark.parametrize("hooks", [{"before_lunch": print}, {"after_turn": 3}, {"after_turn": [3]}])
def test_hooks_that_are_none_are_refused(path, hooks):
    with pytest.raises(InvalidInput):
        Runtime(path, model=obedient(), hooks=hooks)


def test_last_text_is_what_the_hook_gets(path):
    notes = Notes()
    seen = []

    def script(request):
        seen.append(last_text(request))
        return Say("ok")

    with Runtime(path, model=ScriptedModel(script), hooks={"before_prompt": notes}) as runtime:
        turn = runtime.create_session().prompt("say a")
        turn.result(timeout_s=WAIT_S)
        [call] = notes.calls
        assert (call.message_id, [call.text]) == (turn.message_id, seen)
