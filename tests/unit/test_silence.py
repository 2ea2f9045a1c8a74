"""Silence breaks a block off after its limit. Looks are counted, so no test waits for time."""

import asyncio
import contextlib
import time

import pytest

from understudy.actors.silence import LOOKS, Silences
from understudy.errors import ModelUnavailable


async def waiting(silences, seen, unheeded=lambda: None):
    """Watched for ever; ``seen`` gets what to be heard with."""
    with silences.watch(unheeded) as silence:
        seen.append(silence)
        await asyncio.Event().wait()


async def look(silences, times):
    for _ in range(times):
        silences._look()
        await asyncio.sleep(0)


def play(scene):
    """Run ``scene(silences)`` where timers never fire."""

    async def begin():
        asyncio.get_running_loop().call_later = lambda *_: None
        return await scene(Silences(60.0))

    return asyncio.run(begin())


def test_a_block_is_broken_off_after_its_limit_and_no_sooner():
    async def scene(silences):
        task = asyncio.ensure_future(waiting(silences, []))
        await asyncio.sleep(0)
        await look(silences, LOOKS)  # the first of them hears that it began
        early = task.done()
        await look(silences, 1)
        with pytest.raises(ModelUnavailable, match="said nothing for 60 s"):
            await task
        return early

    assert play(scene) is False


def test_whoever_is_heard_at_every_other_look_is_never_broken_off():
    async def scene(silences):
        seen = []
        task = asyncio.ensure_future(waiting(silences, seen))
        await asyncio.sleep(0)
        for _ in range(10 * LOOKS):
            seen[0].heard = True
            await look(silences, 2)
        alive = not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):  # what comes from outside stays what it is
            await task
        return alive

    assert play(scene) is True


def test_what_is_cancelled_from_outside_too_ends_as_cancelled():
    async def scene(silences):
        task = asyncio.ensure_future(waiting(silences, []))
        await asyncio.sleep(0)
        for _ in range(LOOKS + 1):
            silences._look()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    play(scene)


def test_each_is_broken_off_by_its_own_silence():
    async def scene(silences):
        seen = []
        tasks = [asyncio.ensure_future(waiting(silences, seen)) for _ in range(3)]
        await asyncio.sleep(0)
        for _ in range(2 * LOOKS):
            seen[1].heard = True
            await look(silences, 1)
        over = [task.done() for task in tasks]
        tasks[1].cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        return over, [type(end) for end in ends]

    unheard, heard = ModelUnavailable, asyncio.CancelledError
    assert play(scene) == ([True, False, True], [unheard, heard, unheard])


def test_what_was_broken_off_can_be_cancelled_again_later():
    async def scene(silences):
        async def tried_twice():
            for _ in range(2):
                with pytest.raises(ModelUnavailable):
                    await waiting(silences, [])
            return asyncio.current_task().cancelling()

        task = asyncio.ensure_future(tried_twice())
        await asyncio.sleep(0)
        await look(silences, 3 * LOOKS)
        return await task

    assert play(scene) == 0


def test_a_block_that_heeds_nothing_is_told_of_once_as_long_again_after():
    async def scene(silences):
        told = []

        async def stubborn():
            with silences.watch(lambda: told.append("unheeded")):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                await gate.wait()

        gate = asyncio.Event()
        task = asyncio.ensure_future(stubborn())
        await asyncio.sleep(0)
        await look(silences, LOOKS + 1 + LOOKS - 1)
        early = list(told)
        await look(silences, 3 * LOOKS)
        gate.set()
        await task  # it ended by itself, late: that is no error
        return early, told

    assert play(scene) == ([], ["unheeded"])


def test_a_process_that_was_frozen_reads_what_came_before_it_breaks_anything_off():
    async def scene():
        loop, silences, seen = asyncio.get_running_loop(), Silences(60.0), []
        task = asyncio.ensure_future(waiting(silences, seen))
        await asyncio.sleep(0)
        loop.time = lambda: time.monotonic() + 3600.0
        for _ in range(5):
            await asyncio.sleep(0)
        alive = not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return alive

    assert asyncio.run(scene()) is True


def test_no_timer_goes_on_where_nobody_is_watched():
    async def scene():
        loop, silences, timers = asyncio.get_running_loop(), Silences(60.0), []
        loop.call_later = lambda delay_s, callback: timers.append(delay_s)
        for _ in range(3):
            with silences.watch(lambda: None):
                pass
        begun = list(timers)
        silences._look()
        idle = list(timers)
        with silences.watch(lambda: None), silences.watch(lambda: None):
            silences._look()
        return begun, idle, timers

    every_s = 60.0 / LOOKS
    assert asyncio.run(scene()) == ([every_s], [every_s], [every_s] * 3)
