"""Recovery: from every point a crash can leave, a whole session, and no work done twice."""

from collections.abc import Callable

import pytest
from core_checks import check_all, check_settled
from core_stage import SESSION, Rows, Stage, loaded, replace

from understudy.actors.core.commands import (
    Abort,
    OpenAsk,
    Recover,
    Reply,
    RequestCompaction,
    StepProgress,
)
from understudy.actors.core.compaction import FOLLOW_UP
from understudy.actors.core.effects import RunTool
from understudy.actors.core.state import Limits, Rules, State
from understudy.store.events import MessageUpdated, PartUpdated, PromptStarted
from understudy.store.records import (
    IDLE,
    Ask,
    AssistantMessage,
    CompactionPart,
    MessageTime,
    PermissionRule,
    Span,
    StepStartPart,
    TextPart,
    Tokens,
    ToolCompleted,
    ToolPart,
    ToolPending,
    ToolRunning,
    UserMessage,
)

ASK = Rules(permissions=(PermissionRule(permission="bash", pattern="*", action="ask"),))
RESUME = Rules(on_restart="resume")
SMALL = Rules(context_limit=10_000)
FULL = 9_000


def running_tools(rules: Rules | None = None) -> tuple[Stage, list]:
    """A step with one call done and two running, one of them repeatable."""
    stage = Stage(rules=rules)
    stage.prompt("a")
    calls = [stage.call(), stage.call(idempotent=True), stage.call()]
    stage.answer("I look", *calls)
    stage.finish_tool(calls[0], "found")
    return stage, calls


def test_an_interrupted_turn_is_closed_whole() -> None:
    """A3, A4, A6, A8, A10, A26."""
    stage, calls = running_tools()
    done = stage.part(calls[0])
    stage.crash()
    message = stage.assistants()[0]
    assert message.time.completed == stage.now_ms
    assert (message.error.name, message.error.data["reason"]) == ("InterruptedError", "restart")
    state = stage.part(calls[1]).state
    assert state.error == "Tool execution was interrupted (server restart)"
    assert state.interrupted
    assert state.time.end >= state.time.start
    assert stage.part(calls[0]) == done
    key = next(iter(stage.rows.prompts))
    assert (stage.outcome(key), stage.rows.prompts[key].reason) == ("interrupted", "restart")
    assert {"message.updated", "message.part.updated"} <= set(stage.types())
    check_settled(stage)


def test_streamed_text_is_kept_and_gets_its_end() -> None:
    """A7, A16."""
    stage = Stage()
    stage.prompt()
    key = stage.step_id
    text = stage.text(key, "half a sent", done=False)
    stage.send(StepProgress(message_id=key, parts=(text,)))
    stage.crash()
    part = stage.rows.parts[key][text.id]
    assert part.text == "half a sent"
    assert part.time.end is not None
    assert "message.removed" not in stage.types()


def test_a_new_prompt_after_recovery_sees_each_call_with_one_result() -> None:
    """A11, A12."""
    stage, _ = running_tools()
    stage.crash()
    key = stage.prompt("go on")
    outputs = [
        call.output for turn in stage.context() if hasattr(turn, "calls") for call in turn.calls
    ]
    interrupted = "[Tool execution was interrupted]"
    assert outputs == ["found", interrupted, interrupted]
    stage.answer()
    assert stage.outcome(key) == "answered"


def test_nothing_to_recover_costs_nothing() -> None:
    """A30."""
    stage = Stage()
    stage.crash()
    assert stage.facts == ()
    stage.prompt()
    stage.answer()
    stage.crash()
    assert stage.facts == ()


def test_the_reason_is_the_only_difference_between_a_crash_and_an_abort() -> None:
    """A17."""
    texts = []
    for reason in ("restart", "crash"):
        stage, calls = running_tools()
        stage.crash(reason=reason)
        texts.append(stage.part(calls[2]).state.error)
        assert isinstance(stage.part(calls[2]).state.metadata["reason"], str)
    assert texts == [
        "Tool execution was interrupted (server restart)",
        "Tool execution was interrupted (session restarted after a crash)",
    ]


