"""What handles give of an answer: its text as it comes, a transcript with its cursor."""

import asyncio
import sqlite3
import threading

import pytest

from understudy import ScriptedModel, errors
from understudy.errors import ActorCrashed, ResultNotReady
from understudy.testing import Call, Fail, Gate, Say, Wait, crash

WORDS = "All the world's a stage, and all the men and women merely players."


def test_the_text_of_a_turn_comes_in_pieces_and_whole(opened):
    gate = Gate()
    runtime = opened(ScriptedModel([[Say("All the world's "), Wait(gate), Say(WORDS[16:], 9)]]))
    pieces = []
    for piece in runtime.create_session().prompt("go").text():
        pieces.append(piece)
        gate.open()
    assert "".join(pieces) == WORDS
    assert len(pieces) > 1


def test_the_text_of_a_turn_spans_its_steps_and_leaves_the_prompt_out(opened):
    def add(a: int, b: int) -> int:
        return a + b

    script = [[Say("Let me see. "), Call("add", {"a": 1, "b": 2})], "Three."]
    runtime = opened(ScriptedModel(script), tools=[add])
    turn = runtime.create_session().prompt("What is one and two?")
    assert "".join(turn.text()) == "Let me see. Three."


def test_the_text_of_a_turn_that_is_over_is_there_at_once(opened):
    runtime = opened(ScriptedModel([WORDS]))
    turn = runtime.create_session().prompt("go")
    turn.result(timeout_s=10)
    assert "".join(turn.text()) == WORDS


def test_the_text_of_a_turn_can_be_awaited(opened):
    runtime = opened(ScriptedModel([WORDS]))

    async def read():
        session = await runtime.create_session()
        turn = await session.prompt("go")
        return "".join([piece async for piece in turn.text()])

    assert asyncio.run(read()) == WORDS


def test_nobody_is_told_of_rest_before_its_news(opened, monkeypatch):
    committed, go_on, looked = threading.Event(), threading.Event(), threading.Event()
    prompted = threading.Event()

    def fault(point):
        if point != "committed" or not prompted.is_set() or committed.is_set():
            return
        if not runtime.engine.store.read.is_unfinished(session.id):
            committed.set()
            go_on.wait(15)

    gate = Gate()
    runtime = opened(ScriptedModel([[Wait(gate), Say("done")]]), fault=fault)
    session = runtime.create_session()
    turn = session.prompt("go")
    prompted.set()
    gate.open()
    assert committed.wait(15)
    outcomes = runtime.engine.outcomes
    look = outcomes._look_idle
    monkeypatch.setattr(outcomes, "_look_idle", lambda *each: (look(*each), looked.set()))
    pending = outcomes.idle_of(session.id)
    assert looked.wait(15)
    assert not pending.done
    go_on.set()
    pending.get(timeout=15)
    assert session.status().type == "idle"
    assert turn.result(timeout_s=15).text == "done"


def test_a_look_that_is_told_late_tells_nobody_who_came_after_it(opened, monkeypatch):
    gate, looked, late = Gate(), threading.Semaphore(0), []
    runtime = opened(ScriptedModel([[Wait(gate), Say("done")]]))
    session, outcomes = runtime.create_session(), runtime.engine.outcomes
    look = outcomes._look_idle
    monkeypatch.setattr(outcomes, "_look_idle", lambda *each: (look(*each), looked.release()))
    with monkeypatch.context() as held:
        held.setattr(runtime.engine.store, "between_commits", late.append)
        before = outcomes.idle_of(session.id)
        assert looked.acquire(timeout=15)
    turn = session.prompt("go")
    gate.wait_reached()
    after = outcomes.idle_of(session.id)
    assert looked.acquire(timeout=15)
    [told] = late
    told()
    assert (before.done, after.done) == (True, False)
    gate.open()
    after.get(timeout=15)
    assert session.status().type == "idle"
    assert turn.result(timeout_s=15).text == "done"


def test_the_text_of_a_turn_that_fails_ends(opened):
    runtime = opened(ScriptedModel([[Say("Well, "), Fail(ValueError("no"))]]))
    turn = runtime.create_session().prompt("go")
    assert "".join(turn.text()) in ("", "Well, ")


def test_a_snapshot_goes_on_where_it_ends(opened):
    runtime = opened(ScriptedModel(["one", "two"]))
    session = runtime.create_session()
    session.prompt("first").result(timeout_s=10)
    session.wait_idle(timeout_s=10)
    snapshot = session.snapshot()
    assert [message.text for message in snapshot.messages] == ["first", "one"]
    with session.events(after=snapshot.cursor) as events:
        assert events.poll() is None
        turn = session.prompt("second")
        event = events.next(timeout_s=10)
        assert event is not None and event.cursor == snapshot.cursor + 1
        turn.result(timeout_s=10)


