"""Compaction, the requests: one active marker, merged, published, durable (C1 to C11)."""

import itertools
import threading

import plant
import pytest
from compacting import (
    FULL,
    WAIT_S,
    Failing,
    Fold,
    actors,
    answer,
    folded,
    history_of,
    markers,
    opened,
    shown,
    summaries,
    talked,
    together,
    transcript,
    until,
)
from processes import Child, ChildError

from understudy import CompactionRules
from understudy.actors.models.scripted import Call, Fail, Gate, Say, Wait
from understudy.errors import ModelError, ModelOverflow, SessionNotFound, StoreError, StoreFull
from understudy.store.records import CompactionPart, UserMessage


def gated(gate, then="SUMMARY"):
    """A summary that waits at a gate."""
    return lambda request: [Wait(gate), Say(then)]


def of_markers(events):
    """Events that tell of markers: their messages and their parts."""
    found = []
    for event in events:
        info, part = getattr(event.data, "info", None), getattr(event.data, "part", None)
        if isinstance(part, CompactionPart) or (
            isinstance(info, UserMessage) and info.agent == "compaction"
        ):
            found.append(event)
    return found


def test_c01_a_storm_of_requests_never_makes_two_markers_active(tmp_path):
    model = actors()
    with opened(tmp_path / "a.db", model) as runtime:
        session = talked(runtime)
        outcomes = together(
            16,
            lambda n: session.compact().marker_id if n % 2 else session.prompt(f"full {n}"),
        )
        assert not [each for each in outcomes if isinstance(each, Exception)]
        session.wait_idle(timeout_s=WAIT_S)
        folded(history_of(runtime, session)).settled()
        assert all(prompt.outcome == "answered" for prompt in session.prompts())


def test_c02_manual_and_automatic_requests_merge_into_the_pending_marker(tmp_path):
    gate = Gate()

    def script(request):
        if request.purpose == "summary" or "work" not in shown(request).splitlines()[-1:]:
            return answer(request)
        return [Wait(gate), Call("probe"), FULL]

    model = actors(script)
    with opened(tmp_path / "a.db", model) as runtime:
        session = talked(runtime)
        turn = session.prompt("work")
        gate.wait_reached()
        first, second = session.compact(), session.compact()
        [pending] = markers(session)
        assert first.marker_id == second.marker_id == pending.message_id
        assert not pending.auto
        gate.open()
        assert turn.result(timeout_s=WAIT_S).text == "went on"
        assert first.result().value == second.result().value
        [done] = markers(session)
        assert done.message_id == pending.message_id
        assert done.auto and done.resume and done.state == "committed"
        assert len(summaries(model)) == 1


def test_c02_an_overflow_merges_into_the_pending_marker_too(tmp_path):
    gate, late = Gate(), iter([True])

    def script(request):
        if request.purpose == "summary" or "again" not in shown(request):
            return answer(request)
        if next(late, False):
            return [Wait(gate), Fail(ModelOverflow("too long"))]
        return Say("fits")

    model = actors(script)
    with opened(tmp_path / "a.db", model) as runtime:
        session = talked(runtime)
        turn = session.prompt("again")
        gate.wait_reached()
        asked = session.compact()
        gate.open()
        assert turn.result(timeout_s=WAIT_S).text == "fits"
        [marker] = markers(session)
        assert marker.message_id == asked.marker_id
        assert marker.overflow and marker.resume
        assert len(summaries(model)) == 1


def test_c03_creators_in_many_threads_get_one_marker(tmp_path):
    gate = Gate()
    model = actors(summary=gated(gate))
    with opened(tmp_path / "a.db", model) as runtime:
        session = talked(runtime)
        ids = together(24, lambda _: session.compact().marker_id)
        assert len(set(ids)) == 1
        assert len(markers(session)) == 1
        gate.open()
        session.wait_idle(timeout_s=WAIT_S)
        assert len(summaries(model)) == 1


def test_c03_creators_in_many_processes_get_one_marker_or_are_told_who_owns_it(tmp_path):
    path = tmp_path / "a.db"
    with opened(path) as runtime:
        session_id = talked(runtime).id
    children = [Child() for _ in range(3)]
    try:
        for child in children:
            child.do(
                "model = ScriptedModel(obey, summary=lambda r: Stall())\n"
                f"runtime = Runtime({str(path)!r}, model=model).start()"
            )
        for child in children:
            child.send(f"Session(runtime, {session_id!r}).compact().marker_id")
        ids, refusals = [], []
        for child in children:
            try:
                ids.append(child.answer())
            except ChildError as error:
                refusals.append(error.name)
        assert len(ids) == 1, (ids, refusals)
        assert refusals == ["SessionClaimed"] * 2
    finally:
        for child in children:
            child.kill()
    model = actors()
    with opened(path, model) as runtime:
        session = runtime.session(session_id)
        session.wait_idle(timeout_s=WAIT_S)
        [marker] = markers(session)
        assert (marker.message_id, marker.state) == (ids[0], "committed")
        assert len(summaries(model)) == 1


