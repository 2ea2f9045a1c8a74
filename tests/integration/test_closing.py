"""A close in the midst of everything: nothing is left at work, whatever came in last."""

import threading

import pytest
from pykka._envelope import Envelope

from understudy import RestartPolicy, Runtime, errors, tool
from understudy.actors import session_actor
from understudy.actors.core.commands import Reply, UpdateSession
from understudy.actors.messages import Crash, Request
from understudy.actors.pending import Pending
from understudy.gateway.audit import audit
from understudy.testing import Call, Gate, Say, ScriptedModel, Wait


def left_open(path):
    """What the rows say is at work, prompts that wait not counted."""
    return [
        violation
        for violation in audit(path).violations
        if not (violation.kind == "stuck" and violation.what.startswith("inbox "))
    ]


def outcomes(path, session_id):
    with Runtime(path, model="scripted", durability="normal") as again:
        session = again.session(session_id)
        session.wait_idle(timeout_s=15)
        return [(prompt.outcome, prompt.reason) for prompt in session.prompts()]


@pytest.fixture
def at_the_end(monkeypatch):
    """``at_the_end(runtime, act)``: act when all that ran was ended, and its actors still live."""

    def install(runtime, act):
        registry = runtime.engine.registry
        real = registry.close

        def close():
            act()
            return real()

        monkeypatch.setattr(registry, "close", close)

    return install


def test_a_child_that_is_closed_before_its_parent_stays_closed(path, at_the_end, eventually):
    gate, told = Gate(), threading.Event()

    def script(request):
        asked = request.turns[-1].content[0].text if request.turns else ""
        return [Call("delegate", {})] if asked == "parent" else [Wait(gate), Say("never")]

    def delegate() -> str:
        """Wait for a child that others prompt."""
        told.wait(20)
        return "done"

    runtime = Runtime(
        path, model=ScriptedModel(script), tools=[delegate], durability="normal"
    ).start()
    parent = runtime.create_session()
    child = runtime.create_session(parent_id=parent.id)
    parent.prompt("parent")
    child.prompt("runs")
    child.prompt("waits")
    gate.wait_reached()
    eventually(lambda: parent.id in runtime.engine.executor.sessions())

    def end_children():
        """As the parent's end does, in a thread of its own."""
        actor = runtime.engine.registry.actor(child.id)
        runtime.engine.abort_children(parent.id, "close")
        eventually(lambda: actor.settled)

    at_the_end(runtime, end_children)
    runtime.close()
    told.set()
    assert left_open(path) == []
    assert outcomes(path, child.id) == [("interrupted", "close"), ("answered", None)]


def test_a_prompt_that_waits_for_an_idle_actor_is_ended_too(path, at_the_end, crew, monkeypatch):
    """Its actor has not seen it when the close looks who is at work."""
    hold, held = threading.Event(), threading.Event()
    real = session_actor.decide

    def decide(state, command, moment, rules):
        if getattr(command, "title", None) == "hold":
            held.set()
            hold.wait(20)
        return real(state, command, moment, rules)

    monkeypatch.setattr(session_actor, "decide", decide)
    model = ScriptedModel([[Wait(Gate()), Say("never")]])
    runtime = Runtime(path, model=model, threads=1, durability="normal").start()
    session, other = runtime.create_session(), runtime.create_session()
    runtime.engine.send(other.id, UpdateSession(title="hold"))
    assert held.wait(15)
    mailbox = runtime.engine.registry.actor(session.id).actor_inbox
    caller = crew().call(session.prompt, "late").start()
    while mailbox.empty():
        held.wait(0.001)

    def let_go():
        hold.set()
        caller.outcomes()

    at_the_end(runtime, let_go)
    closer = crew().call(runtime.close).start()
    while len(mailbox._items) < 2 and not hold.is_set():  # until it is told to end, or is not
        held.wait(0.001)
    hold.set()
    assert closer.outcomes() == [True]
    assert left_open(path) == []
    assert outcomes(path, session.id) == [("interrupted", "close")]


