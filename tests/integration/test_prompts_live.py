"""Prompts against a running runtime: accepted once, in order, or refused with nothing stored."""

import asyncio
import math
import threading

import msgspec
import pytest
from fold import stored

from understudy import CompactionRules, FilePart, Limits, ScriptedModel, TextPart, errors, tool
from understudy.actors.messages import Prove
from understudy.actors.models.scripted import Call, Gate, Say, Wait
from understudy.actors.pending import Pending
from understudy.store.records import PermissionRule


def last_text(request):
    return "\n".join(content.text for content in request.turns[-1].content)


def held(gate):
    """A model that holds its first answer until the gate opens, and echoes the rest."""
    first = [True]

    def play(request):
        if request.purpose == "summary":
            return Say("short")
        if first:
            first.clear()
            return [Wait(gate), Say("first done")]
        users = [turn for turn in request.turns if hasattr(turn, "content")]
        return Say("said " + users[-1].content[-1].text)

    return ScriptedModel(play)


def test_prompts_are_answered_first_come_first_served(opened):
    gate = Gate()
    runtime = opened(held(gate))
    session = runtime.create_session()
    turns = [session.prompt(f"prompt {n}") for n in range(8)]
    assert session.status().queued == 7
    gate.open()
    texts = [turn.result(timeout_s=10).text for turn in turns]
    assert texts == ["first done"] + [f"said prompt {n}" for n in range(1, 8)]
    assert [m.text for m in session.messages() if m.role == "user"] == [
        f"prompt {n}" for n in range(8)
    ]


def test_a_steering_prompt_joins_the_running_turn(opened):
    gate = Gate()
    runtime = opened(held(gate))
    session = runtime.create_session()
    first = session.prompt("go")
    queued = session.prompt("afterwards")
    gate.wait_reached()
    steer = session.prompt("and in English", when_busy="steer")
    gate.open()
    assert first.result(timeout_s=10).text == "said and in English"
    assert steer.result(timeout_s=10).text == "said and in English"
    assert queued.result(timeout_s=10).text == "said afterwards"


@pytest.mark.parametrize(
    ("steer", "prune", "readings"), [(False, False, 0), (True, False, 1), (False, True, 4)]
)
def test_the_history_is_read_where_more_was_said_than_answers(opened, steer, prune, readings):
    steered, seen, history = Gate(), [], []

    @tool
    def look(at: int) -> str:
        """Look at something."""
        return f"saw {at}"

    def play(request):
        seen.append(list(request.turns))
        steps = len(request.turns) - 1
        wait = [Wait(steered)] if steer and len(seen) == 2 else []
        return [*wait, Call("look", {"at": steps})] if len(seen) < 4 else [Say("done")]

    runtime = opened(ScriptedModel(play), tools=[look], compaction=CompactionRules(prune=prune))
    reads = runtime.engine.store.read
    real = reads.history
    reads.history = lambda session_id: history.append(session_id) or real(session_id)
    session = runtime.create_session()
    turn = session.prompt("go")
    if steer:
        steered.wait_reached()
        session.prompt("and in English", when_busy="steer")
        steered.open()
    assert turn.result(timeout_s=10).text == "done"
    assert len(history) == readings
    outputs = [[call.output for call in said.calls] for said in seen[-1] if hasattr(said, "calls")]
    assert outputs == [[output] for output in ("saw 0", "saw 1", f"saw {3 if steer else 2}")]
    asked = [said.content[0].text for said in seen[-1] if hasattr(said, "content")]
    assert asked == (["go", "and in English"] if steer else ["go"])


def test_an_interrupting_prompt_ends_the_running_turn_and_goes_first(opened):
    gate = Gate()
    runtime = opened(held(gate))
    session = runtime.create_session()
    first = session.prompt("go")
    queued = session.prompt("later")
    gate.wait_reached()
    urgent = session.prompt("now", when_busy="interrupt")
    with pytest.raises(errors.TurnAborted) as caught:
        first.result(timeout_s=10)
    assert caught.value.reason == "interrupt"
    assert urgent.result(timeout_s=10).text == "said now"
    assert queued.result(timeout_s=10).text == "said later"
    assert [m.text for m in session.messages() if m.role == "user"] == ["go", "now", "later"]


