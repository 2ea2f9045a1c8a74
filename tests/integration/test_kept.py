"""What a model is shown and what a turn said, told from memory: it is what the rows say."""

import asyncio
import contextlib
import threading

import pytest

from understudy import CompactionRules, FilePart, ScriptedModel, errors, tool
from understudy.actors.core.context import Conversation, conversation
from understudy.actors.kept import Kept
from understudy.actors.models.protocol import Finish, TextDelta, UserText, UserTurn
from understudy.actors.models.scripted import Call, Fail, Gate, Say, Wait
from understudy.store.records import AssistantMessage
from understudy.testing import SystemClock, VirtualClock


@tool
def look(at: int) -> str:
    """Look at something."""
    return f"saw {at}"


class Play:
    """Looks once, then answers; compares what it is shown with what the rows say."""

    def __init__(self):
        self.runtime = self.session = None
        self.asked = self.wrong = 0
        self.reads = []

    def __call__(self, request):
        if request.purpose == "summary":
            return Say("short")
        self.asked += 1
        history = self.real(request.session_id)
        open_id = next(m.id for m, _ in reversed(history) if m.time.completed is None)
        info = self.runtime.engine.record_of(request.session_id)
        told = conversation(history, revert=info.revert, before=open_id)
        self.wrong += tuple(told.turns) != request.turns
        words = request.turns[-1]
        if isinstance(words, UserTurn) and words.content[-1].text == "fail":
            return Fail(errors.ModelError("no"))
        if isinstance(words, UserTurn):
            return Call("look", {"at": self.asked})
        return Say(f"answer {self.asked}")

    def watch(self, runtime):
        """Count what is read of histories."""
        self.runtime, reads = runtime, runtime.engine.store.read
        self.real = reads.history
        reads.history = lambda session_id: self.reads.append(session_id) or self.real(session_id)
        return runtime


def prompted(session, text):
    return session.prompt(text).result(timeout_s=15)


def last_answer(session):
    return session.messages()[-1]


def rename(session):
    session.update(title="another")


def rewrite(session):
    last = last_answer(session)
    part = next(part for part in last.parts if part.type == "text")
    session.edit(last.id, part_id=part.id, text="never said that")


def passivate(session):
    engine = session.runtime.engine
    engine.store.run(lambda tx: None)  # what was committed before is told and over
    engine.upkeep._passivate_after_s = -1.0
    engine.upkeep._passivate()
    assert engine.registry.actor(session.id) is None


def crash(session):
    with pytest.raises(errors.ActorCrashed):
        session._crash()
    session.wait_idle(timeout_s=15)


def again(session):
    session.delete()
    session.runtime.create_session(session_id=session.id)


def fail(session):
    with pytest.raises(Exception, match="no"):
        prompted(session, "fail")


BETWEEN = {
    "nothing": lambda session: None,
    "another title": rename,
    "a look": lambda session: session.messages(),
    "the last answer is taken back": lambda session: session.revert(last_answer(session).id),
    "taken back and not": lambda session: session.revert(last_answer(session).id).unrevert(),
    "the last answer is taken out": lambda session: session.edit(last_answer(session).id),
    "the last answer is rewritten": rewrite,
    "a compaction": lambda session: session.compact().result(timeout_s=15),
    "a turn that fails": fail,
    "passivation": passivate,
    "a crash": crash,
    "deleted and made again": again,
}


@pytest.mark.parametrize("what", BETWEEN)
def test_what_a_model_is_shown_is_what_the_rows_say_whatever_came_between(opened, what):
    play = Play()
    runtime = play.watch(opened(ScriptedModel(play), tools=[look]))
    session = runtime.create_session()
    prompted(session, "one")
    prompted(session, "two")
    assert (play.wrong, play.reads) == (0, []), "nothing is read while turn follows turn"
    BETWEEN[what](session)
    read_by_then = len(play.reads)
    prompted(session, "three")
    prompted(session, "four")
    assert play.wrong == 0
    silent = {"nothing", "a look", "deleted and made again"}
    assert len(play.reads) - read_by_then == (0 if what in silent else 1)


def test_what_was_kept_is_gone_with_its_session(opened):
    play = Play()
    runtime = play.watch(opened(ScriptedModel(play), tools=[look]))
    kept = runtime.engine.executor.kept
    first, second = runtime.create_session(), runtime.create_session()
    for session in (first, second):
        prompted(session, "one")
    session.prompt("two").result(timeout_s=15)
    assert len(kept) == 2
    first.delete()
    crash(second)
    assert prompted(second, "three").text.startswith("answer")
    passivate(second)
    prompted(runtime.create_session(), "last")  # which is started after what was dropped
    assert len(kept) == 1


def test_a_fork_and_its_source_go_on_apart(opened):
    play = Play()
    runtime = play.watch(opened(ScriptedModel(play), tools=[look]))
    session = runtime.create_session()
    prompted(session, "one")
    fork = session.fork()
    prompted(fork, "two")
    prompted(session, "another two")
    assert play.wrong == 0
    assert play.reads == [fork.id]


