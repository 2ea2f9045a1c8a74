"""Planted bugs: each breaks one promise on purpose, by patching the runtime, and must be caught.

A simulator that catches no planted bug proves nothing about the others.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import ANY, Mock, patch

import msgspec

from understudy import signals
from understudy.actors import runtime, session, upkeep
from understudy.actors.batch import Batch
from understudy.actors.calls import CallTime
from understudy.actors.core import (
    asks,
    calls,
    compaction,
    context,
    decide,
    forking,
    prompts,
    recovery,
    turns,
)
from understudy.actors.core.commands import Abort, SubmitPrompt, Unrevert
from understudy.actors.core.draft import Draft
from understudy.actors.core.effects import Cancel, ResolveAsk
from understudy.actors.engine import Engine
from understudy.actors.executor import Executor
from understudy.actors.hooks import Hooks
from understudy.actors.leases import Leases
from understudy.actors.lifecycle import Lifecycle
from understudy.actors.live_text import LiveTexts
from understudy.actors.outcomes import Outcomes
from understudy.actors.pool import Mailbox
from understudy.actors.publisher import Publisher, SignalPump
from understudy.actors.registry import Registry
from understudy.actors.session_actor import SessionActor
from understudy.actors.silence import Silences
from understudy.actors.subscription import Subscription
from understudy.actors.supervisor import RestartPolicy, Supervisor
from understudy.actors.tracker import SessionTracker
from understudy.actors.upkeep import Upkeep
from understudy.store import changes, claims, journal
from understudy.store.events import SessionReset
from understudy.store.lease import Lease
from understudy.store.reads import Reads
from understudy.store.records import Span, ToolPending, ToolRunning
from understudy.store.writer import Writer


@dataclasses.dataclass(frozen=True)
class Planted:
    """A bug by name, and how to plant it for a while."""

    name: str
    plant: Callable[[], AbstractContextManager[Any]]


def _publish_before_commit() -> AbstractContextManager[Any]:
    attempt, fire = Writer._attempt, Writer._fire

    def attempting(self: Any, jobs: Any) -> Any:
        self.jobs = jobs
        return attempt(self, jobs)

    def firing(self: Any, point: str) -> None:
        events = [event for job in self.jobs for event in job.events]
        if point == "commit" and events:
            self._published(events)
        fire(self, point)

    return patch.multiple(Writer, _attempt=attempting, _fire=firing)


def _forget_the_epoch_check() -> AbstractContextManager[Any]:
    anyone = "UPDATE claim SET seq = ?1 WHERE session_id = ?2 AND ?3 IS NOT ?4"
    return patch.object(changes, "_FENCE", anyone)


def _drop_the_inbox_on_restart() -> AbstractContextManager[Any]:
    unfinished = Reads.unfinished

    def forgetting(self: Any, session_ids: Any) -> Any:
        found = unfinished(self, session_ids)
        return {key: msgspec.structs.replace(each, prompts=()) for key, each in found.items()}

    return patch.object(Reads, "unfinished", forgetting)


def _delete_without_fencing() -> AbstractContextManager[Any]:
    delete_tree = claims.delete_tree

    def deleting(tx: Any, **options: Any) -> Any:
        done = delete_tree(tx, **options)
        tx.connection.execute("DELETE FROM tombstone")
        return done

    return patch.object(claims, "delete_tree", deleting)


def _two_markers() -> AbstractContextManager[Any]:
    request = compaction.request

    def requesting(d: Any, **options: Any) -> str:
        d.compaction = None
        return request(d, **options)

    return patch.object(compaction, "request", requesting)


def _answer_before_commit() -> AbstractContextManager[Any]:
    commit = SessionActor._commit

    def committing(self: Any, batch: Any) -> None:
        batch.answer()
        commit(self, batch)

    return patch.object(SessionActor, "_commit", committing)


def _keep_what_was_not_stored() -> AbstractContextManager[Any]:
    not_stored = SessionActor._not_stored

    def keeping(self: Any, batch: Any, error: Any) -> None:
        self.state = batch.state
        not_stored(self, batch, error)

    return patch.object(SessionActor, "_not_stored", keeping)


def _do_not_watch_executions() -> AbstractContextManager[Any]:
    return patch.object(Upkeep, "_lost_executions", lambda self: None)


def _run_tools_again() -> AbstractContextManager[Any]:
    return patch.object(recovery, "_may_repeat", lambda part: True)


def _last_in_first_out() -> AbstractContextManager[Any]:
    def enqueue(d: Any, *entries: Any) -> None:
        d.queue = (*entries, *d.queue)

    return patch.object(prompts, "enqueue", enqueue)


def _leave_asks_open() -> AbstractContextManager[Any]:
    return patch.object(recovery, "_close_asks", lambda d: None)


def _hooks_of_hooks() -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(patch.object(runtime, "inside_hook", lambda: None))
    stack.enter_context(patch.object(session, "inside_hook", lambda: None))
    return stack


def _believe_late_reports() -> AbstractContextManager[Any]:
    def running(d: Any, part_id: str) -> Any:
        for step in (d.turn.step,) if d.turn is not None else ():
            part = step.parts.get(part_id) if step is not None else None
            if part is not None and not isinstance(part.state, ToolPending):
                state = part.state
                return part, ToolRunning(
                    input=state.input, time=Span(start=state.time.start), idempotent=False
                )
        return None

    return patch.object(calls, "running_call", running)


def _forget_to_forget_executions() -> AbstractContextManager[Any]:
    return patch.object(Executor, "_ended", lambda self, *args: None)


def _report_success_of_a_failed_commit() -> AbstractContextManager[Any]:
    def recovering(self: Any, jobs: Any, error: Any) -> None:
        for job in jobs:
            self._call(job.done, None, [], None)

    return patch.object(Writer, "_recover", recovering)


def _leave_rows_behind() -> AbstractContextManager[Any]:
    tables = tuple(each for each in claims._SESSION_TABLES if each != "inbox")
    return patch.object(claims, "_SESSION_TABLES", tables)


def _miss_what_others_committed() -> AbstractContextManager[Any]:
    return patch.object(Publisher, "_publish_missed", lambda self, *, upto: None)


def _interrupt_beside_the_running_turn() -> AbstractContextManager[Any]:
    close_turn = turns.close_turn

    def closing(d: Any, reason: Any, **options: Any) -> None:
        if reason == "interrupt":
            d.turn = None
        else:
            close_turn(d, reason, **options)

    return patch.object(turns, "close_turn", closing)


def _answer_an_abort_before_it_ends() -> AbstractContextManager[Any]:
    def aborting(d: Any, command: Any) -> bool:
        d.start(Cancel(reason=command.reason))
        return d.turn is not None

    return patch.dict(decide._HANDLERS, {Abort: aborting})


def _accept_other_words_under_an_id() -> AbstractContextManager[Any]:
    return patch.object(prompts, "_same_again", lambda d, command: command.known)


def _show_again_what_was_reverted() -> AbstractContextManager[Any]:
    def keeping(d: Any, message_ids: Any) -> None:
        if d.info.revert is not None:
            d.put_info(msgspec.structs.replace(d.info, revert=None))

    return patch.object(prompts, "remove_reverted", keeping)


def _drop_a_result_from_the_context() -> AbstractContextManager[Any]:
    assistant_turn = context._assistant_turn

    def dropping(*args: Any, **options: Any) -> Any:
        turn = assistant_turn(*args, **options)
        if turn is not None and len(turn.calls) > 1:
            return msgspec.structs.replace(turn, calls=turn.calls[:-1])
        return turn

    return patch.object(context, "_assistant_turn", dropping)


def _summarise_for_ever() -> AbstractContextManager[Any]:
    return patch.object(compaction, "_attempt_failed", lambda d, failure: compaction.start(d))


def _share_part_ids_with_a_fork() -> AbstractContextManager[Any]:
    copy_part = forking._copy_part

    def sharing(part: Any, *args: Any) -> Any:
        return msgspec.structs.replace(copy_part(part, *args), id=part.id)

    return patch.object(forking, "_copy_part", sharing)


def _let_children_live() -> AbstractContextManager[Any]:
    return patch.object(claims, "_TREE", "SELECT ? AS id, 0")


def _take_sessions_of_the_living() -> AbstractContextManager[Any]:
    acquire = claims.acquire

    def taking(tx: Any, **options: Any) -> Any:
        return acquire(tx, **{**options, "alive": lambda _: False})

    return patch.object(claims, "acquire", taking)


def _never_renew_the_lease() -> AbstractContextManager[Any]:
    return patch.object(Lease, "renew", lambda self, tx, *, now_ms: None)


def _forget_how_often_it_crashed() -> AbstractContextManager[Any]:
    return patch.object(claims, "put_restart", lambda tx, record: None)


def _restart_at_once() -> AbstractContextManager[Any]:
    return patch.object(RestartPolicy, "pause_s", lambda self, consecutive, jitter: 0.0)


def _lose_a_delta() -> AbstractContextManager[Any]:
    push = Publisher._push_deltas

    def losing(self: Any, everyone: Any, events: Any) -> None:
        push(self, everyone, [each for each in events if each.data.offset % 4 != 2])

    return patch.object(Publisher, "_push_deltas", losing)


def _keep_quiet_about_an_overflow() -> AbstractContextManager[Any]:
    page = Subscription._page

    def silent(self: Any) -> Any:
        return [event for event in page(self) if event.type != "events.overflow"]

    return patch.object(Subscription, "_page", silent)


def _trim_what_was_promised() -> AbstractContextManager[Any]:
    trim = journal.trim

    def greedy(tx: Any, *, retention: Any, now_ms: int) -> bool:
        keep = max(1, retention.events // 4)
        less = msgspec.structs.replace(retention, events=keep)
        return trim(tx, retention=less, now_ms=now_ms)

    return patch.object(journal, "trim", greedy)


def _let_one_receiver_stop_the_others() -> AbstractContextManager[Any]:
    def sending(self: Any, event: Any) -> None:
        signal = signals.BY_TYPE.get(event.type)
        for receiver in list(signal.receivers_for(self._sender)) if signal is not None else ():
            try:
                receiver(self._sender, event=event)
            except Exception as error:  # noqa: BLE001 - as the real one does
                self._report(event, receiver, error)
                return

    return patch.object(SignalPump, "_send", sending)


def _grant_a_claim_that_is_held() -> AbstractContextManager[Any]:
    grant = SessionTracker._grant

    def granting(self: Any, key: str, owner: str, ttl_s: Any) -> Any:
        claim = self._leases.claim(key)
        if claim is not None and claim.entry.owner != owner:
            self._leases.drop(claim)
        return grant(self, key, owner, ttl_s)

    return patch.object(SessionTracker, "_grant", granting)


def _bypass_for_ever() -> AbstractContextManager[Any]:
    return patch.object(Leases, "bypass", lambda self, key: self._bypasses.get(key))


def _count_no_usage() -> AbstractContextManager[Any]:
    return patch.object(turns, "_count", lambda d, message: None)


def _queue_without_end() -> AbstractContextManager[Any]:
    submit = prompts.submit

    def submitting(d: Any, command: Any) -> Any:
        rules, endless = d.rules, msgspec.structs.replace(d.rules.limits, queue=10**6)
        d.rules = msgspec.structs.replace(rules, limits=endless)
        try:
            return submit(d, command)
        finally:
            d.rules = rules

    return patch.dict(decide._HANDLERS, {SubmitPrompt: submitting})


def _queue_who_would_rather_not_wait() -> AbstractContextManager[Any]:
    submit = prompts.submit

    def submitting(d: Any, command: Any) -> Any:
        if command.when_busy == "reject":
            command = msgspec.structs.replace(command, when_busy="queue")
        return submit(d, command)

    return patch.dict(decide._HANDLERS, {SubmitPrompt: submitting})


def _withdraw_nothing_that_waits() -> AbstractContextManager[Any]:
    return patch.object(prompts, "_abort_one", lambda d, message_id, reason: False)


def _forget_what_is_always_allowed() -> AbstractContextManager[Any]:
    return patch.object(asks, "_remember", lambda d, ask: None)


def _ask_again_what_is_allowed_by_now() -> AbstractContextManager[Any]:
    return patch.object(asks, "_grant_covered", lambda d: None)


def _go_on_after_a_refusal() -> AbstractContextManager[Any]:
    return patch.object(asks, "_end_after_reject", lambda d: None)


def _lose_the_answer_to_a_question() -> AbstractContextManager[Any]:
    apply = Executor._apply

    def applying(self: Any, session_id: str, effect: Any, term: int) -> None:
        if isinstance(effect, ResolveAsk) and effect.ask.kind == "question":
            unsaid = msgspec.structs.replace(effect.ask, answers=())
            effect = msgspec.structs.replace(effect, ask=unsaid)
        apply(self, session_id, effect, term)

    return patch.object(Executor, "_apply", applying)


def _never_tell_who_waits_for_idle() -> AbstractContextManager[Any]:
    observe = Outcomes.observe

    def observing(self: Any, event: Any) -> None:
        if event.type != "session.idle":
            observe(self, event)

    return patch.object(Outcomes, "observe", observing)


def _tell_before_the_state_is_there() -> AbstractContextManager[Any]:
    conclude = SessionActor._conclude

    def concluding(self: Any, batch: Any, error: Any) -> None:
        if error is None:
            self.state = batch.state
        conclude(self, batch, error)

    return patch.multiple(SessionActor, _applied=lambda self: None, _conclude=concluding)


def _stay_in_retry() -> AbstractContextManager[Any]:
    set_busy = Draft.set_busy

    def staying(self: Any) -> None:
        if self.status.type != "retry":
            set_busy(self)

    return patch.object(Draft, "set_busy", staying)


def _drop_what_waits_at_a_restart() -> AbstractContextManager[Any]:
    revive = Registry.revive

    def reviving(self: Any, session_id: str, mailbox: Any, reason: Any) -> None:
        mailbox.drop(lambda message: True)
        revive(self, session_id, mailbox, reason)

    return patch.object(Registry, "revive", reviving)


def _settle_orphans_at_their_old_epoch() -> AbstractContextManager[Any]:
    return patch.object(claims, "_SETTLE", claims._SETTLE.replace("epoch + 1", "epoch"))


def _hide_calls_that_wait_from_recovery() -> AbstractContextManager[Any]:
    is_open = changes.is_open

    def hiding(part: Any) -> bool:
        return is_open(part) and not isinstance(getattr(part, "state", None), ToolPending)

    return patch.object(changes, "is_open", hiding)


def _run_hooks_of_the_bypassed() -> AbstractContextManager[Any]:
    def passing(self: Any, hook: str, session_id: str, *, internal: bool) -> bool:
        return self.wanted(hook) and not internal

    return patch.object(Hooks, "passes", passing)


def _forget_the_time_of_turns() -> AbstractContextManager[Any]:
    return patch.object(Executor, "_turn_expired", lambda self, session_id, execution: None)


def _give_calls_ten_times_their_time() -> AbstractContextManager[Any]:
    timeout = asyncio.timeout
    return patch.object(asyncio, "timeout", lambda limit_s: timeout(10 * limit_s))


def _charge_a_turn_for_people() -> AbstractContextManager[Any]:
    return patch.object(Executor, "_count_asking", lambda self, session_id, change: None)


def _charge_a_call_for_people() -> AbstractContextManager[Any]:
    return patch.object(CallTime, "asking", lambda self, change: None)


def _keep_text_only_at_its_end() -> AbstractContextManager[Any]:
    return patch.object(LiveTexts, "flush_later", lambda self, stream: None)


def _lose_the_mail_of_a_lost_session() -> AbstractContextManager[Any]:
    ended = Registry.ended

    def ending(self: Any, session_id: str, mailbox: Any, error: Any) -> None:
        if error is None:
            mailbox.drop(lambda message: True)
        ended(self, session_id, mailbox, error)

    return patch.object(Registry, "ended", ending)


def _trust_a_claim_after_a_freeze() -> AbstractContextManager[Any]:
    return patch.object(Executor, "lasts", lambda self, term: True)


def _miss_a_reset_by_others() -> AbstractContextManager[Any]:
    return patch.object(Engine, "_lift_quarantine", lambda self, event: None)


def _tell_nobody_of_a_quarantine() -> AbstractContextManager[Any]:
    return patch.object(Outcomes, "_tell_quarantined", lambda self, session_id, reason: None)


def _end_a_turn_without_its_answer() -> AbstractContextManager[Any]:
    end_turn = turns.end_turn

    def ending(d: Any, outcome: Any, **options: Any) -> None:
        if outcome != "answered":
            options["reply_id"] = None
        end_turn(d, outcome, **options)

    return patch.object(turns, "end_turn", ending)


def _keep_one_message_less() -> AbstractContextManager[Any]:
    plan_compaction = context.plan_compaction

    def planning(history: Any, **options: Any) -> Any:
        plan = plan_compaction(history, **options)
        ids = [message.id for message, _ in context.visible(history).messages]
        if plan is None or plan.tail_start_id not in ids[:-1]:
            return plan
        after = ids[ids.index(plan.tail_start_id) + 1]
        return msgspec.structs.replace(plan, tail_start_id=after)

    return patch.object(context, "plan_compaction", planning)


def _summarise_all_but_the_first_message() -> AbstractContextManager[Any]:
    chunks = context._chunks
    return patch.object(
        context, "_chunks", lambda summary, head, chunk: chunks(summary, head[1:] or head, chunk)
    )


def _remove_only_the_first_reverted_message() -> AbstractContextManager[Any]:
    remove = prompts.remove_reverted
    return patch.object(prompts, "remove_reverted", lambda d, ids: remove(d, ids[:1]))


def _answer_in_the_name_of_who_joined() -> AbstractContextManager[Any]:
    def naming(d: Any, turn: Any, **options: Any) -> None:
        entry = turn.joined[-1] if turn.joined else turn.entry
        open_step(d, msgspec.structs.replace(turn, entry=entry), **options)
        d.turn = msgspec.structs.replace(d.turn, entry=turn.entry)

    open_step = turns.open_step
    return patch.object(turns, "open_step", naming)


def _count_no_cost() -> AbstractContextManager[Any]:
    count = turns._count
    return patch.object(
        turns, "_count", lambda d, message: count(d, msgspec.structs.replace(message, cost=0.0))
    )


def _let_actors_hang() -> AbstractContextManager[Any]:
    return patch.object(Upkeep, "_hung_handlers", lambda self: None)


def _forget_quarantine_at_a_restart() -> AbstractContextManager[Any]:
    return patch.object(Reads, "quarantined", lambda self: {})


def _never_tell_that_a_turn_ended() -> AbstractContextManager[Any]:
    return patch.object(Engine, "session_changed", lambda self, info, facts: None)


def _tell_of_turns_that_others_ended() -> AbstractContextManager[Any]:
    observe = Outcomes.observe

    def observing(self: Any, event: Any) -> None:
        observe(self, event)
        actor = self._host.registry.actor(event.session_id)
        if event.type == "prompt.settled" and actor is not None and actor.state is not None:
            self._host.hooks.after_turn(actor.state.info, event.data)

    return patch.object(Outcomes, "observe", observing)


def _take_a_revert_back_in_memory_only() -> AbstractContextManager[Any]:
    def taking_back(d: Any, command: Any) -> Any:
        d.info = msgspec.structs.replace(d.info, revert=None)
        return d.info

    return patch.dict(decide._HANDLERS, {Unrevert: taking_back})


def _keep_what_a_tracker_knew_of_the_deleted() -> AbstractContextManager[Any]:
    return patch.object(SessionTracker, "forget", lambda self, key: None)


def _forgive_no_crash() -> AbstractContextManager[Any]:
    return patch.object(Batch, "answered", property(lambda self: False))


def _forgive_a_crash_at_any_end() -> AbstractContextManager[Any]:
    return patch.object(Batch, "answered", property(lambda self: bool(self.settled)))


def _let_grandchildren_live() -> AbstractContextManager[Any]:
    return patch.object(claims, "_TREE", claims._TREE.replace("depth < 1000", "depth < 1"))


def _remember_crashes_after_a_reset() -> AbstractContextManager[Any]:
    lift = claims.lift_quarantine

    def lifting(tx: Any, *, session_id: str, **options: Any) -> Any:
        before = claims.restart_record(tx, session_id)
        lifted, events = lift(tx, session_id=session_id, **options)
        if lifted:
            claims.put_restart(tx, msgspec.structs.replace(before, quarantined_ms=None))
        return lifted, events

    return patch.object(claims, "lift_quarantine", lifting)


def _end_nobody_at_a_close() -> AbstractContextManager[Any]:
    return patch.object(Registry, "wind_down", lambda self: [])


def _begin_what_waits_at_a_close() -> AbstractContextManager[Any]:
    def aborting(d: Any, command: Any) -> Any:
        did = prompts.abort(d, command)
        d.closing = False
        turns.advance(d)
        return did

    return patch.dict(decide._HANDLERS, {Abort: aborting})


def _leave_alone_what_was_reset() -> AbstractContextManager[Any]:
    def resetting(self: Any, session_id: str, pending: Any) -> None:
        def done(lifted: Any, _: Any, error: Any) -> None:
            self._engine.registry.quarantined.pop(session_id, None)
            pending.fail(error) if error is not None else pending.set(bool(lifted))

        facts = (SessionReset(session_id=session_id),)
        self._engine.store.lift_quarantine(session_id, facts, done)

    return patch.object(Lifecycle, "reset", resetting)


def _give_up_executions_at_first_sight() -> AbstractContextManager[Any]:
    lost_executions = Upkeep._lost_executions

    def looking(self: Any) -> None:
        self._suspects = Mock(get=lambda key: ANY)
        lost_executions(self)

    return patch.object(Upkeep, "_lost_executions", looking)


def _do_not_watch_calls() -> AbstractContextManager[Any]:
    work_of = upkeep._work_of
    return patch.object(
        upkeep, "_work_of", lambda state: [each for each in work_of(state) if each[0] == each[1]]
    )


def _restart_as_often_as_it_crashes() -> AbstractContextManager[Any]:
    record = Supervisor._record
    return patch.object(
        Supervisor,
        "_record",
        lambda self, news, _: record(self, news, self._policy.quarantine_after),
    )


def _quarantine_one_crash_too_early() -> AbstractContextManager[Any]:
    count = Supervisor._count

    def counting(self: Any, news: Any) -> None:
        less = msgspec.structs.replace(self._policy, intensity=self._policy.intensity - 1)
        with patch.object(self, "_policy", less):
            count(self, news)

    return patch.object(Supervisor, "_count", counting)


def _bear_silence_for_twice_its_time() -> AbstractContextManager[Any]:
    begin = Silences.__init__
    return patch.object(Silences, "__init__", lambda self, limit_s: begin(self, 2 * limit_s))


def _work_on_for_who_owns_it_no_more() -> AbstractContextManager[Any]:
    cancel = Executor.cancel

    def cancelling(self: Any, session_id: str, reason: str) -> None:
        if reason != "lost":
            cancel(self, session_id, reason)

    return patch.object(Executor, "cancel", cancelling)


def _drop_reports_that_were_not_stored() -> AbstractContextManager[Any]:
    not_stored = SessionActor._not_stored

    def dropping(self: Any, batch: Any, error: Any) -> None:
        with patch.object(Mailbox, "put_back", lambda self, request: None):
            not_stored(self, batch, error)

    return patch.object(SessionActor, "_not_stored", dropping)


PLANTED = [
    Planted(name.removeprefix("_").replace("_", " "), plant)
    for name, plant in list(globals().items())
    if name.startswith("_") and not name.startswith("__")
]
