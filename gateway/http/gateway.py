"""What all calls share: the runtime, the hub, and how sessions are looked up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from weakref import WeakValueDictionary

import understudy
from understudy.actors.session import Session
from understudy.errors import SessionNotFound
from understudy.gateway.http.builtin import PROVIDER
from understudy.gateway.http.events import Hub, Item
from understudy.gateway.http.wire import Wire
from understudy.store.events import (
    Event,
    EventData,
    MessageUpdated,
    PartUpdated,
    PermissionAsked,
    PermissionReplied,
    SessionDeleted,
    SessionIdle,
    SessionStatus,
)
from understudy.store.records import IDLE
from understudy.store.records import Session as SessionRecord

if TYPE_CHECKING:
    from understudy.actors.models.protocol import Model
    from understudy.actors.recovery_report import RecoveryReport
    from understudy.actors.runtime import Runtime

RECAP_S: Final = 120.0
"""How long after the start connecting clients are told what recovery closed."""

RECAP_EVENTS: Final = 1000

SEARCHES: Final = 4
"""How many look through files at a time."""

_TOLD_AGAIN: Final = (
    MessageUpdated,
    PartUpdated,
    PermissionReplied,
    SessionStatus,
    SessionIdle,
)

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
        # Threads of its own: people search as they type, and nobody else is to wait for that.
        self.looking = ThreadPoolExecutor(SEARCHES, thread_name_prefix="understudy-files")
        self._changing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

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

    def changing(self, session_id: str) -> asyncio.Lock:
        """Held while a session is changed to what it was and more: two may add at once."""
        return self._changing.setdefault(session_id, asyncio.Lock())

    async def session(self, session_id: str) -> Session:
        """A handle on a session that exists. Raises ``SessionNotFound``."""
        return self.runtime.engine.handle_of(await self.info(session_id))

    # --- what a client that was away must know -------------------------------------------------

    async def recap(self, directory: str | None) -> list[Item]:
        """What a client that reconnects after a restart must be told, for it asks for nothing.

        That is what recovery closed, and on the stream of all directories, which those clients
        read, also what has happened since.
        """
        if time.monotonic() > self._recap_until_s:
            return []
        facts: list[EventData] = []
        for report in self.runtime.recovered:
            place = self.wire.directory_of(report.session_id)
            if directory is None or place == directory:
                facts += await self.read(partial(self._closed, report))
        if directory is None:
            facts += await self.read(self._since_start)
        now = self.runtime.engine.clock.wall_ms()
        return [self._item(fact, now) for fact in facts]

    def _closed(self, report: RecoveryReport) -> list[EventData]:
        """A recovered session's closed messages and parts as they are now, and its rest."""
        engine, session_id = self.runtime.engine, report.session_id
        now = engine.clock.wall_ms()
        facts: list[EventData] = []
        for message_id in report.messages:
            pair = engine.store.read.message(session_id, message_id)
            if pair is not None:
                facts.append(MessageUpdated(session_id=session_id, info=pair[0]))
                facts += [PartUpdated(session_id=session_id, part=p, time=now) for p in pair[1]]
        with suppress(SessionNotFound):  # deleted in the meantime
            if engine.status_of(session_id)["type"] in ("idle", "quarantined"):
                facts.append(SessionStatus(session_id=session_id, status=IDLE))
                facts.append(SessionIdle(session_id=session_id))
        return facts

    def _since_start(self) -> list[EventData]:
        """What has been committed lately, as far as telling it again says what is true now."""
        reads = self.runtime.engine.store.read
        newest = self.runtime.cursor
        events = reads.events(after=max(self.hub.first, newest - RECAP_EVENTS), upto=newest)
        waiting = {ask.id for ask in reads.asks()}
        gone = {each.session_id for each in events if isinstance(each.data, SessionDeleted)}
        return [
            each.data
            for each in events
            if each.session_id not in gone
            and (
                isinstance(each.data, _TOLD_AGAIN)
                or (isinstance(each.data, PermissionAsked) and each.data.info.id in waiting)
            )
        ]

    def _item(self, fact: EventData, now: int) -> Item:
        return self.hub.item(Event(fact.type, fact.session_id, None, None, now, fact))
