"""A: recovery between processes: killed in the middle of it, several on one file, frozen ones."""

from __future__ import annotations

import queue
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cast import Tools, obedient
from plant import copy_store, open_counts, query, records, snapshot, write
from processes import Child, ChildError

from understudy import RecoveryReport, Runtime, Session
from understudy.errors import SessionClaimed

LEASE_S = 1.5


def opened(path: Path, **options: Any) -> str:
    """Code that opens a runtime in a child."""
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return (
        "tools = Tools(note=note)\n"
        f"runtime = Runtime({str(path)!r}, model=obedient(), tools=tools.all(){given}).start()\n"
    )


def busy_session(child: Child) -> str:
    """A session in the child whose tool is running."""
    child.do("session = runtime.create_session()\nturn = session.prompt('call block {}')")
    child.wait_note("block started")
    session_id: str = child.do("session.id")
    return session_id


WAIT = """
heard = []
def wait():
    try: heard.append(turn.result(timeout_s=60).text)
    except errors.UnderstudyError as error: heard.append(type(error).__name__)
    note('told')
spawn(wait)
"""


def freeze(child: Child, path: Path) -> None:
    """SIGSTOP, but not in the middle of a transaction: that would lock the file for everybody."""
    while True:
        child.stop()
        with closing(sqlite3.connect(path, timeout=1, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                child.proceed()
            else:
                connection.execute("ROLLBACK")
                return


def wait_for(session: Session, event_type: str) -> None:
    with session.events(after=0) as events:
        next(event for event in events if event.type == event_type)


# --- killed while recovering -------------------------------------------------------------------


@pytest.mark.slow
def test_a19_a_crash_during_recovery_is_repaired_by_the_next_start(tmp_path: Path) -> None:
    """Killed at every commit of the start in turn, before and after it; then one start is let."""
    wreck = tmp_path / "wreck.db"
    with Child() as child:
        child.do(opened(wreck))
        ids = [busy_session(child) for _ in range(3)]
        child.do("for text in ('say first', 'say second'): session.prompt(text)")
        child.kill()
    reached = 0
    for kill_at in (3, 5, 8, 9, 10, 12):
        path = copy_store(wreck, tmp_path / f"{kill_at}" / "a.db")
        with Child() as child:
            child.send(
                "count = 0\n"
                "def fault(point):\n"
                "    global count\n"
                "    count += 1\n"
                f"    if count == {kill_at}: os.kill(os.getpid(), signal.SIGKILL)\n"
                f"Runtime({str(path)!r}, model=obedient(), fault=fault).start()\n"
            )
            try:
                child.answer()
            except ChildError:
                reached += 1
        with Runtime(path, model=obedient()) as runtime:
            for session_id in ids:
                session = runtime.session(session_id)
                session.wait_idle(timeout_s=30)
                first, *queued = [prompt.outcome for prompt in session.prompts()]
                assert first == "interrupted"
                # What the killed start had begun already is interrupted in its turn.
                assert len(queued) == (2 if session_id == ids[-1] else 0)
                assert set(queued) <= {"answered", "interrupted"}
        assert not any(open_counts(path).values())
        errors = [p["state"]["error"] for p in records(path, "part").values() if "state" in p]
        assert errors == ["Tool execution was interrupted (server restart)"] * 3
    assert reached >= 5, "the kills came before the start was over"


# --- two alive on one file ---------------------------------------------------------------------


def test_a21_and_f034_a_second_runtime_leaves_the_live_work_of_the_first_alone(path: Path) -> None:
    with Child() as child:
        child.do(opened(path))
        session_id = busy_session(child)
        child.do("idle = runtime.create_session(title='idle')")
        before = snapshot(path)
        with Runtime(path, model=obedient()) as second:
            for _ in range(20):
                second.engine.orphans.wake()
            assert not second.recovered
            assert snapshot(path) == before
            claimed = second.session(session_id)
            with pytest.raises(SessionClaimed) as refused:
                claimed.prompt("say mine")
            assert refused.value.owner == child.do("runtime.engine.id")
            with pytest.raises(SessionClaimed):
                claimed.abort()
            with pytest.raises(SessionClaimed):
                claimed.delete()
            assert snapshot(path) == before
            assert second.create_session().prompt("say mine").result(timeout_s=30).text == "mine"
        child.do("tools.release.set()")
        assert child.do("turn.result(timeout_s=30).text") == "done"
        assert child.do("[p.state.output for m in session.messages() for p in m.tools]") == ["late"]


def test_a21_the_second_of_two_runtimes_in_one_process_recovers_nothing_either(
    path: Path,
) -> None:
    tools = Tools()
    with Runtime(path, model=obedient(), tools=tools.all()) as first:
        session = first.create_session()
        turn = session.prompt("call block {}")
        assert tools.started.wait(30)
        with Runtime(path, model=obedient()) as second:
            assert not second.recovered
            with pytest.raises(SessionClaimed):
                second.session(session.id).prompt("say mine")
        tools.release.set()
        assert turn.result(timeout_s=30).text == "done"


def test_a21_what_a_killed_process_left_is_recovered_by_the_one_that_lives(path: Path) -> None:
    """Nobody restarts anything: upkeep finds it, within seconds."""
    with Child() as child, Runtime(path, model=obedient()) as survivor:
        child.do(opened(path))
        session_id = busy_session(child)
        child.do("session.prompt('say queued')")
        session = survivor.session(session_id)
        events = survivor.events(session_id=session_id, deltas=False)
        child.kill()
        settled = []
        for event in events:
            if event.type == "prompt.settled":
                settled.append((event.data.info.outcome, event.data.info.reason))
            if event.type == "session.idle":
                break
        assert [outcome for outcome, _ in settled] == ["interrupted", "answered"]
        assert session.messages()[-1].text == "queued"
        assert [report.session_id for report in survivor.recovered] == [session_id]
    assert not any(open_counts(path).values())


def test_a21_two_survivors_recover_what_was_left_once(path: Path) -> None:
    reports: queue.Queue[RecoveryReport] = queue.Queue()

    def keep(_runtime: Runtime, _session: Session, report: RecoveryReport) -> None:
        reports.put(report)

    with (
        Child() as child,
        Runtime(path, model=obedient(), recovery_hook=keep) as one,
        Runtime(path, model=obedient(), recovery_hook=keep) as other,
    ):
        child.do(opened(path))
        ids = {busy_session(child) for _ in range(5)}
        child.kill()
        for runtime in (one, other, one, other):
            runtime.engine.orphans.wake()
        for session_id in ids:
            wait_for(one.session(session_id), "session.idle")
        for _ in ids:
            reports.get(timeout=30)  # told after the session's events
        recovered = [report.session_id for report in (*one.recovered, *other.recovered)]
        assert sorted(recovered) == sorted(ids)
    assert not any(open_counts(path).values())


# --- frozen ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a21_and_f101_a_frozen_process_is_replaced_and_cannot_write_when_it_wakes(
    path: Path,
) -> None:
    """SIGSTOP past the lease, takeover, SIGCONT: fenced, told so, and at work elsewhere."""
    with Child() as child:
        child.do(opened(path, lease_s=LEASE_S))
        session_id = busy_session(child)
        child.do("other = runtime.create_session()\nother.prompt('say one').result()")
        child.do(WAIT)
        freeze(child, path)
        with Runtime(path, model=obedient(), lease_s=LEASE_S) as second:
            session = second.session(session_id)
            wait_for(session, "session.idle")
            answer = session.prompt("say taken over").result(timeout_s=30)
            assert answer.text == "taken over"
            rows = [
                query(path, f"SELECT * FROM {name} WHERE session_id = ? ORDER BY id", session_id)
                for name in ("message", "part")
            ]
            child.proceed()
            child.do("tools.release.set()")  # the zombie's tool ends and reports its result
            child.wait_note("told")
            assert child.do("heard") == ["TurnAborted"]
            refused = child.do(
                "try: refused = repr(session.prompt('say zombie'))\n"
                "except errors.SessionClaimed as error: refused = error.owner\n"
                "refused"
            )
            assert refused == second.engine.id
            assert rows == [
                query(path, f"SELECT * FROM {name} WHERE session_id = ? ORDER BY id", session_id)
                for name in ("message", "part")
            ]
            assert child.do("other.prompt('say two').result(timeout_s=30).text") == "two"
            assert session.prompt("say still mine").result(timeout_s=30).text == "still mine"
        # The second is gone: the first may have the session again, from where it stands now.
        assert child.do("session.prompt('say back').result(timeout_s=30).text") == "back"
        texts = child.do("[m.text for m in session.messages() if m.role == 'user']")
        assert texts == ["call block {}", "say taken over", "say still mine", "say back"]


def test_a21_a_frozen_process_hears_what_became_of_its_turn_when_it_wakes_alone(
    path: Path,
) -> None:
    """The one that took over is gone again: nobody is left to tell it."""
    with Child() as child:
        child.do(opened(path))
        session_id = busy_session(child)
        child.do(WAIT)
        freeze(child, path)
        _expire_lease(path)
        with Runtime(path, model=obedient()) as second:
            assert [report.session_id for report in second.recovered] == [session_id]
        child.proceed()
        child.do("tools.release.set()")
        child.wait_note("told")
        assert child.do("heard") == ["TurnAborted"]


def test_a21_and_f103_a_frozen_process_whose_work_nobody_took_goes_on(path: Path) -> None:
    with Child() as child:
        child.do(opened(path))
        busy_session(child)
        freeze(child, path)
        _expire_lease(path)
        child.proceed()
        child.do("tools.release.set()")
        assert child.do("turn.result(timeout_s=30).text") == "done"
        assert child.do("session.prompts()[0].outcome") == "answered"


def _expire_lease(path: Path) -> None:
    write(path, "UPDATE runtime SET until_ms = 1")
