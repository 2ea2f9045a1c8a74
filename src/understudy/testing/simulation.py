"""Simulations: a script played on the real runtime, watched, and then brought to rest."""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from understudy.actors.session import Session
from understudy.gateway.audit import audit
from understudy.store.database import prepare
from understudy.store.lanes import waits
from understudy.testing.faults import Faults
from understudy.testing.process import Process
from understudy.testing.rules import Finding
from understudy.testing.scheduler import Scheduler
from understudy.testing.script import FAULTS, Act, write
from understudy.testing.stage import HANDLER_LIMIT_S, Stage
from understudy.testing.workload import Workload

SETTLE_STEPS: Final = 60_000
SETTLE_S: Final = 3_600.0
_QUIET_S: Final = 5.0
_PAUSE_MS: Final = 3_000  # what chance may let pass before a renewal that is due
_QUARANTINE_S: Final = 15.0  # long enough to tell everybody who waits
_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a file system in memory, where there is one


class Result(msgspec.Struct, frozen=True):
    """What a simulation found.

    Attributes:
        findings: broken guarantees, the first one first; none if all is well.
        digest: of the trace; the same seed and script give the same.
        trace: the last happenings, or all of them.
        steps: how many things happened.
        events: how many events were committed.
        seen: how often what happened: proof that a seed is no empty one.
    """

    seed: int | str
    script: tuple[Act, ...]
    findings: tuple[Finding, ...]
    digest: str
    trace: tuple[str, ...]
    steps: int
    events: int
    seen: dict[str, int] = {}


class Simulation:
    """One seed. ``run`` plays its script, or the given one, and says what was found.

    Args:
        seed: decides everything.
        steps: about how many things happen before the faults end.
        script: what is done, instead of what the seed says.
        faults: whether a script of the seed's has any.
        keep_trace: keep the whole trace, not only its end.
        log: let the runtime log, which says much about faults made on purpose.
    """

    def __init__(
        self,
        seed: int | str,
        *,
        steps: int = 300,
        script: Sequence[Act] | None = None,
        faults: bool = True,
        keep_trace: bool = False,
        log: bool = False,
    ) -> None:
        self.seed = seed
        self.script = (
            tuple(script) if script is not None else write(seed, steps=steps, faults=faults)
        )
        self._keep_trace = keep_trace
        self._log = log

    def run(self) -> Result:
        """Play, settle, check. Raises nothing that the runtime does wrong: see ``findings``."""
        scheduler = Scheduler(self.seed)
        if self._keep_trace:
            scheduler.trace.keep_all()
        memory = str(_MEMORY) if _MEMORY.is_dir() else None
        with (
            _surroundings(scheduler, log=self._log),
            tempfile.TemporaryDirectory(prefix="understudy-", dir=memory) as folder,
        ):
            path = Path(folder) / "simulated.db"
            shutil.copyfile(_template(), path)
            stage = Stage(self.seed, scheduler, path)
            stage.listeners.connect()
            try:
                _Play(stage, self.script).run()
            finally:
                stage.listeners.disconnect()
                for process in stage.processes:
                    process.kill()
                stage.watch.close()
        return Result(
            self.seed,
            self.script,
            tuple(stage.watch.findings),
            scheduler.trace.digest,
            tuple(scheduler.trace.lines),
            scheduler.steps,
            stage.watch.cursor,
            dict(stage.seen + stage.watch.types),
        )