def test_a_rejected_prompt_leaves_nothing(opened, path):
    gate = Gate()
    runtime = opened(held(gate))
    session = runtime.create_session()
    first = session.prompt("go")
    gate.wait_reached()
    before, cursor = stored(path)
    with pytest.raises(errors.SessionBusy) as caught:
        session.prompt("me too", when_busy="reject", message_id="msg_x")
    assert caught.value.session_id == session.id
    assert stored(path) == (before, cursor)
    gate.open()
    first.result(timeout_s=10)
    assert session.prompt("me too", when_busy="reject", message_id="msg_x").result().text


def test_one_message_id_is_one_turn_for_twenty_threads(opened, crew):
    model = ScriptedModel("hello")
    runtime = opened(model)
    session = runtime.create_session()

    def ask():
        turn = session.prompt("only once", message_id="msg_same")
        return turn.message_id, turn.result(timeout_s=10).text

    outcomes = crew().call(ask, times=20).start().outcomes()
    assert outcomes == [("msg_same", "hello")] * 20
    assert model.calls == 1
    assert len(session.prompts()) == 1
    assert len(session.messages()) == 2


def test_one_message_id_is_one_turn_though_the_first_is_not_committed_yet(opened):
    async def scene():
        runtime = opened(ScriptedModel("hello"))
        session = await runtime.create_session()
        renamed, go_on = await held_behind_a_commit(runtime, session)
        same = [session.prompt("once", message_id="msg_same") for _ in range(3)]
        other = session.prompt("other", message_id="msg_other")  # all wait for one and the same
        go_on()
        await renamed
        assert {(await turn).message_id for turn in same} == {"msg_same"}
        for turn in (*same, other):
            await turn.result(timeout_s=15)
        accepted = [
            event.data.info.message_id
            for event in runtime.engine.store.read.events(after=0)
            if event.type == "prompt.accepted"
        ]
        assert accepted == ["msg_same", "msg_other"]

    asyncio.run(scene())


def test_one_message_id_with_many_contents_is_one_turn_and_conflicts(opened, crew):
    runtime = opened()
    session = runtime.create_session()

    def ask(number):
        return session.prompt(f"content {number}", message_id="msg_same").result(timeout_s=10).text

    calls = crew()
    for number in range(12):
        calls.call(ask, number)
    outcomes = calls.start().outcomes()
    answered = [each for each in outcomes if isinstance(each, str)]
    conflicts = [each for each in outcomes if isinstance(each, errors.PromptConflict)]
    assert len(answered) == 1 and len(conflicts) == 11
    assert conflicts[0].message_id == "msg_same"
    assert len(session.prompts()) == 1


def test_one_message_id_is_the_same_turn_after_a_restart(opened, path):
    model = ScriptedModel("hello")
    runtime = opened(model)
    session = runtime.create_session()
    assert session.prompt(["do", "it"], message_id="msg_same").result().text == "hello"
    runtime.close()
    again = opened(model)
    session = again.session(session.id)
    assert session.prompt(["do", "it"], message_id="msg_same").result().text == "hello"
    assert model.calls == 1
    for changed in (
        {"prompt": "do it"},
        {"prompt": ["do", "it"], "system": "other"},
        {"prompt": ["do", "it"], "tools": {"*": False}},
        {"prompt": ["do", "it"], "agent": "plan"},
    ):
        with pytest.raises(errors.PromptConflict):
            session.prompt(message_id="msg_same", **changed)
    assert len(session.prompts()) == 1


def test_a_message_id_of_an_answer_is_not_free(opened):
    runtime = opened()
    session = runtime.create_session()
    reply = session.prompt("hi").result()
    with pytest.raises(errors.PromptConflict):
        session.prompt("hi", message_id=reply.message.id)


