"""Two runtimes on one file: each session has one owner, and everybody sees everything."""

import contextlib
import queue
import sqlite3
import threading

import pytest
from fold import Fold, stored

from understudy import RestartPolicy, Retention, Runtime, ScriptedModel, ToolContext, errors
from understudy.testing import Call, Gate, Say, SystemClock, VirtualClock, Wait, crash, echo


def test_a_session_belongs_to_one_runtime_and_its_error_names_it(opened):
    one, two = opened(), opened()
    mine = one.create_session(title="mine")
    seen = two.session(mine.id)
    assert seen.title == "mine"
    for call in (
        lambda: seen.prompt("x"),
        seen.abort,
        lambda: seen.update(title="theirs"),
        seen.delete,
        seen.compact,
    ):
        with pytest.raises(errors.SessionClaimed) as caught:
            call()
        assert (caught.value.owner, caught.value.session_id) == (one.id, mine.id)
    assert mine.prompt("mine").result(timeout_s=10).text == "mine"
    assert [message.text for message in seen.messages()] == ["mine", "mine"]
    assert seen.fork().prompt("a copy is mine").result(timeout_s=10).text == "a copy is mine"


def test_live_work_of_another_runtime_is_not_recovered(opened):
    gate = Gate()
    one = opened(ScriptedModel([[Wait(gate), Say("done")]]))
    session = one.create_session()
    turn = session.prompt("go")
    gate.wait_reached()
    two = opened()
    two.engine.upkeep._orphans()
    assert two.session(session.id).status().type == "busy"
    assert list(two.recovered) == []
    gate.open()
    assert turn.result(timeout_s=10).text == "done"


def test_a_quarantine_holds_and_is_lifted_in_every_runtime(opened, eventually):
    one, two = opened(restart=RestartPolicy(quarantine_after=1)), opened()
    session = one.create_session()
    with pytest.raises(errors.ActorCrashed):
        crash(session)
    eventually(lambda: session.id in one.quarantined())
    one.close()
    seen = two.session(session.id)
    with pytest.raises(errors.SessionQuarantined):
        seen.prompt("x")
    assert list(two.quarantined()) == [session.id]
    assert type(seen)(opened(), session.id).reset()
    eventually(lambda: not two.quarantined())


def test_a_session_is_taken_over_when_its_runtime_closed(opened, crew):
    one, two = opened(), opened()
    session = one.create_session()
    session.prompt("first").result(timeout_s=10)
    one.close()
    theirs = two.session(session.id)
    assert theirs.prompt("second").result(timeout_s=10).text == "second"
    assert len(theirs.messages()) == 4


def test_what_a_closed_runtime_left_waiting_is_done_by_the_other(opened):
    gate = Gate()
    one = opened(ScriptedModel([[Wait(gate), Say("never")]]))
    session = one.create_session()
    turns = [session.prompt(f"{n}") for n in range(3)]
    gate.wait_reached()
    two = opened(echo())
    one.close()
    two.engine.upkeep._orphans()
    theirs = two.session(session.id)
    with pytest.raises(errors.TurnAborted):
        theirs.turn(turns[0].message_id).result(timeout_s=10)
    assert theirs.turn(turns[1].message_id).result(timeout_s=10).text == "1"
    assert theirs.turn(turns[2].message_id).result(timeout_s=10).text == "2"


def test_racing_for_a_free_session_has_one_winner(opened, crew):
    first = opened()
    ids = [first.create_session().id for _ in range(10)]
    first.close()
    one, two = opened(), opened()
    for session_id in ids:
        outcomes = (
            crew()
            .call(lambda s=session_id: one.session(s).prompt("one").result(timeout_s=10).text)
            .call(lambda s=session_id: two.session(s).prompt("two").result(timeout_s=10).text)
            .start()
            .outcomes()
        )
        won = [each for each in outcomes if isinstance(each, str)]
        lost = [each for each in outcomes if isinstance(each, errors.SessionClaimed)]
        assert (len(won), len(lost)) == (1, 1), outcomes
        assert len(one.session(session_id).messages()) == 2


