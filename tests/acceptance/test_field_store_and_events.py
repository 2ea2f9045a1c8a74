"""Field failures: SQLite and storage, events (numbers 106 to 127)."""

import sqlite3
import threading
from contextlib import closing

import plant
import pytest
from cast import obedient
from compacting import WAIT_S, history_of, together, until

from understudy import Runtime, signals
from understudy.actors.models.scripted import Gate, Say, ScriptedModel, Wait
from understudy.errors import (
    StoreError,
    StoreFull,
    StoreTooNew,
    StoreUnreadable,
    TurnAborted,
    TurnFailed,
    UnderstudyError,
)

# --- SQLite and storage ------------------------------------------------------------------------


def test_f106_many_threads_write_through_one_writer_and_lose_nothing(path):
    with Runtime(path, model=obedient(), durability="normal") as runtime:
        session = runtime.create_session()
        turns = together(50, lambda n: session.prompt(f"say {n}"))
        assert not [turn for turn in turns if isinstance(turn, Exception)]
        said = sorted(int(turn.result(timeout_s=WAIT_S).text) for turn in turns)
        assert said == list(range(50))
    seqs = [seq for _, seq, _ in plant.events(path, session.id)]
    assert seqs == list(range(1, len(seqs) + 1))


@pytest.mark.parametrize("point", ["begin", "commit"])
def test_f107_a_failed_write_holds_no_lock(path, point):
    failing = []

    def fault(at):
        if at == point and failing:
            raise failing.pop()

    with Runtime(path, model=obedient(), fault=fault) as runtime, Runtime(path) as other:
        session = runtime.create_session()
        calls = [
            runtime.create_session,
            lambda: session.prompt("say a"),
            session.compact,
            lambda: session.update(title="new"),
            session.delete,
        ]
        for call in calls:
            session.wait_idle(timeout_s=WAIT_S)
            failing.append(sqlite3.OperationalError("database or disk is full"))
            with pytest.raises(StoreFull):
                call()
            assert other.create_session(title="the other proceeds").title
        assert session.prompt("say still here").result(timeout_s=WAIT_S).text == "still here"


def test_f109_read_modify_write_from_two_runtimes_never_fails_at_once(path):
    with Runtime(path, durability="normal") as one, Runtime(path, durability="normal") as two:

        def work(number):
            runtime = (one, two)[number]
            for count in range(150):
                session = runtime.create_session(title=f"{number} {count}")
                session.update(title=f"{session.title} again")
            return number

        assert together(2, work) == [0, 1]
        titles = {session.title for session in one.sessions(limit=None)}
        assert titles == {f"{n} {count} again" for n in (0, 1) for count in range(150)}


def test_f110_the_database_is_sound_after_two_runtimes_stressed_it(path):
    model = obedient()
    with Runtime(path, model=model, durability="normal") as one:
        with Runtime(path, model=obedient(), durability="normal") as two:

            def work(number):
                runtime = (one, two)[number % 2]
                for count in range(15):
                    session = runtime.create_session()
                    session.prompt(f"say {count}").result(timeout_s=WAIT_S)
                    if count % 3 == 0:
                        session.delete()

            assert together(6, work) == [None] * 6
        assert len(one.sessions(limit=None)) == 60
    assert plant.query(path, "PRAGMA integrity_check") == [("ok",)]


def test_f112_a_store_of_a_newer_version_is_refused_and_left_untouched(path):
    with Runtime(path, model=obedient()) as runtime:
        runtime.create_session(title="kept").prompt("say a").result(timeout_s=WAIT_S)
    [(version,)] = plant.query(path, "PRAGMA user_version")
    plant.write(path, f"PRAGMA user_version = {version + 1}")
    before = path.read_bytes()
    with pytest.raises(StoreTooNew):
        Runtime(path).start()
    assert path.read_bytes() == before
    plant.write(path, f"PRAGMA user_version = {version}")
    with Runtime(path, model=obedient()) as runtime:
        assert [session.title for session in runtime.sessions()] == ["kept"]