def test_waiting_prompts_run_after_recovery_in_order() -> None:
    stage = Stage()
    stage.prompt("a")
    keys = [stage.prompt(f"p{n}", when_busy=kind) for n, kind in enumerate(("queue", "queue"))]
    stage.crash()
    stage.answer()
    stage.answer()
    assert stage.rows.started[-2:] == keys
    check_settled(stage)


def test_a_restart_is_told_when_asked_to() -> None:
    stage = Stage()
    stage.crash(reason="crash", restarted=True, epoch=7)
    assert stage.types() == ["actor.restarted"]


# --- what waits for people goes on


def test_a_call_that_waits_for_permission_survives_a_restart() -> None:
    """F128."""
    stage = Stage(rules=ASK)
    stage.prompt("a")
    waiting, running = stage.call("bash", permission="bash"), stage.call()
    stage.answer("", waiting, running)
    stage.crash()
    assert isinstance(stage.part(waiting).state, ToolPending)
    assert stage.part(running).state.interrupted
    check_all(stage)
    before = stage.state
    stage.crash()
    assert stage.facts == ()
    assert stage.state == before
    stage.send(Reply(ask_id=stage.open_ask().id, reply="once"))
    stage.finish_tool(waiting, "ran once")
    stage.answer()
    check_settled(stage)


def test_a_compaction_requested_beside_a_parked_call_still_waits_for_its_turn() -> None:
    stage = Stage(rules=ASK)
    stage.prompt("a")
    marker = stage.send(RequestCompaction())
    stage.answer("", stage.call("bash", permission="bash"))
    stage.crash()
    assert stage.marker(marker).state == "requested"
    stage.send(Reply(ask_id=stage.open_ask().id, reply="reject"))
    stage.summarise()
    check_settled(stage)


def test_what_a_dead_tool_asked_is_closed() -> None:
    stage = Stage(rules=ASK)
    stage.prompt("a")
    call = stage.call("bash", permission="bash")
    stage.answer("", call)
    ask = stage.open_ask()
    stage.send(Reply(ask_id=ask.id, reply="once"))
    stage.crash()
    assert all(ask.replied is not None for ask in stage.rows.asks.values())
    check_settled(stage)


# --- compaction


def test_a_compaction_inside_a_turn_goes_on_and_so_does_the_turn() -> None:
    stage = Stage(rules=SMALL)
    key = stage.prompt("a")
    call = stage.call()
    stage.answer("", call, tokens=FULL)
    stage.finish_tool(call)
    stage.crash()
    assert stage.outcome(key) is None
    check_all(stage)
    stage.summarise()
    stage.answer()
    assert stage.outcome(key) == "answered"


def test_one_that_was_requested_steps_ago_is_not_stale() -> None:
    stage = Stage(rules=SMALL)
    key = stage.prompt("a")
    stage.send(RequestCompaction())
    for tokens in (10, FULL):
        call = stage.call()
        stage.answer("", call, tokens=tokens)
        stage.finish_tool(call)
    stage.crash()
    stage.summarise()
    stage.answer()
    assert stage.outcome(key) == "answered"


def test_an_unfinished_summary_is_replaced_and_its_marker_kept() -> None:
    """C11, C13, C14."""
    stage = Stage()
    stage.prompt("a")
    stage.answer()
    marker = stage.send(RequestCompaction())
    key = stage.summary_id
    stage.send(StepProgress(message_id=key, parts=(stage.text(key, "half", done=False),)))
    stage.crash()
    assert key not in stage.rows.messages
    assert stage.rows.messages[stage.summary_id].parent_id == marker
    stage.summarise()
    assert stage.marker(marker).state == "committed"
    check_settled(stage)


def test_a_summary_that_crashes_every_time_ends_as_failed() -> None:
    """C33."""
    stage = Stage()
    stage.prompt("a")
    stage.answer()
    marker = stage.send(RequestCompaction())
    waiting = stage.prompt("q")
    for _ in range(4):
        stage.crash()
        assert stage.marker(marker).active
    stage.crash()
    assert stage.marker(marker).state == "failed"
    stage.answer()
    assert stage.outcome(waiting) == "answered"


