"""Planted bugs: each breaks one promise on purpose, by patching the runtime, and must be caught.

A simulator that catches no planted bug proves nothing about the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import msgspec

from understudy.actors import runtime, session
from understudy.actors.core import calls, compaction, prompts, recovery
from understudy.actors.executor import Executor
from understudy.actors.publisher import Publisher
from understudy.actors.session_actor import SessionActor
from understudy.actors.upkeep import Upkeep
from understudy.store import changes, claims
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


PLANTED = [
    Planted(name.removeprefix("_").replace("_", " "), plant)
    for name, plant in list(globals().items())
    if name.startswith("_") and not name.startswith("__")
]
