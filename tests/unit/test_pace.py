"""A pace lets a few through at a time, in order, and the loop's other work in between."""

import asyncio
import time

from understudy.actors.pace import AT_ONCE, Pace


def waits(turn):
    """Whether a turn that is taken now is not at once."""
    try:
        turn.send(None)
    except StopIteration:
        return False
    return True


async def begun(coroutines):
    """Their tasks, once each is through or waits. No time passes for them until then."""
    loop, now_s = asyncio.get_running_loop(), time.monotonic()
    loop.time = lambda: now_s
    tasks = [asyncio.create_task(each) for each in coroutines]
    await asyncio.sleep(0)
    del loop.time
    return tasks


def test_few_go_through_at_once():
    async def few():
        pace = Pace()
        turns = [pace.turn() for _ in range(AT_ONCE)]
        return [waits(turn) for turn in turns]

    assert not any(asyncio.run(few()))


def test_many_go_through_in_order_with_the_loops_other_work_in_between():
    async def many():
        pace, through, seen = Pace(), [], []

        async def go(number):
            await pace.turn()
            through.append(number)

        def look():
            seen.append(len(through))
            loop.call_soon(look)

        loop = asyncio.get_running_loop()
        loop.call_soon(look)
        await asyncio.gather(*await begun(go(number) for number in range(5 * AT_ONCE + 1)))
        steps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
        return through, max(steps)

    through, most = asyncio.run(many())
    assert through == list(range(5 * AT_ONCE + 1))
    assert most == AT_ONCE


def test_who_is_cancelled_while_waiting_gives_its_turn_to_the_next():
    async def cancelled():
        pace, through = Pace(), []

        async def go(number):
            await pace.turn()
            through.append(number)

        tasks = await begun(go(number) for number in range(3 * AT_ONCE))
        for task in tasks[AT_ONCE : 2 * AT_ONCE]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return through

    assert asyncio.run(cancelled()) == [*range(AT_ONCE), *range(2 * AT_ONCE, 3 * AT_ONCE)]


def test_after_a_pause_nobody_waits_again():
    async def again():
        pace = Pace()
        await asyncio.gather(*(pace.turn() for _ in range(3 * AT_ONCE)))
        loop, now_s = asyncio.get_running_loop(), time.monotonic()
        loop.time = lambda: now_s + 60.0
        return not waits(pace.turn())

    assert asyncio.run(again())
