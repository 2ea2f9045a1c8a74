"""What the model sees."""

import itertools
import random

import pytest
from core_stage import SESSION, context

from understudy.actors.core.context import (
    CLEARED,
    INTERRUPTED,
    SUMMARY_HEADING,
    distinct_id,
    plan_compaction,
    tokens_of_turns,
    visible,
)
from understudy.actors.models.protocol import AssistantTurn, UserFile, UserText, UserTurn
from understudy.store.records import (
    AnyPart,
    AssistantMessage,
    CompactionPart,
    Failure,
    FilePart,
    Message,
    MessageTime,
    Part,
    Revert,
    Span,
    SubtaskPart,
    TextPart,
    Tokens,
    ToolCompleted,
    ToolFailed,
    ToolPart,
    ToolPending,
    ToolRunning,
    ToolState,
    UserMessage,
)

Pair = tuple[Message, tuple[AnyPart, ...]]
TIME = MessageTime(created=1, completed=2)
SPAN = Span(start=1, end=2)


def owned(kind: type[Part], message_id: str, **fields: object) -> AnyPart:
    return kind(
        id=f"prt_{message_id}_{id(fields)}", session_id=SESSION, message_id=message_id, **fields
    )


def user(key: str, text: str = "", *, turn: int | None = 1) -> Pair:
    message = UserMessage(id=key, session_id=SESSION, time=TIME, turn=turn)
    return message, (owned(TextPart, key, text=text or key),)


def assistant(key: str, text: str = "", *parts: AnyPart, **fields: object) -> Pair:
    message = AssistantMessage(
        **(
            {
                "id": key,
                "session_id": SESSION,
                "parent_id": "u1",
                "turn": 1,
                "time": TIME,
                "tokens": Tokens(),
                "agent": "a",
                "mode": "a",
                "provider_id": "p",
                "model_id": "m",
                "finish": "stop",
            }
            | fields
        )
    )
    return message, (owned(TextPart, key, text=text or key), *parts)


def call(state: ToolState, call_id: str = "c") -> ToolPart:
    part = owned(ToolPart, "x", tool="read", call_id=call_id, state=state)
    assert isinstance(part, ToolPart)
    return part


def done(output: str = "output", call_id: str = "c", **fields: object) -> ToolPart:
    return call(
        ToolCompleted(input={}, output=output, title="", metadata={}, time=SPAN, **fields), call_id
    )


def compacted(key: str, **fields: object) -> list[Pair]:
    """A committed marker and its summary."""
    marker = UserMessage(id=key, session_id=SESSION, time=TIME, turn=1)
    part = owned(CompactionPart, key, state="committed", summary_id=f"{key}s", **fields)
    return [(marker, (part,)), assistant(f"{key}s", f"summary {key}", summary=True, parent_id=key)]


def shown(history: list[Pair], **options: object) -> list[str]:
    texts = []
    for turn in context(history, **options):
        if isinstance(turn, UserTurn):
            texts += [item.text for item in turn.content if isinstance(item, UserText)]
        else:
            texts.append(turn.text)
    return texts


@pytest.mark.parametrize(
    ("state", "output", "is_error"),
    [
        (ToolCompleted(input={}, output="out", title="", metadata={}, time=SPAN), "out", False),
        (ToolFailed(input={}, error="no file", time=SPAN), "no file", True),
        (ToolFailed(input={}, error="x", time=SPAN, interrupted=True), INTERRUPTED, True),
        (
            ToolFailed(input={}, error="timed out after 5 s", time=SPAN, interrupted=True),
            "timed out after 5 s",
            True,
        ),
        (ToolRunning(input={}, time=Span(start=1)), INTERRUPTED, True),
        (ToolPending(), INTERRUPTED, True),
    ],
)
def test_every_call_has_one_result_whatever_its_state(
    state: ToolState,
    output: str,
    is_error: bool,  # noqa: FBT001
) -> None:
    (_, turn) = context([user("u1"), assistant("a1", "t", call(state))])
    assert [(use.output, use.is_error) for use in turn.calls] == [(output, is_error)]


def test_call_ids_are_unique_in_a_request_however_models_choose_them() -> None:
    history = [user("u1")]
    for n, call_id in enumerate(["c", "c", "c-2", "c", "c-2", ""]):
        history.append(assistant(f"a{n}", "t", done(call_id=call_id), done(call_id=call_id)))
    ids = [use.call_id for turn in context(history)[1:] for use in turn.calls]
    assert len(set(ids)) == len(ids) == 12
    assert ids[0] == "c"


