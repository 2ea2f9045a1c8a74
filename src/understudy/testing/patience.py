"""Patience: what must not last, in time in which everybody who may move has nothing to do.

Such time is nobody's excuse: whatever was due has happened. What is under way is measured in it,
and each kind of thing has its limit, with room for stores that fail and actors that hang.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from understudy.actors.core.commands import Abort
from understudy.testing.rules import IDLE_S, TOOL_S

if TYPE_CHECKING:
    from understudy.testing.process import Process
    from understudy.testing.stage import Stage
    from understudy.testing.story import Story

_ROOM_S: Final = 15.0  # for what faults delay
_FLUSH_S: Final = 20.0  # text that was shown is in the store
_FLUSH_PAUSE_S: Final = 5.0  # between what a model says and what is stored of it
_LET_GO_S: Final = 8.0  # what works for a session that was lost: a renewal of the lease, and room
_TOLD_S: Final = 20.0  # who waits for what will not come is told


class _UnderWay(NamedTuple):
    """Something that lasts. Its time stands still while it does not ``run``."""

    guarantee: str
    name: str
    limit_s: float
    runs: bool = True


class Patience:
    """How long everything that is under way has lasted.

    ``calm_s`` is how much of such time has passed while nobody was frozen.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.calm_s = 0.0
        self._spent_s: dict[str, float] = {}

    def passes(self, pause_s: float) -> None:
        """So much time has passed in which nobody had anything to do."""
        if not any(process.life.frozen for process in self._stage.alive()):
            self.calm_s += pause_s
        before, self._spent_s = self._spent_s, {}
        for each in self._under_way():
            key = f"{each.guarantee}: {each.name}"
            spent_s = before.get(key, 0.0) + (pause_s if each.runs else 0.0)
            self._spent_s[key] = spent_s
            if spent_s > each.limit_s:
                self._stage.found(each.guarantee, f"{each.name} after {spent_s:g} s")

    def _under_way(self) -> Iterator[_UnderWay]:
        stage = self._stage
        working = {
            process.engine.id: process for process in stage.alive() if not process.life.frozen
        }
        for story in stage.watch.stories.values():
            if story.deleted or story.quarantined or not story.busy():
                continue
            owner = working.get(stage.watch.owner(story.id) or "")
            if owner is not None:
                epoch = stage.watch.epoch(story.id)
                if Abort not in owner.lost_reports:  # that its time is up is said once
                    yield from self._turns(story, epoch)
                yield from _calls(story, epoch)
                if not owner.lost_reports:  # what is lost is not said again
                    yield from self._texts(story, owner)
                    yield from self._silences(story, owner)
        yield from self._waiting()
        for process in working.values():
            yield from self._lost(process)

    def _turns(self, story: Story, epoch: int) -> Iterator[_UnderWay]:
        """A turn that works, in the hands of an actor that has begun a step of it."""
        limit_s = self._stage.settings.turn_s
        for prompt in story.hosts() if limit_s is not None else ():
            steps = [
                story.lives.get(message["id"])
                for message in story.tables["message"].values()
                if message.get("parentID") == prompt["messageID"]
            ]
            if limit_s is not None and steps and steps[-1] == epoch:
                name = f"{prompt['messageID']} of {story.id} at {epoch}"
                runs = not story.asks_people()
                yield _UnderWay("a turn ends in its time", name, limit_s + _ROOM_S, runs)

    def _texts(self, story: Story, owner: Process) -> Iterator[_UnderWay]:
        """Text that was shown and is not in its row, since the row has grown last."""
        parts = story.tables["part"]
        for part_id, text in self._stage.listeners.shown(owner, story.id):
            stored = len(parts[part_id]["text"]) if part_id in parts else 0
            if len(text) > stored:
                yield _UnderWay("text is kept as it comes", f"{part_id} at {stored}", _FLUSH_S)

    def _silences(self, story: Story, owner: Process) -> Iterator[_UnderWay]:
        """A model that is asked, since it was asked or has said something last."""
        answer = story.open_answer()
        if answer is None or story.status == "retry" or story.asks_people():
            return
        if story.id not in owner.works_for() or story.id in owner.hanging:
            return  # its actor died, and the next one has not begun; or it hangs with the news
        parts = story.parts_of(answer["id"])
        if any(part["type"] == "tool" for part in parts):
            return
        shown = dict(self._stage.listeners.shown(owner, story.id))
        heard = sum(len(shown.get(part["id"]) or part.get("text", "")) for part in parts)
        name = f"{answer['id']} of {story.id}, {len(parts)} parts, {heard} characters"
        yield _UnderWay("a model that says nothing is given up", name, IDLE_S + _FLUSH_PAUSE_S)

    def _lost(self, process: Process) -> Iterator[_UnderWay]:
        """What works for a session of somebody else."""
        for session_id in process.works_for():
            if self._stage.watch.owner(session_id) not in (None, process.engine.id):
                name = f"{session_id} in {process.name}"
                yield _UnderWay("who lost a session lets go", name, _LET_GO_S)

    def _waiting(self) -> Iterator[_UnderWay]:
        """Nobody waits for a turn of a session that does not run."""
        for caller, (process, session_id) in self._stage.waiting.items():
            story = self._stage.watch.stories.get(session_id)
            if story is not None and story.quarantined and not process.life.frozen:
                name = f"caller {caller} in {process.name} waits for {session_id}"
                yield _UnderWay("who waits for a quarantined session is told", name, _TOLD_S)


def _calls(story: Story, epoch: int) -> Iterator[_UnderWay]:
    """Calls that run. While a person is asked, their time stands still."""
    for part in story.tables["part"].values():
        if part["type"] == "tool" and part["state"]["status"] == "running":
            name = f"{part['id']} of {story.id} at {epoch}"
            runs = not story.asks_people(part)
            yield _UnderWay("a call ends in its time", name, TOOL_S + _ROOM_S, runs)