def planted(state: str = "requested", **options: object) -> tuple[Stage, str]:
    """An active marker that an older version, or a bug, left behind."""
    stage = Stage()
    stage.prompt("a")
    stage.answer()
    key = stage.new_id("msg")
    put(stage, UserMessage(id=key, session_id=SESSION, time=MessageTime(created=1), **options))
    put(
        stage,
        CompactionPart(
            id=stage.new_id("prt"), session_id=SESSION, message_id=key, state=state, resume=True
        ),
    )
    return stage, key


def put(stage: Stage, row: object) -> None:
    if isinstance(row, UserMessage | AssistantMessage):
        stage.rows.apply(MessageUpdated(session_id=SESSION, info=row))
    else:
        stage.rows.apply(PartUpdated(session_id=SESSION, part=row, time=1))


def assistant(stage: Stage, parent: str, **options: object) -> AssistantMessage:
    fields = {
        "turn": 1,
        "time": MessageTime(created=1),
        "tokens": Tokens(),
        "agent": "a",
        "mode": "a",
        "provider_id": "p",
        "model_id": "m",
    }
    return AssistantMessage(
        id=stage.new_id("msg"), session_id=SESSION, parent_id=parent, **(fields | options)
    )


def test_a_stale_marker_is_closed_and_blocks_nothing() -> None:
    """C24, C26."""
    stage, key = planted(turn=2)
    put(
        stage,
        assistant(stage, key, turn=2, finish="stop", time=MessageTime(created=1, completed=2)),
    )
    stage.crash()
    assert stage.marker(key).state == "stale"
    check_settled(stage)
    assert stage.send(RequestCompaction()) != key


def test_duplicate_markers_converge_to_one() -> None:
    """C29."""
    stage, first = planted()
    key = stage.new_id("msg")
    put(stage, UserMessage(id=key, session_id=SESSION, time=MessageTime(created=1)))
    put(stage, CompactionPart(id=stage.new_id("prt"), session_id=SESSION, message_id=key))
    stage.crash()
    assert [stage.marker(one).state for one in (first, key)] == ["stale", "summarising"]
    check_all(stage)
    stage.summarise()
    check_settled(stage)


def test_a_finished_summary_whose_bookkeeping_is_missing_is_completed_without_a_model() -> None:
    """C17 to C20, C22."""
    stage, key = planted("summarising", turn=2)
    tail = next(iter(stage.rows.messages))
    summary = assistant(
        stage, key, turn=2, summary=True, finish="stop", time=MessageTime(created=1, completed=2)
    )
    put(stage, summary)
    put(stage, TextPart(id="prt_s", session_id=SESSION, message_id=summary.id, text="said"))
    stage.forget()
    before = replace(loaded(stage.rows), tails={key: (None, tail)})
    stage.send(Recover(loaded=before))
    part = stage.marker(key)
    assert (part.state, part.tail_start_id, part.summary_id) == ("committed", tail, summary.id)
    assert [turn.content[0].text for turn in stage.context() if hasattr(turn, "content")][2:] == [
        FOLLOW_UP
    ]
    check_all(stage)
    stage.answer()
    stage.crash()
    assert stage.facts == ()


# --- orphans of all kinds


def test_orphans_that_belong_to_no_turn_are_closed() -> None:
    """A2, A5, A27."""
    stage = Stage()
    prompt = stage.prompt("a")
    stage.answer()
    done = stage.assistants()[0]
    orphan = assistant(stage, prompt)
    put(stage, orphan)
    under_done = ToolPart(
        id="prt_x",
        session_id=SESSION,
        message_id=done.id,
        tool="t",
        call_id="x",
        state=ToolRunning(input={}, time=Span(start=5)),
    )
    pending = ToolPart(
        id="prt_y",
        session_id=SESSION,
        message_id=orphan.id,
        tool="t",
        call_id="y",
        state=ToolPending(),
    )
    put(stage, under_done)
    put(stage, pending)
    stage.crash()
    assert stage.rows.messages[done.id] == done
    assert stage.rows.parts[done.id]["prt_x"].state.interrupted
    assert stage.rows.parts[orphan.id]["prt_y"].state.interrupted
    assert stage.rows.messages[orphan.id].error.name == "InterruptedError"
    check_settled(stage)
    stage.crash()
    assert stage.facts == ()


