"""The stage: the processes of a simulation, those who call into them, and everybody who watches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from understudy.actors.core.state import CompactionRules, Limits
from understudy.actors.models.protocol import ModelRequest
from understudy.actors.supervisor import RestartPolicy
from understudy.actors.tools.context import ToolContext
from understudy.errors import CommandTimeout, UnderstudyError
from understudy.store.events import Event
from understudy.store.journal import Retention
from understudy.testing.cast import Effects, model, output_of
from understudy.testing.claims import Claims
from understudy.testing.hooks import MemoryHooks
from understudy.testing.intensity import PERIOD_S, Intensity
from understudy.testing.listeners import Listeners
from understudy.testing.patience import Patience
from understudy.testing.process import Process
from understudy.testing.requests import problem_of
from understudy.testing.rules import IDLE_S, MODEL_ATTEMPTS, QUEUE, STEPS, TOOL_S
from understudy.testing.scheduler import Scheduler
from understudy.testing.tracking import Tracking
from understudy.testing.watch import Watch

LEASE_S: Final = 15.0
HANDLER_LIMIT_S: Final = 5.0
PASSIVATE_S: Final = 8.0
QUARANTINE_AFTER: Final = 4
BACKOFF_S: Final = 0.05
_STARTS: Final = 20
_ANSWER_S: Final = 80.0  # within this a runtime that is awake answers
_TIMEOUT_S: Final = 150.0  # with a freeze in between


class Settings:
    """What a seed decides about its runtimes, once."""

    def __init__(self, seed: int | str, chance: random.Random) -> None:
        # By a chance of its own: what else a seed decides stays as it was.
        self.intensity = random.Random(f"{seed}/intensity").choice((2, 3, 3))
        self.hooks = chance.random() < 0.25
        self.resume = chance.random() < 0.3
        self.turn_s = chance.choice((10.0, 120.0)) if chance.random() < 0.4 else None
        self.jumps = chance.random() < 0.5
        self.keep = chance.choice((60, 200)) if chance.random() < 0.3 else None


class Stage:
    """Where a script is played.

    Attributes:
        steady: no clock was set, so what leases say is what they mean.
        talking: callers who wait for an answer.
        let_pass_s: how long nothing could happen, because the script let time pass.
        waiting: those who wait for the end of a turn: where, and of which session.
    """

    def __init__(self, seed: int | str, scheduler: Scheduler, path: Path) -> None:
        self.seed = seed
        self.scheduler = scheduler
        self.path = path
        self.settings = Settings(seed, scheduler.chance)
        self.watch = Watch(
            path,
            now_s=scheduler.clock.monotonic_s,
            claims=Claims(self._is_steady),
            keep=self.settings.keep,
            quarantine_after=QUARANTINE_AFTER,
            backoff_s=BACKOFF_S,
            limited=True,
            turn_s=self.settings.turn_s,
            calm_s=lambda: self.patience.calm_s,
        )
        self.unreverting = self.watch.unreverting = Counter()
        self.processes: list[Process] = []
        self._intensities: dict[Process, Intensity] = {}
        self.effects = Effects(self._tool_started)
        self.hooks = MemoryHooks(self)
        self.listeners = Listeners(self)
        self.tracking = Tracking(self)
        self.steady = True
        self.talking = 0
        self.let_pass_s = 0.0
        self.waiting: dict[int, tuple[Process, str]] = {}
        self.patience = Patience(self)
        scheduler.on_calm = self.patience.passes
        self.seen: Counter[str] = Counter()
        self.freeze_in_call_s: float | None = None  # whoever begins a call next
        self._heir_wanted = False
        self._called: set[tuple[str, str]] = set()
        self._started = 0
        self._thaws: list[tuple[float, float, Process]] = []

    # --- saying ----------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        return self.scheduler.clock.monotonic_s()

    @property
    def working_s(self) -> float:
        """The time, without what was let pass in which nothing could happen."""
        return self.now_s - self.let_pass_s

    def note(self, line: str) -> None:
        self.scheduler.trace.note(line)

    def found(self, guarantee: str, what: str) -> None:
        self.note(f"FOUND {guarantee}: {what}")
        self.watch.found(guarantee, what)

    # --- processes -------------------------------------------------------------------------------

    def alive(self) -> list[Process]:
        return [process for process in self.processes if process.alive]

    def at_work(self, a: int) -> Process:
        """A process that is alive and not frozen, started if need be."""
        if not self.alive():
            self.start()
        working = [process for process in self.alive() if not process.life.frozen]
        if not working:
            working = self.alive()
        return working[a % len(working)]

    def running(self) -> Process | None:
        """Whose code this is."""
        for process in self.processes:
            if process.life is self.scheduler.running:
                return process
        return None

    def start(self) -> None:
        """Start a process; what fails to start at first starts in the end."""
        for _ in range(_STARTS):
            self._started += 1
            process = self._process(f"p{self._started}")
            self.note(f"start {process.name}")
            resting = self._quarantined()
            self.processes.append(process)
            self.listeners.expect(process)
            try:
                process.run(process.runtime.start)
            except UnderstudyError as error:
                self.note(f"  {process.name} did not start: {type(error).__name__}")
                process.kill()
            if process.alive:
                self.listeners.follow(process)
                self.tracking.started(process)
                known = process.runtime.quarantined().keys()
                for session_id in resting & self._quarantined() - known:
                    self.found("quarantine outlives a runtime", f"{session_id} in {process.name}")
                return
        self.found("a runtime starts", f"{_STARTS} attempts failed")

    def _process(self, name: str) -> Process:
        settings = self.settings
        keep = settings.keep
        process = Process(
            self.scheduler,
            name,
            self.path,
            committed=self._committed,
            found=self.found,
            model=model(self.seed, self._check_request),
            tools=self.effects.tools,
            permissions={"guarded": "ask"},
            hooks=self.hooks.functions() if settings.hooks else None,
            hook_s=10.0,
            on_restart="resume" if settings.resume else "interrupt",
            limits=Limits(
                steps=STEPS,
                model_attempts=MODEL_ATTEMPTS,
                retry_s=30.0,
                stream_idle_s=IDLE_S,
                tool_s=TOOL_S,
                turn_s=settings.turn_s,
                queue=QUEUE,
            ),
            compaction=CompactionRules(reserve=200, tail=200),
            restart=RestartPolicy(
                intensity=settings.intensity,
                period_s=PERIOD_S,
                quarantine_after=QUARANTINE_AFTER,
                backoff_s=BACKOFF_S,
            ),
            retention=None if keep is None else Retention(age_s=1e9, events=keep),
            lease_s=LEASE_S,
            passivate_after_s=PASSIVATE_S,
            handler_limit_s=HANDLER_LIMIT_S,
            command_timeout_s=_TIMEOUT_S,
            seed=self.scheduler.chance.getrandbits(64),
        )
        self._intensities[process] = Intensity(
            process.engine.store,
            self.scheduler.clock,
            allowed=settings.intensity,
            in_a_row=QUARANTINE_AFTER,
        )
        process.life.on_escape = self._escaped
        process.engine.publisher.observe(lambda event: self._published(process, event))
        return process

    def _quarantined(self) -> set[str]:
        return {story.id for story in self.watch.stories.values() if story.quarantined}

    def freeze(self, process: Process, seconds: float) -> None:
        """Until so much time has passed in which others could do all they wanted."""
        process.life.freeze()
        self._thaws.append((self.now_s, self.scheduler.calm_s + seconds, process))
        self.note(f"  freeze {process.name} for {seconds} s")

    @property
    def someone_is_frozen(self) -> bool:
        return bool(self._thaws)

    def thaw_due(self) -> None:
        """Thaw whose time has come; and start who takes over what others have, if nobody is there.

        Called between happenings: a process starts in none.
        """
        if self._heir_wanted:
            self._heir_wanted = False
            if len(self.alive()) < 2:
                self.start()
        for thaw in list(self._thaws):
            since_s, until_s, process = thaw
            if until_s <= self.scheduler.calm_s or not process.alive:
                self._thaws.remove(thaw)
                process.life.frozen = False
                process.life.frozen_s += self.now_s - since_s
                self.note(f"thaw {process.name}")

    # --- callers ---------------------------------------------------------------------------------

    def spawn(
        self, process: Process, work: Coroutine[Any, Any, None], *, counted: bool = True
    ) -> None:
        """A caller in a process: what it is told must be typed, true, and come at all."""
        self.talking += counted

        async def talk() -> None:
            began_s = self._awake_s(process)
            try:
                await work
            except UnderstudyError as error:
                if process.alive:
                    self.note(f"  {process.name} says {type(error).__name__}")
                    late = self._awake_s(process) - began_s > _ANSWER_S
                    if isinstance(error, CommandTimeout) and late:
                        self.found("everybody is answered", f"{process.name}: {error}")
            except Exception as error:  # noqa: BLE001 - that is the finding
                if process.alive:
                    self.found("errors are typed", f"{type(error).__name__}: {error}")

        def over(_: object) -> None:
            work.close()  # it may have been killed before its first step
            self.talking -= counted

        process.client.create_task(talk()).add_done_callback(over)

    def _awake_s(self, process: Process) -> float:
        """Time in which it could do something, if not all of it."""
        return self.working_s - process.life.frozen_s

    # --- what is watched -------------------------------------------------------------------------

    def _escaped(self, error: Exception) -> None:
        self.found("nothing escapes", f"{type(error).__name__}: {error}")

    def _committed(self, process: Process) -> None:
        ended, cursor = len(self.watch.ended), self.watch.cursor
        for line in self.watch.committed(process.engine.id):
            self.note(line)
        crashes = {story.id: story.crashes for story in self.watch.stories.values()}
        news = self.watch.log[cursor:]
        for gone in [event.session_id for event in news if event.kind == "session.deleted"]:
            for intensity in self._intensities.values():
                intensity.deleted(gone)
        for finding in self._intensities[process].committed(news, crashes):
            self.found(*finding)
        self.hooks.expect(process, self.watch.ended[ended:])
        seconds = self.freeze_in_call_s
        if seconds is not None and self._is_to_call(process):
            self.freeze_in_call_s = None
            self.freeze(process, seconds)
            self._heir_wanted = True

    def _is_to_call(self, process: Process) -> bool:
        """A call of a process has its start committed, and has not begun."""
        return any(
            part["type"] == "tool"
            and part["state"]["status"] == "running"
            and (story.id, part["callID"]) not in self._called
            for story in self.watch.stories.values()
            for part in story.tables["part"].values()
            if self.watch.owner(story.id) == process.engine.id
        )

    def _published(self, process: Process, event: Event) -> None:
        if event.cursor is None:
            return
        if event.cursor > self.watch.cursor:
            self.found("published means committed", f"{event.type}, cursor {event.cursor}")
        if event.type == "session.deleted":
            self.tracking.forget(event.session_id)
        elif event.type == "session.status":
            self._check_state(process, event)
        last, process.published = process.published, event.cursor
        if last is not None and event.cursor != last + 1 and self.settings.keep is None:
            self.found("published once, in order", f"{event.cursor} follows {last}")

    def _check_state(self, process: Process, event: Event) -> None:
        """Whoever hears of a change finds the state that goes with it."""
        actor = process.engine.registry.actor(event.session_id)
        if actor is None or actor.state is None or actor.actor_stopped.is_set():
            return
        mine = self.watch.owner(event.session_id) == process.engine.id
        mine &= self.watch.epoch(event.session_id) == actor.epoch  # not of an earlier life
        if mine and actor.state.seq < (event.seq or 0):
            self.found("what is told is so", f"{event.session_id} is at {actor.state.seq}")

    def _is_steady(self, runtime_id: str) -> bool:
        """Alive, never frozen, its lease in time, and no clock was ever set."""
        return (
            self.steady
            and any(p.engine.id == runtime_id and not p.life.was_frozen for p in self.alive())
            and self.watch.leases().get(runtime_id, 0) > self.scheduler.clock.wall_ms()
        )

    def check_outputs(self) -> None:
        """What tools gave is what was kept of it."""
        for story in self.watch.stories.values():
            for part in story.tables["part"].values():
                if part["type"] == "tool" and part["state"]["status"] == "completed":
                    output = output_of(part["tool"], part["state"]["input"].get("text", ""))
                    if output is not None and output != part["state"]["output"]:
                        self.found("results are kept whole", f"{part['id']} of {story.id}")

    def owns(self, session_id: str) -> bool:
        """Whether the process that runs now holds the session's claim."""
        process = self.running()
        return process is not None and process.engine.id == self.watch.owner(session_id)

    def _check_request(self, request: ModelRequest) -> None:
        self.seen[f"request: {request.purpose}"] += 1
        story = self.watch.stories.get(request.session_id)
        mine = story is not None and self.owns(request.session_id)
        problem = problem_of(request, story if mine else None)
        if problem is not None:
            self.found("a model is asked what was said", f"{request.session_id}: {problem}")

    def _tool_started(self, context: ToolContext, permission: str | None = None) -> None:
        """Its start is committed, its end is not, and whoever had to allow it did.

        A process that froze proves first that nobody has taken its session over.
        """
        self._called.add((context.session_id, context.call_id))
        if not self.owns(context.session_id):
            if self.steady and self.watch.life(context.session_id):
                self.found("only its owner runs tools", f"{context.call_id}")
            return
        states = self.watch.tool_states(context.session_id, context.message_id)
        state = states.get(context.call_id, "running")
        if state != "running":
            self.found("a tool's start is committed first", f"{context.call_id} is {state}")
        story = self.watch.stories.get(context.session_id)
        if permission is None or story is None:
            return
        always = any(
            rule["permission"] == permission and rule["action"] == "allow"
            for rule in story.record.get("permission", ())
        )
        asked = [
            ask.get("replied")
            for ask in story.tables["ask"].values()
            if (ask.get("messageID"), ask.get("callID")) == (context.message_id, context.call_id)
        ]
        if not always and not {"once", "always"} & set(asked):
            self.found("nothing runs without leave", f"{context.call_id}: {asked}")
