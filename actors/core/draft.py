"""A decision in the making: facts, effects and the state they lead to."""

from __future__ import annotations

from typing import Any

import msgspec

from understudy.actors.core.effects import Effect
from understudy.actors.core.state import Moment, Rules, State
from understudy.store.events import (
    AnyFact,
    MessageUpdated,
    PartUpdated,
    SessionIdle,
    SessionStatus,
    SessionUpdated,
)
from understudy.store.ids import make_id
from understudy.store.records import (
    BUSY,
    IDLE,
    AnyPart,
    Message,
    Session,
    Status,
)

replace = msgspec.structs.replace


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What a command leads to: a change to commit, then effects to start and a reply to give."""

    state: State
    facts: tuple[AnyFact, ...]
    effects: tuple[Effect, ...]
    reply: Any


class Draft:
    """The working copy a handler changes. Local to one decision."""

    __slots__ = (
        "_before",
        "_ids",
        "_seq",
        "answer",
        "asks",
        "closing",
        "compacted",
        "compaction",
        "effects",
        "facts",
        "info",
        "moment",
        "queue",
        "rules",
        "status",
        "turn",
    )

    def __init__(self, state: State, moment: Moment, rules: Rules) -> None:
        self.info = state.info
        self.status = state.status
        self.queue = state.queue
        self.turn = state.turn
        self.compaction = state.compaction
        self.asks = state.asks
        self.compacted = state.compacted
        self.closing = state.closing
        self.moment = moment
        self.rules = rules
        self.facts: list[AnyFact] = []
        self.effects: list[Effect] = []
        self.answer: str | None = None
        self._before = state.answer
        self._seq = state.seq
        self._ids = 0

    @property
    def now(self) -> int:
        return self.moment.now_ms

    @property
    def session_id(self) -> str:
        return self.info.id

    @property
    def next_seq(self) -> int:
        return self._seq + len(self.facts) + 1

    @property
    def follows(self) -> str | None:
        """The answer after which nothing has happened, nor does by this decision so far."""
        return None if self.facts else self._before

    def new_id(self, prefix: str) -> str:
        self._ids += 1
        return make_id(
            prefix,
            now_ms=self.moment.now_ms,
            counter=self._seq + self._ids,
            entropy=self.moment.entropy,
        )

    def emit(self, fact: AnyFact) -> None:
        self.facts.append(fact)

    def start(self, effect: Effect) -> None:
        self.effects.append(effect)

    def put_message(self, message: Message) -> None:
        self.emit(MessageUpdated(session_id=self.info.id, info=message))

    def put_part(self, part: AnyPart) -> None:
        self.emit(PartUpdated(session_id=self.info.id, part=part, time=self.moment.now_ms))

    def put_info(self, info: Session) -> None:
        time = replace(info.time, updated=max(self.now, info.time.updated))
        self.info = replace(info, time=time)
        self.emit(SessionUpdated(session_id=info.id, info=self.info))

    def set_status(self, status: Status) -> None:
        if status != self.status:
            self.status = status
            self.emit(SessionStatus(session_id=self.info.id, status=status))

    def set_busy(self) -> None:
        self.set_status(BUSY)

    def set_idle(self) -> None:
        if self.status != IDLE:
            self.set_status(IDLE)
            self.emit(SessionIdle(session_id=self.info.id))

    def finish(self, reply: Any) -> Decision:
        state = State(
            info=self.info,
            seq=self._seq + len(self.facts),
            status=self.status,
            queue=self.queue,
            turn=self.turn,
            compaction=self.compaction,
            asks=self.asks,
            compacted=self.compacted,
            closing=self.closing,
            answer=self.answer or self.follows,
        )
        return Decision(state, tuple(self.facts), tuple(self.effects), reply)
