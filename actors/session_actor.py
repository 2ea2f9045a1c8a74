"""The session actor: the shell around ``decide``.

It claims its session, loads what is unfinished, recovers it, and from then on turns commands into
changes: decide, commit, publish, reply, start effects, in that order. Commands that wait together
are decided one after the other and committed as one change. While the commit is under way the
actor holds no thread; the writer calls back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from understudy.actors.batch import Batch
from understudy.actors.core.commands import Command, Reason, Recover
from understudy.actors.core.decide import decide
from understudy.actors.core.draft import Decision
from understudy.actors.core.state import Moment, State
from understudy.actors.enrichment import enriched
from understudy.actors.loading import find
from understudy.actors.messages import (
    Activate,
    Activated,
    Crash,
    Delete,
    InjectedCrash,
    Prove,
    Request,
    Wake,
)
from understudy.actors.pending import Pending
from understudy.actors.pool import Mailbox, PooledActor
from understudy.actors.supervisor import deleted_error, quarantine_error
from understudy.errors import (
    ActorCrashed,
    RuntimeClosed,
    SessionFenced,
    StoreError,
    UnderstudyError,
    described,
)
from understudy.store.changes import Change
from understudy.store.events import AnyFact, Event, deleted_by
from understudy.store.records import Pair, Session

if TYPE_CHECKING:
    from understudy.actors.clock import Clock
    from understudy.actors.core.state import Rules
    from understudy.actors.executor import Executor
    from understudy.store.store import Store

logger = logging.getLogger("understudy.actors")

_RETRY_PAUSE_S: Final = (0.05, 0.2, 0.5, 1.0, 2.0)


class Surroundings(Protocol):
    """What a session actor needs of its runtime."""

    store: Store
    executor: Executor
    clock: Clock
    rules: Rules

    def entropy(self) -> int: ...

    def actor_died(
        self, session_id: str, mailbox: Mailbox, error: BaseException, culprit: str | None
    ) -> None:
        """The supervisor's business. The mailbox is paused and keeps what waits."""
        ...

    def quarantined_now(self, session_id: str, reason: str) -> None: ...

    def actor_ended(self, session_id: str, mailbox: Mailbox, error: UnderstudyError | None) -> None:
        """The actor stopped for good; what waits is answered with ``error``, or sent again."""
        ...

    def session_recovered(
        self, session_id: str, reason: Reason, facts: tuple[AnyFact, ...]
    ) -> None: ...

    def session_changed(self, info: Session, facts: Sequence[AnyFact]) -> None:
        """These were committed just now, here and not by another process."""
        ...

    def sessions_deleted(self, infos: Sequence[Session]) -> None:
        """These were deleted just now, children first."""
        ...


