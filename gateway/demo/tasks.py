"""What the demo is to do: a plan, and the tasks it comes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from understudy.errors import StoreUnreadable
from understudy.gateway.demo.files import choose, mtime_ns
from understudy.gateway.demo.ledger import Entry, Ledger, Order


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. Where a ledger is there already, its tasks have the last word."""

    database: Path
    root: Path
    sessions: int = 300
    kills: int = 3
    crashes: int = 12
    seed: int = 1

    def beside(self, suffix: str) -> Path:
        """A file of the demo's own, next to the database."""
        return self.database.with_name(f"{self.database.name}.{suffix}")


class Task(msgspec.Struct):
    """A question about a file to a session, asked until it is answered.

    ``asked`` is whether this life of the worker knows it, ``outcome`` its end.
    """

    key: str
    session: str
    file: str
    mtime_ns: int
    attempt: int = 1
    asked: bool = False
    outcome: str = ""

    @property
    def message(self) -> str:
        """The prompt's id, chosen here: to ask again is to ask the same."""
        return f"msg_{self.key}_{self.attempt}"

    @property
    def in_flight(self) -> bool:
        return self.asked and not self.outcome

    def order(self) -> Order:
        how = "Look at the" if self.attempt == 1 else "Go on: look at the"
        text = f"{how} file {self.file}"
        return Order("prompt", self.session, self.key, self.message, text)


def tasks(plan: Plan, ledger: Ledger) -> list[Task]:
    """The ledger's tasks as far as they had come, or the plan's, written to the ledger.

    Raises ``StoreUnreadable`` for a database that is somebody else's, ``InvalidInput`` when the
    root has no files to ask about.
    """
    if not ledger.of("task"):
        if plan.database.exists():
            raise StoreUnreadable(
                f"{plan.database} exists and has no ledger: it is no database of the demo",
                path=str(plan.database),
            )
        ledger.write(_entries(plan))
    found = {e.task: Task(e.task, e.session, e.file, e.mtime_ns) for e in ledger.of("task")}
    for entry in ledger.of("accepted"):
        task = found[entry.task]
        task.attempt = max(task.attempt, int(entry.accepted.rpartition("_")[2]))
    return list(found.values())


def _entries(plan: Plan) -> Iterator[Entry]:
    """A file for each session; every third has a second prompt, which waits in its inbox."""
    root = plan.root.resolve()
    files = choose(root, seed=plan.seed, leave_out=plan.database.name)
    count = 0
    for number in range(1, plan.sessions + 1):
        for letter in "ab" if number % 3 == 0 else "a":
            file = files[count % len(files)]
            count += 1
            yield Entry(
                "task",
                session=f"ses_{number:04d}",
                task=f"{number:04d}{letter}",
                file=file,
                root=str(root),
                mtime_ns=mtime_ns(root / file),
            )
