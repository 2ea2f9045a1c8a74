"""Every call, from a thread and from an event loop: the same names, the same answers."""

import asyncio
import gc
import logging
import threading
import time

import pytest

from understudy import Question, Runtime, ScriptedModel, ToolContext, errors, tool
from understudy.actors.models.scripted import Call, Gate, Say, Wait, steps_taken

LONGEST_GAP_S = 0.25  # of a ticker in the caller's loop; a blocked loop shows as one long gap


@tool(permission="launch")
def launch(target: str) -> str:
    """Launch."""
    return f"launched {target}"


def launching(request):
    if request.purpose == "summary":
        return Say("short")
    last = request.turns[-1]
    text = getattr(last.content[0], "text", "") if hasattr(last, "content") else ""
    return Call("launch", {"target": "moon"}) if "launch" in text else Say("said " + text)


class Ticker:
    """Ticks in the running loop; ``longest_s`` is the longest time the loop was held up."""

    async def __aenter__(self):
        self.longest_s = 0.0
        self.ticks = 0
        self.ticked_on = asyncio.Event()
        self._task = asyncio.create_task(self._tick())
        return self

    async def _tick(self):
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.002)
            now = time.monotonic()
            self.longest_s = max(self.longest_s, now - last)
            self.ticks += 1
            if self.ticks == 20:
                self.ticked_on.set()
            last = now

    async def __aexit__(self, *_):
        self._task.cancel()


def test_every_call_blocks_in_a_thread_and_gives_its_result(path):
    with Runtime(
        path,
        model=ScriptedModel(launching),
        tools=[launch],
        permissions={"launch": "ask"},
        durability="normal",
    ) as runtime:
        session = runtime.create_session(title="one", metadata={"a": 1})
        assert runtime.session(session.id) == session
        assert runtime.sessions()[0] == session
        turn = session.prompt("hello")
        assert [event.type for event in turn][-1] == "prompt.settled"
        assert turn.result().text == "said hello"
        assert session.turn(turn.message_id).result().text == "said hello"
        assert [prompt.outcome for prompt in session.prompts()] == ["answered"]
        assert [message.role for message in session.messages()] == ["user", "assistant"]
        assert session.update(title="two").title == "two"
        assert session.archive().record.time.archived is not None
        assert session.archive(archived=False).record.time.archived is None
        asking = session.prompt("launch it")
        with session.events(after=0) as events:
            for event in events:
                if event.type == "permission.asked":
                    break
        (ask,) = runtime.asks()
        assert [each.id for each in session.asks()] == [ask.id]
        assert session.status().type == "busy"
        assert runtime.reply(ask.id, "once")
        # Its answer is another launch: the script knows no better.
        assert asking.abort()
        with pytest.raises(errors.TurnAborted):
            asking.result()
        assert session.wait_idle() is not None
        assert session.status().type == "idle"
        assert not session.abort()
        assert session.revert(turn.message_id).record.revert is not None
        assert session.unrevert().record.revert is None
        assert session.compact().result(timeout_s=10).value
        fork = session.fork(title="copy")
        assert fork.title == "copy"
        assert fork.refresh().id == fork.id
        child = runtime.create_session(parent_id=session.id)
        assert list(session.children()) == [child]
        assert not session.reset()
        assert child.delete()
        assert session.delete()
        assert fork.delete()
        assert not fork.delete(missing_ok=True)
        assert list(runtime.sessions()) == []


