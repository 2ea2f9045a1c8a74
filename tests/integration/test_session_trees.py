"""Forks, reverts, listings, and trees of sessions that are aborted and deleted as one."""

import threading
import time

import pytest
from fold import stored

from understudy import Limits, ScriptedModel, ToolContext, errors, tool
from understudy.actors.models.protocol import AssistantTurn
from understudy.actors.models.scripted import Call

HANGING = threading.Event()
STARTED = threading.Semaphore(0)


@tool
def hang() -> str:
    """Never return by itself."""
    STARTED.release()
    HANGING.wait(30)
    return "late"


@pytest.fixture(autouse=True)
def _release(opened):
    HANGING.clear()
    yield
    HANGING.set()


def family(runtime, *, busy=(0, 1, 2)):
    """Three generations, two in the last; those at a busy depth run a tool."""
    root = runtime.create_session(title="root")
    child = runtime.create_session(parent_id=root.id)
    grandchildren = [runtime.create_session(parent_id=child.id) for _ in range(2)]
    turns = []
    for depth, group in enumerate(([root], [child], grandchildren)):
        turns += [session.prompt("go") for session in group if depth in busy]
    for _ in turns:
        assert STARTED.acquire(timeout=10)
    return root, child, grandchildren, turns


@pytest.mark.parametrize("busy", [(0, 1, 2), (0, 2), (1, 2), (2,)], ids=str)
def test_an_abort_reaches_every_descendant_with_running_tools(opened, busy):
    runtime = opened(ScriptedModel([Call("hang")], repeat=True), tools=[hang])
    root, _, _, turns = family(runtime, busy=busy)
    started = time.monotonic()
    root.abort()
    for turn in turns:
        with pytest.raises(errors.TurnAborted):
            turn.result(timeout_s=10)
    assert time.monotonic() - started < 2.0
    assert runtime.statuses() == {}


def test_an_abort_of_a_child_leaves_its_parent(opened):
    runtime = opened(ScriptedModel([Call("hang")], repeat=True), tools=[hang])
    root, child, _, _ = family(runtime)
    child.abort()
    child.wait_idle(timeout_s=10)
    assert root.status().type == "busy"
    assert root.abort()


def test_a_delete_takes_the_whole_tree_in_one_change(opened, path, watching):
    runtime = opened(ScriptedModel([Call("hang")], repeat=True), tools=[hang])
    other = runtime.create_session(title="other")
    root, child, grandchildren, turns = family(runtime)
    watch = watching(runtime)
    started = time.monotonic()
    assert root.delete().value == 4
    assert time.monotonic() - started < 2.0
    for turn in turns:
        with pytest.raises((errors.TurnAborted, errors.SessionNotFound)):
            turn.result(timeout_s=10)
    gone = {session.id for session in (root, child, *grandchildren)}
    tables, _ = stored(path)
    assert tables["session"].keys() == {other.id}
    assert not any(key[0] in gone for name in ("message", "part", "inbox") for key in tables[name])
    HANGING.set()  # late results come in now, and change nothing
    other.update(title="a barrier")
    watch.until(lambda e: e.session_id == other.id)
    ends = [e.session_id for e in watch.seen if e.type == "session.deleted"]
    assert set(ends) == gone and ends[-1] == root.id
    assert stored(path)[0]["session"].keys() == {other.id}
    assert runtime.live_sessions() == 1


def test_deletes_race_and_one_wins(opened, crew):
    runtime = opened()
    session = runtime.create_session()
    outcomes = crew().call(session.delete, times=10).start().outcomes()
    assert sum(isinstance(each, errors.SessionNotFound) for each in outcomes) == 9
    with pytest.raises(errors.SessionNotFound):
        runtime.create_session(parent_id=session.id)


def test_children_are_listed_and_archived_ones_too(opened):
    runtime = opened()
    root = runtime.create_session()
    children = [runtime.create_session(parent_id=root.id) for _ in range(3)]
    children[0].archive()
    assert set(root.children()) == set(children)
    assert list(children[0].children()) == []
    assert set(runtime.sessions(parent_id=root.id)) == set(children[1:])
    assert list(runtime.sessions(roots=True)) == [root]


def test_a_listing_has_pages_order_and_filters(opened):
    runtime = opened(directory="/home")
    sessions = [runtime.create_session(title=f"Number {n:02}") for n in range(25)]
    away = runtime.create_session(title="away", directory="/away")
    pages = [list(runtime.sessions(limit=10, offset=offset)) for offset in (0, 10, 20, 30)]
    assert [len(page) for page in pages] == [10, 10, 6, 0]
    assert {each for page in pages for each in page} == {*sessions, away}
    assert list(runtime.sessions(search="number 07")) == [sessions[7]]
    assert list(runtime.sessions(directory="/away")) == [away]
    assert list(runtime.sessions(limit=0)) == []
    assert len(runtime.sessions(limit=None)) == 26
    sessions[3].archive()
    assert list(runtime.sessions(archived=True)) == [sessions[3]]
    assert sessions[3] not in list(runtime.sessions(limit=None))
    internal = runtime.create_session(internal=True)
    assert internal not in list(runtime.sessions(limit=None))
    assert list(runtime.sessions(internal=True)) == [internal]


