"""Field failures: queued prompts, compaction, fork and revert (numbers 56 to 92)."""

from contextlib import closing

import pytest
from cast import last_text, obedient
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
)
from processes import Child

from understudy import CompactionRules, Limits, Runtime
from understudy.actors.models.scripted import Call, Fail, Gate, Say, ScriptedModel, Stall, Wait
from understudy.errors import CompactionFailed, ModelError, TurnError
from understudy.store.records import AssistantMessage


def outcomes(session):
    return [prompt.outcome for prompt in session.prompts()]


# --- queued prompts ----------------------------------------------------------------------------


def test_f056_a_dead_run_does_not_take_the_queue_along(path, tools):
    with Runtime(path, model=obedient(), tools=tools.all()) as runtime:
        session = runtime.create_session()
        first = session.prompt("call wait")
        assert tools.started.wait(WAIT_S)
        turns = [session.prompt(f"say {n}") for n in range(8)]
        first.abort()
        with pytest.raises(TurnError):
            first.result(timeout_s=WAIT_S)
        assert [turn.result(timeout_s=WAIT_S).text for turn in turns] == [str(n) for n in range(8)]
        assert outcomes(session) == ["interrupted"] + ["answered"] * 8


def test_f056_neither_does_a_killed_process(path):
    with Child() as child:
        child.do(
            "tools = Tools(note)\n"
            f"runtime = Runtime({str(path)!r}, model=obedient(), tools=tools.all()).start()\n"
            "session = runtime.create_session(session_id='ses_busy')\n"
            "session.prompt('call block')\n"
            "for n in range(8): session.prompt(f'say {n}')"
        )
        child.wait_note("block started")
        child.kill()
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.session("ses_busy")
        session.wait_idle(timeout_s=WAIT_S)
        assert outcomes(session) == ["interrupted"] + ["answered"] * 8
        texts = [m.text for m in session.messages() if m.role == "assistant"]
        assert texts[1:] == [str(n) for n in range(8)]


def test_f058_each_of_many_prompts_at_once_gets_a_turn_and_a_reply_of_its_own(path):
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.create_session()
        said = together(10, lambda n: session.prompt(f"say {n}").result(timeout_s=WAIT_S).text)
        assert said == [str(n) for n in range(10)]
        asked = [m.text for m in session.messages() if m.role == "user"]
        answered = [m.text for m in session.messages() if m.role == "assistant"]
        assert [f"say {text}" for text in answered] == asked
        assert [f"say {r}" for r in answered] == [text_of(session, p) for p in session.prompts()]


def text_of(session, prompt):
    return next(m.text for m in session.messages() if m.id == prompt.message_id)


def test_f059_a_prompt_sent_exactly_at_a_turn_s_end_is_neither_lost_nor_overtaken(path):
    with Runtime(path, model=obedient(), durability="normal") as runtime:
        session = runtime.create_session()
        sent = [session.prompt("say 0")]
        with closing(session.events(deltas=False)) as events:
            session.prompt("say first")
            for event in events:
                if event.type == "prompt.settled":
                    sent.append(session.prompt(f"say {len(sent)}"))
                    if len(sent) == 300:
                        break
        session.wait_idle(timeout_s=WAIT_S)
        texts = [m.text for m in session.messages() if m.role == "assistant"]
        texts.remove("first")
        assert texts == [str(n) for n in range(300)]
        assert set(outcomes(session)) == {"answered"}


def test_f061_time_in_the_queue_is_not_time_in_the_turn(path):
    def script(request):
        return [Say("…"), Stall()] if last_text(request) == "hang" else Say("quick")

    limits = Limits(turn_s=0.2)
    with Runtime(path, model=ScriptedModel(script), limits=limits) as runtime:
        session = runtime.create_session()
        hanging = [session.prompt("hang") for _ in range(3)]
        last = session.prompt("say it")  # waits for three times its own limit
        assert last.result(timeout_s=WAIT_S).text == "quick"
        for turn in hanging:
            with pytest.raises(TurnError):
                turn.result(timeout_s=WAIT_S)


def test_f062_an_answer_is_durable_before_anybody_is_told_of_it(path):
    with Child() as child:
        child.do(
            f"runtime = Runtime({str(path)!r}, model=obedient()).start()\n"
            "session = runtime.create_session(session_id='ses_told')\n"
            "events = session.events()"
        )
        child.send(
            "session.prompt('say hello')\n"
            "for event in events:\n"
            "    if event.type == 'prompt.settled': os.kill(os.getpid(), signal.SIGKILL)"
        )
        child.wait_dead()
    with Runtime(path, model=obedient()) as runtime:
        session = runtime.session("ses_told")
        [prompt] = session.prompts()
        assert session.turn(prompt.message_id).result(timeout_s=WAIT_S).text == "hello"
        assert not runtime.recovered


