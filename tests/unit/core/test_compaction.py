"""Compaction: one marker at a time, which owns one summary."""

import pytest
from core_checks import check_all, check_settled
from core_stage import Stage

from understudy.actors.core.commands import Abort, ExecutionLost, RequestCompaction, UpdateSession
from understudy.actors.core.compaction import FOLLOW_UP
from understudy.actors.core.context import SUMMARY_HEADING
from understudy.actors.core.state import CompactionRules, Rules
from understudy.store.records import AssistantMessage, ModelRef

SMALL = Rules(context_limit=10_000)  # 1,808 tokens are usable
FULL = 9_000


def talked(**options: object) -> Stage:
    stage = Stage(rules=SMALL, **options)
    stage.prompt("a")
    stage.answer("b")
    return stage


def mid_turn(rules: Rules = SMALL) -> Stage:
    """A turn that has just passed the limit and compacts before its next step."""
    stage = Stage(rules=rules)
    stage.prompt("a")
    call = stage.call()
    stage.answer("", call, tokens=FULL)
    stage.finish_tool(call)
    return stage


def markers(stage: Stage) -> list[str]:
    return [
        key
        for key, message in stage.rows.messages.items()
        if message.agent == "compaction" and not isinstance(message, AssistantMessage)
    ]


def last_text(stage: Stage) -> str:
    return stage.context()[-1].content[0].text


def test_an_idle_session_compacts_at_once_and_rests() -> None:
    stage = talked()
    marker = stage.send(RequestCompaction())
    summary = stage.summary_id
    assert stage.rows.messages[summary].parent_id == marker
    assert stage.marker(marker).state == "summarising"
    stage.summarise(tail_start_id="msg_t", head_end_id="msg_h")
    part = stage.marker(marker)
    assert (part.state, part.summary_id) == ("committed", summary)
    assert (part.tail_start_id, part.head_end_id) == ("msg_t", "msg_h")
    assert "session.compacted" in stage.types()
    assert not any(prompt.digest == "" for prompt in stage.rows.prompts.values())
    check_settled(stage)


def test_summary_boundary_and_follow_up_become_effective_in_one_change() -> None:
    stage = talked()
    stage.send(RequestCompaction(resume=True))
    before = len(stage.changes)
    stage.summarise()
    assert len(stage.changes) == before + 1
    types = stage.types()
    assert types.index("session.compacted") < types.index("prompt.accepted")
    assert last_text(stage) == FOLLOW_UP


def test_requests_that_overlap_merge_and_unite_their_intents() -> None:
    stage = talked()
    first = stage.send(RequestCompaction())
    assert stage.send(RequestCompaction()) == first
    assert stage.facts == ()
    assert stage.send(RequestCompaction(auto=True, resume=True)) == first
    assert stage.types() == ["message.part.updated"]
    part = stage.marker(first)
    assert (part.auto, part.resume) == (True, True)
    assert len(stage.delays) == 2, "one step, one summary"
    stage.summarise()
    assert last_text(stage) == FOLLOW_UP
    stage.answer()
    assert stage.send(RequestCompaction()) != first


def test_a_manual_compaction_waits_for_the_end_of_the_turn_and_goes_before_the_queue() -> None:
    stage = Stage(rules=SMALL)
    first = stage.prompt("a")
    marker = stage.send(RequestCompaction())
    queued = stage.prompt("q")
    call = stage.call()
    stage.answer("", call)
    stage.finish_tool(call)
    assert stage.marker(marker).state == "requested"
    stage.answer()
    assert stage.outcome(first) == "answered"
    stage.summarise()
    assert stage.outcome(queued) is None
    stage.answer()
    check_settled(stage)


def test_an_automatic_compaction_runs_between_steps_and_the_turn_goes_on() -> None:
    stage = mid_turn()
    check_all(stage)
    stage.summarise(head_end_id=stage.assistants()[0].id)
    turns = stage.context()
    assert turns[0].content[0].text == SUMMARY_HEADING + "what was said"
    assert last_text(stage) == FOLLOW_UP
    stage.answer()
    assert len(stage.rows.prompts) == 1
    check_settled(stage)


def test_an_automatic_compaction_after_the_last_step_resumes_nothing() -> None:
    stage = Stage(rules=SMALL)
    key = stage.prompt("a")
    stage.answer("b", tokens=FULL)
    assert stage.outcome(key) == "answered"
    stage.summarise()
    check_settled(stage)


def test_automatic_compaction_can_be_off() -> None:
    stage = mid_turn(Rules(context_limit=10_000, compaction=CompactionRules(auto=False)))
    stage.answer()
    assert not markers(stage)


