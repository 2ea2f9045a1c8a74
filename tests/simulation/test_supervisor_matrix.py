"""The supervisor's matrix: restart type x way of dying x shutdown, in virtual time.

Whatever an actor dies of: who asked is told, what waited is kept, the crash is counted and
published once, the session goes on, and no other session notices.
"""

import asyncio
import logging

import pykka
import pytest
from stage import PATIENCE_S, Stage

from understudy import RestartPolicy, errors
from understudy.actors.core.commands import Recover, SubmitPrompt
from understudy.actors.messages import Crash, Delete
from understudy.store.lanes import waits
from understudy.store.records import TextPart

RESTARTING = ("permanent", "transient")
TYPES = (*RESTARTING, "temporary")


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Bare(BaseException):
    """Derived from nothing that an `except Exception` catches."""


ERRORS = {
    "an exception": ValueError("no"),
    "one that cannot be printed": Mute(),
    "one that cannot be stored": ValueError("half a character: \ud800"),
    "one of many words": ValueError("word " * 100_000),
    "no memory": MemoryError(),
    "too deep": RecursionError("too deep"),
    "a dead actor elsewhere": pykka.ActorDeadError("gone"),
    "an exit": SystemExit(3),
    "an interrupt": KeyboardInterrupt(),
    "a cancellation": asyncio.CancelledError(),
    "a generator's end": GeneratorExit(),
    "a base exception": Bare(),
}


@pytest.fixture
def stage(tmp_path, monkeypatch):
    made = Stage(tmp_path, monkeypatch)
    token = waits.set(made.scheduler.wait)
    logging.getLogger("understudy").setLevel(logging.CRITICAL + 1)
    try:
        yield made
        made.end()
    finally:
        logging.getLogger("understudy").setLevel(logging.NOTSET)
        waits.reset(token)


def once(work):
    """Do it the first time only."""
    left = [work]

    def call(*arguments):
        if left:
            left.pop()(*arguments)

    return call


# --- ways of dying -----------------------------------------------------------------------------
#
# Each makes the session die of the command it returns the answer to. At the moment of death
# ``meanwhile`` is called: whatever others send then must outlive the actor.


def in_a_handler(error):
    def die(stage, process, meanwhile):
        @once
        def raise_it():
            meanwhile()
            raise error

        stage.hooks["die"] = lambda owner, command: (
            raise_it() if owner == "victim" and getattr(command, "title", "") == "die" else None
        )
        return stage.update(process, "victim", "die")

    return die


def by_a_crash_on_request(stage, process, meanwhile):
    answer = stage.send(process, "victim", Crash())
    meanwhile()
    return answer


def before_its_commit(stage, process, meanwhile):
    real = process.engine.store.commit

    def commit(change, done, **options):
        if change.session_id == "victim":
            process.engine.store.commit = real
            meanwhile()
            raise SystemExit("no commit")
        real(change, done, **options)

    process.engine.store.commit = commit
    return stage.update(process, "victim", "die")


def in_its_commit(stage, process, meanwhile):
    """The store has a bug: no error of a database, and nothing is written."""
    store = process.engine.store
    real = store.commit

    def commit(change, done, **options):
        real(change, done, **options)
        if change.session_id == "victim":
            store.commit = real
            meanwhile()
            fault, job = store._writer._fault, done.__self__

            def fail(point):
                if point == "commit" and job._batch is not None:
                    raise ZeroDivisionError("a bug")
                fault(point)

            store._writer._fault = fail

    store.commit = commit
    return stage.update(process, "victim", "die")


def of_a_hang(stage, process, meanwhile):
    """The watchdog gives its thread up; when it comes back it is fenced out."""
    real = process.engine.store.commit

    def commit(change, done, **options):
        if change.session_id == "victim":
            process.engine.store.commit = real
            meanwhile()
            process.plan.hang_s.append(60.0)
        real(change, done, **options)

    process.engine.store.commit = commit
    return stage.update(process, "victim", "die")


