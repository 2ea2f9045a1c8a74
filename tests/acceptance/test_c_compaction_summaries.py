"""Compaction, the summaries: whose they are, when they count, what they replace (C12 to C41)."""

import random
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import plant
import pytest
from cast import last_text
from compacting import (
    FULL,
    SUMMARY,
    WAIT_S,
    actors,
    answer,
    copied,
    folded,
    history_of,
    markers,
    opened,
    paired,
    shown,
    summaries,
    talked,
    together,
    transcript,
)
from processes import Child

from understudy import CompactionRules
from understudy.actors.core.compaction import FOLLOW_UP
from understudy.actors.models.scripted import Call, Fail, Gate, Say, Wait
from understudy.errors import CompactionFailed, ModelError
from understudy.store.records import (
    AssistantMessage,
    CompactionPart,
    MessageTime,
    TextPart,
    UserMessage,
)

MARKER = "msg_planted_marker"


def summary_messages(session):
    return [
        message
        for message in session.messages()
        if isinstance(message.info, AssistantMessage) and message.info.summary
    ]


def change(path, kind, record):
    """Write a record back, as an older program or a crash would have left it."""
    is_open = isinstance(record, CompactionPart) and record.active
    plant.write(
        path,
        f"UPDATE {kind} SET data = ?, open = ? WHERE session_id = ? AND id = ?",
        msgspec.json.encode(record),
        is_open,
        record.session_id,
        record.id,
    )


def plant_marker(path, session_id, *, name=MARKER, turn, **fields):
    """An active marker, as an old bug or a crash left it."""
    message = UserMessage(
        id=name,
        session_id=session_id,
        time=MessageTime(created=plant.LONG_AGO_MS),
        turn=turn,
        agent="compaction",
        synthetic=True,
    )
    plant.write(
        path,
        "INSERT INTO message (session_id, id, turn, seq, role, open, data) VALUES (?,?,?,?,?,?,?)",
        session_id,
        name,
        turn,
        plant._next_seq(path, session_id),
        "user",
        False,
        msgspec.json.encode(message),
    )
    part = CompactionPart(
        id=name.replace("msg", "prt"), session_id=session_id, message_id=name, **fields
    )
    plant.part(path, part)
    return part


# --- whose summary -----------------------------------------------------------------------------


def test_c12_a_summary_belongs_to_its_marker_whatever_came_after_it(path):
    gate, failing = Gate(), iter([True])

    def summary(request):
        if next(failing, False):
            return [Wait(gate), Fail(ModelError("not now"))]
        return Say(SUMMARY)

    model = actors(summary=summary)
    with opened(path, model) as runtime:
        session = talked(runtime)
        asked = session.compact()
        gate.wait_reached()
        turn = session.prompt("sent after the marker")
        gate.open()
        turn.result(timeout_s=WAIT_S)
        assert len(summaries(model)) == 2
        ever = {
            event.data.info.id: event.data.info.parent_id
            for event in history_of(runtime, session)
            if event.type == "message.updated" and getattr(event.data.info, "summary", False)
        }
        assert list(ever.values()) == [asked.marker_id] * 2
        [finished] = summary_messages(session)
        assert finished.info.error is None


def test_c12_a_summary_inside_a_turn_belongs_to_the_marker_not_to_the_prompt(path):
    with opened(path) as runtime:
        session = talked(runtime)
        session.prompt("work").result(timeout_s=WAIT_S)
        [summary] = summary_messages(session)
        [marker] = markers(session)
        assert summary.info.parent_id == marker.message_id
        assert marker.summary_id == summary.id


def half_summarised(tmp_path):
    """A store whose process was killed in the middle of a summary, half of it flushed."""
    path = tmp_path / "killed" / "a.db"
    path.parent.mkdir()
    with Child() as child:
        child.do(
            "model = ScriptedModel(obey, summary=lambda r: [Say('HALF A SUM'), Stall()])\n"
            f"runtime = Runtime({str(path)!r}, model=model).start()\n"
            "session = runtime.create_session(session_id='ses_kept')\n"
            "for n in range(3): session.prompt(f'say {n} ' + 'blah ' * 60).result()\n"
            "events = session.events()\n"
            "session.compact()\n"
            "for event in events:\n"
            "    if 'HALF A SUM' in str(event.data) and event.type == 'message.part.updated': break"
        )
        child.kill()
    return path