def test_of_several_running_turns_only_the_last_may_go_on() -> None:
    stage = Stage(rules=RESUME)
    first, second = stage.prompt("a"), stage.prompt("b")
    number = stage.state.seq + 1
    message = replace(stage.rows.messages[second], turn=number)
    put(stage, message)
    stage.rows.apply(
        PromptStarted(
            session_id=SESSION, info=replace(stage.rows.prompts[second], turn=number, attempts=1)
        )
    )
    stage.crash()
    assert (stage.outcome(first), stage.outcome(second)) == ("interrupted", None)
    check_all(stage)


def test_a_pending_call_that_nobody_is_asked_about_does_not_hold_up_its_step() -> None:
    stage = Stage(rules=ASK)
    stage.prompt("a")
    asked = stage.call("bash", permission="bash")
    key = stage.answer("", asked)
    put(
        stage,
        ToolPart(
            id="prt_z",
            session_id=SESSION,
            message_id=key,
            tool="t",
            call_id="z",
            state=ToolPending(),
        ),
    )
    stage.crash()
    assert stage.rows.parts[key]["prt_z"].state.interrupted
    check_all(stage)


# --- resuming


def test_no_tool_runs_again_unless_the_policy_and_the_tool_allow_it() -> None:
    """A29."""
    for rules in (None, RESUME):
        stage, calls = running_tools(rules)
        stage.crash()
        again = [e.part.id for e in stage.running.values() if isinstance(e, RunTool)]
        assert again == ([calls[1].part_id] if rules else [])
        if rules:
            (effect,) = stage.running.values()
            assert effect.attempt == 2
            check_all(stage)
            stage.finish_tool(calls[1], "again")
            outputs = [call.output for call in stage.context()[-1].calls]
            assert outputs == ["found", "again", "[Tool execution was interrupted]"]


def test_a_resumed_stream_goes_on_in_a_new_step_that_does_not_show_the_half_one() -> None:
    stage = Stage(rules=RESUME)
    key = stage.prompt("a")
    step = stage.step_id
    stage.send(StepProgress(message_id=step, parts=(stage.text(step, "half", done=False),)))
    stage.crash()
    assert stage.step_id != step
    assert stage.rows.messages[step].error is not None
    assert len(stage.context()) == 1
    stage.answer()
    assert stage.outcome(key) == "answered"


def test_resuming_is_bounded_by_a_durable_count() -> None:
    stage = Stage(rules=Rules(on_restart="resume", limits=Limits(resume_attempts=3)))
    key = stage.prompt("a")
    for _ in range(3):
        stage.crash()
        assert stage.outcome(key) is None
    assert stage.rows.prompts[key].attempts == 4
    stage.crash()
    assert stage.outcome(key) == "interrupted"


@pytest.mark.parametrize("rules", [ASK, replace(ASK, on_restart="resume")])
def test_the_limit_of_steps_holds_over_restarts(rules: Rules) -> None:
    stage = Stage(rules=replace(rules, limits=Limits(steps=3, resume_attempts=9)))
    key = stage.prompt("a")
    for number in range(3):
        assert stage.outcome(key) is None
        call = stage.call("bash", permission="bash", patterns=(str(number),))
        stage.answer("", call)
        stage.crash()
        stage.send(Reply(ask_id=stage.open_ask().id, reply="once"))
        stage.finish_tool(call)
    assert (stage.outcome(key), stage.rows.prompts[key].reason) == (
        "failed",
        "No answer within 3 steps",
    )
    check_settled(stage)


def test_resuming_keeps_what_waits_for_a_person_and_repeats_what_may_be() -> None:
    stage = Stage(rules=replace(ASK, on_restart="resume"))
    stage.prompt("a")
    asked = stage.call("bash", permission="bash")
    repeat, once = stage.call(idempotent=True), stage.call()
    stage.answer("", asked, repeat, once)
    stage.crash()
    assert list(stage.running) == [repeat.part_id]
    assert isinstance(stage.part(asked).state, ToolPending)
    assert stage.part(once).state.interrupted
    check_all(stage)
    stage.finish_tool(repeat)
    attempts = stage.state.turn.entry.prompt.attempts
    stage.crash()
    assert stage.facts == ()
    assert stage.state.turn.entry.prompt.attempts == attempts


