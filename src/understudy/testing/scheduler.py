"""The scheduler: everything that could happen next, and a seeded choice among it."""

from __future__ import annotations

import hashlib
import heapq
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from understudy.actors.clock import VirtualClock

Happening: TypeAlias = Callable[[], None]

_REWEIGH_EVERY: Final = 40  # steps between new inclinations of chance
_WEIGHTS: Final = (1, 1, 1, 4, 16)
_EARLY: Final = 0.02  # how often time passes although there is something to do
_PAUSES_S: Final = (0.001, 0.05, 0.5, 3.0)


class Killed(BaseException):
    """The process this ran in was killed."""


class Life:
    """Whether a process is there, and whether it moves."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.frozen = False
        self.was_frozen = False
        self.frozen_s = 0.0  # in all
        self.on_death: Callable[[], None] = lambda: None
        self.on_escape: Callable[[Exception], None] = lambda _: None

    def freeze(self) -> None:
        self.frozen = self.was_frozen = True


class Source:
    """A place where things wait to happen: in order, or ``shuffled`` in any order.

    What ``may_wait`` is not started while something else in the simulation waits: there is one
    stack, and what is started last must end first.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        life: Life,
        name: str,
        *,
        shuffled: bool = False,
        may_wait: bool = False,
    ) -> None:
        self.name = f"{life.name}.{name}"
        self.life = life
        self.shuffled = shuffled
        self.may_wait = may_wait
        self.weight = 1
        self.waiting: deque[Happening] = deque()
        self._scheduler = scheduler
        scheduler.sources.append(self)

    def add(self, happening: Happening) -> bool:
        """False if the process is dead: it will not happen."""
        if not self.life.dead:
            self.waiting.append(happening)
        return not self.life.dead

    def add_later(self, delay_s: float, happening: Happening) -> None:
        self._scheduler.at(self._scheduler.clock.monotonic_s() + delay_s, self, happening)

    def take(self, chance: random.Random) -> Happening:
        if self.shuffled and len(self.waiting) > 1:
            self.waiting.rotate(-chance.randrange(len(self.waiting)))
        return self.waiting.popleft()

    def rest(self) -> list[Happening]:
        """Take everything that still waits."""
        left = list(self.waiting)
        self.waiting.clear()
        return left

    def __len__(self) -> int:
        return len(self.waiting)


