"""A stage for the pure session logic: rows folded from facts, a store's view of them, and props.

``Rows`` knows nothing but facts. ``loaded`` derives from rows alone what a store would hand to
``Recover``. ``Stage`` holds a state, decides commands and keeps the books on what runs outside.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import msgspec

from understudy.actors.core.commands import (
    CallDraft,
    Loaded,
    Recover,
    StepFailed,
    StepFinished,
    SubmitPrompt,
    ToolFinished,
)
from understudy.actors.core.context import History, conversation
from understudy.actors.core.decide import decide
from understudy.actors.core.effects import Cancel, ResolveAsk, RunStep, RunSummary, RunTool
from understudy.actors.core.state import Entry, Moment, Rules, State
from understudy.actors.models.protocol import Turn
from understudy.store import events as ev
from understudy.store.records import (
    IDLE,
    AnyPart,
    Ask,
    AssistantMessage,
    CompactionPart,
    Failure,
    Message,
    Prompt,
    ReasoningPart,
    Session,
    SessionTime,
    Span,
    Status,
    TextPart,
    Tokens,
    ToolPart,
    ToolPending,
    ToolRunning,
    UserMessage,
)

SESSION = "ses_1"
replace = msgspec.structs.replace


def context(history: History, **options: Any) -> tuple[Turn, ...]:
    """What a history shows of itself, as a request's turns."""
    return tuple(conversation(history, **options).turns)


class Rows:
    """The tables, rebuilt from facts. Refuses facts no table could hold."""

    def __init__(self, info: Session) -> None:
        self.info = info
        self.status: Status = IDLE
        self.messages: dict[str, Message] = {}
        self.parts: dict[str, dict[str, AnyPart]] = {}
        self.prompts: dict[str, Prompt] = {}
        self.asks: dict[str, Ask] = {}
        self.started: list[str] = []
        self.spent = 0

    def apply(self, fact: ev.Fact) -> None:
        assert fact.session_id == self.info.id
        match fact:
            case ev.SessionUpdated(info=info):
                assert info.time.updated >= self.info.time.updated
                self.info = info
            case ev.SessionStatus(status=status):
                self.status = status
            case ev.MessageUpdated(info=message):
                self._put_message(message)
            case ev.MessageRemoved(message_id=message_id):
                del self.messages[message_id]
                del self.parts[message_id]
            case ev.PartUpdated(part=part):
                self._put_part(part)
            case ev.PromptAccepted(info=prompt):
                assert prompt.message_id not in self.prompts, "accepted twice"
                assert prompt.message_id in self.messages
                self.prompts[prompt.message_id] = prompt
            case ev.PromptStarted(info=prompt) | ev.PromptSettled(info=prompt):
                self._put_prompt(fact, prompt)
            case ev.PermissionAsked(info=ask) | ev.QuestionAsked(info=ask):
                assert fact.type == f"{ask.kind}.asked"
                assert ask.id not in self.asks, "asked twice"
                assert ask.replied is None
                self.asks[ask.id] = ask
            case ev.PermissionReplied(info=ask) | ev.QuestionReplied(info=ask):
                assert fact.type == f"{ask.kind}.replied"
                assert self.asks[ask.id].replied is None, "replied twice"
                assert ask.replied is not None
                self.asks[ask.id] = ask

    def _put_message(self, message: Message) -> None:
        old = self.messages.get(message.id)
        if isinstance(old, AssistantMessage):
            assert old.time.completed is None, "a completed message was touched"
        if isinstance(message, AssistantMessage):
            if message.time.completed is not None:
                assert message.time.completed >= message.time.created
                self.spent += message.tokens.total
            if message.parent_id not in self.messages:
                raise AssertionError("dangling parent")
        if old is not None and old.turn is not None:
            assert message.turn == old.turn, "a message moved in the transcript"
        self.messages[message.id] = message
        self.parts.setdefault(message.id, {})

    def _put_part(self, part: AnyPart) -> None:
        assert part.id
        assert part.message_id in self.messages, "a part without its message"
        old = self.parts[part.message_id].get(part.id)
        if isinstance(old, ToolPart):
            assert isinstance(old.state, ToolPending | ToolRunning), "a finished call was touched"
        if isinstance(old, TextPart | ReasoningPart):
            assert is_open_part(old), "ended text was touched"
            assert not is_open_part(part) or part.text.startswith(old.text), "text was lost"
        if isinstance(old, CompactionPart):
            assert old.active, "a terminal marker was touched"
        self.parts[part.message_id][part.id] = part

    def _put_prompt(self, fact: ev.Fact, prompt: Prompt) -> None:
        assert self.prompts[prompt.message_id].outcome is None, "two outcomes"
        assert (prompt.outcome is not None) == isinstance(fact, ev.PromptSettled)
        if isinstance(fact, ev.PromptStarted):
            assert prompt.turn is not None
            self.started.append(prompt.message_id)
        self.prompts[prompt.message_id] = prompt

    def transcript(self) -> list[tuple[Message, tuple[AnyPart, ...]]]:
        """Messages with their parts, by turn, then order of creation."""
        order = sorted(
            self.messages.values(), key=lambda m: float("inf") if m.turn is None else m.turn
        )
        return [(message, tuple(self.parts[message.id].values())) for message in order]

    def reverted(self) -> tuple[str, ...]:
        if self.info.revert is None:
            return ()
        ids = [message.id for message, _ in self.transcript()]
        return tuple(ids[ids.index(self.info.revert.message_id) :])

    def markers(self) -> list[tuple[CompactionPart, UserMessage]]:
        """Active markers, in order of creation."""
        found = []
        for message_id, parts in self.parts.items():
            for part in parts.values():
                if isinstance(part, CompactionPart) and part.active:
                    message = self.messages[message_id]
                    assert isinstance(message, UserMessage)
                    found.append((part, message))
        return found