def test_c13_c14_an_unfinished_summary_is_replaced_and_its_text_not_summarised(tmp_path):
    path = half_summarised(tmp_path)
    assert any(b"HALF A SUM" in row[0] for row in plant.query(path, "SELECT data FROM part"))
    model = actors()
    with opened(path, model) as runtime:
        session = runtime.session("ses_kept")
        session.wait_idle(timeout_s=WAIT_S)
        finished = [m for m in summary_messages(session) if m.info.error is None]
        assert [m.text for m in finished] == [SUMMARY]
        assert not [m for m in session.messages() if "HALF A SUM" in m.text]
        assert "HALF A SUM" not in shown(summaries(model)[0])
        assert len(summaries(model)) == 1
        session.prompt("go on").result(timeout_s=WAIT_S)
        folded(history_of(runtime, session)).settled()


def test_c13_restarts_do_not_repeat_a_summary_for_ever(tmp_path):
    path = half_summarised(tmp_path)
    starts = 0
    while plant.open_counts(path)["part"]:
        gate = Gate()
        photo = tmp_path / f"again{starts}" / "a.db"
        with opened(path, actors(summary=lambda r, g=gate: [Wait(g), Say("late")])) as runtime:
            session = runtime.session("ses_kept")
            if session.status().type == "busy":
                gate.wait_reached()
                plant_copy(path, photo)  # as kill -9 would leave it
        path = photo if photo.exists() else path
        starts += 1
        assert starts < 12
    with opened(path) as runtime:
        session = runtime.session("ses_kept")
        assert [part.state for part in markers(session)] == ["failed"]
        assert session.prompt("still there?").result(timeout_s=WAIT_S).text


