"""What all calls share: the runtime, the hub, and how sessions are looked up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

import understudy
from understudy.actors.session import Session
from understudy.errors import UnderstudyError
from understudy.gateway.http.builtin import PROVIDER
from understudy.gateway.http.events import Hub, Item
from understudy.gateway.http.wire import Wire
from understudy.store.events import (
    Event,
    Fact,
    MessageUpdated,
    PartDelta,
    PartUpdated,
    SessionIdle,
    SessionStatus,
)
from understudy.store.records import IDLE, ReasoningPart, TextPart
from understudy.store.records import Session as SessionRecord

if TYPE_CHECKING:
    from understudy.actors.models.protocol import Model
    from understudy.actors.runtime import Runtime

RECAP_S: Final = 120.0
"""How long after the start connecting clients are told what recovery closed."""

T = TypeVar("T")


class Gateway:
    """A runtime as clients see it. ``directory`` is the server's own, absolute."""

    def __init__(self, runtime: Runtime, *, directory: str) -> None:
        self.runtime = runtime
        self.directory = directory
        self.home = str(Path.home())
        self.state_directory = str(Path(runtime.engine.config.path).absolute().parent)
        self.version = understudy.__version__
        self.started_ms = int(time.time() * 1000)
        self._recap_until_s = time.monotonic() + RECAP_S
        rules = runtime.engine.rules
        self.wire = Wire(
            runtime.engine.info, directory=directory, agent=rules.agent, model=rules.model
        )
        self.hub = Hub(self)

    @property
    def models(self) -> list[Model]:
        """What clients may choose from."""
        return [each for each in self.runtime.engine.models if each.provider_id != PROVIDER]

    async def read(self, work: Callable[[], T]) -> T:
        """Do a read off the event loop."""
        return await self.runtime.engine.background(work).wait()

    async def info(self, session_id: str) -> SessionRecord:
        """A session's record. Raises ``SessionNotFound``."""
        engine = self.runtime.engine
        actor = engine.registry.actor(session_id)
        if actor is not None and actor.state is not None:
            return actor.state.info
        return await self.read(lambda: engine.record_of(session_id))

    async def session(self, session_id: str) -> Session:
        """A handle on a session that exists. Raises ``SessionNotFound``."""
        return self.runtime.engine.handle_of(await self.info(session_id))

    # --- what a client that was away must know -------------------------------------------------

    async def recap(self, directory: str | None) -> list[Item]:
        """What recovery closed at the start, as events: clients that reconnect ask for nothing."""
        if time.monotonic() > self._recap_until_s:
            return []
        items: list[Item] = []
        for report in self.runtime.recovered:
            place = self.wire.directory_of(report.session_id)
            if directory is None or place == directory:
                try:
                    items += await self.read(
                        lambda each=report: self._closed(each.session_id, each.messages)  # type: ignore[misc]
                    )
                except UnderstudyError:
                    continue  # deleted in the meantime
        return items

    def _closed(self, session_id: str, message_ids: tuple[str, ...]) -> list[Item]:
        """A recovered session's closed messages and parts as they are now, and its rest."""
        now = self.runtime.engine.clock.wall_ms()
        facts: list[Fact] = []
        for message_id in message_ids:
            pair = self.runtime.engine.store.read.message(session_id, message_id)
            if pair is not None:
                facts.append(MessageUpdated(session_id=session_id, info=pair[0]))
                facts += [PartUpdated(session_id=session_id, part=p, time=now) for p in pair[1]]
        if self.runtime.engine.status_of(session_id)["type"] in ("idle", "quarantined"):
            facts.append(SessionStatus(session_id=session_id, status=IDLE))
            facts.append(SessionIdle(session_id=session_id))
        return [self._item(fact, now) for fact in facts]

    async def open_texts(self, directory: str | None) -> list[Item]:
        """Every text that is being written, as it stands: what was missed is in it."""
        live = [
            each
            for each in self.runtime.engine.publisher.live_texts()
            if directory is None or self.wire.directory_of(each.session_id) == directory
        ]
        return await self.read(lambda: self._grown(live)) if live else []

    def _grown(self, live: list[PartDelta]) -> list[Item]:
        now = self.runtime.engine.clock.wall_ms()
        items = []
        for each in live:
            pair = self.runtime.engine.store.read.message(each.session_id, each.message_id)
            for part in pair[1] if pair is not None else ():
                if part.id == each.part_id and isinstance(part, TextPart | ReasoningPart):
                    grown = msgspec.structs.replace(part, text=each.delta)
                    fact = PartUpdated(session_id=each.session_id, part=grown, time=now)
                    items.append(self._item(fact, now))
        return items

    def _item(self, fact: Fact, now: int) -> Item:
        return self.hub.item(Event(fact.type, fact.session_id, None, None, now, fact))
