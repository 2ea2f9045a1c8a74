"""One database file through many rounds: the processes that work on it, and what is checked."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final, TypeAlias

from understudy.gateway.chaos.book import Book
from understudy.gateway.chaos.words import News, Order, Promise
from understudy.gateway.pipes import Child
from understudy.testing.watch import Finding, Watch

Worker: TypeAlias = Child[News]

LEASE_S: Final = 1.5
PATIENCE_S: Final = 20.0
LOOK_S: Final = 0.1
AGAIN: Final = 6
SILENT: Final = ("understudy.supervisor", "No space left")


class Broken(Exception):
    """A process did not do what it must: (guarantee, what)."""

    def __init__(self, guarantee: str, what: str) -> None:
        super().__init__(guarantee, what)
        self.finding: Finding = (guarantee, what)


class Nursery:
    """Workers that have started and wait for their order: a restart need not wait for imports."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.started: list[Worker] = []
        self.spare = self._start()

    def _start(self) -> Worker:
        worker = Child("understudy.gateway.chaos.worker", news=News, log=self.log)
        self.started.append(worker)
        return worker

    def take(self) -> Worker:
        worker, self.spare = self.spare, self._start()
        return worker

    def bury(self, worker: Worker) -> None:
        """Kill it, and wait until it is dead."""
        worker.kill()
        worker.bury()
        self.started.remove(worker)

    def close(self) -> None:
        for worker in list(self.started):
            self.bury(worker)