def test_a_message_id_belongs_to_its_session(opened):
    runtime = opened()
    one, two = runtime.create_session(), runtime.create_session()
    assert one.prompt("1", message_id="msg_a").result().text == "1"
    assert two.prompt("2", message_id="msg_a").result().text == "2"


def test_the_queue_has_a_limit(opened, path):
    gate = Gate()
    runtime = opened(held(gate), limits=Limits(queue=3))
    session = runtime.create_session()
    turns = [session.prompt(str(n)) for n in range(4)]
    gate.wait_reached()
    before = stored(path)
    with pytest.raises(errors.SessionBusy):
        session.prompt("one too many")
    assert stored(path) == before
    gate.open()
    assert [bool(turn.result(timeout_s=10).text) for turn in turns] == [True] * 4


@pytest.mark.parametrize(
    "text",
    [
        "a\0b",
        "\U0001f600 ẞ \u202e rtl",
        "'; DROP TABLE session; --",
        "x" * 500_000,
        "line\r\nline\x1b[31m",
    ],
    ids=["nul", "emoji", "sql", "long", "control"],
)
def test_any_valid_text_goes_through_unchanged(opened, text):
    runtime = opened(compaction=CompactionRules(auto=False))
    session = runtime.create_session()
    assert session.prompt(text).result(timeout_s=10).text == text
    assert [message.text for message in session.messages()] == [text, text]


def test_a_file_and_texts_are_one_prompt(opened, tmp_path):
    file = tmp_path / "note.txt"
    file.write_text("inside")
    seen = []

    def play(request):
        seen.append(request.turns[-1].content)
        return Say("ok")

    runtime = opened(ScriptedModel(play))
    session = runtime.create_session()
    session.prompt(["look at", file]).result()
    assert len(seen[0]) == 2
    with pytest.raises(errors.InvalidInput):
        session.prompt([tmp_path / "none.txt"])
    with pytest.raises(errors.InvalidInput):
        session.prompt(tmp_path)


def part(cls, **values):
    return cls(id="", session_id="", message_id="", **values)


