"""Asks: rules, answers, and that every ask is closed exactly once."""

import pytest
from core_checks import check_all, check_settled
from core_stage import SESSION, Stage

from understudy.actors.core.commands import (
    Abort,
    CallDraft,
    ExecutionLost,
    OpenAsk,
    Reply,
    UpdateSession,
)
from understudy.actors.core.state import Rules
from understudy.errors import AskClosed, AskNotFound, InvalidInput
from understudy.store.records import (
    Ask,
    PermissionRule,
    Question,
    ToolFailed,
    ToolPending,
    ToolRunning,
)


def rule(permission: str, pattern: str, action: str) -> PermissionRule:
    return PermissionRule(permission=permission, pattern=pattern, action=action)


def asking(*rules: PermissionRule) -> Stage:
    stage = Stage(rules=Rules(permissions=rules or (rule("bash", "*", "ask"),)))
    stage.prompt()
    return stage


def bash(stage: Stage, *patterns: str, **options: object) -> CallDraft:
    return stage.call("bash", permission="bash", patterns=patterns, **options)


def tool_ask(stage: Stage, call: CallDraft, **options: object) -> Ask:
    return Ask(
        id=stage.new_id("ask"),
        session_id=SESSION,
        created=1,
        message_id=stage.part(call).message_id,
        call_id=call.call_id,
        **options,
    )


@pytest.mark.parametrize(
    ("rules", "patterns", "state"),
    [
        ((), ("ls",), ToolRunning),
        ((rule("bash", "*", "deny"),), ("ls",), ToolFailed),
        ((rule("bash", "*", "ask"),), ("ls",), ToolPending),
        ((rule("bash", "*", "deny"), rule("bash", "ls", "allow")), ("ls",), ToolRunning),
        ((rule("bash", "ls", "allow"), rule("*", "*", "deny")), ("ls",), ToolFailed),
        ((rule("bash", "rm *", "deny"), rule("edit", "*", "deny")), ("ls",), ToolRunning),
        ((rule("bash", "rm *", "deny"),), ("ls", "rm x"), ToolFailed),
        ((rule("bash", "rm *", "ask"),), ("ls", "rm x"), ToolPending),
        ((rule("bash", "b", "ask"), rule("bash", "c", "deny")), ("b", "c"), ToolFailed),
    ],
)
def test_the_last_matching_rule_wins_and_the_strictest_pattern_counts(
    rules: tuple[PermissionRule, ...], patterns: tuple[str, ...], state: type
) -> None:
    stage = Stage(rules=Rules(permissions=rules))
    stage.prompt()
    call = bash(stage, *patterns)
    stage.answer("", call, bash(stage, "other", problem="keeps the step whole"))
    assert isinstance(stage.part(call).state, state)
    check_all(stage)


def test_a_session_s_own_rules_come_after_the_runtime_s() -> None:
    stage = asking(rule("bash", "*", "deny"))
    stage.send(UpdateSession(permission=(rule("bash", "ls", "allow"),)))
    call = bash(stage, "ls")
    stage.answer("", call)
    assert isinstance(stage.part(call).state, ToolRunning)


def test_a_call_waits_until_it_is_allowed_once() -> None:
    stage = asking()
    call = bash(stage, "ls")
    stage.answer("", call)
    assert not stage.running
    ask = stage.open_ask()
    reply = stage.send(Reply(ask_id=ask.id, reply="once"))
    assert reply.replied == "once"
    assert isinstance(stage.part(call).state, ToolRunning)
    again = bash(stage, "ls")
    stage.finish_tool(call)
    stage.answer("", again)
    assert isinstance(stage.part(again).state, ToolPending)