# --- compaction --------------------------------------------------------------------------------


def test_f074_requests_and_prompts_at_once_make_one_marker_and_no_wrong_parent(path):
    gate = Gate()
    model = actors(summary=lambda request: [Wait(gate), Say(SUMMARY)])
    with opened(path, model) as runtime:
        session = talked(runtime)
        made = together(
            32,
            lambda n: session.compact().marker_id if n % 2 else session.prompt(f"say {n}"),
        )
        gate.open()
        session.wait_idle(timeout_s=WAIT_S)
        ids = {each for each in made if isinstance(each, str)}
        assert len(ids) == len(markers(session)) == len(summaries(model)) == 1
        folded(history_of(runtime, session)).settled()
        assert set(outcomes(session)) == {"answered"}


@pytest.mark.parametrize("says", [Say(SUMMARY), Say("long " * 3_000), Say("")])
def test_f076_compaction_without_progress_stops(path, says):
    model = actors(lambda r: says if r.purpose == "summary" else [Say("blah " * 50), FULL])
    with opened(path, model) as runtime:
        session = runtime.create_session()
        for number in range(30):
            session.prompt(f"{number} " + "blah " * 50).result(timeout_s=WAIT_S)
        session.wait_idle(timeout_s=WAIT_S)
        assert len(summaries(model)) <= 6
        assert len(markers(session)) <= 3


def test_f077_failures_of_the_summariser_count_too(path):
    model = actors(
        lambda r: Fail(ModelError("gone")) if r.purpose == "summary" else [Say("a"), FULL]
    )
    with opened(path, model) as runtime:
        session = runtime.create_session()
        for number in range(20):
            session.prompt(f"{number} " + "blah " * 50).result(timeout_s=WAIT_S)
        session.wait_idle(timeout_s=WAIT_S)
        assert len(summaries(model)) == 4  # two markers, two attempts each


def test_f079_a_prompt_from_inside_the_summariser_call_is_kept(path):
    turns = []

    async def summary(request):
        turns.append(await session.prompt("inside"))
        return Say(SUMMARY)

    with opened(path, actors(summary=summary)) as runtime:
        session = talked(runtime)
        session.compact().result(timeout_s=WAIT_S)
        assert turns[0].result(timeout_s=WAIT_S).text == "answer to inside"
        last = list(session.messages())[-2:]
        assert [m.text for m in last] == ["inside", "answer to inside"]
        assert outcomes(session) == ["answered"] * 4


def test_f080_a_session_never_has_two_summarisers(path):
    running, most = [], []

    async def summary(request):
        running.append(request)
        most.append(len(running))
        await gate.wait()
        running.pop()
        return Say(SUMMARY)

    gate = Gate()
    with opened(path, actors(summary=summary)) as runtime:
        session = talked(runtime)
        together(8, lambda _: session.compact())
        gate.wait_reached()
        together(8, lambda _: session.compact())
        gate.open()
        session.wait_idle(timeout_s=WAIT_S)
        assert max(most) == 1


def test_f082_what_comes_in_while_the_summariser_fails_is_kept_with_the_rest(path):
    gate = Gate()
    model = actors(summary=lambda request: [Wait(gate), Fail(ModelError("gone"))])
    with opened(path, model) as runtime:
        session = talked(runtime)
        asked = session.compact()
        gate.wait_reached()
        turn = session.prompt("sent meanwhile")
        gate.open()
        with pytest.raises(CompactionFailed):
            asked.result(timeout_s=WAIT_S)
        turn.result(timeout_s=WAIT_S)
        words = shown(model.requests[-1])
        assert all(f"word {n}" in words for n in range(3)) and "sent meanwhile" in words


def test_f083_markers_have_ids_of_their_own_through_restarts(path):
    session_id = None
    for number in range(5):
        with opened(path) as runtime:
            session = runtime.session(session_id) if session_id else talked(runtime)
            session_id = session.id
            session.prompt(f"more {number} " + "blah " * 90).result(timeout_s=WAIT_S)
            session.compact().result(timeout_s=WAIT_S)
    with opened(path) as runtime:
        session = runtime.session(session_id)
        ids = [part.message_id for part in markers(session)]
        assert len(set(ids)) == 5
        place = {message.id: n for n, message in enumerate(session.messages())}
        for message in session.messages():  # no cycle: every parent comes before its child
            if isinstance(message.info, AssistantMessage):
                assert place[message.info.parent_id] < place[message.id]


