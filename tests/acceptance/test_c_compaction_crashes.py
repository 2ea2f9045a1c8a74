"""Compaction, the crashes: every point at which a process can die, enumerated (C32).

A run is photographed at each crash point: before each commit, and after it before anybody is told.
A photograph is the database as a kill at that moment leaves it. A runtime opened on each of them
must arrive where the run without a crash arrived. A kill inside the user's own step, which is not
the compaction's, ends that turn, explicitly, by the default policy; with ``on_restart="resume"``
it arrives too.
"""

import signal

import plant
import pytest
from compacting import (
    SUMMARY,
    WAIT_S,
    Photographer,
    actors,
    answer,
    folded,
    history_of,
    markers,
    opened,
    paired,
    summaries,
    talked,
    transcript,
)
from processes import Child

from understudy.actors.core.compaction import FOLLOW_UP
from understudy.actors.models.scripted import Say, Wait
from understudy.store.records import AssistantMessage


def slowly(request):
    """``answer``, with a summary that takes long enough for half of it to be flushed."""
    if request.purpose == "summary":
        return [Say(SUMMARY[:9]), Wait(0.3), Say(SUMMARY[9:])]
    return answer(request)


def manual(session):
    session.compact().result(timeout_s=WAIT_S)


def automatic(session):
    session.prompt("work").result(timeout_s=WAIT_S)


def after_the_turn(session):
    session.prompt("full of it").result(timeout_s=WAIT_S)


def with_prompts_waiting(session):
    turn = session.prompt("work")
    session.prompt("the next")
    session.prompt("the last").result(timeout_s=WAIT_S)
    turn.result(timeout_s=WAIT_S)


SCENARIOS = [manual, automatic, after_the_turn, with_prompts_waiting]


def photographed(tmp_path, scenario, script):
    """The run without a crash: its transcript, and the database at every crash point of it."""
    path = tmp_path / "run" / "a.db"
    path.parent.mkdir()
    photographer = Photographer(path, tmp_path / "photos")
    with opened(path, actors(script), fault=photographer) as runtime:
        session = talked(runtime, 4)
        session.wait_idle(timeout_s=WAIT_S)
        photographer.active = True
        scenario(session)
        session.wait_idle(timeout_s=WAIT_S)
        photographer.active = False
        return session.id, transcript(session), photographer.photos


def arrived(runtime, session):
    session.wait_idle(timeout_s=WAIT_S)
    folded(history_of(runtime, session)).settled()
    for prompt in session.prompts():
        assert prompt.outcome is not None
    return transcript(session)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.__name__)
def test_c32_a_kill_at_any_point_of_a_compaction_changes_nothing(tmp_path, scenario):
    session_id, whole, photos = photographed(tmp_path, scenario, slowly)
    assert len(photos) >= 3
    same = mended = interrupted = 0
    for photo in photos:
        model = actors()
        with opened(photo, model) as runtime:
            session = runtime.session(session_id)
            was_compacting = unfinished_compaction(photo)
            lines = arrived(runtime, session)
            cut = [p for p in session.prompts() if p.outcome == "interrupted"]
            if not cut:
                expected = expected_of(session, whole)
                assert lines == expected, photo
                same += 1
                mended += bool(was_compacting)
            else:
                assert not was_compacting, f"{photo}: the kill hit the compaction"
                assert len(cut) == 1 and cut[0].reason == "restart"
                interrupted += 1
            finished = [
                m.info.parent_id
                for m in session.messages()
                if isinstance(m.info, AssistantMessage) and m.info.summary and not m.info.error
            ]
            assert len(finished) == len(set(finished))
            assert sum(m.text == FOLLOW_UP for m in session.messages()) <= 1
            assert session.prompt("and now").result(timeout_s=WAIT_S).text == "answer to and now"
            assert all(paired(request) for request in model.requests)
    assert same >= 2 and mended >= 1
    assert interrupted or scenario is manual


def unfinished_compaction(photo):
    """Whether the kill left an active marker."""
    sql = "SELECT count(*) FROM part WHERE kind = 'compaction' AND open = 1"
    return plant.query(photo, sql)[0][0]


def expected_of(session, whole):
    """The run without a crash, up to the last prompt that was accepted before the kill."""
    accepted = sum(not prompt_is_own(session, prompt) for prompt in session.prompts())
    places = [n for n, line in enumerate(whole) if line[0] == "user" and line[1] is False]
    if accepted < len(places):
        return whole[: places[accepted]]
    if not markers(session):
        return [line for line in whole if not is_compaction(line)]
    return whole


