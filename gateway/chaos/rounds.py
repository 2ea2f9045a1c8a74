"""The kinds of rounds: what befalls the process that works on a database.

A round begins and ends with one process that has the database and rests. What it did to the others
in between is the kind's business; that the guarantees hold afterwards is everybody's.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from typing import Final

from understudy.gateway.chaos.disk import SmallDisk
from understudy.gateway.chaos.life import LOOK_S, Broken, Life, Worker
from understudy.gateway.chaos.points import CLOSING, CREATING, STARTING, WORKING, wall_ms
from understudy.gateway.chaos.words import News, Order, Promise

REACHED_S: Final = 4.0
NAP_S: Final = 0.5
AWAKE_S: Final = 0.7
PAGES: Final = 12
ACCEPTED_AFTER: Final = 5


class Round:
    """One round on a database. ``missed`` says that the point to die at was not reached in time."""

    def __init__(self, life: Life, kind: str, seed: str) -> None:
        self.life = life
        self.kind = kind
        self.chance = random.Random(seed)
        self.seed = seed
        self.missed = ""

    def run(self) -> None:
        """Raises ``Broken`` when a process does not do what it must."""
        if self.life.worker is None:
            self.life.worker = self.life.restart()
        KINDS[self.kind](self)

    # --- steps ---------------------------------------------------------------------------------

    @property
    def worker(self) -> Worker:
        assert self.life.worker is not None, "a round begins with one process"
        return self.life.worker

    def _work(self, *, least_s: float = 0.0, most_s: float = 0.35) -> None:
        """Work until something is at stake, and then a little longer."""
        self.life.work(self.worker, self.seed)
        self.life.until(lambda promise: promise.kind == "accepted", timeout_s=REACHED_S)
        self.life.pause(self.chance.uniform(least_s, most_s))

    def _kill(self) -> None:
        worker = self.worker
        worker.kill()
        self.life.bury(worker)
        self.life.worker = None

    def _restart(self) -> None:
        self.life.worker = self.life.restart()

    def _dies(self, worker: Worker, point: str) -> None:
        if not self.life.dies(worker, timeout_s=REACHED_S):
            self.missed = point

    # --- kinds ---------------------------------------------------------------------------------

    def kill(self) -> None:
        self._work()
        self._kill()
        self._restart()

    def point(self) -> None:
        point = self.chance.choice(WORKING)
        nth = self.chance.choice((1, 1, 2, 5))
        self._work(most_s=0.2)
        self.worker.order(Order("arm", point=point, nth=nth))
        self._dies(self.worker, point)
        self._restart()

    def start(self) -> None:
        """Killed while it makes the file, or while it makes whole what a kill has left."""
        if self.life.restarts == 0:
            point, nth = self.chance.choice(CREATING), 1
        else:
            self._work()
            self._kill()
            point = self.chance.choice(STARTING)
            nth = self.chance.choice((1, 2)) if point.startswith("recover") else 1
        self._dies(self.life.begin(point=point, nth=nth), point)
        self._restart()

    def close(self) -> None:
        """Closed in the midst of everything; mostly it does not get to the end of that."""
        self._work()
        if self.chance.random() < 0.75:
            point = self.chance.choice(CLOSING)
            self.worker.order(Order("arm", point=point))
            self.worker.order(Order("close"))
            self._dies(self.worker, point)
        else:
            self.life.close()
            self.life.look()
            if (watch := self.life.watch) is not None:
                watch.closed(watch.stories.values())
        self._restart()

    def loop(self) -> None:
        """A crash loop: killed again and again before it is up."""
        self._work()
        self._kill()
        for _ in range(3):
            worker = self.life.begin()
            self.life.pause(self.chance.uniform(0.0, 0.12))
            worker.kill()
            self.life.bury(worker)
        self._restart()

    def two(self) -> None:
        """Two processes at work, one is killed: the other makes its sessions whole."""
        other = self.life.restart()
        self.life.work(other, f"{self.seed}/other")
        self._work(least_s=0.2, most_s=0.5)
        self._kill()
        self.life.rest(other)
        self.life.worker = other

    def nap(self) -> None:
        """Frozen for less than its lease, beside another: nothing happens."""
        other = self.life.restart()
        self.life.work(other, f"{self.seed}/other")
        self._work(least_s=0.2, most_s=0.4)
        self._freeze()
        held = self.life.held_by(self.worker)
        self.life.pause(min(NAP_S, self.life.lease_left_s(self.worker) / 2))
        left_s = self.life.lease_left_s(self.worker)
        self.worker.thaw()
        if self.life.renews(self.worker, within_s=left_s):
            if taken := self.life.held_by(other).keys() & held.keys():
                self._found("claimed", f"sessions of a process that took a nap: {sorted(taken)}")
        else:
            self.missed = "a renewal in time"  # on a machine that is too busy
        self.life.rest(self.worker, other)
        self._kill()
        self.life.worker = other

    def freeze(self) -> None:
        """Frozen past its lease, replaced, thawed: it writes nothing of what it lost."""
        self._work(least_s=0.2, most_s=0.5)
        self._freeze()
        self.life.pause(self.life.lease_left_s(self.worker) + 0.05)
        other = self.life.restart()
        self.life.work(other, f"{self.seed}/other")
        self.life.pause(self.chance.uniform(0.1, 0.4))
        self.life.rest(other)
        lost = self.life.held_by(other)
        thawed_ms = wall_ms()
        self.worker.thaw()
        self.life.pause(AWAKE_S)
        self.life.rest(self.worker, other)
        now = self.life.held_by(other)
        written = {
            each: (lost[each], now.get(each)) for each in lost if now.get(each) != lost[each]
        }
        if written:
            self._found("fenced", f"a thawed process wrote sessions it had lost: {written}")
        for call in self._started(self.worker, lost, since_ms=thawed_ms):
            self._found("fenced", f"a thawed process started a call it had lost: {call}")
        self._kill()
        self.life.worker = other

    def full(self) -> None:
        """No room, room again, no room and killed."""
        self.life.close()
        self.life.look_away()
        disk = SmallDisk(self.life.folder)
        mounted = disk.possible() and disk.mount()
        self.life.look_again()
        try:
            self._fill_twice(disk if mounted else None)
        finally:
            if self.life.worker is not None:
                self._kill()
            if mounted:
                self.life.look_away()
                disk.unmount()
                self.life.look_again()
        self._restart()

    # --- their parts ---------------------------------------------------------------------------

    def _fill_twice(self, disk: SmallDisk | None) -> None:
        self._restart()
        self._work(most_s=0.2)
        self._leave_no_room(disk)
        self._make_room(disk)
        accepted = 0

        def goes_on(promise: Promise) -> bool:
            nonlocal accepted
            accepted += promise.kind == "accepted"
            return accepted >= ACCEPTED_AFTER

        if not self.life.until(goes_on, timeout_s=15.0):
            raise Broken("liveness", "with room again, no prompt was accepted within 15 s")
        self._leave_no_room(disk)
        self._kill()
        if disk is not None:
            self._start_without_room()
            disk.free()
        self._restart()

    def _start_without_room(self) -> None:
        """It goes well or is refused, by an error of ours; it must not do harm."""
        worker = self.life.begin()
        deadline = time.monotonic() + REACHED_S
        news: list[News | None] = []
        while not news and time.monotonic() < deadline:
            news = worker.take(LOOK_S)
        self.life.bury(worker)
        if None in news[:1]:
            raise Broken("typed errors", "a start without room ended in an untyped error")

    def _leave_no_room(self, disk: SmallDisk | None) -> None:
        if disk is not None:
            disk.fill()
        else:
            self.worker.order(Order("limit", pages=PAGES))
        if not self.life.until(lambda promise: promise.said == "StoreFull", timeout_s=15.0):
            raise Broken("typed errors", "without room, nobody was told StoreFull within 15 s")

    def _make_room(self, disk: SmallDisk | None) -> None:
        if disk is not None:
            disk.free()
        else:
            self.worker.order(Order("limit"))

    def _freeze(self) -> None:
        """SIGSTOP, but not within a transaction: that would lock the file for everybody."""
        while True:
            self.worker.freeze()
            uri = f"{self.life.path.as_uri()}?mode=rw"
            probe = sqlite3.connect(uri, uri=True, timeout=0.02, isolation_level=None)
            try:
                probe.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                self.worker.thaw()
                time.sleep(0.002)
            else:
                probe.execute("ROLLBACK")
                return
            finally:
                probe.close()

    def _started(
        self, worker: Worker, lost: dict[str, tuple[int, int]], *, since_ms: int
    ) -> list[str]:
        """Calls of sessions it had lost that a process started since."""
        self.life.book.read()
        return [
            promise.key
            for promise in self.life.book.new
            if promise.kind == "started"
            and promise.pid == worker.pid
            and promise.at_ms >= since_ms
            and promise.session in lost
        ]

    def _found(self, guarantee: str, what: str) -> None:
        self.life.findings.append((guarantee, what))


KINDS: Final[dict[str, Callable[[Round], None]]] = {
    "kill": Round.kill,
    "point": Round.point,
    "start": Round.start,
    "loop": Round.loop,
    "close": Round.close,
    "freeze": Round.freeze,
    "nap": Round.nap,
    "two": Round.two,
    "full": Round.full,
}
OFTEN: Final = ("kill", "point", "point")
