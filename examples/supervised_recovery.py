"""A session's actor dies in the middle of a turn; the understudy walks on.

The supervisor restarts the actor. Before anything else its session is made whole: the open answer
and the running tool are closed as interrupted, never silently run again. Then the app's own
recovery hook is called, and decides what to do about it: here, to ask again.
"""

from __future__ import annotations

import logging
import queue
import tempfile
import threading
from pathlib import Path

from understudy import RecoveryReport, Runtime, ScriptedModel, Session, ToolContext, errors
from understudy.testing import Call

under_way = threading.Event()
reports: queue.SimpleQueue[RecoveryReport] = queue.SimpleQueue()


def move_crates(count: int, ctx: ToolContext) -> str:
    """Move crates: slow work with an effect on the world, not to be done twice unasked."""
    if not under_way.is_set():
        cancelled = threading.Event()
        ctx.on_cancel(cancelled.set)
        under_way.set()
        cancelled.wait(30)
        ctx.check()
    return f"moved {count} crates"


def ask_again(_runtime: Runtime, session: Session, report: RecoveryReport) -> None:
    """The app's recovery hook: called once the session is whole and usable."""
    session.prompt("You were interrupted. Look at what is done, and do the rest.")
    reports.put(report)


def main() -> None:
    # The crash is logged with its traceback; here it would only be in the way.
    logging.getLogger("understudy").addHandler(logging.NullHandler())
    script = ScriptedModel(
        [Call("move_crates", {"count": 3}), Call("move_crates", {"count": 3}), "All three moved."]
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        Runtime(
            Path(folder) / "agent.db", model=script, tools=[move_crates], recovery_hook=ask_again
        ) as runtime,
    ):
        session = runtime.create_session(title="Warehouse")
        turn = session.prompt("Move three crates.")
        under_way.wait(30)
        pull_the_rug(session)
        try:
            turn.result(timeout_s=30)
        except errors.TurnAborted as interrupted:
            print(f"the first prompt: {interrupted}")
        report = reports.get(timeout=30)
        print(f"recovered after a {report.reason}; interrupted: {', '.join(report.calls)}")
        session.wait_idle(timeout_s=30)
        for message in session.messages():
            states = [f"{part.tool} {part.state.status}" for part in message.tools]
            print(f"{message.role:>9}: {message.text or ', '.join(states)}")
        print(f"{runtime.restarts} restart; the session is {session.status().type}")


def pull_the_rug(session: Session) -> None:
    """What a bug in the session's actor would do. The caller is told; nobody else notices."""
    try:
        session._crash("a bug, for show")  # noqa: SLF001 - not for apps, hence the underscore
    except errors.ActorCrashed as crash:
        print(f"crashed: {type(crash.__cause__).__name__}")


if __name__ == "__main__":
    main()
