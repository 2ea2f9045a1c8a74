"""Waking event loops from other threads, and waits that end by themselves."""

import asyncio
import gc
import threading
import weakref

import pytest

from understudy.actors import pending as pending_module
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


def test_nothing_is_made_while_all_pendings_share_their_lock():
    """A collection runs finalisers, and one that waits for a thread would stop them all."""
    found = []

    def look(phase, _):
        found.append(pending_module._lock._is_owned())

    def callback(_):
        return None

    def other(_):
        return None

    thresholds = gc.get_threshold()
    gc.callbacks.append(look)
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(200):
            waiting = Pending()
            waiting.then(callback)
            waiting.then(other)
            waiting.forget(callback)
            waiting.set([])
            waiting.then(callback)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(look)
    assert len(found) > 200
    assert not any(found)


def test_callbacks_come_and_go_from_many_threads_and_each_that_stays_is_called_once():
    for _ in range(50):
        waiting, called = Pending(), []
        begin = threading.Barrier(5)

        def work(number, waiting=waiting, called=called, begin=begin):
            begin.wait(15)
            for turn in range(20):
                waiting.then(lambda _, mine=(number, turn): called.append(mine))

                def goes(_):
                    called.append("gone")

                waiting.then(goes)
                waiting.forget(goes)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        begin.wait(15)
        waiting.set(None)
        for thread in threads:
            thread.join(15)
        stayed = [each for each in called if each != "gone"]
        assert sorted(stayed) == [(n, turn) for n in range(4) for turn in range(20)]


@pytest.mark.parametrize("timeout_s", [None, 1.0, 60.0])
def test_a_wait_that_is_over_leaves_nothing_in_its_loop(timeout_s):
    async def scene():
        loop = asyncio.get_running_loop()
        pending = Pending()
        waiting = [asyncio.ensure_future(pending.wait(timeout_s=timeout_s)) for _ in range(3)]
        await asyncio.sleep(0)
        wake_ups = wakeups.wake_ups_of(loop)
        assert len(wake_ups._timers) + len(wake_ups._deadlines) == (0 if timeout_s is None else 3)
        timers = list(wake_ups._timers.values())
        pending.set("told")
        assert await asyncio.gather(*waiting) == ["told"] * 3
        assert not wake_ups._timers and not wake_ups._deadlines
        assert all(timer.cancelled() for timer in timers)

    asyncio.run(scene())