DEATHS = {
    **{f"raising {name}": in_a_handler(error) for name, error in ERRORS.items()},
    "a crash on request": by_a_crash_on_request,
    "before its commit": before_its_commit,
    "in its commit": in_its_commit,
    "a hang": of_a_hang,
}


class Family:
    """A parent, its children and a child's child: all but the one that will die are busy."""

    def __init__(self, stage, process):
        self.stage, self.process = stage, process
        stage.create(process, "parent")
        for name in ("victim", "sibling"):
            stage.create(process, name, parent_id="parent")
        stage.create(process, "child", parent_id="victim")
        self.others = ["parent", "sibling", "child"]
        self.turns = {name: stage.busy(process, name) for name in self.others}
        self.before = {name: self._identity(name) for name in self.others}

    def _identity(self, name):
        actor = self.stage.actor(self.process, name)
        return id(actor), id(actor._mailbox), actor.epoch

    def check_untouched(self, *gone):
        """They were not replaced, not interrupted, and not spoken of."""
        for name in self.others:
            if name in gone:
                continue
            assert self._identity(name) == self.before[name]
            turn = self.turns[name]
            text = self.process.run(lambda turn=turn: turn.result(timeout_s=PATIENCE_S).text)
            assert text == "begun and done"
            assert self.stage.news(name) == []
            assert self.stage.crashes(self.process, name) == (0, 0)


def check_nothing_kept(stage, process):
    """Deleted, nothing of the sessions is left in memory."""
    engine = process.engine
    process.run(lambda: process.runtime.session("parent").delete())
    stage.passes(5.0)
    assert len(engine.registry) == 0
    assert not engine.supervisor._recent and not engine.registry.quarantined
    assert not engine.executor._executions and not engine.executor._unstarted
    assert not engine.publisher._streams and not len(engine.outcomes)
    assert not process.platform.pool._running


@pytest.mark.parametrize("restart", TYPES)
@pytest.mark.parametrize("way", DEATHS)
def test_a_death_is_one_sessions_and_is_mended(stage, restart, way):
    process = stage.start(restart=RestartPolicy(restart=restart))
    family = Family(stage, process)
    first = stage.actor(process, "victim")
    waiting = []

    def meanwhile():
        waiting.extend(stage.update(process, "victim", f"kept {n}") for n in range(3))

    death = DEATHS[way](stage, process, meanwhile)
    got = stage.outcome(death)
    assert isinstance(got, errors.ActorCrashed) and got.session_id == "victim"
    outcomes = [stage.outcome(each) for each in waiting]
    if restart == "temporary":
        assert [type(each) for each in outcomes] == [errors.ActorCrashed] * 3
        stage.passes(10.0)
        assert stage.actor(process, "victim") is None
        expected = ["crashed"]
    else:
        assert [each.title for each in outcomes] == ["kept 0", "kept 1", "kept 2"]
        assert stage.actor(process, "victim") is not first
        expected = ["crashed", "restarted"]
    assert stage.news("victim") == expected
    assert stage.crashes(process, "victim")[0] == 1
    assert process.runtime.restarts == len(expected) - 1
    assert stage.answer(process, "victim") == "hello"
    assert stage.news("victim") == expected
    assert stage.crashes(process, "victim") == (1, 0), "forgiven by an answer"
    assert process.runtime.session("victim").record.title != "die"
    family.check_untouched()
    check_nothing_kept(stage, process)


@pytest.mark.parametrize("restart", TYPES)
@pytest.mark.parametrize(
    "error", [ValueError("no"), SystemExit(3), Mute()], ids=["plain", "exit", "mute"]
)
def test_a_death_in_recovery_is_one_more(stage, restart, error):
    process = stage.start(restart=RestartPolicy(restart=restart))
    family = Family(stage, process)

    @once
    def raise_it():
        raise error

    stage.hooks["recovery"] = lambda owner, command: (
        raise_it() if owner == "victim" and type(command) is Recover else None
    )
    assert isinstance(stage.outcome(stage.send(process, "victim", Crash())), errors.ActorCrashed)
    stage.until(lambda: not stage.is_dead(process, "victim"))
    got = stage.outcome(stage.update(process, "victim", "next"))
    if restart == "temporary":  # it was this command that brought the session back
        assert isinstance(got, errors.ActorCrashed)
        expected = ["crashed", "crashed"]
    else:
        assert got.title == "next"
        expected = ["crashed", "crashed", "restarted"]
    assert stage.news("victim") == expected
    assert stage.crashes(process, "victim") == (2, 2)
    assert stage.answer(process, "victim") == "hello"
    family.check_untouched()
    check_nothing_kept(stage, process)


