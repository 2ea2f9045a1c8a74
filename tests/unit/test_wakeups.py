"""Waking event loops from other threads, and waits that end by themselves."""

import asyncio
import gc
import threading
import weakref

import pytest

from understudy.actors import wakeups
from understudy.actors.pending import Pending
from understudy.errors import CommandTimeout


def test_answers_that_come_together_call_their_loop_once():
    calls = []

    async def main():
        loop = asyncio.get_running_loop()
        usual = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *given: (calls.append(given), usual(*given))
        answers = [Pending() for _ in range(100)]
        waiting = [asyncio.ensure_future(each.wait(timeout_s=10)) for each in answers]
        await asyncio.sleep(0)

        def answer():
            for number, each in enumerate(answers):
                each.set(number)

        loop.call_soon(answer)
        return await asyncio.gather(*waiting)

    assert asyncio.run(main()) == list(range(100))
    assert len(calls) == 1


def test_threads_that_answer_all_the_time_leave_nobody_asleep():
    async def main():
        for _ in range(200):
            answers = [Pending() for _ in range(8)]
            for group in (answers[:4], answers[4:]):
                threading.Thread(target=lambda g=group: [each.set(1) for each in g]).start()
            assert await asyncio.gather(*(each.wait(timeout_s=15) for each in answers)) == [1] * 8

    asyncio.run(main())


@pytest.mark.parametrize("long_s", [0.0, 1.0])
def test_a_wait_ends_when_its_time_is_over(monkeypatch, long_s):
    monkeypatch.setattr(wakeups, "_LONG_S", long_s)
    monkeypatch.setattr(wakeups, "_LOOK_EVERY_S", 0.005)

    async def main():
        never, late = Pending(), Pending()
        patient = asyncio.ensure_future(late.wait(timeout_s=60))
        with pytest.raises(CommandTimeout):
            await never.wait(timeout_s=0.02)
        assert never._callbacks == ()
        assert not patient.done()
        late.set("there")
        return await patient

    assert asyncio.run(main()) == "there"


def test_a_loop_is_not_kept_by_what_woke_it():
    async def main():
        answer = Pending()
        waiting = asyncio.ensure_future(answer.wait())
        await asyncio.sleep(0)
        answer.set(1)
        await waiting
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(main())
    gc.collect()
    assert loop() is None


def test_a_loop_that_was_closed_before_its_wake_up_came_is_not_kept():
    loop = asyncio.new_event_loop()
    answer = Pending()
    waiting = loop.create_task(answer.wait())
    loop.run_until_complete(asyncio.sleep(0))
    answer.set(1)
    loop.close()
    kept = weakref.ref(loop)
    del loop, waiting
    gc.collect()
    assert kept() is None
