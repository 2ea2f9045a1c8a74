"""What the demo has shown: the audit's findings against the parent's own books."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from understudy.gateway.audit import Audit, Violation, audit
from understudy.gateway.demo.conductor import Conductor
from understudy.gateway.demo.files import facts, mtime_ns
from understudy.gateway.demo.ledger import effects_of
from understudy.store.database import translated


class Verdict(msgspec.Struct, kw_only=True):
    """Counts by what they count, in the order they are shown; and whatever was broken."""

    sessions: int
    accepted: int
    answered: int
    interrupted: int
    lost: int
    duplicated: int
    stuck: int
    wrong: int
    other: int
    checked: int
    changed: int
    crashes: int
    restarts: int
    kills: int
    runs: int
    events: int
    seconds: float
    broken: list[Violation]

    @property
    def good(self) -> bool:
        return not self.broken


def judge(conductor: Conductor, *, seconds: float) -> Verdict:
    """Audit the database, and compare every answer with its file.

    Raises ``StoreError`` when there is no database to audit.
    """
    plan, ledger = conductor.plan, conductor.ledger
    accepted = {(entry.session, entry.accepted) for entry in ledger.of("accepted")}
    with translated(plan.database):
        found = audit(
            plan.database,
            accepted=accepted,
            effects=effects_of(plan.beside("effects")),
            effect_tool="note",
        )
    wrong, checked, changed = _compare(conductor, found)
    unasked = [
        Violation("lost", session_id, f"prompt {message_id} is in no ledger")
        for session_id, message_id in found.answers.keys() - accepted
    ]
    if conductor.failure:
        found.violations.append(Violation("stuck", "", conductor.failure))
    named = ("lost", "duplicated", "stuck")
    return Verdict(
        sessions=found.sessions,
        accepted=len(accepted),
        answered=found.outcomes["answered"],
        interrupted=found.outcomes["interrupted"],
        lost=len(found.of("lost")) + len(unasked),
        duplicated=len(found.of("duplicated")),
        stuck=len(found.of("stuck")),
        wrong=len(wrong),
        other=sum(each.kind not in named for each in found.violations),
        checked=checked,
        changed=changed,
        crashes=found.events["actor.crashed"],
        restarts=found.events["actor.restarted"],
        kills=len(ledger.of("kill")),
        runs=len(ledger.of("start")),
        events=sum(found.events.values()),
        seconds=round(seconds, 1),
        broken=[*found.violations, *unasked, *wrong],
    )


def _compare(conductor: Conductor, found: Audit) -> tuple[list[Violation], int, int]:
    """Wrong answers, and how many were right and how many files changed meanwhile."""
    wrong, right, changed = [], 0, 0
    for task in conductor.tasks.values():
        path = Path(conductor.root, task.file)
        real = facts(path)
        text = found.answers.get((task.session, task.message))
        if real is not None and text == real.answer(task.file):
            right += 1
        elif text is None:
            wrong.append(Violation("outcome", task.session, f"{task.message} was not answered"))
        elif mtime_ns(path) != task.mtime_ns:
            changed += 1
        else:
            wrong.append(Violation("outcome", task.session, f"wrong about {task.file}: {text}"))
    return wrong, right, changed


def rows(verdict: Verdict) -> list[tuple[str, str]]:
    """The table for people."""
    shown: dict[str, Any] = {
        "sessions": verdict.sessions,
        "prompts accepted": verdict.accepted,
        "  answered": verdict.answered,
        "  interrupted, then asked again": verdict.interrupted,
        "lost": verdict.lost,
        "duplicated": verdict.duplicated,
        "stuck": verdict.stuck,
        "answers checked against the files": verdict.checked,
        "  wrong": verdict.wrong,
    }
    if verdict.changed:
        shown["  whose file changed meanwhile"] = verdict.changed
    shown["actor crashes"] = verdict.crashes
    shown["  restarted"] = verdict.restarts
    if verdict.crashes > verdict.restarts:
        shown["  killed with the process first"] = verdict.crashes - verdict.restarts
    shown["kills of the process"] = verdict.kills
    shown["events published"] = verdict.events
    shown["time"] = f"{verdict.seconds:.1f} s"
    return [(name, f"{n:,}" if isinstance(n, int) else str(n)) for name, n in shown.items()]