def test_what_a_repeated_call_asked_before_is_closed_it_will_ask_again() -> None:
    stage = Stage(rules=RESUME)
    stage.prompt("a")
    call = stage.call(idempotent=True)
    stage.answer("", call)
    ask = Ask(id="ask_1", session_id=SESSION, kind="question", created=1)
    stage.send(OpenAsk(part_id=call.part_id, ask=ask))
    stage.crash()
    assert stage.rows.asks["ask_1"].replied == "closed"
    assert list(stage.running) == [call.part_id]
    check_all(stage)


# --- set aside


@pytest.mark.parametrize("which", ["running", "waiting", "joined"])
def test_a_prompt_that_keeps_crashing_is_set_aside_and_the_rest_goes_on(which: str) -> None:
    stage = Stage(rules=RESUME)
    keys = {"running": stage.prompt("a"), "joined": stage.prompt("s", when_busy="steer")}
    call = stage.call()
    stage.answer("", call)
    stage.finish_tool(call)
    keys["waiting"] = stage.prompt("b")
    keys["last"] = stage.prompt("c")
    order = [message.id for message, _ in stage.rows.transcript()]
    stage.crash(set_aside=keys[which])
    assert stage.outcome(keys[which]) == "failed"
    assert "crashing" in stage.rows.prompts[keys[which]].reason
    if which == "joined":
        assert stage.outcome(keys["running"]) == "failed"
    assert [key for key in order if key in stage.rows.messages] == order
    check_all(stage)
    stage.answer()
    while stage.running:
        stage.answer()
    assert stage.outcome(keys["last"]) == "answered"
    check_settled(stage)


def test_setting_aside_all_that_waits_says_that_the_session_is_idle() -> None:
    stage = Stage()
    stage.prompt("a")
    waiting = stage.prompt("b")
    stage.send(Abort(reason="close"))
    stage.crash(set_aside=waiting)
    assert stage.outcome(waiting) == "failed"
    assert [fact.type for fact in stage.facts][-2:] == ["session.status", "session.idle"]
    check_settled(stage)


def test_setting_a_prompt_aside_ends_the_compaction_inside_its_turn() -> None:
    stage = Stage(rules=SMALL)
    key = stage.prompt("a")
    call = stage.call()
    stage.answer("", call, tokens=FULL)
    stage.finish_tool(call)
    stage.crash(set_aside=key)
    assert stage.outcome(key) == "failed"
    check_settled(stage)


# --- a crash at every point


def long_day(rules: Rules) -> Stage:
    """A run with everything in it."""
    stage = Stage(rules=rules)
    stage.prompt("first")
    calls = [stage.call(), stage.call("bash", permission="bash"), stage.call(idempotent=True)]
    stage.answer("looking", *calls)
    stage.prompt("queued")
    stage.prompt("steering", when_busy="steer")
    stage.finish_tool(calls[0])
    stage.send(RequestCompaction())
    stage.send(Reply(ask_id=stage.open_ask().id, reply="once"))
    stage.finish_tool(calls[2])
    stage.finish_tool(calls[1])
    stage.break_step("half", transient=True)
    call = stage.call()
    stage.answer("", call, tokens=FULL)
    stage.finish_tool(call)
    stage.fail_summary()
    key = stage.summary_id
    stage.send(StepProgress(message_id=key, parts=(stage.text(key, "half", done=False),)))
    stage.summarise()
    stage.answer("answered")
    stage.break_step(overflow=True)
    stage.summarise()
    stage.send(RequestCompaction(resume=True))
    stage.prompt("now", when_busy="interrupt")
    stage.answer()
    stage.summarise()
    stage.answer()
    check_settled(stage)
    return stage