def test_f085_a_later_compaction_that_keeps_no_tail_has_no_old_boundary(path, tmp_path):
    with opened(path) as runtime:
        session_id = talked(runtime, 5).id
        runtime.session(session_id).compact().result(timeout_s=WAIT_S)
    model = actors()
    rules = CompactionRules(tail=0)
    with opened(copied(path, tmp_path / "b"), model, compaction=rules) as runtime:
        session = runtime.session(session_id)
        session.prompt("new " * 100).result(timeout_s=WAIT_S)
        session.compact().result(timeout_s=WAIT_S)
        assert markers(session)[0].tail_start_id is not None
        assert markers(session)[1].tail_start_id is None
        asked = shown(summaries(model)[-1])
        assert SUMMARY in asked and "new new" in asked and "word 4" in asked


def test_f086_nobody_is_told_of_a_compaction_that_failed_and_the_task_goes_on(path):
    model = actors(summary=lambda request: [Say("half a "), Fail(ModelError("gone"))])
    with opened(path, model) as runtime:
        session = talked(runtime)
        reply = session.prompt("work").result(timeout_s=WAIT_S)
        assert reply.text == "worked"
        types = [event.type for event in history_of(runtime, session)]
        assert "session.compacted" not in types
        assert "session.error" in types
        assert [part.state for part in markers(session)] == ["failed"]


def test_f088_the_agent_goes_on_after_a_compaction_in_the_middle_of_its_task(path):
    steps = []

    def script(request):
        if request.purpose == "summary":
            return Say(SUMMARY)
        steps.append(last_text(request))
        return [Call("probe", {}), FULL] if len(steps) in (4, 6) else answer(request)

    with opened(path, actors(script)) as runtime:
        session = talked(runtime)
        turn = session.prompt("do a long task")
        assert turn.result(timeout_s=WAIT_S).text == "went on"
        assert outcomes(session)[-1] == "answered"
        assert "committed" in [part.state for part in markers(session)]


def test_f089_a_history_far_beyond_the_limit_is_summarised_in_pieces(path):
    limit = 4_000
    model = ScriptedModel(
        answer, context_limit=limit, output_limit=400, overflow=True, record=10_000
    )
    rules = CompactionRules(auto=False)
    with opened(path, ScriptedModel("ok"), compaction=rules) as runtime:
        session_id = runtime.create_session().id
        for number in range(40):
            text = f"word {number} " + "blah " * 800
            runtime.session(session_id).prompt(text).result(timeout_s=WAIT_S)
    with opened(path, model) as runtime:
        session = runtime.session(session_id)
        session.compact().result(timeout_s=WAIT_S)
        asked = [shown(request) for request in summaries(model)]
        assert len(asked) > 8
        assert all(len(text) // 4 <= limit for text in asked)
        assert all(any(f"word {n} " in text for text in asked) for n in range(40))
        assert session.prompt("go on").result(timeout_s=WAIT_S).text == "answer to go on"


# --- fork and revert ---------------------------------------------------------------------------


def test_f091_after_a_revert_no_message_has_lost_its_parent_and_the_session_opens(path):
    with opened(path) as runtime:
        session = talked(runtime, 4)
        for place in (5, 3, 1):
            messages = list(session.messages())
            session.revert(messages[place].id)
            session.prompt("instead").result(timeout_s=WAIT_S)
            ids = {message.id for message in session.messages()}
            for message in session.messages():
                if isinstance(message.info, AssistantMessage):
                    assert message.info.parent_id in ids
            folded(history_of(runtime, session)).settled()
    model = actors()
    with opened(path, model) as runtime:
        session = runtime.session(session.id)
        assert session.prompt("still fine").result(timeout_s=WAIT_S).text == "answer to still fine"
        assert all(paired(request) for request in model.requests)


def test_f092_a_revert_in_a_busy_fork_ends_its_run_and_its_queue_first(path, tools):
    model = obedient()
    with Runtime(path, model=model, tools=tools.all()) as runtime:
        source = runtime.create_session()
        source.prompt("say a").result(timeout_s=WAIT_S)
        source.prompt("call quick").result(timeout_s=WAIT_S)
        fork = source.fork()
        running = fork.prompt("call wait")
        assert tools.started.wait(WAIT_S)
        queued = [fork.prompt(f"say {n}") for n in range(3)]
        boundary = next(m.id for m in fork.messages() if m.text == "call quick")
        fork.revert(boundary)
        for turn in (running, *queued):
            with pytest.raises(TurnError):
                turn.result(timeout_s=WAIT_S)
        for number in range(3):
            said = fork.prompt(f"say again {number}").result(timeout_s=WAIT_S).text
            assert said == f"again {number}"
        texts = [m.text for m in fork.messages() if m.role == "user"]
        assert texts == ["say a", *[f"say again {n}" for n in range(3)]]
        assert [m.text for m in source.messages() if m.role == "user"] == ["say a", "call quick"]
        assert all(paired(request) for request in model.requests)
