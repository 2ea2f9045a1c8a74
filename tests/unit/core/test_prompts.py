"""Prompts: accepted once, answered in order, each with one outcome."""

import pytest
from core_checks import check_all, check_fifo, check_settled
from core_stage import SESSION, Stage

from understudy.actors.core.commands import (
    Abort,
    RequestCompaction,
    RevertTo,
    StepProgress,
    Unrevert,
    UpdateSession,
)
from understudy.actors.core.state import Limits, Rules
from understudy.actors.models.protocol import UserText, UserTurn
from understudy.errors import MessageNotFound, PromptConflict, RuntimeClosed, SessionBusy
from understudy.store.records import ModelRef, PermissionRule

ASK_BASH = PermissionRule(permission="bash", pattern="*", action="ask")


def said(stage: Stage) -> list[str]:
    return [
        item.text
        for turn in stage.context()
        if isinstance(turn, UserTurn)
        for item in turn.content
        if isinstance(item, UserText)
    ]


def test_a_prompt_to_an_idle_session_is_accepted_and_started_in_one_change() -> None:
    stage = Stage()
    key = stage.prompt("hello")
    assert len(stage.changes) == 1
    assert stage.types() == [
        "message.updated",
        "message.part.updated",
        "prompt.accepted",
        "prompt.started",
        "session.status",
        "message.updated",
        "message.part.updated",
    ]
    assert stage.rows.prompts[key].attempts == 1
    assert said(stage) == ["hello"]


def test_an_answer_settles_the_prompt_and_leaves_the_session_idle() -> None:
    stage = Stage()
    key = stage.prompt()
    reply = stage.answer("hi")
    prompt = stage.rows.prompts[key]
    assert (prompt.outcome, prompt.reply_id) == ("answered", reply)
    assert stage.types()[-2:] == ["session.status", "session.idle"]
    check_settled(stage)


def test_the_same_prompt_again_returns_the_first_and_changes_nothing() -> None:
    stage = Stage()
    key = stage.prompt("hello", message_id="msg_a")
    again = stage.prompt("hello", message_id="msg_a", known=stage.rows.prompts[key])
    assert again == key
    assert stage.facts == ()


@pytest.mark.parametrize("taken", ["other content", "foreign"])
def test_a_used_message_id_with_other_content_is_refused(taken: str) -> None:
    stage = Stage()
    key = stage.prompt("hello", message_id="msg_a")
    state = stage.state
    known = stage.rows.prompts[key] if taken != "foreign" else None
    with pytest.raises(PromptConflict):
        stage.prompt("other", message_id="msg_a", known=known, foreign=taken == "foreign")
    assert stage.state is state


def test_waiting_prompts_are_answered_in_order_in_turns_of_their_own() -> None:
    stage = Stage()
    keys = [stage.prompt(f"p{n}") for n in range(4)]
    assert stage.rows.messages[keys[3]].turn is None
    for n in range(4):
        assert said(stage) == [f"p{m}" for m in range(n + 1)]
        stage.answer(f"a{n}")
        check_all(stage)
    assert stage.rows.started == keys
    check_settled(stage)


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    stage = Stage(rules=Rules(limits=Limits(queue=1)))
    stage.prompt("a")
    stage.prompt("b")
    with pytest.raises(SessionBusy):
        stage.prompt("c")
    stage.answer()
    stage.prompt("c")


def test_reject_refuses_while_busy_and_runs_when_idle() -> None:
    stage = Stage()
    stage.prompt("a", when_busy="reject")
    with pytest.raises(SessionBusy):
        stage.prompt("b", when_busy="reject")
    stage.answer()
    stage.prompt("b", when_busy="reject")
    assert said(stage) == ["a", "b"]


def test_steering_joins_at_the_next_step_and_shares_the_outcome() -> None:
    stage = Stage()
    host = stage.prompt("a")
    queued = stage.prompt("later")
    steer = stage.prompt("also", when_busy="steer")
    call = stage.call()
    stage.answer("", call)
    assert stage.rows.messages[steer].turn is None
    stage.finish_tool(call)
    assert said(stage) == ["a", "also"]
    reply = stage.answer()
    assert [stage.rows.prompts[key].reply_id for key in (host, steer)] == [reply, reply]
    assert stage.state.turn is not None
    assert stage.state.turn.entry.prompt.message_id == queued
    check_all(stage)


def test_steering_that_comes_during_the_last_step_keeps_the_turn_going() -> None:
    stage = Stage()
    stage.prompt("a")
    steer = stage.prompt("also", when_busy="steer")
    stage.answer("first")
    assert stage.outcome(steer) is None
    assert said(stage) == ["a", "also"]
    stage.answer("second")
    check_settled(stage)


def test_steering_is_not_lost_when_its_host_fails() -> None:
    stage = Stage()
    host = stage.prompt("a")
    first = stage.prompt("s1", when_busy="steer")
    second = stage.prompt("s2", when_busy="steer")
    queued = stage.prompt("q")
    stage.break_step()
    assert stage.outcome(host) == "failed"
    assert said(stage) == ["a", "s1", "s2"]
    stage.answer()
    assert [stage.outcome(key) for key in (first, second)] == ["answered", "answered"]
    assert said(stage)[-1] == "q"
    stage.answer()
    assert stage.outcome(queued) == "answered"
    check_settled(stage)