@pytest.mark.parametrize("restart", TYPES)
def test_a_death_after_the_commit_takes_nothing_back(stage, restart):
    """What follows a commit runs in the writer's lane: neither that nor the session stops there."""
    process = stage.start(restart=RestartPolicy(restart=restart))
    family = Family(stage, process)
    real = process.engine.executor.start

    def start(session_id, effects):
        process.engine.executor.start = real
        raise SystemExit("no thread")

    process.engine.executor.start = start
    part = TextPart(id="prt_1", message_id="", session_id="victim", text="asked")
    accepted = stage.outcome(
        stage.send(process, "victim", SubmitPrompt(parts=(part,), digest="d", message_id="msg_1"))
    )
    assert accepted is not None and not isinstance(accepted, BaseException)
    stage.passes(10.0)
    expected = ["crashed"] if restart == "temporary" else ["crashed", "restarted"]
    assert stage.news("victim") == expected
    (prompt,) = process.runtime.session("victim").prompts()
    assert prompt.outcome == "interrupted", "it is durable, and settled like any turn"
    assert stage.answer(process, "victim") == "hello"
    family.check_untouched()
    check_nothing_kept(stage, process)


# --- what waits in the queue, and what is asked for again ----------------------------------------


@pytest.mark.parametrize("restart", RESTARTING)
def test_a_crash_that_waits_out_the_backoff_is_the_next_one(stage, restart):
    """Crashes sent in a backoff, and right after a restart, count one by one, in their order."""
    process = stage.start(restart=RestartPolicy(restart=restart, backoff_s=10.0))
    family = Family(stage, process)
    first = stage.send(process, "victim", Crash("first"))
    stage.until(lambda: stage.crashes(process, "victim") == (1, 1))
    began_s = stage.now_s
    second = stage.send(process, "victim", Crash("second"))
    kept = stage.update(process, "victim", "kept")
    assert isinstance(stage.outcome(first), errors.ActorCrashed)
    assert isinstance(stage.outcome(second), errors.ActorCrashed)
    assert stage.now_s - began_s >= 5.0, "not before the backoff, of which chance takes half"
    assert stage.outcome(kept).title == "kept"
    assert stage.now_s - began_s >= 15.0, "the second pause is twice as long"
    assert stage.news("victim") == ["crashed", "restarted"] * 2
    assert stage.crashes(process, "victim") == (2, 2)
    assert stage.answer(process, "victim") == "hello"
    family.check_untouched()
    check_nothing_kept(stage, process)


def test_sessions_that_die_together_are_restarted_each_by_itself(stage):
    process = stage.start(restart=RestartPolicy(intensity=1))
    names = [f"s{n}" for n in range(20)]
    for name in names:
        stage.create(process, name)
    deaths = [stage.send(process, name, Crash()) for name in names]
    assert {type(stage.outcome(each)) for each in deaths} == {errors.ActorCrashed}
    assert {stage.outcome(stage.update(process, name, "on")).title for name in names} == {"on"}
    assert process.runtime.restarts == 20, "the intensity is a session's, not the supervisor's"
    assert all(stage.news(name) == ["crashed", "restarted"] for name in names)