def test_f113_rows_nobody_knows_are_left_where_they_are(path):
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        other = runtime.create_session()
        for each in (session, other):
            each.prompt("say a").result(timeout_s=WAIT_S)
    strange = b'{"type":"hologram","id":"prt_x","sessionID":"' + session.id.encode() + b'"}'
    [(message_id,)] = plant.query(
        path, "SELECT id FROM message WHERE session_id = ? AND role = 'user'", session.id
    )
    plant.write(
        path,
        "INSERT INTO part (session_id, id, message_id, seq, kind, open, data) "
        "VALUES (?, 'prt_x', ?, 1, 'hologram', 0, ?)",
        session.id,
        message_id,
        strange,
    )
    with Runtime(path, model=obedient()) as runtime:
        again = runtime.session(session.id)
        assert [m.text for m in again.messages()] == ["say a", "a"]
        assert again.prompt("say b").result(timeout_s=WAIT_S).text == "b"
        runtime.session(other.id).delete()
    assert plant.query(path, "SELECT data FROM part WHERE id = 'prt_x'") == [(strange,)]


@pytest.mark.parametrize("kind", ["part", "message"])
def test_f115_a_row_cut_to_nothing_does_not_hide_its_session(path, kind, caplog):
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session(title="damaged")
        for number in range(3):
            session.prompt(f"say {number}").result(timeout_s=WAIT_S)
        answered = list(session.messages())[1]
    name = answered.id if kind == "message" else answered.parts[1].id
    plant.write(path, f"UPDATE {kind} SET data = x'' WHERE id = ?", name)
    with Runtime(path, model=obedient()) as runtime:
        [again] = runtime.sessions()
        texts = [message.text for message in again.messages()]
        assert texts == ["say 0", *([""] if kind == "part" else []), "say 1", "1", "say 2", "2"]
        assert again.prompt("say 3").result(timeout_s=WAIT_S).text == "3"
        again.fork().delete()
        assert again.delete().value == 1
    assert f"damaged {kind} row" in caplog.text


@pytest.mark.parametrize("table", ["message", "inbox"])
@pytest.mark.parametrize("place", ["running", "waiting"])
def test_f115_a_prompt_that_cannot_be_read_has_its_end(path, tmp_path, table, place):
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        running, waiting = session.prompt("stall"), session.prompt("say late")
        copy = plant.copy_store(path, tmp_path / "killed" / "a.db")
    lost, kept = (running, waiting) if place == "running" else (waiting, running)
    column = "id" if table == "message" else "message_id"
    plant.write(copy, f"UPDATE {table} SET data = x'7b' WHERE {column} = ?", lost.message_id)
    with Runtime(copy, model=obedient()) as runtime:
        again = runtime.session(session.id)
        again.wait_idle(timeout_s=WAIT_S)
        with pytest.raises(TurnFailed if table == "message" else StoreUnreadable) as caught:
            again.turn(lost.message_id).result(timeout_s=WAIT_S)
        assert "cannot be read" in str(caught.value)
        outcome = "answered" if kept is waiting else "interrupted"
        prompts = {prompt.message_id: prompt.outcome for prompt in again.prompts()}
        assert prompts[kept.message_id] == outcome
        assert again.prompt("say on").result(timeout_s=WAIT_S).text == "on"
    with Runtime(copy, model=obedient()) as runtime:
        assert plant.open_counts(copy) == dict.fromkeys(plant.open_counts(copy), 0)
        assert runtime.live_sessions() == 0


def test_f115_a_marker_that_cannot_be_read_holds_nothing_up(path, tmp_path):
    gate = Gate()
    model = ScriptedModel(
        lambda request: [Wait(gate)] if request.purpose == "summary" else [Say("word " * 300)]
    )
    with Runtime(path, model=model) as runtime:
        session = runtime.create_session()
        for _ in range(3):
            session.prompt("go").result(timeout_s=WAIT_S)
        marker = session.compact()
        gate.wait_reached()
        copy = plant.copy_store(path, tmp_path / "killed" / "a.db")
        gate.open()
    plant.write(copy, "UPDATE message SET data = x'7b' WHERE id = ?", marker.marker_id)
    with Runtime(copy, model=ScriptedModel([[Say("short")]] * 9)) as runtime:
        again = runtime.session(session.id)
        again.wait_idle(timeout_s=WAIT_S)
        assert again.prompt("on").result(timeout_s=WAIT_S).text
        assert again.compact().result(timeout_s=WAIT_S).value
    with Runtime(copy) as runtime:
        assert runtime.live_sessions() == 0


