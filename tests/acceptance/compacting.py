"""What the compaction tests share: a model, photographs of crashes, and what always holds."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cast import last_text

from understudy import CompactionRules, Runtime, Session, Tool, tool
from understudy.actors.core.compaction import FOLLOW_UP
from understudy.actors.models.protocol import AssistantTurn, ModelRequest, UserText, UserTurn
from understudy.actors.models.scripted import Call, Say, ScriptedModel, Use, steps_taken
from understudy.store.events import Event, MessageRemoved, MessageUpdated, PartUpdated
from understudy.store.records import (
    AssistantMessage,
    CompactionPart,
    TextPart,
    ToolPart,
    UserMessage,
)

WAIT_S = 20.0  # a bound on hangs
LIMIT = 10_000
FULL = Use(9_500)  # a context of LIMIT, less LIMIT / 10 for the answer, is full
SUMMARY = "SUMMARY: it was about words"


def answer(request: ModelRequest) -> Any:
    """``work`` makes a call and is full after it; ``full`` is full after the answer."""
    if request.purpose == "summary":
        return Say(SUMMARY)
    text = last_text(request)
    if text == FOLLOW_UP:
        return Say("went on")
    if text == "work":
        return Say("worked") if steps_taken(request) else [Say("looking"), Call("probe"), FULL]
    said = Say(f"answer to {text}")
    return [said, FULL] if text.startswith("full") else said


@tool
def probe() -> str:
    """Look at something."""
    return "found"


def actors(
    script: Callable[[ModelRequest], Any] = answer, summary: Any = None, **options: Any
) -> ScriptedModel:
    """A model with a small context."""
    return ScriptedModel(
        script, summary=summary, context_limit=LIMIT, output_limit=LIMIT // 10, **options
    )


def opened(path: Path, model: ScriptedModel | None = None, **options: Any) -> Runtime:
    tools: list[Tool] = options.pop("tools", [probe])
    rules = options.pop("compaction", CompactionRules(tail=120))
    return Runtime(path, model=model or actors(), tools=tools, compaction=rules, seed=1, **options)


def talked(runtime: Runtime, rounds: int = 3, **options: Any) -> Session:
    """A session with a history worth compacting: ``rounds`` answered prompts."""
    session = runtime.create_session(**options)
    for number in range(rounds):
        session.prompt(f"word {number} " + "blah " * 60).result(timeout_s=WAIT_S)
    return session


def summaries(model: ScriptedModel) -> list[ModelRequest]:
    return [request for request in model.requests if request.purpose == "summary"]


def shown(request: ModelRequest) -> str:
    """All the text of a request."""
    lines = []
    for turn in request.turns:
        if isinstance(turn, UserTurn):
            lines += [item.text for item in turn.content if isinstance(item, UserText)]
        else:
            lines += [turn.text, *(f"{call.tool}: {call.output}" for call in turn.calls)]
    return "\n".join(lines)


def paired(request: ModelRequest) -> bool:
    """Every call of a request has its result, under an id of its own."""
    calls = [
        call for turn in request.turns if isinstance(turn, AssistantTurn) for call in turn.calls
    ]
    return all(call.output for call in calls) and len({c.call_id for c in calls}) == len(calls)


# --- the transcript ----------------------------------------------------------------------------


def markers(session: Session) -> list[CompactionPart]:
    return [
        part
        for message in session.messages()
        for part in message.parts
        if isinstance(part, CompactionPart)
    ]


def transcript(session: Session) -> list[tuple[Any, ...]]:
    """What a session says, without ids and times: references become places."""
    messages = list(session.messages())
    place = {message.id: number for number, message in enumerate(messages)}
    lines = []
    for message in messages:
        info = message.info
        parts = [_said(part, place) for part in message.parts]
        if isinstance(info, AssistantMessage):
            error = info.error.name if info.error is not None else None
            parent = place.get(info.parent_id, "gone")
            done = info.time.completed is not None
            head: tuple[Any, ...] = (info.summary, parent, info.finish, error, done)
        else:
            head = (info.synthetic, info.withdrawn)
        lines.append((message.role, *head, *filter(None, parts)))
    return lines


def _said(part: Any, place: dict[str, int]) -> tuple[Any, ...] | None:
    if isinstance(part, TextPart):
        return "text", part.text
    if isinstance(part, ToolPart):
        return "tool", part.tool, part.state.status, getattr(part.state, "output", None)
    if isinstance(part, CompactionPart):
        named = [
            place.get(each or "")
            for each in (part.summary_id, part.head_end_id, part.tail_start_id)
        ]
        return "marker", part.state, part.auto, part.resume, *named
    return None


class Fold:
    """A session's messages and parts as its events tell them, checked at every event."""

    def __init__(self) -> None:
        self.messages: dict[str, Any] = {}
        self.parts: dict[str, dict[str, Any]] = {}

    def add(self, event: Event) -> None:
        fact = event.data
        if isinstance(fact, MessageUpdated):
            self.messages[fact.info.id] = fact.info
        elif isinstance(fact, MessageRemoved):
            del self.messages[fact.message_id]
            self.parts.pop(fact.message_id, None)
        elif isinstance(fact, PartUpdated):
            assert fact.part.message_id in self.messages, "a message comes before its parts"
            self.parts.setdefault(fact.part.message_id, {})[fact.part.id] = fact.part
        else:
            return
        self.check()

    def all(self, kind: type[Any]) -> list[Any]:
        return [p for parts in self.parts.values() for p in parts.values() if isinstance(p, kind)]

    def check(self) -> None:
        compactions = {part.message_id: part for part in self.all(CompactionPart)}
        active = [part for part in compactions.values() if part.active]
        assert len(active) <= 1, f"active markers: {active}"
        written: dict[str, list[AssistantMessage]] = {}
        for message in self.messages.values():
            if isinstance(message, AssistantMessage) and message.summary:
                assert message.parent_id in compactions, "a summary belongs to a marker"
                written.setdefault(message.parent_id, []).append(message)
        for group in written.values():
            assert sum(each.error is None for each in group) <= 1, "one summary for a marker"

    def settled(self) -> None:
        """Nothing is unfinished, and every marker has its end."""
        assert not [part for part in self.all(CompactionPart) if part.active]
        for message in self.messages.values():
            if isinstance(message, UserMessage):
                continue
            assert message.time.completed is not None, message
            if message.summary and message.error is not None:
                assert message.finish is not None, "an errored summary is terminal"
        for part in self.all(CompactionPart):
            if part.state == "committed":
                assert self.messages[part.summary_id].parent_id == part.message_id