def test_c04_a_burst_of_requests_costs_one_summary(tmp_path):
    gate = Gate()
    model = actors(summary=gated(gate))
    with opened(tmp_path / "a.db", model) as runtime:
        session = talked(runtime)
        handles = [session.compact() for _ in range(10)]
        gate.open()
        ids = {handle.result(timeout_s=WAIT_S).value for handle in handles}
        session.wait_idle(timeout_s=WAIT_S)
        assert len(ids) == 1
        assert len(summaries(model)) == 1


def test_c05_live_and_remote_subscribers_see_a_marker_without_reading_the_store(tmp_path):
    path = tmp_path / "a.db"
    with opened(path) as runtime, opened(path) as remote:
        session = talked(runtime)
        subscriptions = [each.events(session_id=session.id) for each in (runtime, remote)]
        marker_id = session.compact().marker_id
        for events in subscriptions:
            with events:
                seen = until(events, lambda event: event.type == "session.compacted")
            created, told = of_markers(seen)[:2]
            assert (created.type, told.type) == ("message.updated", "message.part.updated")
            assert created.data.info.id == told.data.part.message_id == marker_id
            assert told.data.part.state == "requested"


def test_c06_a_later_subscriber_with_an_old_cursor_gets_the_marker(tmp_path):
    path = tmp_path / "a.db"
    with opened(path) as runtime:
        session = talked(runtime)
        cursor = runtime.cursor
        marker_id = session.compact().marker_id
        session.wait_idle(timeout_s=WAIT_S)
    with opened(path) as runtime, runtime.events(after=cursor) as events:
        seen = of_markers(until(events, lambda event: event.type == "session.compacted"))
        assert seen[0].data.info.id == marker_id
        assert {event.data.part.message_id for event in seen if event.type.endswith("part.updated")}
        # Its last state is the one the store has.
        assert seen[-1].data.part == markers(runtime.session(session.id))[-1]


def test_c07_a_merged_request_publishes_no_second_marker(tmp_path):
    gate = Gate()
    with opened(tmp_path / "a.db", actors(summary=gated(gate))) as runtime:
        session = talked(runtime)
        session.compact()
        gate.wait_reached()
        cursor = runtime.cursor
        session.compact()
        session.compact()
        assert runtime.cursor == cursor
        gate.open()
        session.wait_idle(timeout_s=WAIT_S)
        created = {
            event.data.info.id
            for event in of_markers(history_of(runtime, session))
            if event.type == "message.updated"
        }
        assert len(created) == 1


def test_c08_no_event_of_a_marker_whose_transaction_rolled_back(tmp_path):
    failing = Failing()
    with opened(tmp_path / "a.db", fault=failing) as runtime:
        session = talked(runtime)
        with runtime.events(session_id=session.id) as events:
            before = transcript(session)
            failing.error = StoreFull("no space left")
            with pytest.raises(StoreError):
                session.compact()
            session.wait_idle(timeout_s=WAIT_S)
            assert transcript(session) == before
            assert not of_markers(history_of(runtime, session))
            session.compact()  # the session is not the worse for it
            seen = of_markers(until(events, lambda event: event.type == "session.compacted"))
        assert [event.type for event in seen[:2]] == ["message.updated", "message.part.updated"]
        assert len({e.data.info.id for e in seen if e.type == "message.updated"}) == 1


def test_c09_every_row_a_compaction_writes_is_told_by_an_event(tmp_path):
    with opened(tmp_path / "a.db") as runtime:
        session = talked(runtime)
        session.compact()
        session.prompt("work").result(timeout_s=WAIT_S)
        session.wait_idle(timeout_s=WAIT_S)
        fold = folded(history_of(runtime, session))
        stored = list(session.messages())
        assert {message.id: message.info for message in stored} == fold.messages
        for message in stored:
            assert list(message.parts) == list(fold.parts.get(message.id, {}).values())
        assert [part.state for part in markers(session)] == ["committed", "committed"]


def test_c10_sessions_compact_in_parallel(tmp_path):
    gates = [Gate(), Gate()]
    waiting = iter(gates)
    model = actors(summary=lambda request: [Wait(next(waiting)), Say("SUMMARY")])
    with opened(tmp_path / "a.db", model) as runtime:
        sessions = [talked(runtime), talked(runtime)]
        handles = [session.compact() for session in sessions]
        for gate in gates:
            gate.wait_reached()  # both at once
        for gate in gates:
            gate.open()
        for session, handle in zip(sessions, handles, strict=True):
            handle.result(timeout_s=WAIT_S)
            assert [part.state for part in markers(session)] == ["committed"]
        assert handles[0].marker_id != handles[1].marker_id