class Life:
    """A database. ``worker`` is the process that has it now, at rest between rounds.

    Args:
        folder: where the database and what belongs to it are made.
        nursery: where processes come from.
        resume: turns that a restart interrupts go on after it.
        patience_s: how long the processes may take to settle.
        planted: a program that breaks the runtime on purpose in every process, for tests.

    Attributes:
        restarts: processes started on it.
        whole_s: seconds from each start until everything was settled.
        findings: what was broken, first things first.
    """

    def __init__(
        self,
        folder: Path,
        nursery: Nursery,
        *,
        resume: bool = False,
        patience_s: float = PATIENCE_S,
        planted: str = "",
    ) -> None:
        self.folder = folder / "db"
        self.folder.mkdir(parents=True)
        self.path = self.folder / "agent.db"
        self.book = Book(folder / "ledger")
        self.worker: Worker | None = None
        self.findings: list[Finding] = []
        self.restarts = 0
        self.whole_s: list[float] = []
        self.watch: Watch | None = None
        self.ids: dict[int, str] = {}
        self._nursery = nursery
        self._resume = resume
        self._patience_s = patience_s
        self._planted = planted
        self._logged = nursery.log.stat().st_size if nursery.log.exists() else 0

    # --- processes -----------------------------------------------------------------------------

    def begin(self, *, point: str = "", nth: int = 1) -> Worker:
        """A new process that opens a runtime on the file, to die at a point if one is given."""
        worker = self._nursery.take()
        self.restarts += 1
        worker.order(
            Order(
                "start",
                database=str(self.path),
                ledger=str(self.book.path),
                lease_s=LEASE_S,
                on_restart="resume" if self._resume else "interrupt",
                planted=self._planted,
                point=point,
                nth=nth,
            )
        )
        return worker

    def restart(self) -> Worker:
        """A new process, made whole and at rest."""
        began = time.monotonic()
        worker = self.begin()
        self.ids[worker.pid] = self.hear(worker, "ready").id
        self.rest(worker)
        self.whole_s.append(time.monotonic() - began)
        return worker

    def rest(self, *workers: Worker) -> None:
        """End what they do, and wait until nothing is open."""
        for worker in workers:
            worker.order(Order("rest", within_s=self._patience_s))
        for worker in workers:
            self.hear(worker, "settled")

    def bury(self, worker: Worker) -> None:
        self._nursery.bury(worker)

    def close(self) -> None:
        """The present process ends in good order."""
        assert self.worker is not None, "somebody has it"
        self.worker.order(Order("close"))
        self.hear(self.worker, "closed")
        self.bury(self.worker)
        self.worker = None

    def work(self, worker: Worker, seed: str) -> None:
        again = [each for each in self.book.new if each.kind == "accepted"][-AGAIN:]
        worker.order(Order("work", seed=seed, again=tuple(again)))

    def hear(self, worker: Worker, kind: str) -> News:
        """Wait for news of a kind; raises ``Broken`` when other news come, or none."""
        deadline = time.monotonic() + 2 * self._patience_s
        while time.monotonic() < deadline:
            for news in worker.take(LOOK_S):
                if news is None:
                    raise Broken("died", f"process {worker.pid} ended: {self._last_words()}")
                if news.kind == kind:
                    return news
                if news.kind in ("stuck", "failed"):
                    raise Broken(news.kind, news.what)
            self.look()
        raise Broken("silent", f"process {worker.pid} did not come to be {kind}")

    def dies(self, worker: Worker, *, timeout_s: float) -> bool:
        """Whether the process kills itself within so long. It is buried either way."""
        deadline = time.monotonic() + timeout_s
        dead = False
        while not dead and time.monotonic() < deadline:
            dead = None in worker.take(LOOK_S)
            self.look()
        self.bury(worker)
        return dead

    def pause(self, seconds: float) -> None:
        """Let them work for so long, and look on."""
        self.until(lambda _: False, timeout_s=seconds)

    def until(self, come: Callable[[Promise], bool], *, timeout_s: float) -> bool:
        """Wait for a promise of a kind to be written. False if that took too long."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if any(map(come, self.book.read())):
                return True
            self.look()
            time.sleep(min(left, LOOK_S / 4))
        return False

    # --- looking -------------------------------------------------------------------------------

    def look(self) -> None:
        """Follow the journal: every promise about single events is checked as they come."""
        if self.watch is None and self._has_schema():
            self.watch = Watch(self.path)
        if self.watch is not None:
            self.watch.committed()

    def _has_schema(self) -> bool:
        if not self.path.exists():
            return False
        try:
            with self.connect() as connection:
                return bool(connection.execute("PRAGMA user_version").fetchone()[0])
        except sqlite3.OperationalError:
            return False

    def connect(self) -> closing[sqlite3.Connection]:
        """To read only, without the project's own code."""
        uri = f"{self.path.as_uri()}?mode=ro"
        return closing(sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None))

    def look_away(self) -> None:
        """Before the file is moved."""
        if self.watch is not None:
            self.look()
            self.watch.close()

    def look_again(self) -> None:
        if self.watch is not None:
            self.watch.reopen(self.path)

    def held_by(self, worker: Worker) -> dict[str, tuple[int, int]]:
        """The sessions a process owns: epoch and number of the last event."""
        with self.connect() as connection:
            rows = connection.execute(
                "SELECT session_id, epoch, seq FROM claim WHERE owner = ?", (self.ids[worker.pid],)
            ).fetchall()
        return {session_id: (epoch, seq) for session_id, epoch, seq in rows}

    def lease_left_s(self, worker: Worker) -> float:
        """How long others will believe that a process lives."""
        with self.connect() as connection:
            row = connection.execute(
                "SELECT until_ms FROM runtime WHERE id = ?", (self.ids[worker.pid],)
            ).fetchone()
        return float(row[0] / 1000 - time.time()) if row is not None else 0.0

    def renews(self, worker: Worker, *, within_s: float) -> bool:
        """Whether a process renews its lease in time."""
        deadline = time.monotonic() + within_s
        left_s = self.lease_left_s(worker)
        while time.monotonic() < deadline:
            if (now_s := self.lease_left_s(worker)) > left_s:
                return True
            left_s = now_s
            time.sleep(LOOK_S / 10)
        return False

    def check(self) -> None:
        """Everything, while nothing runs."""
        self.look()
        self.book.read()
        if self.watch is not None:
            self.watch.check_rows()
            self.findings += self.watch.findings
            self.watch.findings.clear()
            _, findings = self.book.check(self.path)
            self.findings += findings
        self.findings += [("log", line) for line in self._errors()]

    def _errors(self) -> list[str]:
        """What the processes logged as an error, but for the crashes that were asked for."""
        with self._nursery.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._logged)
            lines = log.read().splitlines()
            self._logged = log.tell()
        loud = (line for line in lines if line.startswith(("ERROR", "CRITICAL", "Exception in")))
        return [line for line in loud if not any(name in line for name in SILENT)]

    def _last_words(self) -> str:
        lines = self._nursery.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"

    def counts(self) -> Counter[str]:
        """Prompts accepted, and their outcomes, in the whole life of the file."""
        counts: Counter[str] = Counter()
        if self.watch is not None:
            counts["accepted"] = len(self.watch.accepted)
            for outcomes in self.watch.outcomes.values():
                counts.update(outcomes)
        return counts