@pytest.mark.parametrize("on_restart", ["interrupt", "resume"])
def test_a_crash_at_every_point_leaves_a_whole_session(on_restart: str) -> None:
    """A18, A19, C32: after any change, and again after the recovery itself."""
    rules = Rules(permissions=ASK.permissions, context_limit=10_000, on_restart=on_restart)
    day = long_day(rules)
    first = Stage(rules=rules)
    for end in range(len(day.changes) + 1):
        stage = Stage(rules=rules, seed=end)
        stage.rows = Rows(first.rows.info)
        for change in day.changes[:end]:
            for fact in change:
                stage.rows.apply(fact)
        accepted = set(stage.rows.prompts)
        stage.state = State(info=stage.rows.info, seq=10_000)
        stage.crash()
        check_all(stage)
        resting = not stage.running
        stage.crash()
        assert stage.facts == () or not resting
        check_all(stage)
        answer_everything(stage)
        assert set(stage.rows.prompts) >= accepted
        check_settled(stage)


def answer_everything(stage: Stage) -> None:
    for _ in range(100):
        if stage.rows.status.type == "idle":
            return
        for key, effect in list(stage.running.items()):
            reports: dict[str, Callable[[], object]] = {
                "RunStep": stage.answer,
                "RunSummary": stage.summarise,
                "RunTool": lambda key=key: stage.finish_tool(key),
            }
            reports[type(effect).__name__]()
            check_all(stage)
        for ask in list(stage.state.asks.values()):
            stage.send(Reply(ask_id=ask.id, reply="once"))
            check_all(stage)


def test_a_part_of_an_answer_is_never_touched_by_recovery() -> None:
    """A6, A7: the rows of everything that was done before are equal afterwards."""
    stage, calls = running_tools()
    stage.finish_tool(calls[1])
    stage.finish_tool(calls[2])
    stage.answer("done")
    stage.prompt("next")
    before = {
        part.id: part
        for message in stage.assistants()[:2]
        for part in stage.rows.parts[message.id].values()
    }
    stage.crash()
    after = {key: part for parts in stage.rows.parts.values() for key, part in parts.items()}
    assert {key: after[key] for key in before} == before
    assert any(isinstance(part, StepStartPart) for part in before.values())
    assert any(
        isinstance(part, ToolPart) and isinstance(part.state, ToolCompleted)
        for part in before.values()
    )


# --- a recovery that starts nothing ------------------------------------------------------------

REST = Rules(rest=True)


def rest(stage: Stage, rules: Rules = REST) -> Stage:
    """Recover it, and start nothing; another such recovery finds nothing more."""
    stage.rules = rules
    stage.crash()
    facts = stage.facts
    assert not stage.running
    stage.crash()
    assert stage.facts == ()
    stage.facts = facts
    return stage


def test_a_recovery_at_rest_closes_what_was_cut_short_and_leaves_the_queue() -> None:
    stage, _ = running_tools()
    waiting = stage.prompt("b")
    rest(stage)
    assert [prompt.outcome for prompt in stage.rows.prompts.values()] == ["interrupted", None]
    assert stage.state.status == IDLE
    stage.rules = Rules()
    stage.crash()
    assert stage.rows.prompts[waiting].turn is not None
    stage.answer()
    check_settled(stage)


@pytest.mark.parametrize("parked", [False, True])
def test_a_recovery_at_rest_repeats_no_call_though_turns_are_resumed(*, parked: bool) -> None:
    stage = Stage(rules=replace(ASK, on_restart="resume"))
    key = stage.prompt("a")
    repeat, asked = stage.call(idempotent=True), stage.call("bash", permission="bash")
    stage.answer("", repeat, *([asked] if parked else []))
    assert repeat.part_id in stage.running
    rest(stage, Rules(rest=True, on_restart="resume"))
    assert stage.part(repeat).state.interrupted
    assert stage.outcome(key) == (None if parked else "interrupted")
    check_all(stage)


def test_a_recovery_at_rest_finds_nothing_in_what_only_waits() -> None:
    stage = Stage(rules=ASK)
    stage.prompt("a")
    stage.answer("", stage.call(permission="bash"))
    stage.prompt("b")
    assert rest(stage).facts == ()
    assert len(stage.rows.asks) == 1


def test_a_recovery_at_rest_ends_a_compaction_as_a_close_does() -> None:
    stage, key = planted("summarising", turn=2)
    rest(stage)
    assert stage.marker(key).state == "failed"
    check_all(stage)
