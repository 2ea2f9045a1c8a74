"""Turns: steps, parallel calls, broken streams, limits."""

import pytest
from core_checks import check_all, check_settled
from core_stage import SESSION, Stage

from understudy.actors.core.commands import (
    ExecutionLost,
    StepFailed,
    StepFinished,
    StepProgress,
    StepRetrying,
    ToolFinished,
    ToolProgress,
)
from understudy.actors.core.state import Limits, Rules
from understudy.actors.models.protocol import AssistantTurn
from understudy.store.records import (
    Failure,
    RetryPart,
    TextPart,
    Tokens,
    ToolCompleted,
    ToolFailed,
    ToolPart,
    ToolRunning,
)

FAILURE = Failure(name="Broken", data={"message": "broke"})


def results(stage: Stage) -> list[str]:
    """Outputs in the running request, in order."""
    return [
        call.output
        for turn in stage.context()
        if isinstance(turn, AssistantTurn)
        for call in turn.calls
    ]


def test_a_call_is_committed_before_it_runs_and_its_result_before_the_next_step() -> None:
    stage = Stage()
    stage.prompt()
    call = stage.call()
    stage.answer("I look", call)
    assert isinstance(stage.part(call).state, ToolRunning)
    stage.finish_tool(call, "found")
    assert results(stage) == ["found"]
    stage.answer("done")
    assert [message.finish for message in stage.assistants()] == ["tool-calls", "stop"]
    check_settled(stage)


def test_results_stand_in_call_order_whatever_order_they_come_in() -> None:
    stage = Stage()
    stage.prompt()
    calls = [stage.call() for _ in range(4)]
    stage.answer("", *calls)
    for n in (2, 0, 3, 1):
        check_all(stage)
        stage.finish_tool(calls[n], f"r{n}")
    assert results(stage) == ["r0", "r1", "r2", "r3"]


def test_calls_that_share_an_id_are_told_apart() -> None:
    stage = Stage()
    stage.prompt()
    calls = [stage.call(call_id=call_id) for call_id in ("c", "c", "c-2", "")]
    stage.answer("", *calls)
    ids = [stage.part(call).call_id for call in calls]
    assert ids == ["c", "c-2", "c-2-2", calls[3].part_id]


def test_reports_that_are_late_or_repeated_change_nothing() -> None:
    stage = Stage()
    stage.prompt()
    call = stage.call()
    key = stage.step_id
    text = stage.text(key, "some text")
    finished = StepFinished(
        message_id=key, parts=(text,), calls=(call,), finish="stop", tokens=Tokens()
    )
    stage.send(finished)
    del stage.running[key]
    short = TextPart(id=text.id, session_id=SESSION, message_id=key, text="some", time=text.time)
    late = [
        finished,
        StepProgress(message_id=key, parts=(short,)),
        StepRetrying(message_id=key, attempt=2, failure=FAILURE, next_ms=0),
        StepFailed(message_id=key, parts=(), failure=FAILURE),
        ToolFinished(part_id="prt_unknown", output="x"),
        ToolProgress(part_id="prt_unknown", title="x", metadata={}),
        ExecutionLost(message_id="msg_unknown"),
    ]
    for command in late:
        stage.send(command)
        assert stage.facts == ()
    stage.finish_tool(call, "first")
    stage.send(ToolFinished(part_id=call.part_id, output="second"))
    assert stage.facts == ()
    assert stage.part(call).state.output == "first"


def test_text_reported_out_of_order_never_shrinks() -> None:
    stage = Stage()
    stage.prompt()
    key = stage.step_id
    long = stage.text(key, "some text", done=False)
    short = TextPart(id=long.id, session_id=SESSION, message_id=key, text="so", time=long.time)
    stage.send(StepProgress(message_id=key, parts=(long,)))
    stage.send(StepProgress(message_id=key, parts=(short,)))
    assert stage.facts == ()


def test_the_last_report_of_a_stream_may_correct_its_text() -> None:
    stage = Stage()
    stage.prompt()
    key = stage.step_id
    flushed = stage.text(key, "some text", done=False)
    stage.send(StepProgress(message_id=key, parts=(flushed,)))
    last = stage.text(key, "some", part_id=flushed.id)
    del stage.running[key]
    stage.send(
        StepFinished(message_id=key, parts=(last,), calls=(), finish="stop", tokens=Tokens())
    )
    assert stage.rows.parts[key][flushed.id] == last


def test_a_stream_that_ends_leaves_no_text_open() -> None:
    stage = Stage()
    stage.prompt()
    key = stage.step_id
    flushed = stage.text(key, "thinking", done=False)
    stage.send(StepProgress(message_id=key, parts=(flushed,)))
    stage.answer("")
    assert stage.rows.parts[key][flushed.id].time.end is not None
    check_all(stage)


def test_a_tool_reports_progress_and_failure() -> None:
    stage = Stage()
    stage.prompt()
    call = stage.call()
    stage.answer("", call)
    stage.send(ToolProgress(part_id=call.part_id, title="half", metadata={"done": 1}))
    assert stage.part(call).state.title == "half"
    stage.finish_tool(call, error="no such file")
    state = stage.part(call).state
    assert isinstance(state, ToolFailed)
    assert (state.error, state.metadata, state.interrupted) == ("no such file", {"done": 1}, False)
    assert results(stage) == ["no such file"]


def test_a_call_that_cannot_run_is_refused_and_the_turn_goes_on() -> None:
    stage = Stage()
    stage.prompt()
    stage.answer("", stage.call(problem="no such tool"))
    assert results(stage) == ["no such tool"]