def test_every_call_is_awaited_in_a_loop_and_never_holds_it_up(path):
    async def main():
        async with (
            Runtime(
                path,
                model=ScriptedModel(launching),
                tools=[launch],
                permissions={"launch": "ask"},
                durability="normal",
            ) as runtime,
            Ticker() as ticker,
        ):
            session = await runtime.create_session(title="one", metadata={"a": 1})
            assert await runtime.session(session.id) == session
            assert (await runtime.sessions())[0] == session
            turn = await session.prompt("hello")
            assert [event.type async for event in turn][-1] == "prompt.settled"
            assert (await turn.result()).text == "said hello"
            again = await session.turn(turn.message_id)
            assert (await again.result()).text == "said hello"
            assert [prompt.outcome for prompt in await session.prompts()] == ["answered"]
            assert [each.role for each in await session.messages()] == ["user", "assistant"]
            assert (await session.update(title="two")).title == "two"
            assert (await session.archive()).record.time.archived is not None
            assert (await session.archive(archived=False)).record.time.archived is None
            asking = await session.prompt("launch it")
            async for event in session.events(after=0):
                if event.type == "permission.asked":
                    break
            (ask,) = await runtime.asks()
            assert [each.id for each in await session.asks()] == [ask.id]
            assert (await session.status()).type == "busy"
            assert await runtime.reply(ask.id, "once")
            assert await asking.abort()
            with pytest.raises(errors.TurnAborted):
                await asking.result()
            await session.wait_idle()
            assert (await session.status()).type == "idle"
            assert not await session.abort()
            assert (await session.revert(turn.message_id)).record.revert is not None
            assert (await session.unrevert()).record.revert is None
            assert (await (await session.compact()).result(timeout_s=10)).value
            fork = await session.fork(title="copy")
            assert fork.title == "copy"
            assert (await fork.refresh()).id == fork.id
            child = await runtime.create_session(parent_id=session.id)
            assert list(await session.children()) == [child]
            assert not await session.reset()
            assert await child.delete()
            assert await session.delete()
            assert await fork.delete()
            assert not await fork.delete(missing_ok=True)
            assert list(await runtime.sessions()) == []
            assert ticker.ticks
            assert ticker.longest_s < LONGEST_GAP_S

    asyncio.run(main())


def test_a_loop_is_not_held_up_while_turns_tools_and_the_end_take_their_time(path):
    gate = threading.Event()

    @tool
    def slow() -> str:
        """Wait."""
        gate.wait(10)
        return "at last"

    model = ScriptedModel([Call("slow"), "done"], repeat=True)

    async def main():
        async with Runtime(path, model=model, tools=[slow], durability="normal") as runtime:
            async with Ticker() as ticker:
                sessions = [await runtime.create_session() for _ in range(5)]
                turns = [await session.prompt("go") for session in sessions]
                results = [asyncio.ensure_future(_result(turn)) for turn in turns]
                await ticker.ticked_on.wait()
                gate.set()
                assert [reply.text for reply in await asyncio.gather(*results)] == ["done"] * 5
            assert ticker.longest_s < LONGEST_GAP_S

    async def _result(turn):
        return await turn.result()

    asyncio.run(main())


def test_a_result_that_is_not_there_yet_says_await_me(path):
    async def main():
        async with Runtime(path, durability="normal") as runtime:
            session = runtime.create_session()
            with pytest.raises(RuntimeError, match="await"):
                _ = session.title
            await session
            assert session.title == "New session"

    asyncio.run(main())


def test_a_call_that_nobody_awaited_and_that_failed_is_logged(path, caplog, eventually):
    async def main():
        async with Runtime(path, durability="normal") as runtime:
            session = await runtime.create_session()
            await session.delete()
            with caplog.at_level(logging.ERROR, "understudy"):
                session.prompt("too late")  # dropped before its answer is there
                gc.collect()
                await asyncio.to_thread(eventually, lambda: "never awaited" in caplog.text)
                caplog.clear()
                handle = session.prompt("too late again")  # dropped after it
                pending = handle._pending
                await asyncio.to_thread(eventually, lambda: pending.done)
                del handle
                gc.collect()
                assert "never awaited" in caplog.text
                caplog.clear()
                with pytest.raises(errors.SessionNotFound):
                    await session.prompt("awaited")
                gc.collect()
                assert "never awaited" not in caplog.text

    asyncio.run(main())


def test_many_threads_prompt_one_session_and_each_gets_its_own_answer(opened, crew):
    runtime = opened()
    session = runtime.create_session()

    def ask(number):
        return session.prompt(f"number {number}").result(timeout_s=20).text

    calls = crew()
    for number in range(40):
        calls.call(ask, number)
    assert calls.start().outcomes() == [f"number {number}" for number in range(40)]
    order = [message.text for message in session.messages()]
    assert len(order) == 80
    assert order[::2] == order[1::2]  # each question is followed by its answer