class SessionActor(PooledActor):
    """The one live writer of a session's rows, for as long as its epoch is the highest."""

    def __init__(
        self,
        mailbox: Mailbox,
        session_id: str,
        around: Surroundings,
        *,
        state: State | None = None,
        epoch: int = 0,
    ) -> None:
        super().__init__(mailbox)
        self.session_id = session_id
        self.state = state
        self.epoch = epoch
        self._around = around
        self._mailbox = mailbox
        self._batch: Batch | None = None
        self._current: Request | None = None
        self._crashes = 0
        self._term = around.store.lease.term
        self._store_failures = 0
        self._dead = False
        self._retired: UnderstudyError | None = None

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is asked: the session may be passivated."""
        return self.state is not None and self._batch is None and self.state.idle

    @property
    def settled(self) -> bool:
        """No message waits, is handled or is being committed."""
        return self._batch is None and self._mailbox.idle

    @property
    def may_borrow(self) -> bool:
        """Handlers run our code and SQLite's, no more; but once one has failed, who knows."""
        return not self._crashes

    def said(self, reply_id: str) -> tuple[Pair, ...] | None:
        """All messages of the turn whose answer is being told, if it was this one that ended it."""
        batch = self._batch
        if batch is None or self.state is not batch.state:
            return None  # it is not committed: what is told is how another process ended it
        return batch.said(reply_id)

    # --- receiving -----------------------------------------------------------------------------

    def on_receive(self, message: Any) -> None:
        """Handle one message. Whatever goes wrong is this session's crash and nobody else's."""
        if self._dead:
            if type(message) is Request and message.reply is not None:
                message.reply.fail(self._retired or RuntimeClosed("The actor ended"))
            return
        try:
            if type(message) is Request:
                self._current = message
                self._handle(message)
                self._current = None
            elif type(message) is Activate:
                self._activate(message)
            elif type(message) is Activated:
                self._recover(message)
            else:
                raise TypeError(f"not a message for a session: {message!r}")
        except BaseException as error:  # noqa: BLE001 - a crash of this actor only
            self._crash(error)

    def on_yield(self) -> None:
        """Commit what was decided, before the thread goes back."""
        if self._dead or self._batch is None:
            return
        try:
            self._commit(self._batch)
        except BaseException as error:  # noqa: BLE001 - a crash of this actor only
            self._crash(error)

    def _handle(self, request: Request) -> None:
        command = request.command
        if type(command) is Crash:
            raise InjectedCrash(command.reason)
        state = self._batch.state if self._batch is not None else self.state
        assert state is not None, "a session is loaded before it handles commands"
        if type(command) is Delete:
            self._delete(request)
            return
        if type(command) is Prove:
            self._batch = self._batch or Batch(state)  # even an empty change is fenced
            self._batch.prove(request)
            return
        if type(command) is Wake:
            if request.reply is not None:
                request.reply.set(None)
            return
        if self._batch is not None and self._batch.holds_back(command):
            self._mailbox.pause()
            self._mailbox.put_back(request)
            return
        batch = self._batch or Batch(state)
        try:
            decision = self._decide(state, enriched(self._around.store.read, state, command))
        except UnderstudyError as error:
            batch.refuse(request, error)
        else:
            batch.add(request, decision)
        if batch.facts or self._batch is not None or not self._owns():
            self._batch = batch
        else:
            self.state = batch.state
            self._finish(batch)

    def _owns(self) -> bool:
        """Whether nobody can have taken the session over since its last commit."""
        return self._around.store.lease.lasts(self._term, now_ms=self._around.clock.wall_ms())

    def _decide(self, state: State, command: Command) -> Decision:
        around = self._around
        moment = Moment(around.clock.wall_ms(), around.entropy())
        return decide(state, command, moment, around.rules)

    # --- committing ----------------------------------------------------------------------------

    def _commit(self, batch: Batch) -> None:
        assert self.state is not None, "a session is loaded before it commits"
        self._mailbox.pause()
        change = Change(
            session_id=self.session_id,
            owner=self._around.store.runtime_id,
            epoch=self.epoch,
            seq=self.state.seq,
            time_ms=self._around.clock.wall_ms(),
            facts=batch.facts,
            progress=self._crashes > 0 and batch.answered,
        )
        self._around.store.commit(change, self._committed, applied=self._applied)

    def _applied(self) -> None:
        """It is committed: whoever hears of it finds the state that goes with it."""
        if not self._dead and self._batch is not None:
            self.state = self._batch.state

    def _committed(self, _result: Any, _events: list[Event], error: BaseException | None) -> None:
        """The commit's outcome, in the writer's thread; the paused mailbox runs nothing else."""
        batch, self._batch = self._batch, None
        if self._dead or batch is None:
            return
        try:
            self._conclude(batch, error)
        except BaseException as failure:  # noqa: BLE001 - a crash of this actor only
            if error is None:
                batch.answer()  # it is durable
            self._crash(failure)

    def _conclude(self, batch: Batch, error: BaseException | None) -> None:
        if error is None:
            self._store_failures = 0
            self._term = self._around.store.lease.term
            if self.state is not None:
                self._around.session_changed(self.state.info, batch.facts)
            self._finish(batch)
            if batch.answered:
                self._crashes = 0
            self._mailbox.resume()
        elif isinstance(error, SessionFenced):
            self._lose(batch, error)
        elif isinstance(error, UnderstudyError):
            self._not_stored(batch, error)
        else:
            self._batch = batch  # its callers are told of the crash
            self._crash(error)

    def _finish(self, batch: Batch) -> None:
        """What follows a commit: effects, then answers."""
        if batch.effects:
            self._around.executor.start(self.session_id, batch.effects)
        batch.answer()

    def _not_stored(self, batch: Batch, error: UnderstudyError) -> None:
        """Nothing was written. Callers are told; what executors said is tried again."""
        if any(type(request.command) is Recover for request in batch.requests):
            # Not whole: nothing may be handled. The next command, or upkeep, tries again.
            self._dead = True
            self._around.actor_ended(self.session_id, self._mailbox, error)
            return
        again = [request for request in batch.requests if request.again]
        for reply, _, refusal in batch.replies:
            if not any(request.reply is reply for request in again):
                reply.fail(refusal or error)
        if isinstance(error, RuntimeClosed) or not again:
            self._mailbox.resume()
            return
        self._refuse_waiting(error)
        pause_s = _RETRY_PAUSE_S[min(self._store_failures, len(_RETRY_PAUSE_S) - 1)]
        self._store_failures += 1
        logger.warning(
            "Session %s could not be stored (%s); trying again in %g s",
            self.session_id,
            error,
            pause_s,
        )
        for request in reversed(again):
            self._mailbox.put_back(request)
        self._around.executor.call_later(pause_s, self._mailbox.resume)

    def _refuse_waiting(self, error: UnderstudyError) -> None:
        """Tell whoever waits: a delete, say, that only ever comes after what is tried again."""
        self._refuse(lambda each: not each.again and type(each.command) is not Wake, error)

    def _refuse(self, unwanted: Callable[[Request], bool], error: UnderstudyError) -> None:
        dropped = self._mailbox.drop(lambda each: type(each) is Request and unwanted(each))
        for request in dropped:
            if request.reply is not None:
                request.reply.fail(error)

    def _lose(self, batch: Batch, error: SessionFenced) -> None:
        """Somebody else owns the session, or it is gone. What was asked is asked again of them."""
        self._dead = True
        self._around.executor.cancel(self.session_id, "lost")
        asked = [r for r in batch.requests if not r.again and type(r.command) is not Recover]
        for request in reversed(asked):
            self._mailbox.put_back(request)
        for reply, _, _ in batch.replies:
            if not any(request.reply is reply for request in asked):
                reply.fail(error)
        self._around.actor_ended(self.session_id, self._mailbox, None)

    # --- a new incarnation ---------------------------------------------------------------------

    def _activate(self, message: Activate) -> None:
        self._mailbox.pause()

        def done(result: Any, _: list[Event], error: BaseException | None) -> None:
            if self._dead:
                return
            if error is None and result[1] is not None and result[1].quarantined_ms is not None:
                self._rest(result[1].reason)
            elif error is None:
                claimed, record = result
                self._mailbox.put_first(
                    Activated(claimed, record, message.reason, message.restarted)
                )
            elif isinstance(error, StoreError) and message.restarted:
                # Nobody asked for this claim who could ask again, and there is work to close.
                self._around.executor.call_later(
                    _RETRY_PAUSE_S[2], lambda: self._mailbox.put_first(message)
                )
            elif isinstance(error, UnderstudyError):
                self._dead = True
                self._around.actor_ended(self.session_id, self._mailbox, error)
            else:
                self._crash(error)

        self._around.store.acquire(self.session_id, done)

    def _rest(self, reason: str) -> None:
        """Another runtime has put the session in quarantine."""
        self._dead = True
        self._around.quarantined_now(self.session_id, reason)
        self._around.actor_ended(
            self.session_id, self._mailbox, quarantine_error(self.session_id, reason)
        )

    def _recover(self, message: Activated) -> None:
        """Load the session and commit its recovery before anything else is handled."""
        around = self._around
        found = find(around.store, around.rules, self.session_id, message)
        self._crashes, self.epoch = found.crashes, message.claimed.epoch
        decision = self._decide(found.state, found.recover)
        batch, done, facts = Batch(found.state), Pending[Any](), decision.facts

        def recovered(_: Pending[Any]) -> None:
            if done.error is None:
                around.session_recovered(self.session_id, message.reason, facts)

        done.then(recovered)
        batch.add(Request(found.recover, done), decision)
        # Whatever executors of a dead incarnation still had to say is void.
        void = f"The actor of session {self.session_id} was replaced"
        self._refuse(lambda each: each.again, SessionFenced(void, session_id=self.session_id))
        if facts:
            self.state = found.before
            self._batch = batch
            self._mailbox.pause()
        else:
            self.state = decision.state
            self._finish(batch)

    # --- deletion ------------------------------------------------------------------------------

    def _delete(self, request: Request) -> None:
        """Delete the tree in one transaction; what is committed here comes first."""
        if self._batch is not None:
            self._mailbox.pause()
            self._mailbox.put_back(request)
            return
        self._mailbox.pause()

        def done(ids: Any, events: list[Event], error: BaseException | None) -> None:
            if error is None:
                self._dead = True
                self._current = None  # this request: its handler may not have returned yet
                try:
                    self._around.sessions_deleted(deleted_by(events))
                finally:  # it is durable: whatever fails here, whoever waits is told
                    gone = deleted_error(self.session_id)
                    self._around.actor_ended(self.session_id, self._mailbox, gone)
                    if request.reply is not None:
                        request.reply.set(ids)
                return
            if request.reply is not None:
                request.reply.fail(error)
            self._mailbox.resume()

        self._around.store.delete_tree(self.session_id, self.epoch, done)

    # --- the end -------------------------------------------------------------------------------

    def _crash(self, error: BaseException) -> None:
        """Die. Callers of what was not committed are told; the supervisor gets the rest."""
        if self._dead:
            return
        self._dead = True
        self.actor_stopped.set()
        self._mailbox.pause()
        culprit = self._culprit()
        crash = ActorCrashed(
            f"The actor of session {self.session_id} crashed: {described(error)}",
            session_id=self.session_id,
        )
        crash.__cause__ = error
        if self._current is not None and self._current.reply is not None:
            self._current.reply.fail(crash)
        batch, self._batch = self._batch, None
        if batch is not None:
            for reply, _, refusal in batch.replies:
                reply.fail(refusal or crash)
        try:
            self._around.executor.cancel(self.session_id, "crash")
        finally:
            self._around.actor_died(self.session_id, self._mailbox, error, culprit)

    def _culprit(self) -> str | None:
        """The prompt that was being worked on, or would be started next."""
        state = self._batch.state if self._batch is not None else self.state
        if state is None:
            return None
        if state.turn is not None:
            return state.turn.entry.prompt.message_id
        return state.queue[0].prompt.message_id if state.queue else None

    def retire(self, error: UnderstudyError) -> None:
        """Stop at once: the session is gone, or the runtime. Safe while a handler runs.

        Late writes are fenced, late messages refused with ``error``; so is what was handled.
        """
        self._retired = error
        self._dead = True
        self.actor_stopped.set()
        current, (batch, self._batch) = self._current, (self._batch, None)
        if current is not None and current.reply is not None:
            current.reply.fail(error)
        if batch is not None:
            for reply, _, refusal in batch.replies:
                reply.fail(refusal or error)

    def give_up(self, error: BaseException, successor: Mailbox) -> None:
        """Declared dead by the watchdog, from its thread: the handler that hangs is fenced out.

        What waited is in the successor's mailbox already.
        """
        self._mailbox = successor
        self._crash(error)
