"""The supervisor: what happens when a session's actor dies.

A crash is counted durably, and its actor fenced out, before anybody acts on it: a session that
kills the process must not kill every start. Then the policy decides: restart after a backoff, or
quarantine. The mailbox outlives the actor, so whoever waits is answered by the next incarnation.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from understudy.actors.core.commands import Reason
from understudy.actors.pool import Mailbox, PooledActor
from understudy.errors import (
    ActorCrashed,
    RuntimeClosed,
    SessionClaimed,
    SessionNotFound,
    SessionQuarantined,
    UnderstudyError,
    described,
)
from understudy.store.claims import RestartRecord

if TYPE_CHECKING:
    from understudy.actors.clock import Clock
    from understudy.store.store import Store

logger = logging.getLogger("understudy.supervisor")


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """OTP's words: how crashed session actors are restarted.

    Attributes:
        restart: "transient" restarts after a crash; "permanent" also never passivates;
            "temporary" does not restart: the next command does, after recovery.
        intensity: restarts of one session within ``period_s`` before it is quarantined.
        period_s: the length of that window.
        quarantine_after: crashes in a row, however slow, without an answered prompt in between.
        backoff_s: the pause before the first restart in a row; it doubles with each.
        max_backoff_s: the longest pause.
    """

    restart: Literal["permanent", "transient", "temporary"] = "transient"
    intensity: int = 5
    period_s: float = 60.0
    quarantine_after: int = 5
    backoff_s: float = 0.05
    max_backoff_s: float = 30.0

    def pause_s(self, consecutive: int, jitter: float) -> float:
        """The backoff before the next restart; ``jitter`` is from 0 to 1 and takes up to half."""
        doublings = min(max(0, consecutive - 1), 1_000)  # a float ends at 2 ** 1023
        pause = min(self.max_backoff_s, self.backoff_s * 2.0**doublings)
        return float(pause * (1.0 - jitter / 2.0))


class Died(msgspec.Struct, frozen=True):
    """An actor crashed. Its mailbox is paused and keeps what waits."""

    session_id: str
    mailbox: Mailbox
    error: BaseException
    culprit: str | None
    reason: Reason = "crash"


class Charge(Protocol):
    """What the supervisor needs of its runtime."""

    store: Store
    clock: Clock

    def revive(self, session_id: str, mailbox: Mailbox, reason: Reason) -> None:
        """Put a new actor on the mailbox."""
        ...

    def actor_ended(
        self, session_id: str, mailbox: Mailbox, error: UnderstudyError | None
    ) -> None: ...

    def quarantined_now(self, session_id: str, reason: str) -> None: ...

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None: ...


class Supervisor(PooledActor):
    """Restarts session actors, one for one."""

    def __init__(
        self, mailbox: Mailbox, charge: Charge, policy: RestartPolicy, chance: random.Random
    ) -> None:
        super().__init__(mailbox)
        self.restarts = 0
        self._charge = charge
        self._policy = policy
        self._chance = chance
        self._recent: dict[str, deque[float]] = {}

    def on_receive(self, message: Any) -> None:
        if isinstance(message, Died):
            try:
                self._count(message)
            except BaseException:  # it would be the end of all restarts
                logger.exception("The supervisor failed on %s", message.session_id)

    def sessions(self) -> list[str]:
        """Whose crashes are remembered."""
        return list(self._recent)

    def forget(self, session_id: str) -> None:
        """Drop what is remembered of a session that is gone. Safe from any thread."""
        self._recent.pop(session_id, None)

    def _count(self, news: Died) -> None:
        """Make the crash durable; the verdict follows from the count."""
        logger.error(
            "The actor of session %s crashed", news.session_id, exc_info=_details(news.error)
        )
        now = self._charge.clock.monotonic_s()
        recent = self._recent.setdefault(news.session_id, deque())
        while recent and now - recent[0] > self._policy.period_s:
            recent.popleft()
        recent.append(now)
        too_often = len(recent) > self._policy.intensity
        self._record(news, 1 if too_often else self._policy.quarantine_after)

    def _record(self, news: Died, quarantine_at: int) -> None:
        """Say it to the store, again and again if need be: it is one crash all the same."""
        self._charge.store.record_crash(
            news.session_id,
            reason=described(news.error),
            culprit=news.culprit,
            quarantine_at=quarantine_at,
            done=lambda record, _, error: self._counted(news, quarantine_at, record, error),
        )

    def _counted(
        self,
        news: Died,
        quarantine_at: int,
        record: RestartRecord | None,
        error: BaseException | None,
    ) -> None:
        """The count is durable, or cannot be. In the writer's thread."""
        if record is None:
            self._not_counted(news, quarantine_at, error)
        elif record.quarantined_ms is not None:
            self._recent.pop(news.session_id, None)
            self._charge.quarantined_now(news.session_id, record.reason)
            self._charge.actor_ended(
                news.session_id, news.mailbox, quarantine_error(news.session_id, record.reason)
            )
        elif self._policy.restart == "temporary":
            self._charge.actor_ended(
                news.session_id,
                news.mailbox,
                ActorCrashed(
                    f"The actor of session {news.session_id} crashed: {record.reason}",
                    session_id=news.session_id,
                ),
            )
        else:
            self.restarts += 1
            pause_s = self._policy.pause_s(record.consecutive, self._chance.random())
            self._charge.call_later(
                pause_s,
                lambda: self._charge.revive(news.session_id, news.mailbox, news.reason),
            )

    def _not_counted(self, news: Died, quarantine_at: int, error: BaseException | None) -> None:
        """Gone or somebody else's: nothing to restart. A store that cannot write is waited for."""
        if isinstance(error, SessionNotFound | SessionClaimed | RuntimeClosed):
            self.forget(news.session_id)
            self._charge.actor_ended(news.session_id, news.mailbox, error)
            return
        logger.error("The crash of %s could not be counted: %s", news.session_id, error)
        self._charge.call_later(1.0, lambda: self._record(news, quarantine_at))


def quarantine_error(session_id: str, reason: str) -> SessionQuarantined:
    return SessionQuarantined(
        f"Session {session_id} is quarantined: {reason}", session_id=session_id, reason=reason
    )


def deleted_error(session_id: str) -> SessionNotFound:
    return SessionNotFound(f"Session {session_id} was deleted", session_id=session_id)


def _details(error: BaseException) -> Any:
    return (type(error), error, error.__traceback__)