def is_open_part(part: AnyPart) -> bool:
    if isinstance(part, ToolPart):
        return isinstance(part.state, ToolPending | ToolRunning)
    if isinstance(part, TextPart | ReasoningPart):
        return isinstance(part.time, Span) and part.time.end is None
    return False


def loaded(rows: Rows) -> Loaded:
    """What a store says is unfinished."""
    entries = []
    for prompt in rows.prompts.values():
        if prompt.outcome is None:
            message = rows.messages[prompt.message_id]
            assert isinstance(message, UserMessage)
            entries.append(Entry(prompt, message))
    open_messages = [
        message
        for message in rows.messages.values()
        if isinstance(message, AssistantMessage) and message.time.completed is None
    ]
    open_ids = {message.id for message in open_messages}
    parts = [
        part
        for message_id, of_message in rows.parts.items()
        for part in of_message.values()
        if message_id in open_ids
        or is_open_part(part)
        or (isinstance(part, CompactionPart) and part.active)
    ]
    markers = rows.markers()
    order = [message for message, _ in rows.transcript()]
    later = set()
    summarised = {}
    for _, message in markers:
        for other in order[order.index(message) + 1 :]:
            done = isinstance(other, AssistantMessage) and other.time.completed is not None
            if message.turn is not None and done and not other.summary:
                later.add(message.id)
        for other in order:
            if (
                isinstance(other, AssistantMessage)
                and other.summary
                and other.parent_id == message.id
                and other.time.completed is not None
                and other.error is None
            ):
                summarised[message.id] = other.id
    return Loaded(
        prompts=tuple(entries),
        messages=tuple(open_messages),
        parts=tuple(parts),
        markers=tuple(markers),
        asks=tuple(ask for ask in rows.asks.values() if ask.replied is None),
        later=frozenset(later),
        summarised=summarised,
        steps=Counter(
            message.turn
            for message in rows.messages.values()
            if isinstance(message, AssistantMessage)
            and message.time.completed is not None
            and message.error is None
            and not message.summary
        ),
    )