def plant_copy(path, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    for name in ("a.db", "a.db-wal"):
        target.with_name(name).write_bytes(path.with_name(name).read_bytes())


def test_c15_c16_an_errored_summary_is_terminal_and_does_not_count(path):
    failing = [Fail(ModelError("no"))] * 2
    model = actors(summary=lambda request: failing.pop() if failing else Say(SUMMARY))
    with opened(path, model) as runtime:
        session = talked(runtime)
        asked = session.compact()
        with pytest.raises(CompactionFailed):
            asked.result(timeout_s=WAIT_S)
        assert len(summaries(model)) == 2
        [errored] = summary_messages(session)  # of the last attempt: it replaced the other
        assert errored.info.error is not None
        assert errored.info.finish == "error"
        assert errored.info.time.completed is not None
        again = session.compact()
        assert again.marker_id != asked.marker_id
        assert again.result(timeout_s=WAIT_S).value
        assert [part.state for part in markers(session)] == ["failed", "committed"]


# --- a finished summary without its bookkeeping ------------------------------------------------


def unbooked(tmp_path, *, auto):
    """A store that died between a finished summary and its bookkeeping, as others' code can."""
    path = tmp_path / "unbooked" / "a.db"
    path.parent.mkdir()
    with opened(path) as runtime:
        session = talked(runtime, 5)
        session.compact().result(timeout_s=WAIT_S)
        [marker] = markers(session)
        assert marker.tail_start_id is not None
    before = msgspec.structs.replace(
        marker,
        state="summarising",
        auto=auto,
        resume=auto,
        tail_start_id=None,
        head_end_id=None,
        summary_id=None,
    )
    change(path, "part", before)
    return path, marker


def test_c17_c18_a_finished_summary_is_not_made_again_and_its_tail_is_set(tmp_path):
    path, marker = unbooked(tmp_path, auto=False)
    model = actors()
    with opened(path, model) as runtime:
        session = runtime.session(marker.session_id)
        session.wait_idle(timeout_s=WAIT_S)
        assert summaries(model) == []
        assert markers(session) == [marker]


def test_c19_c22_the_follow_up_of_an_automatic_one_is_made_and_answered(tmp_path):
    path, marker = unbooked(tmp_path, auto=True)
    model = actors()
    with opened(path, model) as runtime:
        session = runtime.session(marker.session_id)
        session.wait_idle(timeout_s=WAIT_S)
        assert len(model.requests) == 1
        follow_up, said = list(session.messages())[-2:]
        assert follow_up.text == FOLLOW_UP and follow_up.info.synthetic
        assert said.text == "went on"
        assert markers(session)[0].tail_start_id == marker.tail_start_id


def test_c20_complete_bookkeeping_is_left_alone(tmp_path):
    path, marker = unbooked(tmp_path, auto=True)
    with opened(path) as runtime:
        runtime.session(marker.session_id).wait_idle(timeout_s=WAIT_S)
    before = plant.snapshot(path)
    model = actors()
    with opened(path, model) as runtime:
        runtime.session(marker.session_id).wait_idle(timeout_s=WAIT_S)
    assert plant.snapshot(path) == before
    assert not model.requests


def test_c21_the_tail_is_in_the_next_context_after_that_recovery(tmp_path):
    path, marker = unbooked(tmp_path, auto=True)
    model = actors()
    with opened(path, model) as runtime:
        session = runtime.session(marker.session_id)
        tail = next(m for m in session.messages() if m.id == marker.tail_start_id)
        session.wait_idle(timeout_s=WAIT_S)
        words = shown(model.requests[0])
        assert tail.text in words
        assert SUMMARY in words
        assert "word 0" not in words


def test_c23_a_manual_compaction_continues_nothing(path):
    model = actors()
    with opened(path, model) as runtime:
        session = talked(runtime)
        session.compact().result(timeout_s=WAIT_S)
        session.wait_idle(timeout_s=WAIT_S)
        assert [m.text for m in session.messages() if m.role == "user"][3:] == [""]
        assert model.requests[-1].purpose == "summary"


# --- stale and duplicate markers ---------------------------------------------------------------


def stale(tmp_path, *, turn_of=0):
    """A store with an unfinished marker before a finished answer."""
    path = tmp_path / "stale" / "a.db"
    path.parent.mkdir()
    with opened(path) as runtime:
        session = talked(runtime)
        turn = list(session.messages())[turn_of].info.turn
    plant_marker(path, session.id, turn=turn)
    return path, session.id


def test_c24_c26_a_stale_marker_blocks_nothing_and_is_closed_not_executed(tmp_path):
    path, session_id = stale(tmp_path)
    model = actors()
    with opened(path, model) as runtime:
        session = runtime.session(session_id)
        session.wait_idle(timeout_s=WAIT_S)
        assert summaries(model) == []
        [old] = markers(session)
        assert (old.message_id, old.state) == (MARKER, "stale")
        asked = session.compact()
        assert asked.marker_id != MARKER
        assert asked.result(timeout_s=WAIT_S).value
        assert len(summaries(model)) == 1


def test_c24_a_stale_marker_does_not_block_an_automatic_compaction(tmp_path):
    path, session_id = stale(tmp_path)
    with opened(path) as runtime:
        session = runtime.session(session_id)
        assert session.prompt("work").result(timeout_s=WAIT_S).text == "went on"
        assert [part.state for part in markers(session)] == ["stale", "committed"]


@pytest.mark.parametrize("turn_of", [0, 2, None])
def test_c25_whatever_marker_is_there_a_request_is_carried_out(tmp_path, turn_of):
    if turn_of is None:  # after every answer: it is the active one
        path = tmp_path / "a.db"
        with opened(path) as runtime:
            session_id = talked(runtime).id
        plant_marker(path, session_id, turn=10_000)
    else:
        path, session_id = stale(tmp_path, turn_of=turn_of)
    gate = Gate()
    model = actors(summary=lambda request: [Wait(gate), Say(SUMMARY)])
    with opened(path, model) as runtime:
        session = runtime.session(session_id)
        asked = session.compact()
        gate.open()
        assert asked.result(timeout_s=WAIT_S).value
        # Refused by nobody: it is the planted one exactly when the loop runs that one.
        assert (asked.marker_id == MARKER) == (turn_of is None)
        assert len(summaries(model)) == 1


@pytest.mark.parametrize("count", [2, 5])
def test_c29_duplicate_markers_of_an_old_bug_converge(path, count):
    with opened(path) as runtime:
        session_id = talked(runtime).id
    for number in range(count):
        plant_marker(path, session_id, name=f"msg_dup_{number}", turn=10_000 + number)
    model = actors()
    with opened(path, model) as runtime:
        session = runtime.session(session_id)
        session.wait_idle(timeout_s=WAIT_S)
        assert len(summaries(model)) == 1
        states = [part.state for part in markers(session)]
        assert states == ["stale"] * (count - 1) + ["committed"]
        session.prompt("more " * 90).result(timeout_s=WAIT_S)
        assert session.compact().result(timeout_s=WAIT_S).value
        assert len(summaries(model)) == 2


def test_c27_every_marker_has_an_end_whatever_became_of_it(tmp_path):
    path, session_id = stale(tmp_path)
    gate = Gate()
    says = [Fail(ModelError("no")), Say(""), Say(SUMMARY), Wait(gate), Say(SUMMARY)]
    summaries_to_say = iter(says)
    model = actors(summary=lambda request: next(summaries_to_say))
    with opened(path, model) as runtime:
        session = runtime.session(session_id)
        with pytest.raises(CompactionFailed):
            session.compact().result(timeout_s=WAIT_S)
        session.compact().result(timeout_s=WAIT_S)
        session.prompt("more " * 90).result(timeout_s=WAIT_S)
        session.compact()
        gate.wait_reached()
        session.abort()
        session.prompt("more " * 90).result(timeout_s=WAIT_S)
        session.compact().result(timeout_s=WAIT_S)
        states = [part.state for part in markers(session)]
        assert states == ["stale", "failed", "committed", "failed", "committed"]
        assert not plant.open_counts(path)["part"]


# --- one at a time -----------------------------------------------------------------------------


def test_c30_a_marker_is_processed_once_also_when_its_actor_crashes(path):
    gate, at_once = Gate(), []

    async def summary(request):
        at_once.append(len(at_once))
        await gate.wait()
        return Say(f"{SUMMARY} {len(at_once)}")

    model = actors(summary=summary)
    with opened(path, model) as runtime:
        session = talked(runtime)
        asked = session.compact()
        gate.wait_reached()
        with closing(session.events()) as events:
            together(3, lambda _: session._crash())
            for event in events:
                if event.type == "actor.restarted":
                    break
        gate.open()
        asked.result(timeout_s=WAIT_S)
        session.wait_idle(timeout_s=WAIT_S)
        assert [part.state for part in markers(session)] == ["committed"]
        done = [m for m in summary_messages(session) if m.info.error is None]
        assert len(done) == 1
        folded(history_of(runtime, session)).settled()


def test_c30_two_processors_on_one_marker_make_one_summary(path):
    gate = Gate()
    model, other = actors(summary=lambda r: [Wait(gate), Say(SUMMARY)]), actors()
    with opened(path, model) as runtime:
        session = talked(runtime)
        asked = session.compact()
        gate.wait_reached()
        with opened(path, other) as second:
            second.engine.orphans.wake()
            gate.open()
            asked.result(timeout_s=WAIT_S)
        assert (len(summaries(model)), len(summaries(other))) == (1, 0)
        assert len(summary_messages(session)) == 1


# --- failures ----------------------------------------------------------------------------------


def test_c33_a_summary_that_fails_every_time_ends_and_leaves_the_session_usable(path):
    model = actors(summary=lambda request: Fail(ModelError("never")))
    with opened(path, model) as runtime:
        session = talked(runtime)
        for _ in range(4):
            with pytest.raises(CompactionFailed, match="never"):
                session.compact().result(timeout_s=WAIT_S)
            assert session.prompt("hello").result(timeout_s=WAIT_S).text == "answer to hello"
        assert len(summaries(model)) == 8
        assert session.status().type == "idle"
        folded(history_of(runtime, session)).settled()


def test_c34_prompts_during_a_compaction_are_answered_once_in_order_after_it(path):
    gate = Gate()
    model = actors(summary=lambda request: [Wait(gate), Say(SUMMARY)])
    with opened(path, model) as runtime:
        session = talked(runtime)
        session.compact()
        gate.wait_reached()
        turns = [session.prompt(f"sent {n}  with  two spaces") for n in range(5)]
        assert session.status().queued == 5
        gate.open()
        said = [turn.result(timeout_s=WAIT_S).text for turn in turns]
        assert said == [f"answer to sent {n}  with  two spaces" for n in range(5)]
        texts = [m.text for m in session.messages()]
        assert [t for t in texts if t.startswith("sent")] == [
            f"sent {n}  with  two spaces" for n in range(5)
        ]
        place = texts.index(SUMMARY)
        assert place < texts.index("sent 0  with  two spaces")
        assert "sent 0" not in shown(summaries(model)[0])
        assert len(model.requests) == 3 + 1 + 5


@pytest.mark.parametrize("seed", range(12))
def test_c35_no_message_falls_between_summary_and_tail_and_no_call_loses_its_result(path, seed):
    chance = random.Random(seed)
    words = iter(f"<{n}>" for n in range(10_000))

    def script(request):
        if request.purpose == "summary":
            return Say(SUMMARY)
        text = last_text(request)
        if text.startswith("calls") and not any(
            hasattr(turn, "calls") and turn.calls for turn in request.turns[-1:]
        ):
            blah = "blah " * chance.randrange(40)
            return [Say(f"{next(words)} {blah}"), *[Call("probe")] * chance.randrange(1, 4)]
        return Say(next(words) + " blah" * chance.randrange(60))

    model = actors(script)
    rules = CompactionRules(tail=chance.choice([0, 30, 120, 400]))
    with opened(path, model, compaction=rules) as runtime:
        session = runtime.create_session()
        for _ in range(6):
            for _ in range(chance.randrange(1, 4)):
                kind = chance.choice(["calls ", "says "])
                text = kind + next(words) + " blah" * chance.randrange(60)
                session.prompt(text).result(timeout_s=WAIT_S)
            visible = shown(model.requests[-1]) + session_text(session)
            known = {word for word in visible.split() if word.startswith("<")}
            try:
                session.compact().result(timeout_s=WAIT_S)
            except CompactionFailed:
                continue
            asked = shown(summaries(model)[-1])
            session.prompt("says check").result(timeout_s=WAIT_S)
            after = shown(model.requests[-1])
            summarised = known & set(split(asked))
            kept = known & set(split(after))
            earlier = {word for word in known if word not in summarised | kept}
            assert not earlier & recent(session), "neither summarised nor kept"
        assert all(paired(request) for request in model.requests)


def split(text):
    return [word.strip() for word in text.split()]


def session_text(session):
    return "\n".join(message.text for message in session.messages())


def recent(session):
    """Words said since the compaction before the last."""
    messages = list(session.messages())
    places = [
        place
        for place, message in enumerate(messages)
        for part in message.parts
        if isinstance(part, CompactionPart) and part.state == "committed"
    ]
    start = places[-2] if len(places) > 1 else 0
    return {
        word
        for message in messages[start:]
        for word in message.text.split()
        if word.startswith("<")
    }


@pytest.mark.parametrize(
    "bad", [Say(""), Say("  \n "), Say("far too long " * 400), Fail(ModelError("x"))]
)
def test_c36_a_bad_summary_never_replaces_history(path, bad):
    model = actors(summary=lambda request: bad)
    with opened(path, model) as runtime:
        session = talked(runtime)
        with pytest.raises(CompactionFailed):
            session.compact().result(timeout_s=WAIT_S)
        assert not [e for e in history_of(runtime, session) if e.type == "session.compacted"]
        session.prompt("what was it about?").result(timeout_s=WAIT_S)
        words = shown(model.requests[-1])
        assert all(f"word {n}" in words for n in range(3))
        assert "far too long" not in words


def test_c37_compaction_that_does_not_help_stops_and_says_so(path):
    model = actors(lambda r: Say(SUMMARY) if r.purpose == "summary" else [Say("blah " * 50), FULL])
    with opened(path, model) as runtime:
        session = runtime.create_session()
        for number in range(12):
            session.prompt(f"full {number} " + "blah " * 50).result(timeout_s=WAIT_S)
        session.wait_idle(timeout_s=WAIT_S)
        assert 1 <= len(summaries(model)) <= 3
        paused = [
            event.data.error.name
            for event in history_of(runtime, session)
            if event.type == "session.error"
        ]
        assert paused == ["CompactionPaused"]
        # A person may still ask for one.
        assert session.compact().result(timeout_s=WAIT_S).value


def test_c37_the_breaker_survives_a_restart(path):
    def model():
        return actors(
            lambda r: Fail(ModelError("x")) if r.purpose == "summary" else [Say("a"), FULL]
        )

    with opened(path, model()) as runtime:
        session = runtime.create_session()
        for number in range(4):
            session.prompt(f"{number} " + "blah " * 50).result(timeout_s=WAIT_S)
    again = model()
    with opened(path, again) as runtime:
        runtime.session(session.id).prompt("full").result(timeout_s=WAIT_S)
        runtime.session(session.id).wait_idle(timeout_s=WAIT_S)
        assert summaries(again) == []


def test_c38_a_manual_request_does_not_take_the_resume_from_an_automatic_one(path):
    gate = Gate()
    model = actors(summary=lambda request: [Wait(gate), Say(SUMMARY)])
    with opened(path, model) as runtime:
        session = talked(runtime)
        turn = session.prompt("work")
        gate.wait_reached()
        asked = session.compact()
        gate.open()
        assert turn.result(timeout_s=WAIT_S).text == "went on"
        [marker] = markers(session)
        assert marker.message_id == asked.marker_id
        assert marker.auto and marker.resume


def test_c38_an_automatic_request_brings_its_resume_into_a_manual_one(path):
    gate = Gate()

    def script(request):
        if (
            request.purpose == "step"
            and last_text(request) == "work"
            and not shown(request).endswith("found")
        ):
            return [Wait(gate), Call("probe"), FULL]
        return answer(request)

    with opened(path, actors(script)) as runtime:
        session = talked(runtime)
        turn = session.prompt("work")
        gate.wait_reached()
        asked = session.compact()
        gate.open()
        assert turn.result(timeout_s=WAIT_S).text == "went on"
        [marker] = markers(session)
        assert marker.message_id == asked.marker_id
        assert marker.auto and marker.resume
        assert sum(m.text == FOLLOW_UP for m in session.messages()) == 1


# --- boundaries, fork, revert ------------------------------------------------------------------


def test_c40_a_tail_that_names_a_missing_message_is_absent_not_everything_dropped(path):
    with opened(path) as runtime:
        session = talked(runtime, 5)
        session.compact().result(timeout_s=WAIT_S)
        [marker] = markers(session)
        tail = next(m.text for m in session.messages() if m.id == marker.tail_start_id)
    change(path, "part", msgspec.structs.replace(marker, tail_start_id="msg_gone"))
    model = actors()
    with opened(path, model) as runtime:
        runtime.session(session.id).prompt("go on").result(timeout_s=WAIT_S)
        words = shown(model.requests[-1])
        assert SUMMARY in words and tail in words and "word 0" not in words


def test_c40_reverting_into_the_tail_keeps_what_is_left_of_it(path):
    model = actors()
    with opened(path, model, compaction=CompactionRules(tail=400)) as runtime:
        session = talked(runtime, 8)
        session.compact().result(timeout_s=WAIT_S)
        session.prompt("one more").result(timeout_s=WAIT_S)
        messages = list(session.messages())
        [marker] = markers(session)
        tail = [m.id for m in messages].index(marker.tail_start_id)
        # Into the tail: the compaction itself comes later, so it is taken back with the rest.
        session.revert(messages[tail + 1].id)
        session.prompt("go on").result(timeout_s=WAIT_S)
        words = shown(model.requests[-1])
        assert "word 0" in words and messages[tail].text in words
        assert messages[tail + 1].text not in words and SUMMARY not in words
        assert markers(session) == []
        folded(history_of(runtime, session)).settled()


def test_c40_reverting_behind_a_compaction_keeps_its_summary(path):
    model = actors()
    with opened(path, model) as runtime:
        session = talked(runtime)
        session.compact().result(timeout_s=WAIT_S)
        turn = session.prompt("a mistake")
        turn.result(timeout_s=WAIT_S)
        session.revert(turn.message_id)
        session.prompt("go on").result(timeout_s=WAIT_S)
        words = shown(model.requests[-1])
        assert SUMMARY in words and "a mistake" not in words and "word 0" not in words


TAKEN_OUT = {
    "its message": lambda session, text: session.edit(text.message_id),
    "its text": lambda session, text: session.edit(text.message_id, part_id=text.id),
    "its words": lambda session, text: session.edit(text.message_id, part_id=text.id, text=" "),
    "what follows its marker": lambda session, text: session.revert(text.message_id),
}


@pytest.mark.parametrize("take_out", TAKEN_OUT.values(), ids=TAKEN_OUT)
def test_a_summary_that_was_taken_out_stands_for_nothing(path, take_out):
    model = actors()
    with opened(path, model) as runtime:
        session = talked(runtime)
        session.compact().result(timeout_s=WAIT_S)
        [summary] = summary_messages(session)
        [text] = [part for part in summary.parts if isinstance(part, TextPart)]
        take_out(session, text)
        session.prompt("go on").result(timeout_s=WAIT_S)
        words = shown(model.requests[-1])
        assert SUMMARY not in words
        assert all(f"word {number}" in words for number in range(3))


def test_c40_compacting_again_clears_a_boundary_that_is_no_longer_valid(path, tmp_path):
    with opened(path) as runtime:
        session = talked(runtime, 5)
        session.compact().result(timeout_s=WAIT_S)
        [first] = markers(session)
        assert first.tail_start_id is not None
    model = actors()
    with opened(copied(path, tmp_path / "b"), model, compaction=CompactionRules(tail=0)) as runtime:
        session = runtime.session(session.id)
        session.prompt("more " * 90).result(timeout_s=WAIT_S)
        session.compact().result(timeout_s=WAIT_S)
        assert markers(session)[-1].tail_start_id is None
        session.prompt("go on").result(timeout_s=WAIT_S)
        words = shown(model.requests[-1])
        assert words.count(SUMMARY) == 1 and "blah" not in words and "more" not in words


def test_c40_a_fork_has_marker_summary_and_tail_of_its_own(path):
    model = actors()
    with opened(path, model) as runtime:
        session = talked(runtime, 5)
        session.compact().result(timeout_s=WAIT_S)
        fork = session.fork()
        assert transcript(fork) == transcript(session)
        ids = {message.id for message in fork.messages()}
        assert not ids & {message.id for message in session.messages()}
        [marker] = markers(fork)
        assert {marker.summary_id, marker.head_end_id, marker.tail_start_id} <= ids
        session.prompt("same").result(timeout_s=WAIT_S)
        source = model.requests[-1]
        session.delete()
        fork.prompt("same").result(timeout_s=WAIT_S)
        assert shown(model.requests[-1]) == shown(source)
        fork.prompt("more " * 90).result(timeout_s=WAIT_S)
        assert fork.compact().result(timeout_s=WAIT_S).value


@pytest.mark.parametrize("place", range(13))
def test_c40_a_fork_before_any_message_has_no_reference_out_of_it(path, place):
    with opened(path) as runtime:
        session = talked(runtime, 5)
        session.compact().result(timeout_s=WAIT_S)
        session.prompt("after").result(timeout_s=WAIT_S)
        fork = session.fork(before=list(session.messages())[place].id)
        messages = list(fork.messages())
        ids = {message.id for message in messages}
        for message in messages:
            if isinstance(message.info, AssistantMessage):
                assert message.info.parent_id in ids
            for part in message.parts:
                if isinstance(part, CompactionPart):
                    named = {part.summary_id, part.head_end_id, part.tail_start_id}
                    assert named - {None} <= ids
        assert fork.prompt("go on").result(timeout_s=WAIT_S).text == "answer to go on"


def test_c41_process_tests_start_their_child_with_the_running_interpreter(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with Child() as child:
        assert child.do("__import__('sys').executable") == sys.executable
    sources = [each for each in Path(__file__).parent.rglob("*.py") if each != Path(__file__)]
    for source in sources:
        text = source.read_text(encoding="utf-8")
        assert '"python' not in text and "'python" not in text, source


def test_a_summary_s_text_is_one_part(path):
    with opened(path, actors(summary=lambda request: [Say("one "), Say("two")])) as runtime:
        session = talked(runtime)
        session.compact().result(timeout_s=WAIT_S)
        [summary] = summary_messages(session)
        assert [part.text for part in summary.parts if isinstance(part, TextPart)] == ["one two"]