def test_both_see_the_events_of_both_in_the_same_order(opened, path, crew):
    one, two = opened(), opened()
    streams = [runtime.events(after=0) for runtime in (one, two)]
    sessions = [one.create_session(), two.create_session()]

    def work(session):
        for number in range(10):
            session.prompt(f"{number}").result(timeout_s=10)
        session.wait_idle(timeout_s=10)

    calls = crew()
    for session in sessions:
        calls.call(work, session)
    assert calls.start().outcomes() == [None, None]
    tables, cursor = stored(path)
    orders = []
    for stream in streams:
        fold, order = Fold(), []
        while fold.cursor < cursor:
            event = stream.next(timeout_s=5)
            assert event is not None
            fold.take(event)
            if event.cursor is not None:
                order.append((event.cursor, event.session_id, event.type))
        assert fold.tables() == tables
        orders.append(order)
        stream.close()
    assert orders[0] == orders[1]
    assert [cursor for cursor, _, _ in orders[0]] == list(range(1, cursor + 1))


def test_a_session_deleted_by_one_is_gone_for_the_other(opened):
    one, two = opened(), opened()
    session = one.create_session()
    seen = two.session(session.id)
    session.delete()
    for call in (seen.refresh, lambda: seen.prompt("x"), seen.delete):
        with pytest.raises(errors.SessionNotFound):
            call()


def test_a_turn_taken_over_while_its_runtime_was_frozen_is_ended_there(opened, eventually):
    started, ended = threading.Event(), threading.Event()

    def quiet(ctx: ToolContext) -> str:
        """Say nothing until cancelled."""
        started.set()
        ctx.on_cancel(ended.set)
        ended.wait(10)
        return "late"

    frozen = opened(ScriptedModel([Call("quiet"), "ok"]), tools=[quiet])
    frozen.engine.upkeep.stop()  # as SIGSTOP would
    frozen.create_session().prompt("go")
    assert started.wait(10)
    later = VirtualClock(wall_ms=SystemClock().wall_ms() + 60_000)
    other = opened(tools=[quiet], clock=later)
    assert len(other.recovered) == 1
    other.close()
    frozen.engine.upkeep._renew()
    assert ended.wait(10)
    eventually(lambda: not frozen.statuses())


def test_who_waits_for_a_session_that_was_ended_elsewhere_before_is_told(opened):
    gate = Gate()
    frozen = opened(ScriptedModel([[Wait(gate), Say("late")]]))
    frozen.engine.upkeep.stop()  # as SIGSTOP would
    session = frozen.create_session()
    session.prompt("go")
    gate.wait_reached()
    later = VirtualClock(wall_ms=SystemClock().wall_ms() + 60_000)
    opened(clock=later).close()
    frozen.engine.publisher.poll()
    assert frozen.engine.registry.actor(session.id).state.turn is not None
    session.wait_idle(timeout_s=10)


def test_after_turn_is_called_where_the_turn_ended_and_nowhere_else(opened, monkeypatch):
    gate, heard = Gate(), []
    frozen = opened(ScriptedModel([[Wait(gate), Say("late")]]))
    monkeypatch.setattr(frozen.engine.hooks, "after_turn", lambda *args: heard.append(args))
    frozen.engine.upkeep.stop()  # as SIGSTOP would
    session = frozen.create_session()
    session.prompt("go")
    gate.wait_reached()
    ended = threading.Event()
    later = VirtualClock(wall_ms=SystemClock().wall_ms() + 60_000)
    opened(clock=later, hooks={"after_turn": lambda _: ended.set()}).close()
    assert ended.wait(15)
    frozen.engine.publisher.poll()
    assert heard == []


def test_lock_files_of_the_dead_are_swept_at_the_start_and_those_of_the_living_stay(opened, path):
    living = opened()
    orphan = path.with_name(f"{path.name}-rtm_died_before_it_was_on_record.lock")
    others = path.with_name(f"{path.name}-notes.lock")
    orphan.touch()
    others.touch()
    two = opened()
    kept = {f"{path.name}-{each.id}.lock" for each in (living, two)}
    assert {each.name for each in path.parent.glob("*.lock")} == {*kept, others.name}