@pytest.mark.parametrize("restart", TYPES)
def test_only_the_children_of_a_turn_that_died_end_with_it(stage, restart):
    process = stage.start(restart=RestartPolicy(restart=restart))
    family = Family(stage, process)
    turn = stage.busy(process, "victim")
    stage.until(lambda: process.engine.executor._executions.get("victim"))
    assert isinstance(stage.outcome(stage.send(process, "victim", Crash())), errors.ActorCrashed)
    stage.passes(10.0)  # a temporary session is brought back for what is unfinished
    why = "restart" if restart == "temporary" else "crash"  # the next command, or upkeep, began it
    for ended, reason in ((turn, why), (family.turns["child"], "abort")):
        with pytest.raises(errors.TurnAborted) as caught:
            process.run(lambda ended=ended: ended.result(timeout_s=PATIENCE_S))
        assert caught.value.reason == reason
    assert stage.news("child") == []
    assert stage.answer(process, "victim") == "hello"
    family.check_untouched("child")
    check_nothing_kept(stage, process)


# --- intensity and quarantine ------------------------------------------------------------------


@pytest.mark.parametrize("restart", TYPES)
@pytest.mark.parametrize("intensity", [0, 1, 3])
def test_one_crash_more_than_the_intensity_is_quarantine(stage, restart, intensity):
    policy = RestartPolicy(
        restart=restart, intensity=intensity, period_s=600.0, quarantine_after=99, backoff_s=0.0
    )
    process = stage.start(restart=policy)
    family = Family(stage, process)
    for _ in range(intensity):
        death = stage.outcome(stage.send(process, "victim", Crash("again")))
        assert isinstance(death, errors.ActorCrashed)
        stage.until(lambda: not stage.is_dead(process, "victim"))
        got = stage.outcome(stage.update(process, "victim", "on"))
        assert not isinstance(got, BaseException) and got.title == "on", repr(got)
    last = stage.send(process, "victim", Crash("again"))
    waiting = [stage.update(process, "victim", "too late") for _ in range(3)]
    assert isinstance(stage.outcome(last), errors.ActorCrashed)
    for each in waiting:
        got = stage.outcome(each)
        assert isinstance(got, errors.SessionQuarantined) and "again" in got.reason
    one = ["crashed"] if restart == "temporary" else ["crashed", "restarted"]
    assert stage.news("victim") == [*one * intensity, "crashed", "quarantined"]
    assert stage.crashes(process, "victim") == (intensity + 1, intensity + 1)
    assert stage.actor(process, "victim") is None
    assert isinstance(
        stage.outcome(stage.update(process, "victim", "still")), errors.SessionQuarantined
    )
    session = process.run(lambda: process.runtime.session("victim"))
    assert process.run(session.reset)
    assert stage.answer(process, "victim") == "hello"
    family.check_untouched()
    check_nothing_kept(stage, process)


def test_a_quarantine_outlives_the_runtime_and_is_ended_by_a_delete(stage):
    process = stage.start(restart=RestartPolicy(intensity=0))
    family = Family(stage, process)
    stage.outcome(stage.send(process, "victim", Crash()))
    stage.until(process.runtime.quarantined)
    process.close()
    process = stage.start("two")
    assert list(process.runtime.quarantined()) == ["victim"]
    got = stage.outcome(stage.update(process, "victim", "x"))
    assert isinstance(got, errors.SessionQuarantined)
    session = process.run(lambda: process.runtime.session("victim"))
    assert process.run(session.delete).value == 2
    assert not process.runtime.quarantined()
    stage.create(process, "victim")
    assert stage.answer(process, "victim") == "hello"
    assert stage.crashes(process, "victim") == (0, 0)
    assert set(family.others) == {"parent", "sibling", "child"}


# --- ends that are no deaths -------------------------------------------------------------------