def test_f116_what_could_not_be_stored_is_refused_visibly_and_later_works(path):
    full = threading.Event()

    def fault(point):
        if point == "commit" and full.is_set():
            raise sqlite3.OperationalError("database or disk is full")

    with Runtime(path, model=obedient(), fault=fault) as runtime:
        session = runtime.create_session()
        session.prompt("say a").result(timeout_s=WAIT_S)
        session.wait_idle(timeout_s=WAIT_S)
        full.set()
        for _ in range(3):
            with pytest.raises(StoreFull):
                session.prompt("say lost")
        with pytest.raises(StoreFull):
            runtime.create_session()
        assert [m.text for m in session.messages()] == ["say a", "a"]
        full.clear()
        assert session.prompt("say b").result(timeout_s=WAIT_S).text == "b"
        assert [prompt.outcome for prompt in session.prompts()] == ["answered"] * 2


# --- events ------------------------------------------------------------------------------------


def test_f118_whoever_comes_back_gets_what_they_missed_without_gap_or_duplicate(path):
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        with runtime.events() as events:
            turn = session.prompt("say a")
            seen = until(events, lambda event: event.type == "message.updated")
            cursor = events.cursor
        turn.result(timeout_s=WAIT_S)
        for number in range(20):
            session.prompt(f"say {number}").result(timeout_s=WAIT_S)
        last = runtime.cursor
        with runtime.events(after=cursor, deltas=False) as events:
            seen += until(events, lambda event: event.cursor == last)
        cursors = [event.cursor for event in seen if event.cursor is not None]
        assert cursors == list(range(cursors[0], last + 1))
        seqs = [e.seq for e in seen if e.cursor is not None and e.session_id == session.id]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


def test_f118_what_retention_took_is_told_as_a_gap(path):
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        for number in range(5):
            session.prompt(f"say {number}").result(timeout_s=WAIT_S)
    plant.write(path, "DELETE FROM journal WHERE cursor < 20")
    oldest = plant.events(path)[0][0]
    with Runtime(path, model=obedient()) as runtime, runtime.events(after=3) as events:
        first, second = next(iter(events)), next(iter(events))
        assert (first.type, first.data.after) == ("events.gap", 3)
        # The change that event 20 belongs to is there from its first event on.
        assert 3 < second.cursor == first.data.oldest == oldest <= 20


def test_f119_a_connection_broken_before_its_first_event_keeps_its_cursor(path):
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        cursor = runtime.cursor
        for _ in range(2):
            with runtime.events(after=cursor) as events:
                assert events.cursor == cursor
            session.prompt("say a").result(timeout_s=WAIT_S)
            cursor = events.cursor
        with runtime.events(after=cursor) as events:
            assert next(iter(events)).cursor == cursor + 1


def test_f121_an_old_event_never_undoes_a_newer_one(path):
    """Folding with a filter by ``seq`` gives the store's state, wherever it starts."""
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        for number in range(3):
            session.prompt(f"say {number}").result(timeout_s=WAIT_S)
        session.wait_idle(timeout_s=WAIT_S)
        stored = {m.id: m.info for m in session.messages()}
        events = history_of(runtime, session)
        twice = sorted([*events, *events[::2]], key=lambda event: event.cursor)
        last, folded = 0, {}
        for event in twice:
            if event.seq <= last:
                continue
            last = event.seq
            if event.type == "message.updated":
                folded[event.data.info.id] = event.data.info
        assert folded == stored
        assert [event.seq for event in events] == list(range(1, len(events) + 1))


