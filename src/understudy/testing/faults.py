"""The faults: the acts of a script that go wrong on purpose."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from understudy.errors import ActorCrashed
from understudy.testing.process import FAILURES
from understudy.testing.stage import LEASE_S

if TYPE_CHECKING:
    from understudy.testing.process import Process
    from understudy.testing.script import Act
    from understudy.testing.stage import Stage
    from understudy.testing.story import Story
    from understudy.testing.workload import Workload

_HANGS_S: Final = 1.0  # a close that takes longer waits for what hangs


class Faults:
    """One method for each verb."""

    def __init__(self, stage: Stage, workload: Workload) -> None:
        self._stage = stage
        self._workload = workload

    def crash(self, act: Act) -> None:
        """Once; or again as soon as it is back, until it is given up."""
        process, session = self._workload.session(act)
        times = 5 if act.b % 4 == 0 else 1

        async def crash() -> None:
            for _ in range(times):
                with contextlib.suppress(ActorCrashed):
                    await session._crash()  # noqa: SLF001 - made for this

        self._stage.spawn(process, crash())

    def kill(self, act: Act) -> None:
        process = self._stage.at_work(act.a)
        self._stage.note(f"  kill {process.name}")
        process.kill()

    def kill_at(self, act: Act) -> None:
        point = ("begin", "commit", "committed")[act.b % 3]
        self._stage.at_work(act.a).plan.kill_at = (point, 1 + act.b % 4)

    def close(self, act: Act) -> None:
        process = self._stage.at_work(act.a)
        self._stage.note(f"  close {process.name}")
        process.plan.clear()
        mine, before_s = self._with_actors(process), self._stage.scheduler.clock.monotonic_s()
        cursor = self._stage.watch.cursor
        process.close()
        if self._stage.scheduler.clock.monotonic_s() - before_s > _HANGS_S:
            return
        # What is reset as its runtime closes is taken up by the next one.
        self._stage.watch.closed(story for story in mine if story.reset_at <= cursor)

    def _with_actors(self, process: Process) -> list[Story]:
        """Sessions that a process may end when it closes; none if it does not move.

        One that was taken over from it is not its own, though its actor has yet to learn of that.
        """
        if process.life.frozen:
            return []
        mine = []
        for story in self._stage.watch.stories.values():
            actor = process.engine.registry.actor(story.id)
            ours = self._stage.watch.owner(story.id) == process.engine.id
            if actor is not None and (ours or actor.state is None):
                mine.append(story)
        return mine

    def second(self, _: Act) -> None:
        if len(self._stage.alive()) < 2:
            self._stage.start()

    def freeze(self, act: Act) -> None:
        """Now, with much to do when it thaws; or whoever calls a tool next, before it runs."""
        process = self._stage.at_work(act.a)
        if process.life.frozen:
            return
        seconds = (1.0, 8.0, 2 * LEASE_S, 4 * LEASE_S)[act.b % 4]
        if act.b % 5 < 3:
            self._stage.freeze_in_call_s = (2 * LEASE_S, 4 * LEASE_S)[act.b % 2]
            return
        if act.b % 3:
            self.second(act)
        if process.alive:
            self._stage.freeze(process, seconds)
            self._workload.leave_work(process)

    def fail(self, act: Act) -> None:
        kind = tuple(FAILURES)[act.a % len(FAILURES)]
        point = ("begin", "commit")[act.b % 2]
        self._stage.at_work(act.b).plan.failures += [(point, kind)] * (1 + act.b % 5)

    def hang(self, act: Act) -> None:
        self._stage.at_work(act.a).plan.hang_s.append((2.0, 9.0, 20.0)[act.b % 3])

    def deliver(self, act: Act) -> None:
        fate = ("lost", "late", "twice", "twice")[act.a % 4]
        times = 1 + act.a // 4 % 4
        self._stage.at_work(act.a).plan.deliveries += ["well"] * (act.b % 4) + [fate] * times

    def jump(self, act: Act) -> None:
        if not self._stage.settings.jumps:
            return
        self._stage.steady = False
        self._stage.scheduler.clock.jump_wall((-7200.0, -3.0, 5.0, 86_400.0)[act.a % 4])