def test_who_was_let_in_before_the_close_and_comes_after_it_is_refused(
    path, at_the_end, monkeypatch
):
    gate = Gate()
    model = ScriptedModel([[Wait(gate), Say("never")]])
    runtime = Runtime(path, model=model, durability="normal").start()
    busy, idle, asleep = (runtime.create_session() for _ in range(3))
    busy.prompt("runs")
    busy.prompt("waits")
    gate.wait_reached()
    runtime.engine.registry.passivate(-1.0)
    late = []

    def come():
        for session in (busy, idle, asleep):
            for call, words in ((session.prompt, ("late",)), (session.compact, ())):
                try:
                    late.append(call(*words))
                except errors.RuntimeClosed as refused:
                    late.append(type(refused))

    monkeypatch.setattr(runtime.engine, "must_be_open", lambda: None)
    at_the_end(runtime, come)
    runtime.close()
    assert late == [errors.RuntimeClosed] * 6
    assert left_open(path) == []
    assert outcomes(path, busy.id) == [("interrupted", "close"), ("answered", None)]
    assert outcomes(path, idle.id) == []


def sent_past_the_registry(runtime, session, command):
    """As by a thread that was let in before the close, and goes on now."""
    answer = Pending()
    runtime.engine.registry.actor(session.id).actor_inbox.put(Envelope(Request(command, answer)))
    return answer


def test_a_session_with_prompts_left_to_the_next_start_is_not_called_at_rest(path, at_the_end):
    gate, told = Gate(), []
    runtime = Runtime(path, model=ScriptedModel([[Wait(gate), Say("never")]])).start()
    session = runtime.create_session()
    session.prompt("runs")
    session.prompt("waits")
    gate.wait_reached()

    def act():
        told.append(runtime.engine.outcomes.idle_of(session.id))
        looked = threading.Event()
        runtime.engine.store.between_commits(looked.set)
        assert looked.wait(15)

    at_the_end(runtime, act)
    assert runtime.close()
    with pytest.raises(errors.RuntimeClosed):
        told[0].get(timeout=15)
    assert outcomes(path, session.id) == [("interrupted", "close"), ("answered", None)]


def test_a_call_that_waits_for_a_person_is_not_begun_by_an_answer_after_the_close(
    path, at_the_end, eventually
):
    ran = []

    @tool(permission="edit")
    def edit() -> str:
        """Note that it ran."""
        ran.append("edit")
        return "done"

    options = {"tools": [edit], "permissions": {"edit": "ask"}, "durability": "normal"}
    model = ScriptedModel([[Call("edit", {})], [Say("edited")]])
    runtime = Runtime(path, model=model, **options).start()
    session = runtime.create_session()
    session.prompt("edit")
    eventually(runtime.asks)
    ask = runtime.asks()[0]
    refused = []

    def answer():
        answered = sent_past_the_registry(runtime, session, Reply(ask_id=ask.id, reply="once"))
        with pytest.raises(errors.RuntimeClosed):
            answered.get(timeout=15)
        refused.append(answered)

    at_the_end(runtime, answer)
    runtime.close()
    assert refused
    assert ran == []
    with Runtime(path, model=model, **options) as again:
        assert [each.id for each in again.asks()] == [ask.id]


def test_an_actor_that_is_replaced_in_the_close_starts_nothing_either(path, at_the_end, eventually):
    gate = Gate()
    model = ScriptedModel([[Wait(gate), Say("never")]])
    runtime = Runtime(path, model=model, durability="normal").start()
    session = runtime.create_session()
    session.prompt("runs")
    session.prompt("waits")
    gate.wait_reached()
    registry, settled = runtime.engine.registry, []

    def crash():
        first = registry.actor(session.id)
        with pytest.raises(errors.ActorCrashed):
            sent_past_the_registry(runtime, session, Crash("boom")).get(timeout=15)
        eventually(lambda: registry.actor(session.id) is not first)
        second = registry.actor(session.id)
        eventually(lambda: second.state is not None and second.settled)
        settled.append(second)

    at_the_end(runtime, crash)
    runtime.close()
    assert settled
    assert left_open(path) == []
    assert outcomes(path, session.id) == [("interrupted", "close"), ("answered", None)]