def test_f122_a_stalled_subscriber_is_bounded_told_and_resumes(path):
    with Runtime(path, model=obedient(), durability="normal") as runtime:
        session = runtime.create_session()
        stalled = runtime.events(buffer=50)
        most = 0
        for number in range(100):
            session.prompt(f"say {number}").result(timeout_s=WAIT_S)
            most = max(most, len(stalled._buffer) + len(stalled._replay))
        assert most <= 50
        last = runtime.cursor
        assert last > 1_000
        seen = until(iter(stalled), lambda event: event.cursor == last)
        overflow = [event for event in seen if event.type == "events.overflow"]
        assert overflow and overflow[0].data.dropped > 0
        cursors = [event.cursor for event in seen if event.cursor is not None]
        assert cursors == list(range(cursors[0], last + 1))
        stalled.close()


def test_f124_what_an_event_tells_is_in_the_store_for_any_connection(path):
    missing = []

    def receiver(runtime, *, event):
        info = event.data.info
        rows = plant.query(path, "SELECT data FROM message WHERE id = ?", info.id)
        if not rows:
            missing.append(event)

    failing = []

    def fault(point):
        if point == "commit" and failing:
            raise failing.pop()

    signals.message_updated.connect(receiver)
    try:
        with Runtime(path, model=obedient(), fault=fault) as runtime:
            session = runtime.create_session()
            for number in range(10):
                session.prompt(f"say {number}").result(timeout_s=WAIT_S)
            session.wait_idle(timeout_s=WAIT_S)
            cursor = runtime.cursor
            failing.append(sqlite3.OperationalError("database or disk is full"))
            with pytest.raises(StoreError):
                session.prompt("say never")
            assert runtime.cursor == cursor
    finally:
        signals.message_updated.disconnect(receiver)
    assert not missing


def test_f125_an_abort_at_the_very_end_leaves_one_outcome(path):
    with Runtime(path, model=obedient(), durability="normal") as runtime:
        session = runtime.create_session()
        for _ in range(200):
            turn = session.prompt("say a")
            together(1, lambda _, turn=turn: turn.abort())
        session.wait_idle(timeout_s=WAIT_S)
        settled = [
            event.data.info.message_id
            for event in history_of(runtime, session)
            if event.type == "prompt.settled"
        ]
        assert len(settled) == len(set(settled)) == 200
        outcomes = {prompt.message_id: prompt.outcome for prompt in session.prompts()}
        assert set(outcomes.values()) <= {"answered", "interrupted"}


def test_f125_an_aborted_prompt_that_waited_has_its_outcome_too(path):
    gate = Gate()
    model = ScriptedModel(lambda request: [Wait(gate), Say("a")])
    with Runtime(path, model=model) as runtime:
        session = runtime.create_session()
        first, second = session.prompt("one"), session.prompt("two")
        gate.wait_reached()
        second.abort()
        with pytest.raises(TurnAborted):
            second.result(timeout_s=WAIT_S)
        gate.open()
        assert first.result(timeout_s=WAIT_S).text == "a"
        settled = [e for e in history_of(runtime, session) if e.type == "prompt.settled"]
        assert len(settled) == 2


def test_f127_subscriptions_that_end_leave_nothing_behind(path):
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        base = runtime.engine.publisher.subscriptions()
        threads = threading.active_count()
        for number in range(2_000):
            with runtime.events(session_id=session.id if number % 2 else None):
                pass
        for _ in range(50):
            for _event in session.prompt("say a"):
                pass
        assert runtime.engine.publisher.subscriptions() == base
        assert threading.active_count() <= threads + 3
        with closing(runtime.events()) as events:
            runtime.create_session()
            assert next(iter(events)).type == "session.created"


def test_f127_receivers_come_and_go(path):
    def count():
        return len(signals.session_created.receivers)

    base = count()
    with Runtime(path) as runtime:
        for _ in range(1_000):

            def receiver(runtime, *, event):
                raise AssertionError("disconnected")

            signals.session_created.connect(receiver)
            signals.session_created.disconnect(receiver)
        runtime.create_session()
        with pytest.raises(UnderstudyError):
            runtime.session("ses_nowhere")
    assert count() == base