def test_results_stay_in_call_order_when_some_wait_for_permission() -> None:
    """B24."""
    stage = asking()
    calls = [bash(stage, "a"), stage.call(), bash(stage, "b"), stage.call()]
    stage.answer("", *calls)
    stage.finish_tool(calls[3], "r3")
    stage.finish_tool(calls[1], "r1")
    for ask in list(stage.state.asks.values())[::-1]:
        stage.send(Reply(ask_id=ask.id, reply="once"))
    stage.finish_tool(calls[2], "r2")
    stage.finish_tool(calls[0], "r0")
    outputs = [call.output for call in stage.context()[-1].calls]
    assert outputs == ["r0", "r1", "r2", "r3"]


def test_always_is_remembered_and_covers_what_else_waits() -> None:
    stage = asking()
    calls = [bash(stage, f"git {n}", always=("git *",)) for n in range(3)]
    other = bash(stage, "rm")
    stage.answer("", *calls, other)
    first = next(iter(stage.state.asks))
    stage.send(Reply(ask_id=first, reply="always"))
    assert all(isinstance(stage.part(call).state, ToolRunning) for call in calls)
    assert isinstance(stage.part(other).state, ToolPending)
    assert stage.rows.info.permission == (rule("bash", "git *", "allow"),)
    check_all(stage)


def test_always_allows_the_text_that_was_asked_about_not_what_it_matches_as_a_pattern() -> None:
    stage = asking()
    first = bash(stage, "rm *[ab]?")
    stage.answer("", first, bash(stage, "rm -rf a1"), bash(stage, "rm *[ab]?"))
    stage.send(Reply(ask_id=next(iter(stage.state.asks)), reply="always"))
    waiting = [ask.patterns for ask in stage.state.asks.values()]
    assert waiting == [("rm -rf a1",)]


def test_granting_one_of_two_calls_with_the_same_id_runs_that_one() -> None:
    stage = asking()
    calls = [bash(stage, "rm", call_id="c"), bash(stage, "ls", call_id="c")]
    stage.answer("", *calls)
    second = next(ask for ask in stage.state.asks.values() if ask.patterns == ("ls",))
    stage.send(Reply(ask_id=second.id, reply="once"))
    assert [type(stage.part(call).state) for call in calls] == [ToolPending, ToolRunning]


def test_a_plain_refusal_ends_the_turn() -> None:
    stage = asking()
    waiting = stage.prompt("next")
    calls = [bash(stage, "a"), bash(stage, "b"), stage.call()]
    stage.answer("", *calls)
    stage.send(Reply(ask_id=next(iter(stage.state.asks)), reply="reject"))
    assert [stage.part(call).state.interrupted for call in calls] == [False, True, True]
    assert stage.rows.prompts[next(iter(stage.rows.prompts))].reason == "rejected"
    assert stage.state.turn.entry.prompt.message_id == waiting
    check_all(stage)


def test_a_refusal_with_feedback_tells_the_model_and_goes_on() -> None:
    stage = asking()
    call = bash(stage, "a")
    stage.answer("", call)
    stage.send(Reply(ask_id=stage.open_ask().id, reply="reject", feedback="use git"))
    assert "use git" in stage.part(call).state.error
    assert "use git" in stage.context()[-1].calls[0].output


def test_an_answer_to_a_closed_or_unknown_request_is_refused() -> None:
    stage = asking()
    stage.answer("", bash(stage, "a"))
    ask = stage.open_ask()
    stage.send(Abort())
    assert stage.rows.asks[ask.id].replied == "closed"
    with pytest.raises(AskClosed):
        stage.send(Reply(ask_id=ask.id, reply="once", known=stage.rows.asks[ask.id]))
    with pytest.raises(AskNotFound):
        stage.send(Reply(ask_id="per_x", reply="once"))


def test_an_answer_of_the_wrong_kind_is_refused_and_the_request_stays_open() -> None:
    stage = asking()
    stage.answer("", bash(stage, "a"))
    ask = stage.open_ask()
    with pytest.raises(InvalidInput):
        stage.send(Reply(ask_id=ask.id, reply="answered"))
    assert stage.open_ask() == ask