def test_a_broken_stream_goes_on_in_a_new_step_that_does_not_repeat_it() -> None:
    stage = Stage()
    key = stage.prompt()
    stage.break_step("half an ans", transient=True)
    assert stage.delays == [0.0, 0.5]
    assert stage.assistants()[0].error == FAILURE
    assert len(stage.context()) == 1
    stage.answer("an answer")
    assert stage.outcome(key) == "answered"


def test_streams_that_keep_breaking_fail_the_turn() -> None:
    stage = Stage(rules=Rules(limits=Limits(model_attempts=3)))
    key = stage.prompt()
    for _ in range(3):
        assert stage.outcome(key) is None
        stage.break_step(transient=True)
    assert (stage.outcome(key), stage.rows.prompts[key].reason) == ("failed", "broke")
    assert "session.error" in stage.types()
    check_settled(stage)


def test_a_good_step_forgives_the_broken_ones_before_it() -> None:
    stage = Stage(rules=Rules(limits=Limits(model_attempts=2)))
    key = stage.prompt()
    for _ in range(3):
        stage.break_step(transient=True)
        call = stage.call()
        stage.answer("", call)
        stage.finish_tool(call)
    assert stage.outcome(key) is None


def test_a_retry_is_visible_in_status_and_transcript_until_the_stream_goes_on() -> None:
    stage = Stage()
    stage.prompt()
    key = stage.step_id
    stage.send(StepRetrying(message_id=key, attempt=2, failure=FAILURE, next_ms=77))
    status = stage.rows.status
    assert (status.type, status.attempt, status.message, status.next) == ("retry", 2, "broke", 77)
    assert any(isinstance(part, RetryPart) for part in stage.rows.parts[key].values())
    stage.send(StepProgress(message_id=key, parts=(stage.text(key, "on", done=False),)))
    assert stage.rows.status.type == "busy"
    stage.send(StepRetrying(message_id=key, attempt=2, failure=FAILURE, next_ms=77))  # late
    assert stage.rows.status.type == "busy"
    assert sum(isinstance(part, RetryPart) for part in stage.rows.parts[key].values()) == 1
    stage.answer()
    check_settled(stage)


def test_a_turn_has_a_limit_of_steps() -> None:
    stage = Stage(rules=Rules(limits=Limits(steps=3)))
    key = stage.prompt()
    for _ in range(3):
        call = stage.call()
        stage.answer("", call)
        stage.finish_tool(call)
    assert (stage.outcome(key), stage.rows.prompts[key].reason) == (
        "failed",
        "No answer within 3 steps",
    )
    check_settled(stage)


def test_a_turn_that_fails_at_a_limit_is_not_resumed_by_the_compaction_it_needed() -> None:
    stage = Stage(rules=Rules(limits=Limits(steps=1), context_limit=10_000))
    stage.prompt()
    call = stage.call()
    stage.answer("", call, tokens=9_000)
    stage.finish_tool(call)
    stage.summarise()
    check_settled(stage)


def test_calls_past_the_limit_of_one_answer_are_refused() -> None:
    stage = Stage(rules=Rules(limits=Limits(calls_per_step=2)))
    stage.prompt()
    calls = [stage.call() for _ in range(3)]
    stage.answer("", *calls)
    states = [type(stage.part(call).state) for call in calls]
    assert states == [ToolRunning, ToolRunning, ToolFailed]


def test_a_repeated_call_is_refused_and_then_fails_the_turn() -> None:
    stage = Stage(rules=Rules(limits=Limits(repeated_calls=2)))
    key = stage.prompt()
    states = []
    for _ in range(4):
        call = stage.call(signature="same")
        stage.answer("", call)
        if call.part_id in stage.running:
            stage.finish_tool(call)
        states.append(type(stage.part(call).state))
    assert states == [ToolCompleted, ToolFailed, ToolFailed, ToolFailed]
    assert "4 times in a row" in stage.rows.prompts[key].reason
    check_settled(stage)


def test_a_different_call_in_between_is_no_repetition() -> None:
    stage = Stage(rules=Rules(limits=Limits(repeated_calls=2)))
    stage.prompt()
    for signature in ("a", "b", "a", "b"):
        call = stage.call(signature=signature)
        stage.answer("", call)
        stage.finish_tool(call)


def test_a_step_without_executor_is_closed_as_lost() -> None:
    stage = Stage()
    first = stage.prompt("a")
    stage.prompt("b")
    key = stage.step_id
    stage.send(ExecutionLost(message_id=key))
    assert (stage.outcome(first), stage.rows.prompts[first].reason) == ("interrupted", "lost")
    assert stage.rows.messages[key].error.data["reason"] == "lost"
    check_all(stage)


@pytest.mark.parametrize("how", ["answered", "failed", "aborted"])
def test_a_session_counts_what_its_steps_used(how: str) -> None:
    stage = Stage()
    stage.prompt()
    call = stage.call()
    stage.answer("", call, tokens=100, cost=0.5)
    if how == "aborted":
        stage.prompt("now", when_busy="interrupt")
    else:
        stage.finish_tool(call)
        assert (stage.rows.info.tokens.total, stage.rows.info.cost) == (100, 0.5)
        stage.answer(tokens=50) if how == "answered" else stage.break_step()
    total = 150 if how == "answered" else 100
    assert stage.rows.info.tokens.total == total


def test_parts_come_in_the_order_they_were_made() -> None:
    stage = Stage()
    stage.prompt()
    calls = [stage.call(), stage.call()]
    key = stage.answer("text", *calls)
    for call in calls:
        stage.finish_tool(call)
    kinds = [type(part).__name__ for part in stage.rows.parts[key].values()]
    assert kinds == ["StepStartPart", "TextPart", "ToolPart", "ToolPart", "StepFinishPart"]
    assert all(isinstance(stage.part(call), ToolPart) for call in calls)