def test_c11_a_marker_outlives_its_process_and_is_picked_up_by_the_next(tmp_path):
    path = tmp_path / "a.db"
    with Child() as child:
        marker_id = child.do(
            "model = ScriptedModel(obey, summary=lambda r: [Say('half a sum'), Stall()])\n"
            f"runtime = Runtime({str(path)!r}, model=model).start()\n"
            "session = runtime.create_session(session_id='ses_kept')\n"
            "for n in range(3): session.prompt(f'say {n} ' + 'blah ' * 60).result()\n"
            "session.compact().marker_id"
        )
        child.kill()
    model = actors()
    with opened(path, model) as runtime:
        session = runtime.session("ses_kept")
        session.wait_idle(timeout_s=WAIT_S)
        [marker] = markers(session)
        assert (marker.message_id, marker.state) == (marker_id, "committed")
        assert len(summaries(model)) == 1
        folded(history_of(runtime, session)).settled()


def test_c28_a_request_after_a_finished_compaction_makes_a_new_marker(tmp_path):
    with opened(tmp_path / "a.db") as runtime:
        session = talked(runtime)
        first = session.compact()
        first.result(timeout_s=WAIT_S)
        session.prompt("more " * 90).result(timeout_s=WAIT_S)
        second = session.compact()
        second.result(timeout_s=WAIT_S)
        assert first.marker_id != second.marker_id
        assert [part.state for part in markers(session)] == ["committed", "committed"]


def every_third_fails():
    calls = itertools.count()
    return lambda _: Fail(ModelError("not today")) if next(calls) % 3 == 1 else Say("SUMMARY")


def test_c31_observers_never_see_two_compactions_or_a_wrong_parent(tmp_path):
    fold, stop = Fold(), threading.Event()
    failures = []
    rules = CompactionRules(tail=120, failures=1_000)
    model = actors(summary=every_third_fails())
    with opened(tmp_path / "a.db", model, compaction=rules) as runtime:
        session = runtime.create_session()
        events = runtime.events(session_id=session.id)

        def watch():
            try:
                for event in events:
                    fold.add(event)
            except AssertionError as error:
                failures.append(error)
            stop.set()

        watcher = threading.Thread(target=watch)
        watcher.start()

        def compact(count):
            session.compact()

        def fill(count):
            session.prompt(f"full {count} " + "blah " * 40)

        def work(count):
            session.abort() if count == 3 else session.prompt("work")

        def act(number):
            for count in range(6):
                (compact, fill, work)[number % 3](count)

        outcomes = together(6, act)
        assert outcomes == [None] * 6
        session.wait_idle(timeout_s=WAIT_S)
        cursor = runtime.cursor
        while (events.cursor or 0) < cursor and not stop.wait(0.01):
            pass
        events.close()
        watcher.join(WAIT_S)
        assert not failures, failures
        fold.settled()
        assert fold.messages == {m.id: m.info for m in session.messages()}


def test_c39_aborting_a_compaction_leaves_a_terminal_marker_and_no_follow_up(tmp_path):
    gate = Gate()
    model = actors(summary=gated(gate))
    with opened(tmp_path / "a.db", model) as runtime:
        session = talked(runtime)
        history = transcript(session)
        session.compact()
        gate.wait_reached()
        assert session.abort().value
        session.wait_idle(timeout_s=WAIT_S)
        gate.open()
        [marker] = markers(session)
        assert (marker.state, marker.auto) == ("failed", False)
        folded(history_of(runtime, session)).settled()
        now = transcript(session)
        assert now[: len(history)] == history
        assert [line[0] for line in now[len(history) :]] == ["user", "assistant"]
        assert now[-1][3:5] == ("error", "MessageAbortedError")
        session.prompt("and now").result(timeout_s=WAIT_S)
        assert "word 0" in shown(model.requests[-1])  # history is as it was


def test_c39_aborting_an_automatic_compaction_ends_its_turn_without_a_follow_up(tmp_path):
    gate = Gate()
    with opened(tmp_path / "a.db", actors(summary=gated(gate))) as runtime:
        session = talked(runtime)
        turn = session.prompt("work")
        gate.wait_reached()
        session.abort()
        session.wait_idle(timeout_s=WAIT_S)
        gate.open()
        [prompt] = [p for p in session.prompts() if p.message_id == turn.message_id]
        assert prompt.outcome == "interrupted"
        assert [part.state for part in markers(session)] == ["failed"]
        assert not [
            m for m in session.messages() if m.role == "user" and m.text.startswith("The c")
        ]


def test_c39_deleting_during_a_compaction_leaves_no_row(tmp_path):
    gate = Gate()
    with opened(tmp_path / "a.db", actors(summary=gated(gate))) as runtime:
        session = talked(runtime)
        session.compact()
        gate.wait_reached()
        session.delete()
        gate.open()
        with pytest.raises(SessionNotFound):
            session.messages()
        assert plant.rows_of(tmp_path / "a.db", session.id) == {}
        last = history_of(runtime, session)[-1]
        assert last.type == "session.deleted"
    with opened(tmp_path / "a.db") as runtime:
        assert list(runtime.sessions()) == []
        assert not runtime.recovered