def test_a_manual_request_that_turns_automatic_in_a_turn_keeps_the_later_steps() -> None:
    stage = Stage(rules=SMALL)
    stage.prompt("a")
    stage.send(RequestCompaction())
    for tokens in (10, FULL):
        call = stage.call()
        stage.answer("", call, tokens=tokens)
        stage.finish_tool(call)
    last = stage.assistants()[-2]
    stage.summarise(head_end_id=stage.assistants()[0].id, tail_start_id=last.id)
    assert [len(turn.calls) for turn in stage.context() if hasattr(turn, "calls")] == [1]
    check_all(stage)


# --- overflow


def test_an_overflow_takes_back_the_empty_answer_and_compacts() -> None:
    stage = Stage(rules=SMALL)
    key = stage.prompt("a")
    step = stage.break_step(overflow=True)
    assert step not in stage.rows.messages
    stage.summarise()
    stage.answer()
    assert stage.outcome(key) == "answered"
    check_settled(stage)


def test_an_overflow_keeps_what_was_said() -> None:
    stage = Stage(rules=SMALL)
    stage.prompt("a")
    step = stage.break_step("half", overflow=True)
    assert stage.rows.messages[step].error is not None
    check_all(stage)


def test_overflow_that_compaction_does_not_help_fails_the_turn_and_pauses() -> None:
    stage = Stage(rules=SMALL)
    key = stage.prompt("a")
    for _ in range(2):
        stage.break_step(overflow=True)
        stage.summarise()
    stage.break_step(overflow=True)
    assert stage.outcome(key) == "failed"
    assert stage.rows.info.compaction_failures == 2
    assert len(markers(stage)) == 2
    stage.prompt("b")
    stage.break_step(overflow=True)
    assert stage.rows.info.compaction_failures == 2, "nothing was tried, so nothing failed"
    check_settled(stage)


def test_an_overflow_whose_summary_fails_fails_the_turn() -> None:
    stage = Stage(rules=SMALL)
    key = stage.prompt("a")
    queued = stage.prompt("q")
    stage.break_step(overflow=True)
    stage.fail_summary()
    stage.fail_summary()
    assert stage.outcome(key) == "failed"
    assert "full" in stage.rows.prompts[key].reason
    stage.answer()
    assert stage.outcome(queued) == "answered"
    check_settled(stage)


def test_an_overflow_merges_into_a_manual_request_and_makes_it_urgent() -> None:
    stage = Stage(rules=SMALL)
    key = stage.prompt("a")
    marker = stage.send(RequestCompaction())
    stage.break_step(overflow=True)
    assert stage.marker(marker).state == "summarising"
    stage.fail_summary()
    stage.fail_summary()
    assert stage.outcome(key) == "failed"
    check_settled(stage)


# --- failures


@pytest.mark.parametrize("bad", [{"text": ""}, {"text": "  "}, {"before": 50, "after": 50}])
def test_a_summary_that_says_nothing_or_does_not_shrink_never_replaces_history(bad: dict) -> None:
    stage = talked()
    marker = stage.send(RequestCompaction())
    first = stage.summarise(**bad)
    assert first not in stage.rows.messages
    check_all(stage)
    second = stage.summarise(**bad)
    message = stage.rows.messages[second]
    assert (message.finish, stage.marker(marker).state) == ("error", "failed")
    assert message.error is not None
    assert stage.rows.info.compaction_failures == 1
    stage.prompt("c")
    assert len(stage.context()) == 3, "nothing was replaced"
    check_all(stage)


def test_a_summary_that_makes_calls_commits_its_text_and_runs_none() -> None:
    stage = talked()
    stage.send(RequestCompaction())
    stage.summarise("fine", calls=(stage.call(),))
    check_settled(stage)


def test_a_late_report_of_an_earlier_attempt_changes_nothing() -> None:
    stage = talked()
    stage.send(RequestCompaction())
    old = stage.fail_summary()
    for send in (stage.summarise, stage.break_step):
        send(message_id=old)
        assert stage.facts == ()
    assert stage.summary_id != old


def test_one_summary_is_open_at_a_time_and_every_attempt_belongs_to_the_marker() -> None:
    stage = talked()
    marker = stage.send(RequestCompaction())
    stage.prompt("later")
    stage.fail_summary()
    summaries = [message for message in stage.assistants() if message.summary]
    assert [message.parent_id for message in summaries] == [marker]
    assert stage.marker(marker).attempts == 2


