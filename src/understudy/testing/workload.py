"""The workload: the acts of a script that are no faults, as calls to the public API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from understudy.actors.session import Session
from understudy.testing.callers import Callers

if TYPE_CHECKING:
    from understudy.testing.process import Process
    from understudy.testing.script import Act
    from understudy.testing.stage import Stage

_SLOTS: Final = 4
_WHEN_BUSY: Final = ("queue", "queue", "queue", "steer", "interrupt", "reject")


class Workload:
    """One method for each verb. The numbers of an act choose among what is there then."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._prompts: list[tuple[str, str, str]] = []
        self._titles = 0
        self.callers = Callers(stage)

    def _slot(self, number: int) -> str:
        """A session id: mostly of one that is there, else of one that may never have been."""
        living = self._stage.watch.living()
        if living and number % 8:
            return living[number // 8 % len(living)]
        return f"s{number // 8 % _SLOTS}"

    def session(self, act: Act) -> tuple[Process, Session]:
        process = self._stage.at_work(act.b)
        return process, Session(process.runtime, self._slot(act.a))

    # --- prompts ---------------------------------------------------------------------------------

    def create(self, act: Act) -> None:
        process = self._stage.at_work(act.b)
        number = act.a % _SLOTS
        parent_id = f"s{number - 2}" if number >= 2 else None
        if number == _SLOTS - 1 and act.b % 2:
            parent_id = f"s{number - 1}"  # which has a parent itself

        async def create() -> None:
            await process.runtime.create_session(session_id=f"s{number}", parent_id=parent_id)

        self._stage.spawn(process, create())

    def prompt(self, act: Act) -> None:
        process, session = self.session(act)
        message_id, when_busy = f"m{len(self._prompts)}", _WHEN_BUSY[act.b % 6]
        self._prompts.append((session.id, message_id, when_busy))
        for _ in range(2 if act.b % 7 == 0 else 1):
            self._ask(process, session, message_id, when_busy)

    def again(self, act: Act) -> None:
        """A prompt that was sent before: as it was, with other words, or only its turn."""
        if not self._prompts:
            return
        session_id, message_id, when_busy = self._prompts[act.a % len(self._prompts)]
        process = self._stage.at_work(act.b)
        session = Session(process.runtime, session_id)
        if act.b % 4 == 0:
            words = f"other words for {message_id}"
            self._stage.spawn(process, self.callers.conflict(session, message_id, words))
        elif act.b % 4 == 1:
            self._stage.spawn(process, self.callers.wait_for(session, message_id))
        else:
            self._ask(process, session, message_id, when_busy)

    def _ask(self, process: Process, session: Session, message_id: str, when_busy: str) -> None:
        text = f"prompt {message_id}"
        work = self.callers.prompt(process, session, message_id, text, when_busy)
        self._stage.spawn(process, work)

    # --- commands --------------------------------------------------------------------------------

    def abort(self, act: Act) -> None:
        """All that runs, with what waits or without; or one prompt, wherever it is."""
        process, session = self.session(act)
        story = self._stage.watch.stories.get(session.id)
        open_ids = story.unsettled() if story is not None else []
        if open_ids and act.b % 4 == 1:
            message_id = open_ids[act.a % len(open_ids)]
            self._stage.spawn(process, self.callers.withdraw(session, message_id))
        else:
            self._stage.spawn(process, self.callers.abort(session, queued=act.b % 3 == 0))

    def compact(self, act: Act) -> None:
        process, session = self.session(act)
        self._stage.spawn(process, self.callers.compact(session))

    def update(self, act: Act) -> None:
        process, session = self.session(act)
        self._titles += 1
        self._stage.spawn(process, self.callers.update(session, f"title {self._titles}"))

    def leave_work(self, process: Process) -> None:
        """Something for every session, which a process finds when it thaws."""
        for session_id in self._stage.watch.living():
            self._titles += 1
            session = Session(process.runtime, session_id)
            self._stage.spawn(process, self.callers.update(session, f"title {self._titles}"))

    def revert(self, act: Act) -> None:
        process, session = self.session(act)
        self._stage.spawn(process, self.callers.revert(session, act.b))

    def unrevert(self, act: Act) -> None:
        process, session = self.session(act)
        self._stage.spawn(process, self.callers.unrevert(session))

    def edit(self, act: Act) -> None:
        process, session = self.session(act)
        self._stage.spawn(process, self.callers.edit(session, act.b))

    def fork(self, act: Act) -> None:
        process, session = self.session(act)
        self._stage.spawn(process, self.callers.fork(session))

    def delete(self, act: Act) -> None:
        process, session = self.session(act)
        self._stage.spawn(process, self.callers.delete(process, session))

    def reset(self, act: Act) -> None:
        process, session = self.session(act)
        self._stage.spawn(process, self.callers.reset(process, session))

    def reply(self, act: Act) -> None:
        """Answer what is asked; now and then what was asked some time."""
        process = self._stage.at_work(act.b)
        asks = [ask for _, ask in self._stage.watch.open_asks()]
        if act.b % 5 == 0:
            stories = self._stage.watch.stories.values()
            asks = [ask for story in stories for ask in story.tables["ask"].values()]
        if asks:
            ask = asks[act.a % len(asks)]
            work = self.callers.reply(process, ask["id"], ask["kind"], act.b)
            self._stage.spawn(process, work)

    # --- the rest --------------------------------------------------------------------------------

    def look(self, act: Act) -> None:
        process, session = self.session(act)
        if act.b % 4 == 0:
            self._stage.spawn(process, self.callers.idle(session))
        else:
            self._stage.spawn(process, self.callers.look(process, session))

    def listen(self, act: Act) -> None:
        process, session = self.session(act)
        self._stage.listeners.join(process, act.a, act.b, session.id)

    def track(self, act: Act) -> None:
        self._stage.tracking.act(self._stage.at_work(act.b), act.a, act.b)

    def rest(self, act: Act) -> None:
        seconds = (0.3, 1.0, 3.0, 9.0, 31.0)[act.a % 5]
        self._stage.scheduler.clock.advance(seconds)
        self._stage.let_pass_s += seconds
        self._stage.hooks.excuse()