BAD_PROMPTS = {
    "empty": {"prompt": ""},
    "blank": {"prompt": " \n\t"},
    "no parts": {"prompt": []},
    "blank parts": {"prompt": ["", "  "]},
    "None": {"prompt": None},
    "a number": {"prompt": 7},
    "bytes": {"prompt": b"hello"},
    "a mapping": {"prompt": {"text": "hello"}},
    "a generator": {"prompt": (each for each in "ab")},
    "a number among parts": {"prompt": ["a", 1]},
    "a lone surrogate": {"prompt": "\ud800"},
    "a lone surrogate in a part": {"prompt": ["a", "b\udfff"]},
    "a surrogate in a text part": {"prompt": [part(TextPart, text="\ud800")]},
    "a text part of a number": {"prompt": [part(TextPart, text=1)]},
    "a file without a url": {"prompt": [part(FilePart, mime="text/plain", url=None)]},
    "a file with a surrogate": {"prompt": [part(FilePart, mime="\ud800", url="data:,x")]},
    "a file with a surrogate name": {
        "prompt": [part(FilePart, mime="text/plain", url="data:,x", filename="\ud800")]
    },
    "a file with a number for a mime": {"prompt": [part(FilePart, mime=1, url="data:,x")]},
    "too large": {"prompt": "x" * 2_001},
    "too large in parts": {"prompt": ["x" * 1_001, "y" * 1_001]},
    "an unknown when_busy": {"prompt": "a", "when_busy": "wait"},
    "a number for when_busy": {"prompt": "a", "when_busy": 1},
    "an unhashable when_busy": {"prompt": "a", "when_busy": []},
    "an empty message id": {"prompt": "a", "message_id": ""},
    "a message id with a slash": {"prompt": "a", "message_id": "a/b"},
    "a message id with NUL": {"prompt": "a", "message_id": "a\0"},
    "a long message id": {"prompt": "a", "message_id": "a" * 200},
    "a number for a message id": {"prompt": "a", "message_id": 5},
    "a number for system": {"prompt": "a", "system": 5},
    "a surrogate in system": {"prompt": "a", "system": "\ud800"},
    "a number for agent": {"prompt": "a", "agent": 5},
    "an unknown model": {"prompt": "a", "model": "none/such"},
    "a number for model": {"prompt": "a", "model": 5},
    "a list for tools": {"prompt": "a", "tools": ["read"]},
    "a word for tools": {"prompt": "a", "tools": "read"},
    "a surrogate in tools": {"prompt": "a", "tools": {"\ud800": True}},
    "a negative time": {"prompt": "a", "timeout_s": -1},
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_an_unusable_prompt_is_refused_and_nothing_is_stored(opened, path, case):
    runtime = opened(limits=Limits(prompt_bytes=2_000))
    session = runtime.create_session()
    before = stored(path)
    with pytest.raises(errors.InvalidInput):
        session.prompt(**BAD_PROMPTS[case])
    assert stored(path) == before
    assert session.prompt("still here").result().text == "still here"
    assert runtime.restarts == 0


def test_an_unknown_tool_is_named_with_the_one_it_is_like(opened):
    def weather(city: str) -> str:
        return city

    runtime = opened(tools=[weather])
    session = runtime.create_session()
    with pytest.raises(errors.InvalidInput, match="'wether': did you mean weather") as refused:
        session.prompt("Hello", tools={"wether": False})
    assert refused.value.field == "tools"
    with pytest.raises(errors.InvalidInput, match="there is weather"):
        session.prompt("Hello", tools={"zzz": False})
    assert len(session.prompts()) == 0
    switches = {"*": False, "weather": True}
    assert session.prompt("Hello", tools=switches).result().text == "Hello"


def test_a_message_that_is_not_there_is_called_a_message_and_a_prompt_a_prompt(opened):
    session = opened().create_session()
    session.prompt("Hello").result()
    with pytest.raises(errors.MessageNotFound, match="No message msg_none in session"):
        session.messages(before="msg_none")
    with pytest.raises(errors.MessageNotFound, match="No prompt msg_none in session"):
        session.turn("msg_none")


CIRCLE = {}
CIRCLE["again"] = CIRCLE

BAD_SESSIONS = {
    "a surrogate title": {"title": "\ud800"},
    "a number for a title": {"title": 5},
    "an enormous title": {"title": "x" * 100_000},
    "an id with a space": {"session_id": "a b"},
    "an empty id": {"session_id": ""},
    "a number for an id": {"session_id": 5},
    "a parent's id with NUL": {"parent_id": "\0"},
    "a number for a directory": {"directory": 5},
    "a surrogate in a directory": {"directory": "\ud800"},
    "metadata that is a list": {"metadata": [1]},
    "metadata that JSON cannot say": {"metadata": {"a": object()}},
    "metadata with a surrogate": {"metadata": {"a": "\ud800"}},
    "metadata with NaN": {"metadata": {"a": [math.nan]}},
    "metadata with infinity": {"metadata": {"a": {"b": math.inf}}},
    "metadata with a surrogate key": {"metadata": {"\ud800": 1}},
    "metadata in a circle": {"metadata": CIRCLE},
    "an unknown model": {"model": "none/such"},
    "a number for an agent": {"agent": 5},
    "a surrogate agent": {"agent": "\ud800"},
    "an unknown action": {"permissions": {"bash": "perhaps"}},
    "permissions that are a word": {"permissions": "allow"},
    "permissions that are a number": {"permissions": 5},
    "a number for a permission": {"permissions": {5: "allow"}},
    "a number for a pattern": {"permissions": {"bash": {5: "allow"}}},
    "a surrogate in a rule": {"permissions": {"bash": {"\ud800": "allow"}}},
    "a rule with an unknown action": {
        "permissions": [PermissionRule(permission="a", pattern="*", action="no")]
    },
    "a word for internal": {"internal": "yes"},
}


@pytest.mark.parametrize("case", BAD_SESSIONS)
def test_an_unusable_session_is_refused_and_nothing_is_stored(opened, path, case):
    runtime = opened()
    before = stored(path)
    with pytest.raises(errors.InvalidInput):
        runtime.create_session(**BAD_SESSIONS[case])
    assert stored(path) == before
    runtime.create_session()


UPDATES = [
    name
    for name, values in BAD_SESSIONS.items()
    if set(values) <= {"title", "directory", "metadata", "model", "permissions"}
]


@pytest.mark.parametrize("case", UPDATES)
def test_an_unusable_update_is_refused_and_nothing_is_stored(opened, path, case):
    runtime = opened()
    session = runtime.create_session(title="kept")
    before = stored(path)
    with pytest.raises(errors.InvalidInput):
        session.update(**BAD_SESSIONS[case])
    assert stored(path) == before
    assert session.refresh().title == "kept"


BAD_CALLS = {
    "session: a number": (errors.InvalidInput, lambda r, s: r.session(5)),
    "session: a space": (errors.InvalidInput, lambda r, s: r.session("a b")),
    "session: unknown": (errors.SessionNotFound, lambda r, s: r.session("ses_none")),
    "parent: unknown": (
        errors.SessionNotFound,
        lambda r, s: r.create_session(parent_id="ses_none"),
    ),
    "create: taken": (errors.SessionExists, lambda r, s: r.create_session(session_id=s.id)),
    "fork: before nothing": (errors.MessageNotFound, lambda r, s: s.fork(before="msg_none")),
    "fork: before a number": (errors.InvalidInput, lambda r, s: s.fork(before=5)),
    "fork: a bad title": (errors.InvalidInput, lambda r, s: s.fork(title=5)),
    "turn: unknown": (errors.MessageNotFound, lambda r, s: s.turn("msg_none")),
    "turn: a number": (errors.InvalidInput, lambda r, s: s.turn(5)),
    "revert: unknown": (errors.MessageNotFound, lambda r, s: s.revert("msg_none")),
    "revert: a number": (errors.InvalidInput, lambda r, s: s.revert(5)),
    "messages: negative": (errors.InvalidInput, lambda r, s: s.messages(limit=-1)),
    "messages: a word": (errors.InvalidInput, lambda r, s: s.messages(limit="all")),
    "messages: before nothing": (
        errors.MessageNotFound,
        lambda r, s: s.messages(before="msg_none"),
    ),
    "snapshot: negative": (errors.InvalidInput, lambda r, s: s.snapshot(limit=-1)),
    "sessions: negative": (errors.InvalidInput, lambda r, s: r.sessions(limit=-1)),
    "sessions: a word": (errors.InvalidInput, lambda r, s: r.sessions(limit="all")),
    "sessions: bad order": (errors.InvalidInput, lambda r, s: r.sessions(order="title")),
    "sessions: bad search": (errors.InvalidInput, lambda r, s: r.sessions(search=5)),
    "sessions: surrogate search": (
        errors.InvalidInput,
        lambda r, s: r.sessions(search="\ud800"),
    ),
    "sessions: bad parent": (errors.InvalidInput, lambda r, s: r.sessions(parent_id=5)),
    "events: a word": (errors.InvalidInput, lambda r, s: r.events(after="now")),
    "events: negative": (errors.InvalidInput, lambda r, s: r.events(after=-1)),
    "events: no such type": (errors.InvalidInput, lambda r, s: r.events(types="deltas")),
    "events: empty buffer": (errors.InvalidInput, lambda r, s: r.events(buffer=0)),
    "events: unknown": (errors.SessionNotFound, lambda r, s: r.events(session_id="ses_none")),
    "reply: unknown": (errors.AskNotFound, lambda r, s: r.reply("per_none", "once")),
    "reply: a number": (errors.InvalidInput, lambda r, s: r.reply(5, "once")),
    "reply: feedback": (
        errors.InvalidInput,
        lambda r, s: r.reply("per_none", "reject", feedback="\ud800"),
    ),
    "reply: answers": (
        errors.InvalidInput,
        lambda r, s: r.reply("que_none", answers=[["\ud800"]]),
    ),
    "reply: not answers": (errors.InvalidInput, lambda r, s: r.reply("que_none", answers=5)),
    "wait_idle: negative": (errors.InvalidInput, lambda r, s: s.wait_idle(timeout_s=-1)),
    "abort: a word": (errors.InvalidInput, lambda r, s: s.abort(queued="no")),
    "archive: a word": (errors.InvalidInput, lambda r, s: s.archive("no")),
    "delete: a word": (errors.InvalidInput, lambda r, s: s.delete(missing_ok="no")),
    "sessions: roots": (errors.InvalidInput, lambda r, s: r.sessions(roots="no")),
    "sessions: archived": (errors.InvalidInput, lambda r, s: r.sessions(archived="no")),
    "sessions: internal": (errors.InvalidInput, lambda r, s: r.sessions(internal=0)),
    "reply: a word": (errors.InvalidInput, lambda r, s: r.reply("per_none", "perhaps")),
    "reply: no word": (errors.InvalidInput, lambda r, s: r.reply("per_none", "")),
    "wait_idle: NaN": (errors.InvalidInput, lambda r, s: s.wait_idle(timeout_s=math.nan)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_an_unusable_call_gets_a_typed_error_and_changes_nothing(opened, path, case):
    runtime = opened()
    session = runtime.create_session()
    session.prompt("hi").result()
    session.wait_idle()
    before = stored(path)
    expected, call = BAD_CALLS[case]
    with pytest.raises(expected):
        call(runtime, session)
    assert stored(path) == before
    assert session.prompt("still here").result().text == "still here"
    assert runtime.restarts == 0


def test_a_deleted_session_answers_every_call_with_not_found(opened):
    runtime = opened()
    session = runtime.create_session()
    turn = session.prompt("hi")
    turn.result()
    session.delete()
    for call in (
        lambda: session.prompt("x"),
        session.abort,
        session.compact,
        lambda: session.update(title="x"),
        session.fork,
        session.delete,
        session.refresh,
        session.messages,
        session.prompts,
        session.status,
        session.wait_idle,
        session.events,
        turn.result,
        lambda: runtime.session(session.id),
    ):
        with pytest.raises(errors.SessionNotFound):
            call()
    again = runtime.create_session(session_id=session.id)
    assert list(again.messages()) == []
    assert again.prompt("anew").result().text == "anew"


def test_errors_survive_pickling():
    import pickle

    error = errors.PromptConflict("words", session_id="ses_1", message_id="msg_1")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.session_id, copy.message_id, str(copy)) == ("ses_1", "msg_1", "words")


def test_an_abort_of_one_waiting_prompt_leaves_the_others(opened):
    gate = Gate()
    runtime = opened(held(gate))
    session = runtime.create_session()
    first, second, third = (session.prompt(str(n)) for n in range(3))
    gate.wait_reached()
    assert second.abort()
    assert not second.abort()
    with pytest.raises(errors.TurnAborted):
        second.result(timeout_s=10)
    gate.open()
    assert first.result(timeout_s=10).text == "first done"
    assert third.result(timeout_s=10).text == "said 2"
    assert not first.abort()


def test_abort_with_queued_ends_what_waits_too(opened):
    gate = Gate()
    runtime = opened(held(gate))
    session = runtime.create_session()
    turns = [session.prompt(str(n)) for n in range(4)]
    gate.wait_reached()
    assert session.abort(queued=True)
    for turn in turns:
        with pytest.raises(errors.TurnAborted):
            turn.result(timeout_s=10)
    assert [prompt.outcome for prompt in session.prompts()] == ["interrupted"] * 4
    assert session.status().type == "idle"


def test_metadata_is_kept_as_json(opened):
    runtime = opened()
    given = {"n": 1, "deep": {"list": [1, 2.5, None, True, "ü\0"]}}
    session = runtime.create_session(metadata=given)
    given["n"] = 2
    assert session.metadata["n"] == 1
    assert runtime.session(session.id).metadata["deep"]["list"] == [1, 2.5, None, True, "ü\0"]
    assert msgspec.json.encode(session.record)


def hold_the_writer(runtime):
    """Let commands gather behind a transaction; the result lets it end."""
    begun, held = threading.Event(), threading.Event()

    def hold(tx):
        begun.set()
        return held.wait(15), []

    runtime.engine.store.submit(hold, lambda *_: None)
    assert begun.wait(15)
    return held.set


async def held_behind_a_commit(runtime, session, look=lambda change: None):
    """Let a session's commands gather behind a commit of its own; ``look`` sees each change.

    Gives the command that is being committed, and what lets it go on.
    """
    commit, committing = runtime.engine.store.commit, threading.Event()

    def watched(change, done, **options):
        look(change)
        commit(change, done, **options)
        committing.set()

    runtime.engine.store.commit = watched
    go_on = hold_the_writer(runtime)
    renamed = session.update(title="a commit to wait behind")
    assert await asyncio.to_thread(committing.wait, 15)
    return renamed, go_on


async def is_told_of_its_end(turn, *ends):
    """Accepted, and over."""
    await turn
    with pytest.raises(ends):
        await turn.result(timeout_s=15)


def test_a_prompt_that_is_aborted_in_the_very_change_that_accepts_it_is_told(opened):
    async def scene():
        gate = Gate()
        runtime = opened(ScriptedModel([[Wait(gate), Say("first")]]))
        session = await runtime.create_session()
        await session.prompt("first")
        await asyncio.to_thread(gate.wait_reached)
        go_on = hold_the_writer(runtime)
        renamed = session.update(title="a commit to wait behind")
        turn, aborted = session.prompt("second"), session.abort(queued=True)
        go_on()
        await is_told_of_its_end(turn, errors.TurnAborted)
        await renamed
        await aborted

    asyncio.run(scene())


@pytest.mark.parametrize("first", ["the repeat", "the abort"])
def test_a_prompt_that_is_repeated_in_the_very_change_that_ends_it_is_told(opened, first):
    async def scene():
        gate = Gate()
        runtime = opened(ScriptedModel([[Wait(gate), Say("never")]]))
        session = await runtime.create_session()
        await session.prompt("go", message_id="msg_1")
        await asyncio.to_thread(gate.wait_reached)
        go_on = hold_the_writer(runtime)
        renamed = session.update(title="a commit to wait behind")
        if first == "the abort":
            aborted, turn = session.abort(), session.prompt("go", message_id="msg_1")
        else:
            turn, aborted = session.prompt("go", message_id="msg_1"), session.abort()
        go_on()
        await is_told_of_its_end(turn, errors.TurnAborted)
        await renamed
        await aborted

    asyncio.run(scene())


def test_a_prompt_whose_session_is_deleted_with_its_parent_just_then_is_told(opened, eventually):
    async def scene():
        gate = Gate()
        runtime = opened(ScriptedModel([[Wait(gate), Say("never")]]))
        parent = await runtime.create_session()
        child = await runtime.create_session(parent_id=parent.id)
        go_on = hold_the_writer(runtime)
        waiting = runtime.engine.store._writer._lane._items
        turn = child.prompt("go")
        await asyncio.to_thread(eventually, lambda: waiting.qsize() >= 1)
        deleted = parent.delete()
        await asyncio.to_thread(eventually, lambda: waiting.qsize() >= 2)
        go_on()
        await is_told_of_its_end(turn, errors.TurnAborted, errors.SessionNotFound)
        await deleted

    asyncio.run(scene())


def test_a_claim_is_proven_by_a_commit_whatever_is_asked_beside_it(opened):
    async def scene():
        runtime = opened(ScriptedModel(["done"]))
        session = await runtime.create_session()
        await (await session.prompt("go", message_id="msg_1")).result(timeout_s=15)
        proven, before = Pending(), []

        def look(change):
            if not change.facts:
                before.append(proven.done)

        renamed, go_on = await held_behind_a_commit(runtime, session, look)
        runtime.engine.registry.tell_live(session.id, Prove(), proven)
        turn = session.prompt("go", message_id="msg_1")
        go_on()
        await turn
        await renamed
        assert before == [False]
        assert proven.done

    asyncio.run(scene())