class Scheduler:
    """Runs one thing at a time, in one thread, in an order that the seed decides.

    Time stands still while things happen, and passes when nothing can, or now and then when chance
    has it so. ``calm_s`` is time in which everybody who may move had nothing to do, and ``on_calm``
    is told of it: who is late then is late by its own doing.
    """

    def __init__(self, seed: int | str) -> None:
        self.clock = VirtualClock()
        self.chance = random.Random(f"{seed}/schedule")
        self.sources: list[Source] = []
        self.steps = 0
        self.depth = 0
        self.running: Life | None = None
        self.trace = Trace()
        self.calm_s = 0.0
        self.on_calm: Callable[[float], None] = lambda _: None
        self._timers: list[tuple[float, int, Source, Happening]] = []
        self._timer_count = 0

    # --- what happens --------------------------------------------------------------------------

    def at(self, when_s: float, source: Source, happening: Happening) -> None:
        if source.life.dead:
            return
        self._timer_count += 1
        heapq.heappush(self._timers, (when_s, self._timer_count, source, happening))

    def step(self, *, before_s: float | None = None) -> bool:
        """Let one thing happen. False if nothing can, ``before_s`` or ever."""
        while True:
            if self._timers and self._timers[0][0] <= self.clock.monotonic_s():
                self._ring()
            nested = self.depth > 0
            ready = [
                source
                for source in self.sources
                if source.waiting and not source.life.frozen and not (nested and source.may_wait)
            ]
            if ready and self.chance.random() < _EARLY:
                self.clock.advance(self.chance.choice(_PAUSES_S))
                continue
            if ready:
                break
            if not self._sleep(before_s):
                return False
        self._reweigh()
        source = ready[0]
        if len(ready) > 1:
            (source,) = self.chance.choices(ready, [each.weight for each in ready])
        self._run(source, source.take(self.chance))
        return True

    def run_until(self, done: Callable[[], bool], *, steps: int, limit_s: float) -> bool:
        """Step until ``done``. False if that takes too many steps or too long."""
        last, end_s = self.steps + steps, self.clock.monotonic_s() + limit_s
        while not done():
            if self.steps >= last or self.clock.monotonic_s() >= end_s:
                return False
            if not self.step(before_s=end_s):
                return done()
        return True

    def _may_run(self, source: Source) -> bool:
        return not source.life.frozen and not (source.may_wait and self.depth > 0)

    def _run(self, source: Source, happening: Happening) -> None:
        self.steps += 1
        self.depth += 1
        before, self.running = self.running, source.life
        self.trace.note(f"{self.steps} {self.clock.monotonic_s():.6f} {source.name}")
        try:
            happening()
        except Killed:
            source.life.on_death()
        except Exception as error:  # noqa: BLE001 - a thread would have died of it
            if not source.life.dead:
                source.life.on_escape(error)
        finally:
            self.depth -= 1
            self.running = before

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Something happens within what happens: nothing that may wait is started meanwhile."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def _reweigh(self) -> None:
        if self.steps % _REWEIGH_EVERY == 0:
            for source in self.sources:
                source.weight = self.chance.choice(_WEIGHTS)

    # --- waiting -------------------------------------------------------------------------------

    def wait(self, gate: threading.Lock, timeout_s: float | None) -> bool:
        """What a blocked thread does here: something else happens. See ``store.lanes.waits``."""
        life = self.running
        end_s = None if timeout_s is None else self.clock.monotonic_s() + timeout_s
        while not gate.acquire(blocking=False):
            if life is not None and life.dead:
                raise Killed
            if end_s is not None and self.clock.monotonic_s() >= end_s:
                return False
            if not self.step(before_s=end_s) and end_s is None:
                raise AssertionError("waiting for what cannot happen")
        return True

    # --- time ----------------------------------------------------------------------------------

    def _ring(self) -> None:
        """Move what is due from the timers to its place."""
        now_s = self.clock.monotonic_s()
        frozen = []
        while self._timers and self._timers[0][0] <= now_s:
            timer = heapq.heappop(self._timers)
            source, happening = timer[2], timer[3]
            if source.life.frozen:
                frozen.append(timer)
            else:
                source.add(happening)
        for timer in frozen:
            heapq.heappush(self._timers, timer)

    def _sleep(self, before_s: float | None) -> bool:
        """Let time pass to the next timer. False if there is none, or it is later."""
        next_s = min(
            (timer[0] for timer in self._timers if self._may_run(timer[2])),
            default=None,
        )
        if next_s is None or (before_s is not None and next_s > before_s):
            if before_s is not None:
                self._pass_until(before_s)
            return False
        self._pass_until(next_s)
        return True

    def _pass_until(self, when_s: float) -> None:
        """The clock counts nanoseconds: a little more, or ``when_s`` might never come."""
        pause_s = max(0.0, when_s - self.clock.monotonic_s()) + 1e-6
        self.clock.advance(pause_s)
        if not any(source.waiting and not source.life.frozen for source in self.sources):
            self.calm_s += pause_s
            self.on_calm(pause_s)

    def bury(self, life: Life) -> None:
        """Forget everything a dead process would still have done."""
        for source in self.sources:
            if source.life is life:
                source.rest()
        self.sources = [source for source in self.sources if source.life is not life]
        self._timers = [timer for timer in self._timers if timer[2].life is not life]
        heapq.heapify(self._timers)


class Trace:
    """What happened, in order: a digest, and the last lines or all of them."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=200)
        self._digest = hashlib.sha256()

    def note(self, line: str) -> None:
        self.lines.append(line)
        self._digest.update(line.encode())
        self._digest.update(b"\n")

    def keep_all(self) -> None:
        self.lines = deque(self.lines)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()