def test_waiting_steering_joins_the_first_step_of_whatever_turn_comes_next() -> None:
    stage = Stage()
    stage.prompt("a")
    stage.prompt("q")
    stage.prompt("s", when_busy="steer")
    stage.break_step()
    assert said(stage) == ["a", "q", "s"]
    check_all(stage)


def test_prompts_behind_a_failing_turn_are_answered() -> None:
    stage = Stage()
    stage.prompt("a")
    queued = stage.prompt("b")
    stage.break_step()
    stage.answer()
    assert stage.outcome(queued) == "answered"


def test_interrupt_ends_the_turn_and_goes_before_what_waits() -> None:
    stage = Stage()
    first = stage.prompt("a")
    queued = stage.prompt("q")
    call = stage.call()
    stage.answer("", call)
    urgent = stage.prompt("now", when_busy="interrupt")
    assert (stage.outcome(first), stage.rows.prompts[first].reason) == ("interrupted", "interrupt")
    assert stage.part(call).state.interrupted
    assert said(stage)[-1] == "now"
    check_all(stage)
    stage.answer()
    stage.answer()
    assert [stage.outcome(key) for key in (urgent, queued)] == ["answered", "answered"]
    check_fifo(stage.rows)


def test_interrupts_that_must_wait_keep_their_order() -> None:
    stage = Stage()
    stage.prompt("a")
    stage.answer()
    stage.send(RequestCompaction())
    for text in ("q", "i1", "i2"):
        stage.prompt(text, when_busy="queue" if text == "q" else "interrupt")
    stage.summarise()
    assert said(stage)[-1] == "i1"
    stage.answer()
    assert said(stage)[-1] == "i2"
    check_all(stage)


def test_interrupt_leaves_a_compaction_that_waits_for_the_end_of_the_turn() -> None:
    stage = Stage()
    stage.prompt("a")
    marker = stage.send(RequestCompaction())
    stage.prompt("now", when_busy="interrupt")
    assert stage.marker(marker).active
    stage.answer()
    stage.summarise()
    assert stage.marker(marker).state == "committed"
    check_settled(stage)


# --- abort


def test_abort_ends_the_turn_and_starts_what_waits() -> None:
    stage = Stage()
    first = stage.prompt("a")
    queued = stage.prompt("b")
    key = stage.step_id
    part = stage.text(key, "half", done=False)
    stage.send(StepProgress(message_id=key, parts=(part,)))
    assert stage.send(Abort()) is True
    assert stage.outcome(first) == "interrupted"
    message = stage.rows.messages[key]
    assert (message.error.name, message.finish) == ("MessageAbortedError", None)
    assert stage.rows.parts[key][part.id].text == "half"
    assert stage.state.turn.entry.prompt.message_id == queued
    check_all(stage)


def test_abort_of_an_idle_session_changes_nothing() -> None:
    stage = Stage()
    assert stage.send(Abort(queued=True)) is False
    assert stage.facts == ()


def test_abort_with_queued_ends_everything_once() -> None:
    stage = Stage()
    keys = [stage.prompt(f"p{n}") for n in range(3)]
    assert stage.send(Abort(queued=True)) is True
    assert [stage.outcome(key) for key in keys] == ["interrupted"] * 3
    assert stage.types()[-1] == "session.idle"
    check_settled(stage)


def test_one_waiting_prompt_can_be_aborted() -> None:
    stage = Stage()
    keys = [stage.prompt(f"p{n}") for n in range(3)]
    assert stage.send(Abort(message_id=keys[1])) is True
    assert stage.send(Abort(message_id=keys[1])) is False
    stage.answer()
    stage.answer()
    outcomes = [stage.outcome(key) for key in keys]
    assert outcomes == ["answered", "interrupted", "answered"]


def test_the_running_prompt_or_one_that_joined_it_can_be_aborted() -> None:
    stage = Stage()
    stage.prompt("a")
    steer = stage.prompt("s", when_busy="steer")
    stage.answer()
    marker = stage.send(RequestCompaction())
    assert stage.send(Abort(message_id=steer)) is True
    assert stage.outcome(steer) == "interrupted"
    assert stage.marker(marker).state == "summarising"
    check_all(stage)


def test_a_turn_past_its_time_has_failed() -> None:
    stage = Stage()
    key = stage.prompt()
    stage.send(Abort(reason="timeout"))
    assert stage.outcome(key) == "failed"
    assert stage.assistants()[0].error.name == "TurnTimeoutError"


def test_closing_ends_what_runs_and_starts_nothing_new() -> None:
    stage = Stage()
    first = stage.prompt("a")
    queued = stage.prompt("b")
    stage.send(Abort(reason="close"))
    assert stage.outcome(first) == "interrupted"
    assert not stage.running
    assert stage.rows.status.type == "idle"
    assert stage.outcome(queued) is None
    stage.crash()
    stage.answer()
    assert stage.outcome(queued) == "answered"
    check_settled(stage)


