"""What a commit could not take is put back, in the order in which it came."""

import asyncio

import pytest

from understudy import ScriptedModel, errors
from understudy.store.events import PartUpdated, PromptAccepted
from understudy.store.records import ToolPart
from understudy.testing import Call, Gate, Say, echo


@pytest.fixture
def failing(monkeypatch):
    """``failing(runtime, error)``: the next commit fails so. Gives all that was tried."""

    def fail(runtime, error):
        store = runtime.engine.store
        commit, tried = store.commit, []

        def once(change, done, **options):
            tried.append(change.facts)
            if len(tried) == 1:
                done(None, [], error)
            else:
                commit(change, done, **options)

        monkeypatch.setattr(store, "commit", once)
        return tried

    return fail


def mailbox_of(runtime, session):
    return runtime.engine.registry.actor(session.id)._mailbox


def test_prompts_that_are_asked_again_after_a_lost_claim_keep_their_order(opened, failing):
    runtime = opened(echo())
    session = runtime.create_session()
    session.prompt("a").result(timeout_s=15)
    mailbox = mailbox_of(runtime, session)

    async def play():
        mailbox.pause()
        accepted = [session.prompt(text) for text in "bcd"]
        lost = errors.SessionFenced("lost", session_id=session.id, epoch=1)
        tried = failing(runtime, lost)
        mailbox.resume()
        for turn in accepted:
            await (await turn).result(timeout_s=15)
        return tried

    tried = asyncio.run(play())
    assert sum(type(fact) is PromptAccepted for fact in tried[0]) == 3
    said = [message.text for message in session.messages() if message.info.role == "user"]
    assert said == list("abcd")


def test_reports_that_could_not_be_stored_are_tried_again_in_their_order(
    opened, failing, eventually
):
    gates = {name: Gate() for name in ("first", "second")}

    async def held(name: str) -> str:
        """Wait for the gate of this name."""
        await gates[name].wait()
        return name

    calls = [Call("held", {"name": name}) for name in ("second", "first")]
    model = ScriptedModel([calls, [Say("done")]])
    runtime = opened(model, tools=[held])
    session = runtime.create_session()
    turn = session.prompt("go")
    for gate in gates.values():
        gate.wait_reached()
    mailbox = mailbox_of(runtime, session)
    eventually(lambda: mailbox.idle)
    mailbox.pause()
    for count, gate in enumerate(gates.values(), 1):
        gate.open()
        eventually(lambda count=count: len(mailbox._items) == count)
    tried = failing(runtime, errors.StoreFull("no room"))
    mailbox.resume()
    assert turn.result(timeout_s=15).text == "done"
    assert [outputs(facts) for facts in tried[:2]] == [["first", "second"], ["first", "second"]]


def outputs(facts):
    parts = [fact.part for fact in facts if type(fact) is PartUpdated]
    return [part.state.output for part in parts if type(part) is ToolPart]
