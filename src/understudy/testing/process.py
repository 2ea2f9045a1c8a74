"""A process: one runtime with everything under it, that can fail, freeze and be killed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from understudy.actors.core.commands import Command, ExecutionLost, OpenAsk
from understudy.actors.pending import Pending
from understudy.actors.runtime import Runtime
from understudy.actors.upkeep import WATCH_EVERY_S
from understudy.store.changes import Change
from understudy.store.writer import Done
from understudy.testing.platform import Simulated
from understudy.testing.scheduler import Killed, Life, Scheduler, Source

FAILURES = {
    "busy": "database is locked",
    "full": "database or disk is full",
    "error": "disk I/O error",
}


class Plan:
    """Faults that are due: each is armed by the script and happens once it is reached."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str]] = []  # (point, kind) of the next commits
        self.kill_at: tuple[str, int] | None = None  # at this point of the n-th commit from now
        self.deliveries: list[str] = []  # what becomes of the next reports of executors
        self.hang_s: list[float] = []  # how long the next commits of actors hang

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]  # as new


class Process:
    """A runtime on a simulated platform.

    ``committed`` is called after each of its commits, and ``found`` with what it does wrong.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        path: Path,
        *,
        committed: Callable[[Process], None],
        found: Callable[[str, str], None] = lambda *_: None,
        **options: Any,
    ) -> None:
        self.life = Life(name)
        self.life.on_death = self.kill
        self.plan = Plan()
        self.published: int | None = None  # the cursor of the last event it published
        self.lost_reports: set[type[Command]] = set()
        self.failed = 0  # commits, on purpose
        self.hung_s = 0.0  # the longest that an actor hung and was not replaced
        self.hanging: set[str] = set()  # sessions whose actor hangs
        self.platform = Simulated(scheduler, self.life)
        self._scheduler = scheduler
        self._committed = committed
        self._found = found
        self._untold: dict[str, list[float]] = {}  # when reports on a session went astray
        self._courier = Source(scheduler, self.life, "courier", shuffled=True)
        self.runtime = Runtime(
            path,
            clock=scheduler.clock,
            platform=self.platform,
            fault=self._fault,
            durability="normal",
            **options,
        )
        self.engine = self.runtime.engine
        self.client = self.platform.loop("client").loop
        self._deliver = self.engine.tell_live
        self._commit = self.engine.store.commit
        self.engine.tell_live = self._tell_live  # type: ignore[method-assign]
        self.engine.store.commit = self._hanging_commit  # type: ignore[method-assign]

    @property
    def name(self) -> str:
        return self.life.name

    @property
    def alive(self) -> bool:
        return not self.life.dead

    def works_for(self) -> list[str]:
        """The sessions something works for."""
        executions = self.engine.executor._executions  # noqa: SLF001 - it shows from inside
        return [session_id for session_id, each in executions.items() if each.tasks]

    # --- life ----------------------------------------------------------------------------------

    def run(self, work: Callable[[], Any]) -> Any:
        """Call something of the runtime that waits. None if the process is killed meanwhile."""
        before, self._scheduler.running = self._scheduler.running, self.life
        try:
            return work()
        except Killed:
            self.kill()
            return None
        finally:
            self._scheduler.running = before

    def kill(self) -> None:
        """Nothing in memory survives; what was not committed is gone."""
        if self.life.dead:
            return
        self.life.dead = True
        for place in self.platform.loops:
            place.reap()
        self._scheduler.bury(self.life)
        store = self.engine.store
        if store._database is not None:  # noqa: SLF001 - a kill asks nobody
            with suppress(sqlite3.Error):
                store._database.close()  # noqa: SLF001
        if store._reads is not None:  # noqa: SLF001
            store._reads.close()  # noqa: SLF001
        if store.lease._file is not None:  # noqa: SLF001
            store.lease._file.close()  # noqa: SLF001

    def close(self) -> None:
        """End as a well-behaved program does."""
        self.run(lambda: self.runtime.close(timeout_s=30.0))
        self.kill()

    # --- faults --------------------------------------------------------------------------------

    def _fault(self, point: str) -> None:
        plan = self.plan
        if plan.kill_at is not None and plan.kill_at[0] == point:
            left = plan.kill_at[1] - 1
            plan.kill_at = (point, left)
            if left <= 0:
                if point == "committed":
                    self._committed(self)
                raise Killed
        if plan.failures and plan.failures[0][0] == point:
            _, kind = plan.failures.pop(0)
            self.failed += 1
            raise sqlite3.OperationalError(FAILURES[kind])
        if point == "committed":
            self._committed(self)

    def _tell_live(
        self, session_id: str, command: Command, done: Pending[Any] | None = None
    ) -> None:
        """Deliver what an executor reports: as it should be, late, twice or never."""
        if type(command) is ExecutionLost:
            self._check_lost(session_id)
        fate = self.plan.deliveries.pop(0) if self.plan.deliveries else "well"
        if fate == "lost" and type(command) is not OpenAsk:  # its tool waits: it was not lost
            self.lost_reports.add(type(command))
            self._astray(session_id)
        elif fate in ("late", "lost"):
            self._deliver_late(session_id, command, done)
        else:
            self._deliver(session_id, command, done)
            if fate == "twice":
                self._deliver(session_id, command)

    def _deliver_late(self, session_id: str, command: Command, done: Pending[Any] | None) -> None:
        found_again = self._astray(session_id)

        def deliver() -> None:
            found_again()
            self._deliver(session_id, command, done)

        self._courier.add_later(0.7, deliver)

    def _astray(self, session_id: str) -> Callable[[], None]:
        """A report on a session goes astray, until what this returns is called."""
        untold, now_s = self._untold.setdefault(session_id, []), self._scheduler.clock.monotonic_s()
        untold.append(now_s)
        return lambda: untold.remove(now_s)

    def _check_lost(self, session_id: str) -> None:
        """Given up is only what has not reported, and not before its report had time to come."""
        untold = self._untold.get(session_id)
        waited_s = self._scheduler.clock.monotonic_s() - min(untold) if untold else 0.0
        if waited_s < WATCH_EVERY_S - 1e-3:
            said = f"{waited_s:g} s after its report" if untold else "with every report of it told"
            self._found("only who is lost is given up", f"{session_id} in {self.name}, {said}")

    def _hanging_commit(self, change: Change, done: Done, **options: Any) -> None:
        """The thread of an actor may stop at the worst moment: decided, and not yet committed."""
        if self.plan.hang_s and self._scheduler.depth == 1:
            actor = self.engine.registry.actor(change.session_id)
            began_s = self._scheduler.calm_s
            wake_s = self._scheduler.clock.monotonic_s() + self.plan.hang_s.pop(0)
            self.hanging.add(change.session_id)
            self._scheduler.depth -= 1  # others run, upkeep too: this is one thread of several
            try:
                while self._scheduler.clock.monotonic_s() < wake_s and self.alive:
                    self._scheduler.step(before_s=wake_s)
            finally:
                self._scheduler.depth += 1
                self.hanging.discard(change.session_id)
            if self.life.dead:
                raise Killed
            if self.engine.registry.actor(change.session_id) is actor and not self.life.frozen:
                self.hung_s = max(self.hung_s, self._scheduler.calm_s - began_s)
        self._commit(change, done, **options)