class _Play:
    """A script on a stage: with faults, then without until all is settled, then to nothing."""

    def __init__(self, stage: Stage, script: Sequence[Act]) -> None:
        self._stage = stage
        self._script = script
        self._scheduler = stage.scheduler
        self._watch = stage.watch
        self._workload = Workload(stage)
        self._faults = Faults(stage, self._workload)

    def run(self) -> None:
        for phase in (self._safety, self._liveness, self._oblivion):
            phase()
            if self._watch.findings:
                return

    def _safety(self) -> None:
        """Everything the script says, with faults."""
        for act in self._script:
            for _ in range(act.gap):
                self._stage.thaw_due()
                self._scheduler.step(before_s=self._stage.now_s + 1.0)
                if self._watch.findings:
                    return
            self._stage.note(f"act {act}")
            getattr(self._faults if act.verb in FAULTS else self._workload, act.verb)(act)

    def _liveness(self) -> None:
        """No more faults: everything must come to its end."""
        self._stage.note("settle")
        for process in self._stage.alive():
            process.plan.clear()
        self._stage.freeze_in_call_s = None
        if not self._thaw():
            return
        for _ in range(3):  # what came last may still be on its way to who listens
            if not self._settle(self._is_settled, self._answer_everything, rest=True):
                break
            if self._watch.findings:
                return
            if not self._stage.listeners.behind():
                self._check_at_rest()
                return
        for late in self._stage.listeners.behind():
            self._stage.found("everybody is told everything", late)
        for session_id in self._watch.unfinished():
            self._stage.found("everything settles", f"{session_id} is unfinished")
        if self._stage.talking:
            self._stage.found("everybody is answered", f"{self._stage.talking} callers wait")

    def _thaw(self) -> bool:
        """Whoever is frozen stays so until others may have taken over what it has."""
        while self._stage.someone_is_frozen:
            self._scheduler.step(before_s=self._stage.now_s + 1.0)
            self._stage.thaw_due()
            if self._watch.findings:
                return False
        return True

    def _is_settled(self) -> bool:
        watch, stage = self._watch, self._stage
        resting = any(story.quarantined for story in watch.stories.values())
        return not (watch.unfinished() or resting or stage.talking)

    def _check_at_rest(self) -> None:
        stage, watch = self._stage, self._watch
        leases, now_ms = watch.leases(), self._scheduler.clock.wall_ms()
        for process in stage.alive():
            for problem in process.platform.problems():
                stage.found("nothing escapes", problem)
            if leases.get(process.engine.id, 0) <= now_ms - _PAUSE_MS:
                stage.found("who lives renews its lease", process.name)
            for session_id in process.runtime.quarantined():  # nobody is any more
                stage.found("a reset is heard by all", f"{session_id} in {process.name}")
            if process.hung_s > HANDLER_LIMIT_S + _QUIET_S and not process.life.was_frozen:
                stage.found("who hangs is replaced", f"{process.name} after {process.hung_s:g} s")
            for session_id in process.works_for():
                if watch.owner(session_id) not in (None, process.engine.id):
                    stage.found("who lost a session lets go", f"{session_id} in {process.name}")
        watch.check_rows()
        stage.check_outputs()
        stage.hooks.check()
        accepted = [
            (session_id, message_id)
            for session_id in watch.living()
            for message_id in watch.stories[session_id].accepted
        ]
        for violation in audit(stage.path, accepted=accepted).violations:
            stage.found(f"audit: {violation.kind}", f"{violation.session_id}: {violation.what}")
        for (session_id, _, call_id), times in stage.effects.done.items():
            if times > 1:
                stage.found("no call twice", f"{call_id} of {session_id}: {times} times")

    def _oblivion(self) -> None:
        """Delete everything: what a runtime keeps in memory is back to where it was."""
        stage = self._stage
        stage.note("delete everything")
        first, *others = stage.alive()
        for process in others:
            process.close()

        def delete() -> None:
            for session_id in self._watch.living():
                session = Session(first.runtime, session_id)
                stage.spawn(first, self._workload.callers.delete(first, session))

        if not self._settle(lambda: not self._watch.living() and not stage.talking, delete):
            stage.found("everything can be deleted", f"left: {self._watch.living()}")
            return
        self._quiet()
        for place, count in _kept(first, stage.effects.stuck).items():
            if count:
                stage.found("memory is given back", f"{place} keeps {count}")
        first.close()

    # --- coming to rest --------------------------------------------------------------------------

    def _settle(
        self, done: Callable[[], bool], help_on: Callable[[], None], *, rest: bool = False
    ) -> bool:
        """Run until ``done``, helping on now and then; with ``rest`` done and quiet for a while."""
        end = self._scheduler.steps + SETTLE_STEPS
        end_s = self._stage.now_s + SETTLE_S
        while self._scheduler.steps < end and self._stage.now_s < end_s:
            if not self._stage.alive():
                self._stage.start()
            help_on()
            for _ in range(60):
                self._scheduler.step(before_s=self._stage.now_s + 10.0)
                if self._watch.findings:
                    return True
            if done():
                if rest:
                    self._quiet()
                if done():
                    return True
        return False

    def _quiet(self) -> None:
        """A while in which nobody asks for anything."""
        end_s = self._stage.now_s + _QUIET_S
        self._scheduler.run_until(
            lambda: self._stage.now_s >= end_s, steps=SETTLE_STEPS, limit_s=2 * _QUIET_S
        )

    def _answer_everything(self) -> None:
        stage, callers = self._stage, self._workload.callers
        for _, ask in self._watch.open_asks():
            for process in stage.alive():
                stage.spawn(process, callers.reply(process, ask["id"], ask["kind"], 1))
        last = stage.alive()[-1]  # whoever else knows of the quarantine hears that it is over
        for story in self._watch.stories.values():
            if story.quarantined and stage.now_s - story.quarantined_s > _QUARANTINE_S:
                stage.spawn(last, callers.reset(last, Session(last.runtime, story.id)))


@contextmanager
def _surroundings(scheduler: Scheduler, *, log: bool) -> Iterator[None]:
    """Waits are the scheduler's, and the runtime does not log."""
    token = waits.set(scheduler.wait)
    logger = logging.getLogger("understudy")
    level = logger.level
    if not log:
        logger.setLevel(logging.CRITICAL + 1)  # what it says of faults made on purpose
    try:
        yield
    finally:
        logger.setLevel(level)
        waits.reset(token)


def _kept(process: Process, stuck: Sequence[Any]) -> dict[str, int]:
    """What a runtime remembers of sessions, by place, and the stuck calls it did not end."""
    engine = process.engine
    executor, publisher = engine.executor, engine.publisher
    return {
        "registry": len(engine.registry),
        "outcomes": len(engine.outcomes),
        "executions": len(executor._executions),  # noqa: SLF001 - memory shows from inside
        "stuck calls": sum(call._executor is executor for call in stuck),  # noqa: SLF001
        "asks": len(executor._asks),  # noqa: SLF001
        "unstarted": len(executor._unstarted),  # noqa: SLF001
        "streams": len(publisher._streams),  # noqa: SLF001
        "recent crashes": len(engine.supervisor._recent),  # noqa: SLF001
        "quarantined": len(engine.registry.quarantined),
    }


@functools.cache
def _template() -> Path:
    """An empty database, made once."""
    folder = Path(tempfile.mkdtemp(prefix="understudy-"))
    path = folder / "template.db"
    database = prepare(path, durability="normal")
    database.close()
    return path