def test_distinct_ids_never_collide() -> None:
    chance = random.Random(1)
    for _ in range(2_000):
        taken: dict[str, int] = {}
        wanted = [chance.choice(["a", "a-2", "a-3", "a-2-2", "b"]) for _ in range(12)]
        names = [distinct_id(name, taken) for name in wanted]
        assert len(set(names)) == len(names)


def test_what_a_broken_stream_said_is_not_told_what_a_person_saw_is() -> None:
    def cut(name: str) -> Failure:
        return Failure(name=name, data={"message": "x"})

    history = [
        user("u1"),
        assistant("a1", "broken", error=cut("ModelUnavailable")),
        assistant("a2", "aborted", error=cut("MessageAbortedError")),
        user("u2"),
        assistant("a3", "restarted", error=cut("InterruptedError")),
    ]
    assert shown(history) == ["u1", "aborted", "u2", "restarted"]


def test_waiting_messages_and_the_open_answer_are_not_shown() -> None:
    history = [user("u1"), assistant("a1"), user("u2"), assistant("open"), user("q", turn=None)]
    assert shown(history, before="open") == ["u1", "a1", "u2"]


def test_a_revert_hides_from_its_message_on() -> None:
    history = [user("u1"), assistant("a1"), user("u2"), assistant("a2")]
    assert shown(history, revert=Revert(message_id="u2")) == ["u1", "a1"]


def test_files_and_subtasks_are_shown() -> None:
    message, parts = user("u1", "look")
    file = owned(FilePart, "u1", mime="image/png", url="data:x", filename="f.png")
    subtask = owned(SubtaskPart, "u1", prompt="do it")
    (turn,) = context([(message, (*parts, file, subtask))])
    assert turn.content == (
        UserText("look"),
        UserFile("image/png", "data:x", "f.png"),
        UserText("do it"),
    )


def test_long_outputs_are_cut_in_the_middle_and_old_ones_cleared() -> None:
    (_, turn) = context(
        [user("u1"), assistant("a1", "t", done("x" * 60), done("y", compacted=5))], tool_output=20
    )
    assert turn.calls[0].output == "x" * 10 + "\n[… 40 characters cut …]\n" + "x" * 10
    assert turn.calls[1].output == CLEARED
    history = [user("u1"), *(assistant(f"a{n}", "t", done(f"r{n}")) for n in range(12))]
    outputs = [turn.calls[0].output for turn in context(history, prune=True)[1:]]
    assert outputs == [CLEARED, CLEARED, *(f"r{n}" for n in range(2, 12))]


# --- compactions


BEFORE = [user("u1"), assistant("a1"), user("u2"), assistant("a2")]


def test_a_summary_stands_for_the_head_and_the_tail_stays() -> None:
    history = [*BEFORE, *compacted("m1", head_end_id="a1", tail_start_id="u2"), user("u3")]
    assert shown(history) == [SUMMARY_HEADING + "summary m1", "u2", "a2", "u3"]


def test_no_tail_is_kept_when_there_is_none() -> None:
    history = [*BEFORE, *compacted("m1", head_end_id="a2"), user("u3")]
    assert shown(history) == [SUMMARY_HEADING + "summary m1", "u3"]


def test_a_tail_whose_start_is_gone_begins_after_the_head() -> None:
    """C40."""
    history = [*BEFORE, *compacted("m1", head_end_id="a1", tail_start_id="gone"), user("u3")]
    assert shown(history)[1:] == ["u2", "a2", "u3"]


def test_a_head_that_ends_after_its_marker_is_not_shown_again() -> None:
    marker, summary = compacted("m1", head_end_id="a1", tail_start_id="a2")
    history = [user("u1"), marker, assistant("a1"), assistant("a2"), summary, user("u3")]
    assert shown(history) == [SUMMARY_HEADING + "summary m1", "a2", "u3"]


def test_the_newest_compaction_counts() -> None:
    history = [
        *BEFORE[:2],
        *compacted("m1", head_end_id="u1", tail_start_id="a1"),
        *BEFORE[2:],
        *compacted("m2", head_end_id="a2"),
        user("u3"),
    ]
    assert shown(history) == [SUMMARY_HEADING + "summary m2", "u3"]