@pytest.mark.parametrize("late", [Abort(), Abort(reason="timeout"), Abort(reason="close")])
def test_once_it_closes_nothing_starts_whatever_comes(late: Abort) -> None:
    stage = Stage()
    stage.prompt("a")
    queued = stage.prompt("b")
    stage.send(Abort(reason="close"))
    stage.send(late)
    with pytest.raises(RuntimeClosed):
        stage.prompt("c")
    with pytest.raises(RuntimeClosed):
        stage.prompt("d", when_busy="interrupt")
    with pytest.raises(RuntimeClosed):
        stage.send(RequestCompaction())
    assert not stage.running
    assert stage.rows.status.type == "idle"
    assert stage.outcome(queued) is None
    stage.crash()
    stage.answer()
    assert stage.outcome(queued) == "answered"
    check_settled(stage)


@pytest.mark.parametrize("late", ["timeout", "abort"])
@pytest.mark.parametrize("behind", [0, 1])
def test_a_compaction_that_waits_for_a_turn_does_not_start_once_it_closes(
    late: str, behind: int
) -> None:
    stage = Stage(rules=Rules(permissions=(ASK_BASH,)))
    key = stage.prompt("a")
    stage.answer("", stage.call("bash", permission="bash"))
    for _ in range(behind):
        stage.prompt("b")
    marker = stage.send(RequestCompaction())
    stage.send(Abort(reason="close"))
    assert stage.marker(marker).active
    stage.send(Abort(message_id=key, reason=late))
    assert not stage.running
    assert stage.marker(marker).state == "failed"
    assert stage.rows.status.type == "idle"
    assert ("session.idle" in stage.types()) is not bool(behind)
    stage.crash()
    for _ in range(behind):
        stage.answer()
    check_settled(stage)


@pytest.mark.parametrize("how", ["by name", "with the queue"])
def test_what_only_waits_can_be_aborted(how: str) -> None:
    stage = Stage()
    stage.prompt("a")
    queued = stage.prompt("b")
    stage.send(Abort(reason="close"))
    assert "session.idle" not in stage.types()
    abort = Abort(message_id=queued) if how == "by name" else Abort(queued=True)
    assert stage.send(abort) is True
    assert stage.outcome(queued) == "interrupted"
    assert stage.types().count("session.idle") == 1
    check_settled(stage)


# --- revert


def test_revert_hides_and_the_next_prompt_removes() -> None:
    stage = Stage()
    stage.prompt("a")
    stage.answer()
    second = stage.prompt("b")
    stage.answer()
    stage.send(RevertTo(message_id=second))
    assert second in stage.rows.messages
    stage.prompt("c")
    assert second not in stage.rows.messages
    assert said(stage) == ["a", "c"]
    assert stage.rows.info.revert is None


def test_unrevert_shows_again() -> None:
    stage = Stage()
    first = stage.prompt("a")
    stage.answer()
    stage.send(RevertTo(message_id=first))
    stage.send(Unrevert())
    stage.send(Unrevert())
    assert stage.facts == ()
    stage.prompt("b")
    assert said(stage) == ["a", "b"]


def test_revert_ends_what_runs_and_what_waits() -> None:
    stage = Stage()
    first = stage.prompt("a")
    stage.answer()
    keys = [stage.prompt("b"), stage.prompt("c")]
    stage.send(RequestCompaction())
    stage.send(RevertTo(message_id=first))
    assert [stage.outcome(key) for key in keys] == ["interrupted"] * 2
    check_settled(stage)


def test_a_compaction_makes_a_pending_revert_final() -> None:
    stage = Stage()
    stage.prompt("a")
    stage.answer()
    second = stage.prompt("b")
    stage.answer()
    stage.send(RevertTo(message_id=second))
    stage.send(RequestCompaction(reverted=stage.rows.reverted()))
    assert second not in stage.rows.messages
    check_all(stage)


def test_revert_to_an_unknown_message_is_refused() -> None:
    stage = Stage()
    with pytest.raises(MessageNotFound):
        stage.send(RevertTo(message_id="msg_x", found=False))


# --- update


def test_update_changes_what_is_given_and_nothing_twice() -> None:
    stage = Stage()
    model = ModelRef(provider_id="p", model_id="m")
    info = stage.send(UpdateSession(title="new", model=model, archived=5))
    assert (info.title, info.model, info.time.archived) == ("new", model, 5)
    stage.send(UpdateSession(title="new"))
    assert stage.facts == ()
    stage.prompt()
    assert stage.assistants()[0].model_id == "m"
    assert stage.assistants()[0].session_id == SESSION


def test_a_prompt_aborted_before_it_started_is_never_shown_to_a_model() -> None:
    stage = Stage()
    stage.prompt("first")
    waiting = stage.prompt("never mind")
    stage.send(Abort(message_id=waiting))
    stage.answer("done")
    stage.prompt("next")
    assert waiting in stage.rows.messages
    assert said(stage) == ["first", "next"]