def test_prompts_that_waited_are_shown_what_was_said_before_them(opened):
    play = Play()
    runtime = play.watch(opened(ScriptedModel(play), tools=[look]))
    session = runtime.create_session()
    turns = [session.prompt(f"prompt {number}") for number in range(5)]
    turns.append(session.prompt("and now", when_busy="steer"))
    for turn in turns:
        turn.result(timeout_s=15)
    prompted(session, "last")
    assert play.wrong == 0


def test_who_may_have_been_replaced_looks_at_the_rows_before_it_asks_a_model(opened, monkeypatch):
    play = Play()
    runtime = play.watch(opened(ScriptedModel(play), tools=[look]))
    session = runtime.create_session()
    prompted(session, "one")
    monkeypatch.setattr(runtime.engine.executor, "lasts", lambda term: False)
    monkeypatch.setattr(type(runtime.engine.executor), "prove", _proved)
    prompted(session, "two")
    assert play.wrong == 0
    assert play.reads == [session.id], "once: after the tool, the claim has been seen to hold"


async def _proved(executor, _session_id):
    executor.lasts = lambda term: True  # from here on: a tool runs once the claim was seen to hold
    return 0


@pytest.mark.parametrize("end", ["abort", "delete"])
def test_no_model_is_asked_for_what_was_ended_before_its_step_began(opened, monkeypatch, end):
    asked, ended = [], []
    runtime = opened(ScriptedModel(lambda request: asked.append(request) or "late"))
    session = runtime.create_session()
    executor = runtime.engine.executor
    spawn = executor._spawn

    def end_at_once(*given):
        """On the loop: the task is there, and has not begun."""
        spawn(*given)
        if not ended:
            ended.append(threading.Thread(target=getattr(session, end)))
            ended[0].start()
            ended[0].join(15)

    monkeypatch.setattr(executor, "_spawn", end_at_once)
    with pytest.raises(errors.UnderstudyError):
        prompted(session, "go")
    runtime.close()
    assert not asked


def test_what_a_model_says_after_all_of_a_deleted_session_is_not_kept(opened):
    class Stubborn:
        """Does not let itself be cancelled."""

        provider_id, model_id, context_limit, output_limit = "p", "m", 200_000, 8_192
        reached, went_on = threading.Event(), threading.Event()

        async def stream(self, request):
            self.reached.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            yield TextDelta("late")
            yield Finish("stop")
            self.went_on.set()

    model = Stubborn()
    runtime = opened(model)
    session = runtime.create_session()
    session.prompt("secret")
    assert model.reached.wait(15)
    session.delete()
    assert model.went_on.wait(15)
    over = threading.Event()
    runtime.engine.call_later(0.05, over.set)
    assert over.wait(15)
    assert len(runtime.engine.executor.kept) == 0


def test_old_results_that_are_to_be_cleared_are_not_told_from_memory(opened):
    play = Play()
    compaction = CompactionRules(prune=True)
    runtime = play.watch(opened(ScriptedModel(play), tools=[look], compaction=compaction))
    prompted(runtime.create_session(), "one")
    assert len(play.reads) == 2
    assert len(runtime.engine.executor.kept) == 0


# --- replies -----------------------------------------------------------------------------------


def answers(session):
    return tuple(each for each in session.messages() if isinstance(each.info, AssistantMessage))


def test_a_reply_that_is_waited_for_is_told_without_reading_it(opened):
    gate, reads = Gate(), []

    def play(request):
        said = request.turns[-1]
        first = isinstance(said, UserTurn) and said.content[-1].text == "hold"
        return [Wait(gate), Call("look", {"at": 1})] if first else Say("done")

    runtime = opened(ScriptedModel(play), tools=[look])
    real = runtime.engine.store.read.turn
    runtime.engine.store.read.turn = lambda *args: reads.append(args) or real(*args)
    session = runtime.create_session()
    turn = session.prompt("hold")
    gate.wait_reached()
    steer = session.prompt("and so on", when_busy="steer")
    runtime.engine.call_later(0.0, gate.open)
    reply = turn.result(timeout_s=15)
    assert reply.messages == answers(session)
    assert [part.type for part in reply.messages[0].parts] == ["step-start", "tool", "step-finish"]
    later = steer.result(timeout_s=15)
    assert (later.messages, later.text) == (reply.messages, "done")
    assert turn.result(timeout_s=15).messages == reply.messages
    assert session.turn(turn.message_id).result(timeout_s=15).messages == reply.messages
    assert len(reads) >= 2


@pytest.mark.parametrize("crashing", [False, True])
def test_the_reply_of_a_turn_has_all_that_it_said_also_before_a_crash(opened, crashing):
    gate, steps = Gate(), []

    def play(request):
        steps.append(request)
        if len(steps) == 1:
            return Call("look", {"at": 1})
        return [Wait(gate), Say("done")] if len(steps) == 2 else Say("done")

    runtime = opened(ScriptedModel(play), tools=[look], on_restart="resume")
    session = runtime.create_session()
    turn = session.prompt("go")
    gate.wait_reached()
    if crashing:
        with pytest.raises(errors.ActorCrashed):
            session._crash()
    runtime.engine.call_later(0.0, gate.open)
    reply = turn.result(timeout_s=15)
    assert reply.messages == answers(session)
    assert len(reply.messages) == (3 if crashing else 2)
    assert reply.text == "done"