def folded(events: Iterable[Event]) -> Fold:
    fold = Fold()
    for event in events:
        fold.add(event)
    return fold


def history_of(runtime: Runtime, session: Session | str) -> list[Event]:
    """Every event of a session so far."""
    session_id = session if isinstance(session, str) else session.id
    last = runtime.cursor
    if last == 0:
        return []
    with runtime.events(after=0, deltas=False, buffer=100_000) as events:
        seen = until(events, lambda event: event.cursor >= last)
    return [event for event in seen if event.session_id == session_id]


# --- crashes -----------------------------------------------------------------------------------


class Photographer:
    """A store's ``fault``: copies the database at each crash point, as a kill would leave it.

    The writer's thread stands still meanwhile. A kill before "commit" leaves what the commit
    before it left, so equal photographs are kept once.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._last: tuple[bytes, ...] = ()
        self.active = False
        self.points = 0
        self.photos: list[Path] = []

    def __call__(self, point: str) -> None:
        if not self.active or point == "begin":
            return
        self.points += 1
        sources = [self._path, self._path.with_name(f"{self._path.name}-wal")]
        content = tuple(each.read_bytes() if each.exists() else b"" for each in sources)
        if content == self._last:
            return
        self._last = content
        photo = self._folder / f"{len(self.photos):03}-{point}" / "a.db"
        photo.parent.mkdir(parents=True)
        for source, data in zip(sources, content, strict=True):
            photo.with_name(source.name.replace(self._path.name, "a.db")).write_bytes(data)
        self.photos.append(photo)


class Failing:
    """A store's ``fault`` that raises at the next commit when told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __call__(self, point: str) -> None:
        if point == "commit" and self.error is not None:
            error, self.error = self.error, None
            raise error


def copied(path: Path, folder: Path) -> Path:
    """A copy of a store that is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copy(file, folder / file.name)
    return folder / path.name


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """``work(0)`` … ``work(count - 1)`` in threads that start together: what each gave."""
    barrier = threading.Barrier(count)
    outcomes: list[Any] = [None] * count

    def run(number: int) -> None:
        barrier.wait()
        try:
            outcomes[number] = work(number)
        except Exception as error:  # noqa: BLE001 - judged by the caller
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return outcomes


def until(events: Iterator[Event], wanted: Callable[[Event], bool]) -> list[Event]:
    """Events up to the first that is wanted."""
    seen = []
    for event in events:
        seen.append(event)
        if wanted(event):
            break
    return seen