def test_two_failures_in_a_row_pause_automatic_compaction_and_say_so() -> None:
    stage = mid_turn()
    for _ in range(2):
        stage.fail_summary()
        stage.fail_summary()
        call = stage.call()
        stage.answer("", call, tokens=FULL)
        stage.finish_tool(call)
    names = [
        fact.error.name
        for change in stage.changes
        for fact in change
        if fact.type == "session.error"
    ]
    assert names.count("CompactionPaused") == 1
    assert names[-1] == "CompactionPaused"
    stage.answer(tokens=FULL)
    assert len(markers(stage)) == 2
    check_settled(stage)


def test_compactions_that_bring_nothing_pause_too() -> None:
    """C37: also when every one of them commits."""
    stage = mid_turn()
    for _ in range(5):
        if stage.state.compaction is not None:
            stage.summarise()
        call = stage.call()
        stage.answer("", call, tokens=FULL)
        stage.finish_tool(call)
    assert len(markers(stage)) == 2
    assert stage.rows.info.compaction_failures == 2


def test_compactions_between_turns_that_bring_nothing_pause_too() -> None:
    stage = Stage(rules=SMALL)
    for _ in range(6):
        stage.prompt("a")
        stage.answer("b", tokens=FULL)
        if stage.state.compaction is not None:
            stage.summarise()
    assert len(markers(stage)) == 2


@pytest.mark.parametrize("change", ["model", "manual", "small step"])
def test_a_pause_ends_when_something_changes(change: str) -> None:
    stage = Stage(rules=SMALL)
    for _ in range(4):
        stage.prompt("a")
        stage.answer("b", tokens=FULL)
        if stage.state.compaction is not None:
            stage.summarise()
    if change == "model":
        stage.send(UpdateSession(model=ModelRef(provider_id="p", model_id="bigger")))
    elif change == "manual":
        stage.send(RequestCompaction())
        stage.summarise()
    else:
        stage.prompt("a")
        stage.answer("b")
    assert stage.rows.info.compaction_failures == 0


# --- what happens during one


def test_prompts_during_a_compaction_are_kept_and_answered_after_it_in_order() -> None:
    stage = talked()
    stage.send(RequestCompaction())
    keys = [stage.prompt(f"p{n}") for n in range(3)]
    stage.fail_summary()
    stage.summarise()
    for n in range(3):
        assert last_text(stage) == f"p{n}"
        stage.answer()
    assert stage.rows.started[-3:] == keys
    check_settled(stage)


def test_the_follow_up_goes_before_what_waits() -> None:
    stage = talked()
    stage.send(RequestCompaction(resume=True))
    stage.prompt("q")
    stage.summarise()
    assert last_text(stage) == FOLLOW_UP
    check_all(stage)


def test_steering_during_a_compaction_in_a_turn_joins_after_it() -> None:
    stage = mid_turn()
    steer = stage.prompt("also", when_busy="steer")
    stage.summarise()
    assert stage.rows.prompts[steer].turn == stage.state.turn.number
    check_all(stage)


def test_steering_that_keeps_a_turn_going_is_part_of_it_while_it_compacts() -> None:
    stage = Stage(rules=SMALL)
    stage.prompt("a")
    steer = stage.prompt("also", when_busy="steer")
    stage.answer("b", tokens=FULL)
    assert stage.rows.prompts[steer].turn == stage.state.turn.number
    stage.fail_summary()
    stage.fail_summary()
    assert last_text(stage) == "also"
    check_all(stage)


@pytest.mark.parametrize("how", ["abort", "interrupt", "one"])
def test_ending_a_turn_ends_the_compaction_inside_it(how: str) -> None:
    stage = mid_turn()
    key = next(iter(stage.rows.prompts))
    marker = markers(stage)[0]
    if how == "interrupt":
        stage.prompt("now", when_busy="interrupt")
    else:
        stage.send(Abort(message_id=key if how == "one" else None))
    assert stage.outcome(key) == "interrupted"
    assert stage.marker(marker).state == "failed"
    assert stage.rows.info.compaction_failures == 0
    check_all(stage)


def test_abort_ends_a_compaction_of_its_own_and_leaves_no_follow_up() -> None:
    stage = talked()
    marker = stage.send(RequestCompaction(resume=True))
    stage.send(Abort())
    assert stage.marker(marker).state == "failed"
    check_settled(stage)


def test_a_lost_summary_is_made_again_a_bounded_number_of_times() -> None:
    stage = talked()
    marker = stage.send(RequestCompaction())
    for _ in range(20):
        if not stage.running:
            break
        stage.send(ExecutionLost(message_id=stage.summary_id))
    assert stage.marker(marker).state == "failed"
    assert stage.marker(marker).attempts == 5
    check_settled(stage)


def test_a_summary_s_use_is_counted() -> None:
    stage = talked()
    stage.send(RequestCompaction())
    stage.summarise()
    assert stage.rows.info.tokens.total == 15