def test_a_close_does_not_wait_for_the_restart_of_an_idle_session(path, eventually, caplog):
    slow = RestartPolicy(backoff_s=20.0, max_backoff_s=30.0)
    runtime = Runtime(path, restart=slow, durability="normal").start()
    session = runtime.create_session()
    with pytest.raises(errors.ActorCrashed):
        runtime.engine.registry.send(session.id, Crash("boom")).get(timeout=15)
    eventually(lambda: runtime.engine.supervisor.restarts == 1)
    caplog.clear()
    assert runtime.close(timeout_s=1.0)
    assert caplog.messages == []


def test_what_is_committed_after_a_close_gave_up_waiting_disturbs_nobody(path, opened, caplog):
    reached, release = threading.Event(), threading.Event()

    def fault(point):
        if point == "begin" and reached.is_set():
            release.wait(15)

    runtime = Runtime(path, durability="normal", fault=fault).start()
    session = runtime.create_session()
    other = opened()
    reached.set()
    renamed = runtime.engine.send(session.id, UpdateSession(title="late"))
    foreign = other.create_session()  # an event that the first runtime has yet to read
    assert not runtime.close(timeout_s=0.1)
    release.set()
    runtime.engine.store._writer.close(15.0)
    assert renamed.done
    assert other.session(session.id).title in ("New session", "late")
    assert other.session(foreign.id) == foreign
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.fixture
def starting(path, monkeypatch):
    """``starting(step)``: a runtime held in a step of its start, and what lets it go on."""
    go = threading.Event()

    def begin(step):
        runtime, reached = Runtime(path, durability="normal"), threading.Event()
        place = getattr(runtime.engine, step[0])
        real = getattr(place, step[1])

        def hold():
            real()
            reached.set()
            go.wait(20)

        monkeypatch.setattr(place, step[1], hold)
        outcome = []
        starter = threading.Thread(target=lambda: outcome.append(_raised(runtime.start)))
        starter.start()
        assert reached.wait(15)

        def let_go():
            go.set()
            starter.join(15)
            return outcome

        return runtime, let_go

    yield begin
    go.set()


def _raised(call):
    try:
        return call()
    except errors.UnderstudyError as error:
        return type(error)


STEPS = (("store", "open"), ("orphans", "recover_all"), ("upkeep", "start"))


@pytest.mark.parametrize("step", STEPS)
def test_a_runtime_that_is_closed_as_it_starts_gives_everything_back(
    path, starting, crew, eventually, step
):
    eventually(lambda: not _ours())
    runtime, let_go = starting(step)
    closers = crew().call(runtime.close, times=2).start()
    eventually(lambda: runtime.engine._state == "closing")
    assert let_go() == [errors.RuntimeClosed]
    assert closers.outcomes() == [True, True]
    eventually(lambda: not _ours())
    assert not list(path.parent.glob("*.lock"))


@pytest.mark.parametrize("step", STEPS)
def test_a_close_does_not_wait_for_ever_for_a_start(path, starting, eventually, step):
    runtime, let_go = starting(step)
    assert not runtime.close(timeout_s=0.1)
    with pytest.raises(errors.RuntimeClosed):
        runtime.create_session()
    assert let_go() == [errors.RuntimeClosed]
    assert runtime.close()
    assert not list(path.parent.glob("*.lock"))
    eventually(lambda: not _ours())


@pytest.mark.parametrize("step", STEPS)
def test_a_close_within_a_start_does_not_wait_for_itself(path, monkeypatch, eventually, step):
    """As a signal handler does that runs in the thread which starts the runtime."""
    runtime, clean = Runtime(path, durability="normal"), []
    place = getattr(runtime.engine, step[0])
    real = getattr(place, step[1])

    def interrupted():
        real()
        clean.append(runtime.close(timeout_s=0.1))

    monkeypatch.setattr(place, step[1], interrupted)
    with pytest.raises(errors.RuntimeClosed):
        runtime.start()
    assert clean == [True]
    eventually(lambda: not _ours())
    assert not list(path.parent.glob("*.lock"))


def _ours():
    return [each.name for each in threading.enumerate() if each.name.startswith("understudy-")]
