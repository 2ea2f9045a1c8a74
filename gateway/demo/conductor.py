"""The demo's parent process: prompts, crashes and kills the worker, and keeps its own books."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from understudy.gateway.demo.ledger import Entry, Ledger, News, Order
from understudy.gateway.demo.tasks import Plan, Task, tasks
from understudy.gateway.demo.worker import Setup
from understudy.gateway.display import Counts, Progress
from understudy.gateway.pipes import Child

IN_FLIGHT: Final = 120
SILENCE_S: Final = 60.0
DEATHS: Final = 3
TICK_S: Final = 0.05
KILL_DELAY_S: Final = 0.4


class Conductor:
    """Brings the tasks of a plan to their end, over as many lives of the worker as it takes.

    ``failure`` says why it gave up, if it did.
    """

    def __init__(self, plan: Plan, ledger: Ledger, progress: Progress) -> None:
        self.plan = plan
        self.ledger = ledger
        self.tasks: dict[str, Task] = {task.key: task for task in tasks(plan, ledger)}
        self.root = Path(ledger.of("task")[0].root)
        self.counts = Counts(total=len(self.tasks), kills=len(ledger.of("kill")))
        self.failure = ""
        self._progress = progress
        self._deaths = 0
        # Another run of the same seed kills at other moments.
        self._chance = random.Random(f"{plan.seed} {len(ledger.of('start'))}")
        self._kills = self._moments(plan.kills - len(ledger.of("kill")))
        self._crashes = self._moments(plan.crashes - len(ledger.of("crash")))
        self._victims = {entry.session for entry in ledger.of("crash")}
        ledger.write([Entry("start")])

    def _moments(self, count: int) -> list[float]:
        """Numbers of answers at which something is to happen."""
        return sorted(self._chance.uniform(0.05, 0.9) * len(self.tasks) for _ in range(count))

    def run(self) -> None:
        """Until every task is done, or there is a ``failure``."""
        setup = Setup(
            database=str(self.plan.database),
            root=str(self.root),
            effects=str(self.plan.beside("effects")),
        )
        while not (self._all_done() or self.failure):
            child = Child(
                "understudy.gateway.demo.worker",
                msgspec.json.encode(setup).decode(),
                news=News,
                log=self.plan.beside("log"),
            )
            try:
                self._live(child)
            finally:
                child.kill()
                child.bury()
            self._hear(child.take(0.0))  # what it had said before it died counts
            for task in self.tasks.values():
                task.asked = False

    def _live(self, child: Child[News]) -> None:
        """One life of the worker: to the end of the work, to its kill, or to its own death."""
        started = heard = time.monotonic()
        ready, kill_at = False, float("inf")
        while kill_at < float("inf") or not self._all_done():
            batch = child.take(TICK_S)
            now = time.monotonic()
            heard = now if batch else heard
            self._hear(batch)
            if None in batch:
                self._mourn(child)
                return
            if now - heard > SILENCE_S:
                self.failure = f"The worker has said nothing for {SILENCE_S:g} s"
                return
            for news in batch:
                if news is not None and news.kind == "ready":
                    ready = True
                    self._greet(news, now - started)
            if ready:
                self._ask(child)
                self._crash(child)
            if kill_at == float("inf") and self._kill_is_due(asked=ready):
                self._kills.pop(0)
                kill_at = now + self._chance.uniform(0, KILL_DELAY_S)
            if now >= kill_at:
                self._kill(child)
                return
            self._show()
        self._stop(child)

    # --- listening -----------------------------------------------------------------------------

    def _hear(self, batch: Sequence[News | None]) -> None:
        """Write down what is accepted before anything counts it."""
        told = [news for news in batch if news is not None]
        self.ledger.write(
            Entry("accepted", session=news.session, task=news.task, accepted=news.message)
            for news in told
            if news.kind == "accepted"
        )
        for news in told:
            self.counts.events = max(self.counts.events, news.cursor)
            self.counts.crashes += news.kind == "crashed"
            self.counts.restarts += news.kind == "restarted"
            if news.kind in ("settled", "failed"):
                self._settle(news)

    def _settle(self, news: News) -> None:
        task = self.tasks[news.task]
        if task.outcome or news.message != task.message:
            return
        if news.outcome == "interrupted":
            self.counts.interrupted += 1
            task.attempt += 1
            task.asked = False
        else:
            self.counts.answered += news.outcome == "answered"
            task.outcome = news.outcome

    def _all_done(self) -> bool:
        return all(task.outcome for task in self.tasks.values())

    def _in_flight(self) -> int:
        return sum(task.in_flight for task in self.tasks.values())

    # --- acting --------------------------------------------------------------------------------

    def _ask(self, child: Child[News]) -> None:
        """Keep so many prompts in flight, and one in hand for each kill to come."""
        waiting = [task for task in self.tasks.values() if not (task.asked or task.outcome)]
        room = min(IN_FLIGHT - self._in_flight(), len(waiting) - len(self._kills))
        for task in waiting[: max(0, room)]:
            task.asked = True
            child.order(task.order())

    def _crash(self, child: Child[News]) -> None:
        """Make the actor of a busy session die; each session's once."""
        if not self._crashes or self.counts.answered < self._crashes[0]:
            return
        busy = {task.session for task in self.tasks.values() if task.in_flight} - self._victims
        if busy:
            self._crashes.pop(0)
            victim = self._chance.choice(sorted(busy))
            self._victims.add(victim)
            self.ledger.write([Entry("crash", session=victim)])
            child.order(Order("crash", session=victim))

    def _kill_is_due(self, *, asked: bool) -> bool:
        """At its moment, or when there is nothing to do but what is kept for after it."""
        if not self._kills:
            return False
        return self.counts.answered >= self._kills[0] or (asked and not self._in_flight())

    def _kill(self, child: Child[News]) -> None:
        in_flight = self._in_flight()
        child.kill()
        self.counts.kills += 1
        self.ledger.write([Entry("kill")])
        self._progress.say(f"SIGKILL: the process is gone, with {in_flight} prompts in flight.")

    def _stop(self, child: Child[News]) -> None:
        """Let the worker close its runtime in its own time."""
        child.order(Order("stop"))
        give_up = time.monotonic() + SILENCE_S
        while time.monotonic() < give_up:
            batch = child.take(TICK_S)
            self._hear(batch)
            self._show()
            if None in batch:
                return
        self.failure = f"The worker did not close within {SILENCE_S:g} s"

    def _mourn(self, child: Child[News]) -> None:
        """The worker died and nobody killed it."""
        code = child.bury()
        self._deaths += 1
        self.ledger.write([Entry("death")])
        self._progress.say(f"The process ended by itself (exit code {code}).")
        if self._deaths >= DEATHS:
            self.failure = f"The worker keeps dying: {self._last_words()}"

    def _last_words(self) -> str:
        log = self.plan.beside("log")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{lines[-1] if lines else 'it said nothing'} (see {log})"

    # --- showing -------------------------------------------------------------------------------

    def _greet(self, news: News, took_s: float) -> None:
        if news.recovered:
            self._progress.say(
                f"A new process made {news.recovered} sessions whole again "
                f"and goes on, {took_s:.1f} s later."
            )

    def _show(self) -> None:
        self.counts.in_flight = self._in_flight()
        self._progress.update(self.counts)