@pytest.mark.parametrize(
    "fault", ["active", "failed", "gone", "error", "empty", "open", "reverted"]
)
def test_history_is_never_replaced_by_a_summary_that_is_not_there(fault: str) -> None:
    """C36, C21."""
    (message, (part,)), (summary, texts) = compacted("m1", head_end_id="a2")
    revert = None
    if fault in ("active", "failed"):
        state = "summarising" if fault == "active" else "failed"
        part = owned(CompactionPart, "m1", state=state, summary_id="m1s", head_end_id="a2")
    pair: list[Pair] = [(summary, texts)]
    if fault == "gone":
        pair = []
    elif fault == "error":
        pair = [assistant("m1s", "x", summary=True, error=Failure(name="E", data={}))]
    elif fault == "empty":
        pair = [(summary, ())]
    elif fault == "open":
        pair = [assistant("m1s", "x", summary=True, time=MessageTime(created=1))]
    elif fault == "reverted":
        revert = Revert(message_id="m1s")
    history = [*BEFORE, (message, (part,)), *pair]
    assert shown(history, revert=revert) == ["u1", "a1", "u2", "a2"]


def test_a_fork_with_new_ids_sees_the_same() -> None:
    history = [*BEFORE, *compacted("m1", head_end_id="a1", tail_start_id="u2"), user("u3")]
    forked = [
        user("f1"),
        assistant("fa1"),
        user("fu2", "u2"),
        assistant("fa2", "a2"),
        *compacted("f9", head_end_id="fa1", tail_start_id="fu2"),
        user("fu3", "u3"),
    ]
    assert shown(forked)[1:] == shown(history)[1:]


# --- plans


def test_sizes_count_text_calls_results_and_files() -> None:
    def size(*history: Pair) -> int:
        return tokens_of_turns(context(list(history)))

    assert size(user("u1", "x" * 40)) == 4 + 11
    message, parts = user("u1", "x" * 40)
    file = owned(FilePart, "u1", mime="image/png", url="data:" + "x" * 100_000)
    assert size((message, (*parts, file))) == 4 + 11 + 1_000
    answer = assistant("a1", "y" * 80, done("z" * 400))
    assert size(answer) == 4 + 21 + (1 + 101 + 8)


def test_a_plan_divides_everything_visible_and_nothing_is_in_neither() -> None:
    """C35."""
    for length, tail in itertools.product((1, 2, 5, 40), (0, 20, 1_000)):
        history = [user("u0", "the start")]
        history += [assistant(f"a{n}", f"words {n} " * 9, done(f"r{n}")) for n in range(length)]
        marker, summary = compacted("m1")
        plan = plan_compaction([*history, marker], tail=tail, chunk=1_000)
        assert plan is not None
        ids = [message.id for message, _ in history]
        end = ids.index(plan.head_end_id or "")
        assert plan.tail_start_id == (ids[end + 1] if end + 1 < len(ids) else None)
        head = "".join(plan.chunks)
        assert all(f"words {n} " in head for n in range(length) if ids.index(f"a{n}") <= end)
        assert plan.tail <= tail
        marker, summary = compacted(
            "m1", head_end_id=plan.head_end_id, tail_start_id=plan.tail_start_id
        )
        kept = [m.id for m, _ in visible([*history, marker, summary]).messages]
        assert kept == ids[end + 1 :]


def test_an_earlier_summary_is_part_of_the_next_one_s_input() -> None:
    history = [*BEFORE, *compacted("m1", head_end_id="a2"), user("u3"), assistant("a3")]
    plan = plan_compaction(history, tail=0, chunk=1_000)
    assert plan is not None
    assert "summary m1" in plan.chunks[0]
    assert "u3" in plan.chunks[0]
    assert "u1" not in plan.chunks[0]


def test_an_unfinished_summary_is_not_part_of_its_own_input() -> None:
    """C14."""
    marker, _ = compacted("m1")
    half = assistant("m1s", "half a summary", summary=True, time=MessageTime(created=1))
    plan = plan_compaction([*BEFORE, marker, half], tail=0, chunk=1_000)
    assert plan is not None
    assert "half a summary" not in "".join(plan.chunks)


def test_chunks_are_bounded() -> None:
    """F89."""
    history = [user("u1")]
    history += [assistant(f"a{n}", "w" * 9_000, done("r" * 9_000)) for n in range(30)]
    plan = plan_compaction(history, tail=0, chunk=500)
    assert plan is not None
    assert len(plan.chunks) > 10
    assert max(map(len, plan.chunks)) <= 500 * 4 + 100


@pytest.mark.parametrize("history", [[], compacted("m1")[:1]])
def test_there_is_no_plan_for_nothing(history: list[Pair]) -> None:
    assert plan_compaction(history, tail=0, chunk=100) is None


def test_assistant_turns_keep_text_before_calls() -> None:
    turn = context([user("u1"), assistant("a1", "text", done())])[1]
    assert isinstance(turn, AssistantTurn)
    assert (turn.text, len(turn.calls)) == ("text", 1)