class Stage:
    """One session. ``running`` is what effects have started outside and nothing has ended."""

    def __init__(self, *, rules: Rules | None = None, seed: int = 0, info: Any = None) -> None:
        self.rules = rules or Rules()
        self.random = random.Random(seed)
        self.now_ms = 1_000_000
        self.state = State(
            info=info
            or Session(id=SESSION, title="t", time=SessionTime(created=self.now_ms, updated=0)),
            seq=0,
        )
        self.rows = Rows(self.state.info)
        self.changes: list[tuple[ev.AnyFact, ...]] = []
        self.running: dict[str, RunStep | RunSummary | RunTool] = {}
        self.resolved: list[Ask] = []
        self.delays: list[float] = []
        self.facts: tuple[ev.AnyFact, ...] = ()
        self._count = 0

    # --- deciding

    def send(self, command: Any) -> Any:
        """Decide, commit, start effects. Returns the reply."""
        self.now_ms += self.random.randint(0, 5)
        moment = Moment(self.now_ms, self.random.getrandbits(64))
        before = self.state
        decision = decide(before, command, moment, self.rules)
        assert decision.state.seq == before.seq + len(decision.facts)
        for fact in decision.facts:
            self.rows.apply(fact)
        self.state = decision.state
        self.facts = decision.facts
        if decision.facts:
            self.changes.append(decision.facts)
        for effect in decision.effects:
            self._start(effect)
        return decision.reply

    def _start(self, effect: Any) -> None:
        match effect:
            case Cancel():
                self.running.clear()
            case RunStep(message_id=key) | RunSummary(message_id=key):
                assert key not in self.running
                self.running[key] = effect
                self.delays.append(getattr(effect, "delay_s", 0.0))
            case RunTool(part=part):
                assert part.id not in self.running, "one call runs twice"
                self.running[part.id] = effect
            case ResolveAsk(ask=ask):
                self.resolved.append(ask)

    def crash(self, *, reason: str = "restart", **options: Any) -> None:
        """Lose everything in memory, then recover from rows."""
        self.forget()
        self.recover(reason=reason, **options)

    def forget(self) -> None:
        self.running.clear()
        self.state = State(info=self.rows.info, seq=self.state.seq)

    def recover(self, *, reason: str = "restart", **options: Any) -> None:
        self.send(Recover(loaded=loaded(self.rows), reason=reason, **options))

    # --- props

    def new_id(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}_{self._count:06d}"

    def prompt(self, text: str = "hello", **options: Any) -> str:
        """Submit a prompt; returns its message id."""
        command = SubmitPrompt(
            parts=(TextPart(id="", session_id="", message_id="", text=text),),
            digest=options.pop("digest", text),
            reverted=self.rows.reverted(),
            **options,
        )
        return str(self.send(command).message_id)

    def text(self, message_id: str, text: str, *, done: bool = True, part_id: str = "") -> TextPart:
        return TextPart(
            id=part_id or self.new_id("prt"),
            session_id=SESSION,
            message_id=message_id,
            text=text,
            time=Span(start=self.now_ms, end=self.now_ms if done else None),
        )

    def call(self, tool: str = "read", **options: Any) -> CallDraft:
        part_id = self.new_id("prt")
        return CallDraft(
            part_id=part_id,
            call_id=options.pop("call_id", part_id.replace("prt", "call")),
            tool=tool,
            input=options.pop("input", {"n": self._count}),
            signature=options.pop("signature", part_id),
            **options,
        )

    @property
    def step_id(self) -> str:
        """The model call that runs."""
        (found,) = (key for key, effect in self.running.items() if isinstance(effect, RunStep))
        return found

    @property
    def summary_id(self) -> str:
        (found,) = (key for key, effect in self.running.items() if isinstance(effect, RunSummary))
        return found

    def answer(
        self, text: str = "answer", *calls: CallDraft, tokens: int = 10, **options: Any
    ) -> str:
        """The running model call ends well."""
        key = options.pop("message_id", None) or self.step_id
        self.running.pop(key, None)
        self.send(
            StepFinished(
                message_id=key,
                parts=(self.text(key, text),) if text else (),
                calls=calls,
                finish=options.pop("finish", "stop"),
                tokens=Tokens(total=tokens, input=tokens),
                **options,
            )
        )
        return key

    def break_step(self, text: str = "", *, message_id: str = "", **options: Any) -> str:
        """The running model call ends badly."""
        key = message_id or self.step_id
        self.running.pop(key, None)
        self.send(
            StepFailed(
                message_id=key,
                parts=(self.text(key, text),) if text else (),
                failure=options.pop("failure", Failure(name="Broken", data={"message": "broke"})),
                **options,
            )
        )
        return key

    def finish_tool(self, call: CallDraft | str, output: str = "output", **options: Any) -> None:
        part_id = call if isinstance(call, str) else call.part_id
        self.running.pop(part_id, None)
        self.send(ToolFinished(part_id=part_id, output=output, **options))

    def summarise(self, text: str = "what was said", **options: Any) -> str:
        """The running summary ends well, having planned over the rows as an executor would."""
        key = options.pop("message_id", None) or self.summary_id
        self.running.pop(key, None)
        self.send(
            StepFinished(
                message_id=key,
                parts=(self.text(key, text),) if text else (),
                calls=options.pop("calls", ()),
                finish="stop",
                tokens=Tokens(total=5, input=5),
                before=options.pop("before", 100),
                after=options.pop("after", 10),
                **options,
            )
        )
        return key

    def fail_summary(self) -> str:
        key = self.summary_id
        self.break_step(message_id=key)
        return key

    # --- views

    def context(self) -> tuple[Turn, ...]:
        """What the running model call is shown."""
        return context(self.rows.transcript(), revert=self.rows.info.revert, before=self.step_id)

    def outcome(self, message_id: str) -> str | None:
        return self.rows.prompts[message_id].outcome

    def part(self, call: CallDraft) -> ToolPart:
        for parts in self.rows.parts.values():
            if call.part_id in parts:
                part = parts[call.part_id]
                assert isinstance(part, ToolPart)
                return part
        raise AssertionError("no such call")

    def assistants(self) -> list[AssistantMessage]:
        return [m for m, _ in self.rows.transcript() if isinstance(m, AssistantMessage)]

    def types(self) -> list[str]:
        """The last change's event types."""
        return [fact.type for fact in self.facts]

    def marker(self, marker_id: str) -> CompactionPart:
        (part,) = (p for p in self.rows.parts[marker_id].values() if isinstance(p, CompactionPart))
        return part

    def open_ask(self) -> Ask:
        (ask,) = (ask for ask in self.rows.asks.values() if ask.replied is None)
        return ask


def by_turn(stage: Stage) -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for message, _ in stage.rows.transcript():
        if message.turn is not None:
            found[message.turn].append(message.id)
    return found