def test_threads_and_a_loop_use_one_runtime_at_once(opened, crew):
    runtime = opened()
    session = runtime.create_session()

    async def main():
        turns = [await session.prompt(f"loop {n}") for n in range(10)]
        return [(await turn.result()).text for turn in turns]

    outcomes = (
        crew()
        .call(lambda: asyncio.run(main()))
        .call(lambda: asyncio.run(main()))
        .call(lambda: [session.prompt(f"thread {n}").result(timeout_s=20).text for n in range(10)])
        .start()
        .outcomes()
    )
    assert outcomes == [
        [f"loop {n}" for n in range(10)],
        [f"loop {n}" for n in range(10)],
        [f"thread {n}" for n in range(10)],
    ]


def test_a_runtime_whose_start_was_cancelled_is_closed_once_it_has_started(path, monkeypatch):
    entered, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    runtime = Runtime(path, durability="normal")
    start, close = runtime.engine.start, runtime.engine.close

    def slow():
        entered.set()
        assert go_on.wait(15)
        start()

    def closing(**options):
        close(**options)
        closed.set()

    monkeypatch.setattr(runtime.engine, "start", slow)
    monkeypatch.setattr(runtime.engine, "close", closing)

    async def main():
        entering = asyncio.create_task(runtime.__aenter__())
        await asyncio.to_thread(entered.wait, 15)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering

    asyncio.run(main())
    assert not closed.is_set()
    go_on.set()
    assert closed.wait(15)
    assert not list(path.parent.glob("*.lock"))


def test_a_subscription_is_followed_from_a_loop_up_to_its_close(path):
    async def main():
        async with Runtime(path, durability="normal") as runtime:
            session = await runtime.create_session()
            types = []
            async with session.events() as events:
                reader = asyncio.create_task(_read(events, types))
                turn = await session.prompt("hi")
                await turn.result()
                await session.wait_idle()
            await reader  # what was published before the close is still read
            assert types[-1] == "session.idle"
            assert "prompt.settled" in types

    async def _read(events, types):
        async for event in events:
            types.append(event.type)

    asyncio.run(main())


def test_a_cancelled_waiter_leaves_the_session_as_it_was(path):
    gate = Gate()
    model = ScriptedModel([[Say("one "), Wait(gate), Say("two")], "next"])

    async def main():
        async with Runtime(path, model=model, durability="normal") as runtime:
            session = await runtime.create_session()
            turn = await session.prompt("go")
            waiters = [asyncio.ensure_future(_wait(turn)) for _ in range(3)]
            reader = asyncio.create_task(_iterate(turn))
            await asyncio.to_thread(gate.wait_reached)
            waiters[0].cancel()
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiters[0]
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert runtime.engine.publisher.subscriptions() == 1  # the runtime's own
            gate.open()
            assert (await waiters[1]).text == "one two"
            assert (await waiters[2]).text == "one two"
            # A command whose caller left is carried out all the same.
            asked = asyncio.ensure_future(_prompt(session))
            await asyncio.sleep(0)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            async for event in session.events(after=0):
                if event.type == "prompt.accepted" and event.data.info.message_id == "msg_second":
                    break
            assert (await (await session.turn("msg_second")).result()).text == "next"

    async def _wait(turn):
        return await turn.result()

    async def _prompt(session):
        return await session.prompt("more", message_id="msg_second")

    async def _iterate(turn):
        async for _ in turn:
            pass

    asyncio.run(main())


