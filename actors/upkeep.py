"""Upkeep: what has to be done every now and then.

Renews the lease, passivates idle sessions, publishes what other processes committed, recovers what
dead ones left, trims the journal, and watches: a hang is a crash that does not know it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from understudy.actors.core.commands import ExecutionLost
from understudy.actors.core.state import State
from understudy.actors.messages import Prove
from understudy.actors.session_actor import SessionActor
from understudy.errors import InternalError, UnderstudyError
from understudy.store.records import ToolPart, ToolRunning

if TYPE_CHECKING:
    from understudy.actors.engine import Engine
    from understudy.actors.platform import Ticker
    from understudy.store.journal import Retention

logger = logging.getLogger("understudy.upkeep")

TICK_S: Final = 0.5
PASSIVATE_EVERY_S: Final = 2.0
ORPHANS_EVERY_S: Final = 3.0
WATCH_EVERY_S: Final = 1.0
TRIM_EVERY_S: Final = 60.0
SWEEP_EVERY_S: Final = 900.0


class Upkeep:
    """Started, it ticks every ``TICK_S``; tests call ``tick`` themselves."""

    def __init__(
        self,
        engine: Engine,
        *,
        passivate_after_s: float,
        handler_limit_s: float,
        retention: Retention,
    ) -> None:
        self._engine = engine
        self._passivate_after_s = passivate_after_s
        self._handler_limit_s = handler_limit_s
        self._retention = retention
        self._suspects: dict[tuple[str, str], int] = {}
        self._due: dict[Callable[[], None], float] = {}
        self._ticker: Ticker | None = None

    def start(self) -> None:
        self._ticker = self._engine.platform.every(TICK_S, self.tick, name="understudy-upkeep")

    def stop(self) -> None:
        if self._ticker is not None:
            self._ticker.stop()

    def tick(self) -> None:
        """Do what is due."""
        now = self._engine.clock.monotonic_s()
        for duty, every_s in (
            (self._keep_lease, TICK_S),
            (self._hung_handlers, WATCH_EVERY_S),
            (self._lost_executions, WATCH_EVERY_S),
            (self._engine.hooks.let_go, WATCH_EVERY_S),
            (self._foreign_events, TICK_S),
            (self._lost_events, TICK_S),
            (self._passivate, PASSIVATE_EVERY_S),
            (self._orphans, ORPHANS_EVERY_S),
            (self._trim, TRIM_EVERY_S),
            (self._sweep, SWEEP_EVERY_S),
        ):
            if now < self._due.get(duty, now):
                continue
            self._due[duty] = now + every_s
            try:
                duty()
            except UnderstudyError as error:
                logger.warning("Upkeep put off: %s", error)
            except Exception:
                logger.exception("Upkeep failed")

    # --- the duties ----------------------------------------------------------------------------

    def _keep_lease(self) -> None:
        if self._engine.store.lease.is_due(now_ms=self._engine.clock.wall_ms()):
            self._renew()

    def _renew(self) -> None:
        # A process that was frozen may have been replaced, by one that is gone again: whoever
        # waits here for a turn of theirs is told by what they wrote.
        self._engine.store.renew_lease(self._engine.publisher.poll)
        self._lost_claims()

    def _lost_claims(self) -> None:
        """Sessions that were taken over while this process was frozen: end what works for them."""
        busy = {
            actor.session_id: actor.epoch
            for actor in self._engine.registry.actors()
            if actor.state is not None and not actor.idle
        }
        if not busy:
            return
        held = self._engine.store.read.claims(list(busy))
        for session_id, epoch in busy.items():
            if held.get(session_id) != (self._engine.id, epoch):
                self._engine.registry.tell_live(session_id, Prove())

    def _passivate(self) -> None:
        if self._engine.restart.restart == "permanent":
            return
        dropped = self._engine.registry.passivate(self._passivate_after_s)
        if dropped:
            self._engine.store.release(dropped)
            for session_id, _ in dropped:
                self._engine.executor.forget(session_id)

    def _foreign_events(self) -> None:
        """Events that other processes committed, though they may be gone by now."""
        if self._engine.store.read.cursors()[1] > self._engine.publisher.cursor:
            self._engine.store.between_commits(self._engine.publisher.poll)

    def _lost_events(self) -> None:
        """Events that retention took before this runtime, frozen for long, could read them."""
        publisher = self._engine.publisher
        if publisher.lost:
            publisher.lost = False
            try:
                self._engine.look_again()
            except BaseException:
                publisher.lost = True
                raise

    def _orphans(self) -> None:
        """Sessions of runtimes that died while this one lives, and what could not be recovered."""
        self._engine.orphans.wake()

    def _sweep(self) -> None:
        self._engine.tracker.sweep()

    def _trim(self) -> None:
        self._engine.store.trim_journal(self._retention)

    # --- the watchdog --------------------------------------------------------------------------

    def _hung_handlers(self) -> None:
        """Replace actors whose handler does not come back, and the threads under them."""
        for mailbox in self._engine.pool.hung(self._handler_limit_s):
            actor = mailbox.actor
            replaced = self._engine.registry.replace(mailbox)
            if replaced is None or not isinstance(actor, SessionActor):
                continue
            session_id, fresh = replaced
            logger.error("The actor of session %s hangs; replacing it", session_id)
            actor.give_up(
                InternalError(f"A handler ran for more than {self._handler_limit_s:g} s"), fresh
            )

    def _lost_executions(self) -> None:
        """Close open steps that nobody works for.

        Only what was seen twice without any change in between is lost: an execution that ended
        may still have its report on the way, so a session with anything to do is left alone.
        """
        suspects: dict[tuple[str, str], int] = {}
        for actor in self._engine.registry.actors():
            state = actor.state
            if state is None or not actor.settled:
                continue
            for key, message_id in _work_of(state):
                if self._engine.executor.is_running(actor.session_id, key):
                    continue
                suspect = (actor.session_id, key)
                if self._suspects.get(suspect) == state.seq:
                    logger.error("Nothing works for %s of session %s", key, actor.session_id)
                    lost = ExecutionLost(message_id=message_id)
                    self._engine.tell_live(actor.session_id, lost)
                else:
                    suspects[suspect] = state.seq
        self._suspects = suspects


def _work_of(state: State) -> list[tuple[str, str]]:
    """What should be running for a session: (id of the message or part, id of the message)."""
    if state.compaction is not None and state.compaction.summary is not None:
        message_id = state.compaction.summary.message.id
        return [(message_id, message_id)]
    step = state.turn.step if state.turn is not None else None
    if step is None:
        return []
    if step.message.finish is None:
        return [(step.message.id, step.message.id)]
    return [
        (part.id, step.message.id)
        for part in step.parts.values()
        if isinstance(part, ToolPart) and isinstance(part.state, ToolRunning)
    ]