def prompt_is_own(session, prompt):
    return any(m.id == prompt.message_id and m.info.synthetic for m in session.messages())


def is_compaction(line):
    return (line[0] == "user" and line[1] is True) or (line[0] == "assistant" and line[1] is True)


@pytest.mark.parametrize("scenario", [automatic, with_prompts_waiting], ids=lambda f: f.__name__)
def test_c32_with_resume_every_point_arrives_at_every_answer(tmp_path, scenario):
    session_id, whole, photos = photographed(tmp_path, scenario, answer)
    answers = [line[-1][1] for line in whole if line[0] == "assistant" and line[3] == "stop"]
    for photo in photos:
        with opened(photo, actors(), on_restart="resume") as runtime:
            session = runtime.session(session_id)
            lines = arrived(runtime, session)
            assert {p.outcome for p in session.prompts()} == {"answered"}
            said = [line[-1][1] for line in lines if line[0] == "assistant" and line[3] == "stop"]
            assert said == answers[: len(said)]
            assert [part.state for part in markers(session)] in ([], ["committed"])


@pytest.mark.parametrize("crashes", [2, 3])
def test_c32_crashes_in_a_row_arrive_too(tmp_path, crashes):
    """Photographs of the recovery from photographs: a kill during recovery, and during that."""
    session_id, whole, photos = photographed(tmp_path, manual, answer)
    for generation in range(1, crashes):
        nested = []
        for number, photo in enumerate(photos):
            again = Photographer(photo, tmp_path / f"again-{generation}-{number}")
            again.active = True
            with opened(photo, actors(), fault=again) as runtime:
                arrived(runtime, runtime.session(session_id))
                again.active = False
            nested += again.photos
        photos = nested[:: max(1, len(nested) // 24)]
    for photo in photos:
        model = actors()
        with opened(photo, model) as runtime:
            session = runtime.session(session_id)
            lines = arrived(runtime, session)
            assert lines == expected_of(session, whole)
            assert len(summaries(model)) <= 1


@pytest.mark.parametrize("nth", range(1, 7))
def test_c32_a_real_kill_before_or_after_a_commit_arrives_too(tmp_path, nth):
    """The process kills itself in its writer's thread: nothing is flushed, closed or said."""
    path = tmp_path / "a.db"
    with Child() as child:
        child.do(
            f"count = [0]\n"
            f"def fault(point):\n"
            f"    if count[0] and point in ('commit', 'committed'):\n"
            f"        count[0] += 1\n"
            f"        if count[0] == {nth} + 1: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"model = ScriptedModel(obey, summary='SUMMARY: it was about words')\n"
            f"runtime = Runtime({str(path)!r}, model=model, fault=fault).start()\n"
            f"session = runtime.create_session(session_id='ses_kept')\n"
            f"for n in range(4): session.prompt(f'say {{n}} ' + 'blah ' * 60).result()\n"
            f"session.wait_idle()\n"
        )
        child.send("count[0] = 1; session.compact().result(); session.prompt('say end').result()")
        assert child.wait_dead() == -signal.SIGKILL
    model = actors()
    with opened(path, model) as runtime:
        session = runtime.session("ses_kept")
        arrived(runtime, session)
        marker = markers(session)
        assert [part.state for part in marker] == ["committed"] * len(marker)
        assert len(summaries(model)) <= 1
        assert bool(marker) == (nth > 1)
        assert session.prompt("and now").result(timeout_s=WAIT_S).text == "answer to and now"


def test_c32_the_points_named_by_the_report_are_among_those_photographed(tmp_path):
    """(a) after the marker … (f) after the follow-up; (d) and (e) are one change with (f)."""
    _, _, photos = photographed(tmp_path, automatic, slowly)
    named = {"summarising, no text", "summarising, half", "committed, followed up"}
    assert named <= {state_of(photo) for photo in photos}


def state_of(photo):
    parts = plant.records(photo, "part").values()
    marker = next((p for p in parts if p["type"] == "compaction"), None)
    if marker is None:
        return "before"
    if marker["state"] == "committed":
        text = [p.get("text") for p in parts]
        return "committed, followed up" if FOLLOW_UP in text else "committed, alone"
    half = any(p.get("text") == SUMMARY[:9] for p in parts)
    return f"{marker['state']}, {'half' if half else 'no text'}"