def test_a_result_is_waited_for_no_longer_than_asked(opened):
    gate = Gate()
    runtime = opened(ScriptedModel([[Wait(gate), Say("late")]]))
    session = runtime.create_session()
    turn = session.prompt("go")
    started = time.monotonic()
    for timeout_s in (0.05, 0):
        with pytest.raises(errors.CommandTimeout) as caught:
            turn.result(timeout_s=timeout_s)
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.timeout_s == timeout_s
    assert time.monotonic() - started < 1.0
    with pytest.raises(errors.CommandTimeout):
        session.wait_idle(timeout_s=0.05)

    async def main():
        with pytest.raises(errors.CommandTimeout):
            await turn.result(timeout_s=0.05)
        with pytest.raises(errors.CommandTimeout):
            await turn.result(timeout_s=0)

    asyncio.run(main())
    gate.open()
    assert turn.result(timeout_s=10).text == "late"


@pytest.mark.parametrize("timeout_s", [-1, -0.001, float("nan"), "soon"])
def test_a_time_that_is_none_is_refused(opened, timeout_s):
    runtime = opened()
    session = runtime.create_session()
    turn = session.prompt("hello")
    with pytest.raises(errors.InvalidInput):
        turn.result(timeout_s=timeout_s)
    assert turn.result().text == "hello"


def test_giving_up_on_results_leaves_nothing_behind(opened):
    gate = Gate()
    runtime = opened(ScriptedModel([[Wait(gate), Say("late")]]))
    session = runtime.create_session()
    turn = session.prompt("go")
    for _ in range(50):
        with pytest.raises(errors.CommandTimeout):
            turn.result(timeout_s=0)
    again = session.turn(turn.message_id)  # it was not there when the prompt was accepted

    async def poll(handle):
        for _ in range(50):
            with pytest.raises(errors.CommandTimeout):
                await handle.result(timeout_s=0)

    asyncio.run(poll(turn))
    asyncio.run(poll(again))
    (waiting,) = runtime.engine.outcomes._waiting[session.id].values()
    assert [len(each._callbacks) for each in waiting] == [0]  # the turn's own, for the next call
    gate.open()
    assert turn.result(timeout_s=10).text == "late"


def test_a_turn_that_is_over_can_still_be_iterated(opened):
    runtime = opened()
    session = runtime.create_session()
    first = session.prompt("one", message_id="msg_one")
    live = [event.type for event in first if event.cursor is not None]
    session.prompt("two").result()
    for turn in (session.turn("msg_one"), session.prompt("one", message_id="msg_one")):
        again = list(turn)
        assert [event.type for event in again if event.cursor is not None] == live
        assert again[-1].data.info.message_id == "msg_one"

    async def main():
        return [event.type async for event in await session.turn("msg_one")]

    assert asyncio.run(main())[-1] == "prompt.settled"


def test_calls_after_close_say_so_in_both_forms(path):
    runtime = Runtime(path, durability="normal").start()
    session = runtime.create_session()
    turn = session.prompt("hi")
    turn.result()
    runtime.close()
    calls = [
        runtime.create_session,
        runtime.sessions,
        runtime.asks,
        runtime.events,
        lambda: runtime.session(session.id),
        lambda: runtime.reply("per_1", "once"),
        lambda: session.prompt("x"),
        session.abort,
        session.messages,
        session.status,
        session.delete,
        session.fork,
        session.reset,
        session.wait_idle,
        turn.result,
    ]
    for call in calls:
        with pytest.raises(errors.RuntimeClosed):
            call()

    async def main():
        for call in calls:
            with pytest.raises(errors.RuntimeClosed):
                await call()

    asyncio.run(main())
    assert runtime.close()  # again is fine


def test_a_question_in_a_loop_and_a_tool_in_a_thread_meet(path):
    @tool
    async def poll(ctx: ToolContext) -> str:
        """Ask."""
        answers = await ctx.question_async([Question(text="Which?", options=("a", "b"))])
        return answers[0][0]

    def play(request):
        if steps_taken(request):
            return Say("chose " + request.turns[-1].calls[0].output)
        return Call("poll")

    async def main():
        async with Runtime(
            path, model=ScriptedModel(play), tools=[poll], durability="normal"
        ) as runtime:
            session = await runtime.create_session()
            turn = await session.prompt("choose")
            async for event in turn:
                if event.type == "question.asked":
                    await runtime.reply(event.data.info.id, answers=[["b"]])
            assert (await turn.result()).text == "chose b"

    asyncio.run(main())