def test_an_old_sqlite_is_warned_of_once_when_another_process_is_on_the_file(
    opened, path, caplog, monkeypatch
):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))
    alone = opened()
    opened()  # of this process
    assert "SQLite" not in caplog.text
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE runtime SET pid = 0 WHERE id = ?", (alone.id,))
    opened()
    assert [each.levelname for each in caplog.records if "SQLite" in each.message] == ["WARNING"]
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 3))
    caplog.clear()
    opened()
    assert "SQLite" not in caplog.text


class Held:
    """Workers that hold every job: what a frozen process had in its hands."""

    def __init__(self, runtime, monkeypatch):
        self.jobs = queue.SimpleQueue()
        self._submit = runtime.engine.executor.workers.submit
        monkeypatch.setattr(runtime.engine.executor.workers, "submit", self.jobs.put)

    def thaw(self, job):
        self._submit(job)


def frozen_with_a_queued_call(opened, monkeypatch, effects, clock):
    """A runtime that does nothing any more, past its lease, with a call that is about to start."""

    def strike() -> str:
        """Do what cannot be undone."""
        effects.append("struck")
        return "struck"

    runtime = opened(ScriptedModel([Call("strike"), "Done."]), tools=[strike], clock=clock)
    held = Held(runtime, monkeypatch)
    runtime.engine.upkeep.stop()
    session = runtime.create_session()
    turn = session.prompt("go")
    job = held.jobs.get(timeout=15)
    clock.advance(60)
    return runtime, session, turn, lambda: held.thaw(job)


@pytest.mark.parametrize("renewed", [False, True], ids=["lapsed", "renewed"])
def test_a_call_that_was_queued_does_not_start_once_the_session_was_taken_over(
    opened, monkeypatch, renewed
):
    clock, effects = VirtualClock(), []
    one, session, turn, thaw = frozen_with_a_queued_call(opened, monkeypatch, effects, clock)
    two = opened(clock=clock)
    assert [report.session_id for report in two.recovered] == [session.id]
    if renewed:  # by the upkeep of the thawed process, before the call's thread gets to run
        proved = threading.Event()
        one.engine.store.renew_lease(proved.set)
        assert proved.wait(15)
    thaw()
    with pytest.raises(errors.TurnAborted):
        turn.result(timeout_s=15)
    assert one.close()
    assert effects == []


def test_a_call_that_was_queued_starts_late_when_nobody_took_the_session(opened, monkeypatch):
    clock, effects = VirtualClock(), []
    _, _, turn, thaw = frozen_with_a_queued_call(opened, monkeypatch, effects, clock)
    monkeypatch.undo()
    thaw()
    assert turn.result(timeout_s=15).text == "Done."
    assert effects == ["struck"]


def test_a_look_for_news_never_overtakes_the_news_of_a_commit_of_ones_own(opened):
    one, _two = opened(), opened()
    session = one.create_session()
    committed, go_on = threading.Event(), threading.Event()

    def hold(point):
        if point == "committed":
            committed.set()
            go_on.wait(15)

    one.engine.store._writer._fault = hold
    answers = []
    caller = threading.Thread(target=lambda: answers.append(session.prompt("x").result()))
    caller.start()
    assert committed.wait(15)
    before = one.engine.publisher.cursor
    one.engine.upkeep._foreign_events()
    assert one.engine.publisher.cursor == before
    go_on.set()
    caller.join(15)
    assert answers[0].text == "x"


