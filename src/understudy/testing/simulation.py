"""Simulations: a script played on the real runtime, watched, and then brought to rest."""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from understudy.actors.core.state import CompactionRules, Limits
from understudy.actors.hooks import HookCall
from understudy.actors.models.protocol import ModelRequest
from understudy.actors.session import Session
from understudy.actors.supervisor import RestartPolicy
from understudy.actors.tools.context import ToolContext
from understudy.errors import (
    CompactionFailed,
    TurnAborted,
    TurnFailed,
    UnderstudyError,
)
from understudy.gateway.audit import audit
from understudy.store.database import prepare
from understudy.store.events import Event
from understudy.store.lanes import waits
from understudy.testing.cast import Effects, model, unpaired
from understudy.testing.process import FAILURES, Process
from understudy.testing.scheduler import Scheduler
from understudy.testing.script import Act, write
from understudy.testing.watch import Finding, Watch

LEASE_S: Final = 15.0
SETTLE_STEPS: Final = 60_000
SETTLE_S: Final = 3_600.0
_SLOTS: Final = 4
_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a file system in memory, where there is one


class Result(msgspec.Struct, frozen=True):
    """What a simulation found.

    Attributes:
        findings: broken guarantees, the first one first; none if all is well.
        digest: of the trace; the same seed and script give the same.
        trace: the last happenings, or all of them.
        steps: how many things happened.
        events: how many events were committed.
    """

    seed: int | str
    script: tuple[Act, ...]
    findings: tuple[Finding, ...]
    digest: str
    trace: tuple[str, ...]
    steps: int
    events: int


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
        self.scheduler = Scheduler(seed)
        self.processes: list[Process] = []
        self.effects = Effects(self._tool_started)
        self._keep_trace = keep_trace
        self._log = log
        self._chance = self.scheduler.chance
        self._started = 0
        self._prompts: list[tuple[str, str, str]] = []
        self._talking = 0
        self._hooked = 0
        self._with_hooks = self._chance.random() < 0.25
        self._resume = self._chance.random() < 0.3
        self._turn_s = 120.0 if self._chance.random() < 0.3 else None
        self._thaws: list[tuple[float, Process]] = []

    def run(self) -> Result:
        """Play, settle, check. Raises nothing that the runtime does wrong: see ``findings``."""
        if self._keep_trace:
            self.scheduler.trace.keep_all()
        memory = str(_MEMORY) if _MEMORY.is_dir() else None
        token = waits.set(self.scheduler.wait)
        logger = logging.getLogger("understudy")
        level = logger.level
        if not self._log:
            logger.setLevel(logging.CRITICAL + 1)  # what it says of faults made on purpose
        try:
            with tempfile.TemporaryDirectory(prefix="understudy-", dir=memory) as folder:
                self.path = Path(folder) / "simulated.db"
                shutil.copyfile(_template(), self.path)
                self.watch = Watch(self.path)
                try:
                    self._play()
                finally:
                    for process in self.processes:
                        process.kill()
                    self.watch.close()
        finally:
            logger.setLevel(level)
            waits.reset(token)
        trace = self.scheduler.trace
        return Result(
            self.seed,
            self.script,
            tuple(self.watch.findings),
            trace.digest,
            tuple(trace.lines),
            self.scheduler.steps,
            self.watch.cursor,
        )

    def _play(self) -> None:
        for phase in (self._safety, self._liveness, self._oblivion):
            phase()
            if self.watch.findings:
                return

    # --- the phases ----------------------------------------------------------------------------

    def _safety(self) -> None:
        """Everything the script says, with faults."""
        for act in self.script:
            for _ in range(act.gap):
                self._thaw_due()
                self.scheduler.step(before_s=self.scheduler.clock.monotonic_s() + 1.0)
                if self.watch.findings:
                    return
            self.note(f"act {act}")
            getattr(self, f"_{act.verb}")(act)

    def _liveness(self) -> None:
        """No more faults: everything must come to its end."""
        self.note("settle")
        for process in self.alive():
            process.plan.clear()
            process.life.frozen = False
        self._thaws.clear()
        settled = self.settle(
            lambda: not self.watch.unfinished() and not self._talking, self._answer_everything
        )
        if not settled:
            for session_id in self.watch.unfinished():
                self.found("everything settles", f"{session_id} is unfinished")
            if self._talking:
                self.found("everybody is answered", f"{self._talking} callers still wait")
            return
        for process in self.alive():
            for problem in process.platform.problems():
                self.found("nothing escapes", problem)
        self.watch.check_rows()
        accepted = [
            (session_id, message_id)
            for session_id in self.watch.living()
            for message_id in self.watch.stories[session_id].accepted
        ]
        for violation in audit(self.path, accepted=accepted).violations:
            self.found(f"audit: {violation.kind}", f"{violation.session_id}: {violation.what}")
        for (session_id, call_id), times in self.effects.done.items():
            if times > 1:
                self.found("no call twice", f"{call_id} of {session_id}: {times} times")

    def _oblivion(self) -> None:
        """Delete everything: what a runtime keeps in memory is back to where it was."""
        self.note("delete everything")
        first, *others = self.alive()
        for process in others:
            process.close()

        def delete() -> None:
            for session_id in self.watch.living():
                self._spawn(first, _delete(Session(first.runtime, session_id)))

        if not self.settle(lambda: not self.watch.living() and not self._talking, delete):
            self.found("everything can be deleted", f"left: {self.watch.living()}")
            return
        clock = self.scheduler.clock
        end_s = clock.monotonic_s() + 5.0
        self.scheduler.run_until(
            lambda: clock.monotonic_s() >= end_s, steps=SETTLE_STEPS, limit_s=10.0
        )
        for place, count in _kept(first).items():
            if count:
                self.found("memory is given back", f"{place} keeps {count}")
        first.close()

    def settle(self, done: Callable[[], bool], help_on: Callable[[], None]) -> bool:
        """Run until ``done``, helping on now and then."""
        end = self.scheduler.steps + SETTLE_STEPS
        end_s = self.scheduler.clock.monotonic_s() + SETTLE_S
        while self.scheduler.steps < end and self.scheduler.clock.monotonic_s() < end_s:
            if not self.alive():
                self._start()
            help_on()
            for _ in range(60):
                self.scheduler.step(before_s=self.scheduler.clock.monotonic_s() + 10.0)
                if self.watch.findings:
                    return True
            if done():
                return True
        return False

    def _answer_everything(self) -> None:
        for _, ask in self.watch.open_asks():
            for process in self.alive():
                self._spawn(process, self._reply_to(process, ask["id"], ask["kind"], 0))
        for process in self.alive():
            for session_id in process.runtime.quarantined():
                self._spawn(process, _reset(Session(process.runtime, session_id)))

    # --- the processes -------------------------------------------------------------------------

    def alive(self) -> list[Process]:
        return [process for process in self.processes if process.alive]

    def at_work(self, a: int) -> Process:
        """A process that is alive and not frozen, started if need be."""
        if not self.alive():
            self._start()
        working = [process for process in self.alive() if not process.life.frozen]
        if not working:
            working = self.alive()
        return working[a % len(working)]

    def _start(self) -> None:
        """Start a process; what fails to start at first starts in the end."""
        for _ in range(20):
            self._started += 1
            name = f"p{self._started}"
            self.note(f"start {name}")
            process = Process(
                self.scheduler,
                name,
                self.path,
                committed=self._committed,
                model=model(self.seed, self._check_request),
                tools=self.effects.tools(),
                permissions={"guarded": "ask"},
                hooks={"after_turn": self._remember} if self._with_hooks else None,
                hook_s=10.0,
                on_restart="resume" if self._resume else "interrupt",
                limits=Limits(
                    steps=6,
                    model_attempts=3,
                    retry_s=30.0,
                    stream_idle_s=10.0,
                    tool_s=15.0,
                    turn_s=self._turn_s,
                    queue=8,
                ),
                compaction=CompactionRules(reserve=200, tail=200),
                restart=RestartPolicy(intensity=3, period_s=30.0, quarantine_after=4),
                lease_s=LEASE_S,
                passivate_after_s=8.0,
                handler_limit_s=5.0,
                command_timeout_s=90.0,
                seed=self._chance.getrandbits(64),
            )
            process.life.on_escape = self._escaped
            self.processes.append(process)
            try:
                process.run(process.runtime.start)
            except UnderstudyError as error:
                self.note(f"  {name} did not start: {type(error).__name__}")
                process.kill()
            if process.alive:
                process.engine.publisher.observe(self._published)
                self._spawn(process, self._follow(process), counted=False)
                return
        self.found("a runtime starts", "20 attempts failed")

    def _thaw_due(self) -> None:
        now_s = self.scheduler.clock.monotonic_s()
        for thaw in list(self._thaws):
            if thaw[0] <= now_s or not thaw[1].alive:
                self._thaws.remove(thaw)
                thaw[1].life.frozen = False
                self.note(f"thaw {thaw[1].name}")

    def _spawn(
        self, process: Process, work: Coroutine[Any, Any, None], *, counted: bool = True
    ) -> None:
        """A caller in a process: what it is told must be typed, true, and come at all."""
        self._talking += counted

        async def talk() -> None:
            try:
                await work
            except UnderstudyError as error:
                if process.alive:
                    self.note(f"  {process.name} says {type(error).__name__}")
            except Exception as error:  # noqa: BLE001 - that is the finding
                if process.alive:
                    self.found("errors are typed", f"{type(error).__name__}: {error}")

        def over(_: object) -> None:
            work.close()  # it may have been killed before its first step
            self._talking -= counted

        process.client.create_task(talk()).add_done_callback(over)

    # --- what is done to sessions --------------------------------------------------------------

    def _slot(self, number: int) -> str:
        """A session id: mostly of one that is there, else of one that may never have been."""
        living = self.watch.living()
        if living and number % 8:
            return living[number // 8 % len(living)]
        return f"s{number // 8 % _SLOTS}"

    def _session(self, act: Act) -> tuple[Process, Session]:
        process = self.at_work(act.b)
        return process, Session(process.runtime, self._slot(act.a))

    def _create(self, act: Act) -> None:
        process = self.at_work(act.b)
        number = act.a % _SLOTS
        parent_id = f"s{number - 2}" if number >= 2 else None

        async def create() -> None:
            await process.runtime.create_session(session_id=f"s{number}", parent_id=parent_id)

        self._spawn(process, create())

    def _prompt(self, act: Act) -> None:
        process, session = self._session(act)
        message_id = f"m{len(self._prompts)}"
        when_busy = ("queue", "queue", "queue", "steer", "interrupt", "reject")[act.b % 6]
        self._prompts.append((session.id, message_id, when_busy))
        self._spawn(process, self._ask(process, session, message_id, when_busy))

    def _again(self, act: Act) -> None:
        if self._prompts:
            session_id, message_id, when_busy = self._prompts[act.a % len(self._prompts)]
            process = self.at_work(act.b)
            session = Session(process.runtime, session_id)
            self._spawn(process, self._ask(process, session, message_id, when_busy))

    async def _ask(
        self, process: Process, session: Session, message_id: str, when_busy: Any
    ) -> None:
        turn = await session.prompt(
            f"prompt {message_id}", message_id=message_id, when_busy=when_busy
        )
        key = (session.id, message_id)
        if key not in self.watch.accepted:
            self.found("what a caller was told is durable", f"{message_id} of {session.id}")
        try:
            await turn.result()
        except TurnAborted as error:
            told = (
                {"deleted"} if error.data.get("reason") == "delete" else {"interrupted", "rejected"}
            )
        except TurnFailed:
            told = {"failed"}
        else:
            told = {"answered"}
        if told != {"deleted"} and not told & self.watch.outcomes[key]:
            self.found(
                "callers are told the outcome",
                f"{message_id} of {session.id}: {told}, not {self.watch.outcomes[key]}",
            )

    def _abort(self, act: Act) -> None:
        process, session = self._session(act)

        async def abort() -> None:
            await session.abort(queued=act.b % 3 == 0)

        self._spawn(process, abort())

    def _compact(self, act: Act) -> None:
        process, session = self._session(act)

        async def compact() -> None:
            compaction = await session.compact()
            try:
                await compaction.result()
            except CompactionFailed:
                return

        self._spawn(process, compact())

    def _update(self, act: Act) -> None:
        process, session = self._session(act)

        async def update() -> None:
            await session.update(title=f"title {act.b}")

        self._spawn(process, update())

    def _revert(self, act: Act) -> None:
        process, session = self._session(act)

        async def revert() -> None:
            messages = await session.messages()
            if messages:
                await session.revert(messages[act.b % len(messages)].id)

        self._spawn(process, revert())

    def _unrevert(self, act: Act) -> None:
        process, session = self._session(act)

        async def unrevert() -> None:
            await session.unrevert()

        self._spawn(process, unrevert())

    def _fork(self, act: Act) -> None:
        process, session = self._session(act)

        async def fork() -> None:
            await session.fork()

        self._spawn(process, fork())

    def _delete(self, act: Act) -> None:
        process, session = self._session(act)
        self._spawn(process, _delete(session))

    def _reset(self, act: Act) -> None:
        process, session = self._session(act)
        self._spawn(process, _reset(session))

    def _look(self, act: Act) -> None:
        process, session = self._session(act)

        async def look() -> None:
            await session.status()
            await session.messages(limit=5)
            await process.runtime.sessions()

        self._spawn(process, look())

    def _reply(self, act: Act) -> None:
        process = self.at_work(act.b)
        asks = self.watch.open_asks()
        if asks:
            _, ask = asks[act.a % len(asks)]
            self._spawn(process, self._reply_to(process, ask["id"], ask["kind"], act.b))

    async def _reply_to(self, process: Process, ask_id: str, kind: str, number: int) -> None:
        if kind == "question":
            await process.runtime.reply(ask_id, answers=[["yes"]])
        else:
            reply: Any = ("once", "always", "reject")[number % 3]
            await process.runtime.reply(ask_id, reply)

    def _rest(self, act: Act) -> None:
        self.scheduler.clock.advance((0.3, 1.0, 3.0, 9.0, 31.0)[act.a % 5])

    # --- faults --------------------------------------------------------------------------------

    def _crash(self, act: Act) -> None:
        process, session = self._session(act)

        async def crash() -> None:
            await session._crash()  # noqa: SLF001 - made for this

        self._spawn(process, crash())

    def _kill(self, act: Act) -> None:
        process = self.at_work(act.a)
        self.note(f"  kill {process.name}")
        process.kill()

    def _kill_at(self, act: Act) -> None:
        point = ("begin", "commit", "committed")[act.b % 3]
        self.at_work(act.a).plan.kill_at = (point, 1 + act.b % 4)

    def _close(self, act: Act) -> None:
        process = self.at_work(act.a)
        self.note(f"  close {process.name}")
        process.plan.clear()
        process.close()

    def _second(self, act: Act) -> None:
        if len(self.alive()) < 2:
            self._start()

    def _freeze(self, act: Act) -> None:
        process = self.at_work(act.a)
        if process.life.frozen:
            return
        seconds = (1.0, 8.0, 2 * LEASE_S, 4 * LEASE_S)[act.b % 4]
        process.life.frozen = True
        self._thaws.append((self.scheduler.clock.monotonic_s() + seconds, process))
        self.note(f"  freeze {process.name} for {seconds} s")
        if len(self.alive()) < 2 and act.b % 3:
            self._start()

    def _fail(self, act: Act) -> None:
        kind = tuple(FAILURES)[act.a % len(FAILURES)]
        point = ("begin", "commit")[act.b % 2]
        self.at_work(act.b).plan.failures += [(point, kind)] * (1 + act.b % 5)

    def _hang(self, act: Act) -> None:
        self.at_work(act.a).plan.hang_s.append((2.0, 9.0, 20.0)[act.b % 3])

    def _deliver(self, act: Act) -> None:
        fates = ("lost", "late", "twice", "twice")
        self.at_work(act.a).plan.deliveries += ["well"] * (act.b % 4) + [fates[act.a % 4]]

    def _jump(self, act: Act) -> None:
        self.scheduler.clock.jump_wall((-7200.0, -3.0, 5.0, 86_400.0)[act.a % 4])

    # --- what is watched -----------------------------------------------------------------------

    def note(self, line: str) -> None:
        self.scheduler.trace.note(line)

    def found(self, guarantee: str, what: str) -> None:
        self.note(f"FOUND {guarantee}: {what}")
        self.watch.found(guarantee, what)

    def _escaped(self, error: Exception) -> None:
        self.found("nothing escapes", f"{type(error).__name__}: {error}")

    def _committed(self, process: Process) -> None:
        for line in self.watch.committed():
            self.note(line)

    def _published(self, event: Event) -> None:
        if event.cursor is not None and event.cursor > self.watch.cursor:
            self.found("published means committed", f"{event.type}, cursor {event.cursor}")

    def _check_request(self, request: ModelRequest) -> None:
        problem = unpaired(request)
        if problem is not None:
            self.found("calls have results in every request", f"{request.session_id}: {problem}")

    def _tool_started(self, context: ToolContext) -> None:
        """Its start is committed, and its end is not.

        A process that froze may find that others ended its calls meanwhile; that is not asked.
        """
        states = self.watch.tool_states(context.session_id, context.message_id)
        state = states.get(context.call_id, "running")
        owner = self.watch.owner(context.session_id)
        mine = any(p.life is self.scheduler.running and p.engine.id == owner for p in self.alive())
        if state != "running" and mine:
            self.found("a tool's start is committed first", f"{context.call_id} is {state}")

    async def _follow(self, process: Process) -> None:
        """A subscriber: every event once, in order, none left out."""
        cursor = process.runtime.cursor
        async for event in process.runtime.events(after=cursor):
            if event.cursor is not None:
                if event.cursor != cursor + 1:
                    self.found("subscribers see all", f"{event.cursor} follows {cursor}")
                cursor = event.cursor

    async def _remember(self, call: HookCall) -> None:
        """A hook that uses the runtime, as a memory does."""
        self._hooked += 1
        if call.session.record.internal or call.session.title == "memory":
            self.found("hooks do not loop", f"{call.hook} of {call.session.id}")
        session = await call.session.runtime.create_session(title="memory")
        turn = await session.prompt("remember this")
        try:
            await turn.result(timeout_s=5.0)
        finally:
            await session.delete(missing_ok=True)


async def _delete(session: Session) -> None:
    await session.delete(missing_ok=True)


async def _reset(session: Session) -> None:
    await session.reset()


def _kept(process: Process) -> dict[str, int]:
    """What a runtime remembers of sessions, by place."""
    engine = process.engine
    executor, publisher = engine.executor, engine.publisher
    return {
        "registry": len(engine.registry),
        "outcomes": len(engine.outcomes),
        "executions": sum(
            bool(each.tasks)
            for each in executor._executions.values()  # noqa: SLF001 - memory shows from inside
        ),
        "asks": len(executor._asks),  # noqa: SLF001
        "recalled": len(executor._recalled),  # noqa: SLF001
        "unstarted": len(executor._unstarted),  # noqa: SLF001
        "streams": len(publisher._streams),  # noqa: SLF001
        "subscriptions by session": len(publisher._by_session),  # noqa: SLF001
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
