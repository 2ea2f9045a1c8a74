"""What a live session remembers between commands."""

from __future__ import annotations

from typing import Literal

import msgspec

from understudy.store.records import (
    IDLE,
    AnyPart,
    Ask,
    AssistantMessage,
    CompactionPart,
    ModelRef,
    Pair,
    PermissionRule,
    Prompt,
    Session,
    Status,
    UserMessage,
)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """A named bound on everything a turn can grow. Times in seconds.

    Attributes:
        steps: model calls in one turn.
        calls_per_step: tool calls taken from one answer; the rest are refused.
        repeated_calls: equal calls in a row before they are refused; at twice that the turn fails.
        model_attempts: tries of one model call, and broken streams in a row.
        retry_s: total time spent on retries of one model call.
        stream_idle_s: silence of a model stream before it counts as broken, an eighth late at most.
        tool_s: one tool call, unless the tool says otherwise; waiting for people not counted.
        turn_s: one turn, waiting for people not counted; None for no limit.
        resume_attempts: times ``on_restart="resume"`` continues one turn.
        queue: prompts waiting in one session.
        prompt_bytes: the size of one prompt.
        tool_output: characters of a tool's output the model sees.
        answer_chars: characters of one model answer, its reasoning and calls; more fails the turn.
        depth: sessions above a child: its parent, that one's parent, and so on.
    """

    steps: int = 100
    calls_per_step: int = 64
    repeated_calls: int = 4
    model_attempts: int = 5
    retry_s: float = 600.0
    stream_idle_s: float = 120.0
    tool_s: float = 600.0
    turn_s: float | None = None
    resume_attempts: int = 3
    queue: int = 1000
    prompt_bytes: int = 8 * 1024 * 1024
    tool_output: int = 50_000
    answer_chars: int = 4 * 1024 * 1024
    depth: int = 64


class CompactionRules(msgspec.Struct, frozen=True, kw_only=True):
    """When and how a session is compacted. Sizes in tokens.

    Attributes:
        auto: compact by itself when the context passes the limit.
        reserve: room kept free for the answer; None takes the model's output limit.
        tail: recent messages kept verbatim.
        attempts: tries of one marker's summary before it fails.
        failures: failed compactions in a row before automatic compaction pauses.
        prune: also shorten old tool outputs in the context.
    """

    auto: bool = True
    reserve: int | None = None
    tail: int = 8_000
    attempts: int = 2
    failures: int = 2
    prune: bool = False


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The policy a runtime decides by.

    With ``rest`` a recovery closes what was cut short and leaves what waits to the next start;
    nothing starts after it.
    """

    limits: Limits = Limits()
    compaction: CompactionRules = CompactionRules()
    permissions: tuple[PermissionRule, ...] = ()
    on_restart: Literal["interrupt", "resume"] = "interrupt"
    rest: bool = False
    agent: str = "build"
    model: ModelRef = ModelRef(provider_id="", model_id="")
    context_limit: int = 200_000
    output_limit: int = 8_192

    @property
    def usable_tokens(self) -> int:
        """What a request may hold before the session needs compacting."""
        reserve = self.compaction.reserve
        return max(1, self.context_limit - (self.output_limit if reserve is None else reserve))


class Moment(msgspec.Struct, frozen=True, gc=False):
    """When a command is decided, and the chance it may use."""

    now_ms: int
    entropy: int


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A prompt with its user message."""

    prompt: Prompt
    message: UserMessage


class Step(msgspec.Struct, frozen=True, gc=False):
    """An open assistant message and its parts by id, in order of creation.

    The model is streaming until ``message.finish`` is set; then tools are running. ``asked`` are
    the ids of what its running tools have asked: a request delivered twice is asked once.
    """

    message: AssistantMessage
    parts: dict[str, AnyPart]
    asked: frozenset[str] = frozenset()


class Turn(msgspec.Struct, frozen=True, gc=False):
    """The prompt being answered.

    Attributes:
        entry: the prompt that started it.
        joined: prompts that steered it.
        steps: steps finished.
        step: the open step; None between steps (while compacting).
        failures: broken streams in a row.
        repeats: the last call's signature and how often it came in a row.
        said: its finished messages if ``whole``, else the last of them at most: it was recovered,
            or is long.
    """

    entry: Entry
    joined: tuple[Entry, ...] = ()
    steps: int = 0
    step: Step | None = None
    failures: int = 0
    repeats: tuple[str, int] = ("", 0)
    said: tuple[Pair, ...] = ()
    whole: bool = False

    @property
    def number(self) -> int:
        number = self.entry.prompt.turn
        assert number is not None, "a running turn has a number"
        return number


class Compaction(msgspec.Struct, frozen=True, gc=False):
    """The one active marker. ``summary`` is open while the summariser runs."""

    part: CompactionPart
    message: UserMessage
    summary: Step | None = None


class State(msgspec.Struct, frozen=True, gc=False):
    """A live session.

    ``seq`` is the number of its last event. ``compacted``: a compaction was committed since the
    last finished step. That, a turn's failures and repeats and what a step ``asked`` are not
    stored: after a restart they begin anew, bounded by the attempts of prompts and markers, which
    are, by the turn's steps, which are counted, or by the answers of the person it waits for.
    ``closing``: its runtime closes, and nothing starts any more. ``answer`` is the message that
    ended in the last change there was; empty before any, None if that was about something else.
    """

    info: Session
    seq: int
    status: Status = IDLE
    queue: tuple[Entry, ...] = ()
    turn: Turn | None = None
    compaction: Compaction | None = None
    asks: dict[str, Ask] = {}
    compacted: bool = False
    closing: bool = False
    answer: str | None = None

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is asked."""
        return not (self.turn or self.compaction or self.queue or self.asks)
