"""Callers: they use the public API, and hold what they are told against what was committed."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from understudy.actors.session import Session
from understudy.errors import (
    AskClosed,
    AskNotFound,
    CommandTimeout,
    CompactionFailed,
    PromptConflict,
    TurnAborted,
    TurnFailed,
)
from understudy.gateway.fold import is_open
from understudy.testing.resting import allowed

if TYPE_CHECKING:
    from understudy.gateway.fold import Row
    from understudy.testing.process import Process
    from understudy.testing.stage import Stage
    from understudy.testing.story import Story

_PATIENCE_S: Final = 300.0


class Callers:
    """What is said to a runtime, and what must be true when it answers."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._numbers = itertools.count(1)
        self._answered: set[str] = set()  # asks that somebody was told they had answered

    def _story(self, session_id: str, life: int) -> Story | None:
        """The session's story, if it is still the life that was spoken to."""
        watch = self._stage.watch
        return watch.stories[session_id] if life and watch.life(session_id) == life else None

    def _found(self, guarantee: str, what: str) -> None:
        self._stage.found(guarantee, what)

    # --- prompts ---------------------------------------------------------------------------------

    async def prompt(
        self, process: Process, session: Session, message_id: str, text: str, when_busy: Any
    ) -> None:
        watch, name = self._stage.watch, f"{message_id} of {session.id}"
        life = watch.life(session.id)
        turn = await session.prompt(text, message_id=message_id, when_busy=when_busy)
        if (session.id, message_id) not in watch.accepted:
            self._found("what a caller was told is durable", name)
        if (story := self._story(session.id, life)) is not None:
            self._is_as_given(story, message_id, text, when_busy)
        await self.result(turn, session.id, message_id)

    def _is_as_given(self, story: Story, message_id: str, text: str, when_busy: str) -> None:
        name, accepted = f"{message_id} of {story.id}", story.text_of(message_id)
        if accepted and accepted != text:  # empty once it is reverted or edited
            self._found("an id is one prompt", f"{name}: {accepted!r}, not {text!r}")
        info = story.tables["inbox"].get(message_id)
        if info is not None and info.get("when_busy", "queue") != when_busy:
            self._found("an id is one prompt", f"{name} does not {when_busy}: {info}")

    async def result(self, turn: Any, session_id: str, message_id: str) -> None:
        """Wait for a prompt's end, which must be the one that was committed."""
        watch, text = self._stage.watch, None
        process = self._stage.running()
        caller = next(self._numbers)
        try:
            if process is not None:
                self._stage.waiting[caller] = (process, session_id)
            text = (await turn.result()).text
        except TurnAborted as error:
            gone = error.data.get("reason") == "delete"
            told = {"deleted"} if gone else {"interrupted", "rejected"}
        except TurnFailed:
            told = {"failed"}
        else:
            told = {"answered"}
        finally:
            self._stage.waiting.pop(caller, None)
        outcomes = watch.outcomes[session_id, message_id]
        if told != {"deleted"} and not told & outcomes:
            self._found(
                "callers are told the outcome",
                f"{message_id} of {session_id}: {told}, not {outcomes}",
            )
        story = watch.stories[session_id]
        reply_id = str(story.tables["inbox"].get(message_id, {}).get("reply_id"))
        there = reply_id in story.tables["message"] and reply_id not in story.edited
        if text is not None and there and story.text_of(reply_id) != text:
            self._found("callers are told the answer", f"{message_id} of {session_id}: {text!r}")

    async def wait_for(self, session: Session, message_id: str) -> None:
        turn = await session.turn(message_id)
        await self.result(turn, session.id, message_id)

    async def withdraw(self, session: Session, message_id: str) -> None:
        """When it returns, the prompt is over, whether it ran or waited."""
        life = self._stage.watch.life(session.id)
        turn = await session.turn(message_id)
        await turn.abort()
        story = self._story(session.id, life)
        if story is not None and message_id in story.unsettled():
            self._found("an abort ends what runs", f"{message_id} of {session.id}")

    async def conflict(self, session: Session, message_id: str, text: str) -> None:
        """The same id with other content: refused, wherever and whenever it was accepted."""
        story = self._story(session.id, self._stage.watch.life(session.id))
        known = story is not None and story.text_of(message_id) not in ("", text)
        life = story.number if story is not None else 0
        try:
            await session.prompt(text, message_id=message_id)
        except PromptConflict:
            return
        story = self._story(session.id, life)
        if known and story is not None and message_id in story.tables["message"]:
            self._found("an id is one prompt", f"{message_id} of {session.id} again, as {text!r}")

    # --- commands --------------------------------------------------------------------------------

    async def abort(self, session: Session, *, queued: bool) -> None:
        """When it returns, what ran when it was called has ended."""
        life = self._stage.watch.life(session.id)
        story = self._story(session.id, life)
        ran = {p["messageID"] for p in story.hosts()} if story is not None else set()
        if story is not None and queued:
            ran = set(story.unsettled())
        await session.abort(queued=queued)
        story = self._story(session.id, life)
        if story is not None and ran - story.settled:
            self._found("an abort ends what runs", f"{ran - story.settled} of {session.id}")

    async def compact(self, session: Session) -> None:
        compaction = await session.compact()
        try:
            await compaction.result()
        except CompactionFailed:
            return

    async def update(self, session: Session, title: str) -> None:
        life = self._stage.watch.life(session.id)
        await session.update(title=title)
        story = self._story(session.id, life)
        if story is not None and title not in story.titles:
            self._found("no update is lost", f"{title!r} of {session.id}")

    async def revert(self, session: Session, number: int) -> None:
        messages = await session.messages()
        if not messages:
            return
        message_id = messages[number % len(messages)].id
        record = await session.revert(message_id)
        revert = record.record.revert
        if revert is None or revert.message_id != message_id:
            self._found("a revert is told", f"{message_id} of {session.id}: {revert}")

    async def unrevert(self, session: Session) -> None:
        """Only when it has answered is it known that it will not be carried out later."""
        self._stage.unreverting[session.id] += 1
        life, cursor = self._stage.watch.life(session.id), self._stage.watch.cursor
        await session.unrevert()
        self._stage.unreverting[session.id] -= 1
        story = self._story(session.id, life)
        if story is not None and "revert" in story.record and story.reverted_at <= cursor:
            self._found("a revert is taken back", session.id)

    async def edit(self, session: Session, number: int) -> None:
        """Take a message out of an idle session, or a part of it."""
        messages = await session.messages()
        if not messages:
            return
        message = messages[number % len(messages)]
        parts = [part for part in message.parts if part.type == "text"]
        part_id = parts[0].id if parts and number % 3 else None
        life = self._stage.watch.life(session.id)
        await session.edit(message.id, part_id=part_id)
        story = self._story(session.id, life)
        table, key = ("part", part_id) if part_id else ("message", message.id)
        if story is not None and key in story.tables[table]:
            self._found("an edit is carried out", f"{table} {key} of {session.id}")

    async def fork(self, session: Session) -> None:
        """A copy: what its people said is what was said there, in order."""
        source = self._stage.watch.stories.get(session.id)
        said = source.said() if source is not None and not source.deleted else None
        internal = source is not None and source.record.get("internal", False)
        fork = await session.fork()
        copied, record = self._stage.watch.stories[fork.id].copied, fork.record
        if record.revert is not None or (internal and not record.internal):
            self._found("a fork is a copy", f"{fork.id}: {record}")
        if said is None or source is None or source.deleted:
            return
        # What was said or taken back in between may be in the copy or not.
        still = source.said() == said
        if not (_within(copied, said) if still else source.heard.issuperset(copied)):
            self._found("a fork is a copy", f"{fork.id} of {session.id}")

    async def delete(self, process: Process, session: Session) -> None:
        """When it returns, the session and its children are gone, and what a tracker knew."""
        watch, life = self._stage.watch, self._stage.watch.life(session.id)
        below = self._below(session.id)
        tracking, failed = self._stage.tracking, process.failed
        knew = tracking.knew(session.id)
        internal = watch.stories[session.id].record.get("internal") if life else False
        deleted = await session.delete(missing_ok=True)
        # A store that fails may keep them, and an internal session's late hooks must not run.
        sure = deleted and not internal and process.failed == failed
        tracked = process.runtime.tracker.knows(session.id)
        if sure and tracked and knew == tracking.knew(session.id):
            self._found("gone means gone", f"{session.id} is claimed or bypassed")
        left = [each for each, number in below if watch.life(each) == number]
        if self._story(session.id, life) is not None or left:
            self._found("gone means gone", f"{session.id}, left: {left}")

    def _below(self, session_id: str) -> list[tuple[str, int]]:
        stories = self._stage.watch.stories.values()
        children = [
            (s.id, s.number)
            for s in stories
            if not s.deleted and s.record.get("parentID") == session_id
        ]
        return [each for child in children for each in (child, *self._below(child[0]))]

    async def reset(self, process: Process, session: Session) -> None:
        """When it returns, a session whose quarantine it lifted has been taken up again."""
        watch, failed = self._stage.watch, process.failed
        life, epoch = watch.life(session.id), watch.epoch(session.id)
        mine = watch.owner(session.id) in (None, process.engine.id)
        lifted = await session.reset()
        story = self._story(session.id, life)
        sure = mine and story is not None and not story.quarantined and process.failed == failed
        if process.engine._state != "open":  # noqa: SLF001 - then the next one takes it up
            return
        if lifted and sure and watch.epoch(session.id) <= epoch:
            self._found("a reset takes a session up again", session.id)

    async def reply(self, process: Process, ask_id: str, kind: str, number: int) -> None:
        """An ask is answered once, and stays as it was answered."""
        options: dict[str, Any] = {"answers": [["yes"]]}
        if kind != "question":
            options = {"reply": ("once", "always", "reject")[number % 3]}
        if number % 4 == 0:
            options = {"reply": "reject", "feedback": "no, thank you"}
        try:
            await process.runtime.reply(ask_id, **options)
        except (AskClosed, AskNotFound):
            return
        if ask_id in self._answered:
            self._found("an ask is answered once", ask_id)
        self._answered.add(ask_id)
        for story in self._stage.watch.stories.values():
            ask = story.tables["ask"].get(ask_id)
            if ask is not None:
                self._replied(story, ask, options)

    def _replied(self, story: Story, ask: Row, given: dict[str, Any]) -> None:
        """An answer is kept as it was given, and has its consequence."""
        reply, feedback = given.get("reply", "answered"), given.get("feedback")
        if (ask.get("replied"), ask.get("feedback")) != (reply, feedback):
            self._found("an ask is answered once", f"{ask['id']}: {ask.get('replied')}")
        if reply == "always" and not allowed(story, ask):
            self._found("always means always", f"{ask['id']} of {story.id}")
        message = story.tables["message"].get(ask["messageID"])
        refused = reply == "reject" and feedback is None and ask["kind"] == "permission"
        if refused and message is not None and is_open("message", message):
            self._found("a plain refusal ends the turn", f"{ask['id']} of {story.id}")

    # --- reads -----------------------------------------------------------------------------------

    async def look(self, process: Process, session: Session) -> None:
        """If nothing was committed meanwhile, what is read is what was committed."""
        watch = self._stage.watch
        life, cursor = watch.life(session.id), watch.cursor
        owned = process.engine.id == watch.owner(session.id)
        told = process.engine.publisher.cursor
        status = await session.status()
        story = self._story(session.id, life)
        rests = status.type == "quarantined" and told == watch.cursor == cursor
        if rests and story is not None and not story.quarantined:
            self._found("status is the truth", f"{session.id} is quarantined no more")
        sure = owned and story is not None and watch.cursor == cursor and not story.quarantined
        if sure and story is not None and status.type not in _truths(process, story, told):
            self._found("status is the truth", f"{session.id}: {status.type}, not {story.status}")
        cursor = watch.cursor
        messages = await session.messages()
        story = self._story(session.id, life)
        if story is not None and watch.cursor == cursor:
            expected = [message["id"] for message in story.transcript()]
            if [message.id for message in messages] != expected:
                self._found("what is read was committed", f"messages of {session.id}")
        await process.runtime.sessions()

    async def idle(self, session: Session) -> None:
        """It comes to rest at some time, and whoever waits for that is told."""
        try:
            await session.wait_idle(timeout_s=_PATIENCE_S)
        except CommandTimeout:
            story = self._stage.watch.stories.get(session.id)
            if story is not None and not story.busy():
                self._found("idle is told", f"nobody told who waits for {session.id}")


def _within(lines: list[str], others: list[str]) -> bool:
    """Whether lines are among others, in order."""
    rest = iter(others)
    return all(line in rest for line in lines)


def _truths(process: Process, story: Story, told: int) -> set[str]:
    """What a session's owner may say that it does, when it has published up to ``told``."""
    truths = {story.status}
    if story.status == "idle" and story.busy():
        truths.add("busy")  # who closed left prompts; the new owner has not said yet that it runs
    actor = process.engine.registry.actor(story.id)
    if story.status == "retry" and (actor is None or not actor.settled):
        truths.add("busy")  # its actor is being restarted, and will ask the model anew
    if told < story.reset_at:
        truths.add("quarantined")  # another process reset it, and that was not heard yet
    return truths