@pytest.mark.parametrize("restart", TYPES)
@pytest.mark.parametrize("end", ["delete", "passivation", "another process"])
def test_a_normal_end_is_not_a_crash(stage, restart, end):
    policy = RestartPolicy(restart=restart)
    process = stage.start(restart=policy, passivate_after_s=3.0 if end == "passivation" else 1e6)
    family = Family(stage, process)
    waiting = []
    if end == "delete":
        deleted = stage.send(process, "victim", Delete())
        waiting = [stage.update(process, "victim", "late") for _ in range(3)]
        assert set(stage.outcome(deleted)) == {"victim", "child"}
        assert {type(stage.outcome(each)) for each in waiting} == {errors.SessionNotFound}
    elif end == "passivation":
        stage.passes(10.0)
        assert (stage.actor(process, "victim") is None) == (restart != "permanent")
    else:
        process.life.frozen = True
        stage.passes(40.0)  # the lease is over
        other = stage.start("other", restart=policy)
        assert stage.outcome(stage.update(other, "victim", "theirs")).title == "theirs"
        process.life.frozen = False
        got = stage.outcome(stage.update(process, "victim", "mine"))
        assert isinstance(got, errors.SessionClaimed)
    stage.passes(10.0)
    assert stage.news("victim") == []
    assert process.runtime.restarts == 0 and not process.engine.supervisor._recent
    if end == "delete":
        stage.create(process, "victim", parent_id="parent")
    assert stage.crashes(process, "victim") == (0, 0)
    if end == "another process":
        assert stage.answer(other, "victim") == "hello"
    else:
        assert stage.answer(process, "victim") == "hello"
        family.check_untouched(*(["child"] if end == "delete" else []))
        check_nothing_kept(stage, process)


def test_what_fails_after_a_delete_takes_nothing_back(stage, monkeypatch):
    process = stage.start()
    Family(stage, process)
    monkeypatch.setattr(process.engine.hooks, "later", once(lambda *_: 1 / 0))
    deleted = stage.send(process, "victim", Delete())
    waiting = stage.update(process, "victim", "late")
    assert set(stage.outcome(deleted)) == {"victim", "child"}
    assert isinstance(stage.outcome(waiting), errors.SessionNotFound)
    assert isinstance(stage.outcome(stage.update(process, "child", "late")), errors.SessionNotFound)
    check_nothing_kept(stage, process)


# --- shutdown ----------------------------------------------------------------------------------


def is_counting(stage, process):
    return process.engine.registry.actor("victim")._dead


def is_in_backoff(stage, process):
    return stage.crashes(process, "victim") == (1, 1)


def is_restarting(stage, process):
    return not process.engine.registry.actor("victim")._dead


def is_recovering(stage, process):
    actor = process.engine.registry.actor("victim")
    return not actor._dead and actor._batch is not None


def is_restarted(stage, process):
    actor = process.engine.registry.actor("victim")
    return not actor._dead and actor.epoch and actor._batch is None


@pytest.mark.parametrize("restart", RESTARTING)
@pytest.mark.parametrize(
    "moment", [is_counting, is_in_backoff, is_restarting, is_recovering, is_restarted]
)
@pytest.mark.parametrize("backoff_s", [0.0, 25.0])
def test_a_close_is_bounded_answers_everybody_and_nothing_restarts_after_it(
    stage, restart, moment, backoff_s
):
    process = stage.start(restart=RestartPolicy(restart=restart, backoff_s=backoff_s))
    family = Family(stage, process)
    turn = stage.busy(process, "victim")
    death = stage.send(process, "victim", Crash())
    stage.until(lambda: death.done and moment(stage, process))
    waiting = [stage.update(process, "victim", "waits") for _ in range(3)]
    began_s = stage.now_s
    assert process.run(lambda: process.runtime.close(timeout_s=4.0))
    assert stage.now_s - began_s <= 5.0
    for each in waiting:
        assert each.done, "answered when close returns"
        assert each.error is None or isinstance(each.error, errors.RuntimeClosed)
    with pytest.raises(errors.UnderstudyError):
        process.run(lambda: turn.result(timeout_s=1.0))
    assert isinstance(stage.outcome(stage.send(process, "victim", Crash())), errors.RuntimeClosed)
    told, restarts = list(stage.published), process.runtime.restarts
    stage.passes(100.0)
    assert (stage.published, process.runtime.restarts) == (told, restarts)
    assert len(process.engine.registry) == 0 and not process.platform.pool._running
    again = stage.start("two")
    assert stage.answer(again, "victim") == "hello"
    stage.passes(1.0)
    assert stage.crashes(again, "victim") == (1, 0)
    assert all(stage.crashes(again, name) == (0, 0) for name in family.others)
