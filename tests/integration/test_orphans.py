"""What a start finds unfinished is made whole many at a time; one bad session costs no other.

A copy of the files of a store, taken while its runtime lives, is what a kill would have left.
"""

import shutil
import sqlite3
import threading
from contextlib import closing

import msgspec
import pytest

from understudy import RestartPolicy, Runtime, ScriptedModel
from understudy.actors import orphans
from understudy.actors.core import commands, decide, recovery
from understudy.actors.models.scripted import Stall
from understudy.gateway.audit import audit
from understudy.store.claims import Orphan

COUNT, QUEUED = 10, 3  # the last of them also has a prompt that waits


def copied(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", "-wal", "-shm"):
        file = source.with_name(source.name + suffix)
        if file.exists():
            shutil.copy(file, target.with_name(target.name + suffix))
    return target


def query(path, sql, *values):
    with closing(sqlite3.connect(path, timeout=15)) as connection, connection:
        return connection.execute(sql, values).fetchall()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    with Runtime(folder / "live.db", model=ScriptedModel(lambda request: [Stall()])) as runtime:
        for number in range(COUNT):
            session = runtime.create_session(session_id=f"ses_{number}")
            session.prompt("Hello")
        session.prompt("And then?")
        return copied(folder / "live.db", folder / "killed.db")


@pytest.fixture
def wreck(killed, tmp_path, monkeypatch):
    monkeypatch.setattr(orphans, "AT_ONCE", 4)
    return copied(killed, tmp_path / "a.db")


RESTING = [f"ses_{number}" for number in range(COUNT - 1)]
WAITING = f"ses_{COUNT - 1}"


def outcomes(runtime, session_id):
    return [prompt.outcome for prompt in runtime.session(session_id).prompts()]


def assert_whole(runtime, *, but=()):
    for session_id in set(RESTING) - set(but):
        assert outcomes(runtime, session_id) == ["interrupted"]
        assert runtime.session(session_id).status().type == "idle"
    if WAITING not in but:
        runtime.session(WAITING).wait_idle(timeout_s=30)
        assert outcomes(runtime, WAITING) == ["interrupted", "answered"]


def refusing(victims, failure):
    """The core's recovery, which fails for some."""

    def recover(draft, command):
        if draft.session_id in victims:
            failure()
        recovery.recover(draft, command)

    return recover


# --- what becomes of them ----------------------------------------------------------------------


def test_who_rests_afterwards_is_made_whole_without_an_actor(wreck):
    before = dict(query(wreck, "SELECT session_id, epoch FROM claim"))
    with Runtime(wreck) as runtime:
        assert runtime.live_sessions() == 1
        claims = query(wreck, "SELECT session_id, owner, epoch FROM claim")
        assert {key for key, owner, _ in claims if owner is None} == set(RESTING)
        assert all(epoch == before[key] + 1 for key, _, epoch in claims)
        assert_whole(runtime)
        assert outcomes(runtime, RESTING[0]) == ["interrupted"]
        answer = runtime.session(RESTING[0]).prompt("Again").result(timeout_s=30)
        assert answer.text == "Again"


def test_reports_and_hooks_are_those_of_a_session_that_an_actor_recovers(wreck, monkeypatch):
    def told(path, at_once):
        monkeypatch.setattr(orphans, "AT_ONCE", at_once)
        heard = {"recovery": [], "after_turn": []}
        done = threading.Semaphore(0)

        def after_turn(call):
            heard["after_turn"].append((call.session.id, call.message_id, call.outcome))
            done.release()

        def recovered(_, session, report):
            heard["recovery"].append((session.id, report))
            done.release()

        hooks = {"after_turn": after_turn}
        with Runtime(path, hooks=hooks, recovery_hook=recovered) as runtime:
            runtime.session(WAITING).wait_idle(timeout_s=30)
            for _ in range(2 * COUNT + 1):
                assert done.acquire(timeout=30)
            assert sorted(runtime.recovered, key=str) == sorted(
                (report for _, report in heard["recovery"]), key=str
            )
        return {name: sorted(calls, key=str) for name, calls in heard.items()}

    other = copied(wreck, wreck.with_name("b.db"))
    together = told(wreck, 4)
    monkeypatch.setattr(orphans.Orphans, "_settle", lambda self, ids: list(ids))
    assert told(other, 4) == together


def test_the_facts_are_those_of_an_actor(wreck, monkeypatch):
    def facts(path):
        (last,) = query(path, "SELECT max(cursor) FROM journal")[0]
        with Runtime(path) as runtime:
            runtime.session(WAITING).wait_idle(timeout_s=30)
        return {
            session_id: query(
                path,
                "SELECT seq, type FROM journal WHERE session_id = ? AND cursor > ? ORDER BY seq",
                session_id,
                last,
            )
            for session_id in RESTING
        }

    other = copied(wreck, wreck.with_name("b.db"))
    together = facts(wreck)
    assert all(together.values())
    monkeypatch.setattr(orphans.Orphans, "_settle", lambda self, ids: list(ids))
    assert facts(other) == together


# --- one bad session ---------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError("planted"), SystemExit(3)])
def test_one_that_cannot_be_decided_is_counted_and_quarantined_alone(wreck, monkeypatch, failure):
    def fail():
        raise failure

    recover = refusing({RESTING[1]}, fail)
    monkeypatch.setitem(decide._HANDLERS, commands.Recover, recover)
    policy = RestartPolicy(quarantine_after=2, backoff_s=0.0)
    with Runtime(wreck, restart=policy) as runtime:
        assert set(runtime.quarantined()) == {RESTING[1]}
        assert_whole(runtime, but={RESTING[1]})
        assert runtime.live_sessions() == 1, "only who has work to go on with"
    assert query(wreck, "SELECT session_id, consecutive FROM restart") == [(RESTING[1], 2)]


def test_one_whose_decision_hangs_holds_up_nobody_for_long(wreck, monkeypatch):
    release = threading.Event()
    recover = refusing({RESTING[1]}, lambda: release.wait(60))
    monkeypatch.setitem(decide._HANDLERS, commands.Recover, recover)
    with Runtime(wreck, command_timeout_s=1.0) as runtime:
        try:
            assert_whole(runtime, but={RESTING[1]})
        finally:
            release.set()
        assert runtime.session(RESTING[1]).prompt("Again").result(timeout_s=30).text == "Again"
        assert outcomes(runtime, RESTING[1]) == ["interrupted", "answered"]
    assert not audit(wreck).violations


def test_one_that_cannot_be_stored_fails_alone(wreck):
    query(
        wreck,
        f"CREATE TRIGGER refuse BEFORE UPDATE ON message WHEN NEW.session_id = '{RESTING[1]}' "
        "BEGIN SELECT raise(ABORT, 'disk is full'); END",
    )
    with Runtime(wreck) as runtime:
        assert_whole(runtime, but={RESTING[1]})
        assert outcomes(runtime, RESTING[1]) == [None]
        query(wreck, "DROP TRIGGER refuse")
        assert runtime.session(RESTING[1]).prompt("Again").result(timeout_s=30).text == "Again"
        assert outcomes(runtime, RESTING[1]) == ["interrupted", "answered"]


def test_a_damaged_row_is_given_up_in_its_own_session_only(wreck):
    query(wreck, "UPDATE message SET data = x'7b' WHERE session_id = ? AND open = 1", RESTING[1])
    query(wreck, "UPDATE session SET data = x'00' WHERE id = ?", RESTING[2])
    with Runtime(wreck, restart=RestartPolicy(quarantine_after=1)) as runtime:
        assert_whole(runtime, but={RESTING[2]})
        assert set(runtime.quarantined()) == {RESTING[2]}


def test_who_has_crashed_before_is_recovered_by_an_actor(wreck):
    query(
        wreck,
        "INSERT INTO restart (session_id, total, consecutive, last_ms, reason, culprit_count) "
        "VALUES (?, 1, 1, 0, 'planted', 0)",
        RESTING[1],
    )
    with Runtime(wreck) as runtime:
        assert runtime.live_sessions() == 2
        assert runtime.engine.registry.actor(RESTING[1]) is not None
        assert_whole(runtime)


# --- kills, and other runtimes -----------------------------------------------------------------


def test_a_kill_at_any_moment_leaves_each_session_whole_or_as_it_was(wreck, tmp_path):
    left = []

    def fault(point):
        left.append((point, copied(wreck, tmp_path / f"{len(left)}" / "a.db")))

    with Runtime(wreck, fault=fault) as runtime:
        runtime.session(WAITING).wait_idle(timeout_s=30)
    partial = set()
    for _, path in left:
        open_turns = query(path, "SELECT count(*) FROM message WHERE open = 1")[0][0]
        partial.add(open_turns)
        with Runtime(path) as runtime:
            runtime.session(WAITING).wait_idle(timeout_s=30)
            for session_id in RESTING:
                assert outcomes(runtime, session_id) == ["interrupted"]
            assert None not in outcomes(runtime, WAITING)
        assert not audit(path).violations
    assert any(1 < count < COUNT for count in partial), "kills came between the chunks too"


def test_one_that_moved_since_it_was_read_is_not_written(wreck):
    with Runtime(wreck) as runtime:
        runtime.session(WAITING).wait_idle(timeout_s=30)
        store = runtime.engine.store
        mine = runtime.create_session()
        (orphan,) = store.read.orphans([RESTING[0]])
        fact = store.read.events(after=0, session_id=RESTING[0])[0].data
        before = query(wreck, "SELECT * FROM claim ORDER BY session_id")
        held = Orphan(orphan.info, runtime.engine.id, orphan.epoch, orphan.seq)
        for late in (
            msgspec.structs.replace(orphan, epoch=orphan.epoch - 1),
            msgspec.structs.replace(orphan, seq=orphan.seq - 1),
            msgspec.structs.replace(orphan, owner="rtm_dead"),
            held,
            *store.read.orphans([mine.id]),
        ):
            answered = threading.Event()
            outcome = []

            def done(*told, outcome=outcome, answered=answered):
                outcome.extend(told)
                answered.set()

            store.settle_orphans([(late, (fact,))], done)
            assert answered.wait(30)
            assert outcome == [[late.info.id], [], None]
        assert query(wreck, "SELECT * FROM claim ORDER BY session_id") == before


# --- reading -----------------------------------------------------------------------------------


def test_many_are_read_as_each_alone(wreck):
    query(wreck, "UPDATE message SET data = x'5b5d' WHERE session_id = ? AND open", RESTING[4])
    store = Runtime(wreck).engine.store
    store.open()
    try:
        ids = [*RESTING, WAITING, "ses_nobody"]
        together = store.read.unfinished(ids)
        assert together == {each: store.read.unfinished([each])[each] for each in ids}
        assert [each for each in ids if together[each].damaged] == [RESTING[4]]
        assert len(together[WAITING].prompts) == 2
        assert len(together[RESTING[3]].messages) == 1
        assert together["ses_nobody"].prompts == ()
    finally:
        store.close()


def test_a_start_that_recovers_for_longer_than_its_lease_keeps_it(wreck, monkeypatch, eventually):
    decided = orphans.Orphans._decide
    held, go = threading.Event(), threading.Event()

    def slow(self, chunk):
        held.set()
        assert go.wait(30)
        return decided(self, chunk)

    def until_ms():
        return query(wreck, "SELECT until_ms FROM runtime WHERE id = ?", runtime.id)[0][0]

    monkeypatch.setattr(orphans.Orphans, "_decide", slow)
    runtime = Runtime(wreck, model=ScriptedModel([]), lease_s=1.0)
    starting = threading.Thread(target=runtime.start)
    starting.start()
    try:
        assert held.wait(30)
        first = until_ms()
        eventually(lambda: until_ms() > first)
        assert runtime.recovered == ()
    finally:
        go.set()
        starting.join(30)
        runtime.close()
    assert query(wreck, "SELECT count(*) FROM message WHERE open = 1") == [(0,)]