def test_messages_come_in_pages_from_the_newest_back(opened):
    runtime = opened()
    session = runtime.create_session()
    for number in range(5):
        session.prompt(f"{number}").result(timeout_s=10)
    texts = [message.text for message in session.messages()]
    found, before = [], None
    while page := session.messages(limit=3, before=before):
        found = [message.text for message in page] + found
        before = page[0].id
    assert found == texts == [f"{n // 2}" for n in range(10)]


def test_a_fork_has_the_history_and_its_own_future(opened):
    runtime = opened()
    session = runtime.create_session(title="tale", metadata={"a": 1})
    turns = [session.prompt(f"{n}") for n in range(3)]
    for turn in turns:
        turn.result(timeout_s=10)
    whole = session.fork()
    half = session.fork(before=turns[1].message_id, title="half")
    assert (whole.title, half.title) == ("tale (fork #1)", "half")
    assert whole.fork().title == "tale (fork #2)"
    assert [m.text for m in whole.messages()] == [m.text for m in session.messages()]
    assert [m.text for m in half.messages()] == ["0", "0"]
    ids = {m.id for m in session.messages()} & {m.id for m in whole.messages()}
    assert ids == set()
    half.prompt("new").result(timeout_s=10)
    assert len(session.messages()) == 6
    assert whole.metadata == {"a": 1}
    session.delete()
    assert len(whole.messages()) == 6


def test_a_revert_hides_and_the_next_prompt_removes(opened):
    seen = []

    def play(request):
        seen.append([c.text for t in request.turns if hasattr(t, "content") for c in t.content])
        return "ok"

    runtime = opened(ScriptedModel(play))
    session = runtime.create_session()
    turns = [session.prompt(f"{n}") for n in range(3)]
    for turn in turns:
        turn.result(timeout_s=10)
    session.revert(turns[1].message_id)
    assert session.record.revert.message_id == turns[1].message_id
    session.unrevert()
    assert session.record.revert is None
    session.revert(turns[1].message_id)
    session.prompt("instead").result(timeout_s=10)
    assert seen[-1] == ["0", "instead"]
    assert [m.text for m in session.messages()] == ["0", "ok", "instead", "ok"]
    assert session.refresh().record.revert is None


def test_an_update_changes_what_is_named_and_nothing_else(opened, path):
    runtime = opened()
    session = runtime.create_session(title="a", metadata={"x": 1}, directory="/d")
    session.update(title="b")
    record = session.refresh().record
    assert (record.title, record.metadata, record.directory) == ("b", {"x": 1}, "/d")
    before = stored(path)
    session.update(title="b")
    assert stored(path) == before  # nothing changed, nothing is said
    session.update(metadata={})
    assert session.refresh().metadata == {}


def test_a_tool_that_delegates_to_itself_is_refused_at_a_depth_and_its_model_told(opened):
    @tool
    def delegate(context: ToolContext) -> str:
        """Have another session do it."""
        child = runtime.create_session(parent_id=context.session_id)
        return child.prompt("go").result(timeout_s=15).text

    def play(request):
        answers = [turn for turn in request.turns if isinstance(turn, AssistantTurn)]
        return answers[-1].calls[0].output if answers else Call("delegate")

    runtime = opened(ScriptedModel(play), tools=[delegate], limits=Limits(depth=3))
    root = runtime.create_session()
    said = root.prompt("go").result(timeout_s=15).text
    assert said.startswith("InvalidInput:")
    assert "limits.depth" in said
    assert len(runtime.sessions(parent_id=None, limit=None)) == 4
    lineage = [root]
    while children := lineage[-1].children():
        lineage += children
    assert len(lineage) == 4


@pytest.mark.parametrize("internal", [False, True])
def test_a_child_below_the_depth_is_refused_and_nothing_is_left_of_it(opened, path, internal):
    runtime = opened(limits=Limits(depth=1))
    child = runtime.create_session(parent_id=runtime.create_session().id)
    before = stored(path)
    with pytest.raises(errors.InvalidInput, match=r"limits\.depth") as caught:
        runtime.create_session(parent_id=child.id, internal=internal)
    assert (caught.value.field, caught.value.limit) == ("parent_id", 1)
    assert stored(path) == before
    assert child.fork().parent_id == child.parent_id
    with pytest.raises(errors.SessionNotFound):
        runtime.create_session(parent_id="ses_nowhere")