def test_what_was_trimmed_before_a_frozen_runtime_read_it_is_learned_from_the_rows(
    opened, eventually
):
    gate = Gate()
    model = ScriptedModel([[Wait(gate), Say("done")]])
    one = opened(model, restart=RestartPolicy(quarantine_after=1))
    broken, session = one.create_session(), one.create_session()
    with pytest.raises(errors.ActorCrashed):
        crash(broken)
    eventually(lambda: broken.id in one.quarantined())
    turn = session.prompt("go")
    gate.wait_reached()
    frozen = opened()
    frozen.engine.upkeep.stop()  # as SIGSTOP would
    assert list(frozen.quarantined()) == [broken.id]
    seen = frozen.session(session.id)
    later, answers = seen.turn(turn.message_id), queue.SimpleQueue()
    for wait in (lambda: later.result(timeout_s=15).text, lambda: seen.wait_idle(timeout_s=15)):
        threading.Thread(target=lambda wait=wait: answers.put(wait())).start()
    eventually(lambda: len(frozen.engine.outcomes._waiting.get(session.id, ())) == 2)
    with frozen.events() as events:
        gate.open()
        turn.result(timeout_s=15)
        session.wait_idle(timeout_s=15)
        broken.reset()
        one.engine.store.trim_journal(Retention(events=1))
        one.engine.store.run(lambda _: None)
        frozen.engine.upkeep.tick()
        assert events.next(timeout_s=15).type == "events.gap"
        assert events.next(timeout_s=15).cursor == one.cursor == frozen.cursor
    frozen.engine.upkeep._lost_events()
    assert "done" in {answers.get(timeout=15), answers.get(timeout=15)}
    assert not frozen.quarantined()


def test_an_id_that_is_used_again_has_nothing_of_the_life_another_process_ended(opened):
    gate = Gate()
    frozen = opened(ScriptedModel([[Wait(gate), Say("late")], "new"]))
    frozen.engine.upkeep.stop()  # as SIGSTOP would
    frozen.create_session(session_id="again").prompt("go")
    gate.wait_reached()
    other = opened(clock=VirtualClock(wall_ms=SystemClock().wall_ms() + 60_000))
    other.session("again").delete()
    session = frozen.create_session(session_id="again")
    assert session.status().type == "idle"
    assert session.prompt("hello").result(timeout_s=15).text == "new"
    gate.open()
    assert [message.text for message in session.messages()] == ["hello", "new"]


def test_an_abort_is_no_success_when_another_process_runs_the_session(opened):
    gate = Gate()
    frozen = opened(clock=(clock := VirtualClock(wall_ms=SystemClock().wall_ms())))
    frozen.engine.upkeep.stop()  # as SIGSTOP would
    session = frozen.create_session()
    session.prompt("go").result(timeout_s=15)
    later = VirtualClock(wall_ms=clock.wall_ms() + 60_000)
    other = opened(ScriptedModel(["", [Wait(gate), Say("done")]]), clock=later)
    turn = other.session(session.id).prompt("more")
    gate.wait_reached()
    clock.advance(60.0)
    with pytest.raises(errors.SessionClaimed):
        session.abort()
    gate.open()
    assert turn.result(timeout_s=15).text == "done"


def test_a_step_whose_answer_another_process_ended_asks_no_model(opened, monkeypatch):
    asked = []
    frozen = opened(ScriptedModel(lambda request: asked.append(request) or "late"))
    session = frozen.create_session()
    history, taken = frozen.engine.store.read.history, threading.Event()

    def after_a_takeover(session_id):
        later = VirtualClock(wall_ms=SystemClock().wall_ms() + 60_000)
        opened(clock=later).close()  # ends what ran here
        taken.set()
        return history(session_id)

    monkeypatch.setattr(frozen.engine.store.read, "history", after_a_takeover, raising=False)
    monkeypatch.setattr(frozen.engine.executor, "lasts", lambda term: False)  # nor by its clock
    frozen.engine.upkeep.stop()  # as SIGSTOP would
    turn = session.prompt("go")
    assert taken.wait(15)
    frozen.engine.upkeep._renew()
    with pytest.raises(errors.TurnAborted):
        turn.result(timeout_s=15)
    assert not asked


def test_what_a_runtime_committed_that_is_gone_again_is_told_at_the_next_look(opened, path):
    """Not only when the lease is renewed, which is a quarter of it."""
    runtime = opened(lease_s=120)
    with runtime.events() as events:
        with Runtime(path, lease_s=120) as other:
            session = other.create_session()
        assert events.next(timeout_s=15).session_id == session.id