def test_a_reply_after_a_stream_that_broke_has_the_broken_answer_too(opened):
    steps = []

    def play(request):
        steps.append(request)
        return (
            [Say("half an"), Fail(errors.ModelUnavailable("broken"))]
            if len(steps) == 1
            else Say("done")
        )

    runtime = opened(ScriptedModel(play))
    session = runtime.create_session()
    reply = session.prompt("go").result(timeout_s=15)
    assert reply.messages == answers(session)
    assert [each.text for each in reply.messages] == ["half an", "done"]


def test_what_a_caller_changes_in_a_reply_is_not_told_to_the_model(opened):
    play = Play()
    runtime = play.watch(opened(ScriptedModel(play), tools=[look]))
    session = runtime.create_session()
    reply = prompted(session, "one")
    [call] = reply.messages[0].tools
    call.state.input.clear()
    prompted(session, "two")
    assert (play.wrong, play.reads) == (0, [])


def test_the_reply_to_a_turn_that_another_process_answered_is_what_that_said(opened, eventually):
    """Its own answer came too late: it is refused, and never told."""
    gate, clock = Gate(), VirtualClock(wall_ms=SystemClock().wall_ms())
    mine = [[Wait(gate), Say("never stored")]]
    late = opened(ScriptedModel(mine), on_restart="resume", clock=clock)
    late.engine.upkeep.stop()  # as SIGSTOP would
    session = late.create_session()
    turn = session.prompt("go")
    gate.wait_reached()
    later = VirtualClock(wall_ms=clock.wall_ms() + 60_000)
    other = opened(ScriptedModel(lambda request: "theirs"), clock=later, on_restart="resume")
    other.engine.upkeep._orphans()
    theirs = other.session(session.id)
    theirs.wait_idle(timeout_s=15)
    clock.advance(60.0)
    held, go_on = threading.Event(), threading.Event()

    def hold():
        held.set()
        assert go_on.wait(15)

    late.engine.store.between_commits(hold)
    assert held.wait(15)
    late.engine.store.renew_lease(late.engine.publisher.poll)  # commits with what comes next
    actor = late.engine.registry.actor(session.id)
    gate.open()
    eventually(lambda: actor._batch is not None)
    go_on.set()
    reply = turn.result(timeout_s=15)
    assert reply.messages == answers(theirs)
    assert reply.text == "theirs"


def test_of_a_long_turn_only_the_last_is_remembered_and_its_reply_is_whole(opened):
    steps, remembered = [], []

    def play(request):
        steps.append(request)
        turn = runtime.engine.registry.actor(request.session_id).state.turn
        remembered.append(len(turn.said))
        return Call("look", {"at": len(steps)}) if len(steps) < 20 else Say("done")

    runtime = opened(ScriptedModel(play), tools=[look])
    session = runtime.create_session()
    reply = prompted(session, "go")
    assert max(remembered) == 12
    assert remembered[-1] == 1
    assert len(reply.messages) == 20
    assert reply.messages == answers(session)
    assert len(runtime.engine.executor.kept) == 1


# --- how much is kept --------------------------------------------------------------------------


def shown(size, *, before="msg"):
    told = Conversation(before)
    told.turns.append(UserTurn((UserText("word"),)))
    told.size = size
    return told


def test_a_file_takes_the_room_of_its_data(opened):
    session = opened().create_session()
    data = "data:image/png;base64," + "A" * 500_000
    picture = FilePart(id="", session_id="", message_id="", mime="image/png", url=data)
    session.prompt(["look", picture]).result(timeout_s=15)
    [question, answer] = session.messages()
    told = Conversation(answer.id)
    told.add(question.info, question.parts)
    assert told.tokens < 2_000
    assert 500_000 < told.size < 510_000


def test_only_so_much_is_kept_of_what_was_used_last():
    kept = Kept(most=10_000)
    for name in "abc":
        kept.put(name, shown(4_000))
    assert [name in kept for name in "abc"] == [False, True, True]
    kept.put("b", shown(3_000))  # now the last used
    kept.put("d", shown(4_000))
    assert [name in kept for name in "bcd"] == [True, False, True]
    kept.put("e", shown(20_000))
    assert len(kept) == 0
    kept.put("f", shown(9_900))
    assert kept.take("f") is not None
    assert kept.take("f") is None
    kept.put("g", shown(9_900))
    assert "g" in kept, "what is taken makes room"


def test_an_answer_is_added_only_to_what_was_shown_for_it(opened):
    session = opened().create_session()
    prompted(session, "hello")
    last = last_answer(session)
    kept = Kept()
    kept.answered("ses", (last.info, last.parts))
    kept.put("ses", shown(5, before="msg_other"))
    kept.answered("ses", (last.info, last.parts))
    assert "ses" not in kept
    kept.put("ses", shown(5, before=last.id))
    kept.answered("ses", (last.info, last.parts))
    assert [type(turn).__name__ for turn in kept.take("ses").turns] == ["UserTurn", "AssistantTurn"]