def test_a_result_used_before_it_was_awaited_says_so(opened):
    runtime = opened()

    async def forget():
        session = runtime.create_session()
        with pytest.raises(ResultNotReady, match="await"):
            _ = session.title
        await session

    asyncio.run(forget())


def test_a_plain_loop_over_events_in_an_event_loop_is_refused_and_blocks_nothing(opened):
    gate = Gate()
    runtime = opened(ScriptedModel([[Say("One moment "), Wait(gate), Say("please.")]]))

    async def use():
        session = await runtime.create_session()
        turn = await session.prompt("go")
        async with runtime.events() as events:
            for waits in (
                lambda: next(iter(turn)),
                lambda: next(iter(turn.text())),
                lambda: next(iter(events)),
                lambda: events.next(timeout_s=60),
            ):
                with pytest.raises(ResultNotReady, match="async for"):
                    waits()
        gate.open()
        return "".join([piece async for piece in turn.text()])

    assert asyncio.run(use()) == "One moment please."


def test_a_crash_on_request_is_told_to_who_asked_and_survived(opened):
    runtime = opened(ScriptedModel(["still here"]))
    session = runtime.create_session()
    with pytest.raises(ActorCrashed):
        crash(session)
    assert session.prompt("go").result(timeout_s=10).text == "still here"


@pytest.mark.parametrize(
    "damage",
    [
        "data = CAST(replace(data, 'answer', x'ff') AS BLOB)",
        "type = CAST(type || x'ff' AS TEXT)",
        "size = size + 1",
        "size = 1",
    ],
)
def test_what_another_process_wrote_and_is_damaged_stops_nobody(opened, path, damage):
    one, other = opened(ScriptedModel("The answer.", repeat=True)), opened()
    mine, theirs = one.create_session(), other.create_session()
    with other.events(after=other.cursor, deltas=False) as events:
        with other.engine.publisher._lock:  # it has not looked yet
            mine.prompt("x").result(timeout_s=10)
            with sqlite3.connect(path, timeout=10) as connection:
                connection.execute(
                    f"UPDATE journal SET {damage} WHERE session_id = ? AND size > 1", (mine.id,)
                )
            connection.close()
        assert theirs.prompt("y").result(timeout_s=10).text
        told = [events.next(timeout_s=10)]
        while told[-1].session_id != theirs.id or told[-1].type != "session.idle":
            told.append(events.next(timeout_s=10))
    assert "events.damaged" in {event.type for event in told}
    assert "session.status" in {event.type for event in told if event.session_id == theirs.id}


def test_a_damaged_event_is_told_and_hides_nothing_behind_it(opened, path):
    runtime = opened()
    runtime.create_session()
    runtime.create_session()
    last = runtime.cursor
    runtime.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE journal SET data = x'00' WHERE cursor = 1")
    connection.close()
    with opened().events(after=0) as events:
        found = [events.next(timeout_s=10) for _ in range(last)]
    assert [event.type for event in found] == ["events.damaged", "session.created"]
    assert found[0].data.was == "session.created"


def test_the_events_of_one_session_end_with_it(opened):
    runtime = opened()
    session = runtime.create_session()
    events = session.events(after=0)
    session.delete()
    assert [event.type for event in events] == ["session.created", "session.deleted"]

    async def follow():
        return [event.type async for event in session.events(after=0)]

    assert asyncio.run(follow()) == ["session.created", "session.deleted"]


def test_the_events_of_no_session_are_refused_in_a_loop_too(opened):
    runtime = opened()
    session = runtime.create_session()
    session.delete()

    async def first_of(session_id):
        async with runtime.events(session_id=session_id) as events:
            return await events.next_async()

    for session_id in (session.id, "ses_none"):
        with pytest.raises(errors.SessionNotFound, match=session_id):
            asyncio.run(asyncio.wait_for(first_of(session_id), 15))


def test_the_events_of_a_session_made_again_go_on(opened):
    runtime = opened()
    runtime.create_session(session_id="ses_again").delete()
    again = runtime.create_session(session_id="ses_again")
    events = again.events(after=0)
    found = [events.next(timeout_s=10).type for _ in range(3)]
    assert found == ["session.created", "session.deleted", "session.created"]
    assert events.next(timeout_s=0.01) is None
    again.update(title="still here")
    assert events.next(timeout_s=10).type == "session.updated"