def test_a_running_tool_asks_a_question_and_gets_the_answers() -> None:
    stage = asking()
    call = stage.call()
    stage.answer("", call)
    ask = tool_ask(stage, call, kind="question", questions=(Question(text="which?"),))
    stage.send(OpenAsk(part_id=call.part_id, ask=ask))
    stage.send(OpenAsk(part_id=call.part_id, ask=ask))
    assert stage.facts == ()
    with pytest.raises(InvalidInput):
        stage.send(Reply(ask_id=ask.id, reply="answered"))
    stage.send(Reply(ask_id=ask.id, reply="answered", answers=(("this",),)))
    assert stage.resolved[-1].answers == (("this",),)
    stage.send(OpenAsk(part_id=call.part_id, ask=ask))
    assert stage.facts == (), "a closed question opened again"
    stage.finish_tool(call)
    check_all(stage)


def test_rejecting_a_question_is_the_tool_s_to_handle() -> None:
    stage = asking()
    call = stage.call()
    stage.answer("", call)
    ask = tool_ask(stage, call, kind="question", questions=(Question(text="which?"),))
    stage.send(OpenAsk(part_id=call.part_id, ask=ask))
    stage.send(Reply(ask_id=ask.id, reply="reject"))
    assert stage.resolved[-1].replied == "reject"
    assert call.part_id in stage.running


@pytest.mark.parametrize(("action", "replied"), [("allow", "once"), ("deny", "reject")])
def test_rules_answer_a_running_tool_without_a_person(action: str, replied: str) -> None:
    stage = asking(rule("edit", "*", action))
    call = stage.call()
    stage.answer("", call)
    ask = tool_ask(stage, call, kind="permission", permission="edit", patterns=("f",))
    stage.send(OpenAsk(part_id=call.part_id, ask=ask))
    assert stage.facts == ()
    assert stage.resolved[-1].replied == replied


def test_what_no_rule_is_about_is_asked_when_a_tool_asks_and_only_its_own_answer_counts() -> None:
    stage = asking()
    call = stage.call()
    stage.answer("", call)
    first, second = (
        tool_ask(stage, call, kind="permission", permission=name, patterns=("f",))
        for name in ("deploy", "publish")
    )
    for ask in (first, second):
        stage.send(OpenAsk(part_id=call.part_id, ask=ask))
        assert [fact.type for fact in stage.facts] == ["permission.asked"]
    stage.send(Reply(ask_id=first.id, reply="always"))
    assert stage.open_ask().id == second.id
    check_all(stage)


def test_a_tool_that_is_over_gets_its_request_back_closed() -> None:
    stage = asking()
    call = stage.call()
    stage.answer("", call)
    ask = tool_ask(stage, call, kind="question")
    stage.finish_tool(call)
    stage.send(OpenAsk(part_id=call.part_id, ask=ask))
    assert stage.facts == ()
    assert stage.resolved[-1].replied == "closed"


def test_a_tool_that_ends_closes_what_it_asked() -> None:
    stage = asking()
    call = stage.call()
    stage.answer("", call)
    ask = tool_ask(stage, call, kind="question", questions=(Question(text="which?"),))
    stage.send(OpenAsk(part_id=call.part_id, ask=ask))
    stage.finish_tool(call)
    assert stage.rows.asks[ask.id].replied == "closed"
    stage.answer()
    check_settled(stage)


def test_losing_an_executor_leaves_what_waits_for_a_person() -> None:
    stage = asking()
    waiting, running = bash(stage, "a"), stage.call()
    key = stage.answer("", waiting, running)
    question = tool_ask(stage, running, kind="question", questions=(Question(text="which?"),))
    stage.send(OpenAsk(part_id=running.part_id, ask=question))
    stage.send(ExecutionLost(message_id=key))
    assert stage.rows.asks[question.id].replied == "closed"
    assert isinstance(stage.part(waiting).state, ToolPending)
    assert stage.part(running).state.interrupted
    check_all(stage)
    stage.send(Reply(ask_id=stage.open_ask().id, reply="once"))
    stage.finish_tool(waiting)
    stage.answer()
    check_settled(stage)
